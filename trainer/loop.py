"""One training loop for every model: mixed precision, accumulation, clipping, averages, exact resume, many processes.

A step is a pure function of (state, seed, step). A step's noise is drawn for the whole batch and then shared out, so
without dropout neither the size of the parts nor the number of processes changes what is learned. This module knows
nothing of pictures or text: a `Task` brings model, data and loss.
"""

from __future__ import annotations

import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from pipeline.base import REFUSED, HeadraceError
from trainer import checkpoint
from trainer.average import average_decay, put, update_average
from trainer.embedded import Draws
from trainer.log import Log
from trainer.optim import MuonAdamW, share_of_rate, split_parameters
from trainer.processes import any_process
from trainer.sampling import seed_for
from trainer.speed import matrix_speed, operations
from trainer.task import Place, Plan, Task, Tensors, Training, cut
from trainer.workers import read_ahead

if TYPE_CHECKING:
    from numpy.typing import NDArray

STATE = "state.safetensors"
AHEAD = 2  # batches that are read while a GPU learns from another
SAVE_EVERY = 600.0  # seconds: what a crash may cost
LEVELS = 4  # noise levels that losses are told apart by
HELD_LEVELS = (50, 300, 550, 800, 950)  # timesteps of the held-out losses


class Loop:
    """The state of a run and its one step."""

    def __init__(self, task: Task, plan: Plan, place: Place, say: Callable[[str], None]) -> None:
        s = plan.training
        check_batch(task.name, s, place)
        self.task, self.plan, self.place, self.say = task, plan, place, say
        self.model = task.model.to(place.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.step = 0
        self.average = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        groups = split_parameters(dict(self.model.named_parameters()), s.learning_rate, s.matrix_rate, s.weight_decay)
        if s.optimizer == "adamw":
            groups[0] |= {"muon": False, "peak": s.learning_rate}
        self.optimizer = MuonAdamW([group for group in groups if group["params"]], s.beta1, s.beta2)
        self.own = s.batch // place.world
        self.draws = Draws(task.weights, seed_for(plan.seed, task.name) % 2**32, s.batch)
        self.ahead = 0 if place.device.type == "cpu" else AHEAD
        self.spent = 0.0  # seconds of training, over all calls
        self.saved = time.monotonic()

    def run(self) -> bool:
        """Train to the end or the deadline; True when the last step is done.

        Raises:
            HeadraceError: a state of another config, a loss that is not finite, a full disk.
            KeyboardInterrupt: after the step in hand and a checkpoint.
        """
        if self.plan.resume and (self.plan.folder / STATE).is_file():
            self.restore()
        steps = self.plan.training.steps
        with self._prepared(), interruptible() as asked, self._log() as log:
            batches, stop = self._batches(), False
            while self.step < steps and not stop:
                began = time.perf_counter()
                try:
                    batch = next(batches)
                except HeadraceError:  # a damaged tar: what was learned so far is kept
                    self.save()
                    raise
                waited = time.perf_counter() - began
                numbers = self.train_step(batch)
                self._tell(log, numbers, time.perf_counter() - began, waited)
                stop = self._stopping(asked.is_set())
                if self.step % self.plan.training.evaluate_every == 0 or self.step == steps:
                    self.evaluate(log)
                    self.save()
                elif stop or time.monotonic() - self.saved > SAVE_EVERY:
                    self.save()
        if asked.is_set():
            raise KeyboardInterrupt
        return self.step >= steps

    def train_step(self, batch: Tensors) -> dict[str, Tensor]:
        """One step on this process's share of the batch; returns loss and gradient norm, and losses by noise level."""
        s, place = self.plan.training, self.place
        draw = self._draw(self.step)
        for group in self.optimizer.param_groups:
            group["lr"] = self.rate() * group["peak"]
        self.model.train()
        self.optimizer.zero_grad(set_to_none=True)
        parts = [slice(start, start + s.part) for start in range(0, self.own, s.part)]
        losses = []
        for number, part in enumerate(parts):
            torch.manual_seed(seed_for(self.plan.seed, self.task.name, self.step, place.rank, number))  # for dropout
            last = number == len(parts) - 1
            with nullcontext() if last or place.world == 1 else self.predict.no_sync():
                losses.append(self._losses(self.predict, cut(batch, part), cut(draw, part)))
                (losses[-1].sum() / self.own).backward()  # type: ignore[no-untyped-call]
        norm = torch.nn.utils.clip_grad_norm_(self.model.parameters(), s.clip_norm)
        if not torch.isfinite(norm):
            hint = f"lower {self.task.name}.training.learning_rate and matrix_rate, and begin again in another --out"
            raise HeadraceError(f"the gradient of the {self.task.name} is not finite at step {self.step}", hint=hint)
        self.optimizer.step()
        self.step += 1
        update_average(self.average, self.model, average_decay(s.ema, self.step))
        return {"norm": norm, **by_level(torch.cat(losses).detach(), draw["t"])}

    def rate(self) -> float:
        """Share of the peak rates."""
        s = self.plan.training
        return share_of_rate(self.step, s.warmup, s.steps, s.decay)

    def evaluate(self, log: Log | None) -> None:
        """Held-out losses by noise level of raw and averaged weights, figures and samples of the averaged ones."""
        if not self.place.leads or log is None:
            return
        numbers = {f"held_out/raw_{name}": value for name, value in self._held_out().items()}
        with self._averaged():
            numbers |= {f"held_out/{name}": value for name, value in self._held_out().items()}
            numbers |= self.task.figures()
            self.task.show(self.plan.folder / "samples" / f"{self.step:07d}.png")
        log.write(self.step, numbers)
        text = " ".join(f"{name} {value:.4g}" for name, value in numbers.items())
        self.say(f"{self.task.name} {self.step}: {text}")

    def save(self) -> None:
        """Write the averaged weights as a model, then the state."""
        if not self.place.leads:
            return
        tensors = {f"model.{name}": value for name, value in self.model.state_dict().items()}
        tensors |= {f"average.{name}": value for name, value in self.average.items()}
        tensors |= checkpoint.optimizer_tensors(self.model, self.optimizer)
        scalars = {"step": self.step, "run": self.plan.digest, "seconds": self.spent}
        s = self.plan.training
        facts = {"step": self.step, "of": s.steps, "samples": self.step * s.batch, "seed": self.plan.seed}
        with self._averaged():
            self.task.save(self.model.state_dict(), facts)
        checkpoint.save(self.plan.folder / STATE, tensors, scalars)  # last: it says that the model is there
        self.saved = time.monotonic()

    def restore(self) -> None:
        """Continue from the state in the folder; one of another config, seed or set is refused."""
        scalars = _scalars(self.plan)
        tensors, _ = checkpoint.load(self.plan.folder / STATE)
        try:
            self.model.load_state_dict(checkpoint.section(tensors, "model"))
        except RuntimeError:
            hint = f"train the {self.task.name} again, in another --out"
            path = self.plan.folder / STATE
            raise HeadraceError(f"{path} is of another version of the {self.task.name}", hint, REFUSED) from None
        saved = checkpoint.section(tensors, "average")
        self.average = {name: checkpoint.like(value, saved[name]) for name, value in self.average.items()}
        checkpoint.restore_optimizer(self.model, self.optimizer, tensors)
        self.step, self.spent = int(scalars["step"]), float(scalars["seconds"])
        self.say(f"{self.task.name}: resumed at step {self.step}")

    @contextmanager
    def _prepared(self) -> Iterator[None]:
        """The callable that is trained, and what a sample costs."""
        place, batch = self.place, self.task.read(self._rows(self.step)[:1])
        batch, draw = cut(batch, slice(0, 1)), cut(self._draw(self.step), slice(0, 1))

        def once() -> None:
            self._losses(self.model, batch, draw).sum().backward()  # type: ignore[no-untyped-call]

        self.cost = operations(once)
        self.speed = matrix_speed(place.device, place.half)
        self.predict: Any = self.model
        if place.world > 1:
            devices = [place.device.index] if place.device.type == "cuda" else None
            self.predict = nn.parallel.DistributedDataParallel(self.model, device_ids=devices)
        if self.plan.training.compile:
            self.predict = torch.compile(self.predict)
        count = sum(p.numel() for p in self.model.parameters()) / 1e6
        self.say(f"{self.task.name}: {count:.2f}M parameters, {self.cost / 1e9:.3g} GFLOP per sample")
        try:
            yield
        finally:
            self.predict = self.model  # the other holds the processes' group, also while an error is on its way

    def _batches(self) -> Iterator[Tensors]:
        """The batches of the steps to come, read ahead where a GPU learns.

        On a CPU they are read in turn: the threads of torch that two threads of Python start get in each other's way,
        and a step takes half as long again.
        """

        def read(step: int) -> Tensors:
            batch = self.task.read(self._rows(step))
            pin = self.place.device.type == "cuda"  # copied then while the GPU works
            return {name: value.pin_memory() for name, value in batch.items()} if pin else batch

        steps = range(self.step, self.plan.training.steps)
        return read_ahead(read, steps, self.ahead) if self.ahead else map(read, steps)

    def _rows(self, step: int) -> NDArray[Any]:
        return self.draws.rows(step)[self.place.rank * self.own :][: self.own]

    def _draw(self, step: int) -> Tensors:
        """The step's randomness, drawn for the whole batch, this process's share of it."""
        device = self.place.device
        generator = torch.Generator(device).manual_seed(seed_for(self.plan.seed, self.task.name, step))
        whole = self.task.draw(self.plan.training.batch, generator)
        return cut(whole, slice(self.place.rank * self.own, (self.place.rank + 1) * self.own))

    def _losses(self, predict: Callable[..., Tensor], batch: Tensors, draw: Tensors) -> Tensor:
        place = self.place
        there = {name: value.to(place.device, non_blocking=True) for name, value in batch.items()}
        with torch.autocast(place.device.type, torch.bfloat16, enabled=place.half):
            return self.task.losses(predict, there, draw)

    @torch.no_grad()
    def _held_out(self) -> dict[str, float]:
        """Mean loss of the held-out rows at fixed timesteps, always with the same noise and every condition."""
        batch = self.task.held_out()
        count = len(next(iter(batch.values())))
        self.model.eval()
        found = {}
        for level in HELD_LEVELS:
            generator = torch.Generator(self.place.device).manual_seed(level)
            draw = self.task.draw(count, generator)
            draw |= {name: torch.ones_like(value) for name, value in draw.items() if name.startswith("keep_")}
            draw["t"] = torch.full_like(draw["t"], level)
            size = self.plan.training.part
            parts = [slice(start, start + size) for start in range(0, count, size)]
            losses = [self._losses(self.model, cut(batch, part), cut(draw, part)) for part in parts]
            found[f"loss_t{level}"] = float(torch.cat(losses).mean())
        return found

    @contextmanager
    def _averaged(self) -> Iterator[None]:
        """The averaged weights in the place of the raw ones, in evaluation mode."""
        raw = {name: p.detach().clone() for name, p in self.model.named_parameters()}
        put(self.model, self.average)
        self.model.eval()
        try:
            yield
        finally:
            put(self.model, raw)

    def _tell(self, log: Log | None, numbers: Mapping[str, Tensor], seconds: float, waited: float) -> None:
        """Every tenth step and the last: losses, speed, the share of its `seconds` in which a batch was waited for."""
        self.spent += seconds
        s = self.plan.training
        if log is None or (self.step % 10 and self.step != s.steps):
            return
        rate = s.batch / seconds
        figures = {name: round(float(value), 5) for name, value in numbers.items()}
        figures |= {"samples_per_s": round(rate, 1), "mfu": round(rate * self.cost / self.speed / self.place.world, 4)}
        figures |= {"waiting": round(waited / seconds, 4)}
        log.write(self.step, figures)
        left = (s.steps - self.step) * self.spent / self.step / 60
        text = " ".join(f"{name} {value:.4g}" for name, value in figures.items())
        self.say(f"{self.task.name} {self.step}/{s.steps}, {left:.0f} min left: {text}")

    @contextmanager
    def _log(self) -> Iterator[Log | None]:
        if not self.place.leads:
            yield None
            return
        log = Log(self.plan.folder, self.step)
        try:
            yield log
        finally:
            log.close()

    def _stopping(self, asked: bool) -> bool:
        """Whether any process was asked to stop, or the time is up."""
        return any_process(self.place, asked or is_late(self.plan.deadline))


def check_batch(name: str, training: Training, place: Place) -> None:
    """Raise where a batch cannot be shared among the processes, or a process's share among its parts."""
    batch, part = training.batch, training.part
    if batch % (place.world * min(part, batch // place.world or 1)):
        hint = f"make {name}.training.batch a multiple of processes × part"
        raise HeadraceError(f"a batch of {batch} cannot be shared among {place.world} × {part}", hint=hint)


def is_late(deadline: float | None) -> bool:
    """Whether a deadline, of `time.monotonic()`, is over."""
    return deadline is not None and time.monotonic() >= deadline


def is_done(plan: Plan) -> bool:
    """Whether a run to be resumed has taken all its steps; a state of another run is a `HeadraceError`."""
    there = plan.resume and (plan.folder / STATE).is_file()
    return there and bool(_scalars(plan)["step"] >= plan.training.steps)


def _scalars(plan: Plan) -> dict[str, Any]:
    """The scalars of the plan's state; of one of another config, seed, set or CLIP a `HeadraceError`."""
    path = plan.folder / STATE
    scalars = checkpoint.scalars(path)
    if scalars["run"] != plan.digest:
        hint = "give the same config, --seed and --shards, or another --out"
        raise HeadraceError(f"{path} is of another config, seed, set or CLIP", hint=hint, code=REFUSED)
    return scalars


def by_level(losses: Tensor, t: Tensor, timesteps: int = 1000) -> Tensors:
    """The mean loss, and the means by quarters of the noise schedule that occur."""
    level = t * LEVELS // timesteps
    means = {f"loss_q{n}": losses[level == n].mean() for n in range(LEVELS) if bool((level == n).any())}
    return {"loss": losses.mean(), **means}


@contextmanager
def interruptible() -> Iterator[threading.Event]:
    """An event that Ctrl-C or a request to end sets, instead of breaking off mid-step; a second one breaks off."""
    asked = threading.Event()
    if threading.current_thread() is not threading.main_thread():
        yield asked
        return

    def ask(number: int, frame: object) -> None:
        if asked.is_set():
            raise KeyboardInterrupt
        asked.set()

    before = {number: signal.signal(number, ask) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield asked
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
