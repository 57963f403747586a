"""Fetch pictures politely and safely: one URL in, bytes or a reason out.

`client` is what the downloader calls; `guard` says which addresses may be connected to, `wire` holds the sockets
that obey it, `limits` spaces requests per host across processes, `robots` reads a host's wishes, `optout` a response's.
Nothing here knows pictures, rows or shards.
"""

from __future__ import annotations

from pydantic import Field, field_validator

from pipeline.base import Config
from pipeline.fetch.guard import parse_exemption

AGENT = "headrace"  # the product token of robots.txt groups and X-Robots-Tag prefixes


class FetchConfig(Config):
    """How to fetch. Times in seconds, sizes in bytes.

    `total_timeout` bounds the time spent talking for one URL, all redirects and retries included; time spent waiting
    for a host's turn is bounded apart, by `max_wait`, which also caps the `Retry-After` that is waited for.
    `connect` maps a host (or `*.suffix`) to the one address:port that stands for it: the only exemption from the
    address guard.
    """

    user_agent: str = Field(
        "headrace/0.1 (+https://github.com/headrace/headrace; research image-text curation)",
        description="how the fetcher names itself",
    )
    connect_timeout: float = Field(default=5.0, gt=0, description="seconds to connect")
    read_timeout: float = Field(default=10.0, gt=0, description="seconds between two pieces of an answer")
    total_timeout: float = Field(default=30.0, gt=0, description="seconds of talking for a URL, retries included")
    max_wait: float = Field(
        default=120.0,
        ge=0,
        description="seconds to wait for a host's turn or its Retry-After",
    )
    max_bytes: int = Field(default=20_000_000, gt=0, description="bytes of a picture; a larger one is given up")
    max_redirects: int = Field(default=5, ge=0, description="redirects to follow")
    retries: int = Field(default=2, ge=0, description="further attempts at what can still succeed")
    per_host_connections: int = Field(default=4, gt=0, description="connections to a host at once, over all workers")
    per_host_rate: float = Field(default=10.0, gt=0, description="requests a second to a host, over all workers")
    robots: bool = Field(True, description="obey robots.txt")
    opt_out: bool = Field(True, description="honour opt-outs from training: X-Robots-Tag, TDM reservations")
    connect: dict[str, str] = Field({}, description="PATTERN=HOST:PORT of a server of your own; repeatable")

    @field_validator("connect")
    @classmethod
    def _exemptions_parse(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, address in value.items():
            parse_exemption(pattern, address)
        return value
