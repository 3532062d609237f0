"""What the tables share: networks and finished cells in a cache, so that a killed run goes on, and a result's form."""
from __future__ import annotations

import functools
import hashlib
import json
import os
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import MISSING, dataclass, field, fields, is_dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

import ensadv_fast as ea
from ensadv_fast import attacks, data, evaluate, ops, train
from ensadv_fast.ops import keys
from ensadv_fast.system import files
from ensadv_fast.train import checkpoints

from .claims import Estimate, column, gaps

# Caches know options, data and torch's version, not the package's code: raise this where a change of the code changes
# numbers.
FORMAT = 1
PLAIN, ADV, ENS = (train.PRESETS[name] for name in ("plain", "fgsm-at", "tramer"))


class Missing(RuntimeError):
    """A table cannot be made here; the message says what it lacks."""


@dataclass(frozen=True)
class Images:
    """n images of a split, evenly spaced in the file's order (0: all of them)."""

    data: str  # digits, mnist or cifar10
    n: int = 0
    part: str = "train"


@dataclass(frozen=True)
class Net:
    """A trained network: everything it depends on. role sets apart networks that differ in their seed alone."""

    spec: str
    recipe: train.Recipe
    epochs: int
    images: Images
    seed: int = 0
    role: str = "target"
    static: tuple[Net, ...] = ()
    eps: float = 0.3
    options: tuple[tuple[str, Any], ...] = ()  # further fields of train.Config

    @property
    def name(self) -> str:
        return ea.models.short_name(self.spec) + self.recipe.suffix


@dataclass(frozen=True)
class Sizes:
    """How large a table is made. epochs: of plain networks, adv_epochs: of adversarially trained ones."""

    train: Images = Images("digits")
    test: Images = Images("mnist", part="test")
    networks: tuple[str, ...] = ("D",)
    seeds: int = 3
    epochs: int = 6
    adv_epochs: int = 12


def essence(value: Any) -> Any:
    """`value` for JSON, with only those fields of a dataclass that are not at their default: a field that is added
    later changes no fingerprint."""
    if is_dataclass(value):
        said = {f.name: essence(getattr(value, f.name)) for f in fields(value)
                if f.default is MISSING or getattr(value, f.name) != f.default}
        return {type(value).__name__: said}
    if isinstance(value, Mapping):
        return {str(k): essence(v) for k, v in value.items()}
    return [essence(v) for v in value] if isinstance(value, (list, tuple)) else value


def fingerprint(*parts: Any) -> str:
    text = json.dumps([FORMAT, torch.__version__, *map(essence, parts)], sort_keys=True)
    return hashlib.sha256(text.encode()).hexdigest()[:20]


class Lab:
    """Trains, attacks and remembers. cache: a folder; the data that fetch.py brings lie in its folder `data`."""

    def __init__(self, cache: str | Path, device: str = "auto", say: Callable[[str], object] = lambda text: None):
        self.cache = Path(cache)
        self.device = torch.device(("cuda" if torch.cuda.is_available() else "cpu") if device == "auto" else device)
        self.say = say
        self.seconds: dict[str, float] = {}  # of every network and cell used, whenever it was made
        self.network = functools.lru_cache(maxsize=None)(self._network)
        self.spent = functools.lru_cache(maxsize=None)(self._spent)
        self.split = functools.lru_cache(maxsize=None)(self._split)
        self.whole = functools.lru_cache(maxsize=None)(self._whole)
        self.print_of = functools.lru_cache(maxsize=None)(self._print_of)
        (self.cache / "models").mkdir(parents=True, exist_ok=True)
        (self.cache / "cells").mkdir(exist_ok=True)

    # ------------------------------------------------------------------------------------------- data

    def _whole(self, name: str) -> data.Dataset:
        folder = self.cache / "data" / name
        try:
            return data.load(name if name == "digits" else f"{name}:{folder}")
        except FileNotFoundError as e:
            raise Missing(f"{name} is not in {folder}: python bench/papers/fetch.py --cache {self.cache}") from e

    def _split(self, images: Images) -> data.Split:
        whole = getattr(self.whole(images.data), images.part)
        n = images.n or len(whole)
        if n > len(whole):
            raise ValueError(f"papers: {images}: there are only {len(whole)}")
        index = torch.arange(n) * len(whole) // n
        return data.Split(whole.images[index], whole.labels[index]).to(self.device)

    def _print_of(self, images: Images) -> str:
        split = self.split(images)
        return files.digest([split.images, split.labels])

    # --------------------------------------------------------------------------------------- networks

    def identity(self, net: Net) -> str:
        return fingerprint("network", net, [self.print_of(n.images) for n in (net, *net.static)])

    def _network(self, net: Net) -> nn.Module:
        """The network in eval mode; trained now, or further, where the cache does not have it whole."""
        job = self._job(net)
        whole = self.whole(net.images.data)
        dataset = data.Dataset(whole.name, self.split(net.images), whole.test, whole.classes)
        config = train.Config(preset="plain", eps=net.eps, **dict(net.options))
        if not job.path(self.cache).exists() and not job.checkpoints(self.cache).steps():
            self.say(f"training {net.name}, {net.role}, seed {net.seed}")
        run = train.Run(config, self.cache, dataset, self.device, progress=False)
        with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
            train.fit(run, job)  # trains nothing where the checkpoint is complete
        return run.build(f"{net.spec}={job.path(self.cache)}").eval()

    def _spent(self, net: Net) -> float:
        """The seconds that training took; noted, with those of the static networks."""
        for s in net.static:
            self.spent(s)
        job = self._job(net)
        self.seconds[job.name] = checkpoints.load(job.path(self.cache))["seconds"]
        return self.seconds[job.name]

    def _job(self, net: Net) -> train.Job:
        static = []
        for s in net.static:
            self.network(s)
            static.append(f"{s.spec}={self._job(s).path(self.cache)}")
        return train.Job(f"{net.name}-{net.role}-{net.seed}-{self.identity(net)}", net.spec, net.recipe,
                         keys.derive_seed(net.seed, net.role), net.epochs, tuple(static))

    # ------------------------------------------------------------------------------------------ cells

    def cell(self, parts: Any, make: Callable[[], dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
        """What `make` returns, from the cache where it has been made from the same `parts` before. Its entry `seconds`
        is noted and left out."""
        path = self.cache / "cells" / f"{fingerprint('cell', parts)}.npz"
        if not path.exists():
            made = make()
            files.atomic_write(path, lambda f: np.savez_compressed(f, **made))
        with np.load(path) as found:
            made = {k: found[k] for k in found}
        self.seconds[path.stem] = float(made.pop("seconds"))
        return made

    def matrix(self, targets: Mapping[str, Net], sources: Mapping[str, Net | tuple[Net, ...]],
               tried: Mapping[str, attacks.Attack], test: Images, as_it_is: bool = False) -> evaluate.TransferMatrix:
        """evaluate.transfer_matrix, one cached cell for each (source, attack). A network is attacked as a Source, in
        the dtype that is fast here, or as_it_is; several are one ensemble of fused logits."""
        whole = evaluate.TransferMatrix()
        for s, source in sources.items():
            for a, attack in tried.items():
                members = source if isinstance(source, tuple) else (source,)
                parts = [[self.identity(t) for t in targets.values()], [self.identity(m) for m in members], attack,
                         self.print_of(test), s, a, *([] if as_it_is else ["Source"])]
                found = self.cell(parts, lambda: self._transfer(targets, s, source, a, attack, test, as_it_is))
                whole = whole.merge(evaluate.TransferMatrix(
                    {(a, s, t): found[f"wrong{i}"] for i, t in enumerate(targets)},
                    {t: found[f"clean{i}"] for i, t in enumerate(targets)}))
                for net in (*targets.values(), *members):
                    self.spent(net)
        return whole

    def _transfer(self, targets: Mapping[str, Net], s: str, source: Net | tuple[Net, ...], a: str,
                  attack: attacks.Attack, test: Images, as_it_is: bool) -> dict[str, np.ndarray]:
        networks = {t: self.network(net) for t, net in targets.items()}
        self.say(f"{a} from {s} on {', '.join(targets) if len(targets) < 4 else f'{len(targets)} targets'}")
        if isinstance(source, tuple):
            crafting = ea.Ensemble([ea.Source(self.network(m)) for m in source])
        else:
            crafting = self.network(source) if as_it_is else ea.Source(self.network(source))
        begin = time.perf_counter()
        matrix = evaluate.transfer_matrix(networks, {s: crafting}, {a: attack}, self.split(test).batches(250),
                                          key=ops.fresh_key("cpu", keys.derive_seed("papers", test.data)))
        return {**{f"wrong{i}": matrix.wrong[a, s, t] for i, t in enumerate(targets)},
                **{f"clean{i}": matrix.clean[t] for i, t in enumerate(targets)},
                "seconds": np.float64(time.perf_counter() - begin)}

    def white_box(self, targets: Mapping[str, Net], tried: Mapping[str, attacks.Attack],
                  test: Images) -> evaluate.TransferMatrix:
        """Every target attacked on itself."""
        whole = evaluate.TransferMatrix()
        for t, net in targets.items():
            whole = whole.merge(self.matrix({t: net}, {t: net}, tried, test, as_it_is=True))
        return whole


def seeded(make: Callable[[int], Net], seeds: int) -> list[Net]:
    return [make(seed) for seed in range(seeds)]


class Group:
    """Networks that differ in their seeds alone, under a label; `names` are theirs in a matrix."""

    def __init__(self, label: str, nets: Sequence[Net]):
        self.label, self.nets = label, list(nets)
        self.names = [f"{label} seed {net.seed}" for net in nets]

    @staticmethod
    def targets(groups: Sequence[Group]) -> dict[str, Net]:
        return {name: net for g in groups for name, net in zip(g.names, g.nets)}

    def size(self, lab: Lab, n: int) -> str:
        """The sizes that stand beside this group's numbers: training images and epochs, networks, test images."""
        net, s = self.nets[0], "s" if len(self.nets) > 1 else ""
        return f"{len(lab.split(net.images)):,} x {net.epochs} epochs, {len(self.nets)} seed{s}, n {n:,}"


def estimates(groups: Sequence[Group], error: Callable[[str], float], n: int) -> dict[str, Estimate]:
    """By label, the estimate from the errors of the group's networks (by name)."""
    made = column([[error(name) for name in g.names] for g in groups], n)
    return {g.label: e for g, e in zip(groups, made)}


def differences(groups: Sequence[Group], first: Callable[[str], float], second: Callable[[str], float],
                n: int) -> dict[str, Estimate]:
    """By label, the estimate of first - second on the same networks."""
    made = gaps(*([[error(name) for name in g.names] for g in groups] for error in (first, second)), n)
    return {g.label: e for g, e in zip(groups, made)}


# ------------------------------------------------------------------------------------------------ results


def number(e: Estimate, paper: float | None = None, mark: str = "M") -> dict:
    """A cell of a result: shares in percent, with the paper's number (percent) where it has one."""
    return {"value": 100 * e.value, "low": 100 * e.low, "high": 100 * e.high, "n": e.n, "seeds": e.seeds,
            **({} if paper is None else {"paper": paper, "mark": mark})}


@dataclass
class Result:
    """What a table's module returns. blocks: number tables; claims: from claims.claim."""

    title: str
    about: str
    blocks: list[dict] = field(default_factory=list)
    claims: list[dict] = field(default_factory=list)

    def block(self, title: str, header: Sequence[str], rows: Sequence[tuple[str, str, Sequence[dict | str]]]) -> None:
        """rows: (label, sizes, cells), each cell from `number` or a text; header names the cells."""
        for label, _, cells in rows:
            if len(cells) != len(header):
                raise ValueError(f"papers: {title}: {label}: {len(cells)} cells under {len(header)} heads")
        self.blocks.append({"title": title, "header": list(header),
                            "rows": [{"label": label, "size": size, "cells": list(cells)}
                                     for label, size, cells in rows]})


def write(path: Path, name: str, preset: str, sizes: Sizes, result: Result, lab: Lab, before: dict) -> None:
    """The stamped JSON of a finished table."""
    made = {**before, "table": name, "preset": preset, "device": lab.device.type, "threads": torch.get_num_threads(),
            "sizes": essence(sizes), "seconds": sum(lab.seconds.values()), "title": result.title,
            "about": result.about, "blocks": result.blocks, "claims": result.claims, "load_after": os.getloadavg()}
    path.parent.mkdir(parents=True, exist_ok=True)
    files.atomic_write(path, lambda f: f.write((json.dumps(made, indent=1) + "\n").encode()))
