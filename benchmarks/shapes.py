"""Which shapes a trained run draws right: `python -m benchmarks.shapes RUN [--judge CLIP]`, of a run on the mini-web.

One picture for each held-out caption, none re-ranked. For each object a CLIP chooses among the caption and the seven in
which that object is another shape; for each caption of two shapes, between it and the one in which they are exchanged.
The true pictures show what the CLIP itself knows; the same made as small as the decoder's and enlarged again by the
upsampler, what drawing at that size may lose; and those noised to a timestep and drawn from there, of their own vectors
and captions, what the decoder loses from there on.
"""

from __future__ import annotations

import argparse
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import cast

import numpy as np
import torch
from numpy.typing import NDArray

from pipeline.clip import Clip
from pipeline.clip import load as load_clip
from pipeline.miniweb.content import SHAPES
from trainer.cascade import DEFAULT, decoder_denoise, decoder_noise, enlarge
from trainer.decoder import Decoder
from trainer.diffusion import add_noise, cosine
from trainer.evaluate import EvalRun, HeldOut, drawn_samples, held_out
from trainer.sampling import Denoise, dpm_solver, steps
from trainer.saved import load_model
from trainer.tasks import as_bytes, as_floats
from trainer.unclip import BATCH, UnClip, load
from trainer.upsampler import Upsampler, shrunk

NOISED = (304, 87)  # timesteps, of those that sampling visits, to which true pictures are noised
NAMED = re.compile(rf"\b({'|'.join(SHAPES)})\b")


@dataclass
class Told:
    """Whether a CLIP finds right: objects by their shape, those of captions that say small, and shapes in exchange."""

    objects: dict[str, list[bool]] = field(default_factory=lambda: {shape: [] for shape in SHAPES})
    small: list[bool] = field(default_factory=list)
    exchanged: list[bool] = field(default_factory=list)

    def line(self) -> str:
        every = [right for found in self.objects.values() for right in found]
        kinds = {"right": every, "small": self.small, "exchanged": self.exchanged, **self.objects}
        return "  ".join(f"{name} {np.mean(found):.3f} of {len(found)}" for name, found in kinds.items() if found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path)
    parser.add_argument("--judge", help="a CLIP that conditioned nothing; else the run's own")
    parser.add_argument("--count", type=int, default=256)
    options = parser.parse_args()
    unclip = load(options.run)
    judge = load_clip(options.judge, "cpu") if options.judge else unclip.clip
    asked = EvalRun(options.run, count=options.count)
    held = held_out(asked, unclip.clip)

    def report(kind: str, pictures: Sequence[NDArray[np.uint8]] | torch.Tensor) -> None:
        print(f"{kind}: {told(judge, judge.encode_images(pictures), held.captions).line()}", flush=True)

    report("true", held.true(judge.preprocess))
    report("true, made small and enlarged", small_and_large(options.run, held, unclip, None))
    for t in NOISED:
        report(f"the same, noised to {t} and drawn", small_and_large(options.run, held, unclip, t))
    report("drawn", list(drawn_samples(unclip, held.captions, asked, lambda line: None)))


def told(clip: Clip, vectors: NDArray[np.float32], captions: Sequence[str]) -> Told:
    """What `clip` finds right in pictures of unit vectors (N, D), each of its caption."""
    found = Told()
    for vector, caption in zip(vectors, captions, strict=True):
        named = list(NAMED.finditer(caption))
        for place in named:
            others = [caption, *(instead(caption, [(place, shape)]) for shape in SHAPES if shape != place[0])]
            like = clip.encode_texts(others) @ vector
            right = bool(like[0] > like[1:].max())
            found.objects[place[0]].append(right)
            if "small" in caption:
                found.small.append(right)
        if len(named) == 2 and named[0][0] != named[1][0]:
            one, other = named
            both = clip.encode_texts([caption, instead(caption, [(one, other[0]), (other, one[0])])]) @ vector
            found.exchanged.append(bool(both[0] > both[1]))
    return found


def instead(caption: str, changes: Sequence[tuple[re.Match[str], str]]) -> str:
    """The caption with other words in some places, given from left to right."""
    for place, word in reversed(changes):
        caption = caption[: place.start()] + word + caption[place.end() :]
    return caption


def small_and_large(run: Path, held: HeldOut, unclip: UnClip, t: int | None) -> list[NDArray[np.uint8]]:
    """The true pictures at the decoder's size, enlarged by the run's upsampler; with a `t` first noised and redrawn."""
    decoder = cast("Decoder", load_model(run, "decoder")[0])
    upsampler = cast("Upsampler", load_model(run, "upsampler")[0])
    side, factor = upsampler.config.side, upsampler.config.factor
    true = held.true(replace(unclip.clip.preprocess, height=side, width=side))
    vectors, words = held.sets.val.vectors("image", held.rows), unclip.words(held.captions)
    out: list[NDArray[np.uint8]] = []
    with torch.inference_mode():
        for start in range(0, len(true), BATCH):
            rows = slice(start, start + BATCH)
            small = shrunk(as_floats(true[rows]), factor)
            seeds = range(start, start + len(small))
            if t is not None:
                denoise = decoder_denoise(decoder, vectors[rows], words.take(rows), DEFAULT)
                small = redrawn(denoise, small, decoder_noise(decoder, seeds, small.device), t)
            out += list(as_bytes(enlarge(upsampler, small, seeds, DEFAULT)))
    return out


def redrawn(denoise: Denoise, small: torch.Tensor, noise: torch.Tensor, t: int) -> torch.Tensor:
    """Small pictures (B, 3, side, side) noised to one of the timesteps that sampling visits, and drawn from there."""
    schedule = cosine()
    below = [step for step in steps(len(schedule), DEFAULT.steps) if step <= t]
    noised = add_noise(schedule, small, torch.full((len(small),), below[0]), noise)
    return dpm_solver(denoise, noised, schedule, below).clamp(-1, 1)


if __name__ == "__main__":
    main()
