"""Transforms: what transfer attacks do to an image before its gradient is taken, and to the gradient.

All are linear maps of an image, so that the gradient by the image is the transposed map of the gradient by the
transformed one; nothing of them is recorded by autograd. Everything happens on the images' device without a look at a
value: draws become weights of matrices, not sizes of tensors.
"""
import functools
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops import checks

KERNELS = ("gaussian", "uniform", "linear")
MODES = ("bilinear", "nearest")
_PER_PASS = 4  # draws of input diversity: whether, size, top, left

# (image, number of the pass, number of the copy) -> the transformed image, and what takes its gradient back
View = Callable[[Tensor, int, int], tuple[Tensor, Callable[[Tensor], Tensor]]]


@dataclass(frozen=True)
class Transform:
    """One of :func:`di`, :func:`si` and :func:`ti`.

    copies: forward and backward passes that it makes of one. draws: it takes a key. clean_first: its first copy of an
    image is the image.
    """

    draws = False
    clean_first = True

    @property
    def copies(self) -> int:
        return 1

    def check(self, op: str, x: Tensor) -> None:
        """Raise a ValueError where it does not apply to images of x's shape."""

    def view(self, x: Tensor, key: Tensor | None, index: Tensor | None, passes: int) -> View | None:
        """What it does to images like x [N, C, H, W], in so many passes; None: nothing."""

    def smoother(self, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """What it does to gradients by x; None: nothing."""


@dataclass(frozen=True)
class InputDiversity(Transform):
    """Input diversity (Xie et al. 2019, equation 5): with probability `prob` the image is resized to a random size and
    padded with zeros at random places; else it stays as it is. Drawn anew for every forward pass.

    With H the image's height and R = int(rate * H), the size s is uniform over [min(H, R), max(H, R) - 1], the image
    is resized to s and padded to max(H, R), the number of rows above uniform over 0..max(H, R) - s - 1; likewise for
    the width, from the same s where it equals the height. rate > 1: the result is resized back to H bilinearly, which
    the network's input size asks for (the paper's Inception takes the larger image; 299 became 330). rate < 1: it has
    H already. Where R is H, as for 8 pixels and rate 1.1, images stay as they are.

    One draw serves the whole batch, as in the authors' code and its ports, and does not depend on the batch: split
    batches get the same one. per_sample: one per sample, a function of (key, sample index).

    mode: how the image is resized to s: "bilinear" (corners not aligned), or "nearest", as the authors' TensorFlow
    code does; there, pixels lie in [-1, 1], so that its padding is grey and ours, like the ports', black.
    torchattacks has rate 0.9, TransferAttack 1.1.
    """

    rate: float = 1.1
    prob: float = 0.5
    per_sample: bool = False
    mode: str = "bilinear"

    draws = True
    clean_first = False

    def __post_init__(self) -> None:
        if not 0 < checks.finite("di", "rate", self.rate):
            raise ValueError(f"di: rate must be > 0, got {self.rate}")
        if not 0 <= checks.number("di", "prob", self.prob) <= 1:
            raise ValueError(f"di: prob must lie in [0, 1], got {self.prob}")
        checks.flag("di", "per_sample", self.per_sample)
        checks.choice("di", "mode", self.mode, MODES)

    def check(self, op: str, x: Tensor) -> None:
        _four(op, "di", x)
        if x.numel() and int(min(x.shape[2:]) * self.rate) < 1:
            raise ValueError(f"{op}: di with rate {self.rate} leaves nothing of images {tuple(x.shape[2:])}")

    def view(self, x: Tensor, key: Tensor | None, index: Tensor | None, passes: int) -> View:
        assert key is not None
        n = len(x) if self.per_sample else 1
        unit = ops.random_step(torch.zeros(n, _PER_PASS * passes, device=x.device), key, 1.0, kind="uniform",
                               index=index if self.per_sample else None, clip=False)
        draws = ((unit.double() + 1) / 2).view(n, passes, _PER_PASS)  # within (0, 1), exactly

        def apply(image: Tensor, number: int, copy: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            whether, size, top, left = draws[:, number].unbind(1)
            rows, columns = (self._weights(side, image.dtype, whether, size, before)
                             for side, before in zip(image.shape[2:], (top, left)))
            return _product(rows, image, columns.mT), lambda grad: _product(rows.mT, grad, columns)

        return apply

    def _weights(self, side: int, dtype: torch.dtype, whether: Tensor, size: Tensor, before: Tensor) -> Tensor:
        """The map of one dimension, [n, 1, side, side], from draws [n] in (0, 1)."""
        small, large = sorted((side, int(side * self.rate)))
        size = small + (size * (large - small)).floor()
        before = (before * (large - size)).floor()
        pixel = torch.arange(large, device=size.device) - before[:, None]
        weights = _resize(pixel, side, size[:, None], self.mode)
        weights = (weights * ((pixel >= 0) & (pixel < size[:, None]))[..., None]).to(dtype)
        if large > side:
            pixel = torch.arange(side, device=size.device, dtype=torch.float64)
            weights = _product(_resize(pixel, large, side, "bilinear").to(dtype), weights)
        same = torch.eye(side, dtype=dtype, device=size.device)
        return torch.where((whether < self.prob)[:, None, None], weights, same)[:, None]


@dataclass(frozen=True)
class ScaleInvariance(Transform):
    """The scale-invariant method (Lin et al. 2020, equation 8): the mean of the gradients by x of the loss at x / 2^i,
    i = 0..m-1. The m passes are made one after the other, so that they need the memory of one."""

    m: int = 5

    def __post_init__(self) -> None:
        checks.integer("si", "m", self.m, least=1)

    @property
    def copies(self) -> int:
        return self.m

    def view(self, x: Tensor, key: Tensor | None, index: Tensor | None, passes: int) -> View:
        def apply(image: Tensor, number: int, copy: int) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
            if not copy:
                return image, lambda grad: grad
            return image * 2.0**-copy, lambda grad: grad * 2.0**-copy

        return apply


@dataclass(frozen=True)
class TranslationInvariance(Transform):
    """The translation-invariant method (Dong et al. 2019, equation 8): the gradient is convolved with a kernel, zeros
    around it.

    kernel: with offsets i in [-k, k], size = 2k + 1, and normalised to the sum 1 in two dimensions: "gaussian",
    exp(-(nsig i / k)^2 / 2), as in the authors' code (the paper's text has the deviation k / sqrt 3 for nsig's k / 3);
    "uniform"; "linear", 1 - |i| / (k + 1). All are products of a row and a column, which is how they are applied: two
    matrix products, built once per attack. size 15 is the paper's; 7 is what Wang & He 2021 compose with.
    """

    kernel: str = "gaussian"
    size: int = 15
    nsig: float = 3.0

    def __post_init__(self) -> None:
        checks.choice("ti", "kernel", self.kernel, KERNELS)
        checks.integer("ti", "size", self.size, least=1)
        if self.size % 2 == 0:
            raise ValueError(f"ti: size must be odd, got {self.size}")
        if not 0 < checks.finite("ti", "nsig", self.nsig):
            raise ValueError(f"ti: nsig must be > 0, got {self.nsig}")

    def check(self, op: str, x: Tensor) -> None:
        _four(op, "ti", x)

    def smoother(self, x: Tensor) -> Callable[[Tensor], Tensor]:
        rows, columns = (self._weights(side, x.dtype, x.device) for side in x.shape[2:])
        return lambda grad: _product(rows, grad, columns)

    def _weights(self, side: int, dtype: torch.dtype, device: torch.device) -> Tensor:
        """The convolution along one dimension, as a symmetric matrix [side, side]."""
        k = self.size // 2
        at = torch.arange(side, dtype=torch.float64, device=device)
        away = (at - at[:, None]).abs()
        shape = {"gaussian": lambda d: torch.exp(-0.5 * (self.nsig / max(k, 1) * d) ** 2), "uniform": torch.ones_like,
                 "linear": lambda d: 1 - d / (k + 1)}[self.kernel]
        whole = shape(torch.arange(-k, k + 1, dtype=torch.float64, device=device).abs()).sum()
        return torch.where(away <= k, shape(away) / whole, 0.0).to(dtype)


@dataclass(frozen=True)
class VarianceTuning:
    """Variance tuning (Wang & He 2021, equation 3): to a step's gradient is added v, the mean of the gradients at n
    points of the step before, x_t + U(-beta eps, beta eps), minus that step's own gradient. n passes more for every
    step but the last; they are made one after the other. The noise is a function of (key, sample index, element)."""

    n: int = 20
    beta: float = 1.5

    def __post_init__(self) -> None:
        checks.integer("vt", "n", self.n, least=1)
        if checks.finite("vt", "beta", self.beta) < 0:
            raise ValueError(f"vt: beta must be >= 0, got {self.beta}")


di, si, ti, vt = InputDiversity, ScaleInvariance, TranslationInvariance, VarianceTuning


def _four(op: str, name: str, x: Tensor) -> None:
    if x.dim() != 4:
        raise ValueError(f"{op}: {name} needs images [N, C, H, W], got shape {tuple(x.shape)}")


def _resize(pixel: Tensor, source: int, size: "Tensor | int", mode: str) -> Tensor:
    """Weights [..., source] of the pixels that pixels [...] are made of when `source` are resized to `size`."""
    at = torch.arange(source, device=pixel.device)
    if mode == "nearest":
        return ((pixel * source / size).floor()[..., None] == at).double()
    where = ((pixel + 0.5) * source / size - 0.5).clamp(0, source - 1)
    return (1 - (where[..., None] - at).abs()).clamp(min=0)


def _product(*factors: Tensor) -> Tensor:
    """The matrix product, in the factors' own dtype whatever autocast says."""
    with torch.autocast(factors[0].device.type, enabled=False):
        return functools.reduce(torch.matmul, factors)
