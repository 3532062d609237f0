"""RMSProp as TensorFlow has it, with which the Inception networks were trained."""
from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer


class RMSPropTF(Optimizer):
    """ms <- decay ms + (1 - decay) g^2, from ms = 1;  mom <- momentum mom + lr g / sqrt(ms + eps);  w <- w - mom.

    ms: the mean square of the gradient g; mom: the momentum; w: the weights. g includes weight_decay times w. This is
    tf.train.RMSPropOptimizer. Unlike in torch.optim.RMSprop, eps lies inside the root, ms starts at one, and a change
    of the learning rate does not change what momentum has gathered. The defaults are Inception v3's.

    A few foreach launches a step. lr is a number, which may change from step to step. `found_inf` (a float [] that a
    gradient scaler sets as attribute, as for torch's fused optimizers): where it is not 0 nothing changes, without a
    host sync on CUDA. Complex and sparse gradients are not supported. ValueError for a number out of its range.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.045, *, decay: float = 0.9, momentum: float = 0.9,
                 eps: float = 1.0, weight_decay: float = 0.0) -> None:
        for name, value, ok in (("lr", lr, lr >= 0), ("decay", decay, 0 <= decay < 1), ("eps", eps, eps >= 0),
                                ("momentum", momentum, 0 <= momentum < 1),
                                ("weight_decay", weight_decay, weight_decay >= 0)):
            if not ok:
                wanted = "in [0, 1)" if name in ("decay", "momentum") else ">= 0"
                raise ValueError(f"RMSPropTF: {name} must be {wanted}, got {value}")
        super().__init__(params, {"lr": lr, "decay": decay, "momentum": momentum, "eps": eps,
                                  "weight_decay": weight_decay})
        self._step_supports_amp_scaling = True

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        """One step; closure: computes the gradients and returns the loss, which is then returned."""
        with torch.enable_grad():
            loss = None if closure is None else closure()
        found: Tensor | None = getattr(self, "found_inf", None)
        if getattr(self, "grad_scale", None) is not None:
            raise RuntimeError("RMSPropTF: gradients are still scaled: call GradScaler.unscale_ first")
        if found is not None and found.device.type == "cpu":
            if found:
                return loss
            found = None
        for group in self.param_groups:
            params = [p for p in group["params"] if p.grad is not None]
            if not params:
                continue
            for p in params:
                if not self.state[p]:
                    self.state[p] = {"mean_square": torch.ones_like(p, memory_format=torch.preserve_format),
                                     "momentum": torch.zeros_like(p, memory_format=torch.preserve_format)}
            _update(params, [p.grad for p in params], [self.state[p]["mean_square"] for p in params],
                    [self.state[p]["momentum"] for p in params], group, found)
        return loss


def _update(params: list[Tensor], grads: list[Tensor], mean_squares: list[Tensor], momenta: list[Tensor],
            group: dict[str, Any], found: Tensor | None) -> None:
    """One step of these parameters, in place. found: where it is not 0 nothing changes; None stands for 0."""
    keep, momentum = group["decay"], group["momentum"]
    if group["weight_decay"]:
        grads = list(torch._foreach_add(grads, params, alpha=group["weight_decay"]))
    if found is not None:
        bad = found > 0
        grads = [torch.where(bad, 0.0, g) for g in grads]  # a NaN would survive any multiplication
        keep, momentum = (torch.where(bad, 1.0, float(v)) for v in (keep, momentum))
    torch._foreach_mul_(mean_squares, keep)
    torch._foreach_addcmul_(mean_squares, grads, grads, value=1.0 - group["decay"])
    roots = torch._foreach_add(mean_squares, group["eps"])
    torch._foreach_sqrt_(roots)
    torch._foreach_mul_(momenta, momentum)
    torch._foreach_addcdiv_(momenta, grads, roots, value=group["lr"])
    steps = momenta if found is None else torch._foreach_mul(momenta, 1.0 - bad.float())
    torch._foreach_sub_(params, steps)
