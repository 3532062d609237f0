"""The loss of a mixed batch."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .batches import hard_or_soft


def mixed_cross_entropy(logits: Tensor, y: Tensor, is_adv: Tensor, lam: float = 0.3,
                        label_smoothing: float = 0.0) -> Tensor:
    """Kurakin's loss (ICLR 2017, section 2.3): (sum clean + lam * sum adversarial) / ((m-k) + lam*k).

    logits [m, classes], any float dtype (computed in float32, float64's in float64); y: integers or bools [m] or
    [m, 1], or soft labels [m, classes]; is_adv: bool [m], of which k are true; label_smoothing: 0..1, for hard and soft
    y alike. Returns a scalar, with no host sync. On the doubled batch (m = 2k) lam = 1 is the released MNIST code's
    0.5 * clean + 0.5 * adversarial mean; on a purely clean or purely adversarial batch it is the plain mean whatever
    lam > 0 is. lam = 0 leaves the adversarial samples out; where none are left the loss is 0.

    Raises ValueError for shapes that do not fit, a negative lam or a label_smoothing outside 0..1.
    """
    if logits.dim() != 2 or y.shape[0] != logits.shape[0] or is_adv.shape != logits.shape[:1]:
        raise ValueError(f"mixed_cross_entropy: got logits {tuple(logits.shape)}, y {tuple(y.shape)}, is_adv "
                         f"{tuple(is_adv.shape)}, want [m, classes], [m] or [m, classes], [m]")
    if not lam >= 0 or not math.isfinite(lam):
        raise ValueError(f"mixed_cross_entropy: lam: got {lam}, want a number of at least 0")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"mixed_cross_entropy: label_smoothing: got {label_smoothing}, want 0..1")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    y = hard_or_soft("mixed_cross_entropy", y, len(y))
    losses = F.cross_entropy(logits, y if y.dim() == 1 else y.to(logits.dtype), reduction="none",
                             label_smoothing=label_smoothing)
    weights = torch.ones_like(losses).masked_fill_(is_adv, lam)
    return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
