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
from .checkpoints import Checkpoints
from .config import Config
from .recipes import Recipe


@dataclass(frozen=True)
class Job:
    """One network to train.

    name: of its checkpoint. seed: decides all that is random in its training. static: the specs, with checkpoints, of
    the static sources that it is trained on. init: the file of weights that it starts from.
    """

    name: str
    spec: str
    recipe: Recipe
    seed: int
    epochs: int
    static: tuple[str, ...] = ()
    init: str | None = None

    def path(self, folder: Path) -> Path:
        """The file of its newest checkpoint, and in the end of its result."""
        return folder / "models" / f"{self.name}.pt"

    def checkpoints(self, folder: Path, keep: int = 2) -> Checkpoints:
        """The checkpoints of its training, as long as that goes on; the newest is also at `path`."""
        return Checkpoints(folder / "checkpoints", self.name, keep)

    def settle(self, folder: Path) -> dict[str, Any] | None:
        """The newest whole checkpoint, which then lies at `path` (:meth:`Checkpoints.settle`)."""
        return self.checkpoints(folder).settle(self.path(folder))


@dataclass(frozen=True)
class Run:
    """What all jobs of a run share. progress: show bars where stderr is a terminal."""

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
        dataset = _load_dataset(config.data, config.size, device)
        return Run(config, folder, dataset, device, progress and ranks.main, ranks)

    def build(self, spec: str, download: bool = False) -> nn.Module:
        """The network of this spec for the run's data set, in train mode, on its device."""
        return models.build(spec, self.dataset.classes, self.dataset.in_shape, download).to(self.device)

    def bar(self, **options: Any) -> tqdm:
        """A progress bar; of several processes, each has a line of its own."""
        return tqdm(disable=None if self.progress else True, dynamic_ncols=True, unit_scale=True,
                    position=processes.bar_position, leave=processes.bar_position is None, **options)


@functools.lru_cache(maxsize=1)
def _load_dataset(spec: str, size: int | None, device: torch.device) -> data.Dataset:
    return data.load(spec, size).to(device)


def make_source(config: Config, model: nn.Module, crafting: str = "eval", loss: str = "plain") -> Source:
    """A frozen source of the model. loss: "plain", or "training" (`Recipe.crafting_loss`)."""
    dtype = config.source_dtype if config.source_dtype == "auto" else getattr(torch, config.source_dtype)
    net, mean, std = models.parts(model)
    if loss == "plain":
        return Source(net, mean=mean, std=std, dtype=dtype, crafting=crafting)
    return TrainingLossSource(net, smoothing=config.label_smoothing, aux=config.aux, mean=mean, std=std, dtype=dtype,
                              crafting=crafting)
