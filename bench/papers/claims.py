"""Numbers with their 95 % intervals, and the rules that say whether a paper's claim came out of them.

A claim is decided by its rule alone. Its interval takes in both what the test images and what the seeds leave open.
"""
from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np

from ensadv_fast.evaluate import statistics

REPRODUCED, NOT_REPRODUCED, UNDECIDED = "reproduced", "not reproduced", "not decidable at this size"
LEAST = 0.01  # an effect that is certainly smaller than one point is none
Z = statistics.Z95
student = statistics.student


def wilson(share: float, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval of a share of n images, which may be a mean over seeds."""
    return statistics.wilson(min(share * n, n), n)


@dataclass(frozen=True)
class Estimate:
    """A number and its 95 % interval; n images, seeds networks."""

    value: float
    low: float
    high: float
    n: int = 0
    seeds: int = 1

    def __str__(self) -> str:
        return f"{100 * self.value:.1f} ({100 * self.low:.1f} to {100 * self.high:.1f})"


def exactly(value: float) -> Estimate:
    return Estimate(value, value, value)


def spread(groups: Sequence[Sequence[float]]) -> tuple[float, int]:
    """The standard deviation over seeds, pooled over networks, and its degrees of freedom; 0 where there are none."""
    dof = sum(len(g) - 1 for g in groups)
    return (math.sqrt(sum(np.var(g) * len(g) for g in groups) / dof), dof) if dof else (0.0, 0)


def estimate(shares: Sequence[float], n: int, pooled: tuple[float, int] | None = None) -> Estimate:
    """The mean of the seeds' shares of n images (the same for all seeds), with Wilson's interval for the images and
    Student's for the seeds, added in quadrature. pooled: a standard deviation from `spread` in place of these seeds'
    own, for two seeds tell nearly nothing. A single seed's interval is the images' alone."""
    value = float(np.mean(shares))
    e = _widened(Estimate(value, *wilson(value, n), n), shares, pooled)
    return replace(e, low=max(0.0, e.low), high=min(1.0, e.high))


def _widened(images: Estimate, values: Sequence[float], pooled: tuple[float, int] | None) -> Estimate:
    """An estimate whose interval knows the images only, with what the seeds' values leave open."""
    sd, dof = pooled or spread([values])
    if not dof:
        return replace(images, seeds=len(values))
    half, v = student(dof) * sd / math.sqrt(len(values)), images.value
    return replace(images, low=v - math.hypot(v - images.low, half), high=v + math.hypot(images.high - v, half),
                   seeds=len(values))


def column(groups: Sequence[Sequence[float]], n: int) -> list[Estimate]:
    """An estimate for each network of a table's column; where there are two seeds, with the whole column's spread."""
    pooled = spread(groups)
    return [estimate(g, n, pooled if len(g) == 2 else None) for g in groups]


def gaps(firsts: Sequence[Sequence[float]], seconds: Sequence[Sequence[float]], n: int) -> list[Estimate]:
    """As `column`, of first - second on the same networks: the seeds' spread is that of their differences."""
    each = [[a - b for a, b in zip(f, s, strict=True)] for f, s in zip(firsts, seconds, strict=True)]
    pooled = spread(each)
    return [_widened(difference(estimate([float(np.mean(f))], n), estimate([float(np.mean(s))], n)), d,
                     pooled if len(d) == 2 else None) for f, s, d in zip(firsts, seconds, each)]


def accuracy(error: Estimate) -> Estimate:
    return Estimate(1 - error.value, 1 - error.high, 1 - error.low, error.n, error.seeds)


def scaled(e: Estimate, factor: float) -> Estimate:
    return Estimate(factor * e.value, factor * e.low, factor * e.high, e.n, e.seeds)


def difference(a: Estimate, b: Estimate) -> Estimate:
    """a - b, from their intervals (Newcombe 1998, method 10; images that both share only make it wider)."""
    d = a.value - b.value
    return Estimate(d, d - math.hypot(a.value - a.low, b.high - b.value),
                    d + math.hypot(a.high - a.value, b.value - b.low), min(a.n, b.n), min(a.seeds, b.seeds))


def ratio(a: Estimate, b: Estimate) -> Estimate:
    """a / b, relative deviations added in quadrature; b counts as at least one image."""
    base = max(b.value, 1 / max(b.n, 1))
    r = a.value / base
    down = math.hypot(a.value - a.low, r * (b.high - base)) / base
    up = math.hypot(a.high - a.value, r * (base - b.low)) / base
    return Estimate(r, max(0.0, r - down), r + up, min(a.n, b.n), min(a.seeds, b.seeds))


@dataclass(frozen=True)
class Finding:
    """What a rule says, and the numbers it says it of."""

    verdict: str
    because: str


def _estimate(value: Estimate | float) -> Estimate:
    return value if isinstance(value, Estimate) else exactly(value)


def _compared(what: str, a: Estimate, b: Estimate | float) -> str:
    return f"{what}: {a} against " + (f"{b}, difference {difference(a, b)}" if isinstance(b, Estimate) else
                                      f"{100 * b:.1f}")


def greater(what: str, a: Estimate, b: Estimate | float, least: float = LEAST) -> Finding:
    """Is a > b? Reproduced where the difference's interval lies above 0, not reproduced where it lies below `least`."""
    d = difference(a, _estimate(b))
    verdict = REPRODUCED if d.low > 0 else NOT_REPRODUCED if d.high < least else UNDECIDED
    return Finding(verdict, _compared(what, a, b))


def less(what: str, a: Estimate, b: Estimate | float, least: float = LEAST) -> Finding:
    """Is a < b? As `greater`, the other way round."""
    return Finding(greater(what, _estimate(b), a, least).verdict, _compared(what, a, b))


def same(what: str, a: Estimate, b: Estimate | float, within: float) -> Finding:
    """Do they differ by less than `within`? Reproduced where the whole interval says so, not where none of it does."""
    d = difference(a, _estimate(b))
    verdict = (REPRODUCED if -within < d.low and d.high < within else
               NOT_REPRODUCED if d.low >= within or d.high <= -within else UNDECIDED)
    return Finding(verdict, f"{_compared(what, a, b)}, allowed {100 * within:.1f}")


def every(findings: Sequence[Finding]) -> str:
    """The verdict on a claim made of several: one that fails fails it, one that is open leaves it open."""
    verdicts = [f.verdict for f in findings]
    if not verdicts:
        raise ValueError("every: a claim needs at least one finding")
    return next((v for v in (NOT_REPRODUCED, UNDECIDED) if v in verdicts), REPRODUCED)


def claim(text: str, source: str, mark: str, findings: Sequence[Finding]) -> dict:
    """A paper's claim as it stands in a result. source: where in which paper; mark: V, read, or M, from memory."""
    if mark not in ("V", "M"):
        raise ValueError(f"claim: mark must be V (verified) or M (from memory), got {mark!r}")
    return {"claim": text, "source": source, "mark": mark, "verdict": every(findings),
            "findings": [{"verdict": f.verdict, "because": f.because} for f in findings]}
