"""A run's trained models on disk: `prior/`, `decoder/`, `upsampler/`, each its config and its averaged weights.

`run.json` beside them says which CLIP they were trained with. It knows nothing of training.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from pipeline.base import MISSING, REFUSED, Config, HeadraceError, parse_config, read_json, write_bytes, write_json
from trainer.conditions import Sizes
from trainer.decoder import Decoder, DecoderConfig
from trainer.prior import PriorConfig, build_prior
from trainer.upsampler import Upsampler, UpsamplerConfig

if TYPE_CHECKING:
    from torch import Tensor, nn

Name = Literal["prior", "decoder", "upsampler"]
NAMES: tuple[Name, ...] = ("prior", "decoder", "upsampler")
CONFIG, WEIGHTS, RUN = "config.json", "model.safetensors", "run.json"
KINDS: dict[Name, type[Config]] = {"prior": PriorConfig, "decoder": DecoderConfig, "upsampler": UpsamplerConfig}


def build(config: Config, sizes: Sizes) -> nn.Module:
    """A fresh model of this config, its weights from torch's global generator.

    Raises:
        HeadraceError: sizes that do not go together.
    """
    try:
        if isinstance(config, PriorConfig):
            return build_prior(config, sizes)
        if isinstance(config, UpsamplerConfig):
            return Upsampler(config, sizes)
        assert isinstance(config, DecoderConfig)
        return Decoder(config, sizes)
    except ValueError as error:  # group norm: channels must be divisible
        raise HeadraceError(f"the model cannot be built: {error}", hint="correct its config") from None


def save_model(
    folder: Path, config: Config, sizes: Sizes, weights: Mapping[str, Tensor], facts: dict[str, Any]
) -> None:
    """Write config and weights (float32); `facts` are kept beside the config, for people."""
    from safetensors.torch import save

    plain = {name: value.detach().cpu().contiguous() for name, value in weights.items()}
    write_bytes(folder / WEIGHTS, save(plain))
    values = {"config": config.model_dump(mode="json"), "sizes": sizes.model_dump(mode="json"), "training": facts}
    write_json(folder / CONFIG, values)


def is_saved(run: Path, name: Name) -> bool:
    """Whether the run has this model."""
    return (run / name / CONFIG).is_file() and (run / name / WEIGHTS).is_file()


def read_config(run: Path, name: Name) -> Config:
    """A saved model's config."""
    path = run / name / CONFIG
    return parse_config(KINDS[name], read_json(path).get("config", {}), str(path))


def load_model(run: Path, name: Name, device: str | Any = "cpu") -> tuple[nn.Module, Config]:
    """A trained model, ready to use, and its config.

    Raises:
        HeadraceError: no such model in the run (code 3), or a damaged one (code 4).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = run / name
    if not is_saved(run, name):
        hint = f"train it with `trainer fit --only {name} --out {run}`"
        raise HeadraceError(f"{run} has no trained {name}", hint=hint, code=MISSING)
    config = read_config(run, name)
    sizes = parse_config(Sizes, read_json(folder / CONFIG).get("sizes", {}), str(folder / CONFIG))
    model = build(config, sizes)
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        other = f"it is of another version of the {name}"  # of which torch tells every weight
        reason = other if isinstance(error, RuntimeError) else str(error).strip().splitlines()[0]
        hint = f"move {folder} away and train it again by `trainer fit --only {name} --out {run} …`"
        raise HeadraceError(f"{folder / WEIGHTS} does not fit its config: {reason}", hint=hint, code=REFUSED) from None
    return model.to(device).eval().requires_grad_(False), config


def write_run(run: Path, clip_name: str, identity: Mapping[str, Any], shards: Path, set_digest: str) -> None:
    """Say which CLIP (as `pipeline.clip.load` takes it) and which set the models of a run belong to.

    Relative places are kept as seen from the run, so that they are found from any directory, and after all of it was
    moved.
    """
    folder = Path(clip_name.removeprefix("local-dir:"))
    clip = _seen_from(run, folder) if clip_name != "mini" and folder.is_dir() else clip_name
    about = {"identity": dict(identity), "shards": _seen_from(run, shards), "set": set_digest}
    write_json(run / RUN, {"clip": clip, **about})


def read_run(run: Path) -> dict[str, Any]:
    """What `write_run` wrote, places as seen from here; where there is no run, a `HeadraceError`."""
    if not (run / RUN).is_file():
        raise HeadraceError(f"{run} is no run of `trainer fit`", hint="check --run, or train one first", code=MISSING)
    values: dict[str, Any] = read_json(run / RUN)
    seen = {key: _seen_from_here(run, values[key]) for key in ("clip", "shards")}
    return values | (seen if "set" in values else {})  # runs of earlier versions hold places as they were typed


def _seen_from(run: Path, place: Path) -> str:
    return str(place) if place.is_absolute() else f"./{os.path.relpath(place, run)}"


def _seen_from_here(run: Path, name: str) -> str:
    """A place that `_seen_from` told, as a path from the working directory; all else stays as it is."""
    return os.path.relpath(run / name) if name.startswith("./") else name
