"""The fast path: most calls need no checking.

The checks take longer than a small op. So where every tensor is dense, on one device and without gradient, the op is
called at once. The op itself refuses bad arguments before it writes anything. Only then does Python check them, to
raise an error that names the argument.
"""
from collections.abc import Callable

import torch
from torch import Tensor

from .checks import CHECK_CUDA


def fits(x: object, *others: object) -> bool:
    """May the op be called on these tensors as they are, unchecked and without a copy? None: an absent one."""
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


def as_scalar_or_tensor(value: object) -> tuple[Tensor | None, float] | None:
    """A float or a tensor as the pair (tensor or None, number) that schemas take; None where it needs checking."""
    if type(value) is float:
        return None, value
    return (value, 0.0) if type(value) is Tensor else None


def plain_bounds(lo: object, hi: object) -> bool:
    """Would :func:`ensadv_fast.ops.checks.bounds` return these bounds unchanged?"""
    return type(lo) is type(hi) is float and lo < hi


def fast_step_sizes(x: object, step: object, center: object, eps: object, lo: object, hi: object,
                    *others: object) -> tuple[Tensor | None, Tensor | None, float, float] | None:
    """(step [N] or None, eps [N] or None, step, eps) as schemas take them; None where any argument needs checking."""
    s, e = as_scalar_or_tensor(step), as_scalar_or_tensor(0.0 if eps is None else eps)
    if (s and e and (center is None) == (eps is None) and plain_bounds(lo, hi)
            and fits(x, center, s[0], e[0], *others)):
        return s[0], e[0], s[1], e[1]
    return None


def accepted(op: Callable[..., object], *args: object) -> bool:
    """Call the op. False: it refused its arguments and wrote nothing; the caller's checks then name the argument."""
    try:
        op(*args)
    except RuntimeError:
        return False
    return True
