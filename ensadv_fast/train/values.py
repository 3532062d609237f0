"""Which values an option of a `Config` takes, and the words that messages have for them."""
from __future__ import annotations

import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Values:
    """words: what a value must be; hold: is this value one of them? None is never asked about."""

    words: str
    hold: Callable[[Any], bool]


def integer(least: int | None = None) -> Values:
    """Integers; a bool is none."""
    return Values("an integer" if least is None else f"an integer >= {least}",
                  lambda v: type(v) is int and (least is None or v >= least))


def number(least: float | None = None, *, above: float | None = None, most: float | None = None,
           below: float | None = None) -> Values:
    """Finite numbers within bounds, of which `above` and `below` are left out; a bool is none."""
    ends = [(">=", least), (">", above), ("<=", most), ("<", below)]
    words = " and ".join(f"{sign} {end}" for sign, end in ends if end is not None)

    def hold(v: Any) -> bool:
        return (type(v) is not bool and isinstance(v, int | float) and math.isfinite(v)
                and (least is None or v >= least) and (above is None or v > above)
                and (most is None or v <= most) and (below is None or v < below))

    return Values(f"a finite number {words}", hold)


def choice(*names: str) -> Values:
    return Values(f"one of {', '.join(names)}", lambda v: isinstance(v, str) and v in names)


def pattern(words: str, expression: str) -> Values:
    """Texts that match the expression as a whole."""
    return Values(words, lambda v: isinstance(v, str) and re.fullmatch(expression, v) is not None)


FLAG = Values("True or False", lambda v: type(v) is bool)
TEXT = Values("a text that is not empty", lambda v: isinstance(v, str) and v != "")
SPECS = Values("a tuple of SPECs", lambda v: isinstance(v, tuple | list) and all(map(TEXT.hold, v)))
