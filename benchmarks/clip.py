"""Measures a CLIP on pictures it never saw: `python benchmarks/clip.py [CLIP] [--corpus DIR]`.

Held-out mini-web scenes, the held-out quarter of the corpus' clip art, the stamps, how far copies of a picture move,
and speed. Captions that are equal count as the same answer.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import tarfile
import time
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import numpy as np
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from pipeline import clip as clips
from pipeline.miniweb import scenes
from trainer.evaluate_clip import GOOD_COSINE, auc, pair_figures, share_within

Picture = NDArray[np.uint8]
CORPUS = Path(__file__).resolve().parents[1] / "../shared/corpus"
SCENES, SCENE_SEED = 2048, 99  # the benchmark's own sequence of scenes
GROUP = 256  # captions that a scene's picture chooses among
CLIPART = 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("clip", nargs="?", default="mini")
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    options = parser.parse_args()
    clip = clips.load(options.clip, device="cpu")
    figures: dict[str, float] = {}
    figures |= scene_figures(clip)
    if options.corpus.is_dir():
        figures |= corpus_figures(clip, options.corpus)
    figures |= copy_figures(clip)
    figures |= speed_figures(clip)
    if options.json:
        print(json.dumps({name: round(value, 4) for name, value in figures.items()}))
        return
    for name, value in figures.items():
        print(f"{name:62s} {value:9.4f}" if abs(value) < 10 else f"{name:62s} {value:9.0f}")


def held_out_scenes(count: int, seed: int) -> list[scenes.Scene]:
    """The first scenes of a sequence whose combination no CLIP was trained on."""
    found: list[scenes.Scene] = []
    index = 0
    while len(found) < count:
        scene = scenes.scene(seed, index)
        if scenes.held_out(scene):
            found.append(scene)
        index += 1
    return found


def jpeg(picture: Picture, quality: int) -> bytes:
    return bytes(simplejpeg.encode_jpeg(np.ascontiguousarray(picture), quality=quality, colorsubsampling="420"))


def drawn(scene: scenes.Scene, side: int = 256) -> Picture:
    """A scene as it reaches a CLIP: drawn, encoded, decoded."""
    return simplejpeg.decode_jpeg(jpeg(np.asarray(scenes.draw(scene, side)), 90))  # type: ignore[no-any-return]


def scene_figures(clip: clips.Clip) -> dict[str, float]:
    held = held_out_scenes(SCENES, SCENE_SEED)
    captions = [scenes.caption(scene, number) for number, scene in enumerate(held)]
    images = clip.encode_images([drawn(scene) for scene in held])
    texts = clip.encode_texts(captions)
    first = np.mean(
        [
            share_within(images[a : a + GROUP] @ texts[a : a + GROUP].T, captions[a : a + GROUP], 1)
            for a in range(0, SCENES, GROUP)
        ]
    )
    wrong = clip.encode_texts([scenes.wrong_caption(s, SCENE_SEED + 1, n, n) for n, s in enumerate(held)])
    right_cosine, wrong_cosine = np.sum(images * texts, axis=1), np.sum(images * wrong, axis=1)
    loss_at = float(np.quantile(right_cosine, 0.02))
    figures = {
        f"scenes: right caption first of {GROUP} (>= 0.95)": float(first),
        "scenes: planted wrong caption against right, AUC (>= 0.995)": auc(right_cosine, wrong_cosine),
        f"scenes: right pairs above {GOOD_COSINE} (>= 0.95)": float((right_cosine > GOOD_COSINE).mean()),
        f"scenes: planted wrong pairs below {GOOD_COSINE}": float((wrong_cosine <= GOOD_COSINE).mean()),
        "scenes: cosine that loses 2% of right pairs": loss_at,
        "scenes: planted wrong pairs below that": float((wrong_cosine < loss_at).mean()),
        "scenes: mean cosine, right": float(right_cosine.mean()),
        "scenes: mean cosine, planted wrong": float(wrong_cosine.mean()),
        "scenes: mean cosine, all unrelated": unrelated_mean(images, texts),
    }
    return figures | swap_figures(clip, images, texts, held) | shape_figures(clip, images, texts, held)


def swap_figures(
    clip: clips.Clip, images: NDArray[np.float32], texts: NDArray[np.float32], held: Sequence[scenes.Scene]
) -> dict[str, float]:
    """Share of swapped captions below the true one: of all, and by what was exchanged."""
    rows, wrong, kinds = [], [], []
    for row, scene in enumerate(held):
        for place, text in enumerate(swaps := scenes.swaps(scene, row)):
            rows.append(row)
            wrong.append(text)
            kinds.append(kind_of(scene, place, len(swaps)))
    true = np.sum(images[rows] * texts[rows], axis=1)
    below = true > np.sum(images[rows] * clip.encode_texts(wrong), axis=1)
    shares = {
        f"scenes: true caption above its swap, {kind}": float(below[np.array(kinds) == kind].mean())
        for kind in sorted(set(kinds))
    }
    return {"scenes: true caption above its swap (>= 0.90)": float(below.mean())} | shares


def kind_of(scene: scenes.Scene, place: int, count: int) -> str:
    """What the `place`-th of `count` swaps exchanged: colours, sizes and relation come in that order."""
    if place == count - 1:
        return "relation"
    first, second = scene.objects
    return "colours" if place == 0 and first.colour != second.colour else "sizes"


def shape_figures(
    clip: clips.Clip, images: NDArray[np.float32], texts: NDArray[np.float32], held: Sequence[scenes.Scene]
) -> dict[str, float]:
    """What colours give away in all other figures of scenes: which object has which shape, and which of eight it is."""
    exchanged, renamed = [], []
    for row, scene in enumerate(held):
        shapes = [thing.shape for thing in scene.objects]
        if len(set(shapes)) == 2:
            exchanged.append((row, scenes.caption(scenes.reshaped(scene, shapes[::-1]), row)))
        others = [scenes.reshaped(scene, [shape, *shapes[1:]]) for shape in scenes.SHAPES if shape != shapes[0]]
        renamed += [(row, scenes.caption(other, row)) for other in others]

    def below(pairs: Sequence[tuple[int, str]]) -> NDArray[np.bool_]:
        rows = [row for row, _ in pairs]
        wrong = np.sum(images[rows] * clip.encode_texts([text for _, text in pairs]), axis=1)
        right: NDArray[np.bool_] = np.sum(images[rows] * texts[rows], axis=1) > wrong
        return right

    first = below(renamed).reshape(len(held), -1).all(axis=1)
    return {
        "scenes: true caption above its swap, shapes (not asked for)": float(below(exchanged).mean()),
        f"scenes: first object's shape right among {len(scenes.SHAPES)} (not asked for)": float(first.mean()),
    }


def unrelated_mean(images: NDArray[np.float32], texts: NDArray[np.float32]) -> float:
    """Mean cosine of every picture with every other row's caption."""
    count = len(images)
    total = float(images.sum(axis=0, dtype=np.float64) @ texts.sum(axis=0, dtype=np.float64))
    return (total - float(np.sum(images * texts, dtype=np.float64))) / (count * (count - 1))


def corpus_figures(clip: clips.Clip, folder: Path) -> dict[str, float]:
    import pyarrow.parquet as pq

    rows = pq.read_table(folder / "captions.parquet").to_pylist()
    captions = {row["path"]: row["caption"] for row in rows}
    with tarfile.open(folder / "images.tar") as tar:
        wanted = [member for member in tar if measured(member.name)]
        data = {member.name: tar.extractfile(member).read() for member in wanted}  # type: ignore[union-attr]
    art, stamps = (shuffled(name for name in data if name.startswith(part)) for part in ("openclipart/", "stamps/"))
    chosen, distinct = art[:CLIPART], list({captions[name]: name for name in art}.values())
    figures: dict[str, float] = {}
    for label, names, first in (
        (f"clip art, {CLIPART} held-out pictures", chosen, 10),
        (f"clip art, {len(distinct)} distinct captions", distinct, 10),
        ("stamps", stamps, 10),
    ):
        texts = [captions[name] for name in names]
        images = clip.encode_images([simplejpeg.decode_jpeg(data[name]) for name in names])
        for key, value in pair_figures(images, clip.encode_texts(texts), texts, first).items():
            figures[f"{label}: {key}"] = value
    return figures


def shuffled(names: Iterable[str]) -> list[str]:
    """Names in a random order that is always the same: the next one's caption is a random one."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(name.encode()).digest())
    return [ordered[place] for place in np.random.default_rng(0).permutation(len(ordered))]


def measured(name: str) -> bool:
    """The stamps, and the clip art whose path hashes into the held-out quarter."""
    held = name.startswith("openclipart/") and hashlib.sha256(name.encode()).digest()[0] < 64
    return held or name.startswith("stamps/")


def copy_figures(clip: clips.Clip) -> dict[str, float]:
    """Cosine of a picture's vector with those of its copies, and with those of other pictures."""
    originals = [np.asarray(scenes.draw(scene, 256)) for scene in held_out_scenes(256, SCENE_SEED)]
    vectors = clip.encode_images(originals)
    between = vectors @ vectors.T
    apart = between[~np.eye(len(vectors), dtype=bool)]
    figures = {}
    for name, change in COPIES.items():
        near = np.sum(vectors * clip.encode_images([change(picture) for picture in originals]), axis=1)
        figures[f"copies, {name}: lowest percentile"] = float(np.quantile(near, 0.01))
        figures[f"copies, {name}: share >= 0.97"] = float((near >= 0.97).mean())
    figures["other pictures: 99.9th percentile"] = float(np.quantile(apart, 0.999))
    figures["other pictures: share >= 0.97"] = float((apart >= 0.97).mean())
    return figures


def _decoded(picture: Picture, quality: int) -> Picture:
    return simplejpeg.decode_jpeg(jpeg(picture, quality))  # type: ignore[no-any-return]


def _resized(picture: Picture, side: int) -> Picture:
    with io.BytesIO(jpeg(picture, 95)) as file:
        return np.asarray(Image.open(file).resize((side, side), Image.Resampling.BICUBIC))


COPIES: dict[str, Callable[[Picture], Picture]] = {
    "JPEG quality 40": lambda picture: _decoded(picture, 40),
    "half the side": lambda picture: _resized(picture, 128),
    "5% cut from two sides": lambda picture: picture[13:, :-13],
    "8% brighter": lambda picture: np.clip(picture * 1.08, 0, 255).astype(np.uint8),
    "warmer": lambda picture: np.clip(picture + np.array([10, 0, -10]), 0, 255).astype(np.uint8),
}


def speed_figures(clip: clips.Clip) -> dict[str, float]:
    held = held_out_scenes(512, SCENE_SEED)
    encoded = [jpeg(np.asarray(scenes.draw(scene, 256)), 90) for scene in held]
    captions = [scenes.caption(scene, number) for number, scene in enumerate(held)]
    clip.encode_images([simplejpeg.decode_jpeg(encoded[0])] * 64)
    started = time.perf_counter()
    clip.encode_images([simplejpeg.decode_jpeg(data) for data in encoded])
    pictures = time.perf_counter() - started
    clip.encode_texts(captions)
    both = time.perf_counter() - started
    return {
        "pictures/s, decoding included (>= 300)": len(held) / pictures,
        "pairs/s, decoding and captions included": len(held) / both,
    }


if __name__ == "__main__":
    main()
