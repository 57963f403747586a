"""The pictures of a held-out set, as fingerprints to compare with: a data folder, a packed set, or plain pictures.

A data folder and a packed set bring their signals. Plain pictures are decoded in the torch-free child and get the same
signals as a raw row would. Nothing is written.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

from pipeline.base import MISSING, REFUSED, HeadraceError, digest, file_sha256, read_json
from pipeline.near.neighbours import Fingerprints
from pipeline.shards import IMAGE_EXTENSIONS, DataDir, read_parquet, shard_files, vectors
from pipeline.verdict.aligned import Aligned, Column
from pipeline.verdict.concepts import clip_name, scored_by

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray

EXTENSIONS = {f".{extension}" for extension in (*IMAGE_EXTENSIONS, "gif", "bmp", "tif", "tiff")}
SPLITS = ("train", "val")


class HeldOut(NamedTuple):
    """Names of pictures (their keys, or paths in the folder) and their fingerprints."""

    names: pa.Array
    prints: Fingerprints


def fingerprint(place: Path) -> str:
    """A hash of what a held-out set is: of its checked record, or of every picture's path, size and content."""
    data = DataDir(place)
    if (place / "dataset.json").exists():
        return file_sha256(place / "dataset.json")
    if data.raw.is_dir() and data.markers.is_dir():
        aligned = Aligned(data)
        return digest([[shard.outputs for shard in aligned.shards], aligned.signals])
    return digest([(str(path.relative_to(place)), file_sha256(path)) for path in _pictures(place)])


def read(place: Path, ours: DataDir, columns: Mapping[str, Column]) -> HeldOut:
    """The held-out set at `place`, with those of `phash` and `image_emb` that are in `columns`.

    Raises:
        HeadraceError: code 3 where there is nothing to compare with, 4 where it was scored by another CLIP.
    """
    identity = scored_by(ours, "--against") if "image_emb" in columns else None
    if (place / "dataset.json").exists():
        if identity:
            _same_clip(place, identity, read_json(place / "dataset.json").get("clip"))
        return _gathered(_packed(place, ["key", *columns]))
    data = DataDir(place)
    if data.raw.is_dir() and data.markers.is_dir():
        if identity:
            _same_clip(place, identity, scored_by(data, f"--against {place}"))
        aligned = Aligned(data)
        for column in columns.values():
            aligned.require(column.table, f"--against {place}")
        return _gathered(aligned.batches({"key": Column("raw", "key"), **columns}, 100_000))
    if not place.is_dir() or not _pictures(place):
        message = f"--against {place} is no folder of pictures, no packed set and no data folder"
        raise HeadraceError(message, hint="name a folder that holds one of these", code=MISSING)
    return _gathered(_scored(place, ours, identity, columns))


def _same_clip(place: Path, ours: Mapping[str, Any], theirs: Any) -> None:
    known = theirs if isinstance(theirs, Mapping) else {}
    if any(known.get(name) != value for name, value in ours.items()):
        name = known.get("name")
        raise HeadraceError(
            f"{place} was scored by CLIP {name or 'unknown'}, this folder by another one, {ours['name']}",
            hint=f"score both with the same CLIP: `curate score --signals clip --clip {ours['name']}`",
            code=REFUSED,
        )


def _gathered(tables: Iterable[pa.Table]) -> HeldOut:
    """The rows that have what is compared."""
    import pyarrow as pa

    rows = pa.concat_tables(tables)
    for name in set(rows.column_names) & {"phash", "image_emb"}:
        rows = rows.filter(rows[name].is_valid())
    return HeldOut(rows["key"].combine_chunks(), prints_of(rows))


def prints_of(rows: pa.Table) -> Fingerprints:
    """The columns `phash` and `image_emb`, as far as they are there, as fingerprints."""

    hashes: NDArray[np.uint64] | None = rows["phash"].to_numpy() if "phash" in rows.column_names else None
    return Fingerprints(hashes, vectors(rows["image_emb"]) if "image_emb" in rows.column_names else None)


def _packed(place: Path, names: list[str]) -> Iterator[pa.Table]:
    for path in (path for split in SPLITS for path in shard_files(place / split, "parquet")):
        yield read_parquet(path, names)


def _pictures(place: Path) -> list[Path]:
    return sorted(path for path in place.rglob("*") if path.suffix.lower() in EXTENSIONS and path.is_file())


def _scored(
    place: Path, ours: DataDir, identity: Mapping[str, Any] | None, columns: Mapping[str, Column]
) -> Iterator[pa.Table]:
    """Plain pictures with the signals that the folder's own rows have; what cannot be decoded is passed over."""
    import pyarrow as pa

    from pipeline.images import ImageSandbox, Limits
    from pipeline.signals import Picture, SignalOptions, signal_module

    options = SignalOptions(clip=clip_name(ours, identity)) if identity else SignalOptions()
    if identity:
        _same_clip(place, identity, signal_module("clip").settings(options)["identity"])
    signals = {name: signal_module(column.table).load(options) for name, column in columns.items()}
    with ImageSandbox(Limits()) as sandbox:
        for path in _pictures(place):
            pixels = sandbox.decode(path.read_bytes())
            if isinstance(pixels, str):
                continue
            picture = Picture({"caption": None}, pixels)
            found = {name: signal.columns([signal.look(picture)])[name] for name, signal in signals.items()}
            yield pa.table({"key": [str(path.relative_to(place))], **found})
