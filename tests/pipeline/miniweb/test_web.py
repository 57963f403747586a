"""The list as a file, the fates written after a run, and what a real client gets at every fault of the web."""

from __future__ import annotations

from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.engine import Part, Shard, run_stage
from pipeline.fetch import FetchConfig
from pipeline.fetch.client import Client
from pipeline.images import ImageSandbox, Limits
from pipeline.miniweb import web
from pipeline.miniweb.rows import PlannedUrl
from pipeline.miniweb.truth import is_right
from pipeline.shards import DataDir, write_parquet
from tests.pipeline.factory import Row, make_raw, picture

SMALL = web.MiniwebConfig(rows=400)
FETCHED = ("fetch", "image", "keep")


def test_equal_settings_write_equal_bytes(tmp_path: Path) -> None:
    first, second = (web.write_list(SMALL, tmp_path / name).read_bytes() for name in ("a", "b"))
    assert first == second


def test_the_list_has_what_others_need_and_awkward_columns(tmp_path: Path) -> None:
    table = pq.read_table(web.write_list(SMALL, tmp_path))
    assert len(table) == 400
    assert table.schema.field("swaps").type == table.schema.field("tags").type == pa.list_(pa.string())
    taken = [value for value in table["taken"].to_pylist() if value]
    assert min(taken) < datetime(1970, 1, 1, tzinfo=UTC) < max(taken)
    assert any(value.microsecond for value in taken)
    tags = table["tags"].to_pylist()
    assert None in tags and [] in tags and any(tags)
    assert table["likes"].null_count and {"width", "key"} <= set(table.column_names)
    assert set(table["split"].to_pylist()) == {"train", "val"}


def _fate(client: Client, box: ImageSandbox, row: PlannedUrl) -> str:
    fetched = client.fetch(str(row.url))
    if fetched.body is None:
        code = str(fetched.error).partition(":")[0]
        return f"image:{code}" if code == "empty" else f"fetch:{code}"
    seen = box.normalise(fetched.body)
    return f"image:{seen.error.partition(':')[0]}" if seen.error else "keep"


def test_a_real_client_gets_the_right_fate_at_every_url(tmp_path: Path) -> None:
    rows = [row for row in web.plan(SMALL) if not row.expected.startswith("urls:")]
    with web.serve(SMALL) as server, ThreadPoolExecutor(32) as threads:
        client = Client(FetchConfig(connect=server.connect, total_timeout=6), tmp_path)
        box = ImageSandbox(Limits(max_bytes=20_000_000))
        got = list(threads.map(lambda row: _fate(client, box, row), rows))
        asked = {access.host for access in server.log() if not access.target.endswith((".txt", ".json"))}
    wrong = defaultdict(set)
    for row, fate in zip(rows, got, strict=True):
        expected = row.expected if row.expected.split(":")[0] in FETCHED else "keep"
        if not is_right(fate, expected):
            wrong[row.fault].add((expected, fate))
    assert not wrong
    assert "forbidden1.miniweb.test" not in asked


def test_fates_are_written_and_read_back(tmp_path: Path) -> None:
    def listed(fault: str, expected: str, group: str | None = None, split: str = "train") -> dict[str, str | None]:
        return {"fault": fault, "expected": expected, "dup_group": group, "split": split}

    data = make_raw(
        tmp_path,
        [
            Row(picture(1), "one", url="http://a.test/1", extra=listed("none", "keep")),
            Row(None, "two", "http_404", "http://a.test/2", listed("http_404", "fetch:http_404")),
            Row(
                picture(3),
                "three",
                url="http://a.test/3",
                extra=listed("dup_original", "keep_one_of_group", "g0"),
            ),
            Row(
                picture(3),
                "four",
                url="http://a.test/4",
                extra=listed("dup_exact", "keep_one_of_group", "g0"),
            ),
            Row(
                picture(5),
                "five",
                url="http://a.test/5",
                extra=listed("wrong_caption", "filter:min_clip", None, "val"),
            ),
        ],
    )
    _decide(data, [None, "fetch:http_404", "dedup:exact", None, None], kept={2: 3})
    table = pq.read_table(web.write_fates(data))
    got = dict(
        zip(
            table["url"].to_pylist(),
            zip(table["got"].to_pylist(), table["right"].to_pylist(), strict=True),
            strict=True,
        )
    )
    assert got == {
        "http://a.test/1": ("keep", True),
        "http://a.test/2": ("fetch:http_404", True),
        "http://a.test/3": ("dedup:exact", True),
        "http://a.test/4": ("keep", True),
        "http://a.test/5": ("keep", False),
    }
    figures = web.planted(data)
    assert (figures.duplicates.planted, figures.duplicates.recall, figures.duplicates.precision) == (
        1,
        1.0,
        1.0,
    )
    assert (figures.captions.wrong, figures.captions.wrong_dropped) == (1, 0)
    assert "wrong_caption: 1 not filter:min_clip, but 1 keep" in web.planted_text(data)


def _decide(data: DataDir, reasons: list[str | None], kept: dict[int, int]) -> None:
    """Write the verdicts that `filter` and `dedup` would."""
    raw = pa.concat_tables([pq.read_table(path) for path in sorted(data.raw.glob("*.parquet"))])
    keys = raw["key"].to_pylist()
    verdicts = pa.table({"key": raw["key"], "uid": raw["uid"], "reason": pa.array(reasons, pa.string())})
    kept_keys = pa.array([keys[kept[i]] if i in kept else None for i in range(len(keys))], pa.string())

    def write(stage: str, table: pa.Table, inputs: tuple[str, ...]) -> None:
        path = f"decisions/{stage}.parquet"

        def process(shard: Shard) -> dict[str, Part]:
            write_parquet(table, data.root / path)
            return {stage: Part({"all": len(table)}, (path,))}

        run_stage(data, {stage: {}}, process, [Shard("all", len(table), inputs)])

    write("filter", verdicts, ())
    write("dedup", verdicts.append_column("kept_key", kept_keys), ("decisions/filter.parquet",))
