"""The registry of op cases: what every generic test and every benchmark runs over. A new op adds its entries here."""
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from . import ops
from .ops import keys
from .ops.null import reference as null_reference
from .ops.random_step import reference as random_step_reference
from .ops.sample_eps import DISTRIBUTIONS
from .ops.sample_eps import reference as sample_eps_reference
from .ops.sign_step import reference as sign_step_reference

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


@dataclass(frozen=True)
class Inputs:
    """What a case makes its arguments from. `images(n)` draws n independent batches."""

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    device: str = "cpu"
    memory_format: torch.memory_format = torch.contiguous_format
    seed: int = 0

    def generator(self) -> torch.Generator:
        return torch.Generator().manual_seed(self.seed)

    def images(self, n: int) -> list[Tensor]:
        g = self.generator()
        return [self.place(torch.rand(self.shape, generator=g)) for _ in range(n)]

    def gradient(self) -> Tensor:
        """Small, with exact zeros and NaN among it."""
        grad = torch.randn(self.shape, generator=torch.Generator().manual_seed(self.seed + 1)) * 1e-3
        flat = grad.view(-1)
        flat[::7], flat[3::11] = 0.0, float("nan")
        return self.place(grad)

    def sizes(self) -> Tensor:
        """One size per sample, 0 among them."""
        n = self.shape[0]
        return (torch.arange(n, dtype=torch.float32) / max(1, 4 * n)).to(self.device)

    def place(self, t: Tensor) -> Tensor:
        t = t.to(self.device, self.dtype)
        return t.contiguous(memory_format=self.memory_format) if t.dim() == 4 else t


Arguments = tuple[tuple[Any, ...], dict[str, Any]]


@dataclass(frozen=True)
class OpCase:
    """One op in one mode of use.

    op, reference: the public function and its definition in plain PyTorch, of the same arguments. make: arguments
    from :class:`Inputs`. streams: image batches read plus written by an ideal kernel. exact: bit for bit the
    reference (else within one unit in the last place of float32). image: the first argument is a batch and the op
    takes `out`.
    """

    op: str
    mode: str
    function: Callable[..., Tensor]
    reference: Callable[..., Tensor]
    make: Callable[[Inputs], Arguments]
    streams: int
    exact: bool = True
    image: bool = True
    dtypes: tuple[torch.dtype, ...] = field(default=FLOATS)

    @property
    def name(self) -> str:
        return f"{self.op}-{self.mode}"


def _sign(i: Inputs) -> Arguments:
    return (i.images(1)[0], i.gradient(), 8 / 255), {}


def _sign_ball(i: Inputs) -> Arguments:
    x, other = i.images(2)
    center = (x.float() + 0.1 * (other.float() - 0.5)).clamp(0, 1).to(x.dtype)
    return (x, i.gradient(), -2 / 255), {"center": center, "eps": 8 / 255}


def _sign_sizes(i: Inputs) -> Arguments:
    (x, grad, _), kw = _sign_ball(i)
    return (x, grad, i.sizes() / 4), {**kw, "eps": i.sizes(), "lo": 0.1, "hi": 0.9}


def _random(kind: str, **kw) -> Callable[[Inputs], Arguments]:
    return lambda i: ((i.images(1)[0], keys.fresh_key(i.device, i.seed), 8 / 255), {"kind": kind, **kw})


def _random_sizes(i: Inputs) -> Arguments:
    (x, key, _), kw = _random("uniform")(i)
    index = (torch.arange(len(x), device=x.device) * 7919 + 11) % 2**32
    return (x, key, i.sizes()), {**kw, "index": index}


def _eps(dist: str) -> Callable[[Inputs], Arguments]:
    return lambda i: ((i.shape[0], keys.fresh_key(i.device, i.seed)), {"dist": dist, "eps_max": 16 / 255})


CASES: list[OpCase] = [
    OpCase("null", "copy", ops.null, null_reference, lambda i: ((i.images(1)[0],), {}), 2),
    OpCase("sign_step", "free", ops.sign_step, sign_step_reference, _sign, 3),
    OpCase("sign_step", "ball", ops.sign_step, sign_step_reference, _sign_ball, 4),
    OpCase("sign_step", "per_sample", ops.sign_step, sign_step_reference, _sign_sizes, 4),
    OpCase("random_step", "rademacher", ops.random_step, random_step_reference, _random("rademacher"), 2),
    OpCase("random_step", "uniform", ops.random_step, random_step_reference, _random("uniform", clip=False), 2),
    OpCase("random_step", "per_sample", ops.random_step, random_step_reference, _random_sizes, 2),
    *[OpCase("sample_eps", dist, ops.sample_eps, sample_eps_reference, _eps(dist), 0, exact=dist != "truncated_normal",
             image=False) for dist in DISTRIBUTIONS],
    OpCase("split_key", "split", ops.split, keys.split_reference,
           lambda i: ((keys.fresh_key(i.device, i.seed), i.shape[0]), {}), 0, image=False),
]
