"""The label that an attack looks at and the loss that it follows, both from the logits of one forward pass.

These are the definitions in plain PyTorch; :func:`ensadv_fast.ops.logit_grad` computes them in one launch.
"""
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from . import reference as ref

RULES = ("true", "predicted", "least_likely", "random")
LOSSES = ("ce", "cw", "dlr")
OwnLoss = Callable[[Tensor, Any], Tensor]  # (logits [N, ...], y) -> loss [N]


@dataclass(frozen=True)
class Objective:
    """Which label an attack looks at, whether it flees or seeks that label, and by which loss.

    rule: see :func:`choose_labels`. loss, targeted, kappa: see :func:`sample_losses`. loss may also be "entropy", that
    of the predicted distribution, or None: no gradient is followed. Only attacks know these two. Or it is a callable
    (logits [N, ...], y) -> [N], in float32 or float64: a loss of the caller's own.
    """

    rule: str = "true"
    targeted: bool = False
    loss: str | OwnLoss | None = "ce"
    kappa: float = 0.0

    @cached_property
    def of_labels(self) -> "Objective":
        """The same for labels that are chosen already."""
        return replace(self, rule="true")

    def losses(self, logits: Tensor, labels: Tensor) -> Tensor:
        """:func:`sample_losses` of this objective, or what its own loss gives."""
        assert self.loss is not None
        if not isinstance(self.loss, str):
            return _own_losses(self.loss, logits, labels)
        return sample_losses(logits, labels, self.loss, targeted=self.targeted, kappa=self.kappa)

    def scale(self, logits: Tensor, labels: Tensor) -> Tensor:
        """:func:`power_of_two_scale` of this objective; 1 for a loss of the caller's own."""
        assert self.loss is not None
        if not isinstance(self.loss, str):
            return torch.ones(len(logits), device=logits.device, dtype=torch.float64 if logits.dtype == torch.float64
                              else torch.float32)
        return power_of_two_scale(logits, labels, self.loss)


def _own_losses(loss: OwnLoss, logits: Tensor, labels: Any) -> Tensor:
    """What a loss of the caller's own gives; ValueError where that is not one loss per sample."""
    values = loss(logits if logits.dtype == torch.float64 else logits.float(), labels)
    if not isinstance(values, Tensor) or values.shape != (len(logits),):
        got = f"shape {tuple(values.shape)}" if isinstance(values, Tensor) else type(values).__name__
        raise ValueError(f"attack: loss must return one loss per sample, [N] = [{len(logits)}], got {got}: "
                         "reduction='none', and the mean over whatever a sample has several of")
    return values


def check_classes(op: str, classes: int, *, rule: str = "true", loss: str = "ce") -> None:
    """ValueError where the logits have fewer classes than the rule or the loss needs."""
    if loss == "dlr" and classes < 3:
        raise ValueError(f"{op}: logits must have at least 3 classes for loss dlr, got {classes}")
    if rule == "random" and classes < 2:
        raise ValueError(f"{op}: logits must have at least 2 classes for rule random, got {classes}")


def choose_labels(logits: Tensor, y: Tensor | None, rule: str, key: Tensor | None = None,
                  index: Tensor | None = None) -> Tensor:
    """Labels int64 [N] from logits [N, C] by `rule`; ties go to the lowest index.

    - ``true``: y; or the prediction where y is None, so that no label leaks (Kurakin et al. 2017, section 4.3);
    - ``predicted``: the model's own prediction, the remedy against label leaking;
    - ``least_likely``: argmin (Step-LL, Iter-LL);
    - ``random``: uniform over the classes other than y (or the prediction): w * (C - 1) >> 32, counted over the other
      classes in order, where w is word 0 of Philox block 0 of the sample (:func:`ensadv_fast.ops.random_step` says
      how key and counter are laid out).
    """
    if rule == "least_likely":
        return logits.argmin(1)
    if rule == "predicted" or y is None:
        y = logits.argmax(1)
    if rule != "random":
        return y
    if key is None:
        raise ValueError("choose_labels: key must be an int64 tensor [2] for rule random, got None")
    ids = ref.sample_ids(len(logits), index, logits.device)
    word = ref.draw(key, torch.zeros_like(ids), ids)[:, 0]
    other = word * (logits.shape[1] - 1) >> 32
    return other + (other >= y)


def sample_losses(logits: Tensor, labels: Tensor, loss: str = "ce", *, targeted: bool = False,
                  kappa: float = 0.0) -> Tensor:
    """Loss per sample [N], at least float32, from logits [N, C]. Untargeted attacks ascend it, targeted ones descend.

    - ``ce``: cross-entropy with the label;
    - ``cw``: the margin Z_y - max_{i != y} Z_i as a hinge (Carlini and Wagner 2017; the PGD of Tramer et al. 2018):
      -max(0, Z_y - max Z_i + kappa), targeted max(0, max Z_i - Z_y + kappa); its gradient vanishes once the
      margin is reached;
    - ``dlr``: difference of logits ratio (Croce and Hein 2020): -(Z_y - max_{i != y} Z_i) / (Z_(1) - Z_(3)), Z_(k)
      the k-th largest; needs three classes.

    A label outside [0, C) gives NaN and a zero gradient; there is none but on CUDA, where labels are not looked at.
    """
    logits = logits if logits.dtype == torch.float64 else logits.float()
    valid = (labels >= 0) & (labels < logits.shape[1])
    labels = labels.clamp(0, logits.shape[1] - 1)
    if loss == "ce":
        value = F.cross_entropy(logits, labels, reduction="none")
    else:
        own = logits.gather(1, labels[:, None]).squeeze(1)
        margin = own - logits.scatter(1, labels[:, None], -torch.inf).amax(1)
        if loss == "cw":
            value = ref.clamp_open(kappa - margin, 0) if targeted else -ref.clamp_open(margin + kappa, 0)
        else:
            check_classes("sample_losses", logits.shape[1], loss=loss)
            top = logits.topk(3, dim=1).values
            value = -margin / (top[:, 0] - top[:, 2] + 1e-12)
    return torch.where(valid, value, torch.nan)


def power_of_two_scale(logits: Tensor, labels: Tensor, loss: str) -> Tensor:
    """A power of two per sample [N] that lifts the gradient by the logits into a range where no dtype underflows.

    The gradient of the cross-entropy by the logits is p - y. The scale brings its largest entry off the label into
    [1, 2). Sign steps do not depend on the scale, and dividing by it is exact. The margins' gradients are of order 1
    already: their scale is 1.
    """
    wide = logits.detach() if logits.dtype == torch.float64 else logits.detach().float()
    if loss != "ce":
        return torch.ones_like(wide[:, 0])
    labels = labels.clamp(0, logits.shape[1] - 1)
    largest = wide.softmax(1).scatter(1, labels[:, None], 0.0).amax(1)
    lift = (1 - torch.frexp(largest).exponent).clamp(max=100)  # entries below 2^-100 may stay small
    return torch.ldexp(torch.ones_like(largest), torch.where(largest > 0, lift, 0))
