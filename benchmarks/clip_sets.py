"""Writes what a CLIP to embed is trained on, four packed sets and a lexicon: `python -m benchmarks.clip_sets OUT`.

`OUT/scenes`: mini-web scenes, train without and val with the held-out combinations. Of every third training scene only
one object is drawn and told, with its place: sides are learned from one object before two. Wrong captions of the others
have colours, shapes, sizes or the relation exchanged, or one shape told as another. `OUT/clipart/curated`: the
corpus' clip art and emoji as `curate` leaves them, without the quarter whose path hashes below 64 and without what is
within 8 bits of one of those by perceptual hash; the column `guesses` is what `benchmarks.teacher` takes a picture for.
`OUT/views`: those drawings from further away (`benchmarks.views`). `OUT/looks`: the first of them again, in other
looks (`benchmarks.looks`). In the last three the column `teacher` is what `benchmarks.teacher` says of a picture. The
stamps are in none.
`OUT/kinds.parquet`: what nouns are kinds of (`benchmarks.kinds`).
"""

from __future__ import annotations

import argparse
import hashlib
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterable, Iterator, Mapping
from itertools import count as numbers
from itertools import islice
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import simplejpeg
from numpy.typing import NDArray
from PIL import Image

from benchmarks.kinds import WORDNET, write_kinds
from benchmarks.looks import looks
from benchmarks.teacher import guesses, vectors
from benchmarks.views import SIDE, Views, views
from pipeline.base import file_sha256, write_json
from pipeline.miniweb import scenes
from pipeline.shards import FORMAT_VERSION, TarWriter, canonical_json, shard_name, vector_column, write_parquet

CORPUS = Path(__file__).resolve().parents[1] / "../shared/corpus"
TRAIN_SEED, VAL_SEED, VAL_SCENES, VAL_VIEWS = 4242, 777, 2000, 256
PER_SHARD = 2000
VIEWS_SEED = 5
PLACED_EVERY = 3  # every n-th training scene shows one of its objects only
SIDES = ([96, 128, 160, 224], [0.3, 0.4, 0.2, 0.1])  # pixels of a scene's side, and how often


class Row(NamedTuple):
    uid: str
    picture: bytes
    caption: str
    width: int
    height: int
    swaps: list[str]
    teacher: NDArray[np.float16] | None = None


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path)
    parser.add_argument("--scenes", type=int, default=90_000)
    parser.add_argument("--views", type=int, default=30_000)
    parser.add_argument("--looks", type=int, default=12_000)
    parser.add_argument("--corpus", type=Path, default=CORPUS)
    parser.add_argument("--wordnet", type=Path, default=WORDNET)
    options = parser.parse_args()
    write_kinds(options.out / "kinds.parquet", options.wordnet)
    curate_clip_art(options.out, options.corpus)
    write_views(options.out, "views", views, {"train": options.views, "val": VAL_VIEWS})
    write_views(options.out, "looks", looks, {"train": options.looks, "val": VAL_VIEWS})
    write_scenes(options.out / "scenes", options.scenes)


def write_scenes(folder: Path, count: int, val: int = VAL_SCENES) -> None:
    """Train without, val with the held-out combinations."""
    write_set(folder, {"val": drawn(val, VAL_SEED, held=True), "train": drawn(count, TRAIN_SEED, held=False)})


def write_views(out: Path, name: str, make: Views, counts: Mapping[str, int]) -> None:
    """Views of the curated drawings, of either split's own."""
    write_set(out / name, {split: seen(out, split, make, count) for split, count in counts.items()})


def write_set(folder: Path, splits: Mapping[str, Iterable[Row]]) -> None:
    """Write `folder` anew, and a hash of every file."""
    shutil.rmtree(folder, ignore_errors=True)
    counts = {split: write_split(folder / split, rows) for split, rows in splits.items()}
    files = {str(path.relative_to(folder)): file_sha256(path) for path in sorted(folder.glob("*/*"))}
    write_json(folder / "dataset.json", {"format_version": FORMAT_VERSION, "counts": counts, "files": files})


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
            wrong += [] if held else wrong_shapes(scene, index, variant)
        else:
            told, opposite = scenes.placed(scene, only, variant)
            wrong = [opposite]
        picture = simplejpeg.encode_jpeg(pixels, quality=quality, colorsubsampling=sampling)
        yield Row(f"{seed}/{index}", picture, told, side, side, wrong)


def seen(out: Path, split: str, make: Views, count: int) -> Iterator[Row]:
    """Views of what `curate` packed, and what the teacher says of them."""
    packed = sorted((out / "clipart" / "curated" / split).glob("*.parquet"))
    rows = pa.concat_tables([pq.read_table(path, columns=["url", "caption"]) for path in packed]).to_pylist()
    pictures = (Image.open(out / "pictures" / row["url"]) for row in rows)
    drawn_views = enumerate(make(pictures, [row["caption"] for row in rows], count, VIEWS_SEED))
    while part := list(islice(drawn_views, PER_SHARD)):
        taught = vectors([Image.fromarray(view) for _, (view, _) in part])
        for (number, (view, caption)), teacher in zip(part, taught, strict=True):
            picture = simplejpeg.encode_jpeg(view, quality=92, colorsubsampling="444")
            yield Row(f"{split}/{number}", picture, caption, SIDE, SIDE, [], teacher)


def wrong_shapes(scene: scenes.Scene, index: int, variant: int) -> list[str]:
    """The caption with its shapes exchanged, and with one told as another: those that may be trained on."""
    true = [thing.shape for thing in scene.objects]
    place, shift = index % len(true), 1 + index // 2 % (len(scenes.SHAPES) - 1)
    other = scenes.SHAPES[(scenes.SHAPES.index(true[place]) + shift) % len(scenes.SHAPES)]
    told = [true[::-1], [other if n == place else shape for n, shape in enumerate(true)]]
    others = [scenes.reshaped(scene, shapes) for shapes in told if shapes != true]
    return [scenes.caption(other, variant) for other in others if not scenes.held_out(other)]


def curate_clip_art(out: Path, corpus: Path) -> None:
    """Lay out the pictures and, apart from them, the held-out ones; then `curate` them by clip_art.toml."""
    for folder in ("pictures", "held-out"):
        shutil.rmtree(out / folder, ignore_errors=True)
    with tarfile.open(corpus / "images.tar") as tar:
        for member in tar:
            if member.isfile() and not member.name.startswith("stamps/"):
                place = out / ("held-out" if is_held_out(member.name) else "pictures") / member.name
                place.parent.mkdir(parents=True, exist_ok=True)
                place.write_bytes(tar.extractfile(member).read())  # type: ignore[union-attr]
    captions = pq.read_table(corpus / "captions.parquet", columns=["path", "caption"])
    there = [(out / "pictures" / path).is_file() for path in captions["path"].to_pylist()]
    table = captions.filter(pa.array(there))
    taught = vectors([out / "pictures" / path for path in table["path"].to_pylist()])
    table = table.append_column("teacher", vector_column(taught, np.ones(len(taught), bool)))
    table = table.append_column("guesses", pa.array(guesses(taught), pa.list_(pa.string())))
    pq.write_table(table, out / "captions.parquet")
    command = [Path(sys.executable).with_name("curate"), "run", Path(__file__).with_name("clip_art.toml")]
    command += ["--source", out / "pictures", "--captions", out / "captions.parquet"]
    command += ["--against", out / "held-out", "--data", out / "clipart"]
    code = subprocess.run([*map(str, command)]).returncode
    if code:
        sys.exit(code)


def is_held_out(name: str) -> bool:
    return name.startswith("openclipart/") and hashlib.sha256(name.encode()).digest()[0] < 64


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
    columns: dict[str, Any] = {
        "key": [f"{name}{place:04d}" for place in range(len(rows))],
        "uid": [row.uid for row in rows],
        "caption": [row.caption for row in rows],
        "swaps": pa.array([row.swaps for row in rows], pa.list_(pa.string())),
        "offset": [member.offset for member in members],
        "length": [member.length for member in members],
    }
    taught = [row.teacher for row in rows if row.teacher is not None]
    if taught:
        columns["teacher"] = vector_column(np.stack(taught), np.ones(len(taught), bool))
    write_parquet(pa.table(columns), folder / f"{name}.parquet")


if __name__ == "__main__":
    main()
