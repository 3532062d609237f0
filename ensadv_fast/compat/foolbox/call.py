"""One call of an attack: what it was given, the gradients that it follows, and what it returns."""
import functools
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import ModuleType
from typing import Any, Protocol

import torch
from torch import Tensor

from ... import ops
from ...ops.memory import widen
from ...sources.base import for_autograd
from ...sources.modes import still
from ..installing import import_library
from ..precisions import is_fast
from .models import View, find_module, make_view, why_no_source


class Caller(Protocol):
    """What a call needs of its attack, a :class:`ensadv_fast.compat.foolbox.descent.GradientDescent`."""

    untargeted: bool
    distance: Any
    get_loss_fn: Callable[..., Any]

    @property
    def precision(self) -> str | None: ...

    def why_exact(self) -> str | None: ...


@functools.cache
def _eagerpy() -> ModuleType:
    """The library of tensors that Foolbox is written in."""
    return import_library("eagerpy")


def wrap(t: Tensor) -> Any:
    """The tensor as an eagerpy tensor, without a copy."""
    return _eagerpy().PyTorchTensor(t)


@contextmanager
def calling(attack: Caller, model: Any, inputs: Any, criterion: Any,
            several: bool = False) -> Iterator["Call"]:
    """A call. Within it autograd is off and the model's running statistics do not move."""
    with torch.inference_mode(False), torch.no_grad(), still(find_module(model)):
        yield Call(attack, model, inputs, criterion, several)


class Call:
    """What an attack was given, checked.

    images: the inputs, detached, in the dtype that the model sees. clean: the same in the dtype of iterates, float32
    for 16-bit images. labels: those to leave (sign 1) or to reach (sign -1). several: is there more than one epsilon?
    view: the source that gradients are taken on; None: they are taken on the model itself.
    """

    def __init__(self, attack: Caller, model: Any, inputs: Any, criterion: Any, several: bool):
        theirs = import_library("foolbox")
        self.attack, self.model, self.several = attack, model, several
        self.restore: Callable[[Tensor], Any] = (lambda t: t) if isinstance(inputs, Tensor) else wrap
        self.images = for_autograd(getattr(inputs, "raw", inputs).detach())
        self.bounds = model.bounds
        self._check_bounds()
        if not isinstance(criterion, theirs.Criterion):
            criterion = theirs.Misclassification(criterion)
        self.criterion = criterion
        if isinstance(criterion, theirs.Misclassification):
            self.sign, labels = 1.0, criterion.labels
        elif hasattr(criterion, "target_classes"):
            self.sign, labels = -1.0, criterion.target_classes
        else:
            raise ValueError(f"unsupported criterion: {type(attack).__name__} takes labels, Misclassification or "
                             f"TargetedMisclassification, got {type(criterion).__name__}")
        if attack.untargeted and hasattr(criterion, "target_classes"):
            raise ValueError(f"unsupported criterion: {type(attack).__name__} is not targeted")
        self.labels = for_autograd(labels.raw)
        self.clean, self.view = widen(self.images), self._choose_view()
        self._loss = attack.get_loss_fn(model, wrap(self.labels))
        self._at_clean: Tensor | None = None

    def _check_bounds(self) -> None:
        low, high = torch.stack(torch.aminmax(self.images)).tolist()
        if not (low >= self.bounds.lower and high <= self.bounds.upper):
            raise AssertionError(f"{type(self.attack).__name__}: inputs must be in the model's bounds "
                                 f"[{self.bounds.lower}, {self.bounds.upper}], got [{low}, {high}]")

    def _choose_view(self) -> View | None:
        """The source to take gradients on, or None: exact is chosen, or a warning says why a source cannot do it."""
        if not is_fast(self.attack.precision):
            return None
        why = self.attack.why_exact() or why_no_source(self.model, self.images)
        if why is None and (self.labels.dtype != torch.int64 or self.labels.dim() != 1):
            why = "its labels are not int64 [N]"
        if why is None:
            return make_view(self.model, self.images)
        warnings.warn(f"{type(self.attack).__name__}: is exact, not fast, since {why}", stacklevel=6)
        return None

    def gradient(self, point: Tensor) -> Tensor:
        """The gradient of the summed cross-entropy by the point, up to a positive factor per sample.

        Do not write into it: the gradient at the clean images serves every epsilon, unless the forward pass draws
        random numbers.
        """
        if point is not self.clean or not self.several:
            return self._compute_gradient(point)
        if self._at_clean is None:
            before = _generator_states(point.device)
            grad = self._compute_gradient(point)
            if _generator_states(point.device) != before:
                return grad
            self._at_clean = grad
        return self._at_clean

    def _compute_gradient(self, point: Tensor) -> Tensor:
        if self.view is not None:
            turn = self.view.turn
            return turn(self.view.source.input_grad(turn(point), self.labels).grad)
        with torch.enable_grad():
            leaf = point.detach().to(self.images.dtype).requires_grad_()
            (grad,) = torch.autograd.grad(self._loss(wrap(leaf)).raw, leaf)
        return grad.to(self.clean.dtype)

    def result(self, point: Tensor, epsilon: float, norm: str) -> Tensor:
        """The point in the images' dtype, rounded within epsilon for 16-bit images. Never the images themselves."""
        if point.dtype != self.images.dtype:
            return ops.project(point, self.clean, epsilon, norm=norm, lo=self.bounds.lower, hi=self.bounds.upper,
                               out=torch.empty_like(self.images))
        return point.clone() if point is self.images else point

    def clip(self, perturbed: Tensor, epsilon: float) -> Tensor:
        """`perturbed` clipped to epsilon as the library does. 16-bit images are only copied: they are rounded within
        epsilon already, and the library's clipping would round them out of it again."""
        if perturbed.dtype != self.clean.dtype:
            return perturbed.clone()
        return self.attack.distance.clip_perturbation(self.images, perturbed, epsilon)

    def is_fooled_by(self, images: Tensor) -> Tensor:
        """Does the model itself meet the criterion on these images? bool [N]."""
        images = wrap(images)
        return self.criterion(images, self.model(images)).raw


def _generator_states(device: torch.device) -> tuple[bytes, ...]:
    """The states of torch's generators of the CPU and this device."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)
