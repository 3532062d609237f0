"""Which label an attack looks at, and the loss that it follows: both from one forward pass's logits."""
import torch
from torch import Tensor

from .ops import _checks as check
from .ops._losses import LOSSES, RULES, choose_labels, power_of_two_scale, sample_losses

__all__ = ["LOSSES", "RULES", "check_labels", "choose_labels", "power_of_two_scale", "sample_losses"]


def check_labels(op: str, y, n: int, device: torch.device, classes: int | None = None) -> Tensor:
    """y as int64 [N] on the device; its range too, where looking costs no synchronisation."""
    y = check.tensor(op, "y", y, (torch.int64,))
    if y.shape != (n,):
        raise ValueError(f"{op}: y must have shape [N] = [{n}], got {tuple(y.shape)}")
    if y.device != device:
        raise ValueError(f"{op}: y must be on x's device {device}, got {y.device}")
    if classes is not None and n and check.readable(y) and not 0 <= int(y.min()) <= int(y.max()) < classes:
        raise ValueError(
            f"{op}: y must lie in [0, {classes}), the model's classes, got [{int(y.min())}, {int(y.max())}]"
        )
    return y
