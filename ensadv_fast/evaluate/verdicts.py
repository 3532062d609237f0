"""Verdicts: which model misclassifies which example, in two bits each, and how they come to the host."""
from __future__ import annotations

from collections import deque
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from ..sources.base import BaseSource

NAN = 4  # the bit that says that a logit is NaN


class Judgement(NamedTuple):
    """codes: uint8 [N]. Bit 0: the label is not the highest logit; bit 1: it is not among the five highest; bit 2
    (NAN): a logit is NaN. classes: the number of logits."""

    codes: Tensor
    classes: int


def judge(model: BaseSource, x: Tensor, y: Tensor, key: Tensor) -> Judgement:
    """What a model says of float images x with labels y (int64 [N]), on its device. x is left as it is, also by a
    model that writes into its input.

    A model that crafts in train mode is judged in train mode too; key (int64 [2], on the CPU) is of what it draws
    there. A label out of range raises ValueError on the CPU, and on a GPU counts as behind all classes.
    """
    with torch.no_grad(), model.session(key) if model.crafting == "train" else nullcontext():
        logits = model.logits(x.clone())
    classes = logits.shape[1]
    in_range = (y >= 0) & (y < classes)
    if y.device.type == "cpu" and not bool(in_range.all()):
        raise ValueError(f"transfer_matrix: the loader's y must lie in [0, {classes}), the model's classes, got "
                         f"[{int(y.min())}, {int(y.max())}]")
    at = y.clamp(0, classes - 1)[:, None]
    own = logits.gather(1, at)
    ahead = ~(logits <= own)  # true also where one of the two is NaN
    earlier = (logits == own) & (torch.arange(classes, device=y.device) < at)
    rank = (ahead | earlier).sum(1)
    rank = torch.where(in_range, rank, classes)
    codes = (rank >= 1).to(torch.uint8) + 2 * (rank >= 5).to(torch.uint8) + NAN * logits.isnan().any(1).to(torch.uint8)
    return Judgement(codes, classes)


def pack(codes: np.ndarray) -> bytes:
    """Codes of :func:`judge`, uint8 [N], as two planes of bits: all bits 0, then all bits 1, each in whole bytes. They
    are without NAN here and below."""
    return np.packbits(codes & 1).tobytes() + np.packbits(codes >> 1).tobytes()


def is_packed(packed: bytes, n: int) -> bool:
    """Has this the length of n packed codes?"""
    return len(packed) == 2 * -(-n // 8)


def unpack(packed: bytes, n: int) -> np.ndarray:
    """uint8 [n]: what :func:`pack` was given."""
    planes = np.unpackbits(np.frombuffer(packed, np.uint8).reshape(2, -1), axis=1, count=n)
    return planes[0] | planes[1] << 1


class Verdicts:
    """What some models, named by their numbers, say of the n images of one batch: codes as :func:`judge` gives them.

    known: packed verdicts that are there already. awaited: the models whose verdicts :meth:`set` brings later.
    """

    def __init__(self, n: int, known: Mapping[int, bytes], awaited: Sequence[int]) -> None:
        self._n, self._packed, self._awaited = n, dict(known), tuple(awaited)

    def set(self, rows: np.ndarray) -> None:
        """The codes of the awaited models in their order: uint8 [models, n]."""
        self._packed |= {model: pack(codes) for model, codes in zip(self._awaited, rows, strict=True)}

    def all_packed(self) -> Mapping[int, bytes]:
        """model -> its packed verdicts; without those that have not come yet."""
        return self._packed

    def codes(self, model: int) -> np.ndarray:
        """uint8 [n]. KeyError where they have not come yet."""
        return unpack(self._packed[model], self._n)


class Collected:
    """The verdicts of all batches so far, in their order, by the models' numbers, two bits an image."""

    def __init__(self) -> None:
        self._batches: dict[int, list[bytes]] = {}

    def add(self, verdicts: Verdicts) -> None:
        """The next batch's, once all have come."""
        for model, packed in verdicts.all_packed().items():
            self._batches.setdefault(model, []).append(packed)

    def __contains__(self, model: int) -> bool:
        return model in self._batches

    def codes(self, model: int, sizes: Sequence[int]) -> np.ndarray:
        """uint8 [N]: those of all batches in one. sizes: images of each batch."""
        batches = zip(self._batches[model], sizes, strict=True)
        return np.concatenate([unpack(packed, n) for packed, n in batches])


class Arrivals:
    """Small results on their way to the host. They are handled in the order in which they were put, and nothing waits
    for those of the current batch."""

    def __init__(self) -> None:
        self._waiting: deque[tuple[Tensor | None, torch.cuda.Event | None, Callable[[Any], None]]] = deque()

    def put(self, t: Tensor | None, then: Callable[[Any], None]) -> None:
        """Call `then` with `t` as a numpy array (None: with None), after all that were put before."""
        event = None
        if t is not None and t.is_cuda:
            host = torch.empty(t.shape, dtype=t.dtype, device="cpu", pin_memory=True)
            host.copy_(t, non_blocking=True)
            event = torch.cuda.Event()
            event.record(torch.cuda.current_stream(t.device))
            t = host
        self._waiting.append((t, event, then))
        if event is None and len(self._waiting) == 1:
            self.settle()

    def settle(self, keep: int = 0) -> None:
        """Handle all that were put but for the newest `keep`, waiting for them where they are still on their way."""
        while len(self._waiting) > keep:
            t, event, then = self._waiting.popleft()
            if event is not None:
                event.synchronize()
            then(None if t is None else t.numpy())
