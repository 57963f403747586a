"""The last step of a packed set: its card, and its manifest after everything else.

It gathers what markers and books already know, and knows nothing of what lies inside a shard.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.metadata import version
from typing import Any

from pipeline.base import REFUSED, HeadraceError, digest, file_sha256, write_bytes
from pipeline.books import Marker, read_markers
from pipeline.fates import funnel
from pipeline.packed.card import card
from pipeline.packed.manifest import CARD, NAME, manifest_bytes
from pipeline.packed.split import FILE
from pipeline.shards import FORMAT_VERSION, DataDir, read_parquet, shard_files

SPLITS = ("train", "val")
VERSIONS = ("headrace", "img2dataset", "open_clip_torch", "pillow", "pyarrow", "torch", "torchvision")


def run(data: DataDir, columns: Mapping[str, str], recipe: Mapping[str, Any]) -> None:
    """Write the card and, last of all, the manifest; what already is as it should be is left alone."""
    markers = read_markers(data, "pack")
    files: dict[str, Any] = {
        path.removeprefix("curated/"): {**output, "samples": marker.rows}
        for marker in markers.values()
        for path, output in marker.outputs.items()
    }
    score = _score(data)
    manifest = {
        "format_version": FORMAT_VERSION,
        "recipe": dict(recipe),
        "clip": score.clip,
        "device": score.device,
        "versions": _versions(),
        "counts": _counts(markers),
        "split": _shared(data),
        "funnel": [count._asdict() for count in funnel(data)],
        "columns": dict(columns),
        "files": files,
    }
    text = card(manifest, _extensions(markers)).encode("utf-8", "surrogatepass")
    place = data.curated / CARD
    if not place.exists() or place.read_bytes() != text:
        (data.curated / NAME).unlink(missing_ok=True)
        write_bytes(place, text)
    files[CARD] = {"bytes": len(text), "sha256": file_sha256(place)}
    _remove_strays(data, files)
    body = manifest_bytes(manifest)
    if not (data.curated / NAME).exists() or (data.curated / NAME).read_bytes() != body:
        write_bytes(data.curated / NAME, body)


def _counts(markers: Mapping[str, Marker]) -> dict[str, Any]:
    """Samples and shards of each split."""
    counts = {split: {"samples": 0, "shards": 0} for split in SPLITS}
    for name, marker in markers.items():
        counts[name.partition("-")[0]]["samples"] += marker.rows
        counts[name.partition("-")[0]]["shards"] += 1
    return counts


def _extensions(markers: Mapping[str, Marker]) -> list[str]:
    """The pictures' extensions, as the markers' fates tell them (`train` is jpg, `train:png` is png)."""
    return sorted({fate.partition(":")[2] or "jpg" for marker in markers.values() for fate in marker.fates})


def _shared(data: DataDir) -> dict[str, int]:
    """How many samples of `val` have near-copies or equal captions in `train`: only a list's own split can do that."""
    import pyarrow as pa
    import pyarrow.compute as pc

    plan = read_parquet(data.root / FILE, ["group", "split"])
    val = pc.equal(plan["split"], "val")
    train = plan["group"].filter(pc.invert(val)).unique()
    shared = pc.is_in(plan["group"].filter(val), value_set=pa.array(train))
    return {"val_samples_known_from_train": pc.sum(shared, min_count=0).as_py()}


@dataclass(frozen=True)
class _Score:
    clip: Mapping[str, Any] | None
    device: str | None


def _score(data: DataDir) -> _Score:
    """The CLIP whose vectors the set holds, and the device they were computed on; None without that signal."""
    settings = [marker.settings for marker in read_markers(data, "score/clip").values()]
    if len({digest(one) for one in settings}) > 1:
        hint = "run `curate score` to its end, then filter, dedup and pack again"
        raise HeadraceError("signals/clip holds vectors of more than one CLIP", hint=hint, code=REFUSED)
    return _Score(settings[0]["identity"], _device(data)) if settings else _Score(None, None)


def _device(data: DataDir) -> str:
    """On what the vectors were computed, as their files' metadata tells; several, by commas, where shards differ."""
    import pyarrow.parquet as pq

    notes = [pq.read_schema(path).metadata or {} for path in shard_files(data.signals / "clip", "parquet")]
    return ", ".join(sorted({json.loads(note[b"clip"])["device"] for note in notes if b"clip" in note}))


def _versions() -> dict[str, str]:
    """The versions of the packages that make the bytes."""
    return {name: version(name) for name in VERSIONS}


def _remove_strays(data: DataDir, files: Mapping[str, Any]) -> None:
    """Remove shards that no marker answers for, such as those of a run whose markers were deleted."""
    for split in SPLITS:
        for extension in ("tar", "parquet"):
            for path in shard_files(data.curated / split, extension):
                if f"{split}/{path.name}" not in files:
                    path.unlink()
