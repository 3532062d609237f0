"""Adversarial batches and the shares that make them up."""
from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .. import ops
from ..ops import checks


@dataclass(frozen=True)
class EpsDistribution:
    """One eps per sample from `ops.sample_eps`: Kurakin's abs(truncated normal, sigma = eps_max/2) by default.

    Called with (n, key) it returns float32 [n]; with `index` (int64 [n]) the eps of a sample depends on its index
    instead of its place in the batch.
    """

    eps_max: float
    dist: str = "truncated_normal"
    sigma: float | None = None

    def __call__(self, n: int, key: Tensor, index: Tensor | None = None) -> Tensor:
        return ops.sample_eps(n, key, dist=self.dist, eps_max=self.eps_max, sigma=self.sigma, index=index)


@dataclass(frozen=True)
class Part:
    """The samples rank, rank + world, rank + 2 world... of a global batch of `total`: what one of `world` ranks has."""

    rank: int
    world: int
    total: int

    def of(self, first: int) -> int:
        """How many of the global batch's first that many samples it has."""
        return max(0, -(-(first - self.rank) // self.world))

    def places(self, n: int, device: torch.device) -> Tensor:
        """Where its first n samples stand in the global batch, int64 [n]."""
        return torch.arange(n, device=device) * self.world + self.rank


@dataclass(frozen=True)
class AdversarialBatch:
    """What an `EnsembleAdversary` returns.

    x: images [N, C, H, W], a new tensor; y: labels, int64 [N] or soft [N, classes]; is_adv: bool [N] on x's
    device; source: which source crafted it: 0..len(static)-1, len(static) for the live model, -1 for a clean batch.
    counts: how many clean and how many adversarial samples are in it; all_counts: in the global batch it is part of.
    """

    x: Tensor
    y: Tensor
    is_adv: Tensor
    source: int
    counts: tuple[int, int] = (1, 0)
    all_counts: tuple[int, int] = (1, 0)


def hard_or_soft(op: str, y: Tensor, n: int) -> Tensor:
    """The labels of n samples: int64 [n] from integers or bools [n] or [n, 1]; soft ones [n, classes] as they are.

    TypeError, ValueError: anything else, such as floats [n, 1], soft labels of a single class.
    """
    soft = isinstance(y, Tensor) and y.dim() == 2 and y.shape[0] == n and y.dtype != torch.bool
    if soft and (y.shape[1] > 1 or y.is_floating_point()):
        if y.shape[1] < 2:
            raise ValueError(f"{op}: y must have at least 2 classes where it is soft [N, classes], got "
                             f"{checks.names([y.dtype])} {tuple(y.shape)}")
        return y
    return checks.class_numbers(op, "y", y, n)


def weight(batches: Sequence[AdversarialBatch], lam: float) -> float:
    """The share that these parts of one global batch have in its `mixed_cross_entropy`, 0..1. A rank's loss times this
    and times the number of ranks, averaged over them, is the loss of the global batch."""
    clean, adversarial = (sum(b.counts[i] for b in batches) for i in range(2))
    all_clean, all_adversarial = batches[0].all_counts
    return (clean + lam * adversarial) / (all_clean + lam * all_adversarial)
