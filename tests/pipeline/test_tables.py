from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from pipeline.base import MISSING, USAGE, HeadraceError
from pipeline.filter import FilterConfig, run
from pipeline.shards import DataDir
from pipeline.tables import connect, query
from tests.pipeline.factory import Row, make_raw, picture
from tests.pipeline.scored import add_signal

HOSTILE = [
    "COPY raw TO '{file}'",
    "COPY (SELECT 1) TO '{file}'",
    "WITH a AS (COPY (SELECT 1) TO '{file}') SELECT 1",
    "WITH a AS (INSERT INTO raw VALUES (1) RETURNING *) SELECT 1",
    "SELECT * FROM read_text('{file}')",
    "SELECT * FROM read_blob('{file}')",
    "SELECT * FROM read_csv('{file}')",
    "SELECT * FROM read_parquet('{file}')",
    "SELECT * FROM parquet_schema('{file}')",
    "SELECT * FROM glob('{folder}/*')",
    "SELECT * FROM sniff_csv('{file}')",
    "SELECT * FROM '{file}'",
    "SELECT * FROM '{folder}/*.parquet'",
    "SELECT (SELECT content FROM read_text('{file}')) FROM raw",
    "SELECT * FROM raw WHERE key IN (SELECT content FROM read_text('{file}'))",
    "SELECT * FROM query('SELECT * FROM read_text(''{file}'')')",
    "SELECT * FROM python_arrow_scan(1, 2, 3)",
    "SELECT * FROM enable_logging(storage='file', storage_path='{folder}/log')",
    "SELECT * FROM duckdb_secrets()",
    "SELECT * FROM 'https://example.com/x.parquet'",
    "ATTACH '{folder}/new.db'",
    "ATTACH '{file}' AS other",
    "INSTALL httpfs",
    "LOAD httpfs",
    "PRAGMA database_list",
    "PRAGMA threads=1",
    "SET enable_external_access=true",
    "SET lock_configuration=false",
    "RESET memory_limit",
    "CALL pragma_version()",
    "CREATE TABLE x AS SELECT 1",
    "CREATE MACRO f() AS 1",
    "DROP VIEW raw",
    "DELETE FROM raw",
    "UPDATE raw SET key = '0'",
    "EXPORT DATABASE '{folder}/out'",
    "CHECKPOINT",
    "SELECT 1; SELECT 2",
    "SELECT 1; COPY raw TO '{file}'",
    "",
    ";",
    "SELECT",
    "SELECT no_such FROM raw",
    "SELECT * FROM no_such",
    "SELECT 'x'::INTEGER",
]


@pytest.fixture
def data(tmp_path: Path) -> DataDir:
    captions = ["a 'quoted' \"cat\"; DROP TABLE raw", "Ünïcödé", None]
    found = make_raw(
        tmp_path / "data", [Row(picture(i), text, extra={"licence": "cc0"}) for i, text in enumerate(captions)]
    )
    add_signal(found, "clip", clip_sim=[0.5, 0.25, None], image_emb=np.eye(3, 4, dtype=np.float32))
    add_signal(found, "phash", phash=[1, 2**64 - 1, 3])
    return found


@pytest.mark.parametrize("sql", HOSTILE)
def test_anything_but_one_select_over_the_views_is_refused(tmp_path: Path, data: DataDir, sql: str) -> None:
    folder = tmp_path / "canary"
    folder.mkdir()
    file = folder / "canary.parquet"
    file.write_text("canary")
    with pytest.raises(HeadraceError) as caught:
        query(data, sql.format(file=file, folder=folder)).read_all()
    assert caught.value.code == USAGE and caught.value.hint
    assert "\n" not in caught.value.message and caught.value.message != "canary"
    assert [path.name for path in folder.iterdir()] == ["canary.parquet"] and file.read_text() == "canary"


def test_views_are_read_as_arrow(data: DataDir) -> None:
    rows = query(data, "SELECT caption, clip_sim, image_emb, phash FROM raw JOIN signals USING (key) ORDER BY key")
    table = rows.read_all()
    assert table["caption"].to_pylist() == ["a 'quoted' \"cat\"; DROP TABLE raw", "Ünïcödé", None]
    assert table["clip_sim"].to_pylist() == [0.5, 0.25, None]
    assert table["phash"].to_pylist() == [1, 2**64 - 1, 3]
    assert table["image_emb"].to_pylist()[1] == [0, 1, 0, 0]


def test_captions_with_quotes_are_found_by_a_literal(data: DataDir) -> None:
    sql = "SELECT count(*) AS n FROM raw WHERE caption = 'a ''quoted'' \"cat\"; DROP TABLE raw' -- and a comment; here"
    assert query(data, sql).read_all()["n"].to_pylist() == [1]


def test_ctes_unions_and_harmless_table_functions_run(data: DataDir) -> None:
    sql = "WITH r AS (SELECT key FROM raw UNION ALL SELECT 'x') SELECT count(*) AS n FROM r, range(2);"
    assert query(data, sql).read_all()["n"].to_pylist() == [8]
    assert query(data, "SELECT licence FROM urls LIMIT 1").read_all()["licence"].to_pylist() == ["cc0"]
    names = query(data, "SHOW TABLES").read_all()["name"].to_pylist()
    assert {"raw", "urls", "signals"} <= set(names)
    assert "clip_sim" in query(data, "DESCRIBE signals").read_all()["column_name"].to_pylist()


def test_a_view_whose_stage_has_not_run_names_the_stage(data: DataDir) -> None:
    for sql in ("SELECT * FROM decisions", "SELECT * FROM raw JOIN decisions USING (key)"):
        with pytest.raises(HeadraceError, match="decisions") as caught:
            query(data, sql)
        assert caught.value.code == MISSING and "curate filter" in str(caught.value.hint)
    run(FilterConfig(min_clip=0.3), data)
    rows = query(data, "SELECT reason, count(*) AS n FROM decisions GROUP BY ALL ORDER BY reason NULLS FIRST")
    assert rows.read_all().to_pylist() == [
        {"reason": None, "n": 1},
        {"reason": "filter:min_clip", "n": 1},
        {"reason": "filter:no_caption", "n": 1},
    ]


def test_a_query_that_needs_more_memory_than_it_may_have_says_so(data: DataDir) -> None:
    with pytest.raises(HeadraceError, match="memory"):
        query(data, "SELECT count(DISTINCT hash(range)) FROM range(100_000_000)", memory="20MB").read_all()


def test_python_variables_are_no_tables(data: DataDir) -> None:
    secret = make_raw  # a name in scope, as a replacement scan would look for it
    assert secret
    with pytest.raises(HeadraceError, match="secret"):
        query(data, "SELECT * FROM secret")


def test_a_bad_memory_setting_is_a_sentence() -> None:
    with pytest.raises(HeadraceError, match="settings"):
        connect(memory="lots")
