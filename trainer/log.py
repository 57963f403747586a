"""Figures of a run as lines of JSON and in TensorBoard."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from contextlib import closing, contextmanager
from pathlib import Path

from pipeline.base import disk_error, write_bytes

METRICS = "metrics.jsonl"


class Log:
    """Lines of `metrics.jsonl` and the same in TensorBoard; a resumed run drops what it will write again."""

    def __init__(self, folder: Path, step: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        path = folder / METRICS
        lines = path.read_text(encoding="utf-8").splitlines() if path.exists() and step else []
        kept = [line for line in lines if _step(line) <= step]
        write_bytes(path, "".join(f"{line}\n" for line in kept).encode())
        self._path = path
        with _told(path):
            self._file = path.open("a", encoding="utf-8")
            self._board = SummaryWriter(str(folder / "tensorboard"), purge_step=step + 1 if step else 0)

    def write(self, step: int, numbers: Mapping[str, float]) -> None:
        """Append one line; on a full disk a `HeadraceError`."""
        with _told(self._path):
            self._file.write(json.dumps({"step": step, **numbers}) + "\n")
            self._file.flush()
            for name, value in numbers.items():
                self._board.add_scalar(name, value, step)

    def close(self) -> None:
        """Flush both; on a full disk a `HeadraceError`."""
        with _told(self._path), closing(self._board):
            self._file.close()


@contextmanager
def _told(path: Path) -> Iterator[None]:
    """Errors of the disk, TensorBoard's among them, as a sentence."""
    try:
        yield
    except OSError as error:
        raise disk_error(error, path) from error


def _step(line: str) -> float:
    """The step of a line; a line that a full disk cut short belongs to none."""
    try:
        return float(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
