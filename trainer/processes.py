"""The processes that train one model: opened where `torchrun` started several, asked together, closed in good order."""

from __future__ import annotations

import gc
import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from trainer.speed import half_precision
from trainer.task import Place

VARIABLES = (("RANK", "0"), ("WORLD_SIZE", "1"), ("LOCAL_RANK", "0"))


@contextmanager
def processes() -> Iterator[Place]:
    """Which process this is, and on what it trains; under `torchrun` the group is opened and closed.

    Closing ends the group's threads where nothing else holds it: one that still lets go of a tensor when Python ends
    aborts the process.
    """
    rank, world, local = (int(os.environ.get(key, default)) for key, default in VARIABLES)
    cuda = torch.cuda.is_available()
    device = torch.device(f"cuda:{local}" if cuda else "cpu")
    if cuda:
        torch.cuda.set_device(device)
        torch.set_float32_matmul_precision("high")
    place = Place(device, half_precision(device), rank, world)
    if world == 1:
        yield place
        return
    # The first optimizer imports this too. Its functions take the group that is there then as their default for good.
    importlib.import_module("torch.distributed.nn")
    torch.distributed.init_process_group("nccl" if cuda else "gloo")
    try:
        yield place
    finally:
        gc.collect()  # what was trained holds the group too
        torch.distributed.destroy_process_group()


def any_process(place: Place, said: bool) -> bool:
    """Whether one of the processes says so: all get the same answer, though their clocks differ."""
    if place.world == 1:
        return said
    flag = torch.tensor(float(said), device=place.device)
    torch.distributed.all_reduce(flag, torch.distributed.ReduceOp.MAX)
    return bool(flag)
