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

    user_agent: str = "headrace/0.1 (+https://github.com/headrace/headrace; research image-text curation)"
    connect_timeout: float = Field(default=5.0, gt=0)
    read_timeout: float = Field(default=10.0, gt=0)
    total_timeout: float = Field(default=30.0, gt=0)
    max_wait: float = Field(default=120.0, ge=0)
    max_bytes: int = Field(default=20_000_000, gt=0)
    max_redirects: int = Field(default=5, ge=0)
    retries: int = Field(default=2, ge=0)
    per_host_connections: int = Field(default=4, gt=0)
    per_host_rate: float = Field(default=10.0, gt=0)
    robots: bool = True
    opt_out: bool = True
    connect: dict[str, str] = Field(default_factory=dict)

    @field_validator("connect")
    @classmethod
    def _exemptions_parse(cls, value: dict[str, str]) -> dict[str, str]:
        for pattern, address in value.items():
            parse_exemption(pattern, address)
        return value
