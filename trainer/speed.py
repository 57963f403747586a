"""How fast this machine is, and how much work a step is: for the share of its speed that a run reaches (MFU)."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import lru_cache

import torch
from torch.utils.flop_counter import FlopCounterMode

TRIES = 10


@lru_cache
def half_precision(device: torch.device) -> bool:
    """Whether bfloat16 is quicker than float32 there: on GPUs, and on CPUs that multiply it in hardware."""
    if device.type != "cpu":
        return True
    known = torch.cpu.get_capabilities()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16") or known.get("bf16"))


def quick(device: torch.device) -> torch.autocast:
    """Autocast to bfloat16 where that is quicker."""
    return torch.autocast(device.type, torch.bfloat16, enabled=half_precision(device))


@lru_cache
def matrix_speed(device: torch.device, half: bool) -> float:
    """Operations per second of a large square matrix product in the precision that is trained in; the best of a few.

    Of normal numbers: a GPU multiplies constants quicker, since they cost it less power.
    """
    size = 8192 if device.type == "cuda" else 1024
    kind = torch.bfloat16 if half else torch.float32
    generator = torch.Generator(device).manual_seed(0)
    a, b = (torch.randn(size, size, generator=generator, device=device).to(kind) for _ in range(2))
    best = 0.0
    for _ in range(TRIES):
        began = time.perf_counter()
        for _ in range(4):
            a @ b
        wait(device)
        best = max(best, 4 * 2 * size**3 / (time.perf_counter() - began))
    return best


def wait(device: torch.device) -> None:
    """Until the device has done what it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def operations(work: Callable[[], object]) -> float:
    """Floating-point operations of matrix products and convolutions in `work`, as torch counts them."""
    with FlopCounterMode(display=False) as counter:
        work()
    return float(counter.get_total_flops())
