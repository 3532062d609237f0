"""A few test images as a report page shows them: clean and attacked, with what models take them for."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import nn

from . import checkpoint
from .attacks import BaseAttack
from .data import ImageSplit
from .source import Source, as_source

FILE = "examples.npz"  # in a run folder
SIDE = 128  # larger images are thinned out to at most this many pixels a side


@dataclass(frozen=True)
class Samples:
    """pictures[row] is uint8 [n, H, W(, 3)] and predictions[row][model] int64 [n], for the rows "clean" and one
    named after each attack; labels int64 [n]. `source` crafted them ("": there was none)."""

    source: str
    labels: np.ndarray
    pictures: dict[str, np.ndarray]
    predictions: dict[str, dict[str, np.ndarray]]

    def save(self, path: Path) -> None:
        """Write the file: "source", "labels", "pictures/ROW" and "predictions/ROW/MODEL"."""
        arrays = {"source": np.array(self.source), "labels": self.labels}
        arrays |= {f"pictures/{row}": pictures for row, pictures in self.pictures.items()}
        arrays |= {f"predictions/{row}/{m}": p for row, by in self.predictions.items() for m, p in by.items()}
        checkpoint.atomic_write(path, lambda f: np.savez_compressed(f, allow_pickle=False, **arrays))


def load(path: Path) -> Samples | None:
    """What `Samples.save` wrote there; None where there is nothing. ValueError for another file."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as f:
            def under(prefix: str) -> dict[str, np.ndarray]:
                return {name.removeprefix(prefix): f[name] for name in f.files if name.startswith(prefix)}

            pictures = under("pictures/")
            return Samples(str(f["source"]), f["labels"], pictures,
                           {row: under(f"predictions/{row}/") for row in pictures})
    except (ValueError, KeyError, OSError) as e:
        raise ValueError(f"samples: {path} is corrupt or of another version ({e})") from e


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
