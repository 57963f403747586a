"""Figures of a run: what a full disk does to them."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.base import HeadraceError
from tests.trainer.packed import small_files
from trainer.log import METRICS, Log


def test_a_full_disk_is_a_sentence_that_names_the_file(tmp_path: Path) -> None:
    log = Log(tmp_path, 0)
    log.write(1, {"loss": 1.0})
    with small_files(200), pytest.raises(HeadraceError, match=rf"cannot write .*{METRICS}: file too large"):
        log.write(2, {f"figure_{number}": 0.5 for number in range(30)})
    log.close()
    resumed = Log(tmp_path, 1)
    resumed.write(2, {"loss": 0.5})
    resumed.close()
    lines = (tmp_path / METRICS).read_text().splitlines()
    assert lines == ['{"step": 1, "loss": 1.0}', '{"step": 2, "loss": 0.5}']
