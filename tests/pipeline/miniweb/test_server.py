"""The server over real sockets: hosts, refusals, every delivery, wishes, its log, and that it dies with its parent."""

from __future__ import annotations

import gzip
import http.client
import os
import socket
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from pipeline.miniweb import hosts
from pipeline.miniweb.pictures import Picture, encode
from pipeline.miniweb.replies import DELIVERIES, Reply, address
from pipeline.miniweb.scenes import scene
from pipeline.miniweb.server import Server, running

PICTURE = Picture(scene(0, 1), side=64, form="png", edit="tint", amounts=(200.0, 10.0, 10.0, 0.05))
HOST = "shop1.miniweb.test"
AT = f"http://{HOST}/"
ROUTES = [
    *((f"{AT}{delivery}.png", Reply(picture=PICTURE, delivery=delivery)) for delivery in DELIVERIES),
    (f"{AT}busy.png", Reply(picture=PICTURE, refusals=(429, 503), retry_after="seconds")),
    (f"{AT}later.png", Reply(picture=PICTURE, refusals=(503,), retry_after="date")),
    (
        f"{AT}odd name,é.png?a=1",
        Reply(picture=PICTURE, headers=(("X-Robots-Tag", "noai"), ("X-Robots-Tag", "all"))),
    ),
    (f"{AT}typed.png", Reply(picture=PICTURE, headers=(("Content-Type", "text/html"),))),
    (f"{AT}gone.png", Reply(status=410, body="missing")),
    (f"{AT}empty.png", Reply(body="nothing")),
    *((f"http://{hosts.LIMITED}/{k}.png", Reply(picture=PICTURE)) for k in range(8)),
]


@pytest.fixture(scope="module")
def server() -> Iterator[Server]:
    with running(ROUTES) as server:
        yield server


def get(server: Server, path: str, host: str = HOST) -> http.client.HTTPResponse:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=3)
    connection.request("GET", path, headers={"Host": host, "User-Agent": "tester/1"})
    return connection.getresponse()


@pytest.mark.parametrize("delivery", ["whole", "chunked"])
def test_a_picture_comes_with_its_own_bytes(server: Server, delivery: str) -> None:
    response = get(server, f"/{delivery}.png")
    assert response.status == 200 and response.getheader("Content-Type") == "image/png"
    assert response.read() == encode(PICTURE)


def test_connections_are_kept(server: Server) -> None:
    connection = http.client.HTTPConnection("127.0.0.1", server.port, timeout=3)
    for _ in range(3):
        connection.request("GET", "/whole.png", headers={"Host": f"{HOST}:80"})
        assert connection.getresponse().read() == encode(PICTURE)
        assert connection.sock is not None


def test_a_path_belongs_to_its_host(server: Server) -> None:
    assert get(server, "/whole.png", "shop2.miniweb.test").status == 404
    assert get(server, "/other.png").status == 404


def test_a_url_is_found_however_it_is_encoded(server: Server) -> None:
    response = get(server, "/odd%20name,%C3%A9.png?a=1")
    assert response.read() == encode(PICTURE)
    assert response.headers.get_all("X-Robots-Tag") == ["noai", "all"]
    assert address(f"{AT}a b.png#top") == address(f" HTTP://{HOST.upper()}/a%20b.png ")


def test_refusals_are_counted_by_url(server: Server) -> None:
    answers = [get(server, "/busy.png") for _ in range(4)]
    assert [a.status for a in answers] == [429, 503, 200, 200]
    assert [a.getheader("Retry-After") for a in answers] == ["1", "1", None, None]
    later = get(server, "/later.png").getheader("Retry-After")
    assert later is not None and later.endswith("GMT") and get(server, "/later.png").status == 200


def test_a_limited_host_refuses_a_burst_and_then_recovers(server: Server) -> None:
    statuses = [get(server, f"/{k}.png", hosts.LIMITED).status for k in range(8)]
    assert statuses[:6] == [200] * 6 and 429 in statuses[6:]
    time.sleep(0.4)
    assert get(server, "/7.png", hosts.LIMITED).status == 200


def test_gzip_is_the_picture_and_the_bomb_is_much(server: Server) -> None:
    assert gzip.decompress(get(server, "/gzip.png").read()) == encode(PICTURE)
    response = get(server, "/gzip_bomb.png")
    packed = response.read()
    assert response.getheader("Content-Encoding") == "gzip" and len(packed) < 2**21
    assert int.from_bytes(packed[-4:], "little") == 2**30


@pytest.mark.parametrize("delivery", ["cut", "cut_chunked"])
def test_bodies_that_are_cut_end_early(server: Server, delivery: str) -> None:
    with pytest.raises(http.client.IncompleteRead):
        get(server, f"/{delivery}.png").read()


def test_a_reset_is_one(server: Server) -> None:
    with pytest.raises(ConnectionResetError):
        get(server, "/reset.png")


def test_endless_things_go_on(server: Server) -> None:
    assert len(get(server, "/endless.png").read(3_000_000)) == 3_000_000
    huge = get(server, "/huge_length.png")
    assert huge.getheader("Content-Length") == "100000000000" and len(huge.read(3_000_000)) == 3_000_000
    start = time.monotonic()
    assert len(get(server, "/drip.png").read(3)) == 3
    assert time.monotonic() - start > 0.3
    with socket.create_connection(("127.0.0.1", server.port), timeout=3) as sock:
        sock.sendall(f"GET /slow_headers.png HTTP/1.1\r\nHost: {HOST}\r\n\r\n".encode())
        time.sleep(0.7)
        assert sock.recv(4096).count(b"X-Wait") >= 2 and b"\r\n\r\n" not in sock.recv(4096)


def test_statuses_headers_and_empty_bodies(server: Server) -> None:
    assert get(server, "/gone.png").status == 410
    assert get(server, "/typed.png").headers.get_all("Content-Type") == ["text/html"]
    empty = get(server, "/empty.png")
    assert empty.status == 200 and empty.getheader("Content-Length") == "0" and empty.read() == b""


def test_hosts_have_their_wishes(server: Server) -> None:
    assert get(server, "/robots.txt", hosts.FORBIDDEN).read() == b"User-agent: *\nDisallow: /\n"
    assert get(server, "/robots.txt", hosts.BARE).status == 404
    assert get(server, "/robots.txt", hosts.BROKEN_RULES).status == 500
    assert b'"/art/*"' in get(server, "/.well-known/tdmrep.json", hosts.RESERVED).read()
    assert get(server, "/.well-known/tdmrep.json").status == 404


def test_the_log_has_every_request(server: Server) -> None:
    get(server, "/gone.png?logged").read()
    last = server.log()[-1]
    assert (last.host, last.target, last.status, last.agent) == (HOST, "/gone.png?logged", 404, "tester/1")
    assert time.time() - 10 < last.time <= time.time()


def test_a_closed_host_refuses(server: Server) -> None:
    assert server.connect == {
        "*.miniweb.test": f"127.0.0.1:{server.port}",
        hosts.CLOSED: f"127.0.0.1:{server.closed_port}",
    }
    with pytest.raises(ConnectionRefusedError):
        socket.create_connection(("127.0.0.1", server.closed_port), timeout=3)


def test_it_ends_with_the_block() -> None:
    with running(ROUTES[:1]) as short:
        assert get(short, "/whole.png").status == 200
    with pytest.raises(OSError):
        get(short, "/whole.png")


def test_it_dies_with_a_parent_that_is_killed() -> None:
    code = (
        "import time\nfrom pipeline.miniweb.server import running\n"
        "with running([]) as server:\n    print(server.port, flush=True)\n    time.sleep(60)"
    )
    with subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout
        port = int(parent.stdout.readline())
        os.kill(parent.pid, 9)
    deadline = time.monotonic() + 5
    while time.monotonic() < deadline:
        try:
            socket.create_connection(("127.0.0.1", port), timeout=1).close()
        except OSError:
            return
        time.sleep(0.1)
    pytest.fail("the server outlived its parent by 5 s")
