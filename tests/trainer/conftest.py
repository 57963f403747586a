"""What several tests of training begin with: the embedded CLIP, and a small packed set of its vectors."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.clip import Clip, load
from tests.trainer.packed import write_packed


@pytest.fixture(scope="module")
def clip() -> Clip:
    return load("mini", "cpu")


@pytest.fixture(scope="module")
def shards(tmp_path_factory: pytest.TempPathFactory, clip: Clip) -> Path:
    return write_packed(tmp_path_factory.mktemp("packed"), clip=clip)
