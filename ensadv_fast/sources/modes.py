"""Running statistics that an attack does not move."""
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..ops import keys


@contextmanager
def still(model: nn.Module | None) -> Iterator[None]:
    """Batch normalisations in training mode still compute by the batch's statistics, but their running ones stay."""
    moving = [] if model is None else [m for m in model.modules() if isinstance(m, _NormBase) and m.training
                                       and m.track_running_stats]
    for m in moving:
        m.track_running_stats = False
    try:
        yield
    finally:
        for m in moving:
            m.track_running_stats = True


@contextmanager
def mode_flags(model: nn.Module, crafting: str) -> Iterator[None]:
    """Put every submodule in the mode that crafting wants, and back exactly as it was."""
    modules = list(model.modules())
    training = [m.training for m in modules]
    try:
        if crafting == "eval" or not model.training:
            for m in modules:
                m.training = crafting == "train"
        with still(model if crafting == "train" else None):
            yield
    finally:
        for m, flag in zip(modules, training):
            m.training = flag


@contextmanager
def forked_generators(device: torch.device, key: Tensor | None) -> Iterator[None]:
    """torch's generators as if seeded from `key`; the caller's go on afterwards as if nothing had been drawn."""
    # Generators are seeded from the host: a key that lives on a GPU is waited for, one on the CPU is not.
    seed, offset = (keys.next_key("cpu") if key is None else key).tolist()
    seed = (seed ^ offset << 1) & (1 << 63) - 1
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
