"""Optimizers and learning-rate schedules by name."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import Config


def learning_rate(config: Config, step: int, total: int, per_epoch: int) -> float:
    """The learning rate of a step: a function of the step alone, so nothing of it needs saving."""
    t = step / total
    factor = {"constant": 1.0,
              "cosine": 0.5 * (1 + math.cos(math.pi * t)),
              "cyclic": t / 0.4 if t < 0.4 else (1 - t) / 0.6,
              "decay": 0.94 ** (step // (2 * per_epoch))}[config.schedule]
    return config.lr * factor


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, nesterov=True, **options)
    if config.optimizer == "rmsprop":
        return torch.optim.RMSprop(model.parameters(), alpha=0.9, eps=1.0, **options)
    return torch.optim.Adam(model.parameters(), **options)
