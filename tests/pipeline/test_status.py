"""`curate status` on folders that a real engine run left."""

import pytest

from pipeline.base import HeadraceError
from pipeline.books import recorded_outputs, stale_files
from pipeline.engine import Part, Shard, run_stage
from pipeline.shards import DataDir, read_parquet, write_parquet
from pipeline.status import StageStatus, as_json, human_bytes, status, text
from tests.pipeline.factory import Row, make_raw, picture
from tests.pipeline.scored import add_signal


@pytest.fixture
def data(tmp_path):
    rows = [Row(picture(i, 32), f"caption {i}") for i in range(5)] + [Row(None, "gone")]
    return make_raw(tmp_path, rows, shard_size=2)


def by_stage(data: DataDir) -> dict[str, StageStatus]:
    return {stage.stage: stage for stage in status(data)}


def decide(data: DataDir) -> None:
    import pyarrow as pa

    inputs = tuple(sorted(p for p in recorded_outputs(data) if p.startswith("raw/") and p.endswith(".parquet")))

    def write(shard):
        write_parquet(pa.table({"key": ["a"] * len(inputs)}), data.decisions / "filter.parquet")
        return {"filter": Part({"kept": 6}, ("decisions/filter.parquet",))}

    run_stage(data, {"filter": {}}, write, [Shard("all", 6, inputs)])


def test_no_run(tmp_path):
    with pytest.raises(HeadraceError, match="holds no run") as error:
        status(DataDir(tmp_path))
    assert error.value.code == 3


def test_books_of_a_whole_stage(data):
    ingest = by_stage(data)["ingest"]
    assert (ingest.done, ingest.stale, ingest.missing, ingest.rows) == (3, 0, 0, 6)
    assert ingest.fates == {"fetched": 5, "failed": 1}
    on_disk = sum(path.stat().st_size for folder in (data.raw, data.urls) for path in folder.iterdir())
    assert ingest.bytes == on_disk
    assert ingest.problems == []


def test_order_is_that_of_the_way(data):
    add_signal(data, "phash", phash=range(6))
    decide(data)
    assert [stage.stage for stage in status(data)] == ["ingest", "score/phash", "filter"]


def test_lost_and_cut_outputs_are_stale(data):
    (data.raw / "00001.tar").unlink()
    with (data.raw / "00002.parquet").open("ab") as file:
        file.write(b"x")
    ingest = by_stage(data)["ingest"]
    assert (ingest.done, ingest.stale) == (1, 2)
    assert ingest.problems == [
        "shard 00001: raw/00001.tar is missing",
        "shard 00002: raw/00002.parquet has another size than recorded",
    ]


def test_shards_not_scored_are_missing(data):
    add_signal(data, "phash", phash=range(6))
    (data.markers / "score" / "phash" / "00001.json").unlink()
    phash = by_stage(data)["score/phash"]
    assert (phash.done, phash.stale, phash.missing) == (2, 0, 1)
    assert phash.problems == ["shard 00001 is not made yet"]


def test_a_changed_input_makes_what_was_made_of_it_stale(data, tmp_path):
    add_signal(data, "phash", phash=range(6))
    other = make_raw(tmp_path / "other", [Row(picture(i, 32), f"other {i}") for i in range(6)], shard_size=2)
    for name in ("00000.tar", "00000.parquet"):
        (other.raw / name).replace(data.raw / name)
    (other.urls / "00000.parquet").replace(data.urls / "00000.parquet")
    (other.markers / "ingest" / "00000.json").replace(data.markers / "ingest" / "00000.json")
    phash = by_stage(data)["score/phash"]
    assert (phash.done, phash.stale) == (2, 1)
    assert "was made anew" in phash.problems[0]


def test_a_later_raw_shard_makes_the_verdicts_stale(tmp_path):
    rows = [Row(picture(i, 32), f"caption {i}") for i in range(6)]
    data = make_raw(tmp_path, rows[:4], shard_size=2)
    decide(data)
    assert by_stage(data)["filter"].stale == 0
    later = make_raw(tmp_path / "later", rows, shard_size=2)
    for folder, name in (("raw", "00002.tar"), ("raw", "00002.parquet"), ("urls", "00002.parquet")):
        (later.root / folder / name).replace(data.root / folder / name)
    (later.markers / "ingest" / "00002.json").replace(data.markers / "ingest" / "00002.json")
    assert by_stage(data)["filter"].problems == ["shard all: raw/00002.parquet came after it"]


def test_a_table_that_was_not_wanted_makes_nothing_stale(data):
    """The report reads either `filter`'s verdicts or `dedup`'s; that the other exists too is no change."""
    decide(data)

    def write(shard):
        write_parquet(read_parquet(data.decisions / "filter.parquet"), data.decisions / "dedup.parquet")
        return {"dedup": Part({"kept": 6}, ("decisions/dedup.parquet",))}

    run_stage(
        data, {"dedup": {}}, write, [Shard("all", 6, ("raw/00000.parquet", "raw/00001.parquet", "raw/00002.parquet"))]
    )

    def page(shard):
        (data.report / "index.html").parent.mkdir()
        (data.report / "index.html").write_text("x")
        return {"report": Part({"kept": 6}, ("report/index.html",))}

    run_stage(data, {"report": {}}, page, [Shard("all", 6, ("decisions/dedup.parquet",))])
    assert not any(stage.stale for stage in status(data))


def test_says_what_the_engine_says(data):
    """What status calls stale is what the engine does again."""
    add_signal(data, "phash", phash=range(6))
    (data.signals / "phash" / "00001.parquet").unlink()
    recorded = recorded_outputs(data)
    from pipeline.books import read_markers

    markers = read_markers(data, "score/phash")
    assert [name for name, marker in markers.items() if stale_files(data, marker, recorded)] == ["00001"]
    before = {path: path.stat().st_mtime_ns for path in (data.signals / "phash").iterdir()}
    add_signal(data, "phash", phash=range(6))
    after = {path: path.stat().st_mtime_ns for path in (data.signals / "phash").iterdir()}
    assert {path.name for path in after if after[path] != before.get(path)} == {"00001.parquet"}


def test_text_is_aligned_and_json_is_plain(data):
    import json

    stages = status(data)
    lines = text(stages).splitlines()
    assert lines[0].split() == ["stage", "done", "stale", "missing", "rows", "rows/s", "size"]
    assert lines[0].index("rows") + len("rows") == lines[1].index(" 6 ") + 2
    assert json.loads(json.dumps(as_json(stages)))[0]["rows"] == 6


@pytest.mark.parametrize(("count", "shown"), [(0, "0 B"), (999, "999 B"), (4_200_000, "4.2 MB"), (5e12, "5.0 TB")])
def test_human_bytes(count, shown):
    assert human_bytes(count) == shown
