"""The mode a model is in during an attack."""
from collections.abc import Iterator
from contextlib import contextmanager

from torch import nn

from ..sources.modes import still


@contextmanager
def model_mode(model: nn.Module, training: bool = False, batchnorm: bool = False,
               dropout: bool = False) -> Iterator[None]:
    """Eval mode; or training mode, that of batch normalisations and dropouts (by the names of their classes) only
    where asked for. Every submodule is left in its own mode, also after an exception, and running statistics do not
    move. The model's own ``train`` and ``eval`` are called, which may do more than set flags."""
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
