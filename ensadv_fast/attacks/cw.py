"""The attack of Carlini & Wagner in the L-inf norm, as the black-box suite of Tramer et al. 2018 runs it."""
import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from ..ops import checks, memory
from ..sources.base import BaseSource, InputGrad
from .base import BaseAttack
from .options import SearchOptions
from .request import AttackResult, Budget, Keys, Request

if TYPE_CHECKING:
    from typing_extensions import Unpack

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
        checks.choice(op, "loss", self.loss, ("cw",))
        for name in ("max_iterations", "check_every"):
            checks.integer(op, name, getattr(self, name), least=1)
        for name, least in (("learning_rate", 0), ("initial_const", 0), ("const_factor", 1)):
            if checks.finite(op, name, getattr(self, name)) <= least:
                raise ValueError(f"{op}: {name} must be > {least}, got {getattr(self, name)}")
        if checks.finite(op, "largest_const", self.largest_const) <= self.initial_const:
            raise ValueError(f"{op}: largest_const must be > initial_const = {self.initial_const}, "
                             f"got {self.largest_const}")
        checks.flag(op, "abort_early", self.abort_early)

    @property
    def _draws_noise(self) -> bool:
        return False

    def _sizes(self, x: Tensor, eps: float | Tensor) -> Budget:
        return self._budget(x, eps)

    def _worst_of(self, source: BaseSource, request: Request, keys: Keys) -> AttackResult:
        search = _Search(self, source, request, keys)
        const = self.initial_const
        while const < self.largest_const and len(search.todo.rows):
            search.run(const)
            const *= self.const_factor
        assert search.labels is not None  # chosen in the first iteration
        return AttackResult(self._into_ball(search.best, request), search.labels, search.loss, search.success)


class _Search:
    """The search of a whole batch: what is found so far (best, loss, success), and the samples still searched for."""

    def __init__(self, attack: CwLinf, source: BaseSource, request: Request, keys: Keys) -> None:
        self.attack, self.source, self.request, self.keys = attack, source, request, keys
        self.todo = _Samples.start(memory.widen(request.x), request.sizes.eps)
        self.best, self.loss, self.success = (t.clone() for t in (self.todo.best, self.todo.loss, self.todo.success))
        self.labels: Tensor | None = None
        self.iterations = 0  # of Adam, over all constants
        self.last: tuple[Tensor, InputGrad, Tensor]  # of the last iteration: point, pass, which samples met the aim

    def run(self, const: float) -> None:
        """All iterations for one constant; then the samples that are near enough to the ball go on to the next."""
        attack = self.attack
        for iteration in range(1, attack.max_iterations + 1):
            slack = self.iterate(const)
            if iteration % attack.check_every == 0 and iteration < attack.max_iterations:
                self.leave(~self.todo.found)
                if not len(self.todo.rows):
                    return
        todo, point, passed, met = self.todo, *self.last
        small = ~todo.found & (slack < _SLACK * todo.eps)
        todo.keep(point, passed.loss, met, small)
        self.leave(small)

    def iterate(self, const: float) -> Tensor:
        """One step of Adam; the second term of the objective, per sample."""
        attack, todo = self.attack, self.todo
        raw = todo.clean + todo.change
        point = raw.clamp(attack.lo, attack.hi)
        passed = self.forward_backward(point)
        met = attack.succeeded(passed.logits, passed.labels)
        if self.labels is None:
            self.labels = passed.labels
            todo.keep(point, passed.loss, met, torch.ones_like(met))  # where nothing is found: the clean image
        moved = point - todo.clean
        excess = moved.abs() - memory.broadcast(todo.eps, moved)
        slack = excess.clamp(min=0).flatten(1).sum(1)
        if attack.abort_early:
            found = met & (const * passed.loss.abs() + slack < _ENOUGH * const) & ~todo.found
            todo.keep(point, passed.loss, met, found)
            todo.found.logical_or_(found)
        # The gradient of const * hinge + slack by the change, through the clip. Untargeted, the loss that attacks
        # ascend is the hinge with its sign turned.
        grad = passed.grad * (const if attack.targeted else -const) + moved.sign() * (excess > 0)
        self.iterations += 1
        todo.adam(grad * ((raw >= attack.lo) & (raw <= attack.hi)), attack.learning_rate, self.iterations)
        self.last = point, passed, met
        return slack

    def forward_backward(self, point: Tensor) -> InputGrad:
        request, objective = self.request, self.attack.objective
        if self.labels is None:  # the index belongs to the draw of labels, before any sample has left
            return self.source.input_grad_unchecked(point, request.y, objective, key=self.keys.labels,
                                                    index=request.index, rescale=False)
        return self.source.input_grad_unchecked(point, self.labels[self.todo.rows], objective.of_labels, rescale=False)

    def leave(self, stay: Tensor) -> None:
        """Write down all that was found, and go on with the samples that stay. One look at values."""
        todo = self.todo
        self.best[todo.rows], self.loss[todo.rows], self.success[todo.rows] = todo.best, todo.loss, todo.success
        rows = stay.nonzero().squeeze(1)
        if len(rows) < len(stay):
            self.todo = todo.only(rows)


class _Samples(NamedTuple):
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
    def start(clean: Tensor, eps: float | Tensor) -> "_Samples":
        n, change = len(clean), torch.zeros_like(clean)
        none = torch.zeros(n, dtype=torch.bool, device=clean.device)
        return _Samples(torch.arange(n, device=clean.device), clean, eps, clean.clone(), clean.new_zeros(n), none,
                        none.clone(), change, change.clone(), change.clone())

    def only(self, rows: Tensor) -> "_Samples":
        eps = self.eps[rows] if isinstance(self.eps, Tensor) else self.eps
        return self._replace(eps=eps, **{f: getattr(self, f)[rows] for f in self._fields if f != "eps"})

    def keep(self, point: Tensor, loss: Tensor, success: Tensor, where: Tensor) -> None:
        """Take these as the best there is of some samples."""
        torch.where(memory.broadcast(where, point), point, self.best, out=self.best)
        torch.where(where, loss.to(self.loss.dtype), self.loss, out=self.loss)
        torch.where(where, success, self.success, out=self.success)

    def adam(self, grad: Tensor, rate: float, t: int) -> None:
        self.first.lerp_(grad, 1 - _BETA1)
        self.second.mul_(_BETA2).addcmul_(grad, grad, value=1 - _BETA2)
        rate *= math.sqrt(1 - _BETA2**t) / (1 - _BETA1**t)
        self.change.addcdiv_(self.first, self.second.sqrt().add_(_EPSILON), value=-rate)


def cw_linf(eps: float = 8 / 255, **kw: "Unpack[SearchOptions]") -> CwLinf:
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
