"""A training state as one safetensors file, scalars in its metadata, that appears whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pipeline.base import REFUSED, HeadraceError, atomic_path

if TYPE_CHECKING:
    from torch import Tensor, nn
    from torch.optim import Optimizer


def save(path: Path, tensors: Mapping[str, Tensor], scalars: Mapping[str, Any]) -> None:
    """Write tensors and JSON-able scalars; on a full disk the file that was there stays."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    whole = {name: tensor.detach().contiguous() for name, tensor in tensors.items()}
    with atomic_path(path) as temporary:
        try:
            save_file(whole, temporary, metadata={"scalars": json.dumps(dict(scalars), sort_keys=True)})
        except SafetensorError as error:  # the library wraps what the system says
            number = re.search(r"os error (\d+)", str(error))
            raise (OSError(int(number[1]), str(error)) if number else error) from None


def load(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Tensors and scalars of a file that `save` wrote; a damaged one is a `HeadraceError`."""
    with _opened(path) as file:
        return {name: file.get_tensor(name) for name in file.keys()}, _scalars(file)  # noqa: SIM118


def scalars(path: Path) -> dict[str, Any]:
    """The scalars alone, without reading the tensors."""
    with _opened(path) as file:
        return _scalars(file)


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, KeyError, ValueError, OSError) as error:
        hint = "start again without --resume, in another --out"
        raise HeadraceError(f"{path} is no training state: {error}", hint=hint, code=REFUSED) from None


def _scalars(file: Any) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((file.metadata() or {})["scalars"])
    return found


def optimizer_tensors(model: nn.Module, optimizer: Optimizer) -> dict[str, Tensor]:
    """The optimizer's state by parameter name: `optimizer.NAME.FIELD`."""
    return {
        f"optimizer.{name}.{field}": value
        for name, parameter in model.named_parameters()
        for field, value in optimizer.state.get(parameter, {}).items()
    }


def restore_optimizer(model: nn.Module, optimizer: Optimizer, tensors: Mapping[str, Tensor]) -> None:
    """The inverse of `optimizer_tensors`; moments get their parameter's device and memory layout.

    Counts of steps stay on the CPU. The layout matters: a step that walks all at once is quickest where layouts agree.
    """
    for name, parameter in model.named_parameters():
        prefix = f"optimizer.{name}."
        optimizer.state[parameter] = {
            key.removeprefix(prefix): value.clone() if key == f"{prefix}step" else like(parameter, value)
            for key, value in tensors.items()
            if key.startswith(prefix)
        }


def like(pattern: Tensor, value: Tensor) -> Tensor:
    """A copy of `value` on the device and in the memory layout of `pattern`."""
    import torch

    return torch.empty_like(pattern, dtype=value.dtype).copy_(value)


def section(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors below `prefix.`, without it."""
    return {k.removeprefix(f"{prefix}."): v for k, v in tensors.items() if k.startswith(f"{prefix}.")}
