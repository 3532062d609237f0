"""Contexts that craft in another mode or with other random numbers, and leave model and generators as they were."""
import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _NormBase

from ..ops import keys

# Held by whoever changes for a while what all threads share: the flags of a live model, torch's generators, nn.Module,
# memory of CUDA graphs. It is one lock, so that no two threads can each wait for what the other holds.
exclusive = threading.RLock()


@contextmanager
def still(model: nn.Module | None) -> Iterator[None]:
    """Running statistics do not move: batch normalisations in training mode only compute by the batch's statistics."""
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
    """Every submodule is in the mode for `crafting`, "eval" or "train"; afterwards each is in its own again.

    A model in training mode keeps the modes of its submodules for crafting "train".
    """
    modules = [m for m in model.modules() if hasattr(m, "training")]  # frozen script modules have no modes
    training = [m.training for m in modules]
    try:
        if crafting == "eval" or not getattr(model, "training", False):
            for m in modules:
                m.training = crafting == "train"
        with still(model if crafting == "train" else None):
            yield
    finally:
        for m, flag in zip(modules, training):
            m.training = flag


@contextmanager
def forked_generators(device: torch.device, key: Tensor | None) -> Iterator[None]:
    """torch's generators are seeded from `key`; afterwards they go on as if nothing had been drawn."""
    # Generators are seeded from the host, which must wait for a key on a GPU, but not for one on the CPU.
    seed, offset = (keys.next_key("cpu") if key is None else key).tolist()
    seed = (seed ^ offset << 1) & (1 << 63) - 1
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.random.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
        yield
