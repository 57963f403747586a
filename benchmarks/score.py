"""Pictures per second of `score`: all signals together, and each alone. Needs a folder with raw shards.

    python benchmarks/score.py DATA [--clip mini] [--workers 2] [--signals clip,safety]

`warm` is one worker with the models in memory: CPU time per picture, decoding included, and what that gives on
`--workers` idle cores; it holds however busy the machine is. `whole` is the clock of a run by that many workers, from
nothing to the last file. Signals go to a temporary folder; DATA is left as it is.
"""

from __future__ import annotations

import argparse
import resource
import shutil
import tempfile
import time
from pathlib import Path

from pipeline.books import read_markers
from pipeline.score import ScoreConfig, run
from pipeline.shards import DataDir
from pipeline.signals import signal_names


def cpu_seconds() -> float:
    """Of this process and of its children that have ended."""
    kinds = (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)
    return sum(usage.ru_utime + usage.ru_stime for usage in map(resource.getrusage, kinds))


def measure(source: Path, config: ScoreConfig, workers: int) -> tuple[int, float, float]:
    """Score a fresh copy; returns pictures, seconds by the clock and of CPU."""
    with tempfile.TemporaryDirectory() as scratch:
        data = DataDir(Path(scratch))
        for name in ("raw", ".markers"):
            shutil.copytree(source / name, data.root / name)
        shutil.rmtree(data.markers / "score", ignore_errors=True)
        started, before = time.monotonic(), cpu_seconds()
        run(config, data, workers)
        wall, cpu = time.monotonic() - started, cpu_seconds() - before
        markers = read_markers(data, f"score/{config.signals[0]}").values()
    return sum(marker.rows - marker.fates.get("no_picture", 0) for marker in markers), wall, cpu


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--clip", default="mini")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--signals", default="")
    arguments = parser.parse_args()
    names = arguments.signals.split(",") if arguments.signals else signal_names()
    print(f"{'signals':<36}{'pictures':>10}{'warm':>12}{'warm':>10}{'whole':>10}")
    for chosen in dict.fromkeys([*((name,) for name in names), tuple(names)]):
        config = ScoreConfig(clip=arguments.clip, signals=list(chosen))
        measure(arguments.data, config, 1)
        pictures, _, cpu = measure(arguments.data, config, 1)
        _, wall, _ = measure(arguments.data, config, arguments.workers)
        warm, rate = 1000 * cpu / pictures, arguments.workers * pictures / cpu
        print(
            f"{','.join(chosen):<36}{pictures:>10,}{warm:>9.2f} ms{rate:>8,.0f}/s{pictures / wall:>8,.0f}/s", flush=True
        )


if __name__ == "__main__":
    main()
