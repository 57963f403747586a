"""Pictures from text, variations, blends, text diffs and inpainting, with a trained run.

A picture depends on its text, its seed and the settings, not on what is drawn beside it: to the bit where a CPU has a
number of threads that is a power of two, else to a grey level, since others share the rows of a batch unevenly.
Pictures go in and out as uint8 RGB (H, W, 3); they are made square as the CLIP does it, and come out with `UnClip.side`
pixels per side.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, cast

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from pipeline.base import MISSING, REFUSED, HeadraceError
from pipeline.clip import load as load_clip
from trainer.cascade import DEFAULT, How, Words, decoder_denoise, decoder_noise, draw, enlarge, imagine, invert, redraw
from trainer.decoder import Decoder
from trainer.prior import Prior
from trainer.sampling import Keep, keep_nothing, known, noise_for, seed_for, slerp
from trainer.saved import RUN, WEIGHTS, Name, load_model, read_run
from trainer.sizes import misfit
from trainer.upsampler import Upsampler, shrunk

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from pipeline.clip import Clip

    Picture = NDArray[np.uint8]  # RGB (H, W, 3)

BATCH = 8  # pictures that are drawn at once, never more nor fewer: a sum's rounding depends on how many there are
FAITHFUL = 1.0  # guidance under which a drawing can be inverted


def load(run: Path, clip: str | None = None, device: str = "auto") -> UnClip:
    """The models of a run; `clip` says where its CLIP is now, if not where it was.

    Raises:
        HeadraceError: no run there, no decoder in it (code 3), another CLIP, or an upsampler for another decoder (4).
    """
    said = read_run(run)
    wrapper = load_clip(clip or said["clip"], device)
    if _without_name(wrapper.identity) != _without_name(said["identity"]):
        hint = "give the one that it was trained with by --clip"
        raise HeadraceError(f"{run} was not trained with the CLIP {wrapper.name}", hint=hint, code=REFUSED)

    def part(name: Name) -> object:
        return load_model(run, name, wrapper.device)[0] if (run / name / WEIGHTS).is_file() else None

    prior, upsampler = cast("Prior | None", part("prior")), cast("Upsampler | None", part("upsampler"))
    decoder = cast(Decoder, load_model(run, "decoder", wrapper.device)[0])
    if upsampler is not None and (why := misfit(decoder.config, upsampler.config)):
        hint = "train one of them again with the other's size"
        raise HeadraceError(f"the models of {run} do not go together: {why}", hint=hint, code=REFUSED)
    return UnClip(wrapper, prior, decoder, upsampler)


def newest_run(folder: Path) -> Path:
    """The run below `folder` that was started last; where there is none, a `HeadraceError`."""
    runs = sorted(folder.glob(f"*/{RUN}"), key=lambda path: (path.stat().st_mtime_ns, path))
    if not runs:
        hint = "train one with `trainer fit`, or give --run"
        raise HeadraceError(f"there is no run in {folder}", hint=hint, code=MISSING)
    return runs[-1].parent


@dataclass(frozen=True)
class Scene:
    """A picture of which parts are known: float (1, 3, S, S) in [-1, 1], and where to paint, bool (1, 1, S, S)."""

    picture: Tensor
    paint: Tensor

    def keep(self, seeds: Sequence[int], stage: str) -> Keep:
        """Puts the known part into every step of a stage."""
        noise = noise_for([seed_for(seed, "known", stage) for seed in seeds], self.picture.shape[1:])
        return known(self.picture, ~self.paint, lambda: noise().to(self.picture.device))

    def shrunk(self, factor: int) -> Scene:
        """The same on a coarser grid; a cell is known only where all of it is."""
        return Scene(shrunk(self.picture, factor), F.max_pool2d(self.paint.float(), factor) > 0)


class UnClip:
    """The models of a run, and the CLIP that they were trained with. A model that was not trained is None."""

    def __init__(self, clip: Clip, prior: Prior | None, decoder: Decoder, upsampler: Upsampler | None) -> None:
        self.clip = clip
        self._prior = prior
        self._decoder = decoder
        self._upsampler = upsampler
        # Told how many pictures were drawn since it was called.
        self.on_drawn: Callable[[int], None] = lambda count: None

    @property
    def side(self) -> int:
        """Pixels of a side of what comes out."""
        return self._decoder.config.side * (self._upsampler.config.factor if self._upsampler else 1)

    @torch.inference_mode()
    def sample(self, texts: Sequence[str], seeds: Sequence[int], n: int = 1, how: How = DEFAULT) -> Picture:
        """One picture per text and seed (N, S, S, 3): of `n` drawn, the one that the CLIP finds most like its text.

        The first of the n is what `n = 1` gives.

        Raises:
            HeadraceError: a text is longer than the CLIP's context, or the run has no prior.
        """
        return self._best(self.words(texts), seeds, n, how, None)

    @torch.inference_mode()
    def vary(self, picture: Picture, seeds: Sequence[int], eta: float | None = None, how: How = DEFAULT) -> Picture:
        """Pictures (N, S, S, 3) that mean the same as one.

        Without `eta` they share only its vector. With it each starts from the noise that gives the picture itself:
        0 draws it again at the run's size, 1 moves furthest (Ramesh et al. 2022, section 3.1).
        """
        vectors = self.vectors([picture]).expand(len(seeds), -1)
        if eta is None:
            return self._pictures(vectors, None, seeds, how, None)
        start = self._inverted(picture, how).expand(len(seeds), -1, -1, -1)
        return self._redrawn(vectors, start, seeds, eta, how)

    @torch.inference_mode()
    def blend(self, a: Picture, b: Picture, weights: Sequence[float], seed: int, how: How = DEFAULT) -> Picture:
        """Pictures (len(weights), S, S, 3) between a (weight 0) and b (1): vector and noise go along a great circle.

        Ramesh et al. 2022, section 3.2.
        """
        weight = torch.tensor(weights, device=self._device)[:, None]
        first, second = self.vectors([a, b])
        vectors = slerp(first[None], second[None], weight)
        start = slerp(self._inverted(a, how).flatten(1), self._inverted(b, how).flatten(1), weight)
        side = self._decoder.config.side
        return self._redrawn(vectors, start.view(-1, 3, side, side), [seed] * len(weights), 0.0, how)

    @torch.inference_mode()
    def edit(
        self,
        picture: Picture,
        before: str,
        after: str,
        angles: Sequence[float],
        seed: int,
        how: How = DEFAULT,
    ) -> Picture:
        """The picture (len(angles), S, S, 3) moved from what one text says towards another: a text diff.

        An angle is the share of the way from the picture's vector to the direction of the difference; 0 draws
        it again, 0.25 to 0.5 is as far as the paper goes (Ramesh et al. 2022, section 3.3).

        Raises:
            HeadraceError: a text is longer than the CLIP's context, or both mean the same to it.
        """
        old, new = self.words([before, after]).vectors
        if torch.allclose(old, new, atol=1e-5):
            raise HeadraceError(f"to the CLIP “{before}” and “{after}” are the same", hint="say a difference")
        towards = F.normalize(new - old, dim=0)[None]
        weight = torch.tensor(angles, device=self._device)[:, None]
        vectors = slerp(self.vectors([picture]), towards, weight)
        start = self._inverted(picture, how).expand(len(angles), -1, -1, -1)
        return self._redrawn(vectors, start, [seed] * len(angles), 0.0, how)

    @torch.inference_mode()
    def inpaint(
        self,
        picture: Picture,
        paint: NDArray[np.bool_],
        text: str,
        seeds: Sequence[int],
        n: int = 1,
        how: How = DEFAULT,
    ) -> Picture:
        """The picture (N, H, W, 3) painted anew where `paint` (H, W) is true; all other pixels stay as they are.

        It is drawn as a square of the run's size, whatever H and W, and enlarged. The best of `n` by the CLIP, as in
        `sample`.
        """
        height, width = paint.shape
        square = replace(self.clip.preprocess, height=self.side, width=self.side, resize_mode="squash")
        known = (square(picture)[None].float() / 127.5 - 1).to(self._device)
        cells = F.adaptive_max_pool2d(torch.from_numpy(paint)[None, None].float(), self.side) > 0
        scene = Scene(known, cells.to(self._device))
        drawn = self._best(self.words([text] * len(seeds)), seeds, n, how, scene)
        back = replace(square, height=height, width=width)
        large = np.stack([back(one).permute(1, 2, 0).numpy() for one in drawn])
        return np.where(paint[None, ..., None], large, picture)

    def words(self, texts: Sequence[str]) -> Words:
        """Texts as conditions; one that is longer than the CLIP's context is a `HeadraceError`."""
        self.check_lengths(texts)
        distinct = {text: row for row, text in enumerate(dict.fromkeys(texts))}
        # One by one, so that a text's numbers do not depend on the others'.
        encoded = [(self.clip.encode_texts([text]), *self.clip.text_states([text])) for text in distinct]
        parts = (np.concatenate(part) for part in zip(*encoded, strict=True))
        vectors, states, true = (torch.from_numpy(part).to(self._device) for part in parts)
        return Words(vectors, states, true).take([distinct[text] for text in texts])

    def check_lengths(self, texts: Sequence[str]) -> None:
        """Raise where the CLIP would read only the beginning of a text."""
        room = self.clip.context_length
        for text in dict.fromkeys(texts):
            whole = self.clip.tokenizer([text], context_length=4 * room)[0]
            if not torch.equal(whole[:room], self.clip.tokens([text])[0]):
                start = text if len(text) < 40 else f"{text[:40]}…"
                count = int((whole != whole[-1]).sum())  # the last is padding, or an end mark where even this is full
                length = f"{count}" if count < len(whole) - 1 else f"over {count}"
                hint = f"say it in at most {room} tokens, both end marks included"
                raise HeadraceError(f"the text “{start}” has {length} tokens, the CLIP reads {room}", hint=hint)

    def vectors(self, pictures: Sequence[Picture]) -> Tensor:
        """Unit vectors (N, D) of pictures, on the device."""
        return torch.from_numpy(self.clip.encode_images(pictures)).to(self._device)

    @property
    def _device(self) -> torch.device:
        return self.clip.device

    def _best(self, words: Words, seeds: Sequence[int], n: int, how: How, scene: Scene | None) -> Picture:
        """Of n pictures per row of words, the one nearest to its text in the CLIP's space; the first where equal."""
        if self._prior is None:
            raise HeadraceError(
                "this run has no prior, so it cannot draw from text",
                hint="train one with `trainer fit --only prior`",
                code=MISSING,
            )
        many = words.take([row for row in range(len(seeds)) for _ in range(n)])
        own = [seed_for(seed, number) for seed in seeds for number in range(n)]
        vectors = torch.cat(
            [
                imagine(self._prior, many.take(rows), [own[row] for row in rows], how)[:wanted]
                for rows, wanted in _batches(len(own))
            ]
        )
        drawn = self._pictures(vectors, many, own, how, scene)
        if n == 1:
            return drawn
        return np.stack([self._nearest(drawn[row * n :][:n], words.vectors[row]) for row in range(len(seeds))])

    def _nearest(self, drawn: Picture, text: Tensor) -> Picture:
        return cast("Picture", drawn[int((self.vectors(list(drawn)) @ text).argmax())])

    def _pictures(
        self, vectors: Tensor, words: Words | None, seeds: Sequence[int], how: How, scene: Scene | None
    ) -> Picture:
        """One picture per vector, from fresh noise."""
        small_scene = scene.shrunk(self.side // self._decoder.config.side) if scene else None
        done = []
        for rows, wanted in _batches(len(seeds)):
            own = [seeds[row] for row in rows]
            denoise = decoder_denoise(self._decoder, vectors[rows], words.take(rows) if words else None, how)
            keep = small_scene.keep(own, "small") if small_scene else keep_nothing
            small = draw(denoise, decoder_noise(self._decoder, own, self._device), how, keep)
            done.append(self._enlarged(small, own, how, scene)[:wanted])
            self.on_drawn(wanted)
        return np.concatenate(done)

    def _redrawn(self, vectors: Tensor, start: Tensor, seeds: Sequence[int], eta: float, how: How) -> Picture:
        """One picture per vector, from noise that inversion found."""
        faithful = replace(how, image_guidance=FAITHFUL, text_guidance=FAITHFUL)
        done = []
        for rows, wanted in _batches(len(seeds)):
            own = [seeds[row] for row in rows]
            denoise = decoder_denoise(self._decoder, vectors[rows], None, faithful)
            small = redraw(denoise, start[rows], own, eta, faithful)
            done.append(self._enlarged(small, own, how, None)[:wanted])
            self.on_drawn(wanted)
        return np.concatenate(done)

    def _inverted(self, picture: Picture, how: How) -> Tensor:
        """The noise (1, 3, s, s) from which the decoder draws this picture, given its vector."""
        faithful = replace(how, image_guidance=FAITHFUL, text_guidance=FAITHFUL)
        denoise = decoder_denoise(self._decoder, self.vectors([picture]), None, faithful)
        return invert(denoise, self._square(picture, self._decoder.config.side), faithful)

    def _enlarged(self, small: Tensor, seeds: Sequence[int], how: How, scene: Scene | None) -> Picture:
        if self._upsampler is not None:
            keep = scene.keep(seeds, "large") if scene else keep_nothing
            small = enlarge(self._upsampler, small, seeds, how, keep)
        levels = ((small + 1) * 127.5).round().clamp(0, 255).to(torch.uint8)
        return np.ascontiguousarray(levels.permute(0, 2, 3, 1).cpu().numpy())

    def _square(self, picture: Picture, side: int) -> Tensor:
        """Float (1, 3, side, side) in [-1, 1], made square as the CLIP does it."""
        shape = replace(self.clip.preprocess, height=side, width=side)
        return (shape(picture)[None].float() / 127.5 - 1).to(self._device)


def _batches(count: int) -> Iterator[tuple[list[int], int]]:
    """Row numbers, BATCH at a time, and how many of them are wanted: the last batch is filled up with its last row."""
    for start in range(0, count, BATCH):
        rows = range(start, min(start + BATCH, count))
        yield [*rows, *[rows[-1]] * (BATCH - len(rows))], len(rows)


def _without_name(identity: Mapping[str, Any]) -> dict[str, Any]:
    """What makes two CLIPs the same, wherever they lie."""
    return {key: value for key, value in identity.items() if key != "name"}
