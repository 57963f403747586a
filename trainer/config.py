"""What a training run's config holds. It knows the names and their defaults, not what they do."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, Self

from pydantic import Field, model_validator

from pipeline.base import MISSING, Config, HeadraceError, parse_config, read_toml

if TYPE_CHECKING:
    from trainer.fit import RunConfig

SHIPPED = Path(__file__).parent / "configs"  # mini.toml for a CPU, base.toml for a GPU
CLIP_DEFAULT = SHIPPED / "clip.json"  # clip-mini.json made the embedded CLIP


class Augmentation(Config):
    """How training pictures vary; captions stay true, so what may tell left from right is not mirrored."""

    crop: float = Field(default=0.8, gt=0.3, le=1.0)  # smallest share of a side that a crop keeps
    stretch: float = Field(default=0.1, ge=0, le=0.5)  # largest relative change of the aspect ratio
    brightness: float = Field(default=0.12, ge=0, le=0.5)  # largest relative change
    saturation: float = Field(default=0.25, ge=0, le=1)  # largest relative change
    tint: float = Field(default=0.03, ge=0, le=0.5)  # largest shift of a colour channel, as a share of the range
    coarse: float = Field(default=0.3, ge=0, le=1)  # share of pictures shown at a lower resolution
    noise: float = Field(default=0.02, ge=0, le=0.2)  # largest standard deviation of grey noise
    mirror: float = Field(default=0.0, ge=0, le=1)  # share of pictures mirrored, of those whose caption names no side
    frame: float = Field(default=0.15, ge=0, le=1)  # share of pictures with a plain frame, every second one white
    drop_parts: float = Field(default=0.5, ge=0, le=1)  # share of keyword captions that lose some keywords


class ClipTraining(Config):
    """How a CLIP is trained. Rates are per step; `batch` is shared among the sets by `shares`."""

    batch: int = Field(default=384, ge=2)
    shares: tuple[Annotated[float, Field(gt=0)], ...] = ()  # of the batch, one number per --shards; equal where empty
    steps: int = Field(default=4000, ge=1)  # the length of the cosine; --max-minutes may end a run before it
    learning_rate: float = Field(default=1.5e-3, gt=0)  # of embeddings, vectors and scalars, by AdamW
    matrix_rate: float = Field(default=5e-3, gt=0)  # of matrices and kernels, by Muon
    warmup: int = Field(default=200, ge=0)
    weight_decay: float = Field(default=0.2, ge=0)
    beta1: float = Field(default=0.95, ge=0, lt=1)
    beta2: float = Field(default=0.98, gt=0, lt=1)
    clip_norm: float = Field(default=1.0, gt=0)
    swap_weight: float = Field(default=0.5, ge=0)  # of the loss that tells a caption from its swap by cosine
    anchor_weight: float = Field(default=0.3, ge=0)  # of the sigmoid loss that puts the boundary at 0.28
    centre_weight: float = Field(default=1.0, ge=0)  # of the mean cosine of unrelated pairs, squared
    words_weight: float = Field(default=1.0, ge=0)  # of the loss that reads a caption's words off both vectors
    swapped_words_weight: float = Field(default=1.0, ge=0)  # of the loss that tells it by words and pairs
    teacher: str = ""  # column of the sets with another network's vectors of the pictures, to be read off this one's
    teacher_weight: float = Field(default=10.0, ge=0)
    teacher_steps: int = Field(default=0, ge=0)  # the first ones, in which it alone teaches, at the peak rates
    readout_steps: int = Field(default=0, ge=0)  # after `steps`: the text tower learns what words read off vectors say,
    # and both towers are balanced, which gives cosines another scale
    readout: tuple[Literal["add", "keep", "none"], ...] = ()  # of each set: its words are added to what its captions
    # say, or its captions and wrong ones go on to say the same, or it has no part in this
    max_scale: float = Field(default=30.0, gt=1)  # cap of the logit scale: it fixes what a cosine means
    ema: float = Field(default=0.998, ge=0, lt=1)
    evaluate_every: int = Field(default=250, ge=1)
    augmentation: Augmentation = Augmentation()

    @model_validator(mode="after")
    def _texts_are_learned(self) -> Self:
        if self.teacher_steps and not self.teacher:
            raise ValueError("`teacher_steps` need a `teacher`")
        if self.teacher_steps >= self.steps:
            raise ValueError(f"`teacher_steps` must be below `steps`, {self.steps}: no text is learned in them")
        if self.readout_steps and "add" not in self.readout:
            raise ValueError("`readout_steps` need a `readout` that names a set to `add`")
        if self.readout and not self.readout_steps:
            raise ValueError("`readout` needs `readout_steps`")
        return self

    @property
    def all_steps(self) -> int:
        """Those of the whole run."""
        return self.steps + self.readout_steps


class ClipPreprocess(Config):
    """open_clip's `preprocess_cfg`: how a picture becomes the image tower's input."""

    mean: tuple[float, float, float]  # of red, green and blue in [0, 1]
    std: tuple[float, float, float]
    interpolation: Literal["bicubic", "bilinear"] = "bicubic"
    resize_mode: Literal["shortest", "longest", "squash"] = "shortest"
    fill_color: int = Field(default=0, ge=0, le=255)  # grey level around a picture, with `longest`


class ClipConfig(Config):
    """A small JSON file: open_clip's `model_cfg` as it is, its `preprocess_cfg`, and how to train."""

    model_cfg: dict[str, Any]
    preprocess_cfg: ClipPreprocess
    training: ClipTraining = ClipTraining()


def read_clip_config(path: Path) -> ClipConfig:
    """Read a CLIP's JSON config; one that is missing, damaged or has unknown keys is a `HeadraceError`."""
    if not path.is_file():
        raise HeadraceError(f"there is no config {path}", hint="check --config", code=MISSING)
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise HeadraceError(f"{path} is not valid JSON: {error}", hint="correct that line") from None
    return parse_config(ClipConfig, values, str(path))


def read_run_config(name: str, changes: Sequence[str] = ()) -> RunConfig:
    """A run's config: `mini`, `base` or a path to a TOML file, with `section.key=value` changes.

    Raises:
        HeadraceError: no such file, a change that is no assignment, an unknown key or a wrong value.
    """
    from trainer.fit import RunConfig

    shipped = SHIPPED / f"{name}.toml"
    path = shipped if shipped.is_file() else Path(name)
    if not path.is_file():
        known = ", ".join(sorted(file.stem for file in SHIPPED.glob("*.toml")))
        raise HeadraceError(f"there is no config {name}", hint=f"give {known} or a .toml file", code=MISSING)
    values = read_toml(path)
    for change in changes:
        _assign(values, change)
    return parse_config(RunConfig, values, f"{path.name} with --set" if changes else str(path))


def _assign(values: dict[str, Any], change: str) -> None:
    """Put `section.key=value` into nested dicts; a value that is no TOML is a string."""
    key, equals, text = change.partition("=")
    *sections, last = key.strip().split(".")
    if not equals or not last:
        raise HeadraceError(f"--set {change!r} is no assignment", hint="write it as decoder.training.steps=1000")
    try:
        value = tomllib.loads(f"value = {text}")["value"]
    except tomllib.TOMLDecodeError:
        value = text.strip()
    for section in sections:
        inner = values.setdefault(section, {})
        if not isinstance(inner, dict):
            raise HeadraceError(f"--set {change!r}: {section} is no section", hint="write it as decoder.side=32")
        values = inner
    values[last] = value
