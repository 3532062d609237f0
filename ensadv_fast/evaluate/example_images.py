"""Example images for a report, crafted."""
from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import nn

from ..attacks import BaseAttack
from ..data import ImageSplit
from ..report.examples import SIDE, Samples
from ..sources.source import Source, as_source


def craft(test: ImageSplit, attacks: Mapping[str, BaseAttack], name: str | None, source: Source | nn.Module | None,
          targets: Mapping[str, nn.Module], key: torch.Tensor) -> Samples:
    """The first test image of each of the first ten classes (four where images are over 64 pixels a side), clean and
    under each attack, with the predictions of `targets`.

    source: the network on which attacks are crafted, called `name` on the page; None: clean images alone. key: int64
    [2], of the noise.
    """
    large = max(test.in_shape[1:]) > 64
    classes = torch.unique(test.labels)[:4 if large else 10]
    index = torch.stack([(test.labels == c).nonzero()[0, 0] for c in classes])
    x, y = test.batch(index)
    rows = {"clean": x}
    if source is not None:
        rows |= {a: attack(source, x.clone(), y, key=key.to(x.device), index=index) for a, attack in attacks.items()}
    def predicted(model: nn.Module, images: torch.Tensor) -> np.ndarray:
        return as_source(model).logits(images.clone()).argmax(1).cpu().numpy()  # for a model that writes into its input

    with torch.no_grad():
        predictions = {row: {t: predicted(model, images) for t, model in targets.items()}
                       for row, images in rows.items()}
    pictures = {row: _to_picture(images) for row, images in rows.items()}
    return Samples(name or "", y.cpu().numpy(), pictures, predictions)


def _to_picture(images: torch.Tensor) -> np.ndarray:
    """uint8 [n, H, W(, 3)] of float images [n, C, H, W], with at most SIDE pixels a side.

    Large images are thinned out, not averaged: an average would make a perturbation look smaller than it is.
    """
    every = max(1, -(-max(images.shape[2:]) // SIDE))
    levels = (images[..., ::every, ::every] * 255).round().byte()
    return levels.permute(0, 2, 3, 1).squeeze(-1).cpu().numpy()
