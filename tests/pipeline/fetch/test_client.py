"""The client against servers that are good, slow, lying or hostile, over real sockets."""

from __future__ import annotations

import gzip
import hashlib
import shutil
import socket
import ssl
import subprocess
import threading
import time
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
from pydantic import ValidationError

from pipeline.fetch.client import FetchConfig

from .conftest import HEAD, Handler, Make, Request, Web, after, drip, endless, ok, redirect, reset


def test_a_picture(client: Make, web: Web) -> None:
    web.pages["shop1.web.test/a%20b,c.jpg"] = ok(b"picture", "Content-Type: image/jpeg")
    fetched = client().fetch("http://Shop1.web.test/a b,c.jpg?é#frag")
    assert (fetched.body, fetched.error, fetched.status, fetched.permanent) == (b"picture", None, 200, False)
    assert fetched.final_url == "http://shop1.web.test/a%20b,c.jpg?%C3%A9"
    assert (fetched.content_type, fetched.opt_out, fetched.attempts, fetched.bytes) == ("image/jpeg", None, 1, 7)
    assert fetched.sha256 == hashlib.sha256(b"picture").hexdigest()
    [request] = web.log
    assert request.path == "/a%20b,c.jpg?%C3%A9"
    assert request.headers["user-agent"].startswith("headrace/") and "+https://" in request.headers["user-agent"]
    assert (request.headers["accept"], request.headers["accept-encoding"]) == ("image/*", "identity")


def test_connections_are_kept(client: Make, web: Web) -> None:
    web.pages["/x"] = ok()
    one = client()
    assert all(one.fetch("http://a.web.test/x").body for _ in range(5))
    assert web.connections == 1


@pytest.mark.parametrize("status", [201, 204, 206, 300, 304, 400, 401, 403, 404, 410, 429, 451, 500, 503, 599])
def test_other_statuses(client: Make, web: Web, status: int) -> None:
    web.pages["/x"] = ok(b"", status=f"{status} Whatever")
    fetched = client().fetch("http://a.web.test/x")
    assert (fetched.error, fetched.status, fetched.body) == (f"http_{status}", status, None)
    assert fetched.permanent == (status not in (429, 500, 503))


def test_empty_and_invalid(client: Make, web: Web) -> None:
    web.pages["/x"] = ok(b"")
    assert (client().fetch("http://a.web.test/x").error or "").startswith("empty")
    for url, error in (("nonsense", "invalid_url"), ("file:///etc/passwd", "scheme"), ("", "invalid_url")):
        fetched = client().fetch(url)
        assert (fetched.error, fetched.final_url, fetched.permanent, fetched.attempts) == (error, url, True, 0)


def test_redirects(client: Make, web: Web) -> None:
    web.pages |= {"a.web.test/1": redirect("../2?x", "301 Moved"), "a.web.test/2": redirect("//b.web.test/é", "307 T")}
    web.pages["b.web.test/%C3%A9"] = ok()
    fetched = client().fetch("http://a.web.test/1")
    assert (fetched.body, fetched.final_url, fetched.attempts) == (b"picture", "http://b.web.test/%C3%A9", 1)
    web.pages |= {f"/{n}": redirect(f"/{n + 1}") for n in range(10, 30)}
    web.pages |= {"/loop": redirect("/pool"), "/pool": redirect("/loop"), "/self": redirect("/self")}
    for path in ("/10", "/loop", "/self"):
        assert (client(max_redirects=5).fetch(f"http://a.web.test{path}").error or "").startswith("redirect_loop")
    assert [len(web.asked(f"/{n}")) for n in (10, 15, 16)] == [1, 1, 0]
    for target in ("file:///etc/passwd", "ftp://a.web.test/x", "data:image/png;base64,AA", "javascript:alert(1)"):
        web.pages["/bad"] = redirect(target)
        assert (client().fetch("http://a.web.test/bad").error or "").startswith("redirect_scheme")
    web.pages["/bad"] = redirect("http://")
    assert (client().fetch("http://a.web.test/bad").error or "").startswith("protocol")
    web.pages["/bad"] = ok(b"", status="302 Found")
    assert client().fetch("http://a.web.test/bad").error == "http_302"


def test_size_caps(client: Make, web: Web) -> None:
    small = client(max_bytes=1000)
    web.pages["/fits"], web.pages["/over"] = ok(b"x" * 1000), ok(b"x" * 1001)
    assert small.fetch("http://a.web.test/fits").bytes == 1000
    assert small.fetch("http://a.web.test/over").error == "too_large: 1001 bytes declared"
    web.pages["/undeclared"] = b"HTTP/1.0 200 OK\r\n\r\n" + b"x" * 5000
    chunks = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n" + b"100\r\n" + b"x" * 256 + b"\r\n"
    web.pages["/chunked"] = chunks + b"1000\r\n" + b"x" * 4096 + b"\r\n0\r\n\r\n"
    for path in ("/undeclared", "/chunked"):
        assert (client(max_bytes=1000).fetch(f"http://b.web.test{path}").error or "").startswith(
            ("too_large", "timeout")
        )


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "deflate", "raw"])
def test_content_encodings(client: Make, web: Web, encoding: str) -> None:
    def packed(data: bytes) -> bytes:
        if encoding.lower() == "gzip":
            return gzip.compress(data)
        return zlib.compress(data, wbits=15 if encoding == "deflate" else -15)

    header = f"Content-Encoding: {'deflate' if encoding == 'raw' else encoding}"
    web.pages["/x"], web.pages["/bomb"] = ok(packed(b"picture"), header), ok(packed(bytes(50_000_000)), header)
    assert client().fetch("http://a.web.test/x").body == b"picture"
    assert client(max_bytes=100_000).fetch("http://a.web.test/bomb").error == "too_large: more than 100000 bytes"
    web.pages["/cut"] = ok(packed(b"picture" * 99)[:-9], header)
    assert (client().fetch("http://a.web.test/cut").error or "").startswith("truncated")


def test_unknown_or_stacked_encodings(client: Make, web: Web) -> None:
    for name in ("br", "gzip, gzip", "x"):
        web.pages["/x"] = ok(gzip.compress(b"picture"), f"Content-Encoding: {name}")
        assert (client().fetch("http://a.web.test/x").error or "").startswith("protocol")
    web.pages["/x"] = ok(b"not gzip", "Content-Encoding: gzip")
    assert (client().fetch("http://a.web.test/x").error or "").startswith("protocol")


CHUNKED = HEAD + b"Transfer-Encoding: chunked\r\n\r\n"
LINE = b"X: " + b"y" * 9000 + b"\r\n"
HOSTILE: dict[str, tuple[bytes | Handler, tuple[str, ...]]] = {
    "silence": (lambda link, _: time.sleep(3), ("timeout",)),
    "silence after the head": (
        after(HEAD + b"Content-Length: 9\r\n\r\n", lambda link, _: time.sleep(3)),
        ("timeout",),
    ),
    "drip in the status line": (drip(b"HTTP/1.1 200 " + b"O" * 5000), ("timeout",)),
    "drip in the headers": (after(HEAD, drip(b"X-A: b\r\n")), ("timeout",)),
    "drip in the body": (after(HEAD + b"Content-Length: 9000\r\n\r\n", drip(b"x")), ("timeout",)),
    "drip in chunks": (after(CHUNKED, drip(b"1\r\nx\r\n")), ("timeout",)),
    "drip without a length": (after(HEAD + b"\r\n", drip(b"x")), ("timeout",)),
    "endless status line": (endless(b"", b"A" * 65536), ("protocol", "too_large")),
    "endless header line": (endless(HEAD + b"X: ", b"A" * 65536), ("protocol", "too_large")),
    "endless headers": (endless(HEAD, b"X: y\r\n" * 5000), ("protocol",)),
    "endless interim answers": (endless(b"", b"HTTP/1.1 100 Continue\r\n" + LINE * 50 + b"\r\n"), ("too_large",)),
    "endless body": (endless(HEAD + b"\r\n", b"x" * 65536), ("too_large",)),
    "endless chunks": (endless(CHUNKED, b"1\r\nx\r\n" * 9000), ("too_large", "timeout")),
    "endless chunk extension": (endless(CHUNKED + b"1;", b"x" * 65536), ("protocol", "too_large", "truncated")),
    "endless trailers": (endless(CHUNKED + b"1\r\nx\r\n0\r\n", LINE * 9), ("too_large",)),
    "reset at once": (reset(b""), ("reset",)),
    "reset in the headers": (reset(HEAD + b"X-A"), ("reset", "protocol")),
    "reset in the body": (reset(HEAD + b"Content-Length: 99\r\n\r\nx"), ("reset", "truncated")),
    "closed at once": (lambda link, _: None, ("reset",)),
    "shorter than it says": (after(HEAD + b"Content-Length: 99\r\n\r\nx", lambda link, _: None), ("truncated",)),
    "chunks that stop": (after(CHUNKED + b"5\r\nab", lambda link, _: None), ("truncated",)),
    "chunks without an end": (after(CHUNKED + b"2\r\nab\r\n", lambda link, _: None), ("truncated",)),
    "chunk size nonsense": (after(CHUNKED + b"zz\r\n", lambda link, _: None), ("truncated", "protocol")),
    "two lengths": (HEAD + b"Content-Length: 3\r\nContent-Length: 4\r\n\r\nabcd", ("protocol", "truncated", "timeout")),
    "not HTTP": (after(b"SSH-2.0-OpenSSH_9.6\r\n", lambda link, _: None), ("protocol",)),
    "bad status": (after(b"HTTP/1.1 abc\r\n\r\n", lambda link, _: None), ("protocol",)),
    "huge status": (after(b"HTTP/1.1 99999 X\r\n\r\n", lambda link, _: None), ("protocol", "http_")),
    "NULs in headers": (
        after(HEAD + b"X\0: \0\r\nContent-Length: 0\r\n\r\n", lambda link, _: None),
        ("protocol", "empty"),
    ),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_servers_end_in_time(client: Make, web: Web, name: str) -> None:
    answer, codes = HOSTILE[name]
    web.pages["/x"] = answer
    start = time.monotonic()
    fetched = client(total_timeout=0.5, read_timeout=0.4, max_bytes=1_000_000).fetch("http://a.web.test/x")
    assert time.monotonic() - start < 1.5
    assert fetched.body is None and fetched.error is not None and fetched.error.startswith(codes), fetched.error


def slow_look_up(*_: object, **__: object) -> list[object]:
    time.sleep(2)
    return []


def test_dead_hosts(client: Make, web: Web, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as closed:
        port = closed.getsockname()[1]
    fetched = client(connect={"gone.test": f"127.0.0.1:{port}"}).fetch("http://gone.test/")
    assert (fetched.error, fetched.permanent) == ("connect: connection refused", False)
    for number, text, permanent in (
        (socket.EAI_NONAME, "no such host", True),
        (socket.EAI_AGAIN, "temporary failure", False),
    ):

        def fail(*_: object, number: int = number, **__: object) -> None:
            raise socket.gaierror(number, "x")

        monkeypatch.setattr(socket, "getaddrinfo", fail)
        fetched = client().fetch("http://nowhere.example/")
        assert (fetched.error, fetched.permanent) == (f"dns: {text}", permanent)
    monkeypatch.setattr(socket, "getaddrinfo", slow_look_up)
    start = time.monotonic()
    assert client(connect_timeout=0.3).fetch("http://slow.example/").error == "timeout: looking up the host"
    assert time.monotonic() - start < 1


def test_the_total_covers_redirects_and_retries(client: Make, web: Web) -> None:
    def slow(link: socket.socket, request: Request) -> None:
        time.sleep(0.3)
        link.sendall(redirect(f"/{len(web.log)}"))

    web.pages |= {f"/{n}": slow for n in range(40)}
    start = time.monotonic()
    fetched = client(total_timeout=1.0, max_redirects=30, retries=5).fetch("http://a.web.test/0")
    assert (fetched.error or "").startswith("timeout") and time.monotonic() - start < 2.0


def test_threads_do_not_share_deadlines(client: Make, web: Web) -> None:
    web.pages |= {"slow.web.test/x": drip(b"x"), "fast.web.test/x": ok(b"y" * 300_000)}
    one = client(total_timeout=1.0)
    urls = ["http://slow.web.test/x", "http://fast.web.test/x"] * 8
    with ThreadPoolExecutor(16) as pool:
        results = list(pool.map(one.fetch, urls))
    assert {fetched.bytes for fetched in results[1::2]} == {300_000}
    assert all((fetched.error or "").startswith("timeout") for fetched in results[::2])


def test_a_bad_exemption_is_refused() -> None:
    for connect in ({"*": "127.0.0.1:1"}, {"x.test": "localhost:1"}, {"x.test": "127.0.0.1"}):
        with pytest.raises(ValidationError, match=r"not"):
            FetchConfig(connect=connect)


@pytest.mark.skipif(shutil.which("openssl") is None, reason="makes its certificate with openssl")
def test_tls_checks_the_host_name(client: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
    command = f"openssl req -x509 -newkey ec -pkeyopt ec_paramgen_curve:P-256 -nodes -days 2 -keyout {key} -out {cert}"
    subprocess.run(
        [*command.split(), "-subj", "/CN=x", "-addext", "subjectAltName=DNS:good.web.test"],
        check=True,
        capture_output=True,
    )
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    context.load_cert_chain(cert, key)
    names: list[str | None] = []
    context.sni_callback = lambda _, name, __: names.append(name)
    server = socket.create_server(("127.0.0.1", 0))

    def serve() -> None:
        while True:
            link, _ = server.accept()
            try:
                with context.wrap_socket(link, server_side=True) as secure:
                    secure.recv(4096)
                    secure.sendall(ok(b"z" * 100_000))
            except OSError:
                link.close()

    threading.Thread(target=serve, daemon=True).start()
    connect = {"*.web.test": f"127.0.0.1:{server.getsockname()[1]}"}
    unknown = client(connect=connect).fetch("https://good.web.test/x")
    assert (unknown.error or "").startswith("tls: ") and unknown.permanent
    monkeypatch.setenv("SSL_CERT_FILE", str(cert))
    assert client(connect=connect).fetch("https://good.web.test/x").bytes == 100_000
    assert (client(connect=connect).fetch("https://evil.web.test/x").error or "").startswith("tls: ")
    assert names == ["good.web.test", "good.web.test", "evil.web.test"]


def test_a_tls_handshake_that_never_ends(client: Make, web: Web) -> None:
    silent = socket.create_server(("127.0.0.1", 0))
    start = time.monotonic()
    one = client(connect={"x.test": f"127.0.0.1:{silent.getsockname()[1]}"}, total_timeout=0.5)
    assert (one.fetch("https://x.test/").error or "").startswith("timeout")
    assert time.monotonic() - start < 1.5
    assert (client().fetch("https://a.web.test/x").error or "").startswith(("tls", "timeout"))  # plain HTTP behind it
