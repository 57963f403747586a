"""What a server can do wrong, as the fetch's stable codes: it knows exceptions, and nothing of hosts or retries."""

from __future__ import annotations

import http.client
import re
import ssl
from collections.abc import Iterator
from contextlib import contextmanager

from urllib3.exceptions import HTTPError, IncompleteRead, NewConnectionError, ReadTimeoutError, SSLError

from pipeline.fetch.guard import FetchError


@contextmanager
def server_errors() -> Iterator[None]:
    """Turn whatever urllib3, http.client, ssl or the socket raise into a FetchError."""
    try:
        yield
    except FetchError:
        raise
    except (HTTPError, http.client.HTTPException, OSError, ValueError, RecursionError) as error:
        raise _classify(error) from error


def _classify(error: BaseException) -> FetchError:
    causes = list(_causes(error))
    names = " ".join(dict.fromkeys(type(cause).__name__ for cause in causes))
    for cause in causes:
        if isinstance(cause, FetchError):
            return cause
        if isinstance(cause, (TimeoutError, ReadTimeoutError)) and not isinstance(cause, NewConnectionError):
            return FetchError("timeout")
        if isinstance(cause, (http.client.IncompleteRead, IncompleteRead)):
            return FetchError("truncated", "the connection ended before the body did")
        if isinstance(cause, (http.client.RemoteDisconnected, ConnectionError)):
            return FetchError("reset", type(cause).__name__)
    for cause in causes:
        if isinstance(cause, (ssl.SSLError, SSLError)):
            return FetchError("tls", re.sub(r"\s*\(_ssl.*", "", str(cause))[:200])
    return FetchError("protocol", names)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """The exception, what it was raised from, and the exceptions that urllib3 keeps in its arguments."""
    pending, seen = [error], set[int]()
    while pending:
        current = pending.pop(0)
        if id(current) not in seen:
            seen.add(id(current))
            yield current
            pending += [item for item in (*current.args, current.__cause__) if isinstance(item, BaseException)]
