"""The mini-web's virtual hosts: their names, and what each asks of crawlers as a whole.

A host that is not named here answers 404 to everything but the pages planned for it.
"""

import json

DOMAIN = "miniweb.test"
PATTERN = f"*.{DOMAIN}"

ORDINARY = tuple(
    f"{kind}{n}.{DOMAIN}"
    for kind, count in (("shop", 10), ("blog", 8), ("photos", 8), ("wiki", 4), ("news", 6), ("cdn", 4))
    for n in range(1, count + 1)
)
SLOW = f"slow1.{DOMAIN}"
LIMITED = f"limited1.{DOMAIN}"
BUSY = f"busy1.{DOMAIN}"
OVERLOADED = f"busy2.{DOMAIN}"
CLOSED = f"closed1.{DOMAIN}"  # its port refuses connections
RESETTING = f"reset1.{DOMAIN}"
FORBIDDEN = f"forbidden1.{DOMAIN}"
UNWELCOMING = f"nobots1.{DOMAIN}"
WALLED = f"walled1.{DOMAIN}"
OTHERS_ONLY = f"otherbots1.{DOMAIN}"
BARE = f"bare1.{DOMAIN}"
BROKEN_RULES = f"broken1.{DOMAIN}"
RESERVED = f"reserved1.{DOMAIN}"
FOREIGN_NAME = f"bücher.{DOMAIN}"
UNKNOWN = tuple(f"gone{n}.miniweb.invalid" for n in (1, 2, 3))  # `.invalid` resolves nowhere (RFC 6761)

LATENCY = {SLOW: 0.15}  # seconds before each answer
RATE = {LIMITED: (6, 6.0)}  # burst, and requests a second after it; beyond it 429

_ROBOTS = {
    FORBIDDEN: "User-agent: *\nDisallow: /\n",
    UNWELCOMING: "User-agent: *\nAllow: /\n\nUser-agent: Headrace\nDisallow: /\n",
    WALLED: "User-agent: *\nDisallow: /pictures/\nAllow: /pictures/open/\nDisallow: /*.webp$\n",
    OTHERS_ONLY: "User-agent: GPTBot\nUser-agent: CCBot\nDisallow: /\n\nUser-agent: *\nDisallow:\n",
}
_POLITE = "# welcome\nUser-agent: *\nDisallow: /admin/\nDisallow: /search?\n\nSitemap: http://{host}/sitemap.xml\n"


def robots_txt(host: str) -> tuple[int, str]:
    """Status and text of the host's /robots.txt; every third ordinary host has none."""
    if host == BROKEN_RULES:
        return 500, "internal error"
    if host in _ROBOTS:
        return 200, _ROBOTS[host]
    if host == BARE or (host in ORDINARY and ORDINARY.index(host) % 3 == 2):
        return 404, "not found"
    return 200, _POLITE.format(host=host)


def tdmrep_json(host: str) -> tuple[int, str]:
    """Status and text of the host's /.well-known/tdmrep.json."""
    if host != RESERVED:
        return 404, "not found"
    rules = [
        {"location": "/art/*", "tdm-reservation": 1, "tdm-policy": f"http://{host}/policy.json"},
        {"location": "/press/*", "tdm-reservation": 0},
    ]
    return 200, json.dumps(rules)
