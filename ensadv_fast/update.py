"""One optimizer step on an adversarial batch."""
from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from .adversary import AdversarialBatch, mixed_cross_entropy
from .config import Config
from .optimizers import make_optimizer


class Update:
    """Forward pass, mixed loss, backward pass and optimizer step of `model`, in the precision that `config` asks for.

    lam: weight of adversarial examples in the loss. `state_dict` holds what a resumed run needs besides the weights.
    """

    def __init__(self, config: Config, model: nn.Module, lam: float, device: torch.device) -> None:
        self.config, self.model, self.lam, self.device = config, model, lam, device
        self.optimizer = make_optimizer(config, model)

    def autocast(self) -> AbstractContextManager:
        """What forward passes run under, the attack's on the live model too. Entered anew for each: its cached casts
        of the weights may stem from a forward without grad."""
        return torch.autocast(self.device.type, torch.bfloat16) if self.config.dtype == "bfloat16" else nullcontext()

    def clear(self) -> None:
        """Let go of the gradients: crafting and the forward pass can use their memory."""
        self.optimizer.zero_grad(set_to_none=True)

    def __call__(self, batch: AdversarialBatch, lr: float) -> tuple[Tensor, Tensor]:
        """One step with this learning rate; (loss [], logits [N, C]) of before it, detached."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        with self.autocast():
            logits = self.model(batch.x)
        loss = mixed_cross_entropy(logits, batch.y, batch.is_adv, self.lam, self.config.label_smoothing)
        loss.backward()
        self.optimizer.step()
        return loss.detach(), logits.detach()

    def state_dict(self) -> dict[str, Any]:
        return {"optimizer": self.optimizer.state_dict()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.optimizer.load_state_dict(state["optimizer"])
