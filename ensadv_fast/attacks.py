"""Attacks: one loop, and named constructors that choose its start, label, direction and steps."""
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor, nn

from . import ops, replay
from .losses import LOSSES, RULES, choose_labels
from .ops import _checks as check
from .ops import _reference as ref
from .ops import keys
from .protocol import BaseSource
from .source import as_source


class AttackResult(NamedTuple):
    """x_adv, the labels the attack looked at (int64 [N]), and of the last forward pass it did anyway: the loss [N]
    and whether the attack's aim was met (bool [N]: the label left, or reached where targeted)."""

    x_adv: Tensor
    labels: Tensor
    loss: Tensor
    success: Tensor


@dataclass(frozen=True)
class Attack:
    """An L-inf attack: random start, label, then sign steps, each projected on the ball and the box.

    Make one with a constructor below; ``dataclasses.replace`` varies it. Sizes are in image units (8/255).

    eps: size of the ball. start: None, "rademacher" or "uniform"; alpha: size of a rademacher start (None: eps / 2),
    taken from the budget, a uniform one fills the ball. clip_start: clip to the box before the first gradient. steps:
    gradient steps; step: size of each. Where None, both follow from eps as the constructor says. rule, targeted,
    loss, kappa: see :mod:`ensadv_fast.losses`. restarts: runs from different starts, the worst kept per sample.
    """

    name: str
    eps: float
    start: str | None = None
    alpha: float | None = None
    clip_start: bool = True
    steps: int | None = 1
    step: float | None = None
    step_over_eps: float | None = None
    restarts: int = 1
    rule: str = "true"
    targeted: bool = False
    loss: str = "ce"
    kappa: float = 0.0
    lo: float = 0.0
    hi: float = 1.0

    def __post_init__(self):
        op = self.name
        _size(op, "eps", self.eps)
        check.choice(op, "rule", self.rule, RULES)
        check.choice(op, "loss", self.loss, LOSSES)
        check.number(op, "kappa", self.kappa)
        check.bounds(op, self.lo, self.hi, torch.float32)
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
        if self.alpha is not None and self.alpha > self.eps:
            raise ValueError(
                f"{op}: alpha belongs to the budget and must not exceed eps = {self.eps}, got {self.alpha}"
            )

    def __call__(self, source: "BaseSource | nn.Module", x: Tensor, y: Tensor | None = None, *,
                 key: Tensor | None = None, eps: float | Tensor | None = None, index: Tensor | None = None,
                 out: Tensor | None = None, return_info: bool = False) -> "Tensor | AttackResult":
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
        sizes = _Sizes.of(self, x, self.eps if eps is None else eps)
        key = self._key(source, key, x)
        if len(x) == 0:
            empty = torch.empty(0, device=x.device)
            x_adv = _wide(x).to(ref.result_dtype(x)) if out is None else out
            return AttackResult(x_adv, empty.long(), empty, empty.bool()) if return_info else x_adv

        def work(x, y, sizes, key, index, out):
            start_key, label_key, craft_key = (None,) * 3 if key is None else keys.split(key, 3)
            if key is not None:  # the third stays where it is: generators are seeded from the host
                start_key, label_key = (k.to(x.device, non_blocking=True) for k in (start_key, label_key))
            with source.session(craft_key), torch.no_grad():
                return self._worst_of(source, x, y, sizes, start_key, label_key, index, out)

        return replay.run(source, self, work, x, y, sizes, key, index, out, return_info)

    def _key(self, source: BaseSource, key: Tensor | None, x: Tensor) -> Tensor | None:
        """The key, on the CPU or x's device; the package's next one only where anything is drawn."""
        if key is not None:
            at = torch.device("cpu") if isinstance(key, Tensor) and key.device.type == "cpu" else x.device
            return check.key(self.name, key, at)
        draws = self.start is not None or self.rule == "random" or source.crafting == "train"
        return keys.next_key(x.device) if draws else None

    def _worst_of(self, source: BaseSource, x: Tensor, y: Tensor | None, sizes: "_Sizes", start_key: Tensor | None,
                  label_key: Tensor | None, index: Tensor | None, out: Tensor | None) -> AttackResult:
        """Run once per restart; with more than one, keep per sample the example on which the loss ended worst."""
        labels = None
        if self.start is not None and (self.rule != "true" or y is None):
            labels = choose_labels(source.logits(_wide(x)), y, self.rule, label_key, index)
        if self.restarts == 1:
            return self._run(source, x, y, labels, sizes, start_key, label_key, index, out)
        best: AttackResult | None = None
        for restart_key in keys.split(start_key, self.restarts):
            run = self._run(source, x, y, labels, sizes, restart_key, label_key, index, None)
            loss, logits = source.losses_unchecked(_wide(run.x_adv), run.labels, self.loss, self.targeted, self.kappa)
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
        if out is None:
            return best
        if out.dtype == best.x_adv.dtype:
            return best._replace(x_adv=out.copy_(best.x_adv))
        return best._replace(x_adv=ops.project(best.x_adv, _wide(x), sizes.eps, lo=self.lo, hi=self.hi, out=out))

    def _run(self, source: BaseSource, x: Tensor, y: Tensor | None, labels: Tensor | None, sizes: "_Sizes",
             start_key: Tensor | None, label_key: Tensor | None, index: Tensor | None,
             out: Tensor | None) -> AttackResult:
        clean = _wide(x)
        current = clean
        if self.start is not None:
            current = ops.random_step(clean, start_key, sizes.start, kind=self.start, index=index, lo=self.lo,
                                      hi=self.hi, clip=self.clip_start)
        # A single step from x itself cannot leave the ball, so the center need not be read.
        free = sizes.steps == 1 and self.start is None and self.step is None
        ball = {} if free else {"center": clean, "eps": sizes.eps}
        for i in range(sizes.steps):
            given, rule = (y, self.rule) if labels is None else (labels, "true")
            passed = source.input_grad_unchecked(current, given, rule, self.targeted, self.loss, self.kappa,
                                                 label_key, index, rescale=True)
            labels = passed.labels
            target = None if current is clean else current  # iterates move in place, x never does
            if i == sizes.steps - 1 and (out is not None or ref.result_dtype(x) != clean.dtype):
                target = torch.empty_like(x) if out is None else out
            current = ops.sign_step(current, passed.grad, -sizes.step if self.targeted else sizes.step, **ball,
                                    lo=self.lo, hi=self.hi, out=target)
        return AttackResult(current, labels, passed.loss, self._met(passed.logits, labels))

    def _met(self, logits: Tensor, labels: Tensor) -> Tensor:
        return (logits.argmax(1) == labels) == self.targeted


class _Sizes(NamedTuple):
    """An attack's sizes for one call: numbers, or tensors [N] where eps is one."""

    eps: float | Tensor
    start: float | Tensor
    step: float | Tensor
    steps: int

    @staticmethod
    def of(attack: Attack, x: Tensor, eps: float | Tensor) -> "_Sizes":
        op = attack.name
        tensor, number = check.per_sample(op, "eps", eps, x, size=True)
        eps = number if tensor is None else tensor
        start = step = eps
        steps = attack.steps
        if steps is None:
            # Kurakin et al. 2017: min(eps + 4, 1.25 eps) in units of 1/255. With eps per sample, the attack's own.
            eps255 = 255 * (number if tensor is None else attack.eps)
            steps = max(1, int(round(min(eps255 + 4, 1.25 * eps255), 6)))
        if attack.start == "rademacher":
            start = eps / 2 if attack.alpha is None else attack.alpha
            if tensor is not None:
                start = eps / 2 if attack.alpha is None else eps.clamp(max=attack.alpha)
            elif start > eps:
                raise ValueError(f"{op}: alpha = {start} belongs to the budget and must not exceed eps, got {eps}")
            step = eps - start
        if attack.step is not None:
            step = attack.step
        elif attack.step_over_eps is not None:
            step = attack.step_over_eps * eps
        return _Sizes(eps, start, step, steps)


def _wide(x: Tensor) -> Tensor:
    """x as iterates are kept: the very tensor where it already is so."""
    return x if x.dtype in (torch.float32, torch.float64) else ref.widen(x)


def _size(op: str, name: str, value) -> None:
    if check.number(op, name, value) < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")


def fgsm(eps: float = 8 / 255, **kw) -> Attack:
    """Fast gradient sign method: x + eps * sign(grad) (Goodfellow et al. 2015; Tramer et al. 2018, equation 2)."""
    return Attack("fgsm", eps, **kw)


def rand_fgsm(eps: float = 8 / 255, alpha: float | None = None, clip_start: bool = True, **kw) -> Attack:
    """R+FGSM: x1 = x + alpha * sign(N(0, I)), then x1 + (eps - alpha) * sign(grad at x1) (Tramer et al. 2018,
    equation 4). alpha None: eps / 2, as on ImageNet; the MNIST code has 0.05 for eps 0.3. clip_start: clip x1 to the
    box before the gradient, as the MNIST code does."""
    return Attack("rand_fgsm", eps, start="rademacher", alpha=alpha, clip_start=clip_start, **kw)


def step_ll(eps: float = 8 / 255, **kw) -> Attack:
    """Step-LL: x - eps * sign(grad) toward the least likely class (Kurakin et al. 2017, equation 2)."""
    return Attack("step_ll", eps, **{"rule": "least_likely", "targeted": True, **kw})


def rand_step_ll(eps: float = 8 / 255, alpha: float | None = None, clip_start: bool = True, **kw) -> Attack:
    """R+Step-LL: the random start of R+FGSM, then Step-LL; the least likely class is the clean image's."""
    return Attack("rand_step_ll", eps, start="rademacher", alpha=alpha, clip_start=clip_start,
                  **{"rule": "least_likely", "targeted": True, **kw})


def step_rnd(eps: float = 8 / 255, **kw) -> Attack:
    """One step toward a class drawn uniformly from those other than the label (Kurakin et al. 2017, section 2.2)."""
    return Attack("step_rnd", eps, **{"rule": "random", "targeted": True, **kw})


def ifgsm(eps: float = 8 / 255, step: float | None = None, steps: int | None = None, **kw) -> Attack:
    """Basic iterative method: clip_{x, eps}(x + step * sign(grad)), repeated (Kurakin et al. 2017, section 2.2).
    step None: 1/255; steps None: min(eps + 4, 1.25 eps) in units of 1/255, rounded down. The MNIST code of Tramer
    et al. takes 10 steps of eps / 10."""
    return Attack("ifgsm", eps, step=1 / 255 if step is None else step, steps=steps, **kw)


def iter_ll(eps: float = 8 / 255, step: float | None = None, steps: int | None = None, **kw) -> Attack:
    """The basic iterative method toward the least likely class of the clean image (Kurakin et al. 2017)."""
    return Attack("iter_ll", eps, step=1 / 255 if step is None else step, steps=steps,
                  **{"rule": "least_likely", "targeted": True, **kw})


def pgd(eps: float = 8 / 255, step: float | None = None, steps: int = 10, random_start: bool = True,
        restarts: int = 1, **kw) -> Attack:
    """Projected gradient descent (Madry et al. 2018): uniform start in the ball, projected sign steps. step None:
    2.5 * eps / steps. With restarts > 1 the worst example is kept per sample. loss="cw" is the PGD of Tramer et al.
    2018's black-box suite."""
    return Attack("pgd", eps, start="uniform" if random_start else None, steps=steps, step=step,
                  step_over_eps=None if step is not None else 2.5 / max(1, steps), restarts=restarts, **kw)
