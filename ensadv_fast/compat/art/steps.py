"""One batch's exact steps, in ART's order and rounding."""
from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from art.config import ART_NUMPY_DTYPE
from art.utils import random_sphere
from torch import Tensor

from .target import Extent, Target

Size = int | float | np.ndarray  # a number, or an array that broadcasts over the images
Norm = int | float | str


class Batch(NamedTuple):
    """A part of the images, with what belongs to it. labels: as the target's gradient takes them."""

    at: slice
    clean: Tensor
    labels: Tensor
    mask: Tensor | None
    eps: Size
    step: Size


def batches(target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None, eps: Size, step: Size,
            size: int) -> Iterator[Batch]:
    """Arrays with one entry per image are cut, others broadcast."""
    def part(value: Any, at: slice) -> Any:
        one_each = isinstance(value, np.ndarray) and value.ndim == x.ndim and len(value) == len(x)
        return value[at] if one_each else value

    for begin in range(0, len(x), size):
        at = slice(begin, min(begin + size, len(x)))
        weights = None if mask is None else target.images(part(mask, at))
        yield Batch(at, target.images(x[at]), target.labels(targets[at]), weights, part(eps, at), part(step, at))


def noise(shape: tuple[int, ...], eps: Size, norm: Norm) -> np.ndarray:
    """ART's random start, by numpy's generator."""
    n, features = shape[0], int(np.prod(shape[1:]))
    if isinstance(eps, np.ndarray) and norm in (np.inf, "inf"):
        eps = np.broadcast_to(eps, shape).reshape(n, features)
    return random_sphere(n, features, eps, norm).reshape(shape).astype(ART_NUMPY_DTYPE)


class Steps:
    """Steps of one batch from point to point of the ball of `batch.eps`. norm: numpy.inf, "inf" or 2."""

    def __init__(self, target: Target, batch: Batch, norm: Norm, targeted: bool):
        self.target, self.batch, self.clean = target, batch, batch.clean
        self.l2 = norm == 2
        self.length = self._moving(batch.step) * (-1 if targeted else 1)
        self.eps: Extent = self._radius(batch.eps) if self.l2 else self._moving(batch.eps)
        self.frozen = None if batch.mask is None else batch.mask == 0
        self._free: Tensor | None = None

    def _moving(self, size: Size) -> Extent:
        """Rounded to the iterates' dtype, as ART rounds it where it is used."""
        return torch.tensor(size, device=self.clean.device, dtype=self.clean.dtype
                            ) if isinstance(size, np.ndarray) else float(size)

    def _radius(self, eps: Size) -> Tensor:
        """One per sample, in its own dtype: ART multiplies in that of eps, and then rounds."""
        every = np.broadcast_to(eps, self.clean.shape).reshape(len(self.clean), -1)
        if not np.all(every == every[:, :1]):
            raise NotImplementedError("eps must be one number per sample where norm is 2, got others")
        return torch.tensor(every[:, :1], device=self.clean.device).view(-1, *[1] * (self.clean.dim() - 1))

    def started(self, random: np.ndarray) -> Tensor:
        """x + noise, clipped. Not projected: the noise lies in the ball."""
        start = self.target.images(random)
        if self.batch.mask is not None:
            start *= self.batch.mask
        return self._clipped(start.add_(self.clean))

    def gradient(self, point: Tensor) -> Tensor:
        """Of the loss, 0 where the mask is."""
        grad = self.target.gradient(point, self.batch.labels)
        return grad if self.frozen is None else grad.masked_fill(self.frozen, 0)

    def accumulate(self, grad: Tensor, momentum: Tensor, decay: float) -> None:
        """momentum * decay + grad / norm1(grad) (Dong et al. 2018), in place."""
        grad = _finite(grad)
        total = _norms(grad, 1)
        momentum.mul_(decay).add_(grad * torch.where(total == 0, total, 1 / total))

    def step(self, point: Tensor, along: Tensor) -> Tensor:
        """x + projection of clip(point + length * direction) - x. `point` must not be looked at afterwards, but for x
        itself."""
        out = self.moved(point, along, torch.empty_like(self.clean) if self._free is None else self._free)
        out.sub_(self.clean)
        if self.l2:
            norms = _norms(out, 2)
            out.mul_(torch.where(norms == 0, norms, (self.eps / norms).clamp_(max=1)))
        else:
            out.clamp_(-self.eps, self.eps)
        self._free = None if point is self.clean else point
        return out.add_(self.clean)

    def moved(self, point: Tensor, along: Tensor, out: Tensor) -> Tensor:
        """clip(point + length * direction)."""
        self.direct(along, out)
        return self._clipped(out.mul_(self.length).add_(point))

    def direct(self, along: Tensor, out: Tensor) -> Tensor:
        """The gradient's sign, or the gradient over its L2 norm."""
        if self.l2:
            along = _finite(along)
            norms = _norms(along, 2)
            torch.mul(along, torch.where(norms == 0, norms, 1 / norms), out=out)
        else:
            torch.sign(along, out=out)
        return out.nan_to_num_(nan=0.0)

    def _clipped(self, point: Tensor) -> Tensor:
        return point if self.target.lo is None else point.clamp_(self.target.lo, self.target.hi)


def _finite(grad: Tensor) -> Tensor:
    """NaN counts as 0."""
    return grad.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)


def _norms(t: Tensor, order: int) -> Tensor:
    """Per sample, shaped to broadcast."""
    return torch.linalg.vector_norm(t.flatten(1), order, dim=1).view(-1, *[1] * (t.dim() - 1))
