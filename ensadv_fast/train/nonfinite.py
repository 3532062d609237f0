"""Steps whose gradients are not finite: found and undone on the device, and read by the host at the next log line."""
from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class NonFinite:
    """Steps with NaN or infinite gradients since the last look.

    count: how many. step: the number of the first one. index: the dataset positions in this rank's part of the first
    one's batch; empty where none were given.
    """

    count: int
    step: int
    index: list[int]


class FiniteWatch:
    """Remembers non-finite steps in device tensors, so that a step never waits for the host.

    buffers: what a forward pass changes besides weights (batch statistics), restored where a step is undone; none
    where the run stops anyway. `bad` flags are made from all-reduced gradients, so they are alike on all ranks, and so
    is everything kept here except the indices, which are this rank's.
    """

    def __init__(self, device: torch.device, buffers: Iterable[Tensor] = ()) -> None:
        self.device, self._buffers = device, [b for b in buffers if b.is_floating_point()]
        self._saved = [b.clone() for b in self._buffers]
        self._index = torch.empty(0, dtype=torch.int64, device=device)
        self._count = torch.zeros((), dtype=torch.int64, device=device)
        self._step = torch.full((), -1, dtype=torch.int64, device=device)

    def before(self) -> None:
        """Keep the buffers as they are before a forward pass."""
        if self._saved:
            torch._foreach_copy_(self._saved, self._buffers)

    def undo(self, bad: Tensor) -> None:
        """Put the buffers back where the step was bad (bool [])."""
        if self.device.type != "cpu":
            for buffer, saved in zip(self._buffers, self._saved, strict=True):
                buffer.copy_(torch.where(bad, saved, buffer))
        elif self._saved and bad:
            torch._foreach_copy_(self._buffers, self._saved)

    def note(self, bad: Tensor, step: int, index: Tensor | None) -> None:
        """Count a step that was bad (bool []); keep number and indices of the first one."""
        if self.device.type == "cpu" and not bad:
            return
        first = bad & (self._step < 0)
        if index is not None:
            if len(index) > len(self._index):  # the first batch: no later one is larger
                self._index = F.pad(self._index, (0, len(index) - len(self._index)), value=-1)
            padded = F.pad(index.to(self.device), (0, len(self._index) - len(index)), value=-1)
            self._index = torch.where(first, padded, self._index)
        self._step = torch.where(first, step, self._step)
        self._count += bad

    @property
    def seen(self) -> Tensor:
        """Was there one since the last look? bool [], on the device."""
        return self._count > 0

    def look(self) -> NonFinite | None:
        """The bad steps since the last look, or None; counting starts anew. It waits for the device."""
        count, step, *index = torch.cat([torch.stack([self._count, self._step]), self._index]).tolist()
        if not count:
            return None
        self._count.zero_()
        self._step.fill_(-1)
        self._index.fill_(-1)
        return NonFinite(count, step, [i for i in index if i >= 0])
