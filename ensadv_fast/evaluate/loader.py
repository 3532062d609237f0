"""Batches as an evaluation takes them from any loader."""
from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from .fingerprint import image_checksums


@dataclass(frozen=True)
class Batch:
    """x: images [N, ...] on the models' device, None where there are only those of saved sets. y, index: int64 [N] on
    that device. identity: int64 [N, 3], (index, label, checksum of the image) of each example, on the device of the
    loader's x. position: number of examples before this batch. counted: the loader gave no index, so it is counted."""

    x: Tensor | None
    y: Tensor
    index: Tensor
    identity: Tensor
    position: int
    counted: bool = False

    def __len__(self) -> int:
        return len(self.y)

    def digest(self) -> str:
        """32 hexadecimal digits of the identity's SHA-256. It synchronises where the loader's images are on a GPU."""
        return hashlib.sha256(self.identity.cpu().numpy().tobytes()).hexdigest()[:32]


Pick = Callable[[Any], Any] | None  # what the loader gives -> (x, y) or (x, y, index)


class Classes:
    """Which logit the label of each class of the data is.

    given: None, where labels are logits and their number is the one that the loader's data set tells, if it does (an
    attribute `classes`, and no target_transform); the number of logits that every model must have; or the logit of each
    class. count: the number of logits that is demanded, or None.
    """

    def __init__(self, op: str, given: int | Sequence[int] | None, loader: object) -> None:
        self.op = op
        self.count: int | None = None
        self._logits: Tensor | None = None
        if given is None:
            self.count = _told_classes(loader)
        elif isinstance(given, int):
            self.count = checks.integer(op, "classes", given, 1)
        else:
            numbers = [checks.integer(op, "classes", logit, 0) for logit in given]
            if not numbers or len(set(numbers)) < len(numbers):
                raise ValueError(f"{op}: classes must be the logit of each class, each another one, got {numbers}")
            self._logits = torch.tensor(numbers)

    def logits_of(self, y: Tensor) -> Tensor:
        """Labels int64 [N] as numbers of logits. ValueError for one that no class has (on a GPU: -1)."""
        if self._logits is None:
            return y
        table = self._logits.to(y.device)
        known = (y >= 0) & (y < len(table))
        if checks.is_readable(y) and not bool(known.all()):
            raise ValueError(f"{self.op}: the loader's y must lie in [0, {len(table)}), the places in classes, got "
                             f"[{int(y.min())}, {int(y.max())}]")
        return torch.where(known, table[y.clamp(0, len(table) - 1)], -1)

    def check(self, name: str, logits: int) -> None:
        """ValueError where the model of this name gives another number of logits than there are classes."""
        if self.count is not None and logits != self.count:
            raise ValueError(f"{self.op}: {name} must give a logit for each of the {self.count} classes of the data, "
                             f"got {logits}; classes= says which logit each class is, or how many logits there are")


def _told_classes(loader: object) -> int | None:
    """The number of classes that a loader's data set says it has."""
    data_set = getattr(loader, "dataset", loader)
    classes = getattr(data_set, "classes", None)
    if getattr(data_set, "target_transform", None) is not None:
        return None
    if isinstance(classes, int) and not isinstance(classes, bool):
        return classes
    return len(classes) if isinstance(classes, (list, tuple)) and classes else None


def read(op: str, loader: Iterable[Any], device: torch.device, pick: Pick = None,
         classes: Classes | None = None) -> Iterator[Batch]:
    """The loader's batches (x, y) or (x, y, index) on `device`, without empty ones.

    x: [N, ...], uint8 or float; y: integers or bools [N] or [N, 1]; index: integers [N], counted where absent. pick:
    makes such a batch of what the loader gives. classes: which logits the labels are. TypeError, ValueError: naming
    what came; ValueError also at the end where no example came.
    """
    position = 0
    for number, given in enumerate(loader):
        x, y, *rest = checks.batch_parts(op, given, pick)
        x = checks.tensor(op, "the loader's x", x, checks.IMAGES)
        if x.dim() < 2:
            raise ValueError(f"{op}: the loader's x must have shape [N, ...], got {tuple(x.shape)} in batch {number}")
        n = len(x)
        y = checks.class_numbers(op, "the loader's y", y, n, f" in batch {number}")
        y = y if classes is None else classes.logits_of(y)
        index = torch.arange(position, position + n, device="cpu")
        counted = not rest or rest[0] is None
        if not counted:
            index = _positions(op, rest[0], n, number)
        if not n:
            continue
        identity = torch.stack([index.to(x.device), y.to(x.device), image_checksums(x)], 1)
        x, y, index = (t.to(device, non_blocking=True) for t in (x, y, index))
        yield Batch(x, y, index, identity, position, counted)
        position += n
    if not position:
        raise ValueError(f"{op}: loader must give at least one example, got no batch")


def _positions(op: str, t: Any, n: int, number: int) -> Tensor:
    t = checks.tensor(op, "the loader's index", t, checks.INTEGERS)
    if t.shape != (n,):
        raise ValueError(f"{op}: the loader's index must have shape [N] = [{n}], got {tuple(t.shape)} in "
                         f"batch {number}; a function given as batch= says what the parts are")
    return t.long()
