"""The two attacks: the library's checks, then its steps exactly, or our attack."""
import importlib
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import attacks, ops
from ...ops.memory import widen
from ...sources.base import for_autograd
from ...sources.modes import still
from .. import source_cache
from ..installing import import_library
from ..precisions import check_precision, is_fast
from ..steps import zero_nan

TINY = 1e-12  # the least squared norm that is divided by
Model = Callable[[Tensor], Tensor]


def fast_gradient_method(model_fn: Model, x: Tensor, eps: float, norm: float, clip_min: float | None = None,
                         clip_max: float | None = None, y: Tensor | None = None, targeted: bool = False,
                         sanity_checks: bool = False, *, precision: str | None = None) -> Tensor:
    """The fast gradient method (Goodfellow et al. 2015), in the L-inf, L2 or L1 ball.

    Args:
        model_fn: gives logits [N, C] for x [N, ...]; a torch.nn.Module or any other callable.
        x: images, in any range. eps: size of the step, in their units; with 0 the result is x itself.
        norm: numpy.inf, 2 or 1.
        clip_min, clip_max: the range of pixels, both or neither; without them nothing is clipped.
        y: labels int64 [N] to leave, or with `targeted` to reach; default: the model's predictions.
        sanity_checks: assert that x lies in the range.
        precision: "exact", "fast", or None for what :func:`ensadv_fast.compat.precision` chose. The library has no such
            argument.

    Returns:
        Images of x's shape, without autograd history: of x's dtype where that is the module's own, else float32.

    Raises:
        ValueError, AssertionError: where the library raises them.
    """
    if norm not in (np.inf, 1, 2):
        raise ValueError(f"fast_gradient_method: norm must be np.inf, 1 or 2, got {norm!r}")
    _check_not_negative("fast_gradient_method", "eps", eps)
    if eps == 0:
        return x
    box = _check_box("fast_gradient_method", clip_min, clip_max)
    if sanity_checks:
        _check_range("fast_gradient_method", x, box)
    call = Call("fast_gradient_method", model_fn, x, y, norm, box, targeted, precision)
    make = attacks.fgsm if norm == np.inf else attacks.fast_grad_l2
    return call.result(lambda: make(eps, **call.options), lambda: call.take_single_step(eps), eps,
                       why="norm is 1" if norm == 1 else None)


def projected_gradient_descent(model_fn: Model, x: Tensor, eps: float, eps_iter: float, nb_iter: int, norm: float,
                               clip_min: float | None = None, clip_max: float | None = None, y: Tensor | None = None,
                               targeted: bool = False, rand_init: bool = True, rand_minmax: float | None = None,
                               sanity_checks: bool = True, *, precision: str | None = None) -> Tensor:
    """Projected gradient descent (Madry et al. 2018) in the L-inf or L2 ball; without `rand_init` the basic iterative
    method (Kurakin et al. 2017).

    Args:
        eps: radius of the ball; eps_iter: length of a step, at most eps; with 0 for either the result is x itself.
        nb_iter: steps.
        norm: numpy.inf or 2.
        rand_init: start at x + U(-rand_minmax, rand_minmax), projected; rand_minmax defaults to eps.
        The others, and what is returned: as in :func:`fast_gradient_method`.

    Raises:
        NotImplementedError (norm 1), ValueError, AssertionError: where the library raises them.
    """
    op = "projected_gradient_descent"
    _check_norm(op, norm)
    for name, value in (("eps", eps), ("eps_iter", eps_iter)):
        _check_not_negative(op, name, value)
        if value == 0:
            return x
    if eps_iter > eps:
        raise AssertionError(f"{op}: eps_iter must not exceed eps, got eps_iter={eps_iter}, eps={eps}")
    box = _check_box(op, clip_min, clip_max)
    if sanity_checks:
        _check_range(op, x, box)
        if norm == np.inf and eps + box[0] > box[1]:
            raise AssertionError(f"{op}: eps must not exceed clip_max - clip_min, got {eps}")
    call = Call(op, model_fn, x, y, norm, box, targeted, precision)
    make = attacks.pgd if norm == np.inf else attacks.pgd_l2
    why = "it takes no step" if nb_iter < 1 else None
    if rand_init and rand_minmax not in (None, eps):
        why = "rand_minmax is not eps"
    reach = eps if rand_minmax is None else rand_minmax
    return call.result(lambda: make(eps, eps_iter, nb_iter, rand_init, **call.options),
                       lambda: call.take_steps(eps, eps_iter, nb_iter, reach if rand_init else None), eps, why)


def _check_norm(op: str, norm: float) -> None:
    if norm == 1:
        raise NotImplementedError(f"{op}: norm must be np.inf or 2: an L1 step changes one pixel at a time")
    if norm not in (np.inf, 2):
        raise ValueError(f"{op}: norm must be np.inf or 2, got {norm!r}")


def _check_not_negative(op: str, name: str, value: float) -> None:
    if value < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")


def _check_box(op: str, clip_min: float | None, clip_max: float | None) -> tuple[float, float]:
    """The range of pixels, infinite where none is given."""
    if clip_min is None and clip_max is None:
        return -torch.inf, torch.inf
    if clip_min is None or clip_max is None:
        raise ValueError(f"{op}: clip_min and clip_max must be given both or neither, got {clip_min} and {clip_max}")
    if clip_min > clip_max:
        raise ValueError(f"{op}: clip_min must not exceed clip_max, got clip_min={clip_min} and clip_max={clip_max}")
    return float(clip_min), float(clip_max)


def _check_range(op: str, x: Tensor, box: tuple[float, float]) -> None:
    """What sanity_checks ask for: one reduction of x, and one host sync."""
    if box[0] == -torch.inf or not x.numel():
        return
    if not bool(((x >= box[0]) & (x <= box[1])).all()):
        low, high = (t.item() for t in torch.aminmax(x))
        raise AssertionError(f"{op}: x must be in [clip_min, clip_max] = [{box[0]}, {box[1]}], got [{low}, {high}]")


class Call:
    """One call of an attack, its arguments checked.

    images: x in `dtype`, which the model sees. clean: the same in the dtype of iterates, float32 for 16-bit images.
    """

    def __init__(self, op: str, model_fn: Model, x: Tensor, y: Tensor | None, norm: float, box: tuple[float, float],
                 targeted: bool, precision: str | None):
        for name, value in (("x", x), ("y", y)):
            if not isinstance(value, Tensor) and not (value is None and name == "y"):
                raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(value).__name__}")
        self.op, self.model_fn, self.norm, self.targeted = op, model_fn, norm, targeted
        self.lo, self.hi = box
        self.is_fast = is_fast(check_precision(op, precision))
        self.module = model_fn if isinstance(model_fn, nn.Module) else None
        tensors = () if self.module is None else (*self.module.parameters(), *self.module.buffers())
        own = next((t.dtype for t in tensors if t.is_floating_point()), None)
        self.dtype = x.dtype if x.dtype == own else torch.float32
        with torch.inference_mode(False):
            self.x, self.labels = for_autograd(x), for_autograd(y)
            self.images = self.x.detach().to(self.dtype)
            self.clean = widen(self.images)
        self.options: dict[str, Any] = {"targeted": targeted, "lo": self.lo, "hi": self.hi}

    def result(self, make_attack: Callable[[], attacks.Attack], take_exact: Callable[[], Tensor], eps: float,
               why: str | None) -> Tensor:
        """The adversarial images in `dtype`, detached: by our attack where fast is chosen and possible, else by the
        exact steps. why: a reason against our attack that the caller knows, or None."""
        with torch.inference_mode(False), torch.no_grad():
            if self.is_fast:
                why = why or self._why_exact()
                if why is None:
                    assert self.module is not None  # otherwise _why_exact gives a reason
                    return make_attack()(source_cache.get_source(self.module), self.images, self.labels)
                warnings.warn(f"{self.op}: is exact, not fast, since {why}", stacklevel=3)
            with still(self.module):
                point = take_exact()
            if point.dtype == self.dtype:
                return point
            # 16-bit results are rounded within eps. For norm 1 the L2 ball does: the L1 ball of this size lies in it.
            return ops.project(point, self.clean, float(eps), norm="linf" if self.norm == np.inf else "l2", lo=self.lo,
                               hi=self.hi, out=torch.empty_like(self.images))

    def _why_exact(self) -> str | None:
        """Why a source cannot do this call, or None."""
        if self.module is None:
            return "its model is no torch.nn.Module"
        if any(m.training for m in self.module.modules()):
            return "its model is in training mode"
        if self.dtype == torch.float64:
            return "its images are float64"
        if self.labels is None:
            return "it is targeted, without labels" if self.targeted else None
        return "its labels are not int64 [N]" if self.labels.dtype != torch.int64 or self.labels.dim() != 1 else None

    def _choose_labels(self) -> Tensor:
        """The labels given, or the predictions. These take a forward pass of their own, as in the library: a model may
        draw random numbers."""
        return torch.max(self.model_fn(self.images), 1).indices if self.labels is None else self.labels

    def gradient(self, point: Tensor, labels: Tensor) -> Tensor:
        """The gradient of the mean cross-entropy by the point; where targeted, of its negative."""
        with torch.enable_grad():
            leaf = point.detach().to(self.dtype).requires_grad_()
            cost = F.cross_entropy(self.model_fn(leaf), labels)
            (grad,) = torch.autograd.grad(-cost if self.targeted else cost, leaf)
        return grad

    def take_single_step(self, eps: float) -> Tensor:
        """One step of length eps from the images, clipped."""
        grad = self.gradient(self.images, self._choose_labels())
        if self.norm == np.inf:
            return ops.sign_step(self.images, grad, float(eps), lo=self.lo, hi=self.hi)
        return self._move(self.clean, grad, eps, torch.empty_like(self.clean))

    def take_steps(self, eps: float, eps_iter: float, nb_iter: int, reach: float | None) -> Tensor:
        """Steps of length eps_iter, each projected on the ball. reach: of the random start, None for none."""
        point = self._project(torch.zeros_like(self.clean) if reach is None else self._draw_noise(reach), eps)
        labels, other = self._choose_labels(), torch.empty_like(point)
        for _ in range(nb_iter):
            moved = self._move(point, self.gradient(point, labels), eps_iter, other)
            point, other = self._project(moved.sub_(self.clean), eps), point
        return point

    def _draw_noise(self, reach: float) -> Tensor:
        """U(-reach, reach) in the dtype of iterates, drawn in x's dtype as the library does."""
        return torch.empty_like(self.x, dtype=None if self.x.is_floating_point() else self.dtype,
                                requires_grad=False).uniform_(-reach, reach).to(self.clean.dtype)

    def _move(self, point: Tensor, grad: Tensor, length: float, out: Tensor) -> Tensor:
        """clamp(point + length * direction), written into `out`, which is not the point."""
        grad = grad.to(self.clean.dtype)
        if self.norm == np.inf:
            torch.sign(grad, out=out).nan_to_num_(nan=0.0).mul_(length)
        elif self.norm == 2:
            grad = zero_nan(grad)
            torch.div(grad, _norms(grad), out=out).mul_(length)
        else:
            import_library("cleverhans")
            out.copy_(importlib.import_module("cleverhans.torch.utils").optimize_linear(grad, length, 1))
        return self._clamp(out.add_(point))

    def _project(self, delta: Tensor, eps: float) -> Tensor:
        """clamp(x + delta projected on the ball), written into delta. This is the library's order, which rounds
        otherwise than our kernel's."""
        if self.norm == np.inf:
            delta.clamp_(-eps, eps)
        else:
            delta.mul_((eps / _norms(delta)).clamp_(max=1.0))
        return self._clamp(delta.add_(self.clean))

    def _clamp(self, point: Tensor) -> Tensor:
        return point if self.lo == -torch.inf else point.clamp_(self.lo, self.hi)


def _norms(t: Tensor) -> Tensor:
    """L2 norm of each sample, shaped to broadcast, at least 1e-6; summed as the library does."""
    return t.square().sum(list(range(1, t.dim())), keepdim=True).clamp_(min=TINY).sqrt_()
