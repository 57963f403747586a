"""The import rule of the design: imports point down, no stage imports a stage, the trainer sees three leaves."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
STAGES = {"download", "ingest", "score", "filter", "dedup", "pack", "verify", "report"}
LEAVES = {"pipeline.base", "pipeline.shards", "pipeline.clip"}
# From the top down; a module may import what stands in a later row, or private helpers of its own row.
LAYERS = (
    {"cli"},
    {"run", "options", "summary", "query"},
    {"recipe"},
    STAGES | {"status"},
    {"intake", "verdict", "near", "packed", "page"},
    {"engine", "tables", "fates", "miniweb", "images", "fetch", "clip", "signals", "resize"},
    {"books", "sandbox"},
    {"shards"},
    {"base"},
)


def imported(path: Path) -> set[str]:
    """The modules of ours that a file imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module} | {f"{node.module}.{alias.name}" for alias in node.names}
    return {name for name in found if name.split(".")[0] in ("pipeline", "trainer")}


def modules(package: str) -> list[Path]:
    return sorted((ROOT / package).rglob("*.py"))


def layer(module: str) -> int | None:
    """The row of a module of `pipeline` by its first part; None for a stage's private helper."""
    first = module.split(".")[1] if "." in module else ""
    return next((row for row, names in enumerate(LAYERS) if first in names), None)


@pytest.mark.parametrize("path", modules("pipeline"), ids=lambda p: str(p.relative_to(ROOT)))
def test_pipeline_imports_point_down(path: Path) -> None:
    name = ".".join(path.relative_to(ROOT).with_suffix("").parts)
    mine = layer(name)
    for other in imported(path):
        assert not other.startswith("trainer"), f"{name} imports {other}"
        theirs = layer(other)
        if mine is None or theirs is None:
            continue
        assert theirs >= mine, f"{name} imports {other}, which stands above it"
        stage, target = name.split(".")[1], other.split(".")[1]
        assert not (stage in STAGES and target in STAGES and stage != target), f"stage {stage} imports stage {target}"


@pytest.mark.parametrize("path", modules("trainer"), ids=lambda p: str(p.relative_to(ROOT)))
def test_the_trainer_imports_three_leaves_of_the_pipeline(path: Path) -> None:
    foreign = {name for name in imported(path) if name.startswith("pipeline.")}
    assert {".".join(name.split(".")[:2]) for name in foreign} <= LEAVES


def test_every_module_says_what_it_does() -> None:
    silent = [p for package in ("pipeline", "trainer") for p in modules(package) if p.read_text() and not docstring(p)]
    assert silent == []


def docstring(path: Path) -> str | None:
    return ast.get_docstring(ast.parse(path.read_text()))


@pytest.mark.parametrize("command", ["pipeline.cli", "trainer.cli"])
def test_nothing_heavy_is_imported_before_it_is_needed(command: str) -> None:
    code = f"import sys, {command}; print(sorted({{m.split('.')[0] for m in sys.modules}}))"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT).stdout
    heavy = {
        "torch",
        "faiss",
        "img2dataset",
        "open_clip",
        "pyarrow",
        "duckdb",
        "numpy",
        "PIL",
        "cv2",
        "scipy",
        "jinja2",
    }
    assert not heavy & set(ast.literal_eval(loaded))
