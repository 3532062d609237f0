"""What comes in: labels, hard or soft, and the items of a loader."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from .batches import Part


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


def read_items(op: str, loader: Iterable[Any], pick: Callable[[Any], Sequence[Any]] | None) -> Iterator[Sequence[Any]]:
    """(x, y), (x, y, index) or (x, y, index, part) of what the loader yields. pick: makes that of an item of another
    form. TypeError, ValueError: naming what came."""
    for given in loader:
        item = checks.batch_parts(op, given, pick, most=4)
        checks.images(op, item[0])
        index, part = [*item[2:], None, None][:2]
        flat = index is None or index.dim() == 1
        if not (isinstance(item[1], Tensor) and flat and isinstance(part, Part | None)):
            raise TypeError(f"{op}: loader must give batches (x, y) or (x, y, index), got {checks.told(item)}; a "
                            "function given as batch= makes (x, y) of that")
        yield item
