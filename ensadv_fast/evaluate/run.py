"""One pass over a loader: who is crafted on, who is shown what, what is known already, and what came of it."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from .. import ops
from ..attacks import BaseAttack
from ..ops.keys import derive_seed
from ..ops.memory import widen
from ..sources.base import BaseSource
from ..sources.source import as_source
from ..system.machine import versions
from .fingerprint import describe, fingerprint
from .journal import Journal
from .loader import Batch
from .matrix import TransferMatrix
from .sets import FORMAT, AdversarialSet, Rows, SetWriter, to_levels
from .verdicts import Arrivals, judge, pack, unpack

OP = "transfer_matrix"
Model = BaseSource | nn.Module
Sources = Mapping[str, "Model | AdversarialSet | Sequence[AdversarialSet]"]


@dataclass
class Cell:
    """One attack on one source: who is shown what, and what all of it is computed from."""

    attack_name: str
    source_name: str
    targets: tuple[str, ...]
    attack: BaseAttack | None = None
    given: Model | None = None  # what the attack is crafted on, as the caller gave it; None: `saved` has the examples
    source: BaseSource | None = None  # `given`, as one judges by it
    saved: AdversarialSet | None = None
    seed: int = 0
    mark: str = ""  # fingerprint of attack, source and noise; empty where nothing is kept
    writer: SetWriter | None = None


class Run:
    """The state of one call of :func:`ensadv_fast.evaluate.transfer_matrix`: plan, then for each batch clean and every
    cell's attack, then finish. marked: fingerprints are needed, as something is kept."""

    def __init__(self, targets: Mapping[str, Model], sources: Sources, marked: bool) -> None:
        self.marked = marked
        self._prepared: dict[int, BaseSource] = {}  # by id of the model given
        self._given: dict[int, Model] = {}  # and back
        self.borrowed: list[BaseSource] = []  # plain modules, kept in eval mode for the whole run
        self.targets = {t: self._prepare(f"targets[{t!r}]", m) for t, m in targets.items()}
        self.sources: dict[str, BaseSource | tuple[AdversarialSet, ...]] = {
            s: _sets(m) or self._prepare(f"sources[{s!r}]", m) for s, m in sources.items()}
        named = {f"targets[{t!r}]": m.device for t, m in self.targets.items()}
        named |= {f"sources[{s!r}]": m.device for s, m in self.sources.items() if isinstance(m, BaseSource)}
        if len(set(named.values())) > 1:
            raise ValueError(f"{OP}: targets and sources must be on one device, got "
                             + ", ".join(f"{name} on {device}" for name, device in named.items()))
        self.device = next(iter(named.values()))
        self.marks: dict[int, str] = {}  # fingerprint of each model, by id
        self.cells: list[Cell] = []
        self.journal: Journal | None = None  # set by who keeps one
        self.arrivals = Arrivals()
        self.sizes: list[int] = []
        self._data = hashlib.sha256()
        # (cell's names, or () for clean inputs; id of the model) -> packed verdicts, batch by batch
        self._found: dict[tuple[tuple[str, ...], int], list[bytes]] = {}
        self._saved_counted: dict[tuple[str, str], list[np.ndarray]] = {}

    def _prepare(self, name: str, model: object) -> BaseSource:
        if not isinstance(model, (BaseSource, nn.Module)):
            raise TypeError(f"{OP}: {name} must be a Source, an Ensemble or a torch.nn.Module, got "
                            f"{type(model).__name__}")
        if id(model) not in self._prepared:
            self._prepared[id(model)] = source = as_source(model)
            self._given[id(source)] = model
            if source is not model:
                self.borrowed.append(source)
        return self._prepared[id(model)]

    # ---- the plan ----------------------------------------------------------------------------------------

    def plan(self, attacks: Mapping[str, BaseAttack], seed: int, white_box: bool, noise: Mapping[str, str],
             set_dtype: str | None) -> None:
        """Fill `cells`."""
        every, self._seed = tuple(self.targets), seed
        self._mark({id(m): m for m in [*self.targets.values(), *self.sources.values()] if isinstance(m, BaseSource)})
        crafted = [(s, every) for s, m in self.sources.items() if isinstance(m, BaseSource)]
        if white_box:
            crafted += [(t, (t,)) for t in self.targets if t not in self.sources]
        for s, shown in crafted:
            source = self.sources.get(s, self.targets.get(s))
            assert isinstance(source, BaseSource)
            for a, attack in attacks.items():
                drawn = derive_seed(seed, noise.get(a, a), s)
                mark = fingerprint(attack, self.marks[id(source)], drawn, set_dtype) if self.marked else ""
                self.cells.append(Cell(a, s, shown, attack, self._given[id(source)], source, None, drawn, mark))
        for s, given in self.sources.items():
            for saved in () if isinstance(given, BaseSource) else given:
                mark = fingerprint(saved.manifest) if self.marked else ""
                self.cells.append(Cell(saved.attack, s, every, saved=saved, mark=mark))
        pairs = [(c.attack_name, c.source_name) for c in self.cells]
        if twice := {pair for pair in pairs if pairs.count(pair) > 1}:
            raise ValueError(f"{OP}: sources: {sorted(twice)} (attack, source) would come twice")

    def _mark(self, models: Mapping[int, BaseSource]) -> None:
        if self.marked:
            found = versions()
            made_with = [found["ensadv_fast"], found["torch"], str(self.device)]
            self.marks = {i: fingerprint(m, made_with) for i, m in models.items()}

    def open_writers(self, folder_of: Callable[[str, str], Path], set_dtype: str, data: str | None) -> None:
        folders: dict[Path, str] = {}
        for cell in self.cells:
            if cell.saved:
                continue
            folder = folder_of(cell.source_name, cell.attack_name)
            name = f"{cell.attack_name!r} on {cell.source_name!r}"
            if folder in folders:
                raise ValueError(f"{OP}: save_sets: the sets of {folders[folder]} and {name} would share {folder}")
            folders[folder] = name
            attack = describe(cell.attack)
            attack = attack if isinstance(attack, dict) else {"class": attack}
            cell.writer = SetWriter(folder, {
                "format": FORMAT, "source": {"name": cell.source_name, "sha256": self.marks[id(cell.source)],
                                             "description": describe(cell.source)},
                "attack": {**attack, "name": cell.attack_name, "kind": attack.get("name")},
                "eps": getattr(cell.attack, "eps", None), "norm": _norm(cell.attack),
                "key": cell.seed, "data": data, "dtype": set_dtype, "cell": cell.mark, "versions": versions()})

    def saved_batches(self) -> Iterator[Batch]:
        """Where all cells are saved sets: the first one's examples, without clean images, a shard at a time."""
        first, position = self.cells[0].saved, 0
        assert first is not None
        for shard in first.manifest["shards"]:
            rows = first.rows(position, position + shard["n"])
            yield Batch(None, rows.labels.to(self.device), rows.index.to(self.device), rows.identity(), position)
            position += shard["n"]

    # ---- one batch ---------------------------------------------------------------------------------------

    def clean(self, batch: Batch) -> None:
        """The verdicts of all targets and sources on the batch as it is."""
        self.sizes.append(len(batch))
        self.arrivals.put(batch.identity, lambda identity: self._data.update(identity.tobytes()))
        self._digest = batch.digest() if self.marked else ""
        self._clean_now: dict[int, np.ndarray] = {}
        x = batch.x
        if x is None:
            return
        judges = {id(m): m for m in [*self.targets.values(), *(c.source for c in self.cells if c.source)]}
        mark = fingerprint("clean", self._seed) if self.marked else ""
        self._judge((), mark, judges, batch, lambda: x, ops.fresh_key("cpu", self._seed))

    def attack(self, cell: Cell, batch: Batch) -> None:
        """The verdicts of all who are shown this cell's examples of the batch."""
        judges = {id(m): m for m in [*(self.targets[t] for t in cell.targets), cell.source] if m is not None}
        names = (cell.attack_name, cell.source_name)
        noise = ops.fresh_key("cpu", cell.seed)
        rows = self._rows(cell.saved, batch) if cell.saved else None
        if rows is not None:
            self._saved_counted.setdefault(names, []).append(rows.counted.numpy())
        stored = cell.writer.existing(self._digest) if cell.writer else None

        def crafted() -> Tensor:
            if rows is not None:
                return rows.x_adv.to(self.device, non_blocking=True)
            if stored is not None:
                return stored.to(self.device, non_blocking=True)
            assert cell.attack is not None and cell.given is not None and batch.x is not None
            return cell.attack(cell.given, batch.x, batch.y, key=noise, index=batch.index)

        if cell.writer is None or stored is not None:
            self._judge(names, cell.mark, judges, batch, crafted, noise)
            return
        x_adv = self._as_saved(cell, cell.writer.head, batch, crafted())
        codes = self._judge(names, cell.mark, judges, batch, lambda: x_adv, noise, anew=True)
        self.arrivals.settle()
        me = id(cell.source)
        counted = ~self._clean_now[me] & codes[me]
        cell.writer.write(batch, self._digest, x_adv, torch.from_numpy(counted & 3))

    def _as_saved(self, cell: Cell, head: Mapping[str, Any], batch: Batch, x_adv: Tensor) -> Tensor:
        """x_adv in the dtype of the cell's set, within its budget still."""
        if head["dtype"] == "float32":
            return x_adv.float()
        assert batch.x is not None
        eps = getattr(cell.attack, "eps", None) if head["norm"] == "linf" else None
        return to_levels(x_adv, batch.x, eps, getattr(cell.attack, "lo", 0.0), getattr(cell.attack, "hi", 1.0))

    def _rows(self, saved: AdversarialSet, batch: Batch) -> Rows:
        """The saved examples of this batch: the same images, labels and positions, or a ValueError."""
        stop = batch.position + len(batch)
        if stop > len(saved):
            raise ValueError(f"{OP}: the set in {saved.folder} has {len(saved)} examples, the loader gives more")
        rows = saved.rows(batch.position, stop)
        ours, theirs = batch.identity.cpu(), rows.identity()
        if batch.counted:
            ours, theirs = ours[:, 1:], theirs[:, 1:]
        if not torch.equal(ours, theirs):
            at = batch.position + int((ours != theirs).any(1).nonzero()[0])
            raise ValueError(f"{OP}: the set in {saved.folder} was crafted from other images, labels or in another "
                             f"order: the first that differs is the loader's example {at}")
        return rows

    def _judge(self, names: tuple[str, ...], mark: str, judges: Mapping[int, BaseSource], batch: Batch,
               images: Callable[[], Tensor], noise: Tensor, anew: bool = False) -> dict[int, np.ndarray]:
        """Record everyone's verdicts, from the journal where it has them all; the codes, filled when they arrive."""
        codes: dict[int, np.ndarray] = {} if names else self._clean_now
        known = {}
        if self.journal is not None and not anew:
            known = {i: packed for i in judges if (packed := self.journal.get(mark, self._digest, self.marks[i]))
                     is not None and len(packed) == 2 * -(-len(batch) // 8)}
        for i, packed in known.items():
            codes[i] = unpack(packed, len(batch))
        missing = [i for i in judges if i not in known]
        if missing:
            x = images()
            if x.dtype == torch.uint8 or batch.x is not None and x.dtype != batch.x.dtype:  # levels, or a saved float32
                x = widen(x).to(torch.float32 if batch.x is None or batch.x.dtype == torch.uint8 else batch.x.dtype)
            found = torch.stack([judge(judges[i], x, batch.y, noise) for i in missing])

        def arrived(host: np.ndarray | None) -> None:
            new = {} if host is None else dict(zip(missing, host))
            codes.update(new)
            packed = known | {i: pack(code) for i, code in new.items()}
            for i in judges:
                self._found.setdefault((names, i), []).append(packed[i])
            if new and self.journal is not None:
                self.journal.add(mark, self._digest, {self.marks[i]: packed[i] for i in new})

        self.arrivals.put(found if missing else None, arrived)
        return codes

    # ---- the end -----------------------------------------------------------------------------------------

    def finish(self) -> TransferMatrix:
        for cell in self.cells:
            if cell.saved and len(cell.saved) != sum(self.sizes):
                raise ValueError(f"{OP}: the set in {cell.saved.folder} has {len(cell.saved)} examples, the loader "
                                 f"gave {sum(self.sizes)}")
        for cell in self.cells:
            if cell.writer:
                cell.writer.finish()
        matrix = TransferMatrix(data=self._data.hexdigest()[:32])
        for t, model in self.targets.items():
            if ((), id(model)) in self._found:
                _put(matrix.clean, matrix.clean5, t, self._joined((), model))
        for cell in self.cells:
            names = (cell.attack_name, cell.source_name)
            for t in cell.targets:
                _put(matrix.wrong, matrix.wrong5, (*names, t), self._joined(names, self.targets[t]))
            if cell.saved:
                code = np.concatenate(self._saved_counted[names])
                _put(matrix.counted, matrix.counted5, names, code)
            elif cell.source is not None:
                _put(matrix.counted, matrix.counted5, names,
                     ~self._joined((), cell.source) & self._joined(names, cell.source))
        return matrix

    def _joined(self, names: tuple[str, ...], model: BaseSource) -> np.ndarray:
        chunks = self._found[names, id(model)]
        return np.concatenate([unpack(packed, n) for packed, n in zip(chunks, self.sizes)])


def _norm(attack: Any) -> str | None:
    """The norm of the attack's budget; None where it does not say."""
    if not hasattr(attack, "eps"):
        return None
    return "l2" if getattr(attack, "direction", "sign") == "l2" else "linf"


def _put(top1: MutableMapping[Any, np.ndarray], top5: MutableMapping[Any, np.ndarray], name: Any,
         codes: np.ndarray) -> None:
    top1[name], top5[name] = (codes & 1).astype(bool), (codes >> 1 & 1).astype(bool)


def _sets(given: Any) -> tuple[AdversarialSet, ...]:
    """The sets that a source is given as; none where it is a model."""
    sets = (given,) if isinstance(given, AdversarialSet) else given
    if isinstance(sets, (tuple, list)) and sets and all(isinstance(s, AdversarialSet) for s in sets):
        return tuple(sets)
    return ()
