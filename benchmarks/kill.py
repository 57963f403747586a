"""Kill runs at random moments, finish them, and compare every file with those of a run that nobody disturbed.

    python benchmarks/kill.py [--kills 20] [--seed 0] [--jobs 1] [--recipe benchmarks/kill.toml]

Half of the moments are spread evenly over the whole run, half over its short stages at the end. By lot it is a run of 1
or 2 workers, and the whole process group or the parent alone that is killed. A run to be killed after its download
begins with what the undisturbed run had when that stage began, since a marked shard is never touched again. A run that
was not killed, from an empty folder with the other number of workers, is compared too. A folder that differs is kept
and named. Exit code 1 when any file differs.
"""

from __future__ import annotations

import argparse
import os
import random
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

from pipeline import verify
from pipeline.base import file_sha256

STAGES = ("download", "score", "filter", "dedup", "pack", "report")
SHORT = STAGES[2:]
# What each stage leaves, so that a folder can be put back to where the stage began.
LEAVES = {
    "score": (".markers/score", "signals"),
    "filter": (".markers/filter", "decisions/filter.parquet"),
    "dedup": (".markers/pairs", ".markers/dedup", "decisions/pairs.parquet", "decisions/dedup.parquet"),
    "pack": (".markers/split", ".markers/pack", "decisions/split.parquet", "curated", "miniweb/fates.parquet"),
    "report": (".markers/report", "report", "recipe.toml"),
}
KEPT = ("recipe.toml", "miniweb", "urls", "raw", "signals", "decisions", "curated", "report")
POLL = 0.005  # seconds between looks at what a run has printed


@dataclass(frozen=True)
class Kill:
    """When and how: during `stage`, after this part of the time that the stage took undisturbed; all processes of the
    run at once, or the parent alone."""

    stage: str
    part: float
    workers: int
    whole_group: bool


@dataclass(frozen=True)
class Trial:
    """What became of one run: `during` is the stage it was killed in, None where it was left alone."""

    workers: int
    whole_group: bool = True  # was killed
    during: str | None = None
    seconds: float = 0.0  # until the kill
    again: float = 0.0  # the run that finished it
    files: int = 0
    different: tuple[str, ...] = ()
    findings: int = 0  # of `curate verify`


class Bench:
    """Runs of one recipe, each in a folder of its own below `root`; one is the reference."""

    def __init__(self, recipe: Path, root: Path) -> None:
        self.recipe, self.root = recipe, root
        self.files: dict[str, str] = {}
        self.lasted: dict[str, float] = {}

    def refer(self, workers: int) -> None:
        """Run once undisturbed: the files to compare with, and how long each stage takes."""
        ends: dict[str, float] = {}
        started = time.monotonic()
        with self._start("reference", workers) as process:
            while process.poll() is None:
                for stage in self._ended("reference") - ends.keys():
                    ends[stage] = time.monotonic()
                time.sleep(POLL)
        self._check("reference", process.returncode)
        for stage in STAGES:
            self.lasted[stage] = ends[stage] - started
            started = ends[stage]
        self.files = digests(self.root / "reference")

    def undisturbed(self, workers: int) -> Trial:
        """Run once more to the end, with another number of workers."""
        return self._finish(f"{workers}-workers", Trial(workers))

    def killed(self, number: int, kill: Kill) -> Trial:
        """Start a run, kill it, run it again until it is done."""
        name, started = f"kill-{number:02d}", time.monotonic()
        earlier = set(STAGES[: STAGES.index(kill.stage)])
        if earlier:
            self._copy(name, STAGES[len(earlier) :])
        with self._start(name, kill.workers) as process:
            while process.poll() is None and not earlier <= self._ended(name):
                time.sleep(POLL)
            time.sleep(kill.part * self.lasted[kill.stage])
            seconds = time.monotonic() - started
            if kill.whole_group:
                os.killpg(process.pid, signal.SIGKILL)
            else:
                process.kill()
        if process.returncode != -signal.SIGKILL:  # it was done before its moment came
            self._check(name, process.returncode)
            shutil.rmtree(self.root / name)
            return self.killed(number, replace(kill, part=kill.part / 2))
        during = next(stage for stage in (*STAGES, "end") if stage not in self._ended(name))
        return self._finish(name, Trial(kill.workers, kill.whole_group, during, seconds))

    def _copy(self, name: str, without: Sequence[str]) -> None:
        """The undisturbed run's folder, without what some stages left there."""
        shutil.copytree(self.root / "reference", self.root / name)
        for path in (self.root / name / path for stage in without for path in LEAVES[stage]):
            shutil.rmtree(path) if path.is_dir() else path.unlink()

    def _finish(self, name: str, trial: Trial) -> Trial:
        """Run to the end and compare; what is equal is removed."""
        started = time.monotonic()
        with self._start(name, trial.workers) as process:
            pass
        self._check(name, process.returncode)
        found, findings = digests(self.root / name), len(verify.run(self.root / name / "curated").findings)
        different = tuple(path for path in sorted({*found, *self.files}) if found.get(path) != self.files.get(path))
        if not different:
            shutil.rmtree(self.root / name)
        again = time.monotonic() - started
        return replace(trial, again=again, files=len(self.files), different=different, findings=findings)

    @contextmanager
    def _start(self, name: str, workers: int) -> Iterator[subprocess.Popen[bytes]]:
        """`curate run` in a process group of its own; its output goes to a file, which no orphan can hold open."""
        command = [Path(sys.executable).with_name("curate"), "run", self.recipe, "--data", self.root / name]
        with self._log(name).open("wb") as log, self._log(name).with_suffix(".err").open("ab") as errors:
            command += ["--workers", str(workers)]
            with subprocess.Popen(
                [*map(str, command)], stdout=log, stderr=errors, stdin=subprocess.DEVNULL, start_new_session=True
            ) as process:
                yield process

    def _log(self, name: str) -> Path:
        return self.root / f"{name}.log"

    def _ended(self, name: str) -> set[str]:
        """The stages that the run has said to be done."""
        words = {line.partition(":")[0] for line in self._log(name).read_text().split("\n")[:-1]}
        return words & {*STAGES}

    def _check(self, name: str, code: int) -> None:
        if code:
            sys.exit(f"{name} ended with exit code {code}:\n{self._log(name).with_suffix('.err').read_text()[-3000:]}")


def digests(folder: Path) -> dict[str, str]:
    """sha256 by relative path of every file that a run leaves for its user; img2dataset's statistics hold times."""
    paths = [path for name in KEPT for path in (folder / name, *(folder / name).rglob("*")) if path.is_file()]
    return {str(p.relative_to(folder)): file_sha256(p) for p in paths if not p.name.endswith("_stats.json")}


def kills(lasted: Mapping[str, float], count: int, generator: random.Random) -> list[Kill]:
    """Every other kill somewhere in its own share of the whole run, the others in the short stages by turns."""
    spread, found = (count + 1) // 2, []
    for i in range(count):
        if i % 2:
            stage, part = SHORT[i // 2 % len(SHORT)], generator.random()
        else:
            stage, part = _place((i // 2 + generator.random()) / spread * sum(lasted.values()), lasted)
        found.append(Kill(stage, part, generator.choice((1, 2)), generator.random() < 0.5))
    return found


def _place(seconds: float, lasted: Mapping[str, float]) -> tuple[str, float]:
    """The stage that a moment of the whole run falls into, and the part of it that has passed."""
    for stage in STAGES[:-1]:
        if seconds < lasted[stage]:
            return stage, seconds / lasted[stage]
        seconds -= lasted[stage]
    return STAGES[-1], min(seconds / lasted[STAGES[-1]], 1.0)


def line(trial: Trial) -> str:
    """A row of the table."""
    equal = "yes" if not trial.different else f"NO, {len(trial.different)}: {', '.join(trial.different[:4])}"
    who = "" if trial.during is None else ("group" if trial.whole_group else "parent")
    at = "" if trial.during is None else f"{trial.seconds:.1f} s"
    finding = f", {trial.findings} findings of verify" if trial.findings else ""
    return (
        f"{at:>8}  {trial.during or 'not killed':<12}{who:<8}{trial.workers:>7}"
        f"{trial.again:>8.1f} s{trial.files:>7}  {equal}{finding}"
    )


def bench(recipe: Path, root: Path, count: int, seed: int, jobs: int) -> list[Trial]:
    """All trials, printed as they end."""
    runs = Bench(recipe, root)
    runs.refer(workers=2)
    lasted = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in runs.lasted.items())
    print(f"undisturbed: {sum(runs.lasted.values()):.1f} s ({lasted}), {len(runs.files)} files", flush=True)
    print(f"{'killed':>8}  {'during':<12}{'who':<8}workers{'again':>10}{'files':>7}  equal", flush=True)
    trials = [runs.undisturbed(workers=1)]
    print(line(trials[0]), flush=True)
    with ThreadPoolExecutor(jobs) as pool:
        for trial in pool.map(runs.killed, range(count), kills(runs.lasted, count, random.Random(seed))):
            print(line(trial), flush=True)
            trials.append(trial)
    return trials


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--jobs", type=int, default=1, help="runs at once")
    parser.add_argument("--recipe", type=Path, default=Path(__file__).with_suffix(".toml"))
    args = parser.parse_args()
    root = Path(tempfile.mkdtemp(prefix="kill-"))
    trials = bench(args.recipe, root, args.kills, args.seed, args.jobs)
    bad = [trial for trial in trials if trial.different or trial.findings]
    print(f"{len(trials) - len(bad)} of {len(trials)} runs byte-identical to the undisturbed one; seed {args.seed}")
    if bad:
        sys.exit(f"what differs is in {root}")
    shutil.rmtree(root)


if __name__ == "__main__":
    main()
