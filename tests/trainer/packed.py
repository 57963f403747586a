"""A small packed set for tests, written as the format says."""

from __future__ import annotations

import contextlib
import json
import resource
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import simplejpeg
from numpy.typing import NDArray

from pipeline.clip import Clip
from pipeline.miniweb import scenes
from pipeline.shards import TarWriter, read_parquet, shard_files, vector_column, write_parquet

COLOURS = {"red": (220, 30, 30), "green": (30, 200, 30), "blue": (30, 30, 220), "white": (250, 250, 250)}

SWAPPED = [["red and nothing else"]] * 16  # the wrong captions of `write_kept`


def pictures_and_captions() -> tuple[list[bytes], list[str]]:
    """Sixteen pictures of two halves, with the captions that name their colours."""
    pictures, captions = [], []
    for left, a in COLOURS.items():
        for right, b in COLOURS.items():
            picture = np.empty((48, 48, 3), np.uint8)
            picture[:, :24], picture[:, 24:] = a, b
            pictures.append(simplejpeg.encode_jpeg(picture))
            captions.append(f"{left} on the left, {right} on the right")
    return pictures, captions


def write_packed(
    folder: Path,
    captions: Sequence[str | None] | None = None,
    swaps: Sequence[Sequence[str]] | None = None,
    rows: int = 16,
    per_shard: int = 10,
    clip: Clip | None = None,
    pictures: Sequence[bytes] | None = None,
) -> Path:
    """Write `folder`: train in shards of `per_shard`, val the same rows in one shard, with vectors of a CLIP."""
    halves, own = pictures_and_captions()
    pictures = halves if pictures is None else pictures
    texts = list(own if captions is None else captions)[:rows]
    for split, size in (("train", per_shard), ("val", rows)):
        for number, start in enumerate(range(0, rows, size)):
            stop = min(start + size, rows)
            part = None if swaps is None else swaps[start:stop]
            _write_shard(folder / split / f"{number:05d}", pictures[start:stop], texts[start:stop], part, clip)
    about = {"format_version": 1, "rows": rows, "clip": clip.identity if clip else None}
    (folder / "dataset.json").write_text(json.dumps(about))
    return folder


def write_scenes(folder: Path, clip: Clip | None = None) -> Path:
    """Write a set of sixteen scenes of the mini-web, which the embedded CLIP knows, with their wrong captions."""
    drawn = [scenes.scene(0, number) for number in range(16)]
    pictures = [simplejpeg.encode_jpeg(np.asarray(scenes.draw(scene, 128))) for scene in drawn]
    captions = [scenes.caption(scene, number) for number, scene in enumerate(drawn)]
    swaps = [scenes.swaps(scene, number) for number, scene in enumerate(drawn)]
    return write_packed(folder, captions, swaps, clip=clip, pictures=pictures)


def write_kept(folder: Path) -> Path:
    """Write a set of sixteen toys, each with one wrong caption of its own."""
    return write_packed(folder, [f"{n} toys on a shelf" for n in range(16)], SWAPPED)


def _write_shard(
    stem: Path,
    pictures: Sequence[bytes],
    captions: Sequence[str | None],
    swaps: Sequence[Sequence[str]] | None,
    clip: Clip | None,
) -> None:
    stem.parent.mkdir(parents=True, exist_ok=True)
    members = []
    with stem.with_suffix(".tar").open("wb") as file:
        tar = TarWriter(file)
        for number, (picture, caption) in enumerate(zip(pictures, captions, strict=True)):
            members.append(tar.add(f"{stem.name}{number:04d}.jpg", picture))
            tar.add(f"{stem.name}{number:04d}.txt", (caption or "").encode())
        tar.close()
    columns: dict[str, object] = {
        "key": [f"{stem.name}{number:04d}" for number in range(len(members))],
        "caption": pa.array(captions, pa.string()),
        "offset": [member.offset for member in members],
        "length": [member.length for member in members],
    }
    if swaps is not None:
        columns["swaps"] = pa.array([list(row) for row in swaps], pa.list_(pa.string()))
    if clip is not None:
        there = np.ones(len(members), bool)
        decoded = [simplejpeg.decode_jpeg(picture) for picture in pictures]
        columns["image_emb"] = vector_column(clip.encode_images(decoded), there)
        columns["text_emb"] = vector_column(clip.encode_texts([text or "" for text in captions]), there)
        columns["weight"] = np.ones(len(members), np.float32)
    write_parquet(pa.table(columns), stem.with_suffix(".parquet"))


def with_column(
    folder: Path, name: str, values: NDArray[np.floating[Any]], there: NDArray[np.bool_] | None = None
) -> Path:
    """Give a set's training rows a column of vectors (rows, D), null where not `there`."""
    start = 0
    for path in shard_files(folder / "train", "parquet"):
        table = read_parquet(path)
        part = slice(start, start := start + len(table))
        mask = np.ones(len(table), bool) if there is None else there[part]
        write_parquet(table.append_column(name, vector_column(values[part], mask)), path)
    return folder


@contextlib.contextmanager
def small_files(size: int) -> Iterator[None]:
    """Within, no file can grow beyond `size` bytes: the system refuses as it does on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
