"""Optimizers and learning-rate schedules by name."""
from __future__ import annotations

import math
from typing import Any

import torch
from torch import nn

from .config import Config
from .rmsprop import RMSPropTF


def learning_rate(config: Config, step: int, total: int, per_epoch: int) -> float:
    """The learning rate of a step: a function of the step alone, so checkpoints need not hold it.

    It is what config.lr and the schedule say, never scaled by the batch, micro-batches or ranks. In the first
    config.warmup epochs it rises linearly from lr / (their steps) to lr; constant, cosine and cyclic then run over the
    steps that are left. "decay" counts its epochs from the first step on.
    """
    warmup = round(config.warmup * per_epoch)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    t = (step - warmup) / (total - warmup)
    factor = {"constant": 1.0,
              "cosine": 0.5 * (1 + math.cos(math.pi * t)),
              "cyclic": t / 0.4 if t < 0.4 else (1 - t) / 0.6,
              "decay": 0.94 ** (step // (2 * per_epoch))}[config.schedule]
    return config.lr * factor


def make_optimizer(config: Config, model: nn.Module) -> torch.optim.Optimizer:
    """The optimizer of `model`, fused where its parameters are on a CUDA device."""
    params = [p for p in model.parameters() if p.requires_grad]
    # Biases, and scales and shifts of normalisations, have fewer than two dimensions.
    vectors = [] if config.decay_all else [p for p in params if p.dim() < 2]
    groups: list[dict[str, Any]] = [{"params": [p for p in params if config.decay_all or p.dim() > 1]}]
    if vectors:
        groups.append({"params": vectors, "weight_decay": 0.0})
    options: dict[str, Any] = {"lr": config.lr, "weight_decay": config.weight_decay}
    if config.optimizer == "rmsprop":
        return RMSPropTF(groups, **options)
    if all(p.is_cuda for p in params):
        options["fused"] = True
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, momentum=0.9, nesterov=True, **options)
    return torch.optim.Adam(groups, **options)
