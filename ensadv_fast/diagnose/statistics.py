"""How sure a number is: 95 % intervals of proportions, of paired differences and of means."""
from __future__ import annotations

import math
from dataclasses import dataclass
from statistics import NormalDist

from torch import Tensor

from ..evaluate.statistics import wilson
from .batches import Result


@dataclass(frozen=True)
class Interval(Result):
    """A number over n samples and its 95 % interval [low, high]."""

    value: float
    low: float
    high: float
    n: int

    def __str__(self) -> str:
        return f"{self.value:.3g} ({self.low:.3g} to {self.high:.3g})"

    def percent(self, unit: str = " %") -> str:
        """As "12.3 % (10.1 to 15.0)"."""
        return f"{100 * self.value:.1f}{unit} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def _z(comparisons: int) -> float:
    """Half-width of a two-sided 95 % interval in standard errors, with Bonferroni's correction for `comparisons`."""
    return NormalDist().inv_cdf(1 - 0.025 / comparisons)


def proportion(hits: Tensor) -> Interval:
    """The share of True in a bool tensor [N] with Wilson's interval (Wilson 1927). N = 0: all numbers are NaN."""
    n = hits.numel()
    if not n:
        return Interval(math.nan, math.nan, math.nan, 0)
    count = int(hits.sum())
    return Interval(count / n, *wilson(count, n), n)


def difference(a: Tensor, b: Tensor, comparisons: int = 1) -> Interval:
    """Share of a minus share of b, bool [N] each, of the SAME samples: -1..1.

    The interval is Wald's for paired proportions with half a sample added to each cell (Agresti and Min 2005).
    comparisons: how many such intervals are looked at together (Bonferroni).
    """
    n = a.numel()
    only_a, only_b = ((p & ~q).sum().item() for p, q in ((a, b), (b, a)))
    more, m = only_a - only_b, n + 2
    half = _z(comparisons) * math.sqrt(only_a + only_b + 1 - more * more / m) / m
    value = more / n if n else math.nan
    return Interval(value, max(-1.0, min(value, more / m - half)), min(1.0, max(value, more / m + half)), n)


def average(values: Tensor) -> Interval:
    """Mean of the finite entries of [N] with the normal interval of its standard error; n is the number of them."""
    values = values[values.isfinite()].double()
    n = len(values)
    m = values.mean().item() if n else math.nan
    half = _z(1) * values.std().item() / math.sqrt(n) if n > 1 else math.inf
    return Interval(m, m - half, m + half, n)


def share(part: float, whole: float) -> float:
    """part / whole; NaN where the whole is 0 or less: nothing is a share of that."""
    return part / whole if whole > 0 else math.nan

