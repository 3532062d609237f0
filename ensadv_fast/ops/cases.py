"""The registry of op cases, which all generic tests and benchmarks run over. A new op adds its entries here."""
import math
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .. import ops
from . import keys
from .act_grad import reference as act_grad_reference
from .bias_act import reference as bias_act_reference
from .checks import FLOATS, IMAGES
from .ensemble_linear import DTYPES as LINEAR_DTYPES
from .ensemble_linear import grad_reference as ensemble_linear_grad_reference
from .ensemble_linear import reference as ensemble_linear_reference
from .l2_step import reference as l2_step_reference
from .logit_grad import FUSES
from .logit_grad import reference as logit_grad_reference
from .model_entry import reference as model_entry_reference
from .momentum_step import reference as momentum_step_reference
from .null import reference as null_reference
from .project import reference as project_reference
from .random_step import reference as random_step_reference
from .sample_eps import DISTRIBUTIONS
from .sample_eps import reference as sample_eps_reference
from .sign_step import reference as sign_step_reference


@dataclass(frozen=True)
class Inputs:
    """What a case makes its arguments from.

    `images(n)` draws n independent batches. Logits have as many classes as a sample has elements, at most `classes`;
    those of an ensemble come from `members` models.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    memory_format: torch.memory_format = torch.contiguous_format
    seed: int = 0
    classes: int = 200
    members: int = 3

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def images(self, n: int) -> list[Tensor]:
        g = self.generator()
        return [self.place(torch.rand(self.shape, generator=g)) for _ in range(n)]

    def gradient(self) -> Tensor:
        """A small gradient with exact zeros and NaN in it."""
        grad = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed + 1)) * 1e-3
        flat = grad.view(-1)
        flat[::7], flat[3::11] = 0.0, float("nan")
        return replace(self, dtype=torch.float32 if self.dtype == torch.uint8 else self.dtype).place(grad)

    def sizes(self) -> Tensor:
        """One size per sample; the first is 0."""
        n = self.shape[0]
        return (torch.arange(n, dtype=torch.float32) / max(1, 4 * n)).to(self.device)

    def place(self, t: Tensor) -> Tensor:
        t = (t * 255).round() if self.dtype == torch.uint8 else t
        t = t.to(self.device, self.dtype)
        return t.contiguous(memory_format=self.memory_format) if t.dim() == 4 else t


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class OpCase:
    """One op in one mode of use.

    - op, mode: the name of the op and of this use of it; together the name of the case.
    - function, reference: the public function, and its definition in plain PyTorch, which takes the same arguments.
      Both may return a tuple of tensors and None.
    - make: arguments from :class:`Inputs`.
    - streams: how many image batches an ideal kernel reads and writes.
    - exact: the op equals the reference bit for bit; else within one unit in the last place of float32.
    - reduces: the op sums over samples in float64 in another order than the reference, which changes only float64
      results.
    - image: the first argument is a batch, and the op takes `out`.
    - sweep: generic tests run the case in every dtype and memory format. Default: `image`.
    - ulps: how far results that are not exact may be off beyond one rounding, in units of float32's spacing at the
      largest of them.
    - timed: what benchmarks call instead of `function`, where that copies its arguments to protect them.
    - dtypes: those that the op takes.
    """

    op: str
    mode: str
    function: Callable[..., Any]
    reference: Callable[..., Any]
    make: Callable[[Inputs], Arguments]
    streams: int
    exact: bool = True
    reduces: bool = False
    image: bool = True
    sweep: bool | None = None
    ulps: float | None = None
    timed: Callable[..., Any] | None = None
    dtypes: tuple[torch.dtype, ...] = field(default=IMAGES)

    @property
    def sweeps(self) -> bool:
        return self.image if self.sweep is None else self.sweep

    @property
    def name(self) -> str:
        return f"{self.op}-{self.mode}"


def _sign(i: Inputs) -> Arguments:
    return (i.images(1)[0], i.gradient(), 8 / 255), {}


def _sign_ball(i: Inputs) -> Arguments:
    x, other = i.images(2)
    return (x, i.gradient(), -2 / 255), {"center": _near(x, other), "eps": 8 / 255}


def _near(x: Tensor, other: Tensor) -> Tensor:
    """A center some of whose pixels lie further than 8/255 from x."""
    unit = 255 if x.dtype == torch.uint8 else 1
    return (x.float() + 0.1 * (other.float() - 0.5 * unit)).clamp(0, unit).to(x.dtype)


def _sign_sizes(i: Inputs) -> Arguments:
    (x, grad, _), kw = _sign_ball(i)
    return (x, grad, i.sizes() / 4), {**kw, "eps": i.sizes(), "lo": 0.1, "hi": 0.9}


def _momentum(i: Inputs) -> Arguments:
    (x, grad, step), kw = _sign_ball(i)
    wide = torch.float64 if i.dtype == torch.float64 else torch.float32
    return (x, grad, replace(i, dtype=wide, seed=i.seed + 2).gradient().nan_to_num() * 1e3, step), {**kw, "decay": 0.9}


def momentum_step(x: Tensor, grad: Tensor, momentum: Tensor, *args: Any, **kw: Any) -> Tensor:
    """The op on a copy of the momentum, so that arguments may be used again."""
    return ops.momentum_step(x, grad, momentum.clone(), *args, **kw)


def _momentum_reference(x: Tensor, grad: Tensor, momentum: Tensor, *args: Any, **kw: Any) -> Tensor:
    return momentum_step_reference(x, grad, momentum.clone(), *args, **kw)


def _l2(i: Inputs) -> Arguments:
    return (i.images(1)[0], i.gradient(), 0.5), {}


def _l2_ball(i: Inputs) -> Arguments:
    (x, grad, _), kw = _sign_ball(i)
    return (x, grad, -0.1), {**kw, "eps": i.sizes()}


def _project(norm: str) -> Callable[[Inputs], Arguments]:
    def make(i: Inputs) -> Arguments:
        x, other = i.images(2)
        return (x, _near(x, other), i.sizes()), {"norm": norm, "lo": 0.05}
    return make


def _random(kind: str, **kw: Any) -> Callable[[Inputs], Arguments]:
    return lambda i: ((i.images(1)[0], keys.fresh_key(i.device, i.seed), 8 / 255), {"kind": kind, **kw})


def _random_sizes(i: Inputs) -> Arguments:
    (x, key, _), kw = _random("uniform")(i)
    index = (torch.arange(len(x), device=x.device) * 7919 + 11) % 2**32
    return (x, key, i.sizes()), {**kw, "index": index}


def _eps(dist: str) -> Callable[[Inputs], Arguments]:
    return lambda i: ((i.shape[0], keys.fresh_key(i.device, i.seed)), {"dist": dist, "eps_max": 16 / 255})


def _logits(i: Inputs, members: int) -> Tensor:
    """[B, C], or [K, B, C] for members > 0. The logits of a row are all different, also in 16 bits (with more than 200
    classes only the largest and smallest are). Rows repeat after 4096, because drawing permutations takes long."""
    g, n = i.generator(), i.shape[0] * max(1, members)
    classes = max(3, min(i.classes, math.prod(i.shape[1:])))
    z = torch.stack([torch.randperm(classes, generator=g) for _ in range(min(n, 4096))]) * 0.125 - classes / 16
    if classes > 200:
        z = 12.5 * (z / (classes / 16)) ** 5
    z = z.repeat(-(-n // 4096), 1)[:n]
    return replace(i, memory_format=torch.contiguous_format).place(z.view(members, -1, classes) if members else z)


def _logit(fused: bool = False, **kw: Any) -> Callable[[Inputs], Arguments]:
    def make(i: Inputs) -> Arguments:
        members = i.members if fused else 0
        labels = torch.arange(i.shape[0], device=i.device) % 3
        weights = {"weights": torch.arange(1.0, members + 1, device=i.device) / 8} if members else {}
        return (_logits(i, members), labels), {"key": keys.fresh_key(i.device, i.seed), **weights, **kw}
    return make


def _linear(i: Inputs, shared: bool = False, **kw: Any) -> Arguments:
    """x [K, B, I], or one for all members if `shared`; weight [K, O, I] and bias [K, O], with O = min(classes, I)."""
    g, plain = i.generator(), replace(i, memory_format=torch.contiguous_format)
    batch, inner = i.shape[0], math.prod(i.shape[1:])
    outputs = min(i.classes, inner)
    x = torch.randn(*(() if shared else (i.members,)), batch, inner, generator=g)
    weight = torch.randn(i.members, outputs, inner, generator=g) / inner**0.5
    bias = torch.randn(i.members, outputs, generator=g)
    return tuple(plain.place(t) for t in (x, weight, bias)), kw


def _linear_grad(i: Inputs, **kw: Any) -> Arguments:
    x, weight, bias = _linear(i)[0]
    mask = torch.randint(256, (*x.shape[:2], -(-weight.shape[1] // 8)), generator=i.generator(), dtype=torch.uint8)
    return (bias[:, None] * x[..., :1], weight, mask.to(i.device)), kw


def _entry(delta: bool = False, **kw: Any) -> Callable[[Inputs], Arguments]:
    def make(i: Inputs) -> Arguments:
        mean, std = ((torch.arange(1.0, i.shape[1] + 1, device=i.device) / 7 + c).sqrt() for c in (0.0, 0.5))
        return (i.images(1)[0], mean, std), {**kw, **({"delta": i.gradient() * 100} if delta else {})}
    return make


def _bias(residual: bool, **act: Any) -> Callable[[Inputs], Arguments]:
    def make(i: Inputs) -> Arguments:
        x, other = i.images(2)
        bias = torch.arange(i.shape[1], device=i.device, dtype=torch.float32) / (4 * i.shape[1]) - 0.5
        return (x - 0.25, bias), {**act, **({"residual": other - 0.5} if residual else {})}
    return make


def _act_grad(i: Inputs) -> Arguments:
    (x, bias), _ = _bias(False)(i)
    return (i.gradient(), bias_act_reference(x, bias)[1]), {}


CASES: list[OpCase] = [
    OpCase("null", "copy", ops.null, null_reference, lambda i: ((i.images(1)[0],), {}), 2, dtypes=FLOATS),
    OpCase("sign_step", "free", ops.sign_step, sign_step_reference, _sign, 3),
    OpCase("sign_step", "ball", ops.sign_step, sign_step_reference, _sign_ball, 4),
    OpCase("sign_step", "per_sample", ops.sign_step, sign_step_reference, _sign_sizes, 4),
    OpCase("random_step", "rademacher", ops.random_step, random_step_reference, _random("rademacher"), 2),
    OpCase("random_step", "uniform", ops.random_step, random_step_reference, _random("uniform", clip=False), 2),
    OpCase("random_step", "truncated_normal", ops.random_step, random_step_reference, _random("truncated_normal"), 2),
    OpCase("random_step", "normal", ops.random_step, random_step_reference, _random("normal"), 2),
    OpCase("random_step", "per_sample", ops.random_step, random_step_reference, _random_sizes, 2),
    OpCase("momentum_step", "ball", momentum_step, _momentum_reference, _momentum, 7, reduces=True,
           timed=ops.momentum_step),
    OpCase("l2_step", "free", ops.l2_step, l2_step_reference, _l2, 4, reduces=True),
    OpCase("l2_step", "ball", ops.l2_step, l2_step_reference, _l2_ball, 8, reduces=True),
    OpCase("project", "linf", ops.project, project_reference, _project("linf"), 3),
    OpCase("project", "l2", ops.project, project_reference, _project("l2"), 5, reduces=True),
    *[OpCase("logit_grad", f"{rule}_{loss}", ops.logit_grad, logit_grad_reference,
             _logit(rule=rule, loss=loss, kappa=1.0), 0, exact=False, image=False, sweep=True, ulps=32, dtypes=FLOATS)
      for rule, loss in (("true", "ce"), ("predicted", "cw"), ("least_likely", "ce"), ("random", "dlr"))],
    *[OpCase("logit_grad", f"fused_{fuse}_{loss}", ops.logit_grad, logit_grad_reference,
             _logit(True, fuse=fuse, loss=loss, rule="least_likely"), 0, exact=False, image=False, sweep=True, ulps=32,
             dtypes=FLOATS) for fuse in FUSES for loss in ("ce", "cw")],
    *[OpCase("ensemble_linear", mode, ops.ensemble_linear, ensemble_linear_reference, make, 0, exact=False, image=False,
             sweep=True, ulps=32, dtypes=LINEAR_DTYPES)
      for mode, make in (("relu", lambda i: _linear(i, act="relu")), ("shared", lambda i: _linear(i, True, act="relu")),
                         ("linear", _linear))],
    *[OpCase("ensemble_linear", mode, ops.ensemble_linear_grad, ensemble_linear_grad_reference, make, 0, exact=False,
             image=False, sweep=True, ulps=32, dtypes=LINEAR_DTYPES)
      for mode, make in (("grad", _linear_grad), ("grad_reduced", lambda i: _linear_grad(i, reduce=True)))],
    OpCase("model_entry", "normalise", ops.model_entry, model_entry_reference, _entry(), 2, image=False, sweep=True),
    OpCase("model_entry", "bfloat16", ops.model_entry, model_entry_reference, _entry(dtype=torch.bfloat16), 2,
           image=False, sweep=True),
    OpCase("model_entry", "delta", ops.model_entry, model_entry_reference, _entry(True, channels_last=False), 3,
           image=False, sweep=True),
    OpCase("bias_act", "relu", ops.bias_act, bias_act_reference, _bias(False), 2, image=False, sweep=True,
           dtypes=FLOATS),
    OpCase("bias_act", "residual", ops.bias_act, bias_act_reference, _bias(True), 3, image=False, sweep=True,
           dtypes=FLOATS),
    OpCase("bias_act", "hardtanh", ops.bias_act, bias_act_reference, _bias(False, act="hardtanh", lo=0.0, hi=0.25), 2,
           image=False, sweep=True, dtypes=FLOATS),
    OpCase("bias_act", "leaky_relu", ops.bias_act, bias_act_reference, _bias(False, act="leaky_relu"), 2, image=False,
           sweep=True, dtypes=FLOATS),
    OpCase("act_grad", "slope", ops.act_grad, act_grad_reference, lambda i: (_act_grad(i)[0], {"slope": 0.01}), 2,
           image=False, sweep=True, dtypes=FLOATS),
    OpCase("act_grad", "bits", ops.act_grad, act_grad_reference, _act_grad, 2, image=False, sweep=True, dtypes=FLOATS),
    *[OpCase("sample_eps", dist, ops.sample_eps, sample_eps_reference, _eps(dist), 0, exact=dist != "truncated_normal",
             image=False) for dist in DISTRIBUTIONS],
    OpCase("split_key", "split", ops.split, keys.split_reference,
           lambda i: ((keys.fresh_key(i.device, i.seed), i.shape[0]), {}), 0, image=False),
]
