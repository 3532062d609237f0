"""The attack: what all attacks share, and the one loop that gradient attacks are."""
import itertools
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, overload

import torch
from torch import Tensor, nn

from . import entropy, ops, replay
from .losses import LOSSES, RULES, choose_labels
from .ops import _checks as check
from .ops import _reference as ref
from .ops import keys
from .protocol import BaseSource, InputGrad
from .source import as_source
from .transforms import Transform, VarianceTuning

STARTS = (None, "rademacher", "uniform", "truncated_normal")
DIRECTIONS = ("sign", "l2", "max")


class AttackResult(NamedTuple):
    """x_adv, the labels the attack looked at (int64 [N]), and of the last forward pass it did anyway: the loss [N]
    and whether the attack's aim was met (bool [N]: the label left, or reached where targeted). That pass is the last
    step's first: of the point that nesterov, di and si make of the iterate, where they do."""

    x_adv: Tensor
    labels: Tensor
    loss: Tensor
    success: Tensor


@dataclass(frozen=True)
class BaseAttack(ABC):
    """What every attack is: a size, a label rule, a box, and a call. Sizes are in image units (8/255).

    eps: size of the ball. rule, targeted, loss, kappa: see :mod:`ensadv_fast.losses`. lo, hi: the range of pixels.
    """

    name: str
    eps: float
    rule: str = "true"
    targeted: bool = False
    loss: str | None = "ce"
    kappa: float = 0.0
    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self) -> None:
        op = self.name
        _size(op, "eps", self.eps)
        check.choice(op, "rule", self.rule, RULES)
        check.number(op, "kappa", self.kappa)
        check.bounds(op, self.lo, self.hi, torch.float32)

    @overload
    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: Literal[False] = False) -> Tensor: ...

    @overload
    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: Literal[True]) -> AttackResult: ...

    @overload
    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: bool) -> Tensor | AttackResult: ...

    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: bool = False) -> Tensor | AttackResult:
        """Adversarial examples for images x [N, ...] in [lo, hi].

        Args:
            source: a :class:`Source`, an :class:`Ensemble`, or a plain module, which is used as it is (in eval mode
                meanwhile) and left exactly as it was.
            x: float32, float16, bfloat16, float64, or uint8 (level / 255), on the source's device. Iterates are
                float32 (float64 for float64 x) and rounded once at the end.
            y: true labels int64 [N]; where absent the prediction on the clean x stands in.
            key: int64 [2]; the same key, the same result. Default: the next of the package's own stream.
            eps: overrides the attack's, a number or one per sample [N]; what was left None follows it.
            index: int64 [N] sample indices (positions in the data set): noise is a function of (key, index).
            out: written and returned where given; x's shape and dtype, or float32 for uint8 x.
            return_info: return an :class:`AttackResult` instead.

        Returns:
            x_adv of x's dtype (float32 for uint8 x) and memory format, without autograd history: within float32(eps)
            of x (strictly in 16 bits, plus 2^-24 in float32) and within [lo, hi].

        Raises:
            TypeError, ValueError: naming the argument, what came and what is wanted.
        """
        op = self.name
        source = as_source(source)
        x = check.images(op, x)
        if x.device != source.device:
            raise ValueError(f"{op}: x must be on the model's device {source.device}, got {x.device}")
        if y is not None:
            y = check.labels(op, "y", y, len(x), x.device)
        elif self.targeted and self.rule == "true":
            raise ValueError(f"{op}: targeted with rule 'true' needs y, the labels to reach")
        index = check.index(op, index, len(x), x.device)
        if out is not None:
            check.output(op, out, x, (torch.float32, x.dtype) if x.dtype == torch.uint8 else (x.dtype,))
        sizes = self._sizes(x, self.eps if eps is None else eps)
        key = self._key(source, key, x)
        if len(x) == 0:
            empty = torch.empty(0, device=x.device)
            x_adv = wide(x).to(ref.result_dtype(x)) if out is None else out
            return AttackResult(x_adv, empty.long(), empty, empty.bool()) if return_info else x_adv

        def work(x: Tensor, y: Tensor | None, sizes: Sizes, key: Tensor | None, index: Tensor | None,
                 out: Tensor | None) -> AttackResult | Tensor:
            start_key, label_key, craft_key = (None,) * 3 if key is None else keys.split(key, 3)
            if start_key is not None and label_key is not None:  # the third stays: generators are seeded from the host
                start_key, label_key = (k.to(x.device, non_blocking=True) for k in (start_key, label_key))
            with source.session(craft_key), torch.no_grad():
                result = self._worst_of(source, x, y, sizes, start_key, label_key, index, out)
                if isinstance(result, AttackResult):
                    return result
                if return_info:
                    return self._looked_at(source, x, y, result, label_key, index)
                return result

        if self.capturable:
            return replay.run(source, self, work, x, y, sizes, key, index, out, return_info)
        result = work(x, y, sizes, key, index, out)
        return result if return_info or isinstance(result, Tensor) else result.x_adv

    def _key(self, source: BaseSource, key: Tensor | None, x: Tensor) -> Tensor | None:
        """The key, on the CPU or x's device; the package's next one only where anything is drawn."""
        if key is not None:
            at = torch.device("cpu") if isinstance(key, Tensor) and key.device.type == "cpu" else x.device
            return check.key(self.name, key, at)
        draws = self.rule == "random" or source.crafting == "train" or self._draws
        return keys.next_key(x.device) if draws else None

    @property
    def capturable(self) -> bool:
        """Can a CUDA graph hold the whole of `_worst_of`: does no value of a tensor decide what it does, and is there a
        result for every field?"""
        return False

    @property
    @abstractmethod
    def _draws(self) -> bool:
        """Does the attack itself draw anything?"""

    @abstractmethod
    def _sizes(self, x: Tensor, eps: float | Tensor) -> "Sizes":
        """The sizes of one call, checked, and whatever else the images' shape must be checked for."""

    @abstractmethod
    def _worst_of(self, source: BaseSource, x: Tensor, y: Tensor | None, sizes: "Sizes", start_key: Tensor | None,
                  label_key: Tensor | None, index: Tensor | None, out: Tensor | None) -> AttackResult | Tensor:
        """The whole work on checked arguments, in a session, for N >= 1. A tensor, x_adv: it looked at nothing."""

    def _looked_at(self, source: BaseSource, x: Tensor, y: Tensor | None, x_adv: Tensor, label_key: Tensor | None,
                   index: Tensor | None) -> AttackResult:
        """What an attack that looks at nothing says of itself where it is asked: by one forward pass, or two."""
        if y is None or self.rule != "true":
            y = choose_labels(source.logits(wide(x)), y, self.rule, label_key, index)
        loss, logits = self._losses(source, wide(x_adv), y)
        return AttackResult(x_adv, y, loss, self._met(logits, y))

    def _losses(self, source: BaseSource, x: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
        """(loss [N], logits [N, C]) by one forward pass alone."""
        if self.loss == "entropy":
            logits = source.logits(x)
            return entropy.entropies(logits), logits
        return source.losses_unchecked(x, labels, self.loss or "ce", self.targeted, self.kappa)

    def _met(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels) == self.targeted


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
        check.choice(op, "loss", self.loss, (*LOSSES, "entropy", None))
        check.choice(op, "start", self.start, STARTS)
        check.choice(op, "direction", self.direction, DIRECTIONS)
        for name in ("step", "alpha"):
            if getattr(self, name) is not None:
                _size(op, name, getattr(self, name))
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
            check.finite(op, "momentum", self.momentum)
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
        tensor, number = check.per_sample(op, "eps", eps, x, size=True)
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
            if last and (out is not None or ref.result_dtype(x) != clean.dtype):
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


class Sizes(NamedTuple):
    """An attack's sizes for one call: numbers, or tensors [N] where eps is one. reach: of the neighbours of vt."""

    eps: float | Tensor
    start: float | Tensor
    step: float | Tensor
    steps: int
    reach: float | Tensor


def wide(x: Tensor) -> Tensor:
    """x as iterates are kept: the very tensor where it already is so."""
    return x if x.dtype in (torch.float32, torch.float64) else ref.widen(x)


@overload
def over(value: float, x: Tensor) -> float: ...


@overload
def over(value: Tensor, x: Tensor) -> Tensor: ...


def over(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A number, or one per sample [N] shaped to broadcast over x."""
    return value.view(-1, *[1] * (x.dim() - 1)) if isinstance(value, Tensor) else value


def _size(op: str, name: str, value: object) -> None:
    if check.number(op, name, value) < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
