"""A few test images as a report page shows them: clean and attacked, with what models take them for."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..system import files

FILE = "examples.npz"  # in a run folder
SIDE = 128  # larger images are thinned out to at most this many pixels a side


@dataclass(frozen=True)
class Samples:
    """pictures[row]: uint8 [n, H, W(, 3)]; predictions[row][model]: int64 [n]; the rows are "clean" and one named after
    each attack. labels: int64 [n]. source: the network on which the attacks were crafted; empty where none was."""

    source: str
    labels: np.ndarray
    pictures: dict[str, np.ndarray]
    predictions: dict[str, dict[str, np.ndarray]]

    def save(self, path: Path) -> None:
        """Write the file: "source", "labels", "pictures/ROW" and "predictions/ROW/MODEL"."""
        arrays = {"source": np.array(self.source), "labels": self.labels}
        arrays |= {f"pictures/{row}": pictures for row, pictures in self.pictures.items()}
        arrays |= {f"predictions/{row}/{m}": p for row, by in self.predictions.items() for m, p in by.items()}
        files.atomic_write(path, lambda f: np.savez_compressed(f, allow_pickle=False, **arrays))


def load(path: Path) -> Samples | None:
    """What `Samples.save` wrote there; None where there is no file. ValueError for another file."""
    if not path.is_file():
        return None
    try:
        with np.load(path, allow_pickle=False) as f:
            pictures = _under(f, "pictures/")
            return Samples(str(f["source"]), f["labels"], pictures,
                           {row: _under(f, f"predictions/{row}/") for row in pictures})
    except (ValueError, KeyError, OSError) as e:
        raise ValueError(f"samples: {path} is corrupt or of another version ({e})") from e


def _under(f: Any, prefix: str) -> dict[str, np.ndarray]:
    """The arrays of an open npz file whose names begin with the prefix, by the rest of their names."""
    return {name.removeprefix(prefix): f[name] for name in f.files if name.startswith(prefix)}
