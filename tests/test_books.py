"""A list that is mostly dead: every row has one fate, the planted one; and memory stays flat as lists grow."""

from __future__ import annotations

import json
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

from benchmarks import books
from pipeline.shards import DataDir


def test_every_row_of_a_short_list_has_its_one_fate(tmp_path: Path) -> None:
    measured, problems = books.bench(800, 1, tmp_path)
    assert problems == []
    assert measured.seconds.keys() == {"download", "score", "filter", "dedup", "pack", "report"}
    assert measured.peaks.keys() >= {"parent", "decoder"} and measured.most > 0

    data = DataDir(tmp_path / "data")  # and what is off is seen
    urls = data.urls / "00000.parquet"
    whole = pq.read_table(urls)
    pq.write_table(whole.slice(0, len(whole) - 1), urls)
    assert any("missing from urls/" in problem for problem in books.wrong(data, 800))
    pq.write_table(whole, urls)
    marker = data.markers / "filter" / "all.json"
    record = json.loads(marker.read_text())
    record["fates"]["kept"] += 1
    marker.write_text(json.dumps(record))
    wanted = record["rows"]
    assert books.wrong(data, 800) == [f"filter accounts for {wanted + 1:,} rows instead of {wanted:,}"]


def test_the_list_is_what_it_says(tmp_path: Path) -> None:
    books.write_list(tmp_path / "list.parquet", 12_345)
    table = pq.read_table(tmp_path / "list.parquet")
    assert table["number"].to_pylist() == list(range(12_345))
    found = Counter(table["kind"].to_pylist())
    assert (found["picture"], found["copy"], found["tiny"]) == (books.GOOD, books.COPIES, books.TINY)
    assert found.keys() == {*books.DEAD, *books.ALIVE}
    pairs = Counter(zip(table["url"].to_pylist(), table["caption"].to_pylist(), strict=True))
    assert sum(pairs.values()) - len(pairs) == found["repeated"]


@pytest.mark.slow
def test_memory_stays_flat_as_the_list_grows_tenfold(tmp_path: Path) -> None:
    runs = {}
    for rows in (10_000, 100_000):
        (tmp_path / str(rows)).mkdir()
        runs[rows], problems = books.bench(rows, 2, tmp_path / str(rows))
        assert problems == []
    small, large = runs[10_000].peaks, runs[100_000].peaks
    for role in ("parent", "worker", "decoder"):
        assert large[role] < 1.25 * small[role], (small, large)
