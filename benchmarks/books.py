"""Curate a list of which nearly every row is dead: does every row get one fate, and does memory stay flat?

    python benchmarks/books.py [--rows 10000 100000] [--workers 2]

A server on loopback stands for all hosts; the list is the same in every run. For each length the books of all stages
are checked row by row against what was planted, and time and peak memory (VmHWM of every process) are printed. Exit
code 1 when a row has a wrong fate, none, or two.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import io
import random
import re
import shutil
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter, defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline import verify
from pipeline.books import books, read_markers
from pipeline.fates import fates, funnel
from pipeline.shards import DataDir, read_parquet, shard_files

GOOD, COPIES, TINY = 240, 40, 20  # pictures, whatever the list's length
ROWS_PER_HOST = 50
BATCH = 10_000
POLL = 0.1  # seconds between looks at /proc
ROLES = ("parent", "worker", "decoder")  # other processes are these, just being forked
STAGE = re.compile(r"(\w+): .* in ([\d.]+) s, ")  # what a run prints at each stage's end

# Of the rows without a picture: kind, share, and the right fate.
DEAD = {
    "gone": (0.70, "fetch:http_404"),
    "refused": (0.06, "fetch:connect"),
    "unknown host": (0.03, "fetch:dns"),
    "private address": (0.03, "fetch:blocked_address"),
    "page": (0.02, "image:not_an_image"),
    "invalid URL": (0.05, "urls:invalid_url"),
    "file": (0.04, "urls:scheme"),
    "no URL": (0.02, "urls:no_url"),
    "repeated": (0.05, "urls:repeated"),
}
ALIVE = {"picture": "kept", "copy": "kept", "tiny": "filter:min_side"}  # of a picture and its copy one is kept


# --- the list -----------------------------------------------------------------------------------------


def kinds(rows: int) -> Iterator[str]:
    """What is planted in each row, in order; the same for equal `rows`."""
    generator = random.Random(rows)
    alive = ["picture"] * GOOD + ["copy"] * COPIES + ["tiny"] * TINY
    places = dict(zip(generator.sample(range(rows), len(alive)), alive, strict=True))
    weights = [share for share, _ in DEAD.values()]
    for i in range(rows):
        yield places.get(i) or generator.choices(list(DEAD), weights)[0]


def write_list(path: Path, rows: int) -> None:
    """URL, caption, and as columns of its own what was planted and the row's number."""
    seen: Counter[str] = Counter()
    hosts, last = max(rows // ROWS_PER_HOST, 1), ("http://first.books.test/gone", "a row to repeat")
    schema = pa.schema([("url", pa.string()), ("caption", pa.string()), ("kind", pa.string()), ("number", pa.int64())])
    with pq.ParquetWriter(path, schema) as writer:
        batch = []
        for i, kind in enumerate(kinds(rows)):
            kind = "gone" if kind == "repeated" and i == 0 else kind
            url, caption = last if kind == "repeated" else (_url(kind, i, seen[kind], hosts), f"the caption of row {i}")
            seen[kind] += 1
            if kind == "gone":
                last = (str(url), caption)
            batch.append({"url": url, "caption": caption, "kind": kind, "number": i})
            if len(batch) == BATCH or i == rows - 1:
                writer.write_table(pa.Table.from_pylist(batch, schema))
                batch = []


def _url(kind: str, row: int, nth: int, hosts: int) -> str | None:
    host = f"host{row % hosts}.books.test"
    return {
        "picture": f"http://{host}/picture/{nth}.jpg",
        "copy": f"http://{host}/copy/{nth}.jpg",
        "tiny": f"http://{host}/tiny/{nth}.jpg",
        "gone": f"http://{host}/gone/{row}.jpg",
        "page": f"http://{host}/page/{row}.jpg",
        "refused": f"http://host{row % hosts}.closed.test/{row}.jpg",
        "unknown host": f"http://host{row % 20}.books.invalid/{row}.jpg",
        "private address": f"http://10.0.{row % 200}.1/{row}.jpg",
        "invalid URL": f"http://[{row}/x.jpg",
        "file": f"file:///etc/passwd?{row}",
        "no URL": None,
    }[kind]


# --- the server ---------------------------------------------------------------------------------------


class _Connection(asyncio.Protocol):
    """One kept-alive connection: a path beginning with picture, copy, tiny or page has a body, all else is 404."""

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        assert isinstance(transport, asyncio.Transport)
        self.transport, self.received = transport, b""

    def data_received(self, data: bytes) -> None:
        *requests, self.received = (self.received + data).split(b"\r\n\r\n")
        for request in requests:
            self.transport.write(_reply(request.split(b" ", 2)[1].decode()))


def _reply(path: str) -> bytes:
    _, kind, name = (*path.split("/", 2), "", "")[:3]
    if kind not in ("picture", "copy", "tiny", "page"):
        return b"HTTP/1.1 404 Not Found\r\nContent-Length: 4\r\n\r\ngone"
    body = b"<html>a page</html>" if kind == "page" else _jpeg(int(name.split(".")[0]), 32 if kind == "tiny" else 160)
    return b"HTTP/1.1 200 OK\r\nContent-Type: image/jpeg\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)


@cache
def _jpeg(number: int, side: int) -> bytes:
    """A soft pattern of colours, another for every number."""
    import numpy as np
    from PIL import Image

    grid = np.random.default_rng(number).integers(0, 256, (8, 8, 3), dtype=np.uint8)
    out = io.BytesIO()
    Image.fromarray(grid).resize((side, side), Image.Resampling.BICUBIC).save(out, "JPEG", quality=85)
    return out.getvalue()


@contextlib.contextmanager
def serving() -> Iterator[dict[str, str]]:
    """Serve until the block ends; what `--connect` needs, a port that refuses connections among it."""
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, daemon=True).start()
    opening = loop.create_server(_Connection, "127.0.0.1", 0, backlog=512)
    server = asyncio.run_coroutine_threadsafe(opening, loop).result()
    with socket.socket() as closed:
        closed.bind(("127.0.0.1", 0))  # bound, so that nobody else gets it, and not listening
        ports = server.sockets[0].getsockname()[1], closed.getsockname()[1]
        yield {"*.books.test": f"127.0.0.1:{ports[0]}", "*.closed.test": f"127.0.0.1:{ports[1]}"}
    loop.call_soon_threadsafe(loop.stop)


# --- one run ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Measured:
    """A run: seconds by stage, and the peak resident memory of a process in MB by its role."""

    rows: int
    seconds: dict[str, float]
    peaks: dict[str, float]
    most: float  # of all processes together, at one look


def curate(urls: Path, data: Path, workers: int, connect: dict[str, str], rows: int) -> Measured:
    """`curate run` as a user would, watched from outside."""
    command = [Path(sys.executable).with_name("curate"), "run", Path(__file__).with_suffix(".toml")]
    command += ["--urls", urls, "--data", data, "--workers", str(workers)]
    command += [word for host, address in connect.items() for word in ("--connect", f"{host}={address}")]
    peaks: dict[str, float] = defaultdict(float)
    most = 0.0
    with subprocess.Popen([*map(str, command)], stdout=subprocess.PIPE, text=True) as process:
        while process.poll() is None:
            seen = list(_memory(process.pid))
            for role, peak, _ in seen:
                if role in ROLES:
                    peaks[role] = max(peaks[role], peak)
            most = max(most, sum(now for _, _, now in seen))
            time.sleep(POLL)
        assert process.stdout
        stages = [match for line in process.stdout if (match := STAGE.match(line))]
    if process.returncode:
        sys.exit(f"curate run ended with exit code {process.returncode}")
    return Measured(rows, {match[1]: float(match[2]) for match in stages}, dict(peaks), most)


def _memory(root: int) -> Iterator[tuple[str, float, float]]:
    """Role, peak and present resident memory in MB of a process and all that descend from it."""
    pending = [root]
    while pending:
        pid = pending.pop()
        with contextlib.suppress(OSError, ValueError):  # it ended meanwhile
            place = Path(f"/proc/{pid}")
            for task in place.glob("task/*/children"):
                pending += map(int, task.read_text().split())
            status = dict(line.split(":", 1) for line in (place / "status").read_text().splitlines())
            command = (place / "cmdline").read_text()
            role = "decoder" if "sandbox.child" in command else "worker" if "spawn_main" in command else "other"
            if "VmHWM" in status:
                role = "parent" if pid == root else role
                yield role, int(status["VmHWM"].split()[0]) / 1024, int(status["VmRSS"].split()[0]) / 1024


# --- the books ----------------------------------------------------------------------------------------


def wrong(data: DataDir, rows: int) -> list[str]:
    """Every way in which the books of a finished run do not balance, a sentence each."""
    return [*_wrong_sums(data, rows), *_wrong_rows(data, rows), *_wrong_set(data)]


def _wrong_sums(data: DataDir, rows: int) -> Iterator[str]:
    """Each stage takes in what the stage before let through, and accounts for all of it."""
    listed = books(data, "list")
    fetched = listed.fates["to_fetch"]
    expected = {"list": rows, "download": fetched, "filter": fetched, "dedup": fetched}
    expected |= {f"score/{folder.name}": fetched for folder in (data.markers / "score").iterdir()}
    expected["pack"] = books(data, "dedup").fates["kept"]
    for stage, wanted in expected.items():
        summary = books(data, stage)
        for what, found in (("took in", summary.rows), ("accounts for", summary.fates.total())):
            if found != wanted:
                yield f"{stage} {what} {found:,} rows instead of {wanted:,}"
    if (total := sum(count.rows for count in funnel(data))) != rows:
        yield f"the funnel sums to {total:,}"


def _wrong_rows(data: DataDir, rows: int) -> Iterator[str]:
    """Each input row is there once, with the fate that was planted; tables of one shard have the same rows."""
    numbers, kept = bytearray(rows), Counter[str]()
    met: dict[str, Counter[str]] = defaultdict(Counter)
    for path, table in zip(shard_files(data.urls, "parquet"), fates(data), strict=True):
        urls = read_parquet(path, ["uid", "number", "kind", "fate"])
        if urls["uid"].to_pylist() != table["uid"].to_pylist():
            yield f"{path.name}: urls/ and the fates differ in their rows"
        for number, kind, fate in zip(
            *(urls[c].to_pylist() for c in ("number", "kind")), table["fate"].to_pylist(), strict=True
        ):
            numbers[number] += 1
            met[kind][fate] += 1
        yield from _wrong_shard(data, path.stem, urls)
    if missing := numbers.count(0):
        yield f"{missing:,} input rows are missing from urls/"
    if twice := rows - missing - numbers.count(1):
        yield f"{twice:,} input rows are in urls/ twice"
    pictures = met.pop("picture", Counter()) + met.pop("copy", Counter())
    kept.update({fate.partition(":")[0]: count for fate, count in pictures.items()})
    if kept != Counter(kept=GOOD, dedup=COPIES):
        yield f"pictures and their copies: {dict(pictures)}"
    # Which of two equal rows is the repetition depends on nothing but the list: the later one.
    right = {kind: fate for kind, (_, fate) in DEAD.items()} | ALIVE
    for kind, found in met.items():
        if set(found) != {right[kind]}:
            yield f"{kind}: {dict(found)} instead of {right[kind]}"


def _wrong_shard(data: DataDir, name: str, urls: pa.Table) -> Iterator[str]:
    wanted = urls["uid"].filter(urls["fate"].is_null()).to_pylist()
    raw = read_parquet(data.raw / f"{name}.parquet", ["uid", "key"])
    if raw["uid"].to_pylist() != wanted:
        yield f"raw/{name}.parquet does not hold the rows that urls/{name}.parquet lets through"
    for folder in sorted(data.signals.iterdir()):
        if read_parquet(folder / f"{name}.parquet", ["key"])["key"].to_pylist() != raw["key"].to_pylist():
            yield f"signals/{folder.name}/{name}.parquet has other rows than raw/{name}.parquet"


def _wrong_set(data: DataDir) -> Iterator[str]:
    """The verdicts are those of raw/, row by row, and the packed set is whole."""
    keys = [
        k for shard in sorted(read_markers(data, "download")) for k in _column(data.raw / f"{shard}.parquet", "key")
    ]
    for name in ("filter", "dedup"):
        if _column(data.decisions / f"{name}.parquet", "key") != keys:
            yield f"decisions/{name}.parquet has other rows than raw/"
    for finding in verify.run(data.curated).findings:
        yield f"verify: {finding}"


def _column(path: Path, name: str) -> list[str]:
    values: list[str] = read_parquet(path, [name])[name].to_pylist()
    return values


# --- the benchmark ------------------------------------------------------------------------------------


def bench(rows: int, workers: int, folder: Path) -> tuple[Measured, list[str]]:
    """One list, one run, its books."""
    urls, data = folder / "list.parquet", folder / "data"
    write_list(urls, rows)
    with serving() as connect:
        measured = curate(urls, data, workers, connect, rows)
    return measured, wrong(DataDir(data), rows)


def text(measured: Measured, problems: list[str]) -> str:
    """What a run was like, in a few lines."""
    total = sum(measured.seconds.values())
    stages = ", ".join(f"{stage} {seconds:.1f}" for stage, seconds in measured.seconds.items())
    peaks = ", ".join(f"{role} {peak:,.0f}" for role, peak in sorted(measured.peaks.items()))
    rate = measured.rows / measured.seconds["download"]
    lines = [
        f"{measured.rows:,} rows in {total:.1f} s ({stages}); the list at {rate:,.0f} rows/s through download",
        f"  peak MB: {peaks}; all at once {measured.most:,.0f}",
        f"  books: {'every row has one fate, the planted one; all sums agree' if not problems else 'WRONG'}",
    ]
    return "\n".join([*lines, *(f"  {problem}" for problem in problems)])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, nargs="+", default=[10_000, 100_000])
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    runs: list[Measured] = []
    failed = False
    for rows in args.rows:
        folder = Path(tempfile.mkdtemp(prefix="books-"))
        measured, problems = bench(rows, args.workers, folder)
        print(text(measured, problems), flush=True)
        runs.append(measured)
        failed |= bool(problems)
        shutil.rmtree(folder)
    for run in runs[1:]:
        ratios = ", ".join(f"{role} × {peak / runs[0].peaks[role]:.2f}" for role, peak in sorted(run.peaks.items()))
        print(f"{run.rows:,} rows against {runs[0].rows:,}: peak memory {ratios}")
    sys.exit(failed)


if __name__ == "__main__":
    main()
