"""Trains a compact CLIP from packed sets: open_clip's architecture and loss, one plain loop, exact resume.

A step is a pure function of (state, seed, step): its rows, its augmentation and its captions are drawn from that pair,
so a run that was stopped ends as one that was not. The result is a directory that open_clip and `curate score --clip`
load. This module knows nothing of how the sets were made.
"""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

from pipeline.base import HeadraceError
from trainer import augment, checkpoint
from trainer.clip_build import build
from trainer.clip_files import write_card, write_model
from trainer.clip_run import LOGS, STATE, Run, check_lexicon, check_out, check_same, run_digest
from trainer.contrast import centre_loss, encode_texts, threshold_loss
from trainer.evaluate_clip import held_out_figures
from trainer.log import Log
from trainer.loop import interruptible
from trainer.optim import MuonAdamW, share_of_rate, split_parameters
from trainer.sources import Drawn, Source, decoded, draw, open_sources
from trainer.speed import quick

if TYPE_CHECKING:
    from torch import Tensor

    from pipeline.clip import Clip
    from trainer.lexicon import Lexicon
    from trainer.teacher import Lesson, Lessons

TEXT_SHARE = 0.5  # weight of the words read off text vectors, beside those of picture vectors


def fit(run: Run, say: Callable[[str], None]) -> bool:
    """Train, evaluate and write a CLIP to `run.out`; True when all of it is done, False when the time was up before.

    Raises:
        HeadraceError: sets that cannot be trained on, an `out` of another run, a state of another config, a lexicon
            that cannot be read or has nothing to do.
        KeyboardInterrupt: asked to end; the state is saved.
    """
    import torch

    from pipeline.clip import load
    from trainer.lexicon import read_lexicon
    from trainer.teacher import read_lessons

    check_out(run)
    check_lexicon(run)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    opened = open_sources(run.shards, run.config.training, run.seed)
    first = None if run.start_from is None else load(run.start_from, device="cpu")
    lexicon = None if run.lexicon is None else read_lexicon(run.lexicon)
    signature = run_digest(run, first)
    if run.resume:
        check_same(run, signature)
    teacher = run.config.training.teacher
    lessons = read_lessons(run.shards, teacher) if teacher else None
    clip = build(run.config, run.seed, None if run.resume else first, run.out, device)
    trainer = Trainer(run, signature, clip, [decoded(one, clip, say) for one in opened], lessons)
    if run.resume:
        trainer.restore()
        say(f"resumed at step {trainer.step}")
    with interruptible() as asked:
        log = Log(run.out / LOGS, trainer.step)
        started = time.monotonic()

        def stopping() -> bool:
            return asked.is_set() or (run.minutes is not None and time.monotonic() - started >= 60 * run.minutes)

        _train(run, trainer, log, stopping, say)
        _teach_words(run, trainer, lexicon, log, stopping, say)
        log.close()
    if asked.is_set():
        raise KeyboardInterrupt
    return trainer.step >= run.config.training.all_steps


def _train(run: Run, trainer: Trainer, log: Log, stopping: Callable[[], bool], say: Callable[[str], None]) -> None:
    """Train until all pairs were learned or it is to stop; figures and a checkpoint now and then, and at the end."""
    started = time.monotonic()
    steps, every, first = run.config.training.steps, run.config.training.evaluate_every, trainer.step
    batch = sum(source.batches.size for source in trainer.sources)
    while trainer.step < steps:
        began = time.monotonic()
        numbers = trainer.train_step()
        numbers["samples_per_s"] = round(batch / (time.monotonic() - began), 1)
        spent = (time.monotonic() - started) / 60
        last = trainer.step == steps or stopping()
        if trainer.step % 10 == 0 or last:
            log.write(trainer.step, numbers)
            left = (steps - trainer.step) * spent / (trainer.step - first)
            figures_now = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
            say(f"step {trainer.step}/{steps}, {left:.0f} min left: {figures_now}")
        if trainer.step % every == 0 or last:
            trainer.conclude(log, say)
        if last:
            break


def _teach_words(
    run: Run,
    trainer: Trainer,
    lexicon: Lexicon | None,
    log: Log,
    stopping: Callable[[], bool],
    say: Callable[[str], None],
) -> None:
    """Once all pairs were learned, teach the text tower words, and balance; stopped before, it begins anew then."""
    from trainer.balance import balance
    from trainer.teach_words import teach

    settings, last = run.config.training, run.config.training.readout_steps
    if trainer.step != settings.steps or not last or stopping():
        return
    say("reading words off the pictures' vectors")
    trainer.take_average()
    started = time.monotonic()
    losses = teach(trainer.clip, trainer.sources, settings, lexicon, run.seed, stopping)
    for done, loss in enumerate(losses, start=1):
        if done % 10 == 0 or done == last:
            log.write(settings.steps + done, {"readout": round(loss, 5)})
            left = (last - done) * (time.monotonic() - started) / 60 / done
            say(f"readout step {done}/{last}, {left:.0f} min left: loss {loss:.4g}")
        if done == last:
            say("balancing pictures' and texts' vectors")
            named = [source for source, role in zip(trainer.sources, settings.readout, strict=True) if role != "none"]
            if not balance(trainer.clip, named, run.seed):
                say("left as they are: a tower ends in no linear map, or is not open_clip's own")
            trainer.finish()
            trainer.conclude(log, say)
            return
    say("stopped while reading words: that begins anew with --resume")


class Trainer:
    """The state of a run and its one step."""

    def __init__(
        self, run: Run, signature: str, clip: Clip, sources: Sequence[Source], lessons: Lessons | None
    ) -> None:
        from torch import nn

        from trainer.teacher import TeacherHead
        from trainer.word_loss import WordHead

        self.run, self.signature, self.clip, self.sources, self.lessons = run, signature, clip, sources, lessons
        self.device = device = clip.device
        self.settings = run.config.training
        self.model: Any = clip.model
        self.step = 0
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.words = WordHead(clip.dimension).to(device)
        self.trained = nn.ModuleDict({"model": self.model, "words": self.words})
        if lessons is not None:
            self.teacher = TeacherHead(clip.dimension, lessons.dimension).to(device)
            self.trained["teacher"] = self.teacher
        s = self.settings
        groups = split_parameters(dict(self.trained.named_parameters()), s.learning_rate, s.matrix_rate, s.weight_decay)
        self.optimizer = MuonAdamW(groups, s.beta1, s.beta2)

    def train_step(self) -> dict[str, float]:
        """One optimizer step; returns its loss figures."""
        import numpy as np
        import torch

        generator = torch.Generator().manual_seed(self.run.seed * 1_000_003 + self.step)
        torch.manual_seed(self.run.seed * 1_000_003 + self.step)
        rng = np.random.default_rng((self.run.seed, 1, self.step))
        how = self.settings.augmentation
        drawn = draw(self.sources, self.step, how.drop_parts, rng)
        size = (self.clip.preprocess.height, self.clip.preprocess.width)
        small = augment.vary_pictures(drawn.pictures, size, how, generator, drawn.sided)
        rows = [source.batches.rows(self.step) for source in self.sources]
        lesson = None if self.lessons is None else self.lessons.take(rows)
        self.model.train()
        if lesson is not None and len(lesson.vectors) > 1 and self.step < self.settings.teacher_steps:
            parts = {"teacher": self._teacher_loss(self._encode(small[lesson.there]), lesson)}
        else:
            parts = self._pairs(drawn, small, lesson)
        weights = self._weights()
        loss = torch.stack([weights[name] * part for name, part in parts.items()]).sum()
        scale = self.model.logit_scale.detach().exp()
        s = self.settings
        rate = share_of_rate(self.step, s.warmup, s.steps, hold=s.teacher_steps)
        norm = self._descend(loss, rate)
        self.step += 1
        self._update_average()
        numbers = {"loss": loss, **parts, "scale": scale, "norm": norm}
        return {name: round(float(value.detach()), 5) for name, value in numbers.items()} | {"rate": rate}

    def _pairs(self, drawn: Drawn, small: Tensor, lesson: Lesson | None) -> dict[str, Tensor]:
        """All parts of the loss, of one step's pairs and their pictures, uint8 (N, 3, H, W)."""
        import torch

        images = self._encode(small)
        tokens = self.clip.tokens([*drawn.captions, *drawn.wrong]).to(self.device)
        with quick(self.device):
            texts = encode_texts(self.model, tokens)
        true, false = texts.float().tensor_split([len(images)])
        right, wrong = tokens.tensor_split([len(images)])
        parts = self._losses(images, true, right)
        if lesson is not None:
            parts["teacher"] = self._teacher_loss(images[lesson.there.to(self.device)], lesson)
        if drawn.owners:
            own = torch.tensor(drawn.owners, device=self.device)
            texts_of_swaps, tokens_of_swaps = (true.index_select(0, own), false), (right[own], wrong)
            parts |= self._swap_losses(images.index_select(0, own), texts_of_swaps, tokens_of_swaps)
        return parts

    def _encode(self, small: Tensor) -> Tensor:
        """Unit vectors float32 (N, D) of uint8 pictures (N, 3, H, W)."""
        with quick(self.device):
            images = self.model.encode_image(self._input(small), normalize=True)
        out: Tensor = images.float()
        return out

    def _descend(self, loss: Tensor, rate: float) -> Tensor:
        """One step of the optimizer at this share of its rates; returns the gradient's norm."""
        import torch

        for group in self.optimizer.param_groups:
            group["lr"] = rate * group["peak"]
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        norm: Tensor = torch.nn.utils.clip_grad_norm_(self.trained.parameters(), self.settings.clip_norm)
        if not torch.isfinite(norm):
            raise HeadraceError(
                f"the gradient is not finite at step {self.step}", hint="lower `training.learning_rate`"
            )
        self.optimizer.step()
        with torch.no_grad():
            self.model.logit_scale.clamp_(0, math.log(self.settings.max_scale))
        return norm

    def _weights(self) -> dict[str, float]:
        """What every part of the loss counts."""
        s = self.settings
        weights = {"contrast": 1.0, "swap": s.swap_weight, "anchor": s.anchor_weight, "centre": s.centre_weight}
        weights["teacher"] = s.teacher_weight
        for name, weight in (("words", s.words_weight), ("swapped_words", s.swapped_words_weight)):
            weights |= {f"{name}_of_image": weight, f"{name}_of_text": TEXT_SHARE * weight}
        return weights

    def _losses(self, images: Tensor, texts: Tensor, tokens: Tensor) -> dict[str, Tensor]:
        """The parts of the loss that pictures and their captions make: images and texts (N, D), tokens (N, L)."""
        import torch
        from open_clip.loss import ClipLoss

        from trainer.word_loss import word_loss

        scale, zero = self.model.logit_scale.exp(), torch.zeros((), device=self.device)
        sizes = [source.batches.size for source in self.sources]
        blocks = list(zip(torch.split(images, sizes), torch.split(texts, sizes), strict=True))
        of_image, of_text = word_loss(self.words, (images, texts), tokens)
        return {
            "contrast": ClipLoss()(images, texts, scale),
            "anchor": sum((threshold_loss(i, t, scale) for i, t in blocks), zero),
            "centre": sum((centre_loss(i, t) for i, t in blocks), zero),
            "words_of_image": of_image,
            "words_of_text": of_text,
        }

    def _teacher_loss(self, images: Tensor, lesson: Lesson) -> Tensor:
        """What images (K, D), those that have a lesson, are to show of the teacher's vectors."""
        from trainer.teacher import teacher_loss

        return teacher_loss(self.teacher, images, lesson.vectors.to(self.device))

    def _swap_losses(
        self, images: Tensor, texts: tuple[Tensor, Tensor], tokens: tuple[Tensor, Tensor]
    ) -> dict[str, Tensor]:
        """Those that captions and their swaps make, M of each: images, texts of both (M, D), tokens of both (M, L)."""
        from torch.nn import functional as F

        from trainer.word_loss import swapped_words_losses

        gap = ((texts[0] - texts[1]) * images).sum(dim=1)
        of_image, of_text = swapped_words_losses(self.words, images, texts, tokens)
        return {
            "swap": F.softplus(-self.model.logit_scale.exp() * gap).mean(),
            "swapped_words_of_image": of_image,
            "swapped_words_of_text": of_text,
        }

    def _input(self, small: Tensor) -> Tensor:
        import torch

        return self.clip.normalized(small.to(self.device)).contiguous(memory_format=torch.channels_last)

    def _update_average(self) -> None:
        import torch

        decay = min(self.settings.ema, (1 + self.step) / (10 + self.step))
        with torch.no_grad():
            for name, value in self.model.state_dict().items():
                if value.is_floating_point():
                    self.average[name].lerp_(value, 1 - decay)
                else:
                    self.average[name].copy_(value)

    def take_average(self) -> None:
        """Go on from the averaged weights."""
        self.model.load_state_dict(self.average)

    def finish(self) -> None:
        """What the model is now, after what comes behind the steps of pairs, is the result."""
        self.average = {name: value.detach().clone() for name, value in self.model.state_dict().items()}
        self.step = self.settings.all_steps

    def conclude(self, log: Log, say: Callable[[str], None]) -> None:
        """Tell the held-out figures, and save."""
        figures = self.evaluate()
        log.write(self.step, {f"{name}/{key}": v for name, part in figures.items() for key, v in part.items()})
        say(f"step {self.step} held out: {json.dumps(figures)}")
        self.save(figures)

    def evaluate(self) -> dict[str, dict[str, float]]:
        """Held-out figures of the averaged weights, by set."""
        raw = {name: value.clone() for name, value in self.model.state_dict().items()}
        self.model.load_state_dict(self.average)
        self.model.eval()
        figures = {s.name: held_out_figures(self.clip, s.val, s.val_pictures) for s in self.sources}
        self.model.load_state_dict(raw)
        return {name: {key: round(value, 4) for key, value in part.items()} for name, part in figures.items()}

    def save(self, figures: Mapping[str, Any]) -> None:
        """Write the averaged weights as a directory that open_clip loads, with its card; the state last."""
        tensors = dict(self.trained.state_dict())
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= checkpoint.optimizer_tensors(self.trained, self.optimizer)
        write_model(self.run.out, self.run.config, self.average)
        sets = {source.name: source.facts for source in self.sources}
        write_card(self.run.out, self.run.config, sets, self.run.command, self.step, figures)
        checkpoint.save(self.run.out / STATE, tensors, {"step": self.step, "run": self.signature})

    def restore(self) -> None:
        """Continue from the state in `run.out`."""
        tensors, scalars = checkpoint.load(self.run.out / STATE)
        for name, part in self.trained.items():
            part.load_state_dict(checkpoint.section(tensors, name))
        saved = checkpoint.section(tensors, "average")
        self.average = {name: checkpoint.like(value, saved[name]) for name, value in self.average.items()}
        checkpoint.restore_optimizer(self.trained, self.optimizer, tensors)
        self.step = int(scalars["step"])
