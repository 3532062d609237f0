"""One call of an attack: what it was given, the gradients that it follows, and what it gives back."""
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
from ..installing import library
from ..precisions import is_fast
from .models import View, module_of, viewed, why_no_source


class Caller(Protocol):
    """What a call asks of its attack, which is a :class:`ensadv_fast.compat.foolbox.descent.GradientDescent`."""

    untargeted: bool
    distance: Any
    get_loss_fn: Callable[..., Any]

    @property
    def precision(self) -> str | None: ...

    def why_exact(self) -> str | None: ...


@functools.cache
def _eagerpy() -> ModuleType:
    """What the library is written in."""
    return library("eagerpy")


def wrapped(t: Tensor) -> Any:
    """As eagerpy holds it."""
    return _eagerpy().PyTorchTensor(t)


@contextmanager
def called(attack: Caller, model: Any, inputs: Any, criterion: Any,
           several: bool = False) -> Iterator["Call"]:
    """A call, and while it lasts autograd is off and running statistics stay."""
    with torch.inference_mode(False), torch.no_grad(), still(module_of(model)):
        yield Call(attack, model, inputs, criterion, several)


class Call:
    """What an attack was given, checked.

    images: the inputs, detached; clean: the same as iterates are kept, float32 for 16-bit ones; the model sees the
    images' dtype. labels: those to leave (sign 1) or to reach (sign -1). several: is there more than one epsilon?
    view: the source that gradients are taken on, None: on the model itself.
    """

    def __init__(self, attack: Caller, model: Any, inputs: Any, criterion: Any, several: bool):
        theirs = library("foolbox")
        self.attack, self.model, self.several = attack, model, several
        self.restore: Callable[[Tensor], Any] = (lambda t: t) if isinstance(inputs, Tensor) else wrapped
        self.images = for_autograd(getattr(inputs, "raw", inputs).detach())
        self.bounds = model.bounds
        self._verify_bounds()
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
        self.clean, self.view = widen(self.images), self._view()
        self._loss = attack.get_loss_fn(model, wrapped(self.labels))
        self._at_clean: Tensor | None = None

    def _verify_bounds(self) -> None:
        low, high = torch.stack(torch.aminmax(self.images)).tolist()
        if not (low >= self.bounds.lower and high <= self.bounds.upper):
            raise AssertionError(f"{type(self.attack).__name__}: inputs must be in the model's bounds "
                                 f"[{self.bounds.lower}, {self.bounds.upper}], got [{low}, {high}]")

    def _view(self) -> View | None:
        """Where gradients are a source's: if that is asked for, and can be; else it is said why not."""
        if not is_fast(self.attack.precision):
            return None
        why = self.attack.why_exact() or why_no_source(self.model, self.images)
        if why is None and (self.labels.dtype != torch.int64 or self.labels.dim() != 1):
            why = "its labels are not int64 [N]"
        if why is None:
            return viewed(self.model, self.images)
        warnings.warn(f"{type(self.attack).__name__}: is exact, not fast, since {why}", stacklevel=6)
        return None

    def gradient(self, point: Tensor) -> Tensor:
        """Of the summed cross-entropy, up to a positive factor per sample. Not to be written to: that at the clean
        images serves every epsilon, as long as the forward pass draws nothing."""
        if point is not self.clean or not self.several:
            return self._gradient(point)
        if self._at_clean is None:
            before = _drawn(point.device)
            grad = self._gradient(point)
            if _drawn(point.device) != before:
                return grad
            self._at_clean = grad
        return self._at_clean

    def _gradient(self, point: Tensor) -> Tensor:
        if self.view is not None:
            turned = self.view.turned
            return turned(self.view.source.input_grad(turned(point), self.labels).grad)
        with torch.enable_grad():
            leaf = point.detach().to(self.images.dtype).requires_grad_()
            (grad,) = torch.autograd.grad(self._loss(wrapped(leaf)).raw, leaf)
        return grad.to(self.clean.dtype)

    def result(self, point: Tensor, epsilon: float, norm: str) -> Tensor:
        """In the images' dtype: 16-bit ones within epsilon. Never the images themselves."""
        if point.dtype != self.images.dtype:
            return ops.project(point, self.clean, epsilon, norm=norm, lo=self.bounds.lower, hi=self.bounds.upper,
                               out=torch.empty_like(self.images))
        return point.clone() if point is self.images else point

    def clipped(self, perturbed: Tensor, epsilon: float) -> Tensor:
        """As the library clips; what is rounded within epsilon is not rounded out of it again."""
        if perturbed.dtype != self.clean.dtype:
            return perturbed.clone()
        return self.attack.distance.clip_perturbation(self.images, perturbed, epsilon)

    def fooled(self, images: Tensor) -> Tensor:
        """bool [N], by the model itself."""
        images = wrapped(images)
        return self.criterion(images, self.model(images)).raw


def _drawn(device: torch.device) -> tuple[bytes, ...]:
    """Where torch's generators stand."""
    states = [torch.get_rng_state()]
    if device.type == "cuda":
        states.append(torch.cuda.get_rng_state(device))
    return tuple(state.numpy().tobytes() for state in states)
