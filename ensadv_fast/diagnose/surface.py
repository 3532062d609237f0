"""The loss around an image, along the gradient's sign and an orthogonal direction: figure 1 of Tramer et al. 2018."""
from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import checks
from ..ops.memory import broadcast
from ..sources.base import BaseSource
from ..sources.source import as_source
from . import batches
from .batches import Data, Model, Pick, Result


@dataclass(frozen=True)
class LossSurface(Result):
    """loss[n, i, j], float32: the cross-entropy of sample n at x + along[i] * g + across[j] * g_orthogonal, with the
    directions of :func:`loss_surface`; predicted[n, i, j], int64: the class there. along, across: [P], in image units.
    labels: int64 [N].
    """

    along: Tensor
    across: Tensor
    loss: Tensor
    predicted: Tensor
    labels: Tensor


def orthogonal_signs(g: Tensor, v: Tensor, weight: Tensor) -> Tensor:
    """The signs of v, changed as little as needed to be orthogonal to the signs g, sample by sample: [N, ...] each.

    v agrees with g in some elements and opposes it in others. Of whichever are more, those of smallest |weight| are
    flipped until both are equally many; where g has an odd number of non-zero elements, one becomes 0. 0 in v counts
    as +1.
    """
    shape, g, v, weight = g.shape, g.flatten(1), v.flatten(1), weight.flatten(1)
    v = torch.where(v == 0, 1, v.sign())
    agree = g * v
    excess = agree.sum(1, keepdim=True)
    weight = torch.where(agree * excess > 0, weight.abs(), math.inf)  # so elements that may be flipped come first
    rank = weight.argsort(dim=1, stable=True).argsort(dim=1)
    half = excess.abs().div(2, rounding_mode="floor")
    odd = excess.abs() % 2
    v = torch.where(rank < half, -v, v)
    return torch.where((rank == half) & (odd == 1), 0, v).view(shape)


def loss_surface(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 16 / 255, points: int = 21,
                 other: Model | None = None, clip: bool = False, key: Tensor | None = None,
                 index: Tensor | None = None, batch_size: int = batches.BATCH_SIZE, batch: Pick = None) -> LossSurface:
    """The loss at x + e1 * g + e2 * g_orthogonal for e1, e2 on a grid of `points` x `points` in [-eps, eps].

    Tramer et al. 2018, figure 1: g is the sign of the gradient of the cross-entropy at x, g_orthogonal a vector of
    signs orthogonal to it. A masked model shows sharp curvature close to x; a small eps zooms into it.

    x: a few images, or a loader; each takes points^2 images in forward passes. other: a model (one that transfers) the
    sign of whose gradient g_orthogonal follows, as in the paper: just enough elements, those where that gradient is
    smallest, are flipped or zeroed to make it orthogonal to g. None: random signs (Rademacher), made orthogonal in the
    same way. clip: clip to [0, 1] before the model; by default the surface is the model's own, without the box.
    points: >= 2; an odd number has x itself in the middle. batch_size: images in a forward pass, about.
    Other arguments and errors: :func:`ensadv_fast.diagnose.batches.per_batch`.
    """
    op = "loss_surface"
    eps = batches.check_eps(op, eps)
    checks.integer(op, "points", points, 2)
    checks.flag(op, "clip", clip)
    checks.integer(op, "batch_size", batch_size, 1)
    other = None if other is None else as_source(other)
    sign_key, weight_key = batches.child_keys(op, key, 2)
    steps = torch.linspace(-eps, eps, points, dtype=torch.float64, device="cpu")

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        g = batches.direction(source, x, y).sign()
        if other is None:
            v = batches.noise(x, sign_key, 1.0, "rademacher", index)
            weight = batches.noise(x, weight_key, 1.0, "uniform", index)
        else:
            v = weight = batches.direction(other, x, y)
        across = orthogonal_signs(g, v, weight)
        return {**_on_grid(source, x, y, g, across, steps, clip=clip, batch_size=batch_size), "labels": y}

    size = max(1, batch_size // points) if isinstance(x, Tensor) else batch_size
    rows = batches.per_batch(op, model, x, y, index, size, measure, batch)
    return LossSurface(steps.float(), steps.float().clone(), **rows)


def _on_grid(source: BaseSource, x: Tensor, y: Tensor, along: Tensor, across: Tensor, steps: Tensor, *, clip: bool,
             batch_size: int) -> batches.Rows:
    """loss (float32) and predicted (int64), [N, P, P], at x + steps[i] * along + steps[j] * across."""
    points = len(steps)
    grid = torch.cartesian_prod(steps, steps).to(x)  # [P * P, 2]
    losses, classes = [], []
    for pairs in grid.split(max(1, batch_size // len(x))):
        e1, e2 = (broadcast(e, x[None]) for e in pairs.unbind(1))
        images = (x + e1 * along + e2 * across).flatten(0, 1)
        images = images.clamp(0, 1) if clip else images
        loss, predicted = batches.judge(source, images, y.repeat(len(pairs)))
        losses.append(loss.view(len(pairs), len(x)))
        classes.append(predicted.view(len(pairs), len(x)))
    loss, predicted = (torch.cat(parts).T.unflatten(1, (points, points)) for parts in (losses, classes))
    return {"loss": loss.float(), "predicted": predicted}
