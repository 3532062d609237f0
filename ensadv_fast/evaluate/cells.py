"""What a pass consists of: the models, numbered, and the cells, each of one attack on one source."""
from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np
import torch
from torch import nn

from ..attacks import BaseAttack
from ..ops.keys import derive_seed
from ..sources.base import BaseSource
from ..sources.source import as_source
from ..system.machine import versions
from .fingerprint import fingerprint
from .sets import AdversarialSet, SetWriter
from .verdicts import Collected

OP = "transfer_matrix"
Model = BaseSource | nn.Module
Sources = Mapping[str, "Model | AdversarialSet | Sequence[AdversarialSet]"]


@dataclass(eq=False)
class Participant:
    """A target or a source. index: its number. name: in messages, of its first occurrence. given: what the caller gave,
    on which attacks are crafted. source: the same as a source, by which images are judged. fingerprint: empty where
    nothing is kept."""

    index: int
    name: str
    given: Model
    source: BaseSource
    fingerprint: str = ""


class Participants:
    """The targets and sources of a pass by name; a model that comes under several names has one number.

    sources has saved sets too. kept: something is kept on disk, so models need fingerprints. Raises TypeError,
    ValueError: what is no model, models on several devices.
    """

    def __init__(self, targets: Mapping[str, Model], sources: Sources, kept: bool) -> None:
        self.kept = kept
        self._models: list[Participant] = []
        self.targets = {t: self._number(f"targets[{t!r}]", m) for t, m in targets.items()}
        self.sources: dict[str, Participant | tuple[AdversarialSet, ...]] = {
            s: _sets(m) or self._number(f"sources[{s!r}]", m) for s, m in sources.items()}
        self.device = self._common_device()
        if kept:
            found = versions()
            made_with = [found["ensadv_fast"], found["torch"], str(self.device)]
            for model in self._models:
                model.fingerprint = fingerprint(model.source, made_with)

    def _number(self, name: str, given: object) -> Participant:
        if not isinstance(given, (BaseSource, nn.Module)):
            raise TypeError(f"{OP}: {name} must be a Source, an Ensemble or a torch.nn.Module, got "
                            f"{type(given).__name__}")
        for model in self._models:
            if model.given is given:
                return model
        self._models.append(Participant(len(self._models), name, given, as_source(given)))
        return self._models[-1]

    def _common_device(self) -> torch.device:
        devices = {f"targets[{t!r}]": m.source.device for t, m in self.targets.items()}
        devices |= {f"sources[{s!r}]": m.source.device for s, m in self.sources.items() if isinstance(m, Participant)}
        if len(set(devices.values())) > 1:
            raise ValueError(f"{OP}: targets and sources must be on one device, got "
                             + ", ".join(f"{name} on {device}" for name, device in devices.items()))
        return next(iter(devices.values()))

    def plain_modules(self) -> list[BaseSource]:
        """Sources made here of plain modules, which are kept in eval mode for the whole pass."""
        return [m.source for m in self._models if m.source is not m.given]


def _sets(given: object) -> tuple[AdversarialSet, ...]:
    """The sets that a source is given as; none where it is a model."""
    sets = (given,) if isinstance(given, AdversarialSet) else given
    if isinstance(sets, (tuple, list)) and sets and all(isinstance(s, AdversarialSet) for s in sets):
        return tuple(sets)
    return ()


@dataclass(eq=False)
class Shown:
    """Images that models are shown, batch by batch: the clean ones, or those of a cell.

    models: those that judge them. fingerprint: of all that the images are computed from, empty where nothing is kept.
    seed: of the noise in them, and of what a model draws that judges in train mode. collected: the verdicts so far.
    """

    models: tuple[Participant, ...]
    fingerprint: str
    seed: int
    collected: Collected = field(default_factory=Collected, kw_only=True)


@dataclass(eq=False)
class Cell(Shown):
    """One attack on one source. targets: the names of those that are shown its examples."""

    attack_name: str
    source_name: str
    targets: tuple[str, ...]

    @property
    def names(self) -> tuple[str, str]:
        return self.attack_name, self.source_name


@dataclass(eq=False)
class CraftedCell(Cell):
    """A cell whose examples are crafted. writer: writes them as a set, where sets are saved."""

    attack: BaseAttack
    model: Participant
    writer: SetWriter | None = field(default=None, kw_only=True)


@dataclass(eq=False)
class SavedCell(Cell):
    """A cell whose examples are those of a saved set. counted: `Rows.counted` of each batch so far."""

    SEED: ClassVar[int] = 0  # the examples hold no noise of this pass

    set: AdversarialSet
    counted: list[np.ndarray] = field(default_factory=list, kw_only=True)


def plan_cells(participants: Participants, attacks: Mapping[str, BaseAttack], seed: int, *, white_box: bool,
               noise: Mapping[str, str], set_dtype: str | None) -> list[CraftedCell | SavedCell]:
    """The cells of every attack on every source, and with white_box on every other target; then of the saved sets.

    noise: attack -> the name that its noise is drawn under, where it is not its own. set_dtype: of the sets that are
    saved, or None. ValueError where an (attack, source) would come twice.
    """
    every = tuple(participants.targets)
    crafted_on = {s: (m, every) for s, m in participants.sources.items() if isinstance(m, Participant)}
    if white_box:
        crafted_on |= {t: (m, (t,)) for t, m in participants.targets.items() if t not in participants.sources}
    cells: list[CraftedCell | SavedCell] = []
    for s, (model, targets) in crafted_on.items():
        judges = _distinct([*(participants.targets[t] for t in targets), model])
        for a, attack in attacks.items():
            own_seed = derive_seed(seed, noise.get(a, a), s)
            made_of = fingerprint(attack, model.fingerprint, own_seed, set_dtype) if participants.kept else ""
            cells.append(CraftedCell(judges, made_of, own_seed, a, s, targets, attack, model))
    judges = _distinct(participants.targets.values())
    for s, sets in participants.sources.items():
        for saved in () if isinstance(sets, Participant) else sets:
            made_of = fingerprint(saved.manifest) if participants.kept else ""
            cells.append(SavedCell(judges, made_of, SavedCell.SEED, saved.attack, s, every, saved))
    pairs = [cell.names for cell in cells]
    if twice := {pair for pair in pairs if pairs.count(pair) > 1}:
        raise ValueError(f"{OP}: sources: {sorted(twice)} (attack, source) would come twice")
    return cells


def plan_clean(participants: Participants, cells: Sequence[CraftedCell | SavedCell], seed: int) -> Shown:
    """The clean images, judged by all targets and by all sources that are crafted on."""
    crafted_on = [cell.model for cell in cells if isinstance(cell, CraftedCell)]
    judges = _distinct([*participants.targets.values(), *crafted_on])
    return Shown(judges, fingerprint("clean", seed) if participants.kept else "", seed)


def _distinct(models: Iterable[Participant]) -> tuple[Participant, ...]:
    return tuple(dict.fromkeys(models))
