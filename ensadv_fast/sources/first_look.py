"""The first batch of attacks on a source, looked at once: what is wrong there is wrong, silently, ever after.

Looking costs a pass over the batch, so later batches are not looked at; nor is any on a GPU, where it would have to be
waited for, without ENSADV_CHECK=1.
"""
import warnings
from collections.abc import Sequence
from weakref import WeakKeyDictionary

from torch import Tensor

from ..ops import checks

_MARGIN = 1e-3  # of the range: what decoding and resizing may leave outside it
_LEAST = 4  # of a batch: images, so that rows that sum to 1 are no chance


class FirstLook:
    """What was looked at already: the images that came, and the gradient that came back."""

    __slots__ = ("gradient", "images")

    def __init__(self) -> None:
        self.images = self.gradient = False

    def at_images(self, op: str, x: Tensor, lo: float, hi: float) -> None:
        """ValueError where images x lie outside [lo, hi]. Levels in uint8 cannot."""
        if not checks.is_readable(x) or not x.numel() or not x.is_floating_point():
            return
        low, high = (float(v) for v in x.aminmax())
        margin = _MARGIN * (hi - lo)
        if low < lo - margin or high > hi + margin:
            raise ValueError(
                f"{op}: x must lie in [lo, hi] = [{lo:g}, {hi:g}], got [{low:.4g}, {high:.4g}]: divide levels 0..255 "
                "by 255, or give them as uint8; where the model takes normalised images, declare that once, "
                "Source(model, mean=..., std=...), and give images in [0, 1]")
        self.images = True

    def at_gradient(self, grad: Tensor, logits: Sequence[Tensor], loss: object) -> None:
        """One warning each where logits look like probabilities, and where the gradient is zero everywhere.

        logits: those [N, C] that may be probabilities instead."""
        if not checks.is_readable(grad) or not grad.numel():
            return
        self.gradient = True
        if not callable(loss) and len(grad) >= _LEAST and any(map(_are_probabilities, logits)):
            warnings.warn("attack: the model returns probabilities, it seems: its outputs lie in [0, 1] and sum to 1. "
                          "Taken as logits they weaken attacks, whose gradients vanish where the model is sure; "
                          'Source(model, output="probabilities") reads them as they are meant', stacklevel=2)
        if loss != "cw" and not bool(grad.any()):  # the hinge of "cw" is flat by design
            warnings.warn("attack: the gradient of the loss by x is zero for every pixel of the first batch, so that "
                          "no step follows it: an error rate measured so says nothing about robustness", stacklevel=2)


def _are_probabilities(logits: Tensor) -> bool:
    wide = logits.detach().double()
    return bool(((wide >= 0) & (wide <= 1)).all()) and bool(((wide.sum(1) - 1).abs() < 1e-2).all())


_of_models: WeakKeyDictionary[object, FirstLook] = WeakKeyDictionary()
DONE = FirstLook()  # for sources that are not to be looked at
DONE.images = DONE.gradient = True


def first_look_of(model: object) -> FirstLook:
    """That of a plain module or callable, for which every call of an attack makes another source."""
    try:
        look = _of_models.get(model)
        if look is None:
            look = _of_models[model] = FirstLook()
    except TypeError:  # it has no hash, or no weak references to it can be had
        look = FirstLook()
    return look
