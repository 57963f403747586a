"""Curate real pictures over real HTTP: serve a folder with `images.tar` and `captions.parquet` on loopback, and run.

    python benchmarks/corpus.py ../shared/corpus --data data/corpus

Prints the time and the funnel; look at the report it names.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import quote, unquote

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.shards import Member, tar_members

HOSTS = 20


class Gallery(ThreadingHTTPServer):
    """Serves the members of one tar by their paths, whatever the host name."""

    daemon_threads = True
    request_queue_size = 128

    def __init__(self, tar: Path) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.tar = tar
        self.members: dict[str, Member] = {member.name: member for member in tar_members(tar)}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    wbufsize = 1 << 16
    disable_nagle_algorithm = True
    server: Gallery

    def do_GET(self) -> None:
        member = self.server.members.get(unquote(self.path).lstrip("/"))
        body = b""
        if member:
            with self.server.tar.open("rb") as file:
                file.seek(member.offset)
                body = file.read(member.length)
        self.send_response(200 if member else 404)
        self.send_header("Content-Type", "image/jpeg")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: Any) -> None:
        pass


def write_list(corpus: Path, path: Path, rows: int | None) -> None:
    """The corpus as a list of URLs on a few hosts, with its own columns."""
    table = pq.read_table(corpus / "captions.parquet")
    table = table if rows is None else table.take(list(range(0, len(table), max(len(table) // rows, 1)))[:rows])
    urls = [f"http://host{i % HOSTS}.corpus.test/{quote(p)}" for i, p in enumerate(table["path"].to_pylist())]
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(table.append_column("url", pa.array(urls)), path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("corpus", type=Path)
    parser.add_argument("--data", type=Path, default=Path("data/corpus"))
    parser.add_argument("--rows", type=int, help="only so many rows, evenly spread")
    parser.add_argument("--workers", type=int, default=2)
    args = parser.parse_args()
    urls = args.data / "list.parquet"
    if not urls.exists():
        write_list(args.corpus, urls, args.rows)
    server = Gallery(args.corpus / "images.tar")
    threading.Thread(target=server.serve_forever, daemon=True).start()
    started = time.monotonic()
    command = [Path(sys.executable).with_name("curate"), "run", Path(__file__).with_name("corpus.toml")]
    command += ["--urls", urls, "--connect", f"*.corpus.test=127.0.0.1:{server.server_port}"]
    code = subprocess.run([*map(str, command), "--data", str(args.data), "--workers", str(args.workers)]).returncode
    print(f"{time.monotonic() - started:.1f} s")
    sys.exit(code)


if __name__ == "__main__":
    main()
