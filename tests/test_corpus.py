"""A slice of real pictures with real captions, over real HTTP, through every stage."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from pipeline import verify

ROOT = Path(__file__).parents[1]
CORPUS = ROOT.parent / "shared" / "corpus"
ROWS = 240

pytestmark = [
    pytest.mark.corpus,
    pytest.mark.skipif(not (CORPUS / "images.tar").exists(), reason="the corpus is not on this machine"),
]


def test_a_slice_is_curated_from_its_url_list(tmp_path: Path) -> None:
    data = tmp_path / "data"
    command = [sys.executable, "benchmarks/corpus.py", CORPUS, "--data", data, "--rows", ROWS]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    result = subprocess.run(list(map(str, command)), cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    manifest = json.loads((data / "curated" / "dataset.json").read_text())
    assert sum(line["rows"] for line in manifest["funnel"]) == ROWS
    assert not [line for line in manifest["funnel"] if line["stage"] in ("fetch", "image")]
    assert 0.3 * ROWS < sum(part["samples"] for part in manifest["counts"].values()) < 0.95 * ROWS
    assert verify.run(data / "curated").findings == []
    assert (data / "report" / "index.html").stat().st_size < 8_000_000
