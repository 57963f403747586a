"""Signals: numbers about one picture and its caption. One module here is one signal; nothing else lists them.

A signal's module has, with heavy imports inside the functions:

- `settings(options) -> dict`: what its bytes depend on (its own version, weights, libraries), JSON-able, found quickly;
- `load(options) -> Signal`: the signal ready to work, with models in memory.

This package knows nothing of shards, tars or Parquet files.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, cast

from pydantic import Field

from pipeline.base import Config

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa
    from numpy.typing import NDArray


class SignalOptions(Config):
    """The settings that signals read."""

    clip: str = Field("mini", description="the CLIP that embeds: mini, an open_clip NAME:PRETRAINED, or a folder")
    device: str = Field("auto", description="where it runs: auto (a GPU where there is one), cpu, cuda or cuda:N")


@dataclass(frozen=True)
class Picture:
    """One fetched row: `row` is that of raw/N.parquet.

    `pixels` is RGB uint8 (H, W, 3), None where they could not be decoded (then `error` says why) or where no signal
    of the run reads pixels.
    """

    row: Mapping[str, Any]
    pixels: NDArray[np.uint8] | None
    error: str | None = None

    @property
    def caption(self) -> str | None:
        """The caption, None where there is none or only white space."""
        text = self.row["caption"]
        return text if text is not None and text.strip() else None


class Signal(Protocol):
    """What `load` returns. `reads` is what a row needs to be scored: "pixels", "caption" or both."""

    reads: frozenset[str]

    def schema(self) -> pa.Schema:
        """Names and types of its columns (without `key`)."""

    def look(self, picture: Picture) -> Any:
        """What is kept of a picture until its batch is full, something small; None makes the row's values NULL."""

    def columns(self, seen: Sequence[Any]) -> pa.Table:
        """The values of a batch, one row for each that `look` kept, in order, with `schema()`."""


class SignalModule(Protocol):
    """A module of this package."""

    def settings(self, options: SignalOptions) -> dict[str, Any]: ...

    def load(self, options: SignalOptions) -> Signal: ...


def signal_names() -> list[str]:
    """The signals there are, by name."""
    return sorted(module.name for module in pkgutil.iter_modules(__path__) if not module.name.startswith("_"))


def signal_module(name: str) -> SignalModule:
    """The module of a signal."""
    return cast(SignalModule, importlib.import_module(f"{__name__}.{name}"))
