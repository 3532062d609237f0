"""One batch's exact steps, in ART's order and rounding."""
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from art.config import ART_NUMPY_DTYPE
from art.utils import random_sphere
from torch import Tensor

from ...ops.memory import broadcast
from ..steps import sample_norms, zero_nan
from .target import Extent, Target

Size = int | float | np.ndarray  # a number, or an array that broadcasts over the images
Norm = int | float | str


class Batch(NamedTuple):
    """The images `at` a slice, and what belongs to them. labels: in the form that the target's gradient takes."""

    at: slice
    clean: Tensor
    labels: Tensor
    mask: Tensor | None
    eps: Size
    step: Size


def batches(target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None, eps: Size, step: Size,
            size: int) -> Iterator[Batch]:
    """The images in batches of `size`. Arrays with one entry per image are cut with them, other arrays broadcast."""
    def part(value: Any, at: slice) -> Any:
        one_each = isinstance(value, np.ndarray) and value.ndim == x.ndim and len(value) == len(x)
        return value[at] if one_each else value

    for begin in range(0, len(x), size):
        at = slice(begin, min(begin + size, len(x)))
        weights = None if mask is None else target.to_images(part(mask, at))
        yield Batch(at, target.to_images(x[at]), target.to_labels(targets[at]), weights, part(eps, at), part(step, at))


def draw_noise(shape: tuple[int, ...], eps: Size, norm: Norm) -> np.ndarray:
    """The noise of ART's random start, float32, drawn from numpy's generator as ART draws it."""
    n, features = shape[0], int(np.prod(shape[1:]))
    if isinstance(eps, np.ndarray) and norm in (np.inf, "inf"):
        eps = np.broadcast_to(eps, shape).reshape(n, features)
    return random_sphere(n, features, eps, norm).reshape(shape).astype(ART_NUMPY_DTYPE)


class Steps:
    """Steps of one batch, each inside the ball of `batch.eps`. norm: numpy.inf, "inf" or 2."""

    def __init__(self, target: Target, batch: Batch, norm: Norm, targeted: bool):
        self.target, self.batch, self.clean = target, batch, batch.clean
        self.l2 = norm == 2
        self.length = self._to_extent(batch.step) * (-1 if targeted else 1)
        self.eps: Extent = self._to_radius(batch.eps) if self.l2 else self._to_extent(batch.eps)
        self.frozen = None if batch.mask is None else batch.mask == 0
        self._free: Tensor | None = None

    def _to_extent(self, size: Size) -> Extent:
        """A size as numbers or a tensor, rounded to the iterates' dtype, as ART rounds it where it is used."""
        if not isinstance(size, np.ndarray):
            return float(size)
        return torch.tensor(size, device=self.clean.device, dtype=self.clean.dtype)

    def _to_radius(self, eps: Size) -> Tensor:
        """The L2 radius of each sample, in eps's own dtype: ART multiplies in that dtype, and then rounds."""
        every = np.broadcast_to(eps, self.clean.shape).reshape(len(self.clean), -1)
        if not np.all(every == every[:, :1]):
            raise NotImplementedError("eps must be one number per sample where norm is 2, got others")
        return broadcast(torch.tensor(every[:, :1], device=self.clean.device), self.clean)

    def start(self, random: np.ndarray) -> Tensor:
        """x + noise, clipped. It is not projected, since the noise lies in the ball."""
        start = self.target.to_images(random)
        if self.batch.mask is not None:
            start *= self.batch.mask
        return self.clip(start.add_(self.clean))

    def gradient(self, point: Tensor) -> Tensor:
        """The gradient of the loss by the point, 0 where the mask is 0."""
        grad = self.target.gradient(point, self.batch.labels)
        return grad if self.frozen is None else grad.masked_fill(self.frozen, 0)

    def accumulate(self, grad: Tensor, momentum: Tensor, decay: float) -> None:
        """momentum * decay + grad / norm1(grad) (Dong et al. 2018), in place."""
        grad = zero_nan(grad)
        total = sample_norms(grad, 1)
        momentum.mul_(decay).add_(grad * torch.where(total == 0, total, 1 / total))

    def step(self, point: Tensor, along: Tensor) -> Tensor:
        """x + the projection of clip(point + length * direction) - x.

        `point` is overwritten by a later step, unless it is x itself: do not use it afterwards.
        """
        out = self._move(point, along, torch.empty_like(self.clean) if self._free is None else self._free)
        out.sub_(self.clean)
        if self.l2:
            norms = sample_norms(out)
            out.mul_(torch.where(norms == 0, norms, (self.eps / norms).clamp_(max=1)))
        else:
            out.clamp_(-self.eps, self.eps)
        self._free = None if point is self.clean else point
        return out.add_(self.clean)

    def _move(self, point: Tensor, along: Tensor, out: Tensor) -> Tensor:
        """clip(point + length * direction), written into `out`."""
        self.write_direction(along, out)
        return self.clip(out.mul_(self.length).add_(point))

    def write_direction(self, along: Tensor, out: Tensor) -> Tensor:
        """The gradient's sign, or the gradient over its L2 norm, written into `out`."""
        if self.l2:
            along = zero_nan(along)
            norms = sample_norms(along)
            torch.mul(along, torch.where(norms == 0, norms, 1 / norms), out=out)
        else:
            torch.sign(along, out=out)
        return out.nan_to_num_(nan=0.0)

    def clip(self, point: Tensor) -> Tensor:
        """`point` brought into the range of pixels, in place."""
        return point if self.target.lo is None else point.clamp_(self.target.lo, self.target.hi)

