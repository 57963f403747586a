"""The trainer's imports point down: commands, then what they do, then networks and data, then mathematics."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

FOLDER = Path(__file__).parents[2] / "trainer"
MATHEMATICS = {"diffusion", "sampling", "layers", "optim", "speed"}  # speed says which precision a device is quick in
NETWORKS = {"conditions", "unet", "prior", "decoder", "upsampler"}
DOERS = {"unclip", "evaluate", "export", "fit", "fit_clip"}
COMMANDS = {"cli", "cli_pictures"}


def imports(module: str) -> set[str]:
    """The modules of the trainer that one of them imports, anywhere in it."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((FOLDER / f"{module}.py").read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "trainer":
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("trainer."):
            found.add(str(node.module).split(".")[1])
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("trainer.")}
    return found


MODULES = sorted(path.stem for path in FOLDER.glob("*.py") if path.stem != "__init__")


@pytest.mark.parametrize("module", MODULES)
def test_imports_point_down(module: str) -> None:
    theirs = imports(module)
    assert module == "cli" or not theirs & COMMANDS
    if module in MATHEMATICS:
        assert theirs <= MATHEMATICS
    elif module in NETWORKS:
        assert theirs <= NETWORKS | MATHEMATICS
    elif module not in DOERS | COMMANDS | {"config"}:
        assert not theirs & DOERS


def test_no_module_imports_itself_by_way_of_others() -> None:
    left = {module: imports(module) for module in MODULES}
    while left:
        free = {module for module, theirs in left.items() if not theirs & set(left)}
        assert free, f"a circle among {sorted(left)}"
        left = {module: theirs for module, theirs in left.items() if module not in free}
