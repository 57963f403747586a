"""Shipped configs, and changes of single keys."""

from __future__ import annotations

import pytest

from pipeline.base import HeadraceError
from trainer.config import SHIPPED, read_run_config


def test_shipped_configs_are_valid_and_changes_are_checked() -> None:
    for shipped in SHIPPED.glob("*.toml"):
        assert read_run_config(shipped.stem) == read_run_config(str(shipped))
    changed = read_run_config("mini", ["decoder.training.steps=7", "prior.kind=linear", "decoder.channels=[32, 64]"])
    assert changed.decoder.training.steps == 7 and changed.prior.kind == "linear"
    assert changed.decoder.channels == (32, 64)
    for change, match in (
        ("decoder.chanels=3", "did you mean `channels`"),
        ("decoder.side", "is no assignment"),
        ("decoder.side.x=3", "is no section"),
        ("decoder.training.steps=0", "greater than or equal to 1"),
    ):
        with pytest.raises(HeadraceError, match=match):
            read_run_config("mini", [change])
    with pytest.raises(HeadraceError, match="no config nothing"):
        read_run_config("nothing")
