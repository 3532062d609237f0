"""The adversarial cone: how many orthogonal directions around an image fool a model (Tramer et al. 2018, section 4)."""
from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import checks
from ..sources.base import BaseSource
from . import batches
from .batches import Data, Model, Pick, Result
from .hadamard import ORDERS, regular_hadamard
from .statistics import Interval, proportion


@dataclass(frozen=True)
class ConeDimension(Result):
    """Over the samples that the model classifies correctly.

    at_least: {k: share of them around which all directions of the construction of order k, or of a larger order, fool
    the model, with Wilson's interval}. dimension: int64 [N], the largest such k per sample, 0 where there is none, -1
    where the clean image is misclassified. fooling: {k: int64 [N], how many of the k directions fool the model}, -1
    where the clean image is misclassified. correct: number of samples in the shares.
    """

    at_least: dict[int, Interval]
    dimension: Tensor
    fooling: dict[int, Tensor]
    correct: int


def cone_directions(grad: Tensor, order: int, eps: float, key: Tensor,
                    index: Tensor | None = None) -> Iterator[Tensor]:
    """`order` orthogonal directions of L-inf norm eps around each sample, all aligned with the gradient, one by one.

    grad: [N, ...], finite, d elements a sample; order: k in 1, 4, 16, 36, 64, 100, at most d; key, index: of the
    assignment of pixels. Yields k tensors of grad's shape and dtype. Raises ValueError for another order.

    The construction (Tramer et al. 2018, appendix; H is a regular Hadamard matrix of order k, with rows of sum
    sqrt(k)): pixels are dealt out to k cells of equal size, and r_i = eps * H[i, cell] * sign(grad), pixel by pixel.
    The d mod k pixels left over are 0. Then

    - r_i . r_j = eps^2 * (d // k) * sum_c H[i, c] H[j, c] = 0 for i != j: they are orthogonal. A pixel without gradient
      gets a positive sign, which changes no product with the gradient;
    - grad . r_i = eps * sum_c H[i, c] m_c with m_c the sum of |grad| over cell c. Each pixel is equally likely in each
      cell, so E[m_c] = m / k with m the sum over the pixels dealt, and E[grad . r_i] = eps * (m / k) * sqrt(k)
      = eps * m / sqrt(k), with m = |grad|_1 where k divides d. (k orthogonal vectors of this norm cannot all have a
      larger product.) The mean over i is exactly that, as the column sums of H are sqrt(k) too; where all |grad| are
      equal, so is each product.

    Pixels are dealt in rounds: the k pixels with the largest |grad| go one to each cell at random, then the next k. So
    every cell gets its share of large ones (the paper deals all at once), and the pixels left over are the smallest.
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
                   index: Tensor | None = None, batch_size: int = batches.BATCH_SIZE,
                   batch: Pick = None) -> ConeDimension:
    """Around how many orthogonal, gradient-aligned directions of size eps a model errs, sample by sample.

    Tramer et al. 2018, section 4.2 and figure 2 (500 correctly classified points, k up to 100: v3 has more than 50 for
    30 % of them; v3adv none for about 80 %, and about 90 or more for most of the rest). The gradient is that of the
    cross-entropy with y; the directions are those of :func:`cone_directions`, orthogonal before they are clipped. A
    sample has dimension k where all k directions of an order k fool the model; order 1 is FGSM.

    orders: some of 1, 4, 16, 36, 64, 100, none above the elements of an image; they take sum(orders) forward passes.
    clip: clip x + r to [0, 1], so that only images count. Other arguments and errors:
    :func:`ensadv_fast.diagnose.batches.per_batch`.
    """
    op = "cone_dimension"
    eps = batches.check_eps(op, eps)
    orders = tuple(sorted(set(orders)))
    if not orders or not set(orders) <= set(ORDERS):
        raise ValueError(f"{op}: orders must be some of {', '.join(map(str, ORDERS))}, got {orders!r}")
    checks.flag(op, "clip", clip)
    deal_keys = dict(zip(ORDERS, batches.child_keys(op, key, len(ORDERS)), strict=True))

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        grad = batches.direction(source, x, y)
        rows = {"clean": batches.is_wrong(source, x, y)}
        for k in orders:
            fooled = torch.zeros_like(y)
            for r in cone_directions(grad, k, eps, deal_keys[k], index):
                fooled += batches.is_wrong(source, (x + r).clamp(0, 1) if clip else x + r, y)
            rows[str(k)] = fooled
        return rows

    rows = batches.per_batch(op, model, x, y, index, batch_size, measure, batch)
    wrong = rows.pop("clean")
    fooling = {k: rows[str(k)].masked_fill(wrong, -1) for k in orders}
    dimension = torch.stack([torch.where(fooling[k] == k, k, 0) for k in orders]).amax(0).masked_fill(wrong, -1)
    right = dimension[~wrong]
    return ConeDimension({k: proportion(right >= k) for k in orders}, dimension, fooling, len(right))
