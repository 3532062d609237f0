"""Batches as an evaluation takes them from any loader."""
from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..ops import checks
from .fingerprint import image_checksums

INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)


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


def read(op: str, loader: Iterable[Any], device: torch.device) -> Iterator[Batch]:
    """The loader's batches (x, y) or (x, y, index) on `device`, without empty ones.

    x: [N, ...], uint8 or float; y: integers [N]; index: integers [N], counted where absent. TypeError, ValueError:
    naming what came; ValueError also at the end where no example came.
    """
    position = 0
    for number, given in enumerate(loader):
        if not isinstance(given, (tuple, list)) or len(given) not in (2, 3):
            got = f"{len(given)} parts" if isinstance(given, (tuple, list)) else type(given).__name__
            raise TypeError(f"{op}: loader must give batches (x, y) or (x, y, index), got {got}")
        x, y, *rest = given
        x = checks.tensor(op, "the loader's x", x, checks.IMAGES)
        if x.dim() < 2:
            raise ValueError(f"{op}: the loader's x must have shape [N, ...], got {tuple(x.shape)} in batch {number}")
        n = len(x)
        y = _integers(op, "the loader's y", y, n, number)
        index = torch.arange(position, position + n, device="cpu")
        if rest:
            index = _integers(op, "the loader's index", rest[0], n, number)
        if not n:
            continue
        identity = torch.stack([index.to(x.device), y.to(x.device), image_checksums(x)], 1)
        x, y, index = (t.to(device, non_blocking=True) for t in (x, y, index))
        yield Batch(x, y, index, identity, position, not rest)
        position += n
    if not position:
        raise ValueError(f"{op}: loader must give at least one example, got no batch")


def _integers(op: str, name: str, t: Any, n: int, number: int) -> Tensor:
    t = checks.tensor(op, name, t, INTEGERS)
    if t.shape != (n,):
        raise ValueError(f"{op}: {name} must have shape [N] = [{n}], got {tuple(t.shape)} in batch {number}")
    return t.long()
