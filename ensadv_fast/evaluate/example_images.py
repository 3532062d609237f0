"""Example images for a report, crafted."""
from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from ..attacks import BaseAttack
from ..data import ImageSplit
from ..report.examples import SIDE, Samples
from ..sources.source import Source, as_source


def craft(test: ImageSplit, attacks: Mapping[str, BaseAttack], name: str | None, source: Source | nn.Module | None,
          targets: Mapping[str, nn.Module], key: torch.Tensor) -> Samples:
    """The first test image of each of the first classes (ten; four where images are large), clean and under each
    attack crafted on `source`, which is called `name`."""
    large = max(test.in_shape[1:]) > 64
    classes = torch.unique(test.labels)[:4 if large else 10]
    index = torch.stack([(test.labels == c).nonzero()[0, 0] for c in classes])
    x, y = test.batch(index)
    rows = {"clean": x}
    if source is not None:
        rows |= {a: attack(source, x, y, key=key.to(x.device), index=index) for a, attack in attacks.items()}
    with torch.no_grad():
        predictions = {row: {t: as_source(model).logits(images).argmax(1).cpu().numpy() for t, model in targets.items()}
                       for row, images in rows.items()}
    # Thinned out, not averaged: an average would make a perturbation look smaller than it is.
    every = max(1, -(-max(x.shape[2:]) // SIDE))
    pictures = {row: (images[..., ::every, ::every] * 255).round().byte().permute(0, 2, 3, 1).squeeze(-1).cpu().numpy()
                for row, images in rows.items()}
    return Samples(name or "", y.cpu().numpy(), pictures, predictions)
