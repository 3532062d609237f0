"""Verdicts: who misclassifies what, two bits an example, and their way to the host."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..sources.base import BaseSource


def judge(model: BaseSource, x: Tensor, y: Tensor, key: Tensor) -> Tensor:
    """uint8 [N] for float images x: bit 0, the label is not the highest logit; bit 1, it is not among the five highest.

    key: of whatever the model draws where it crafts in train mode, in which it is then judged as well.
    """
    with torch.no_grad(), model.session(key) if model.crafting == "train" else nullcontext():
        logits = model.logits(x)
    classes = logits.shape[1]
    in_range = (y >= 0) & (y < classes)
    if y.device.type == "cpu" and not bool(in_range.all()):
        raise ValueError(f"transfer_matrix: the loader's y must lie in [0, {classes}), the model's classes, got "
                         f"[{int(y.min())}, {int(y.max())}]")
    at = y.clamp(0, classes - 1)[:, None]
    own = logits.gather(1, at)
    ahead = ~(logits <= own)  # whatever is compared with NaN is ahead, NaN itself among it
    earlier = (logits == own) & (torch.arange(classes, device=y.device) < at)
    rank = (ahead | earlier).sum(1)
    rank = torch.where(in_range, rank, classes)
    return (rank >= 1).to(torch.uint8) + 2 * (rank >= 5).to(torch.uint8)


def pack(codes: np.ndarray) -> bytes:
    """Two planes of bits."""
    return np.packbits(codes & 1).tobytes() + np.packbits(codes >> 1).tobytes()


def unpack(packed: bytes, n: int) -> np.ndarray:
    planes = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(2, -1), axis=1, count=n)
    return planes[0] | planes[1] << 1


class Arrivals:
    """Small results on their way to the host, handled in their order, without a wait for those of the current batch."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor | None, torch.cuda.Event | None, Callable[[Any], None]]] = deque()

    def put(self, t: Tensor | None, then: Callable[[Any], None]) -> None:
        """Call `then` with `t` as a numpy array, or with None, after all that were put before."""
        event = None
        if t is not None and t.is_cuda:
            host = torch.empty(t.shape, dtype=t.dtype, pin_memory=True)
            host.copy_(t, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(t.device))
            t = host
        self._waiting.append((t, event, then))
        if event is None and len(self._waiting) == 1:
            self.settle()

    def settle(self, keep: int = 0) -> None:
        """Handle what was put, but for the newest `keep`."""
        while len(self._waiting) > keep:
            t, event, then = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            then(None if t is None else t.numpy())
