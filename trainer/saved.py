"""A run's trained models on disk: `prior/`, `decoder/`, `upsampler/`, each its config and its averaged weights.

`run.json` beside them says which CLIP they were trained with. It knows nothing of training.
"""

from __future__ import annotations

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


def load_model(run: Path, name: Name, device: str | Any = "cpu") -> tuple[nn.Module, Config]:
    """A trained model, ready to use, and its config.

    Raises:
        HeadraceError: no such model in the run (code 3), or a damaged one (code 4).
    """
    from safetensors import SafetensorError
    from safetensors.torch import load_file

    folder = run / name
    if not (folder / CONFIG).is_file() or not (folder / WEIGHTS).is_file():
        hint = f"train it with `trainer fit --only {name} --out {run}`"
        raise HeadraceError(f"{run} has no trained {name}", hint=hint, code=MISSING)
    values = read_json(folder / CONFIG)
    config = parse_config(KINDS[name], values.get("config", {}), str(folder / CONFIG))
    model = build(config, parse_config(Sizes, values.get("sizes", {}), str(folder / CONFIG)))
    try:
        model.load_state_dict(load_file(folder / WEIGHTS))
    except (SafetensorError, RuntimeError, OSError) as error:
        reason = str(error).strip().splitlines()[0]
        hint = f"train the {name} again, in another --out"
        raise HeadraceError(f"{folder / WEIGHTS} does not fit its config: {reason}", hint=hint, code=REFUSED) from None
    return model.to(device).eval().requires_grad_(False), config


def write_run(run: Path, clip_name: str, identity: Mapping[str, Any], shards: str) -> None:
    """Say which CLIP (as `pipeline.clip.load` takes it) and which set the models of a run belong to."""
    write_json(run / RUN, {"clip": clip_name, "identity": dict(identity), "shards": shards})


def read_run(run: Path) -> dict[str, Any]:
    """What `write_run` wrote; where there is no run, a `HeadraceError`."""
    if not (run / RUN).is_file():
        raise HeadraceError(f"{run} is no run of `trainer fit`", hint="check --run, or train one first", code=MISSING)
    values: dict[str, Any] = read_json(run / RUN)
    return values
