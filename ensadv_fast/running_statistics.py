"""Running statistics that an attack does not move."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn
from torch.nn.modules.batchnorm import _NormBase


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
