"""The one CLIP wrapper: pictures or texts in, unit vectors out, with one preprocessing and one identity.

Pictures are resized as bytes by torchvision (antialiased), not by PIL as open_clip does: 2.5 to 3 times faster, at most
one grey level apart. The path belongs to the identity. This module knows nothing of shards, captions' meaning or
thresholds, and decodes no pictures.

The same call gives the same bytes for a fixed number of torch threads: batches are cut from the rows in order, at a
fixed size, so what a row gives never depends on how many workers run.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import MISSING, HeadraceError, file_sha256

if TYPE_CHECKING:
    import numpy as np
    import torch
    from numpy.typing import NDArray

MINI = Path(__file__).parent / "models" / "mini-clip"
BATCH = 64
OFFLINE = "`mini` and a local directory work offline"


@dataclass(frozen=True)
class Preprocess:
    """How a picture becomes the image tower's input (open_clip's preprocess settings, by our path)."""

    height: int
    width: int
    resize_mode: str  # shortest (then centre crop), longest (then pad with `fill`) or squash
    interpolation: str  # bicubic or bilinear
    mean: tuple[float, ...]  # of values in [0, 1]
    std: tuple[float, ...]
    fill: int  # grey level, 0 to 255

    def __str__(self) -> str:
        fill = f" fill {self.fill}" if self.resize_mode == "longest" else ""
        colour = "/".join(f"{value:.4f}" for value in (*self.mean, *self.std))
        size = f"{self.width}x{self.height}"
        return f"torchvision uint8 antialiased {self.interpolation} {self.resize_mode}{fill} {size} {colour}"

    def __call__(self, picture: NDArray[np.uint8]) -> torch.Tensor:
        """One RGB picture (H, W, 3) as a uint8 tensor (3, height, width)."""
        import numpy as np
        import torch
        from torchvision.transforms.v2 import functional as F

        image = torch.from_numpy(np.require(picture, requirements="W")).permute(2, 0, 1)
        size = self._resized(image.shape[1], image.shape[2])
        if size != tuple(image.shape[1:]):
            mode = F.InterpolationMode.BILINEAR if self.interpolation == "bilinear" else F.InterpolationMode.BICUBIC
            image = F.resize(image, list(size), interpolation=mode, antialias=True)
        if size == (self.height, self.width):
            return image
        if self.resize_mode == "longest":
            left, top = (self.width - size[1]) // 2, (self.height - size[0]) // 2
            sides = [left, top, self.width - size[1] - left, self.height - size[0] - top]
            image = F.pad(image, sides, fill=float(self.fill))
        centred: torch.Tensor = F.center_crop(image, [self.height, self.width])
        return centred

    def _resized(self, height: int, width: int) -> tuple[int, int]:
        if self.resize_mode == "squash":
            return self.height, self.width
        ratios = self.height / height, self.width / width
        if self.resize_mode == "longest":
            scale = min(ratios)
            return max(1, round(height * scale)), max(1, round(width * scale))
        if self.height == self.width:  # the short side exact, the long side rounded down, as torchvision's Resize
            short = min(height, width)
            return self.height * height // short, self.width * width // short
        scale = max(ratios)
        return max(self.height, round(height * scale)), max(self.width, round(width * scale))


class Clip:
    """A loaded CLIP. `identity` says which; vectors of different identities must never be compared."""

    def __init__(self, name: str, model: Any, tokenizer: Any, weights: Path, device: torch.device) -> None:
        self.name = name
        self.model = model
        self.tokenizer = tokenizer
        self.device = device
        self.preprocess = _preprocess(model.visual.preprocess_cfg)
        self._weights = weights

    @cached_property
    def dimension(self) -> int:
        """Length of the vectors."""
        return int(self.encode_texts([""]).shape[1])

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What must be equal for two vectors to be comparable, as JSON-able values."""
        return {
            "name": self.name,
            "weights_sha256": file_sha256(self._weights),
            "preprocessing": str(self.preprocess),
            "dimension": self.dimension,
        }

    @property
    def context_length(self) -> int:
        """Tokens per text, both end marks included; what is longer is cut."""
        return int(self.tokenizer.context_length)

    def image_input(self, pictures: Sequence[NDArray[np.uint8]]) -> torch.Tensor:
        """RGB pictures (H, W, 3), any sizes, as uint8 (N, 3, height, width), resized for this CLIP."""
        import torch

        empty = torch.empty((0, 3, self.preprocess.height, self.preprocess.width), dtype=torch.uint8)
        return torch.stack([self.preprocess(picture) for picture in pictures]) if len(pictures) else empty

    def encode_images(self, pictures: Sequence[NDArray[np.uint8]] | torch.Tensor) -> NDArray[np.float32]:
        """Unit vectors (N, dimension) of RGB pictures (H, W, 3), or of what `image_input` made of them."""
        import torch

        small = pictures if isinstance(pictures, torch.Tensor) else self.image_input(pictures)
        return self._batched(small, lambda batch: self.model.encode_image(self.normalized(batch), normalize=True))

    def encode_texts(self, texts: Sequence[str]) -> NDArray[np.float32]:
        """Unit vectors (N, dimension) of texts; what exceeds the context is cut."""
        return self._batched(self.tokens(texts), lambda batch: self.model.encode_text(batch, normalize=True))

    def text_states(self, texts: Sequence[str]) -> tuple[NDArray[np.float32], NDArray[np.bool_]]:
        """Last token states (N, context, width), after the final norm, and their mask (N, context), true on tokens.

        The mask is true from the start mark to the end mark, both included.
        """
        import torch

        tokens = self.tokens(texts)
        foreign = hasattr(getattr(self.model, "text", None), "config") or not hasattr(self.tokenizer, "eot_token_id")
        if foreign or not hasattr(self.model, "forward_intermediates"):
            raise HeadraceError(
                f"the text tower of CLIP {self.name} gives no token states",
                hint="use a CLIP with open_clip's own text tower",
            )
        end = (tokens == self.tokenizer.eot_token_id).int().argmax(dim=1, keepdim=True)
        mask = torch.arange(tokens.shape[1]).unsqueeze(0) <= end
        return self._batched(tokens, self._last_states), mask.numpy()

    def tokens(self, texts: Sequence[str]) -> torch.Tensor:
        """Token ids (N, context), int64."""
        import torch

        ids: torch.Tensor = self.tokenizer(list(texts)) if len(texts) else torch.empty((0, self.context_length))
        return ids.long()

    def fits(self, texts: Sequence[str]) -> NDArray[np.bool_]:
        """Which texts (N,) are read whole; of the others `tokens` holds the beginning."""
        room = self.context_length
        more = self.tokenizer(list(texts), context_length=2 * room)[:, :room]
        same: NDArray[np.bool_] = (more == self.tokens(texts)).all(dim=1).numpy()
        return same

    def normalized(self, pictures: torch.Tensor) -> torch.Tensor:
        """uint8 pictures (N, 3, H, W) as the float input of the image tower, on the same device."""
        import torch

        mean, std = (
            torch.tensor(values, device=pictures.device).view(1, 3, 1, 1)
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        return (pictures.float() / 255 - mean) / std

    def _last_states(self, tokens: torch.Tensor) -> torch.Tensor:
        out = self.model.forward_intermediates(
            text=tokens, text_indices=1, normalize_intermediates=True, intermediates_only=True
        )
        states: torch.Tensor = out["text_intermediates"][-1]
        return states

    def _batched(self, rows: torch.Tensor, encode: Any) -> NDArray[np.float32]:
        import numpy as np
        import torch

        half = torch.autocast(self.device.type, torch.bfloat16, enabled=self.device.type == "cuda")
        with torch.inference_mode(), half:
            batches = (rows[start : start + BATCH].to(self.device) for start in range(0, len(rows), BATCH))
            parts = [encode(batch).float().cpu().numpy() for batch in batches]
        return np.concatenate(parts) if parts else np.zeros((0, self.dimension), dtype=np.float32)


def load(name: str, device: str = "auto") -> Clip:
    """Load a CLIP: `mini` (embedded), one that open_clip fetches, or a local directory of open_clip's form.

    What open_clip fetches is called `NAME:PRETRAINED` as in its list, or `hf-hub:OWNER/REPOSITORY`.

    `device` is `auto` (a GPU where there is one), `cpu`, `cuda` or `cuda:N`. On a CPU numbers are float32; on a GPU
    bfloat16 inside.

    Raises:
        HeadraceError: code 3 where there is no such CLIP, or none to be had offline; code 2 where it is broken.
    """
    chosen = _device(device)
    folder = MINI if name == "mini" else Path(name.removeprefix("local-dir:"))
    if folder.is_dir():
        return _load_directory("mini" if name == "mini" else folder.resolve().name, folder, chosen)
    before, _, after = name.rpartition(":")
    if before == "hf-hub" and after:
        return _load_fetched(name, name, None, chosen)
    if not before or "/" in name:
        hint = f"give an open_clip NAME:PRETRAINED or hf-hub:OWNER/REPOSITORY; {OFFLINE}"
        raise HeadraceError(f"there is no CLIP called {name}", hint=hint, code=MISSING)
    return _load_fetched(name, before, after, chosen)


def _device(name: str) -> torch.device:
    import torch

    there = torch.cuda.device_count()
    try:
        chosen = torch.device(("cuda" if there else "cpu") if name == "auto" else name)
    except RuntimeError:
        raise HeadraceError(f"there is no device called {name}", hint="give auto, cpu, cuda or cuda:N") from None
    if chosen.type == "cuda" and (chosen.index or 0) >= there:
        raise HeadraceError(f"there is no {name} here: torch sees {there} GPUs", hint="give auto or cpu", code=MISSING)
    return chosen


@contextmanager
def quiet() -> Iterator[None]:
    """Hold back open_clip's warnings that a model has no weights yet: they are loaded next, or trained."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


def _load_directory(name: str, folder: Path, device: torch.device) -> Clip:
    import open_clip

    try:
        config = json.loads((folder / "open_clip_config.json").read_text(encoding="utf-8"))
        described = {"embed_dim", "vision_cfg", "text_cfg"} <= set(config["model_cfg"])
    except FileNotFoundError:
        raise _no_clip(folder, "it has no open_clip_config.json") from None
    except (ValueError, KeyError, TypeError):
        described = False
    if not described:
        raise _no_clip(folder, "its open_clip_config.json does not describe a CLIP")
    weights = next(
        iter(sorted(folder.glob("*.safetensors"), key=lambda p: (p.name != "open_clip_model.safetensors", p))),
        None,
    )
    if weights is None:
        raise _no_clip(folder, "it has no safetensors weights")
    try:
        with quiet():
            model = open_clip.create_model(f"local-dir:{folder}", device=device, load_weights=False)
        tokenizer = open_clip.get_tokenizer(f"local-dir:{folder}")
    except Exception as error:
        raise _no_clip(folder, f"open_clip cannot build it ({_first_line(error)})") from error
    try:
        _check_shapes(model, weights)
        open_clip.load_checkpoint(model, str(weights))
    except Exception as error:
        reason = f"its weights do not fit its config ({_first_line(error)})"
        raise _no_clip(folder, reason) from error
    return Clip(name, model.eval(), tokenizer, weights, device)


def _check_shapes(model: Any, weights: Path) -> None:
    """Raise where a tensor has another shape: open_clip would stretch positional embeddings to what the config says."""
    from safetensors import safe_open

    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    with safe_open(weights, framework="pt") as file:
        found = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    for name in sorted(expected.keys() & found.keys()):
        if expected[name] != found[name]:
            raise ValueError(f"{name} is {found[name]}, not {expected[name]}")


def _load_fetched(name: str, model: str, pretrained: str | None, device: torch.device) -> Clip:
    """What open_clip fetches: a model and a tag of its list, or `hf-hub:OWNER/REPOSITORY` and no tag."""
    import open_clip
    from open_clip.pretrained import download_pretrained

    if pretrained is None:
        settings = {"hf_hub": model.removeprefix("hf-hub:") + "/"}
    else:
        _check_listed(name, model, pretrained)
        settings = open_clip.get_pretrained_cfg(model, pretrained)
    quick = settings.get("quick_gelu", False)  # open_clip only warns where a tag was trained with the other activation
    try:
        weights = Path(download_pretrained(settings))
        tokenizer = open_clip.get_tokenizer(model)
        built = open_clip.create_model(model, pretrained=pretrained, device=device, force_quick_gelu=quick)
    except ImportError as error:
        hint = f"`pip install {(error.name or 'transformers').split('.')[0]}` mends it; {OFFLINE}"
        raise HeadraceError(f"CLIP {name} needs another package ({_first_line(error)})", hint=hint) from error
    except Exception as error:
        reason = f"cannot be fetched and is not in the cache ({_first_line(error)})"
        hint = f"go online once to cache it; {OFFLINE}"
        raise HeadraceError(f"CLIP {name} {reason}", hint=hint, code=MISSING) from error
    return Clip(name, built.eval(), tokenizer, weights, device)


def _check_listed(name: str, model: str, pretrained: str) -> None:
    import open_clip

    tags = open_clip.list_pretrained_tags_by_model(model)
    if pretrained not in tags:
        known = f"{model} has {', '.join(tags)}" if tags else "`NAME:PRETRAINED` as in open_clip's list"
        raise HeadraceError(f"open_clip knows no weights {name}", hint=f"{known}; {OFFLINE}", code=MISSING)


def _preprocess(settings: dict[str, Any]) -> Preprocess:
    size = settings["size"]
    height, width = size if isinstance(size, tuple | list) else (size, size)
    mode = "bilinear" if settings["interpolation"] == "bilinear" else "bicubic"
    mean, std = tuple(settings["mean"]), tuple(settings["std"])
    return Preprocess(height, width, settings["resize_mode"], mode, mean, std, settings["fill_color"])


def _no_clip(folder: Path, why: str) -> HeadraceError:
    return HeadraceError(f"{folder} is no CLIP: {why}", hint=f"a directory that `trainer clip` wrote; {OFFLINE}")


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:200]
