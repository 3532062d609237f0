"""The module in a Foolbox model, and the source that a fast attack runs on."""
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from ...sources.source import Source
from .. import source_cache
from ..installing import import_library


class View(NamedTuple):
    """A source, and the axes along which the model flips images before it looks at them."""

    source: Source
    axes: tuple[int, ...]

    def turn(self, images: Tensor) -> Tensor:
        """Flip images into the order that the source takes, or back."""
        return images.flip(self.axes) if self.axes else images


def find_module(model: Any) -> nn.Module | None:
    """The module that a foolbox.PyTorchModel calls, also inside the library's wrappers; None where it is not found."""
    while not isinstance(model, nn.Module):
        inner = getattr(model, "_model", None)
        if inner is None:
            return None
        if getattr(inner, "__module__", None) == "foolbox.models.pytorch" and hasattr(inner, "__closure__"):
            # PyTorchModel's only reference to the module is in the closure of the function that calls it.
            inner = dict(zip(inner.__code__.co_freevars, inner.__closure__ or ())).get("model")
            inner = None if inner is None else inner.cell_contents
        model = inner
    return model


def why_no_source(model: Any, images: Tensor) -> str | None:
    """Why a source cannot compute this model's gradients, or None."""
    if type(model) is not import_library("foolbox").PyTorchModel or vars(model).keys() & {"__call__", "_preprocess"}:
        return f"its model is a {type(model).__name__}, not a plain foolbox.PyTorchModel"
    module = find_module(model)
    if module is None:
        return "its model's module was exchanged"
    if any(m.training for m in module.modules()):
        return "its model is in training mode"
    if images.dtype == torch.float64:
        return "its images are float64"
    mean, std, _ = model._preprocess_args
    if any(v is not None and _to_per_channel(v.raw, images) is None for v in (mean, std)):
        return "its preprocessing is not per channel of images [N, C, H, W]"
    return None


def make_view(model: Any, images: Tensor) -> View:
    """The view of a model for which :func:`why_no_source` gives None."""
    module = find_module(model)
    assert module is not None
    mean, std, axes = model._preprocess_args
    mean, std = (None if v is None else _to_per_channel(v.raw, images) for v in (mean, std))
    if axes is None:
        axes = ()
    return View(source_cache.get_source(module, mean, std), (axes,) if isinstance(axes, int) else tuple(axes))


def _to_per_channel(values: Tensor, images: Tensor) -> Tensor | None:
    """Values that broadcast over images [N, C, H, W] as one per channel [C] or one for all [1]; None for others."""
    shape = (1,) * (images.dim() - values.dim()) + tuple(values.shape)
    single = values.numel() == 1
    if images.dim() != 4 or not (single or shape == (1, images.shape[1], 1, 1)):
        return None
    return values.flatten()
