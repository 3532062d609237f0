"""Adversarial batches, and how much of a global batch is in them."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops


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


class Counts(NamedTuple):
    """How many samples of a batch are clean and how many are adversarial."""

    clean: int
    adversarial: int

    @classmethod
    def total(cls, several: Iterable[Counts]) -> Counts:
        """The counts of several batches together."""
        clean, adversarial = zip(*several, strict=True)
        return cls(sum(clean), sum(adversarial))

    def weight(self, lam: float) -> float:
        """What these samples weigh in `mixed_cross_entropy`: a clean one 1, an adversarial one lam."""
        return self.clean + lam * self.adversarial

    def share(self, whole: Counts, lam: float) -> float:
        """The share, 0..1, that these samples have in the mixed loss of a batch of `whole`, which they are part of.

        0 where the whole batch weighs nothing (lam 0 and no clean sample): its mixed loss is 0 then.
        """
        total = whole.weight(lam)
        return self.weight(lam) / total if total else 0.0


@dataclass(frozen=True)
class Part:
    """The samples rank, rank + world, rank + 2 world... of a global batch of `total`: what one of `world` ranks has."""

    rank: int
    world: int
    total: int

    def count(self, first: int) -> int:
        """How many of the global batch's first `first` samples are in this part."""
        return max(0, -(-(first - self.rank) // self.world))

    def positions(self, n: int, device: torch.device) -> Tensor:
        """Where the first n samples of this part stand in the global batch, int64 [n]."""
        return torch.arange(n, device=device) * self.world + self.rank

    def every(self, n: int, i: int) -> Part:
        """Every n-th sample of this part, from its i-th one on."""
        return Part(self.rank + self.world * i, self.world * n, self.total)


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
    counts: Counts
    all_counts: Counts
