"""The hash is imagehash's own, bit for bit."""

from __future__ import annotations

import imagehash
import numpy as np
from PIL import Image

from pipeline.signals import Picture, SignalOptions
from pipeline.signals.phash import load
from tests.pipeline.factory import picture

SIGNAL = load(SignalOptions())


def test_equals_imagehash_bit_for_bit() -> None:
    for seed in range(20):
        image = picture(seed)
        seen = SIGNAL.look(Picture({}, np.asarray(image)))
        assert seen is not None
        bits = imagehash.phash(image).hash.flatten()
        assert [seen >> (63 - i) & 1 for i in range(64)] == bits.astype(int).tolist()


def test_all_64_bits_survive_the_column() -> None:
    table = SIGNAL.columns([0, 2**63 + 1, 2**64 - 1])
    assert table.schema == SIGNAL.schema()
    assert table["phash"].to_pylist() == [0, 2**63 + 1, 2**64 - 1]


def test_a_resized_copy_is_near_and_another_picture_is_far() -> None:
    image = picture(1, side=200)
    hashes = [SIGNAL.look(Picture({}, np.asarray(each))) for each in (image, image.resize((90, 90)), picture(2))]
    near, far = ((hashes[0] or 0) ^ (other or 0) for other in hashes[1:])
    assert near.bit_count() <= 6 < 16 < far.bit_count()


def test_no_pixels_no_hash_and_one_pixel_has_one() -> None:
    assert SIGNAL.look(Picture({}, None, "corrupt")) is None
    dot = np.zeros((1, 1, 3), np.uint8)
    assert SIGNAL.look(Picture({}, dot)) == int(str(imagehash.phash(Image.fromarray(dot))), 16)
