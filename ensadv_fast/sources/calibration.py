"""How well a fast source's gradients serve an attack, measured against exact ones on real images."""
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.losses import sample_losses
from ..ops.memory import broadcast
from .base import BaseSource

BATCH = 64  # images at a time: the exact model's float32 activations must fit beside the fast one's


class Agreement(NamedTuple):
    """What :meth:`Source.calibrate` measures, over all images; Python floats.

    signs: share of gradient elements with equal signs, 0..1. weighted_signs: the same, each element weighted by the
    magnitude of its true gradient. loss_increase: how much the FGSM step on the fast gradient raises the exact model's
    mean loss, divided by how much the step on the exact gradient does (1: as good; NaN where the exact step does not
    raise the loss). error: the exact model's error rate under the fast step minus that under the exact step (-1..1,
    negative where the fast attack is weaker).
    """

    signs: float
    weighted_signs: float
    loss_increase: float
    error: float


def measure_agreement(fast: BaseSource, exact: BaseSource, x: Tensor, y: Tensor | None, eps: float,
                      key: Tensor) -> Agreement:
    """Compare the FGSM steps of both sources (cross-entropy; labels y, or `exact`'s predictions) by `exact`'s loss."""
    sums = torch.zeros(7, dtype=torch.float64, device=x.device)
    for i, images in enumerate(x.split(BATCH)):
        with torch.no_grad(), exact.session(key):
            logits = exact.logits(images)
        labels = logits.argmax(1) if y is None else y[i * BATCH:i * BATCH + len(images)]
        found, true = (s.input_grad(images, labels, key=key) for s in (fast, exact))
        equal = found.grad.nan_to_num().sign() == true.grad.nan_to_num().sign()
        scale = broadcast(true.scale.double(), x)
        magnitude = (true.grad.double() / scale).abs().nan_to_num()
        clean = sample_losses(logits, labels).double().sum()
        rows = [equal.double().sum(), (magnitude * equal).sum(), magnitude.sum()]
        for grad in (found.grad, true.grad):
            x_adv = ops.sign_step(images, grad, eps)
            with torch.no_grad(), exact.session(key):
                logits = exact.logits(x_adv)
            rows += [sample_losses(logits, labels).double().sum() - clean, (logits.argmax(1) != labels).double().sum()]
        sums += torch.stack(rows)
    signs, weighted, magnitude, fast_loss, fast_error, exact_loss, exact_error = sums.tolist()
    return Agreement(signs / x.numel(), weighted / magnitude if magnitude else 1.0,
                     fast_loss / exact_loss if exact_loss > 0 else torch.nan, (fast_error - exact_error) / len(x))
