"""Makes small data folders for tests: real pictures in real raw shards, with the markers a real run would leave."""

from __future__ import annotations

import io
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa
from PIL import Image, ImageDraw

from pipeline.engine import Part, Shard, run_stage
from pipeline.shards import DataDir, TarWriter, canonical_json, shard_name, write_parquet

RAW_SCHEMA = pa.schema(
    [
        ("uid", pa.string()),
        ("url", pa.string()),
        ("caption", pa.string()),
        ("key", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("original_width", pa.int32()),
        ("original_height", pa.int32()),
        ("sha256", pa.string()),
    ]
)


@dataclass
class Row:
    """One row of a list: a picture (None: the fetch failed with `error`), and any further input columns."""

    image: Image.Image | bytes | None
    caption: str | None
    error: str = "http_404"
    url: str = ""
    extra: dict[str, Any] = field(default_factory=dict)


def picture(seed: int, side: int = 96) -> Image.Image:
    """A picture whose look depends on `seed` alone: a background and six coloured figures."""
    import numpy as np

    rng = np.random.default_rng(seed)
    image = Image.new("RGB", (side, side), tuple(int(v) for v in rng.integers(0, 256, 3)))
    draw = ImageDraw.Draw(image)
    for _ in range(6):
        x, y, w, h = (int(v) for v in rng.integers(0, side, 4))
        figure = draw.ellipse if rng.random() < 0.5 else draw.rectangle
        figure((x, y, x + w // 2, y + h // 2), fill=tuple(int(v) for v in rng.integers(0, 256, 3)))
    return image


def jpeg(image: Image.Image | bytes, quality: int = 95) -> bytes:
    if isinstance(image, bytes):
        return image
    out = io.BytesIO()
    image.save(out, "JPEG", quality=quality)
    return out.getvalue()


def make_raw(root: Path, rows: list[Row], shard_size: int = 8) -> DataDir:
    """Write `urls/` and `raw/` for these rows, in this order, with `ingest` markers; returns the folder."""
    data = DataDir(root)
    chunks = [rows[i : i + shard_size] for i in range(0, len(rows), shard_size)]
    shards = [Shard(shard_name(i), len(chunk)) for i, chunk in enumerate(chunks)]

    def write(shard: Shard) -> dict[str, Part]:
        index = int(shard.name)
        return {"ingest": _write_shard(data, index, index * shard_size, chunks[index])}

    run_stage(data, {"ingest": {"source": "factory", "rows": len(rows)}}, write, shards)
    return data


def _write_shard(data: DataDir, index: int, first: int, rows: list[Row]) -> Part:
    from hashlib import sha256

    name, records, inputs = shard_name(index), [], []
    data.raw.mkdir(parents=True, exist_ok=True)
    with (data.raw / f"{name}.tar").open("wb") as file:
        tar = TarWriter(file)
        for i, row in enumerate(rows):
            url = row.url or f"http://host{(first + i) % 5}.test/{first + i}.jpg"
            uid = sha256(f"{url}\n{row.caption or ''}".encode()).hexdigest()[:32]
            record = dict.fromkeys(RAW_SCHEMA.names) | {"uid": uid, "url": url, "caption": row.caption}
            record |= {"key": f"{index * 10_000 + i:09d}", "status": "failed_to_download", "error_message": row.error}
            if row.image is not None:
                body = jpeg(row.image)
                side = row.image.size if isinstance(row.image, Image.Image) else (64, 64)
                record |= {"status": "success", "error_message": None, "sha256": sha256(body).hexdigest()}
                record |= dict(zip(("width", "height"), side, strict=True))
                record |= dict(zip(("original_width", "original_height"), side, strict=True))
                tar.add(f"{record['key']}.jpg", body)
                tar.add(f"{record['key']}.txt", (row.caption or "").encode())
                tar.add(f"{record['key']}.json", canonical_json(record))
            records.append(record)
            inputs.append({"uid": uid, "url": url, "caption": row.caption, "fate": None, **row.extra})
        tar.close()
    write_parquet(pa.Table.from_pylist(records, RAW_SCHEMA), data.raw / f"{name}.parquet")
    write_parquet(pa.Table.from_pylist(inputs), data.urls / f"{name}.parquet")
    fetched = sum(record["status"] == "success" for record in records)
    fates = {"fetched": fetched, "failed": len(rows) - fetched}
    return Part(fates, (f"raw/{name}.tar", f"raw/{name}.parquet", f"urls/{name}.parquet"))
