"""A CLIP that is to be trained: built from its config, its weights drawn from a seed or taken from another CLIP."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import REFUSED, HeadraceError
from trainer.clip_files import CONFIG, WEIGHTS, write_config
from trainer.config import ClipConfig

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

    from pipeline.clip import Clip

SAME = 1e-5  # 1 less the cosine of two vectors that one function gives


def build(config: ClipConfig, seed: int, first: Clip | None, out: Path, device: torch.device) -> Clip:
    """A model of the config's architecture behind the wrapper that will score with it; writes its config to `out`.

    Its weights are drawn from the seed, or those of `first`, which is on the CPU.

    Raises:
        HeadraceError: a model that open_clip cannot build, a tokenizer that is not its own, weights that do not fit
            (code 4); then nothing new is left in `out`.
    """
    from pipeline.clip import Clip

    known = (out / CONFIG).is_file()
    write_config(out, config)
    try:
        model, tokenizer = _made(out, seed)
        if first is not None:
            import torch

            _start(Clip(out.name, model, tokenizer, out / WEIGHTS, torch.device("cpu")), first)
    except HeadraceError:
        if not known:
            (out / CONFIG).unlink()
        raise
    return Clip(out.name, model.to(device), tokenizer, out / WEIGHTS, device)


def _made(out: Path, seed: int) -> tuple[Any, Any]:
    """Model, on the CPU, and tokenizer of the config in `out`."""
    import open_clip
    import torch

    from pipeline.clip import quiet

    name = f"local-dir:{out}"
    torch.manual_seed(seed)
    try:
        with quiet():
            model = open_clip.create_model(name, device="cpu", load_weights=False, pretrained_text=False)
        tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:
        why = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise HeadraceError(
            f"open_clip cannot build the model of this config: {why}", hint="correct `model_cfg`"
        ) from error
    if not isinstance(tokenizer, open_clip.SimpleTokenizer):
        hint = "leave `hf_tokenizer_name` out of `model_cfg.text_cfg`"
        raise HeadraceError("a CLIP is trained with open_clip's own tokenizer only", hint=hint)
    model.visual.to(memory_format=torch.channels_last)
    return model, tokenizer


def _start(clip: Clip, first: Clip) -> None:
    """Give a CLIP another's weights.

    Those of another architecture are refused, and so are those that give other vectors here: heads of attention,
    activation and preprocessing leave no trace in the weights.
    """
    given, own = first.model.state_dict(), clip.model.state_dict()
    fits = {name for name, value in own.items() if name in given and given[name].shape == value.shape}
    odd = sorted({*given, *own} - fits)
    hint = f"give --config the `model_cfg` and `preprocess_cfg` of {first.name}, or leave --start-from out"
    if odd:
        what = f"the weights of CLIP {first.name} do not fit the config's model: {odd[0]}"
        raise HeadraceError(what, hint=hint, code=REFUSED)
    clip.model.load_state_dict(given)
    clip.model.eval()
    apart = max(_apart(one(clip), one(first)) for one in (_of_a_text, _of_a_picture))
    if apart > SAME or str(clip.preprocess) != str(first.preprocess):
        what = f"with the weights of CLIP {first.name} the config's model gives other vectors"
        raise HeadraceError(what, hint=hint, code=REFUSED)


def _of_a_text(clip: Clip) -> NDArray[np.float32]:
    return clip.encode_texts(["a photo of a cat"])


def _of_a_picture(clip: Clip) -> NDArray[np.float32]:
    import numpy as np

    return clip.encode_images([np.random.default_rng(0).integers(256, size=(64, 64, 3), dtype=np.uint8)])


def _apart(one: NDArray[np.float32], other: NDArray[np.float32]) -> float:
    return 1 - float((one * other).sum())
