"""The packed sets that a CLIP is trained on: how they share a batch, their pictures, and what one step draws of them.

It knows nothing of losses; a CLIP is asked for its input size and the length of its texts only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from pipeline.base import HeadraceError
from trainer import augment
from trainer.config import ClipTraining
from trainer.data import Batches, PackedSet, Pictures, open_set

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray
    from torch import Tensor

    from pipeline.clip import Clip

CHECKED = 10_000  # distinct captions whose length is looked at, at most
WRONG = 2  # of a picture's wrong captions that a step sees, at most: texts cost as much as pictures
AT_ONCE = 256  # pictures that are taken whole
ROOM = 1.125  # training pictures are kept this much larger than the input, for crops


@dataclass(frozen=True)
class Opened:
    """One packed set, indexed: its training rows, its held-out rows, and which rows a step takes."""

    name: str
    train: PackedSet
    val: PackedSet
    batches: Batches

    @property
    def facts(self) -> dict[str, int]:
        """What a model card says of it."""
        return {"rows": len(self.train), "distinct captions": self.batches.distinct}


@dataclass(frozen=True)
class Source(Opened):
    """The same with its pictures decoded."""

    pictures: Pictures
    val_pictures: Pictures

    def whole(self, rows: NDArray[np.int64]) -> Iterator[Tensor]:
        """Training pictures at the input's size, not cut at random, uint8 (N, 3, H, W), so many at a time."""
        import numpy as np
        import torch
        from torch.nn import functional as F

        for part in np.array_split(rows, max(1, len(rows) // AT_ONCE)):
            roomy = self.pictures.take(part).float()
            small = F.interpolate(roomy, size=self.val_pictures.size, mode="bilinear", antialias=True)
            yield small.round().to(torch.uint8)


class Drawn(NamedTuple):
    """One step's rows: uint8 pictures (N, 3, H, W), a caption each, and wrong captions with the row each belongs to."""

    pictures: Tensor
    captions: list[str]
    sided: Tensor  # bool (N,): the caption may tell left from right
    owners: list[int]
    wrong: list[str]


def open_sources(folders: Sequence[Path], settings: ClipTraining, seed: int) -> list[Opened]:
    """Index the sets and share the batch among them.

    Raises:
        HeadraceError: a set that cannot be trained on, or another number of sets than the settings share or name.
    """
    shares = settings.shares or (1.0,) * len(folders)
    if len(shares) != len(folders):
        raise HeadraceError(
            f"the config shares the batch among {len(shares)} sets, but {len(folders)} are given with --shards",
            hint="give one --shards for every number in `training.shares`",
        )
    if settings.readout_steps and len(settings.readout) != len(folders):
        raise HeadraceError(
            f"the config's `readout` is of {len(settings.readout)} sets, but {len(folders)} are given with --shards",
            hint="name a part for every --shards in `training.readout`: add, keep or none",
        )
    opened = []
    for number, (folder, share) in enumerate(zip(folders, shares, strict=True)):
        train, val = open_set(folder, "train"), open_set(folder, "val")
        size = max(2, round(settings.batch * share / sum(shares)))
        batches = Batches(train.captions, seed * 1000 + number, size)
        if batches.distinct < 2:
            hint = "a CLIP learns by telling pairs apart: pack at least two pictures with different captions"
            raise HeadraceError(f"{folder} has only {batches.distinct} distinct caption to train on", hint=hint)
        name = f"{number}-{folder.parent.name if folder.name == 'curated' else folder.name}"
        opened.append(Opened(name, train, val, batches))
    return opened


def decoded(opened: Opened, clip: Clip, say: Callable[[str], None]) -> Source:
    """A set with its pictures: training ones with room for crops, held-out ones as scoring sees them."""
    name, train, val, batches = opened.name, opened.train, opened.val, opened.batches
    say(f"{name}: {len(train)} pictures, {batches.distinct} distinct captions, {batches.size} of each batch")
    texts = [text for text in dict.fromkeys(train.captions) if text.strip()][:CHECKED]
    cut = int((~clip.fits(texts)).sum())
    if cut:
        room = clip.context_length
        say(f"{name}: of {len(texts)} captions {cut} are longer than {room} tokens; only their beginning is read")
    shape = clip.preprocess
    roomy = replace(shape, height=math.ceil(shape.height * ROOM), width=math.ceil(shape.width * ROOM))
    return Source(name, train, val, batches, Pictures(train, roomy), Pictures(val, shape))


def wrong_captions(packed: PackedSet, row: int, caption: str) -> Sequence[str]:
    """The set's own of a row where it tells some, else its caption, or what is left of it, with words exchanged."""
    return packed.swaps[row] if packed.tells_swaps else augment.swapped_captions(caption)


def draw(sources: Sequence[Source], step: int, drop_parts: float, rng: np.random.Generator) -> Drawn:
    """What a step learns from: a pure function of its arguments.

    No caption comes twice where the rows' own do not: one that would, cut, is left whole.
    """
    import torch

    pictures: list[Tensor] = []
    captions: list[str] = []
    sided: list[bool] = []
    owners: list[int] = []
    wrong: list[str] = []
    chosen = [(source, source.batches.rows(step)) for source in sources]
    taken = {source.train.captions[row] for source, rows in chosen for row in rows}
    for source, rows in chosen:
        pictures.append(source.pictures.take(rows))
        for row in rows.tolist():
            caption, told = source.train.captions[row], source.train.swaps[row]
            # Cut before its words are exchanged: a swap that names what the caption leaves unsaid would name a truth.
            varied = caption if told else augment.vary_caption(caption, drop_parts, rng)
            varied = caption if varied in taken else varied
            taken.add(varied)
            swaps = wrong_captions(source.train, row, varied)
            swaps = [swaps[n] for n in sorted(rng.permutation(len(swaps))[:WRONG])]
            owners += [len(captions)] * len(swaps)
            wrong += swaps
            sided.append(augment.names_side(caption))  # all of it: what goes unsaid may still be seen
            captions.append(varied)
    return Drawn(torch.cat(pictures), captions, torch.tensor(sided), owners, wrong)
