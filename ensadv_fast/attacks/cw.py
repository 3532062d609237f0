"""The attack of Carlini & Wagner in the L-inf norm, as the black-box suite of Tramer et al. 2018 runs it."""
import math
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import checks, memory
from ..sources.base import BaseSource
from .base import AttackResult, BaseAttack, Sizes, over, wide

_BETA1, _BETA2, _EPSILON = 0.9, 0.999, 1e-8  # Adam's own, as TensorFlow's optimizer applies them
_ENOUGH, _SLACK = 1e-4, 0.1


@dataclass(frozen=True)
class CwLinf(BaseAttack):
    """C&W-L-inf; :func:`cw_linf` makes one and says what it does."""

    loss: str = "cw"
    max_iterations: int = 1000
    learning_rate: float = 5e-3
    initial_const: float = 1e-3
    largest_const: float = 20.0
    const_factor: float = 10.0
    abort_early: bool = True
    check_every: int = 50

    def __post_init__(self) -> None:
        super().__post_init__()
        op = self.name
        if self.loss != "cw":
            raise ValueError(f"{op}: loss must be cw, got {self.loss!r}")
        for name in ("max_iterations", "check_every"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{op}: {name} must be >= 1, got {value}")
        for name, least in (("learning_rate", 0), ("initial_const", 0), ("const_factor", 1)):
            if checks.finite(op, name, getattr(self, name)) <= least:
                raise ValueError(f"{op}: {name} must be > {least}, got {getattr(self, name)}")
        if checks.finite(op, "largest_const", self.largest_const) <= self.initial_const:
            raise ValueError(f"{op}: largest_const must exceed initial_const = {self.initial_const}, "
                             f"got {self.largest_const}")
        if not isinstance(self.abort_early, bool):
            raise TypeError(f"{op}: abort_early must be a bool, got {type(self.abort_early).__name__}")

    @property
    def _draws(self) -> bool:
        return False

    def _sizes(self, x: Tensor, eps: float | Tensor) -> Sizes:
        tensor, number = checks.per_sample(self.name, "eps", eps, x, is_size=True)
        eps = number if tensor is None else tensor
        return Sizes(eps, eps, eps, self.max_iterations, eps)

    def _worst_of(self, source: BaseSource, x: Tensor, y: Tensor | None, sizes: Sizes, start_key: Tensor | None,
                  label_key: Tensor | None, index: Tensor | None, out: Tensor | None) -> AttackResult:
        clean = wide(x)
        todo = _Search.begun(clean, sizes.eps)
        best, loss, success = (t.clone() for t in (todo.best, todo.loss, todo.success))
        labels, const, t = None, self.initial_const, 0

        def leave(stay: Tensor) -> _Search:
            """Write down all that was found, and go on with the samples that stay. One look at values."""
            best[todo.rows], loss[todo.rows], success[todo.rows] = todo.best, todo.loss, todo.success
            rows = stay.nonzero().squeeze(1)
            return todo if len(rows) == len(stay) else todo.only(rows)

        while const < self.largest_const and len(todo.rows):
            for iteration in range(self.max_iterations):
                raw = todo.clean + todo.change
                point = raw.clamp(self.lo, self.hi)
                # The index belongs to the draw of labels, before any sample has left.
                given, rule, at = (y, self.rule, index) if labels is None else (labels[todo.rows], "true", None)
                passed = source.input_grad_unchecked(point, given, rule, self.targeted, "cw", self.kappa, label_key,
                                                     at, rescale=False)
                met = self._met(passed.logits, passed.labels)
                if labels is None:
                    labels = passed.labels
                    todo.keep(point, passed.loss, met, torch.ones_like(met))  # where nothing is found: the clean image
                moved = point - todo.clean
                excess = moved.abs() - over(todo.eps, moved)
                slack = excess.clamp(min=0).flatten(1).sum(1)
                if self.abort_early:
                    found = met & (const * passed.loss.abs() + slack < _ENOUGH * const) & ~todo.found
                    todo.keep(point, passed.loss, met, found)
                    todo.found.logical_or_(found)
                # The gradient of const * hinge + slack by the change, through the clip. Untargeted, the loss that
                # attacks ascend is the hinge with its sign turned.
                grad = passed.grad * (const if self.targeted else -const) + moved.sign() * (excess > 0)
                t += 1
                todo.adam(grad * ((raw >= self.lo) & (raw <= self.hi)), self.learning_rate, t)
                if (iteration + 1) % self.check_every == 0 and iteration + 1 < self.max_iterations:
                    todo = leave(~todo.found)
                    if not len(todo.rows):
                        break
            else:
                small = ~todo.found & (slack < _SLACK * todo.eps)
                todo.keep(point, passed.loss, met, small)
                todo = leave(small)
                const *= self.const_factor
        target = torch.empty_like(x) if out is None and memory.result_dtype(x) != clean.dtype else out
        x_adv = ops.project(best, clean, sizes.eps, lo=self.lo, hi=self.hi, out=target)
        assert labels is not None  # chosen in the first iteration
        return AttackResult(x_adv, labels, loss, success)


class _Search(NamedTuple):
    """The samples that are searched for. rows: int64 [n], where they stand in the batch; best, loss, success: what is
    returned for each, as it stands; found: bool [n], it is final; change and Adam's moments: the variable."""

    rows: Tensor
    clean: Tensor
    eps: float | Tensor
    best: Tensor
    loss: Tensor
    success: Tensor
    found: Tensor
    change: Tensor
    first: Tensor
    second: Tensor

    @staticmethod
    def begun(clean: Tensor, eps: float | Tensor) -> "_Search":
        n, change = len(clean), torch.zeros_like(clean)
        none = torch.zeros(n, dtype=torch.bool, device=clean.device)
        return _Search(torch.arange(n, device=clean.device), clean, eps, clean.clone(), clean.new_zeros(n), none,
                       none.clone(), change, change.clone(), change.clone())

    def only(self, rows: Tensor) -> "_Search":
        eps = self.eps[rows] if isinstance(self.eps, Tensor) else self.eps
        return self._replace(eps=eps, **{f: getattr(self, f)[rows] for f in self._fields if f != "eps"})

    def keep(self, point: Tensor, loss: Tensor, success: Tensor, where: Tensor) -> None:
        """Take these as the best there is of some samples."""
        torch.where(over(where, point), point, self.best, out=self.best)
        torch.where(where, loss.to(self.loss.dtype), self.loss, out=self.loss)
        torch.where(where, success, self.success, out=self.success)

    def adam(self, grad: Tensor, rate: float, t: int) -> None:
        self.first.lerp_(grad, 1 - _BETA1)
        self.second.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
        rate *= math.sqrt(1 - _BETA2**t) / (1 - _BETA1**t)
        self.change.addcdiv_(self.first, self.second.sqrt().add_(_EPSILON), value=-rate)


def cw_linf(eps: float = 8 / 255, **kw: Any) -> CwLinf:
    """C&W-L-inf: Carlini & Wagner 2017, section VI.C, with tau fixed at eps, as Tramer et al. 2018 ran it on MNIST.

    For each sample minimise c * max(0, Z_y - max_{i != y} Z_i + kappa) + sum_j max(0, abs(d_j) - eps) over d by Adam,
    x + d clipped to the box (targeted: max_i Z_i - Z_y). c starts at initial_const and grows by const_factor while it
    is under largest_const; d and Adam's moments go on. A sample is done as soon as the sum is under 1e-4 c and the aim
    is met (abort_early). At the end of max_iterations for one c, a sample whose second term is 0.1 eps or more gets
    what the c before ended with (the clean image, if it was the first); the others go on from where they are. The
    result is clipped to the ball, of which it may stick out by less than that.

    Keywords: those of every attack, but loss; max_iterations=1000, learning_rate=5e-3, initial_const=1e-3,
    largest_const=20, const_factor=10, abort_early=True, the released MNIST code's; there kappa is 100 by default and
    eps 0.3, and transferred examples were made with them: kappa is how far the margin shall go, and 0 stops at the
    border. That many steps of learning_rate should reach eps: 100 iterations do where eps is 0.3.

    A batch is searched as a whole, every sample for itself: c is in step, because a sample that goes on to the next
    has spent all iterations of the last. What is done leaves the batch every check_every iterations, the only times
    (and the ends of each c) that a value is looked at: one synchronisation each on a GPU, and no CUDA graph. Losses
    and aims are those of the point that is returned, which TensorFlow's order of evaluation leaves open.
    """
    return CwLinf("cw_linf", eps, **kw)
