"""The entropy of the predicted distribution as a loss: what the control attack "fast entropy" climbs."""
import torch
from torch import Tensor

from ..ops.losses import choose_labels
from ..sources.base import BaseSource, InputGrad, for_autograd, gradient


def entropies(logits: Tensor) -> Tensor:
    """H = -sum_i p_i log p_i per sample [N], at least float32, from logits [N, C]."""
    return _entropies(_log_probabilities(logits))


def input_grad(source: BaseSource, x: Tensor, labels: Tensor | None, rule: str, key: Tensor | None,
               index: Tensor | None) -> InputGrad:
    """As :meth:`BaseSource.input_grad_unchecked` with rescale, for the entropy; the labels do not enter it.

    The gradient by the logits, -p_i (log p_i + H), is lifted by a power of two per sample, so that its largest entry
    comes to lie in [1, 2) (or by 2^100) and no dtype underflows.
    """
    x, labels = for_autograd(x), for_autograd(labels)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        logits = source.logits(leaf)
    log_p = _log_probabilities(logits.detach())
    value = _entropies(log_p)
    start = torch.where(log_p > -torch.inf, -log_p.exp() * (log_p + value[:, None]), 0.0)
    largest = start.abs().amax(1)
    lift = torch.where(largest > 0, (1 - torch.frexp(largest).exponent).clamp(max=100), 0)
    scale = torch.ldexp(torch.ones_like(largest), lift)
    grad = gradient(leaf, logits, start * scale[:, None])
    return InputGrad(grad, choose_labels(logits.detach(), labels, rule, key, index), value, logits.detach(), scale)


def _log_probabilities(logits: Tensor) -> Tensor:
    return (logits if logits.dtype == torch.float64 else logits.float()).log_softmax(1)


def _entropies(log_p: Tensor) -> Tensor:
    return torch.special.entr(log_p.exp()).sum(1)
