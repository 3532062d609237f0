"""The exact L-inf step that torchattacks and Foolbox share."""
from typing import Any

import torch
from torch import Tensor


def linf_step(out: Tensor, point: Tensor, along: Tensor, step: float | Tensor, clean: Tensor, eps: Any) -> Tensor:
    """clean + clamp(point + step sign(along) - clean, -eps, eps), in `out`, which is none of the others: these
    libraries' order, which rounds otherwise than our kernel's.

    step, eps: numbers, or tensors that broadcast over the images.
    """
    torch.sign(along, out=out)
    if isinstance(step, Tensor):
        out.mul_(step).add_(point)
    else:
        torch.add(point, out, alpha=step, out=out)
    return out.sub_(clean).clamp_(-eps, eps).add_(clean)
