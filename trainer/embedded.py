"""The CLIP's numbers of a packed set: vectors and weights from Parquet, token states of captions, and the draws.

Which rows a step takes is a pure function of (seed, step). This module knows nothing of models.
"""

from __future__ import annotations

import os
import tempfile
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch

from pipeline.base import MISSING, REFUSED, HeadraceError, disk_error, read_json
from pipeline.shards import parquet_file, read_parquet, shard_files, vectors

if TYPE_CHECKING:
    from collections.abc import Sequence

    from numpy.typing import NDArray

    from pipeline.clip import Clip

KEEP_VECTORS = 1 << 30  # bytes of each kind of vectors held in memory
KEEP_TOKENS = 8 << 30  # bytes of token states held in memory; those of a larger set are computed batch by batch
CHUNK = 1024  # captions encoded at a time
ROUND = 8  # the length is rounded up to a multiple of it, or to the context: GPUs are quickest so


@dataclass(frozen=True)
class Embeddings:
    """One row per sample: unit vectors of picture and caption, float16 (N, D), and how often to draw it, float64."""

    image: NDArray[np.float16]
    text: NDArray[np.float16]
    weight: NDArray[np.float64]

    def usable(self) -> NDArray[np.int64]:
        """The rows that have both vectors and a weight above 0."""
        return np.flatnonzero(self.weight > 0)


def read_embeddings(folder: Path, split: str) -> Embeddings:
    """Stream the vectors of `folder/split` shard by shard; rows that lack one get the weight 0.

    What exceeds KEEP_VECTORS lies in a temporary file below TMPDIR, mapped into memory.

    Raises:
        HeadraceError: no such columns, a vector that is not finite, a weight below 0, or nothing that can be used.
    """
    paths = shard_files(folder / split, "parquet")
    rows = sum(parquet_file(path).metadata.num_rows for path in paths)
    whole: Embeddings | None = None
    start = 0
    for path in paths:
        part = _read_shard(path)
        whole = whole or Embeddings(
            _room(rows, part.image.shape[1]), _room(rows, part.text.shape[1]), np.empty(rows, dtype=np.float64)
        )
        here = slice(start, start := start + len(part.weight))
        whole.image[here], whole.text[here], whole.weight[here] = part.image, part.text, part.weight
    if whole is None or not whole.weight.any():
        raise HeadraceError(f"{folder} has no sample with both CLIP vectors in {split}", hint="score it", code=MISSING)
    return whole


def _read_shard(path: Path) -> Embeddings:
    there = parquet_file(path).schema_arrow.names
    names = [name for name in ("key", "image_emb", "text_emb", "weight") if name in there]
    if not {"image_emb", "text_emb"} <= set(names):
        hint = "score and pack it with the clip signal"
        raise HeadraceError(f"{path} has no CLIP vectors", hint=hint, code=MISSING)
    table = read_parquet(path, names)
    image, text = (vectors(table[name]) for name in ("image_emb", "text_emb"))
    given = table["weight"].to_numpy() if "weight" in names else np.ones(len(table))
    weight = np.asarray(given, dtype=np.float64)
    for what, values in (("vector", image), ("vector", text), ("weight", weight)):
        sound = np.isfinite(values).reshape(len(table), -1).all(axis=1) & (what != "weight" or values >= 0)
        if not sound.all():
            key = table["key"][int(np.argmin(sound))]
            hint = "score and pack it again, or drop that row"
            raise HeadraceError(f"{path} has an impossible {what} in sample {key}", hint=hint, code=REFUSED)
    return Embeddings(image, text, np.where(image.any(axis=1) & text.any(axis=1), weight, 0))


def _room(rows: int, width: int) -> NDArray[np.float16]:
    """Place for vectors (rows, width): in memory where there are few, else in a file that goes with the process."""
    if 2 * rows * width <= KEEP_VECTORS:
        return np.empty((rows, width), dtype=np.float16)
    with tempfile.TemporaryFile() as file:
        try:
            os.posix_fallocate(file.fileno(), 0, 2 * rows * width)  # a disk that is full later would be a signal
        except OSError as error:
            raise disk_error(error, Path(tempfile.gettempdir())) from None
        return np.memmap(file, dtype=np.float16, mode="w+", shape=(rows, width))


def check_identity(folder: Path, clip: Clip) -> None:
    """Refuse a set whose vectors another CLIP made."""
    packed = read_json(folder / "dataset.json").get("clip") or {}
    named = packed.get("name", "no CLIP")
    if {**packed, "name": ""} != {**clip.identity, "name": ""}:
        what = "weights" if named == clip.name else f"CLIP ({named})"
        raise HeadraceError(
            f"the vectors of {folder} are of other {what} than those of CLIP {clip.name}",
            hint="give that CLIP with --clip, or score and pack the set again with this one",
            code=REFUSED,
        )


def weighted_order(weights: NDArray[np.float64], seed: int, epoch: int) -> NDArray[np.int64]:
    """Row numbers of one epoch, as many as there are weights above 0, shuffled: a pure function of its arguments.

    A row comes `n · weight / Σ weight` times on average, rounded up or down at random (systematic resampling); equal
    weights give every row exactly once.
    """
    rng = np.random.default_rng((seed, epoch))
    count = int((weights > 0).sum())
    edges = np.round(np.cumsum(weights) * (count / weights.sum()), 6)
    edges[-1] = count
    times = np.diff(np.floor(edges + rng.random()).astype(np.int64), prepend=0)
    return rng.permutation(np.repeat(np.arange(len(weights)), times))


class Draws:
    """Which rows a step takes: epochs follow one another without a gap, a batch may straddle two."""

    def __init__(self, weights: NDArray[np.float64], seed: int, size: int) -> None:
        self.size = size
        self.epoch = int((weights > 0).sum())
        self._order = lru_cache(maxsize=2)(lambda epoch: weighted_order(weights, seed, epoch))

    def rows(self, step: int) -> NDArray[np.int64]:
        """Row numbers (size,) of the batch of one step, counted from 0."""
        places = np.arange(step * self.size, (step + 1) * self.size)
        return np.array([self._order(int(place // self.epoch))[place % self.epoch] for place in places])


class CaptionTokens:
    """Token states of a set's captions by the frozen CLIP: all at once where memory allows, else batch by batch."""

    def __init__(self, clip: Clip, captions: Sequence[str], keep: bool = True) -> None:
        self._clip = clip
        self._captions = captions
        self._place: NDArray[np.int64] | None = None
        self._length = clip.context_length
        distinct = list(dict.fromkeys(captions))
        if keep and len(distinct) * self._bytes_per_caption() <= KEEP_TOKENS:
            flat, lengths = [], []
            for start in range(0, len(distinct), CHUNK):
                states, mask = self._encode(distinct[start : start + CHUNK])
                flat.append(states[mask])
                lengths.append(mask.sum(dim=1))
            self._flat, self._lengths = torch.cat(flat), torch.cat(lengths)  # ragged: (all tokens, width)
            self._length = min(-(-int(self._lengths.max()) // ROUND) * ROUND, clip.context_length)
            self._starts = torch.cumsum(self._lengths, 0) - self._lengths
            number = {text: n for n, text in enumerate(distinct)}
            self._place = np.array([number[text] for text in captions])

    def take(self, rows: NDArray[np.int64]) -> tuple[torch.Tensor, torch.Tensor]:
        """States float16 (B, N, width) and mask (B, N), true on tokens.

        N is the same for all batches, so that a compiled network is compiled once: what the set's longest caption needs
        where the states are kept, else the CLIP's context.
        """
        if self._place is None:
            return self._encode([self._captions[row] for row in rows])
        place = torch.from_numpy(self._place[rows])
        lengths = self._lengths[place]
        places = torch.arange(self._length)
        mask = places < lengths[:, None]
        states = self._flat[torch.where(mask, self._starts[place][:, None] + places, 0)]
        return states * mask[:, :, None], mask

    def _encode(self, texts: Sequence[str]) -> tuple[torch.Tensor, torch.Tensor]:
        states, mask = (torch.from_numpy(part) for part in self._clip.text_states(texts))
        return (states * mask[:, :, None]).half(), mask

    def _bytes_per_caption(self) -> int:
        return int(self._clip.context_length * self._clip.text_states([""])[0].shape[2] * 2)
