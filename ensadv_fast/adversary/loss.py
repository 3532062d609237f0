"""The loss of a mixed batch."""
from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor

from .incoming import hard_or_soft


def mixed_cross_entropy(logits: Tensor, y: Tensor, is_adv: Tensor, lam: float = 0.3,
                        label_smoothing: float = 0.0) -> Tensor:
    """Kurakin's loss (ICLR 2017, section 2.3): (sum clean + lam * sum adversarial) / ((m-k) + lam*k).

    logits [m, classes], any float dtype (computed in float32, float64's in float64); y: integers or bools [m] or
    [m, 1], or soft labels [m, classes]; is_adv: bool [m], of which k are true; label_smoothing: 0..1, for hard and soft
    y alike. Returns a scalar, with no host sync. On the doubled batch (m = 2k) lam = 1 is the released MNIST code's
    0.5 * clean + 0.5 * adversarial mean; on a purely clean or purely adversarial batch it is the plain mean whatever
    lam > 0 is.
    lam = 0 leaves the adversarial samples out; where no clean sample is left either, the loss is 0.

    Raises ValueError for shapes that do not fit, for a lam that is negative or not finite, and for a label_smoothing
    outside 0..1.
    """
    if logits.dim() != 2 or y.shape[0] != logits.shape[0] or is_adv.shape != logits.shape[:1]:
        raise ValueError("mixed_cross_entropy: logits, y and is_adv must have shapes [m, classes], [m] or [m, classes] "
                         f"and [m], got {tuple(logits.shape)}, {tuple(y.shape)} and {tuple(is_adv.shape)}")
    if not lam >= 0 or not math.isfinite(lam):
        raise ValueError(f"mixed_cross_entropy: lam must be finite and >= 0, got {lam}")
    if not 0.0 <= label_smoothing <= 1.0:
        raise ValueError(f"mixed_cross_entropy: label_smoothing must be in [0, 1], got {label_smoothing}")
    logits = logits if logits.dtype == torch.float64 else logits.float()
    y = hard_or_soft("mixed_cross_entropy", y, len(y))
    losses = F.cross_entropy(logits, y if y.dim() == 1 else y.to(logits.dtype), reduction="none",
                             label_smoothing=label_smoothing)
    weights = torch.ones_like(losses).masked_fill_(is_adv, lam)  # their sum is `Counts.weight`, without a host sync
    return (losses * weights).sum() / weights.sum().clamp_min(torch.finfo(weights.dtype).tiny)
