"""The one loop that gradient attacks are."""
import itertools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops import checks, keys, memory
from ..ops.losses import LOSSES, choose_labels
from ..sources.base import BaseSource, InputGrad
from . import entropy
from .base import AttackResult, BaseAttack, Sizes, check_size, over, wide
from .transforms import Transform, VarianceTuning

STARTS = (None, "rademacher", "uniform", "truncated_normal")
DIRECTIONS = ("sign", "l2", "max")


@dataclass(frozen=True)
class Attack(BaseAttack):
    """An attack that follows gradients: random start, label, then steps, each projected on the ball and the box.

    Make one with a constructor of :mod:`ensadv_fast.attacks`; ``dataclasses.replace`` varies it.

    start: None, "rademacher", "uniform" or "truncated_normal"; alpha: size of a rademacher start (None: eps / 2), taken
    from the budget; the others fill the ball. clip_start: clip to the box before the first gradient. steps: gradient
    steps; step: size of each. Where None, both follow from eps as the constructor says. direction: "sign"; "l2", the
    gradient over its L2 norm, in the L2 ball; "max", the gradient over its largest element. restarts: runs from
    different starts, the worst kept per sample. loss: as everywhere, or "entropy", that of the predicted distribution,
    or None: no gradient is followed, the start alone is the attack and takes the whole of eps.

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
    variance: VarianceTuning | int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        op = self.name
        checks.choice(op, "loss", self.loss, (*LOSSES, "entropy", None))
        checks.choice(op, "start", self.start, STARTS)
        checks.choice(op, "direction", self.direction, DIRECTIONS)
        for name in ("step", "alpha"):
            if getattr(self, name) is not None:
                check_size(op, name, getattr(self, name))
        for name in ("steps", "restarts"):
            value = getattr(self, name)
            if name == "steps" and value is None:
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
            if value < 1:
                raise ValueError(f"{op}: {name} must be >= 1, got {value}")
        if self.restarts > 1 and self.start is None:
            raise ValueError(f"{op}: restarts > 1 needs a random start")
        if self.loss is None and (self.start is None or self.restarts > 1 or self.direction == "l2"):
            raise ValueError(f"{op}: loss None is a random start alone, got start {self.start!r}, "
                             f"restarts {self.restarts}, direction {self.direction!r}")
        if self.direction == "l2" and self.start not in (None, "uniform"):
            raise ValueError(f"{op}: start must be None or 'uniform' in the L2 ball, got {self.start!r}")
        if self.alpha is not None and self.alpha > self.eps:
            raise ValueError(
                f"{op}: alpha belongs to the budget and must not exceed eps = {self.eps}, got {self.alpha}"
            )
        if not isinstance(self.transforms, (tuple, list)):
            raise TypeError(f"{op}: transforms must be a sequence, got {type(self.transforms).__name__}")
        for t in self.transforms:
            if not isinstance(t, Transform):
                raise TypeError(f"{op}: transforms must be di(...), si(...) or ti(...) each, got {type(t).__name__}")
        object.__setattr__(self, "transforms", tuple(self.transforms))  # the attack is frozen, and stays hashable
        if self.momentum is not None:
            checks.finite(op, "momentum", self.momentum)
            object.__setattr__(self, "momentum", float(self.momentum))
        if not isinstance(self.nesterov, bool):
            raise TypeError(f"{op}: nesterov must be a bool, got {type(self.nesterov).__name__}")
        if self.nesterov and self.momentum is None:
            raise ValueError(f"{op}: nesterov looks ahead along the momentum and needs one, got momentum None")
        if self.variance is not None and not isinstance(self.variance, VarianceTuning):
            if isinstance(self.variance, bool) or not isinstance(self.variance, int):
                raise TypeError(f"{op}: variance must be vt(...) or an int, got {type(self.variance).__name__}")
            object.__setattr__(self, "variance", VarianceTuning(self.variance))

    @property
    def capturable(self) -> bool:
        return self.loss is not None

    @property
    def _tuning(self) -> VarianceTuning | None:
        """`variance`, of which __post_init__ has made a VarianceTuning."""
        return VarianceTuning(self.variance) if isinstance(self.variance, int) else self.variance

    @property
    def norm(self) -> str:
        """Of the ball: "linf" or "l2"."""
        return "l2" if self.direction == "l2" else "linf"

    @property
    def _draws(self) -> bool:
        return self.start is not None or self.variance is not None or any(t.draws for t in self.transforms)

    def _sizes(self, x: Tensor, eps: float | Tensor) -> "Sizes":
        for t in self.transforms:
            t.check(self.name, x)
        op = self.name
        tensor, number = checks.per_sample(op, "eps", eps, x, is_size=True)
        eps = number if tensor is None else tensor
        start = step = eps
        steps = self.steps
        if steps is None:
            # Kurakin et al. 2017: min(eps + 4, 1.25 eps) in units of 1/255. With eps per sample, the attack's own.
            eps255 = 255 * (number if tensor is None else self.eps)
            steps = max(1, int(round(min(eps255 + 4, 1.25 * eps255), 6)))
        if self.start == "rademacher" and self.loss is not None:
            start = eps / 2 if self.alpha is None else self.alpha
            if tensor is not None:
                start = tensor / 2 if self.alpha is None else tensor.clamp(max=self.alpha)
            elif start > eps:
                raise ValueError(f"{op}: alpha = {start} belongs to the budget and must not exceed eps, got {eps}")
            step = eps - start
        if self.step is not None:
            step = self.step
        elif self.step_over_eps is not None:
            step = self.step_over_eps * eps
        return Sizes(eps, start, step, steps, 0.0 if self._tuning is None else self._tuning.beta * eps)

    def _worst_of(self, source: BaseSource, x: Tensor, y: Tensor | None, sizes: "Sizes", start_key: Tensor | None,
                  label_key: Tensor | None, index: Tensor | None, out: Tensor | None) -> AttackResult | Tensor:
        """Run once per restart; with more than one, keep per sample the example on which the loss ended worst."""
        if self.loss is None:
            assert start_key is not None and self.start is not None
            return ops.random_step(x, start_key, sizes.start, kind=self.start, index=index, lo=self.lo, hi=self.hi,
                                   out=out)
        labels = None
        first_is_clean = self.start is None and all(t.clean_first for t in self.transforms)
        if not first_is_clean and (self.rule != "true" or y is None):
            labels = choose_labels(source.logits(wide(x)), y, self.rule, label_key, index)
        if self.restarts == 1:
            return self._run(source, x, y, labels, sizes, start_key, label_key, index, out)
        assert start_key is not None
        best: AttackResult | None = None
        for restart_key in keys.split(start_key, self.restarts):
            run = self._run(source, x, y, labels, sizes, restart_key, label_key, index, None)
            loss, logits = self._losses(source, wide(run.x_adv), run.labels)
            run = AttackResult(run.x_adv, run.labels, loss, self._met(logits, run.labels))
            labels = run.labels
            if best is None:
                best = run
                continue
            further = run.loss < best.loss if self.targeted else run.loss > best.loss
            worse = (run.success & ~best.success) | (further & (run.success == best.success))
            pick = worse.view(-1, *[1] * (x.dim() - 1))
            best = AttackResult(torch.where(pick, run.x_adv, best.x_adv), labels,
                                torch.where(worse, run.loss, best.loss), run.success | best.success)
        assert best is not None
        if out is None:
            return best
        if out.dtype == best.x_adv.dtype:
            return best._replace(x_adv=out.copy_(best.x_adv))
        return best._replace(x_adv=ops.project(best.x_adv, wide(x), sizes.eps, norm=self.norm, lo=self.lo, hi=self.hi,
                                               out=out))

    def _run(self, source: BaseSource, x: Tensor, y: Tensor | None, labels: Tensor | None, sizes: "Sizes",
             start_key: Tensor | None, label_key: Tensor | None, index: Tensor | None,
             out: Tensor | None) -> AttackResult:
        loss, tuning = self.loss, self._tuning
        assert loss is not None

        def look(image: Tensor) -> InputGrad:
            """One forward and backward pass; the first chooses the labels where they are not given."""
            nonlocal labels
            given, rule = (y, self.rule) if labels is None else (labels, "true")
            if loss == "entropy":
                passed = entropy.input_grad(source, image, given, rule, label_key, index)
            else:
                passed = source.input_grad_unchecked(image, given, rule, self.targeted, loss, self.kappa,
                                                     label_key, index, rescale=True)
            labels = passed.labels
            return passed

        clean = wide(x)
        # Children 0 to 2 of the key are the L2 start's and the neighbours'; a start in L-inf takes the key itself.
        drawing = self.norm == "l2" or tuning is not None or any(t.draws for t in self.transforms)
        own: list[Tensor | None] = [None] * (3 + len(self.transforms))
        if start_key is not None and drawing:
            own = list(keys.split(start_key, len(own)))
        current = self._started(clean, sizes, start_key, own, index)
        neighbours = 0 if tuning is None else tuning.n
        gradient = _Gradient(look, self.transforms, clean, own[3:], index, sizes.steps * (1 + neighbours),
                             averaged=neighbours > 0)
        around: Sequence[Tensor] = ()
        if neighbours and own[2] is not None:
            around = list(keys.split(own[2], sizes.steps * neighbours))
        momentum = None if self.momentum is None else torch.zeros_like(clean)
        tuned: Tensor | None = None  # the variance of the gradient, of the step before
        step = -sizes.step if self.targeted else sizes.step
        # A single step from x itself cannot leave the ball, so the center need not be read.
        free = sizes.steps == 1 and self.start is None and self.step is None and self.step_over_eps is None
        ball: dict[str, Any] = {} if free and self.direction != "max" else {"center": clean, "eps": sizes.eps}
        for i in range(sizes.steps):
            number, last = i * (1 + neighbours), i == sizes.steps - 1
            at = current
            if self.nesterov and i and momentum is not None and self.momentum is not None:
                at = current + momentum * over(self.momentum * step, clean)
            passed, grad = gradient.at(at, number)
            followed = grad if tuned is None else grad + tuned
            if neighbours and not last:
                total: Tensor | None = None
                for j in range(neighbours):
                    near = ops.random_step(current, around[i * neighbours + j], sizes.reach, kind="uniform",
                                           index=index, clip=False)
                    _, one = gradient.at(near, number + 1 + j)
                    total = one if total is None else total.add_(one)
                assert total is not None
                tuned = (total / neighbours).sub_(grad)
            target = None if current is clean else current  # iterates move in place, x never does
            if last and (out is not None or memory.result_dtype(x) != clean.dtype):
                target = torch.empty_like(x) if out is None else out
            current = self._stepped(current, gradient.smoothed(followed), momentum, step, ball, target)
        return AttackResult(current, passed.labels, passed.loss, self._met(passed.logits, passed.labels))

    def _started(self, clean: Tensor, sizes: "Sizes", key: Tensor | None, own: list[Tensor | None],
                 index: Tensor | None) -> Tensor:
        if self.start is None:
            return clean
        assert key is not None
        if self.norm == "linf":
            return ops.random_step(clean, key, sizes.start, kind=self.start, index=index, lo=self.lo, hi=self.hi,
                                   clip=self.clip_start)
        # Uniform in the L2 ball: a normal's direction, and the d-th root of U(0, 1) for the length.
        assert own[0] is not None and own[1] is not None
        noise = ops.random_step(torch.zeros_like(clean), own[0], 1.0, kind="normal", index=index, clip=False)
        length = ops.sample_eps(len(clean), own[1], dist="uniform", eps_max=1.0, index=index)
        length = length.to(clean.dtype) ** (1 / max(1, clean[0].numel()))
        lo, hi = (self.lo, self.hi) if self.clip_start else (-torch.inf, torch.inf)
        return ops.l2_step(clean, noise, length * sizes.start, lo=lo, hi=hi)

    def _stepped(self, current: Tensor, grad: Tensor, momentum: Tensor | None, step: float | Tensor,
                 ball: dict[str, Any],                  out: Tensor | None) -> Tensor:
        """The next iterate, written to `out` where given; momentum is updated in place."""
        within: dict[str, Any] = {**ball, "lo": self.lo, "hi": self.hi}
        if self.direction == "sign":
            if momentum is None or self.momentum is None:
                return ops.sign_step(current, grad, step, **within, out=out)
            return ops.momentum_step(current, grad, momentum, step, decay=self.momentum, **within, out=out)
        if momentum is not None and self.momentum is not None:
            ops.momentum_step(current, grad, momentum, 0.0, decay=self.momentum)  # for the momentum's sake
            grad = momentum
        if self.direction == "l2":
            return ops.l2_step(current, grad, step, **within, out=out)
        grad = grad.to(current.dtype).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
        largest = over(grad.abs().flatten(1).amax(1), current)
        usable = (largest > 0) & (largest < torch.inf)
        moved = torch.where(usable, current + over(step, current) * (grad / largest), current)
        return ops.project(moved, **within, out=out)


class _Gradient:
    """The gradient that a step follows: the mean over the views that transforms take of a point, each taken back."""

    def __init__(self, look: Callable[[Tensor], InputGrad], transforms: tuple[Transform, ...], x: Tensor,
                 own: list[Tensor | None], index: Tensor | None, evaluations: int, averaged: bool) -> None:
        self.look = look
        self.copies = list(itertools.product(*(range(t.copies) for t in transforms)))
        passes = evaluations * len(self.copies)
        self.views = [t.view(x, key, index, passes) for t, key in zip(transforms, own)]
        self.smoothers = [s for s in (t.smoother(x) for t in transforms) if s is not None]
        self.true = averaged or len(self.copies) > 1  # only what is averaged needs the gradient's true size

    def at(self, point: Tensor, number: int) -> tuple[InputGrad, Tensor]:
        """What the first copy's pass gave, and the gradient by the point, in the point's dtype."""
        first: InputGrad | None = None
        total: Tensor | None = None
        for c, copy in enumerate(self.copies):
            image, backs = point, list[Callable[[Tensor], Tensor]]()
            for view, which in zip(self.views, copy):
                if view is not None:
                    image, back = view(image, number * len(self.copies) + c, which)
                    backs.append(back)
            passed = self.look(image)
            grad = passed.grad / over(passed.scale, image) if self.true else passed.grad
            for back in reversed(backs):
                grad = back(grad)
            first = passed if first is None else first
            total = grad if total is None else total.add_(grad)
        assert first is not None and total is not None
        return first, total if len(self.copies) == 1 else total / len(self.copies)

    def smoothed(self, grad: Tensor) -> Tensor:
        for smooth in self.smoothers:
            grad = smooth(grad)
        return grad
