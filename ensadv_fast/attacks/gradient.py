"""Attacks that follow gradients, and the one loop that all of them are."""
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops import checks
from ..ops.keys import split
from ..ops.losses import LOSSES, choose_labels
from ..ops.memory import broadcast, result_dtype, widen
from ..sources.base import BaseSource, InputGrad
from . import entropy
from .base import BaseAttack
from .request import AttackResult, Keys, Request
from .transforms import Transform, VarianceTuning
from .views import ViewedGradient

STARTS = (None, "rademacher", "uniform", "truncated_normal")
DIRECTIONS = ("sign", "l2", "max")


class Sizes(NamedTuple):
    """An attack's sizes for one call: numbers, or tensors [N] where eps is one. reach: of the neighbours of vt."""

    eps: float | Tensor
    start: float | Tensor
    step: float | Tensor
    steps: int
    reach: float | Tensor


@dataclass(frozen=True)
class Attack(BaseAttack):
    """An attack that follows gradients: random start, label, then steps, each projected on the ball and the box.

    Make one with a constructor of :mod:`ensadv_fast.attacks`; ``dataclasses.replace`` varies it.

    start: None, "rademacher", "uniform" or "truncated_normal"; alpha: size of a rademacher start (None: eps / 2), taken
    from the budget; the others fill the ball. clip_start: clip to the box before the first gradient. steps: gradient
    steps; step: size of each. Where None, both follow from eps as the constructor says. direction: "sign"; "l2", the
    gradient over its L2 norm, in the L2 ball; "max", the gradient over its largest element. restarts: runs from
    different starts, the worst kept per sample. loss: as everywhere; a callable (logits [N, ...], y) -> [N]
    that autograd follows, with whatever y it takes (BCE, focal, multi-hot targets); "entropy", that of the predicted
    distribution; or None: no gradient is followed, the start alone is the attack and takes the whole of eps.

    What is iterated can be combined freely. With x_t the iterate, g_t the momentum and the signed step a (negative
    where targeted), g_0 = v_0 = 0:

    - transforms: :func:`di`, :func:`si` and :func:`ti`. G(x) is the gradient of the loss at x under di and si, the
      mean over si's copies, each with its own draw of di; W ti's convolution.
    - nesterov (Lin et al. 2020): the gradient is taken at x_t + a * momentum * g_t instead of x_t; it needs momentum.
      As in the authors' code and all ports, g is normalised by the mean, not by the L1 norm that equation 6 has.
    - variance, :func:`vt` or its n (Wang & He 2021): v_{t+1} = mean_i G(x_t + r_i) - (this step's G); with nesterov,
      too, the neighbours are x_t's, as in the authors' code. (TransferAttack takes x_t's lookahead along the momentum
      just updated, and says that it is inconsistent.)
    - momentum, the decay of g (Dong et al. 2018, equation 6): g_{t+1} = momentum * g_t + D / mean(abs(D)) per sample,
      D = W * (G + v_t). Without it the step follows D.

    One forward and backward pass per step, times si's copies, times 1 + n (not in the last step).
    """

    start: str | None = None
    alpha: float | None = None
    clip_start: bool = True
    steps: int | None = 1
    step: float | None = None
    step_over_eps: float | None = None
    direction: str = "sign"
    restarts: int = 1
    transforms: tuple[Transform, ...] = ()
    momentum: float | None = None
    nesterov: bool = False
    variance: VarianceTuning | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = self.name
        if not callable(self.loss):
            checks.choice(op, "loss", self.loss, (*LOSSES, "entropy", None))
        checks.choice(op, "start", self.start, STARTS)
        checks.choice(op, "direction", self.direction, DIRECTIONS)
        for name in ("step", "alpha"):
            if getattr(self, name) is not None:
                checks.size(op, name, getattr(self, name))
        if self.steps is not None:
            checks.integer(op, "steps", self.steps, least=1)
        checks.integer(op, "restarts", self.restarts, least=1)
        checks.flag(op, "nesterov", self.nesterov)
        if not isinstance(self.transforms, (tuple, list)):
            raise TypeError(f"{op}: transforms must be a sequence, got {type(self.transforms).__name__}")
        for t in self.transforms:
            if not isinstance(t, Transform):
                raise TypeError(f"{op}: transforms must be di(...), si(...) or ti(...) each, got {type(t).__name__}")
        object.__setattr__(self, "transforms", tuple(self.transforms))  # the attack is frozen, and stays hashable
        if self.momentum is not None:
            object.__setattr__(self, "momentum", checks.finite(op, "momentum", self.momentum))
        if isinstance(self.variance, int) and not isinstance(self.variance, bool):
            object.__setattr__(self, "variance", VarianceTuning(self.variance))
        if not isinstance(self.variance, VarianceTuning | None):
            raise TypeError(f"{op}: variance must be vt(...) or an int, got {type(self.variance).__name__}")
        self._check_combinations()

    def _check_combinations(self) -> None:
        """ValueError where two options do not go together."""
        op = self.name
        if self.restarts > 1 and self.start is None:
            raise ValueError(f"{op}: start must be random where restarts > 1, got None")
        if self.loss is None and (self.start is None or self.restarts > 1 or self.direction == "l2"):
            raise ValueError(f"{op}: loss None is a random start alone, got start {self.start!r}, "
                             f"restarts {self.restarts}, direction {self.direction!r}")
        if self.direction == "l2" and self.start not in (None, "uniform"):
            raise ValueError(f"{op}: start must be None or 'uniform' in the L2 ball, got {self.start!r}")
        if self.alpha is not None and self.alpha > self.eps:
            raise ValueError(f"{op}: alpha must be <= eps = {self.eps}, of which it is a part, got {self.alpha}")
        if self.nesterov and self.momentum is None:
            raise ValueError(f"{op}: momentum must be a number where nesterov looks ahead along it, got None")

    @property
    def capturable(self) -> bool:
        return self.loss is not None and not callable(self.loss)

    @property
    def norm(self) -> str:
        """Of the ball: "linf" or "l2"."""
        return "l2" if self.direction == "l2" else "linf"

    @property
    def _draws_noise(self) -> bool:
        return self.start is not None or self.variance is not None or any(t.draws for t in self.transforms)

    def _sizes(self, x: Tensor, eps: float | Tensor) -> Sizes:
        for t in self.transforms:
            t.check(self.name, x)
        (eps,) = self._budget(x, eps)
        steps = self.steps
        if steps is None:
            # Kurakin et al. 2017: min(eps + 4, 1.25 eps) in units of 1/255. With eps per sample, the attack's own.
            eps255 = 255 * (self.eps if isinstance(eps, Tensor) else eps)
            steps = max(1, int(round(min(eps255 + 4, 1.25 * eps255), 6)))
        start = self._start_size(eps)
        step = eps - start if self.start == "rademacher" and self.loss is not None else eps
        if self.step is not None:
            step = self.step
        elif self.step_over_eps is not None:
            step = self.step_over_eps * eps
        return Sizes(eps, start, step, steps, 0.0 if self.variance is None else self.variance.beta * eps)

    def _start_size(self, eps: float | Tensor) -> float | Tensor:
        """eps, but for a random sign before a gradient step: it has alpha of the budget."""
        if self.start != "rademacher" or self.loss is None:
            return eps
        if self.alpha is None:
            return eps / 2
        if isinstance(eps, Tensor):
            return eps.clamp(max=self.alpha)
        if self.alpha > eps:
            raise ValueError(f"{self.name}: alpha must be <= eps = {eps}, of which it is a part, got {self.alpha}")
        return self.alpha

    def _worst_of(self, source: BaseSource, request: Request, keys: Keys) -> AttackResult | Tensor:
        """One run, or several from different starts: of these, per sample the example on which the loss ended worst."""
        x = request.x
        if self.loss is None:
            assert keys.start is not None and self.start is not None
            return ops.random_step(x, keys.start, request.sizes.start, kind=self.start, index=request.index, lo=self.lo,
                                   hi=self.hi, out=request.out)
        labels = None
        first_is_clean = self.start is None and all(t.clean_first for t in self.transforms)
        if not first_is_clean and (self.rule != "true" or request.y is None):
            labels = choose_labels(source.logits(widen(x)), request.y, self.rule, keys.labels, request.index)
        if self.restarts == 1:
            return _Run(self, source, request, keys, labels).result()
        best = self._worst_restart(source, request, keys, labels)
        if request.out is None:
            return best
        if request.out.dtype == best.x_adv.dtype:
            return best._replace(x_adv=request.out.copy_(best.x_adv))
        return best._replace(x_adv=self._into_ball(best.x_adv, request, self.norm))

    def _worst_restart(self, source: BaseSource, request: Request, keys: Keys, labels: Tensor | None) -> AttackResult:
        assert keys.start is not None
        best: AttackResult | None = None
        for start in split(keys.start, self.restarts):
            run = _Run(self, source, request._replace(out=None), keys._replace(start=start), labels).result()
            labels = run.labels
            loss, logits = self._losses(source, widen(run.x_adv), labels)
            run = AttackResult(run.x_adv, labels, loss, self.succeeded(logits, labels))
            best = run if best is None else self._worse(best, run)
        assert best is not None
        return best

    def _worse(self, best: AttackResult, run: AttackResult) -> AttackResult:
        """Per sample: a success before a failure, then the loss that is further."""
        further = run.loss < best.loss if self.targeted else run.loss > best.loss
        worse = (run.success & ~best.success) | (further & (run.success == best.success))
        x_adv = torch.where(broadcast(worse, run.x_adv), run.x_adv, best.x_adv)
        return AttackResult(x_adv, run.labels, torch.where(worse, run.loss, best.loss), run.success | best.success)


class _StartKeys(NamedTuple):
    """The children of a start key: of a start in the L2 ball (direction, length), of neighbours, of each transform."""

    direction: Tensor | None
    length: Tensor | None
    neighbours: Tensor | None
    transforms: tuple[Tensor | None, ...]


class _Run:
    """One run of the loop: a start, then steps."""

    def __init__(self, attack: Attack, source: BaseSource, request: Request, keys: Keys,
                 labels: Tensor | None) -> None:
        self.attack, self.source, self.request, self.keys, self.labels = attack, source, request, keys, labels
        self.clean, self.sizes = widen(request.x), request.sizes
        self.own = self._children()
        self.neighbours = 0 if attack.variance is None else attack.variance.n
        evaluations = self.sizes.steps * (1 + self.neighbours)
        self.gradient = ViewedGradient(attack.transforms, self.clean, self.own.transforms, request.index, evaluations,
                                       averaged=self.neighbours > 0)
        self.around: Sequence[Tensor] = ()
        if self.own.neighbours is not None and self.neighbours:
            self.around = list(split(self.own.neighbours, self.sizes.steps * self.neighbours))
        self.momentum = None if attack.momentum is None else torch.zeros_like(self.clean)
        self.step = -self.sizes.step if attack.targeted else self.sizes.step
        self.within: dict[str, Any] = {"lo": attack.lo, "hi": attack.hi}
        # A single step from x itself cannot leave the ball, so the center need not be read.
        single = self.sizes.steps == 1 and attack.start is None and attack.step is None
        if not single or attack.step_over_eps is not None or attack.direction == "max":
            self.within |= {"center": self.clean, "eps": self.sizes.eps}

    def _children(self) -> _StartKeys:
        """A start in the L-inf ball takes the start key itself; all other draws take its children."""
        attack, n = self.attack, len(self.attack.transforms)
        if self.keys.start is None or not (attack.norm == "l2" or attack.variance is not None
                                           or any(t.draws for t in attack.transforms)):
            return _StartKeys(None, None, None, (None,) * n)
        direction, length, neighbours, *transforms = split(self.keys.start, 3 + n)
        return _StartKeys(direction, length, neighbours, tuple(transforms))

    def result(self) -> AttackResult:
        current, steps = self.started(), self.sizes.steps
        variance: Tensor | None = None  # of the gradient, of the step before
        for step in range(steps):
            number, last = step * (1 + self.neighbours), step == steps - 1
            passed, grad = self.gradient.at(self.looked_at(current, step), number, self.forward_backward)
            followed = grad if variance is None else grad + variance
            if self.neighbours and not last:
                variance = self.neighbours_mean(current, step).sub_(grad)
            current = self.stepped(current, self.gradient.smoothed(followed), self.target(current, last))
        return AttackResult(current, passed.labels, passed.loss,
                            self.attack.succeeded(passed.logits, passed.labels))

    def forward_backward(self, image: Tensor) -> InputGrad:
        """One forward and backward pass; the first chooses the labels where they are not given."""
        request, objective = self.request, self.attack.objective
        given = request.y if self.labels is None else self.labels
        objective = objective if self.labels is None else objective.of_labels
        if objective.loss == "entropy":
            passed = entropy.input_grad(self.source, image, given, objective.rule, self.keys.labels, request.index)
        else:
            passed = self.source.input_grad_unchecked(image, given, objective, key=self.keys.labels,
                                                      index=request.index)
        self.labels = passed.labels
        return passed

    def started(self) -> Tensor:
        attack, clean, index, own = self.attack, self.clean, self.request.index, self.own
        if attack.start is None:
            return clean
        if attack.norm == "linf":
            assert self.keys.start is not None
            return ops.random_step(clean, self.keys.start, self.sizes.start, kind=attack.start, index=index,
                                   lo=attack.lo, hi=attack.hi, clip=attack.clip_start)
        # Uniform in the L2 ball: a normal's direction, and the d-th root of U(0, 1) for the length.
        assert own.direction is not None and own.length is not None
        noise = ops.random_step(torch.zeros_like(clean), own.direction, 1.0, kind="normal", index=index, clip=False)
        length = ops.sample_eps(len(clean), own.length, dist="uniform", eps_max=1.0, index=index)
        length = length.to(clean.dtype) ** (1 / max(1, clean[0].numel()))
        lo, hi = (attack.lo, attack.hi) if attack.clip_start else (-torch.inf, torch.inf)
        return ops.l2_step(clean, noise, length * self.sizes.start, lo=lo, hi=hi)

    def looked_at(self, current: Tensor, step: int) -> Tensor:
        """Where the gradient is taken: at the iterate, or with nesterov ahead of it along the momentum."""
        if not self.attack.nesterov or not step or self.momentum is None or self.attack.momentum is None:
            return current
        return current + self.momentum * broadcast(self.attack.momentum * self.step, self.clean)

    def neighbours_mean(self, current: Tensor, step: int) -> Tensor:
        """The mean gradient at random neighbours of the iterate."""
        number = step * (1 + self.neighbours) + 1
        total: Tensor | None = None
        for j, key in enumerate(self.around[step * self.neighbours:(step + 1) * self.neighbours]):
            near = ops.random_step(current, key, self.sizes.reach, kind="uniform", index=self.request.index, clip=False)
            _, grad = self.gradient.at(near, number + j, self.forward_backward)
            total = grad if total is None else total.add_(grad)
        assert total is not None
        return total / self.neighbours

    def target(self, current: Tensor, last: bool) -> Tensor | None:
        """Where the next iterate is written. Iterates move in place, x never does; the last step rounds."""
        x, out = self.request.x, self.request.out
        if last and (out is not None or result_dtype(x) != self.clean.dtype):
            return torch.empty_like(x) if out is None else out
        return None if current is self.clean else current

    def stepped(self, current: Tensor, grad: Tensor, out: Tensor | None) -> Tensor:
        """The next iterate; the momentum is updated in place."""
        attack, momentum, step = self.attack, self.momentum, self.step
        if attack.direction == "sign":
            if momentum is None or attack.momentum is None:
                return ops.sign_step(current, grad, step, **self.within, out=out)
            return ops.momentum_step(current, grad, momentum, step, decay=attack.momentum, **self.within, out=out)
        if momentum is not None and attack.momentum is not None:
            ops.momentum_step(current, grad, momentum, 0.0, decay=attack.momentum)  # for the momentum's sake
            grad = momentum
        if attack.direction == "l2":
            return ops.l2_step(current, grad, step, **self.within, out=out)
        grad = grad.to(current.dtype).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        largest = broadcast(grad.abs().flatten(1).amax(1), current)
        usable = (largest > 0) & (largest < torch.inf)
        moved = torch.where(usable, current + broadcast(step, current) * (grad / largest), current)
        return ops.project(moved, **self.within, out=out)
