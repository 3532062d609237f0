"""Arithmetic that several libraries round alike."""
from typing import Any

import torch
from torch import Tensor

from ..ops.memory import broadcast


def linf_step(out: Tensor, point: Tensor, along: Tensor, step: float | Tensor, clean: Tensor, eps: Any) -> Tensor:
    """clean + clamp(point + step sign(along) - clean, -eps, eps), written into `out`, which is none of the others.

    This is the order of torchattacks and Foolbox, which rounds otherwise than our kernel's. step, eps: numbers, or
    tensors that broadcast over the images.
    """
    torch.sign(along, out=out)
    if isinstance(step, Tensor):
        out.mul_(step).add_(point)
    else:
        torch.add(point, out, alpha=step, out=out)
    return out.sub_(clean).clamp_(-eps, eps).add_(clean)


def sample_norms(t: Tensor, order: int = 2) -> Tensor:
    """The norm of each sample, shaped to broadcast over t. torchattacks and ART sum it so."""
    return broadcast(torch.linalg.vector_norm(t.flatten(1), order, dim=1), t)


def zero_nan(grad: Tensor) -> Tensor:
    """A copy in which NaN is 0; infinities stay."""
    return grad.nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
