"""The adversarial cone: how many orthogonal directions around an image fool a model (Tramer et al. 2018, section 4)."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..sources.base import BaseSource
from . import batches
from .batches import Data, Model, Result
from .hadamard import ORDERS, regular_hadamard
from .statistics import Interval, proportion


@dataclass(frozen=True)
class ConeDimension(Result):
    """Over the samples that the model classifies correctly.

    at_least: {k: share of them around which all k directions of the construction of order k, or of a larger one, fool
    the model, with Wilson's interval}. dimension: int64 [N], the largest such k per sample, 0 where there is none, -1
    where the clean image is misclassified. fooling: {k: int64 [N], how many of its k directions fool}, -1 likewise.
    correct: number of samples in the shares.
    """

    at_least: dict[int, Interval]
    dimension: Tensor
    fooling: dict[int, Tensor]
    correct: int


def cone_directions(grad: Tensor, order: int, eps: float, key: Tensor,
                    index: Tensor | None = None) -> Iterator[Tensor]:
    """`order` orthogonal directions of L-inf norm eps around each sample, all aligned with the gradient, one by one.

    grad: [N, ...], finite, d elements a sample; order: k in 1, 4, 16, 36, 64, 100, at most d; key, index: of the
    assignment, as everywhere. Yields k tensors of grad's shape and dtype. Raises ValueError for another order.

    The construction (Tramer et al. 2018, appendix; regular Hadamard matrix H of order k, rows of sum sqrt(k)): pixels
    are dealt out to k cells of equal size, and r_i = eps * H[i, cell] * sign(grad), pixel by pixel; the d mod k pixels
    left over are 0. Then

    - r_i . r_j = eps^2 * (d // k) * sum_c H[i, c] H[j, c] = 0 for i != j: they are orthogonal. A pixel without gradient
      counts as positive for this, which changes no product with the gradient;
    - grad . r_i = eps * sum_c H[i, c] m_c with m_c the sum of |grad| over cell c. Each pixel is equally likely in each
      cell, so E[m_c] = m / k with m the sum over the pixels dealt, and E[grad . r_i] = eps * (m / k) * sqrt(k)
      = eps * m / sqrt(k), with m = |grad|_1 where k divides d. (For k orthogonal vectors of this norm, no more can be
      had of every one.) The mean over i is exactly that (the column sums of H are sqrt(k), too), and where all |grad|
      are equal, so is each one.

    Pixels are dealt in rounds: those with the k largest |grad| one to each cell at random, then the next k, so that
    every cell gets its share of the large ones (the paper deals all at once) and those left over are the smallest.
    """
    n, d = len(grad), grad[0].numel()
    if order > d:
        raise ValueError(f"cone_directions: order must be at most the {d} elements of an image, got {order}")
    matrix = regular_hadamard(order).to(grad)
    flat = grad.flatten(1)
    rounds = d // order
    index = torch.arange(n, device=grad.device) if index is None else index
    ranked = flat.abs().argsort(dim=1, descending=True, stable=True)[:, :rounds * order]
    draws = batches.noise(flat.new_zeros(n, rounds, order), key, 1.0, "uniform", index)
    cell = torch.full((n, d), -1, device=grad.device).scatter_(1, ranked, draws.argsort(dim=2).flatten(1))
    signs = torch.where(flat < 0, -eps, eps).to(grad).where(cell >= 0, 0)
    cell = cell.clamp_(min=0)
    for row in matrix:
        yield (row[cell] * signs).view(grad.shape)


def cone_dimension(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 16 / 255,
                   orders: Sequence[int] = ORDERS[1:], clip: bool = True, key: Tensor | None = None,
                   index: Tensor | None = None, batch_size: int = batches.BATCH_SIZE) -> ConeDimension:
    """Around how many orthogonal, gradient-aligned directions of size eps a model errs, sample by sample.

    Tramer et al. 2018, section 4.2 and figure 2 (500 correctly classified points, k up to 100: v3 has more than 50 for
    30 % of them; v3adv none for about 80 %, and about 90 or more for most of the rest). The gradient is that of the
    cross-entropy with y; the directions are those of :func:`cone_directions`, orthogonal before they are clipped. A
    sample has dimension k where all k directions of an order k fool the model; order 1 is FGSM.

    orders: some of 1, 4, 16, 36, 64, 100, none above the elements of an image: sum(orders) forward passes. clip: clip
    x + r to [0, 1], so that what counts is an image. Other arguments and errors:
    :func:`ensadv_fast.diagnose.batches.over`.
    """
    op = "cone_dimension"
    eps = batches.eps_of(op, eps)
    orders = tuple(sorted(set(orders)))
    if not orders or not set(orders) <= set(ORDERS):
        raise ValueError(f"{op}: orders must be some of {', '.join(map(str, ORDERS))}, got {orders!r}")
    if not isinstance(clip, bool):
        raise TypeError(f"{op}: clip must be a bool, got {type(clip).__name__}")
    deal_keys = dict(zip(ORDERS, batches.child_keys(op, key, len(ORDERS)), strict=True))

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        grad = batches.direction(source, x, y)
        rows = {"clean": batches.wrong(source, x, y)}
        for k in orders:
            fooled = torch.zeros_like(y)
            for r in cone_directions(grad, k, eps, deal_keys[k], index):
                fooled += batches.wrong(source, (x + r).clamp(0, 1) if clip else x + r, y)
            rows[str(k)] = fooled
        return rows

    rows = batches.over(op, model, x, y, index, batch_size, measure)
    wrong = rows.pop("clean")
    fooling = {k: rows[str(k)].masked_fill(wrong, -1) for k in orders}
    dimension = torch.stack([torch.where(fooling[k] == k, k, 0) for k in orders]).amax(0).masked_fill(wrong, -1)
    right = dimension[~wrong]
    return ConeDimension({k: proportion(right >= k) for k in orders}, dimension, fooling, len(right))
