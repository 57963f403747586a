"""The clumsy user, by the installed command: bad lists, bad settings, damaged folders, full disks, Ctrl-C.

Each ends in one `error:` sentence that names the thing and a `hint:`, with its exit code, and loses nothing.
"""

from __future__ import annotations

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from tests.pipeline.factory import Row, jpeg, make_raw, picture

CURATE = str(Path(sys.executable).with_name("curate"))
ODD = ("a b.jpg", "a,b.jpg", "é.jpg")


def curate(*words: str | Path, cwd: Path, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [CURATE, *map(str, words)]
    environ = os.environ | environment
    return subprocess.run(
        command, capture_output=True, text=True, cwd=cwd, stdin=subprocess.DEVNULL, env=environ, timeout=300
    )


def refused(result: subprocess.CompletedProcess[str], code: int, *said: str) -> None:
    """It ended as an error of the user's making, and the sentence and the hint say this."""
    assert result.returncode == code, result.stdout + result.stderr
    *progress, error, hint = result.stderr.strip().splitlines()
    assert error.startswith("error: ") and hint.startswith("hint: "), result.stderr
    assert all(": shard " in line for line in progress), result.stderr
    for text in said:
        assert text in f"{error}\n{hint}", result.stderr


def done(result: subprocess.CompletedProcess[str]) -> str:
    """It ended well, and no library spoke; returns what it printed."""
    assert result.returncode == 0, result.stdout + result.stderr
    assert "arning" not in result.stderr and "Traceback" not in result.stderr, result.stderr
    return result.stdout


def same_bytes(one: Path, other: Path) -> bool:
    """Whether two folders hold the same Parquet files and tars."""
    contents = [
        {p.relative_to(root): p.read_bytes() for p in root.rglob("*") if p.suffix in (".parquet", ".tar")}
        for root in (one, other)
    ]
    return bool(contents[0]) and contents[0] == contents[1]


# --- lists, settings, questions: nothing heavy is loaded ------------------------------------------------

WORDS = (  # words of a command in a folder with the files of `bad_files`, exit code, what is said
    ("download missing.csv", 3, "missing.csv"),
    ("download empty.csv", 2, "empty.csv is empty"),
    ("download header.csv", 2, "header.csv is empty"),
    ("download broken.parquet", 2, "broken.parquet cannot be read"),
    ("download noise.csv", 2, "noise.csv: none of its columns"),
    ("download list.csv --url-col adress", 2, "no column `adress` for the URLs", "did you mean --url-col address?"),
    ("download list.csv --caption-col nope", 2, "no column `nope` for the captions", "--caption-col"),
    ("download list.csv --connect here", 2, "--connect 'here' has no `=`", "PATTERN=HOST:PORT"),
    ("download list.csv --shard-size few", 2, "'--shard-size'", "`curate download --help`"),
    ("download list.csv --data list.csv", 1, "cannot write list.csv"),
    ("downlod list.csv", 2, "'downlod'", "`curate --help`"),
    ("run unknown.toml", 2, "unknown key `filter.min_clp`, did you mean `min_clip`?", "unknown.toml"),
    ("run types.toml", 2, "`filter.min_clip`: input should be a valid number", "`score`: input should be a table"),
    ("run syntax.toml", 2, "syntax.toml is not valid TOML"),
    ("run two.toml", 2, "more than one source of pictures: `ingest.source` and `download.urls`"),
    ("run folder", 2, "no folder of pictures", "--source DIR"),
    ("ingest bare", 3, "bare holds no pictures"),
    ("filter --data mistyped", 3, "mistyped holds no raw shards"),
    ("verify mistyped", 3, "there is no folder mistyped"),
)


@pytest.fixture(scope="module")
def bad_files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bad")
    pq.write_table(pa.table({"url": ["http://a.test/"] * 50}), folder / "whole.parquet")
    files = {
        "empty.csv": b"",
        "header.csv": b"url,caption\n",
        "broken.parquet": (folder / "whole.parquet").read_bytes()[:300],
        "noise.csv": b"\x1b[31m\x00\x07\xff,\x01\n1,2\n",
        "list.csv": b"address,caption\nhttp://a.test/1.jpg,one\n",
        "unknown.toml": b"[filter]\nmin_clp = 0.3\n",
        "types.toml": b"score = 3\n[filter]\nmin_clip = 'high'\n",
        "syntax.toml": b"[filter\n",
        "two.toml": b"[ingest]\nsource = 'bare'\n[download]\nurls = 'list.csv'\n",
        "bare/readme.md": b"no picture",
    }
    for name, content in files.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(content)
    return folder


@pytest.mark.parametrize("case", WORDS, ids=lambda case: case[0])
def test_bad_words_are_named_with_their_fix(bad_files: Path, case: tuple[Any, ...]) -> None:
    words, code, *said = case
    result = curate(*words.split(), cwd=bad_files)
    refused(result, code, *said)
    assert "\x1b" not in result.stderr and not (bad_files / "mistyped").exists()
    assert not list(bad_files.glob("data/*/*"))


# --- a folder that holds a run --------------------------------------------------------------------------


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Pictures, the recipe of a run over them, and `data`, that run finished."""
    folder = tmp_path_factory.mktemp("home")
    (folder / "src").mkdir()
    for i in range(7):
        (folder / f"src/{i}.jpg").write_bytes(jpeg(picture(i)))
        (folder / f"src/{i}.txt").write_text(f"picture number {i}")
    (folder / "src/broken.jpg").write_bytes(b"no picture")
    (folder / "own.toml").write_text(
        "[ingest]\nsource = 'src'\nshard_size = 3\n[score]\nsignals = ['caption', 'image', 'phash']\n"
    )
    assert "report: data/report/index.html" in done(curate("run", "own.toml", "--workers", "1", cwd=folder))
    return folder


@pytest.fixture
def copied(home: Path, tmp_path: Path) -> Path:
    """A copy of the finished run to damage."""
    shutil.copytree(home / "data", tmp_path / "data")
    shutil.copytree(home / "src", tmp_path / "src")
    shutil.copy(home / "own.toml", tmp_path)
    return tmp_path


def test_every_json_output_is_json_lines_and_nothing_else(copied: Path) -> None:
    commands = ["run own.toml", "score", "filter", "dedup", "pack", "report", "status", "verify data/curated"]
    for words in (*(command.split() for command in commands), ["query", "SELECT uid, caption FROM raw"]):
        where = [] if words[0] == "verify" else ["--data", "data"]
        lines = done(curate(*words, *where, "--json", cwd=copied)).splitlines()
        assert lines and all(json.loads(line) is not None for line in lines), words


QUESTIONS = (
    (["filter", "--min-clip", "0.2"], 3, "--min-clip needs the signal clip", "curate score --signals clip"),
    (["filter", "--where", "nonsense ="], 2, "--where cannot be parsed", "without SELECT"),
    (["filter", "--where", "wrods > 3"], 2, "--where names `wrods`", "did you mean `words`?"),
    (["filter", "--where", "caption"], 2, "--where cannot run"),
    (["filter", "--where", ""], 2, "`filter.where`"),
    (["query", "selekt"], 2, "the SQL cannot be parsed"),
    (["query", "drop table raw"], 2, "only SELECT may run here, not DROP"),
    (["query", "copy raw to 'out.csv'"], 2, "only SELECT may run here, not COPY"),
    (["query", "select * from read_csv('/etc/passwd')"], 2, "the function read_csv may not be read from here"),
    (["query", "select 1", "--out", "answer.exe"], 2, "--out answer.exe is of no known kind"),
    (["score", "--signals", "clp"], 2, "there is no signal called 'clp'", "did you mean clip?"),
    (["ingest", "elsewhere", "--redo"], 3, "there is no file elsewhere"),
    (["run", "own.toml", "--source", "src/0.jpg"], 2, "src/0.jpg is neither a folder nor a tar"),
    (["run", "own.toml", "--source", "../src"], 4, "data was made from another list", "another --data"),
    (["run", "other.toml"], 4, "other settings (shard_size of `list`)", "--redo"),
)


def test_a_bad_question_changes_nothing(copied: Path, home: Path) -> None:
    (copied / "other.toml").write_text((copied / "own.toml").read_text().replace("= 3", "= 4"))
    (copied.parent / "src").mkdir()
    (copied.parent / "src/new.png").write_bytes(jpeg(picture(99)))
    for words, code, *said in QUESTIONS:
        refused(curate(*words, cwd=copied), code, *said)
    assert same_bytes(home / "data", copied / "data")
    assert (home / "data/recipe.toml").read_bytes() == (copied / "data/recipe.toml").read_bytes()


def test_a_mistake_of_the_list_does_not_cost_the_recipe(copied: Path) -> None:
    """A run that ends early leaves its recipe, so that a single command goes on with it, not with the defaults."""
    strict = (copied / "own.toml").read_text() + "[filter]\nmin_side = 5000\ndrop_near_blank = true\n"
    (copied / "strict.toml").write_text(strict)
    result = curate("run", "strict.toml", cwd=copied)
    refused(result, 1, "nothing is left to pack", "filter:min_side")
    done(curate("filter", "--min-side", "10", cwd=copied))
    assert "drop_near_blank = true" in (copied / "data/recipe.toml").read_text()


DAMAGE: tuple[tuple[str, Callable[[Path], object], list[str], str], ...] = (
    (
        "raw/00000.tar",
        lambda path: os.truncate(path, 700),
        ["score", "--signals", "safety", "--workers", "1"],
        "`curate ingest`",
    ),
    ("raw/00000.tar", Path.unlink, ["score", "--signals", "safety", "--workers", "1"], "`curate ingest`"),
    ("raw/00001.parquet", lambda path: os.truncate(path, 300), ["query", "SELECT * FROM raw"], "`curate ingest`"),
    ("signals/image/00000.parquet", Path.unlink, ["filter", "--min-side", "20"], "`curate score`"),
)


def test_lost_and_cut_shards_are_named_and_made_anew(copied: Path, home: Path) -> None:
    for name, damage, words, hint in DAMAGE:
        damage(copied / "data" / name)
        refused(curate(*words, "--data", "data", cwd=copied), 3, Path("data", name).as_posix(), hint)
    done(curate("run", "own.toml", "--workers", "1", cwd=copied))
    assert same_bytes(home / "data", copied / "data")


def test_a_damaged_set_is_found_shard_by_shard(copied: Path) -> None:
    tar = next((copied / "data/curated").glob("*/00000.tar"))
    content = bytearray(tar.read_bytes())
    content[700] ^= 1
    tar.write_bytes(content)
    (copied / "data/curated/README.md").unlink()
    result = curate("verify", "data/curated", "--json", cwd=copied)
    assert result.returncode == 1
    found = {finding["path"] for finding in json.loads(result.stdout)}
    assert found == {tar.relative_to(copied / "data/curated").as_posix(), "README.md"}


def test_pack_before_filter_and_a_marker_that_is_no_json(copied: Path) -> None:
    shutil.rmtree(copied / "data/.markers/dedup")
    (copied / "data/.markers/filter/all.json").unlink()
    refused(curate("pack", cwd=copied), 3, "data has no decisions yet", "`curate filter`")
    (copied / "data/.markers/filter/all.json").write_text("{")
    refused(curate("dedup", cwd=copied), 2, "data/.markers/filter/all.json is damaged", "remove the file")


def test_a_second_run_in_a_folder_is_refused(copied: Path) -> None:
    import fcntl

    with (copied / "data/.lock").open("a+") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        lock.truncate(0)
        lock.write("4711")
        lock.flush()
        refused(curate("filter", cwd=copied), 4, "another run (process 4711) is working in data", "wait for it")


# --- a CLIP, the network, disks -------------------------------------------------------------------------


def test_a_clip_that_cannot_be_had_ends_soon_and_says_what_works_offline(tmp_path: Path) -> None:
    make_raw(tmp_path / "data", [Row(picture(i), f"picture {i}") for i in range(2)])
    offline = {"HF_HOME": str(tmp_path / "hub"), "HF_HUB_OFFLINE": "1"}
    result = curate("score", "--signals", "clip", "--clip", "ViT-B-32:openai", cwd=tmp_path, **offline)
    refused(result, 3, "CLIP ViT-B-32:openai cannot be fetched", "`mini` and a local directory work offline")
    refused(curate("score", "--clip", "nonsense", cwd=tmp_path), 3, "there is no CLIP called nonsense", "`mini`")
    assert not list(tmp_path.glob("data/signals/*/*"))


class _Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: Any) -> None:
        """The test's output is not the place."""


@pytest.fixture
def web(tmp_path: Path) -> Iterator[str]:
    """A server of a few pictures with odd names; its address."""
    (tmp_path / "web").mkdir()
    for i, name in enumerate((*(f"{i}.jpg" for i in range(5)), *ODD)):
        (tmp_path / "web" / name).write_bytes(jpeg(picture(i)))
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(_Quiet, directory=str(tmp_path / "web"))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"127.0.0.1:{server.server_port}"
        server.shutdown()


def _write_lists(folder: Path) -> dict[str, int]:
    """The same rows as CSV, JSONL, text and Parquet; returns the fates that the fetch has to meet."""
    import csv

    names = [*(f"{i}.jpg" for i in range(5)), *ODD]
    captions = [None, "x" * 1_000_000, *(f"picture number {i}" for i in range(2, len(names)))]
    rows = [{"url": f"http://pics.test/{n}", "caption": c} for n, c in zip(names, captions, strict=True)]
    rows += [rows[2], {"url": "http://pics.test/gone.jpg", "caption": "gone"}, {"url": "", "caption": "nothing"}]
    rows += [{"url": "nonsense", "caption": "no URL"}, {"url": "file:///etc/passwd", "caption": "a secret"}]
    rows += [{"url": "http://10.0.0.1/x.jpg", "caption": "private"}]
    with (folder / "list.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["url", "caption"])
        writer.writeheader()
        writer.writerows(rows)
    (folder / "list.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (folder / "list.txt").write_text("".join(f"{row['url']}\n" for row in rows if row["url"]))
    pq.write_table(pa.Table.from_pylist(rows), folder / "list.parquet")
    return {"fetched": len(names), "fetch:http_404": 1, "fetch:blocked_address": 1}


@pytest.mark.parametrize(
    "form", ["csv", *(pytest.param(f, marks=pytest.mark.slow) for f in ("jsonl", "txt", "parquet"))]
)
def test_your_own_list_with_odd_urls_and_captions(web: str, tmp_path: Path, form: str) -> None:
    """Commas, spaces and letters beyond ASCII in URLs, null captions and one of 1 MB, repeated and hopeless rows."""
    fates = _write_lists(tmp_path)
    out = done(curate("download", f"list.{form}", "--connect", f"pics.test={web}", "--json", cwd=tmp_path))
    assert json.loads(out)["fates"] == fates
    fate = "SELECT fate, count(*) AS n FROM urls WHERE fate IS NOT NULL GROUP BY fate ORDER BY fate"
    lines = done(curate("query", fate, "--json", cwd=tmp_path)).splitlines()
    kinds = ("invalid_url", "no_url", "repeated", "scheme")
    wanted = [{"fate": f"urls:{kind}", "n": 1} for kind in kinds if (form, kind) != ("txt", "no_url")]
    assert [json.loads(line) for line in lines] == wanted
    out = done(curate("query", "SELECT max(length(caption)) AS n FROM raw", "--json", cwd=tmp_path))
    assert json.loads(out) == {"n": None if form == "txt" else 1_000_000}


@pytest.mark.slow
def test_the_readme_s_two_ways_in_with_the_embedded_clip(web: str, tmp_path: Path) -> None:
    _write_lists(tmp_path)
    for path in (tmp_path / "web").glob("*.jpg"):
        path.with_suffix(".txt").write_text(f"a picture called {path.stem}")
    words = ["--clip", "mini", "--connect", f"pics.test={web}", "--json"]
    (tmp_path / "own.toml").write_text("[score]\nclip = 'mini'\n[filter]\nmin_clip = -1.0\n")
    out = done(curate("run", "own.toml", "--urls", "list.csv", *words, "--data", "list", cwd=tmp_path))
    stages = ["download", "score", "filter", "dedup", "pack", "report"]
    assert [json.loads(line)["stage"] for line in out.splitlines()] == stages
    out = done(curate("run", "own.toml", "--source", "web", "--data", "folder", "--json", cwd=tmp_path))
    assert [json.loads(line)["stage"] for line in out.splitlines()] == ["ingest", *stages[1:]]
    done(curate("verify", "folder/curated", cwd=tmp_path))


def test_ctrl_c_ends_soon_and_the_next_run_finishes(web: str, tmp_path: Path) -> None:
    """The first server never answers; the second one, at another port, is no other list."""
    (tmp_path / "list.txt").write_text("".join(f"http://pics.test/{i}.jpg\n" for i in range(5)))
    with socket.create_server(("127.0.0.1", 0), backlog=64) as mute:
        connect = f"pics.test=127.0.0.1:{mute.getsockname()[1]}"
        command = [CURATE, "download", "list.txt", "--shard-size", "3", "--workers", "2", "--connect", connect]
        pipe = subprocess.PIPE
        as_typed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)  # a background job ignores it
        group = {"start_new_session": True, "preexec_fn": as_typed}
        run = subprocess.Popen(command, cwd=tmp_path, stdout=pipe, stderr=pipe, text=True, **group)
        mute.settimeout(120)
        mute.accept()  # a worker is fetching
        time.sleep(0.5)
        started = time.monotonic()
        os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to the command and its workers
        out, errors = run.communicate(timeout=60)
    assert run.returncode == 130 and time.monotonic() - started < 5, errors
    assert not out and errors == "interrupted: run the same command again, finished shards are kept\n"
    command[-1] = f"pics.test={web}"
    again = curate(*command[1:], "--json", cwd=tmp_path)
    assert json.loads(done(again))["fates"] == {"fetched": 5}


@pytest.fixture
def small_disk() -> str:
    """Shell words that put a file system of $SIZE on `disk`, for those who may."""
    probe = subprocess.run(["unshare", "-m", "mount", "-t", "tmpfs", "t", "/mnt"], capture_output=True, check=False)
    if probe.returncode:
        pytest.skip("mounting a small disk needs privileges")
    return "mkdir -p disk && mount -t tmpfs -o size=$SIZE t disk"


def test_a_disk_that_fills_while_fetching_is_a_sentence(web: str, tmp_path: Path, small_disk: str) -> None:
    (tmp_path / "list.txt").write_text("".join(f"http://pics.test/{i % 5}.jpg?{i}\n" for i in range(60)))
    run = f"{CURATE} download list.txt --data disk/data --workers 1 --per-host-rate 1000 --connect pics.test={web}"
    script = f"{small_disk} && {run} 2>err; echo $? >code; mount -o remount,size=50m disk && {run} --json"
    command = ["unshare", "-m", "sh", "-c", script]
    again = subprocess.run(command, cwd=tmp_path, env=os.environ | {"SIZE": "100k"}, capture_output=True, text=True)
    assert (tmp_path / "code").read_text() == "1\n"
    error, hint = (tmp_path / "err").read_text().strip().splitlines()  # and nothing else
    assert error == "error: cannot write disk/data: no space left on device"
    assert hint.startswith("hint: free some space")
    assert json.loads(done(again))["fates"] == {"fetched": 60}


FULL = """{mount} && {run} 2>err; echo $? >code
{curate} status --data disk/data --json >status
mount -o remount,size=50m disk && {run} && cp -r disk/data .
"""


@pytest.mark.parametrize("size", ["60k", pytest.param("120k", marks=pytest.mark.slow)])
def test_a_full_disk_is_a_sentence_and_the_run_goes_on_later(
    copied: Path, home: Path, small_disk: str, size: str
) -> None:
    shutil.rmtree(copied / "data")
    run = f"{CURATE} run own.toml --data disk/data --workers 1"
    command = ["unshare", "-m", "sh", "-c", FULL.format(mount=small_disk, curate=CURATE, run=run)]
    subprocess.run(command, cwd=copied, env=os.environ | {"SIZE": size}, check=True, capture_output=True)
    assert (copied / "code").read_text() == "1\n"
    error, hint = (copied / "err").read_text().strip().splitlines()[-2:]
    assert error.startswith("error: cannot write disk/data") and error.endswith("no space left on device")
    assert hint.startswith("hint: free some space")
    stale = [stage["stage"] for stage in json.loads((copied / "status").read_text()) if stage["stale"]]
    assert stale == []  # whatever lies there under its own name is whole
    assert same_bytes(home / "data", copied / "data")


def test_a_read_only_folder_is_named_and_can_still_be_asked(copied: Path, small_disk: str) -> None:
    mount = small_disk + " && cp -r data disk/data && mount -o remount,ro disk"
    script = f"{mount} && {CURATE} query 'SELECT count(*) AS n FROM raw' --data disk/data --json && "
    script += f"{CURATE} filter --data disk/data"
    command = ["unshare", "-m", "sh", "-c", script]
    env = os.environ | {"SIZE": "50m"}
    result = subprocess.run(command, cwd=copied, env=env, capture_output=True, text=True, check=False)
    refused(result, 1, "cannot write disk/data/.lock: read-only file system", "another folder")
    assert json.loads(result.stdout) == {"n": 8}
