"""Writes the two packed sets that the embedded CLIP is trained on: `python benchmarks/clip_sets.py OUT [--corpus DIR]`.

`OUT/scenes`: mini-web scenes, train without and val with the held-out combinations. Of every third training scene only
one object is drawn and told, with its place: sides are learned from one object before two. `OUT/clipart`: the corpus'
clip art and emoji; val is the quarter whose path hashes below 64, and what is nearly a copy of one of those is in
neither. The stamps are in neither. Equal calls write equal bytes.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import tarfile
from collections.abc import Iterable, Iterator
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import NamedTuple

import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline.base import write_json
from pipeline.miniweb import scenes
from pipeline.shards import FORMAT_VERSION, TarWriter, canonical_json, shard_name, write_parquet

CORPUS = Path(__file__).resolve().parents[1] / "../shared/corpus"
TRAIN_SEED, VAL_SEED, VAL_SCENES = 4242, 777, 2000
PER_SHARD = 2000
PLACED_EVERY = 3  # every n-th training scene shows one of its objects only
SIDES = ([96, 128, 160, 224], [0.3, 0.4, 0.2, 0.1])  # pixels of a scene's side, and how often


class Row(NamedTuple):
    uid: str
    picture: bytes
    caption: str
    width: int
    height: int
    swaps: list[str]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=90_000)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    options = parser.parse_args()
    counts = {
        "val": write_split(options.out / "scenes" / "val", drawn(VAL_SCENES, VAL_SEED, held=True)),
        "train": write_split(options.out / "scenes" / "train", drawn(options.scenes, TRAIN_SEED, held=False)),
    }
    write_json(options.out / "scenes" / "dataset.json", {"format_version": FORMAT_VERSION, "counts": counts})
    train, val = clip_art(options.corpus)
    counts = {
        "train": write_split(options.out / "clipart" / "train", train),
        "val": write_split(options.out / "clipart" / "val", val),
    }
    write_json(options.out / "clipart" / "dataset.json", {"format_version": FORMAT_VERSION, "counts": counts})


def drawn(count: int, seed: int, held: bool) -> Iterator[Row]:
    """The first `count` scenes of a sequence that are (not) held out, as JPEGs of mixed size and quality."""
    rng = np.random.default_rng(seed)
    chosen = (i for i in numbers() if scenes.held_out(scenes.scene(seed, i)) == held)
    for index in islice(chosen, count):
        scene = scenes.scene(seed, index)
        side, variant = int(rng.choice(SIDES[0], p=SIDES[1])), int(rng.integers(1 << 30))
        quality = int(rng.integers(75, 96))
        sampling = "420" if rng.random() < 0.7 else "444"
        only = int(rng.integers(2)) if not held and scene.relation and index % PLACED_EVERY == 0 else None
        pixels = np.ascontiguousarray(np.asarray(scenes.draw(scene, side, only)))
        if only is None:
            told, wrong = scenes.caption(scene, variant), scenes.swaps(scene, variant)
        else:
            told, opposite = scenes.placed(scene, only, variant)
            wrong = [opposite]
        picture = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=sampling)
        yield Row(f"{seed}/{index}", picture, told, side, side, wrong)


def clip_art(corpus: Path) -> tuple[list[Row], list[Row]]:
    """Training and held-out rows, each in the order of a hash of the path."""
    table = {row["path"]: row for row in pq.read_table(corpus / "captions.parquet").to_pylist()}
    with tarfile.open(corpus / "images.tar") as tar:
        data = {m.name: tar.extractfile(m).read() for m in tar if not m.name.startswith("stamps/")}  # type: ignore[union-attr]
    held = {name for name in data if is_held_out(name)}
    near = near_copies(data, held)
    rows = {
        name: Row(name, data[name], row["caption"], row["width"], row["height"], [])
        for name, row in table.items()
        if name in data and name not in near
    }
    ordered = sorted(rows, key=lambda name: hashlib.sha256(b"order" + name.encode()).hexdigest())
    return [rows[n] for n in ordered if n not in held], [rows[n] for n in ordered if n in held]


def is_held_out(name: str) -> bool:
    return name.startswith("openclipart/") and hashlib.sha256(name.encode()).digest()[0] < 64


def near_copies(data: dict[str, bytes], held: set[str]) -> set[str]:
    """Pictures outside `held` that look like one in it: by perceptual hash, by 16 by 16 pixels, or by both less so."""
    looks = {name: look(picture) for name, picture in data.items()}
    hashes = np.array([looks[name][0] for name in sorted(held)])  # (H, 64)
    pixels = np.array([looks[name][1] for name in sorted(held)])  # (H, 768)
    found = set()
    for name, (bits, small) in looks.items():
        if name in held:
            continue
        differing = (hashes != bits).sum(axis=1)
        distance = np.sqrt(np.square(pixels - small).mean(axis=1))
        if ((differing <= 3) | (distance < 10) | ((differing <= 8) & (distance < 40))).any():
            found.add(name)
    return found


def look(picture: bytes) -> tuple[NDArray[np.bool_], NDArray[np.float32]]:
    """Perceptual hash (64 bits) and 16 by 16 pixels (768 values)."""
    image = Image.open(io.BytesIO(picture)).convert("RGB")
    small = np.asarray(image.resize((16, 16), Image.Resampling.BICUBIC), np.float32).ravel()
    return imagehash.phash(image).hash.ravel(), small


def write_split(folder: Path, rows: Iterable[Row]) -> int:
    """Write rows as packed shards; returns how many."""
    folder.mkdir(parents=True, exist_ok=True)
    source, written = iter(rows), 0
    for number in numbers():
        part = tuple(islice(source, PER_SHARD))
        if not part:
            break
        write_shard(folder, number, part)
        written += len(part)
    return written


def write_shard(folder: Path, number: int, rows: tuple[Row, ...]) -> None:
    name, members = shard_name(number), []
    with (folder / f"{name}.tar").open("wb") as file:
        tar = TarWriter(file)
        for place, row in enumerate(rows):
            key = f"{name}{place:04d}"
            members.append(tar.add(f"{key}.jpg", row.picture))
            tar.add(f"{key}.txt", row.caption.encode())
            fields = {"uid": row.uid, "url": row.uid, "caption": row.caption}
            tar.add(f"{key}.json", canonical_json(fields | {"width": row.width, "height": row.height}))
        tar.close()
    columns = {
        "key": [f"{name}{place:04d}" for place in range(len(rows))],
        "uid": [row.uid for row in rows],
        "caption": [row.caption for row in rows],
        "swaps": pa.array([row.swaps for row in rows], pa.list_(pa.string())),
        "offset": [member.offset for member in members],
        "length": [member.length for member in members],
    }
    write_parquet(pa.table(columns), folder / f"{name}.parquet")


if __name__ == "__main__":
    main()
