"""A packed set as the three models see it: pictures, vectors, token states, and what the CLIP fixes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from trainer.conditions import Sizes
from trainer.data import Pictures, open_set
from trainer.embedded import CaptionTokens, read_embeddings

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Clip

FIT_ROWS = 1 << 17  # rows that whitening and ridge regression look at, at most


class Split:
    """One split of a packed set as the models see it; `rows` are those that may be used."""

    def __init__(self, folder: Path, split: str, clip: Clip, most: int | None = None) -> None:
        self.clip = clip
        self.packed = open_set(folder, split)
        self.embeddings = read_embeddings(folder, split)
        self.rows = self.embeddings.usable()[:most]
        self._whole = most is None

    @cached_property
    def tokens(self) -> CaptionTokens:
        """Token states of the captions, computed once where they fit in memory."""
        return CaptionTokens(self.clip, self.packed.captions, keep=self._whole)

    def pictures(self, side: int) -> Pictures:
        """The pictures, made square as the CLIP does it."""
        return Pictures(self.packed, replace(self.clip.preprocess, height=side, width=side), keep=self._whole)

    def vectors(self, kind: str, rows: NDArray[np.int64]) -> Tensor:
        """float32 (B, embedding) of `image` or `text`."""
        return torch.from_numpy(getattr(self.embeddings, kind)[rows]).float()


@dataclass(frozen=True)
class Sets:
    """What all three models are trained on and tried on, and the CLIP that they share."""

    train: Split
    val: Split
    clip: Clip

    @cached_property
    def sizes(self) -> Sizes:
        """What the CLIP fixes about the networks."""
        states, mask = self.clip.text_states([""])
        length = self.clip.context_length
        return Sizes(embedding=self.clip.dimension, token=states.shape[2], context=length, null=int(mask.sum()))

    @cached_property
    def null(self) -> tuple[Tensor, Tensor]:
        """Vector and token states of the empty text."""
        states, mask = self.clip.text_states([""])
        return torch.from_numpy(self.clip.encode_texts([""])[0]), torch.from_numpy(states[0][mask[0]])

    def some(self, kind: str) -> Tensor:
        """Training vectors, at most FIT_ROWS, evenly spread."""
        rows = self.train.rows
        return self.train.vectors(kind, rows[:: max(1, -(-len(rows) // FIT_ROWS))])
