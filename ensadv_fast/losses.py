"""Which label an attack looks at, and the loss that it follows: both from one forward pass's logits."""
from .ops._losses import LOSSES, RULES, choose_labels, power_of_two_scale, sample_losses

__all__ = ["LOSSES", "RULES", "choose_labels", "power_of_two_scale", "sample_losses"]
