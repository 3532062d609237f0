"""Proportions: counts with Wilson's 95 % interval, and which of several are tied with the best one."""
from __future__ import annotations

import math
from collections.abc import Hashable, Mapping
from dataclasses import dataclass
from typing import TypeVar

import numpy as np

Z95 = 1.959963984540054  # the normal distribution's 97.5 % quantile
Name = TypeVar("Name", bound=Hashable)


@dataclass(frozen=True)
class Rate:
    """`count` of `n` examples. value: count / n; interval: Wilson's at 95 %. Both are None where n is 0."""

    count: int
    n: int

    @property
    def value(self) -> float | None:
        return self.count / self.n if self.n else None

    @property
    def interval(self) -> tuple[float, float] | None:
        return wilson(self.count, self.n) if self.n else None

    def to_dict(self) -> dict[str, float | int | None]:
        """{"value", "count", "n", "low", "high"}; value, low and high are fractions, None where n is 0."""
        low, high = self.interval or (None, None)
        return {"value": self.value, "count": self.count, "n": self.n, "low": low, "high": high}


# Student's t, 97.5 %, by degrees of freedom from 1 on.
T95 = (12.7062, 4.3027, 3.1824, 2.7764, 2.5706, 2.4469, 2.3646, 2.3060, 2.2622, 2.2281)


def student(dof: int) -> float:
    """The 97.5 % point of Student's t with dof >= 1 degrees of freedom: the table, then Cornish and Fisher's
    expansion."""
    if dof <= len(T95):
        return T95[dof - 1]
    return (Z95 + (Z95**3 + Z95) / (4 * dof) + (5 * Z95**5 + 16 * Z95**3 + 3 * Z95) / (96 * dof**2)
            + (3 * Z95**7 + 19 * Z95**5 + 17 * Z95**3 - 15 * Z95) / (384 * dof**3))


def wilson(count: float, n: int, z: float = Z95) -> tuple[float, float]:
    """The score interval of a proportion (Wilson 1927): the p for which |count / n - p| <= z sqrt(p (1 - p) / n).

    It stays within [0, 1], and has a width also where count is 0 or n, where the normal interval has none. count need
    not be whole: it may be a mean over runs. z: the normal distribution's quantile, default that of 95 %. Returns
    (low, high). ValueError unless 0 <= count <= n and n >= 1.
    """
    if not 0 <= count <= n or n < 1:
        raise ValueError(f"wilson: count and n must be 0 <= count <= n and n >= 1, got {count} and {n}")
    p, zz = count / n, z * z / n
    middle, half = p + zz / 2, z * math.sqrt(p * (1 - p) / n + zz / (4 * n))
    low, high = (middle - half) / (1 + zz), (middle + half) / (1 + zz)
    return 0.0 if count == 0 else low, 1.0 if count == n else high  # exactly, without the roundings of the two terms


def mcnemar(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of McNemar's exact test: do two bool arrays [N] over the same examples have one probability?

    Only the examples on which the two differ count. Under the hypothesis each of those is a fair coin (McNemar 1947;
    the exact binomial form). ValueError where they are not bool [N] of one length N >= 1.
    """
    _check_paired("mcnemar", a, b)
    first, second = int((a & ~b).sum()), int((~a & b).sum())
    n, fewer = first + second, min(first, second)
    logs = np.array([math.lgamma(n + 1) - math.lgamma(k + 1) - math.lgamma(n - k + 1) for k in range(fewer + 1)])
    return min(1.0, 2 * float(np.exp(logs - n * math.log(2)).sum()))


def two_proportions(a: np.ndarray, b: np.ndarray) -> float:
    """Two-sided p-value of the pooled z-test, as if the two bool arrays [N] were of independent examples.

    ValueError where they are not bool [N] of one length N >= 1.
    """
    _check_paired("two_proportions", a, b)
    pooled = (a.mean() + b.mean()) / 2
    spread = math.sqrt(2 * pooled * (1 - pooled) / len(a))
    return math.erfc(abs(a.mean() - b.mean()) / spread / math.sqrt(2)) if spread else 1.0


TESTS = {"mcnemar": mcnemar, "independent": two_proportions}


def ties(bits: Mapping[Name, np.ndarray], *, best: str = "lowest", test: str = "mcnemar") -> list[Name]:
    """The names whose proportion is the best or does not differ from it at the 5 % level, in their order.

    Args:
        bits: name -> bool [N], over the same N examples.
        best: "lowest" or "highest" proportion of True.
        test: "mcnemar", paired, for one set of examples shown to all; or "independent", the two-proportion z-test,
            which finds more ties where the errors are alike. Tramer et al. 2018 mark ties at 95 % confidence; which
            test they used is not known to us.

    No correction is made for the number of comparisons. Raises ValueError: no bits, unequal lengths, unknown words.
    """
    if best not in ("lowest", "highest"):
        raise ValueError(f"ties: best must be lowest or highest, got {best!r}")
    if test not in TESTS:
        raise ValueError(f"ties: test must be {' or '.join(TESTS)}, got {test!r}")
    if not bits:
        raise ValueError("ties: bits must hold at least one name, got none")
    top = (min if best == "lowest" else max)(bits, key=lambda name: bits[name].mean())
    return [name for name in bits if name == top or TESTS[test](bits[name], bits[top]) > 0.05]


def _check_paired(op: str, a: np.ndarray, b: np.ndarray) -> None:
    if a.dtype != bool or b.dtype != bool or a.ndim != 1 or a.shape != b.shape or not len(a):
        raise ValueError(f"{op}: a and b must be two bool arrays [N] of one length N >= 1, got {a.dtype} "
                         f"{list(a.shape)} and {b.dtype} {list(b.shape)}")
