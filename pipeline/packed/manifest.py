"""`dataset.json`, the manifest of a packed set: one canonical form, sealed with a digest of itself.

It is written last and removed first, so a folder that has one is whole. It knows nothing of what else it holds.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from pipeline.base import digest

NAME = "dataset.json"
CARD = "README.md"
SEAL = "seal"


def manifest_bytes(values: Mapping[str, Any]) -> bytes:
    """The file's bytes: `values` and their digest under `seal`, keys sorted, UTF-8."""
    return _canonical(dict(values) | {SEAL: digest(values)})


def read_manifest(path: Path) -> dict[str, Any]:
    """The manifest in a file.

    Raises:
        ValueError: when any bit of it is not as it was written; the message says so.
        FileNotFoundError: when there is none.
    """
    data = path.read_bytes()
    try:
        values = json.loads(data)
        seal = values.pop(SEAL)
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise ValueError("it is not a manifest, or is cut short") from None
    if seal != digest(values) or data != manifest_bytes(values):
        raise ValueError("it was changed after it was written")
    return dict(values)


def _canonical(values: Mapping[str, Any]) -> bytes:
    return (json.dumps(values, indent=1, sort_keys=True, ensure_ascii=False) + "\n").encode("utf-8", "surrogatepass")
