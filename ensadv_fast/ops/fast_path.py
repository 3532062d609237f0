"""Calls that need no checking.

Most calls need no checking: if every tensor is dense, on one device and without gradient, the op is called at once; it
refuses bad arguments before it writes, and only then are they checked for a good message.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import CHECK_CUDA


def direct(x: object, *others: object) -> bool:
    """May the op be tried on these (None: absent) as they are, before anything is checked or brought to a format?

    Most calls may, and the checks take longer than a small op. What it refuses it refuses before it writes, and
    :func:`tried` then says so: the checks know how to put it.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.dim():
        return False
    cpu = x.is_cpu
    if not cpu and CHECK_CUDA:
        return False
    for t in (x, *others):
        if t is not None and (type(t) is not Tensor or t.layout is not torch.strided or not t.is_contiguous()
                              or t.requires_grad or not (t.is_cpu if cpu else t.is_cuda)):
            return False
    return True


def as_given(value: object) -> tuple[Tensor | None, float] | None:
    """What :func:`per_sample` makes of a number or tensor that the op may be tried on; else None."""
    if type(value) is float:
        return None, value
    return (value, 0.0) if type(value) is Tensor else None


def direct_bounds(lo: object, hi: object) -> bool:
    """Are these bounds that :func:`bounds` leaves as they are?"""
    return type(lo) is type(hi) is float and lo < hi


def direct_step(x: object, step: object, center: object, eps: object, lo: object, hi: object,
                *others: object) -> tuple[Tensor | None, Tensor | None, float, float] | None:
    """step and eps as schemas take them, both tensors first, where a step may be tried on all of this; else None."""
    s, e = as_given(step), as_given(0.0 if eps is None else eps)
    if (s and e and (center is None) == (eps is None) and direct_bounds(lo, hi)
            and direct(x, center, s[0], e[0], *others)):
        return s[0], e[0], s[1], e[1]
    return None


def tried(op: Callable[..., object], *args: object) -> bool:
    """Call the op; False if it refuses its arguments."""
    try:
        op(*args)
    except RuntimeError:
        return False
    return True
