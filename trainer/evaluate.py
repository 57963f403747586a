"""Figures of a run on held-out captions: the prior's vectors, and pictures drawn one per caption without re-ranking.

What a figure is worth shows beside it: the same of the true pictures, of baselines, of as many training pictures. It
knows nothing of training, and of the set only its columns.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch

from pipeline.base import MISSING, HeadraceError, write_json
from pipeline.clip import load as load_clip
from trainer import matching
from trainer.cascade import DEFAULT, How
from trainer.conditions import Whitening
from trainer.data import Pictures, check_tars, epoch_order
from trainer.distances import cmmd, frechet, kernel_distance, nearest
from trainer.embedded import check_identity
from trainer.evaluate_clip import other_caption
from trainer.evaluate_page import Card, write_page
from trainer.prior import Prior
from trainer.prior_cosines import prior_cosines
from trainer.ridge import ridge
from trainer.saved import load_model, read_run
from trainer.sets import Sets, Split
from trainer.unclip import UnClip, load

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Clip

FOLDER, METRICS = "eval", "metrics.json"
THUMBNAIL = 128  # pixels, at most, of a picture on the page
TOLD = 32  # pictures between two lines of progress
Say = Callable[[str], None]


@dataclass(frozen=True)
class EvalRun:
    """What one call of `trainer eval` is asked for."""

    run: Path
    shards: Path | None = None  # a packed set whose `val` is used; None for the one that was trained on
    clip: str | None = None  # where the run's CLIP is now, if not where it was
    judge: str | None = None  # a second CLIP, as `pipeline.clip.load` takes it
    count: int = 256
    seed: int = 0
    how: How = DEFAULT


@dataclass(frozen=True)
class HeldOut:
    """The rows of `val` that are drawn, one per distinct caption, and those of `train` that they are compared with."""

    sets: Sets
    compared: Path  # the set whose `train` the figures are compared with
    rows: NDArray[np.int64]
    too_long: int  # captions passed over, since the CLIP would read only a part of them

    @cached_property
    def captions(self) -> list[str]:
        return [self.sets.val.packed.captions[row] for row in self.rows]

    @cached_property
    def swaps(self) -> list[tuple[str, ...]]:
        return [self.sets.val.packed.swaps[row] for row in self.rows]

    def true(self, shape: Any) -> torch.Tensor:
        """The held-out pictures themselves, uint8 (N, 3, H, W)."""
        return Pictures(self.sets.val.packed, shape, keep=False).take(self.rows)

    def training(self, shape: Any, seed: int) -> torch.Tensor:
        """As many training pictures at random, the same way."""
        rows = np.random.default_rng(seed).permutation(self.sets.train.rows)[: len(self.rows)]
        return Pictures(self.sets.train.packed, shape, keep=False).take(rows)


def evaluate(asked: EvalRun, say: Say) -> dict[str, Any]:
    """Write metrics.json and index.html below RUN/eval; returns the metrics.

    Raises:
        HeadraceError: no such run, model or set, one of another CLIP, no judge there, or fewer than two captions.
    """
    unclip = load(asked.run, asked.clip)
    prior = cast("Prior", load_model(asked.run, "prior", unclip.clip.device)[0])
    judge = unclip.clip if asked.judge is None else load_clip(asked.judge, str(unclip.clip.device))
    independent = _weights(judge) != _weights(unclip.clip)
    held = held_out(asked, unclip.clip)
    if not independent:
        say(f"note: the judge, CLIP {judge.name}, is the one that conditioned the run; give another by --judge")
    if (own := Path(read_run(asked.run)["shards"])) != held.compared:
        instead = f"compared with the training part of {held.compared}"
        say(f"note: the set that was trained on is no longer at {own}; {instead}")
    drawn = drawn_samples(unclip, held.captions, asked, say)
    say("judging")
    figures, details = judged(judge, drawn, held, asked.seed)
    near = _neighbours(unclip.clip, drawn, held)
    metrics = {
        "run": str(asked.run),
        "set": str(asked.shards or read_run(asked.run)["shards"]),
        "compared_with": str(held.compared),
        "pictures": len(drawn),
        "captions_too_long": held.too_long,
        "seed": asked.seed,
        "how": asdict(asked.how),
        "clip": unclip.clip.identity,
        "judge": {**judge.identity, "conditioned": not independent},
        "prior": {"cosine": _cosines(prior, unclip, held, asked)},
        **figures,
        "neighbours": {
            name: {"mean": float(values.mean()), "max": float(values.max())}
            for name, values in (("drawn", near.drawn), ("true", near.true))
        },
    }
    cards = _cards(asked, held, details, near, drawn)
    samples = [card.record for card in cards]
    write_json(asked.run / FOLDER / METRICS, {**metrics, "samples": samples})
    write_page(asked.run / FOLDER, metrics, cards)
    return metrics


def held_out(asked: EvalRun, clip: Clip) -> HeldOut:
    """The held-out captions that are drawn: distinct, drawn by the seed, none longer than the CLIP's context.

    Raises:
        HeadraceError: no set there, one of another CLIP, or fewer than two captions.
    """
    own = Path(read_run(asked.run)["shards"])
    given = asked.shards or own
    if not given.is_dir():
        hint = "give the set by --shards" if asked.shards is None else "check --shards"
        raise HeadraceError(f"there is no set {given}", hint=hint, code=MISSING)
    trained = own if own.is_dir() else given
    sets = Sets(Split(trained, "train", clip), Split(given, "val", clip), clip)
    for folder, split in ((given, sets.val), (trained, sets.train)):
        check_identity(folder, clip)
        check_tars(split.packed)
    usable = set(sets.val.rows.tolist())
    captions = tuple(text if row in usable else "" for row, text in enumerate(sets.val.packed.captions))
    order = epoch_order(captions, asked.seed, 0)[: 8 * asked.count]
    whole = clip.fits([captions[row] for row in order])
    rows = order[whole][: asked.count]
    if len(rows) < 2:
        hint = "give a set with more in `val`"
        raise HeadraceError(f"{given} has {len(rows)} held-out captions that can be drawn, 2 are needed", hint=hint)
    return HeldOut(sets, trained, rows, int((~whole).sum()))


def drawn_samples(unclip: UnClip, captions: Sequence[str], asked: EvalRun, say: Say) -> NDArray[np.uint8]:
    """One picture per caption (N, S, S, 3): the n-th is what `trainer sample` gives with the n-th seed."""
    parts = []
    for start in range(0, len(captions), TOLD):
        some = captions[start : start + TOLD]
        parts.append(unclip.sample(some, range(asked.seed + start, asked.seed + start + len(some)), 1, asked.how))
        say(f"drawn {start + len(some)} of {len(captions)}")
    return np.concatenate(parts)


@torch.inference_mode()
def _cosines(prior: Prior, unclip: UnClip, held: HeldOut, asked: EvalRun) -> dict[str, float]:
    """Mean cosines to the true picture vectors: of the prior, of the closed form and the mean of the set that is
    compared with, and of another caption's picture."""
    device = unclip.clip.device
    true = held.sets.val.vectors("image", held.rows).to(device)
    words = unclip.words(held.captions)
    images, texts = held.sets.some("image"), held.sets.some("text")
    image, text = Whitening(true.shape[1]), Whitening(true.shape[1])
    image.fit(images)
    text.fit(texts)
    weight, _ = ridge(text(texts), image(images))
    simpler = {
        "linear": image.inverse(text(words.vectors.cpu()) @ weight.T).to(device),
        "mean": image.mean.expand_as(true).to(device),
        "unrelated": true[torch.from_numpy(other_caption(held.captions)).to(device)],
    }
    return prior_cosines(prior, words, true, simpler, asked.seed, asked.how)


@dataclass(frozen=True)
class Details:
    """Of every drawn picture: its cosine to its caption, and how many choices seemed as good or better."""

    cosine: NDArray[np.float32]
    rank: NDArray[np.int64]


def judged(clip: Clip, drawn: NDArray[np.uint8], held: HeldOut, seed: int) -> tuple[dict[str, Any], Details]:
    """All figures that need a CLIP, of drawn and of true pictures, and the details of the drawn ones."""
    pool = sorted({text for text in held.sets.val.packed.captions if text.strip()})
    chosen = matching.choices(held.captions, held.swaps, pool, seed)
    texts = list(dict.fromkeys([text for row in chosen for text in row]))
    texts += sorted({text for row in held.swaps for text in row} - set(texts))
    vector = dict(zip(texts, clip.encode_texts(texts), strict=True))
    own = np.stack([vector[text] for text in held.captions])
    choices = [np.stack([vector[text] for text in row]) for row in chosen]
    vectors = {
        "drawn": clip.encode_images(list(drawn)),
        "true": clip.encode_images(held.true(clip.preprocess)),
        "training": clip.encode_images(held.training(clip.preprocess, seed)),
    }
    ranks = {name: matching.ranks(vectors[name], choices) for name in ("drawn", "true")}
    figures = {
        "clip_score": {
            **{name: matching.clip_score(vectors[name], own) for name in ("drawn", "true")},
            "unrelated": matching.clip_score(vectors["drawn"], own[other_caption(held.captions)]),
        },
        "r_precision": {
            **{name: float((rank == 0).mean()) for name, rank in ranks.items()},
            "among": float(np.mean([len(row) for row in chosen])),
        },
        "swaps_told_apart": {
            name: _swaps(vectors[name], own, held.captions, held.swaps, vector) for name in ("drawn", "true")
        },
        "clip_space_distance": {
            measure.__name__: {name: measure(vectors[name], vectors["true"]) for name in ("drawn", "training")}
            for measure in (frechet, kernel_distance, cmmd)
        },
    }
    return figures, Details(np.sum(vectors["drawn"] * own, axis=1), ranks["drawn"])


def _swaps(
    pictures: NDArray[np.float32],
    own: NDArray[np.float32],
    captions: Sequence[str],
    swaps: Sequence[Sequence[str]],
    vector: Mapping[str, NDArray[np.float32]],
) -> dict[str, dict[str, float]]:
    """Share of swapped captions that score below the true one, and how many there are: of all, and by kind."""
    pairs = [(row, text) for row, wrong in enumerate(swaps) for text in wrong]
    if not pairs:
        return {}
    rows = np.array([row for row, _ in pairs])
    wrong = np.sum(pictures[rows] * np.stack([vector[text] for _, text in pairs]), axis=1)
    below = matching.told_apart(np.sum(pictures[rows] * own[rows], axis=1), wrong)
    kinds = np.array([matching.kind_of_swap(captions[row], text) for row, text in pairs])
    parts = {"all": below} | {str(kind): below[kinds == kind] for kind in np.unique(kinds)}
    return {name: {"share": float(part.mean()), "count": len(part)} for name, part in parts.items()}


@dataclass(frozen=True)
class Neighbours:
    """Cosine of every drawn picture, and of every true one, to the nearest training picture; and which that is."""

    drawn: NDArray[np.float32]
    true: NDArray[np.float32]
    row: NDArray[np.int64]


def _neighbours(clip: Clip, drawn: NDArray[np.uint8], held: HeldOut) -> Neighbours:
    train = held.sets.train
    keys = train.embeddings.image
    cosine, row = nearest(clip.encode_images(list(drawn)), keys, train.rows)
    true, _ = nearest(held.sets.val.embeddings.image[held.rows], keys, train.rows)
    return Neighbours(cosine, true, row)


def _cards(asked: EvalRun, held: HeldOut, details: Details, near: Neighbours, drawn: NDArray[np.uint8]) -> list[Card]:
    """Every sample with its caption, the true picture and its nearest training picture."""
    train = held.sets.train.packed
    side = min(THUMBNAIL, drawn.shape[1])
    shape = replace(held.sets.clip.preprocess, height=side, width=side)
    true = held.true(shape).permute(0, 2, 3, 1).numpy()
    other = Pictures(train, shape, keep=False).take(near.row).permute(0, 2, 3, 1).numpy()
    cards = []
    for number, caption in enumerate(held.captions):
        row = int(near.row[number])
        record = {
            "caption": caption,
            "seed": asked.seed + number,
            "cosine": float(details.cosine[number]),
            "rank": int(details.rank[number]),
            "nearest": {
                "cosine": float(near.drawn[number]),
                "caption": train.captions[row],
                "tar": train.tars[train.shard[row]].name,
                "offset": int(train.offset[row]),
            },
        }
        pictures = shape(drawn[number]).permute(1, 2, 0).numpy(), true[number], other[number]
        cards.append(Card(record, *pictures))
    return cards


def _weights(clip: Clip) -> str:
    return str(clip.identity["weights_sha256"])
