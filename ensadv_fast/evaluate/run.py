"""One pass over a loader: clean images and every cell's examples are judged, batch by batch."""
from __future__ import annotations

import hashlib
import warnings
from collections import Counter
from collections.abc import Callable, Iterator, MutableMapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from .. import ops
from ..ops.memory import widen
from ..system.machine import versions
from .cells import OP, CraftedCell, Participant, Participants, SavedCell, Shown, plan_clean
from .fingerprint import describe
from .journal import Journal
from .loader import Batch, Classes
from .matrix import TransferMatrix
from .sets import FORMAT, AdversarialSet, Rows, SetWriter, to_levels
from .verdicts import NAN, Arrivals, Verdicts, is_packed, judge


class TransferPass:
    """The state of one call of :func:`ensadv_fast.evaluate.transfer_matrix`.

    For each batch: `judge_clean`, then `judge_cell` with every cell; at the end `finish`. journal: where what is found
    is kept, and what was found before is known from; None where nothing is. classes: how many logits a model must give.
    """

    def __init__(self, participants: Participants, cells: Sequence[CraftedCell | SavedCell], seed: int,
                 journal: Journal | None, classes: Classes) -> None:
        self.participants, self.cells, self.journal, self.classes = participants, cells, journal, classes
        self.arrivals = Arrivals()
        self._clean = plan_clean(participants, cells, seed)
        self._sizes: list[int] = []  # of the batches so far
        self._data = hashlib.sha256()
        self._digest = ""  # of the current batch; empty where nothing is kept
        self._nan: Counter[str] = Counter()  # of how many images each model gave NaN, by its name
        self._clean_now: Verdicts | None = None  # of the current batch; None where it has no clean images

    # ---- saved sets --------------------------------------------------------------------------------------

    def open_writers(self, folder_of: Callable[[str, str], Path], set_dtype: str, data: str | None) -> None:
        """Have what is crafted written as sets. folder_of: (source, attack) -> the set's folder."""
        folders: dict[Path, str] = {}
        for cell in self.cells:
            if isinstance(cell, SavedCell):
                continue
            folder = folder_of(cell.source_name, cell.attack_name)
            name = f"{cell.attack_name!r} on {cell.source_name!r}"
            if folder in folders:
                raise ValueError(f"{OP}: save_sets: the sets of {folders[folder]} and {name} would share {folder}")
            folders[folder] = name
            cell.writer = SetWriter(folder, _set_head(cell, set_dtype, data))

    def saved_batches(self) -> Iterator[Batch]:
        """Where all cells are saved sets: the first one's examples, without clean images, a shard at a time."""
        cell, position = self.cells[0], 0
        assert isinstance(cell, SavedCell)
        for shard in cell.set.manifest["shards"]:
            rows = cell.set.rows(position, position + shard["n"])
            labels, index = rows.labels.to(self.participants.device), rows.index.to(self.participants.device)
            yield Batch(None, labels, index, rows.identity(), position)
            position += shard["n"]

    # ---- one batch ---------------------------------------------------------------------------------------

    def judge_clean(self, batch: Batch) -> None:
        """Begin with a batch: the verdicts of all targets and sources on its images as they are."""
        self._sizes.append(len(batch))
        self.arrivals.put(batch.identity, lambda identity: self._data.update(identity.tobytes()))
        self._digest = batch.digest() if self.participants.kept else ""
        x = batch.x
        self._clean_now = None if x is None else self._judge(self._clean, batch, lambda: x)

    def judge_cell(self, cell: CraftedCell | SavedCell, batch: Batch) -> None:
        """The verdicts of this cell's targets and of its source on its examples of the batch."""
        if isinstance(cell, SavedCell):
            rows = _matching_rows(cell.set, batch)
            cell.counted.append(rows.counted.numpy())
            self._judge(cell, batch, lambda: rows.x_adv.to(self.participants.device, non_blocking=True))
        elif cell.writer is None:
            self._judge(cell, batch, lambda: _craft(cell, batch))
        elif (stored := cell.writer.existing(self._digest)) is not None:
            self._judge(cell, batch, lambda: stored.to(self.participants.device, non_blocking=True))
        else:
            self._craft_and_write(cell, cell.writer, batch)

    def _craft_and_write(self, cell: CraftedCell, writer: SetWriter, batch: Batch) -> None:
        """Judge the examples as they are saved, and write them together with what the source makes of them."""
        x_adv = _to_set_dtype(cell, writer, batch, _craft(cell, batch))
        attacked = self._judge(cell, batch, lambda: x_adv, use_journal=False)
        self.arrivals.settle()
        assert self._clean_now is not None
        source = cell.model.index
        counted = ~self._clean_now.codes(source) & attacked.codes(source)
        writer.write(batch, self._digest, x_adv, torch.from_numpy(counted & 3))

    def _judge(self, shown: Shown, batch: Batch, images: Callable[[], Tensor], use_journal: bool = True) -> Verdicts:
        """Collect everyone's verdicts on the images, which are made only where the journal lacks some of them.

        The verdicts of models that judge now arrive later, in the order of the calls.
        """
        known = self._known(shown, len(batch)) if use_journal else {}
        judges = [m for m in shown.models if m.index not in known]
        verdicts = Verdicts(len(batch), known, [m.index for m in judges])
        codes = None
        if judges:
            x, key = _as_float(images(), batch), ops.fresh_key("cpu", shown.seed)
            codes = torch.stack([self._codes_by(m, x, batch.y, key) for m in judges])
        digest = self._digest

        def arrive(rows: np.ndarray | None) -> None:
            if rows is not None:
                self._nan.update({m.name: int((row & NAN).astype(bool).sum()) for m, row in zip(judges, rows)})
                verdicts.set(rows & ~np.uint8(NAN))
            shown.collected.add(verdicts)
            if judges and self.journal is not None:
                packed = verdicts.all_packed()
                self.journal.add(shown.fingerprint, digest, {m.fingerprint: packed[m.index] for m in judges})

        self.arrivals.put(codes, arrive)
        return verdicts

    def _codes_by(self, model: Participant, x: Tensor, y: Tensor, key: Tensor) -> Tensor:
        """The codes of one model, whose number of logits must be that of the classes."""
        found = judge(model.source, x, y, key)
        self.classes.check(model.name, found.classes)
        return found.codes

    def settle(self, *, keep_current: bool = False) -> None:
        """Handle the verdicts that were asked for; with keep_current, those of the current batch may still be on their
        way."""
        self.arrivals.settle(keep=len(self.cells) + 2 if keep_current else 0)

    def _known(self, shown: Shown, n: int) -> dict[int, bytes]:
        """The packed verdicts that the journal has of the current batch of n images, by the models' numbers."""
        if self.journal is None:
            return {}
        found = {m.index: self.journal.get(shown.fingerprint, self._digest, m.fingerprint) for m in shown.models}
        return {index: packed for index, packed in found.items() if packed is not None and is_packed(packed, n)}

    # ---- the end -----------------------------------------------------------------------------------------

    def finish(self) -> TransferMatrix:
        """The matrix of all batches, once all verdicts have arrived. ValueError where a set has more examples."""
        for cell in self.cells:
            if isinstance(cell, SavedCell) and len(cell.set) != sum(self._sizes):
                raise ValueError(f"{OP}: the set in {cell.set.folder} has {len(cell.set)} examples, the loader gave "
                                 f"{sum(self._sizes)}")
        for cell in self.cells:
            if isinstance(cell, CraftedCell) and cell.writer:
                cell.writer.finish()
        for name, n in (+self._nan).items():
            warnings.warn(f"{OP}: {name} gave NaN for {n} of the images, clean or attacked, that it was shown; they "
                          "count as misclassified", stacklevel=4)
        matrix = TransferMatrix(data=self._data.hexdigest()[:32])
        for t, model in self.participants.targets.items():
            if model.index in self._clean.collected:
                _put(matrix.clean, matrix.clean5, t, self._codes(self._clean, model))
        for cell in self.cells:
            for t in cell.targets:
                _put(matrix.wrong, matrix.wrong5, (*cell.names, t), self._codes(cell, self.participants.targets[t]))
            _put(matrix.counted, matrix.counted5, cell.names, self._counted(cell))
        return matrix

    def _codes(self, shown: Shown, model: Participant) -> np.ndarray:
        return shown.collected.codes(model.index, self._sizes)

    def _counted(self, cell: CraftedCell | SavedCell) -> np.ndarray:
        """What the transfer rate is counted among, as codes: the source has the clean image right, this one wrong."""
        if isinstance(cell, SavedCell):
            return np.concatenate(cell.counted)
        return ~self._codes(self._clean, cell.model) & self._codes(cell, cell.model)


def _craft(cell: CraftedCell, batch: Batch) -> Tensor:
    assert batch.x is not None
    x = batch.x.clone()  # a model that writes into its input writes into this one
    return cell.attack(cell.model.given, x, batch.y, key=ops.fresh_key("cpu", cell.seed), index=batch.index)


def _to_set_dtype(cell: CraftedCell, writer: SetWriter, batch: Batch, x_adv: Tensor) -> Tensor:
    """x_adv in the dtype of the cell's set, within its budget still."""
    if writer.head["dtype"] == "float32":
        return x_adv.float()
    assert batch.x is not None
    eps = getattr(cell.attack, "eps", None) if writer.head["norm"] == "linf" else None
    return to_levels(x_adv, batch.x, eps, getattr(cell.attack, "lo", 0.0), getattr(cell.attack, "hi", 1.0))


def _as_float(x: Tensor, batch: Batch) -> Tensor:
    """Images as models judge them: in the dtype of the batch's images where that is a float, else in float32.

    They come otherwise as uint8 levels, or as a set's float32 where the loader's images are in another dtype."""
    if x.dtype == torch.uint8 or batch.x is not None and x.dtype != batch.x.dtype:
        return widen(x).to(torch.float32 if batch.x is None or batch.x.dtype == torch.uint8 else batch.x.dtype)
    return x


def _matching_rows(saved: AdversarialSet, batch: Batch) -> Rows:
    """The saved examples of this batch. ValueError where they are of other images, labels or positions."""
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


def _set_head(cell: CraftedCell, set_dtype: str, data: str | None) -> dict[str, Any]:
    """The manifest of the cell's set without its shards."""
    attack = describe(cell.attack)
    attack = attack if isinstance(attack, dict) else {"class": attack}
    return {"format": FORMAT, "source": {"name": cell.source_name, "sha256": cell.model.fingerprint,
                                         "description": describe(cell.model.source)},
            "attack": {**attack, "name": cell.attack_name, "kind": attack.get("name")},
            "eps": getattr(cell.attack, "eps", None), "norm": _norm(cell.attack),
            "key": cell.seed, "data": data, "dtype": set_dtype, "cell": cell.fingerprint, "versions": versions()}


def _norm(attack: Any) -> str | None:
    """The norm of the attack's budget; None where it does not say."""
    if not hasattr(attack, "eps"):
        return None
    return "l2" if getattr(attack, "direction", "sign") == "l2" else "linf"


def _put(top1: MutableMapping[Any, np.ndarray], top5: MutableMapping[Any, np.ndarray], name: Any,
         codes: np.ndarray) -> None:
    top1[name], top5[name] = (codes & 1).astype(bool), (codes >> 1 & 1).astype(bool)
