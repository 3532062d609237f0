"""The mode a model is in during an attack."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..sources.modes import still


@contextmanager
def model_mode(model: nn.Module, training: bool = False, batchnorm: bool = False,
               dropout: bool = False) -> Iterator[None]:
    """Within it the model is in eval mode, or in training mode where `training` is set.

    In training mode batch normalisations and dropouts, known by the names of their classes, are in training mode only
    where `batchnorm` and `dropout` say so. At the end every submodule is in the mode it had, also after an exception,
    and running statistics have not moved. The model's own ``train`` and ``eval`` are called: they may do more than set
    flags.
    """
    modules = list(model.modules()) if isinstance(model, nn.Module) else []
    flags = [m.training for m in modules]
    before = model.training
    try:
        if training:
            model.train()
            for m in modules:
                name = type(m).__name__
                if "BatchNorm" in name and not batchnorm or "Dropout" in name and not dropout:
                    m.eval()
        else:
            model.eval()
        with still(model if modules else None):
            yield
    finally:
        if model.training != before:
            model.train(before)
        for m, flag in zip(modules, flags):
            m.training = flag
