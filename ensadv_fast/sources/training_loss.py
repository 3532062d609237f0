"""Crafting on the loss that a network is trained on: with label smoothing and auxiliary logits."""
from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..ops import checks
from ..ops.losses import Objective, choose_labels
from .base import InputGrad, for_autograd, gradient
from .source import Source


class TrainingLossSource(Source):
    """A `Source` whose cross-entropy is smoothed, and includes that of auxiliary logits, if the model gives some.

    Loss "ce" of a sample is CE(logits, label) + aux * CE(auxiliary logits, label), both with label smoothing: Google's
    code for the networks of Kurakin et al. (2017) and Tramer et al. (2018) takes Step-LL's gradient of Inception's
    training loss (smoothing 0.1, aux 0.4). A sign step is not the plain one: towards a label the smoothed loss also
    pulls on all others. Labels are chosen by the main logits, and other losses stay as `Source` has them.

    smoothing: 0..1. aux: at least 0. Other arguments are `Source`'s. timm's Inception v3 with auxiliary logits
    ("timm:inception_v3+aux") gives them in eval mode too; torchvision's does so in train mode alone.
    """

    def __init__(self, model: nn.Module, *, smoothing: float = 0.1, aux: float = 0.4, **options: Any) -> None:
        for name, value, most in (("smoothing", smoothing, 1.0), ("aux", aux, math.inf)):
            if not 0.0 <= checks.finite("TrainingLossSource", name, value) <= most:
                raise ValueError(f"TrainingLossSource: {name} must be >= 0"
                                 f"{' and <= 1' if name == 'smoothing' else ''}, got {value}")
        super().__init__(model, **options)
        self.smoothing, self.aux = smoothing, aux

    def _cross_entropy(self, logits: Tensor, labels: Tensor) -> Tensor:
        wide = logits if logits.dtype == torch.float64 else logits.float()
        return F.cross_entropy(wide, labels, reduction="none", label_smoothing=self.smoothing)

    def _loss(self, outputs: tuple[Tensor, ...] | list[Tensor], labels: Tensor) -> Tensor:
        loss = self._cross_entropy(outputs[0], labels)
        for auxiliary in outputs[1:]:
            loss = loss + self.aux * self._cross_entropy(auxiliary, labels)
        return loss

    def losses_unchecked(self, x: Tensor, labels: Tensor, objective: Objective) -> tuple[Tensor, Tensor]:
        if objective.loss != "ce":
            return super().losses_unchecked(x, labels, objective)
        outputs = list(self._outputs(x))
        return self._loss(outputs, labels), outputs[0]

    def input_grad_unchecked(self, x: Tensor, labels: Tensor | None, objective: Objective, *,
                             key: Tensor | None = None, index: Tensor | None = None,
                             rescale: bool = True) -> InputGrad:
        if objective.loss != "ce":
            return super().input_grad_unchecked(x, labels, objective, key=key, index=index, rescale=rescale)
        x, labels = for_autograd(x), for_autograd(labels)
        with torch.enable_grad(), self.precision_context():
            leaf = x.detach().requires_grad_()
            outputs = list(self._outputs(leaf))
            logits = outputs[0]
            if labels is not None:
                checks.labels("attack", "y", labels, len(x), x.device, logits.shape[1])
            chosen = choose_labels(logits.detach(), labels, objective.rule, key, index)
            losses = self._loss(outputs, chosen)
            if not rescale:
                scale = torch.ones_like(losses)
            elif self.smoothing:  # off the label the gradient is about smoothing / classes, however sure the network is
                scale = torch.full_like(losses, 2.0 ** math.floor(math.log2(logits.shape[1] / self.smoothing)))
            else:
                scale = objective.scale(logits, chosen)
            grad = gradient(leaf, losses, scale)
        if not self.look.gradient and rescale:
            self.look.at_gradient(grad, self.reads.undeclared(logits), objective.loss)
        return InputGrad(grad, chosen, losses.detach(), logits.detach(), scale)
