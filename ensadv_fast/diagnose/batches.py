"""What the measurements share: batches from tensors or a loader, gradients and losses of a batch, and results."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..ops import checks
from ..ops.losses import sample_losses
from ..sources.base import BaseSource
from ..sources.source import as_source

Model = BaseSource | nn.Module
Data = Tensor | Iterable  # images, or batches (x, y) or (x, y, index)
Rows = dict[str, Tensor]  # per-sample tensors of one length

BATCH_SIZE = 250


@dataclass(frozen=True)
class Result:
    """A measurement: numbers over all samples, and tensors with one entry per sample, on the CPU."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them: tensors as nested lists, what is not finite as None."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}


def plain(value: Any) -> Any:
    """`value` as JSON takes it, and strictly: NaN and infinities as None."""
    if isinstance(value, Result):
        return value.to_dict()
    if isinstance(value, Tensor):
        return plain(value.tolist())
    if isinstance(value, dict):
        return {str(k): plain(v) for k, v in value.items()}
    if isinstance(value, (list, tuple)):
        return [plain(v) for v in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def over(op: str, model: Model, x: Data, y: Tensor | None, index: Tensor | None, batch_size: int,
         measure: Callable[[BaseSource, Tensor, Tensor, Tensor], Rows]) -> Rows:
    """`measure(source, x, y, index)` of each batch, its rows joined over all batches and brought to the CPU once.

    x: float images [N, ...] in [0, 1] with labels y (int64 [N]) and, optionally, index (int64 [N], 0..N-1 where
    absent), taken `batch_size` at a time; or any iterable of (x, y) or (x, y, index), which is walked through once and
    whose batches are moved to the model's device. A plain module is used as it is (in eval mode meanwhile) and left
    exactly as it was.
    Raises TypeError, ValueError: naming the argument, also where there is no sample.
    """
    source = as_source(model)
    found: dict[str, list[Tensor]] = {}
    for batch in _batches(op, source, x, y, index, batch_size):
        for name, rows in measure(source, *batch).items():
            found.setdefault(name, []).append(rows)
    if not found:
        raise ValueError(f"{op}: x gave no images, want at least one")
    return {name: torch.cat(rows).cpu() for name, rows in found.items()}


def _batches(op: str, source: BaseSource, x: Data, y: Tensor | None, index: Tensor | None,
             batch_size: int) -> Iterable[tuple[Tensor, Tensor, Tensor]]:
    if isinstance(x, Tensor):
        x = checks.images(op, x, checks.FLOATS)
        if x.device != source.device:
            raise ValueError(f"{op}: x must be on the model's device {source.device}, got {x.device}")
        y = checks.labels(op, "y", y, len(x), x.device)
        index = checks.index(op, index, len(x), x.device)
        index = torch.arange(len(x), device=x.device) if index is None else index
        if isinstance(batch_size, bool) or not isinstance(batch_size, int) or batch_size < 1:
            raise ValueError(f"{op}: batch_size must be an int >= 1, got {batch_size!r}")
        yield from ((widened(a), b, c) for a, b, c in zip(x.split(batch_size), y.split(batch_size),
                                                          index.split(batch_size), strict=True) if len(a))
        return
    if not isinstance(x, Iterable):
        raise TypeError(f"{op}: x must be a tensor or an iterable of batches, got {type(x).__name__}")
    if y is not None or index is not None:
        raise ValueError(f"{op}: y and index belong into the loader's batches, got them besides a loader")
    seen = 0
    for batch in x:
        if not isinstance(batch, (tuple, list)) or len(batch) not in (2, 3):
            raise ValueError(f"{op}: x must give batches (x, y) or (x, y, index), got {type(batch).__name__}")
        images, *rest = (t.to(source.device) if isinstance(t, Tensor) else t for t in batch)
        images = checks.images(op, images, checks.FLOATS)
        labels = checks.labels(op, "y", rest[0], len(images), images.device)
        n = len(images)
        at = checks.index(op, rest[1] if rest[1:] else None, n, images.device)
        if n:
            yield widened(images), labels, torch.arange(seen, seen + n, device=images.device) if at is None else at
        seen += n


def widened(x: Tensor) -> Tensor:
    """Images as they are measured: float32, or float64 where they came so."""
    return x if x.dtype in (torch.float32, torch.float64) else x.float()


def child_keys(op: str, key: Tensor | None, n: int) -> list[Tensor]:
    """n keys on the CPU from `key` (int64 [2]), or from the package's next one."""
    key = ops.fresh_key("cpu") if key is None else checks.key(op, key, key.device if isinstance(key, Tensor) else None)
    return list(ops.split(key.cpu(), n).unbind())


def noise(x: Tensor, key: Tensor, eps: float, kind: str, index: Tensor) -> Tensor:
    """Noise of x's shape: a function of (key, index, element)."""
    return ops.random_step(torch.zeros_like(x), key.to(x.device), eps, kind=kind, index=index, clip=False)


def gradient(source: BaseSource, x: Tensor, y: Tensor) -> Tensor:
    """The true gradient of each sample's cross-entropy by its image, at least float32."""
    return widened(source.input_grad(x, y, rescale=False).grad)


def direction(source: BaseSource, x: Tensor, y: Tensor) -> Tensor:
    """The gradient times a power of two per sample that keeps it from underflow; elements not finite count as 0."""
    return widened(source.input_grad(x, y).grad).nan_to_num(0, 0, 0)


def judged(source: BaseSource, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy [N], at least float32; predictions int64 [N]) of images x."""
    with source.session(), torch.no_grad():  # in this order: entering a session turns autograd on
        logits = source.logits(x)
        return sample_losses(logits, y), logits.argmax(1)


def wrong(source: BaseSource, x: Tensor, y: Tensor) -> Tensor:
    """bool [N]: where the prediction is not y."""
    return judged(source, x, y)[1] != y


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per-sample cosine [N] of two tensors [N, ...], in float64; NaN where one of the two is zero or not finite."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).clamp(-1, 1)


def eps_of(op: str, eps: float) -> float:
    if checks.finite(op, "eps", eps) <= 0:
        raise ValueError(f"{op}: eps must be > 0, got {eps}")
    return float(eps)


def count_of(op: str, name: str, value: int) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if value < 1:
        raise ValueError(f"{op}: {name} must be >= 1, got {value}")
    return value


def mean(values: Tensor) -> float:
    """Mean of those that are finite; NaN where there are none."""
    return values[values.isfinite()].double().mean().item()
