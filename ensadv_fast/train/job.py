"""A network to train, and what all networks of a run share."""
from __future__ import annotations

import functools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm

from .. import data, models
from ..sources.source import Source
from ..sources.training_loss import TrainingLossSource
from ..system import machine, processes
from ..system.ranks import Ranks, current_ranks
from . import checkpoints
from .checkpoints import Checkpoints
from .config import Config
from .recipes import Recipe


@dataclass(frozen=True)
class Job:
    """One network to train: `name` is its checkpoint's, `seed` decides all that is random in it, `static` are the
    specs, with checkpoints, of the static sources it is trained on, and `init` is the file of weights it starts from.
    """

    name: str
    spec: str
    recipe: Recipe
    seed: int
    epochs: int
    static: tuple[str, ...] = ()
    init: str | None = None

    def path(self, folder: Path) -> Path:
        """Its newest checkpoint, and in the end its result."""
        return folder / "models" / f"{self.name}.pt"

    def checkpoints(self, folder: Path, keep: int = 2) -> Checkpoints:
        """Those of its training, as long as that goes on; the newest is also at `path`."""
        return Checkpoints(folder / "checkpoints", self.name, keep)

    def newest(self, folder: Path) -> dict[str, Any] | None:
        """The newest whole checkpoint; None where there is none. ValueError where all there are are damaged."""
        steps = self.checkpoints(folder).steps()
        found = self.checkpoints(folder).newest() if steps else None
        if found is None and (steps or self.path(folder).exists()):
            return checkpoints.load(self.path(folder))
        return found


@dataclass(frozen=True)
class Run:
    """What all jobs of a run share."""

    config: Config
    folder: Path
    dataset: data.Dataset
    device: torch.device
    progress: bool
    ranks: Ranks = Ranks()

    @staticmethod
    def open(config: Config, folder: Path, progress: bool) -> Run:
        """The run as this process sees it: each process loads the data once."""
        ranks = current_ranks()
        device = ranks.device(machine.device(config.device))
        return Run(config, folder, _dataset(config.data, config.size, device), device, progress and ranks.main, ranks)

    def build(self, spec: str, download: bool = False) -> nn.Module:
        return models.build(spec, self.dataset.classes, self.dataset.in_shape, download).to(self.device)

    def bar(self, **options: Any) -> tqdm:
        return tqdm(disable=None if self.progress else True, dynamic_ncols=True, unit_scale=True,
                    position=processes.bar_position, leave=processes.bar_position is None, **options)


@functools.lru_cache(maxsize=1)
def _dataset(spec: str, size: int | None, device: torch.device) -> data.Dataset:
    return data.load(spec, size).to(device)


def make_source(config: Config, model: nn.Module, crafting: str = "eval", loss: str = "plain") -> Source:
    """A frozen source of the model. loss: "plain", or "training" (`Recipe.crafting_loss`)."""
    dtype = config.source_dtype if config.source_dtype == "auto" else getattr(torch, config.source_dtype)
    net, mean, std = models.parts(model)
    if loss == "plain":
        return Source(net, mean=mean, std=std, dtype=dtype, crafting=crafting)
    return TrainingLossSource(net, smoothing=config.label_smoothing, aux=config.aux, mean=mean, std=std, dtype=dtype,
                              crafting=crafting)
