"""What the measurements share: batches from tensors or a loader, gradients and losses of a batch, and results."""
from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, fields
from typing import Any

import torch
from torch import Tensor, nn

from .. import ops
from ..attacks import BaseAttack
from ..ops import checks
from ..ops.losses import sample_losses
from ..ops.memory import widen
from ..sources.base import BaseSource
from ..sources.source import as_source

Model = BaseSource | nn.Module
Data = Tensor | Iterable  # images, or batches (x, y) or (x, y, index)
Rows = dict[str, Tensor]  # per-sample tensors of one length

Pick = Callable[[Any], Any] | None  # what a loader gives -> (x, y) or (x, y, index)
Batch = tuple[Tensor, Tensor, Tensor]  # images, at least float32; labels and index, int64 [N]

BATCH_SIZE = 250  # images


@dataclass(frozen=True)
class Result:
    """A measurement: numbers over all samples, and tensors with one entry per sample, on the CPU."""

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON takes them: tensors as nested lists, NaN and infinities as None."""
        return {f.name: plain(getattr(self, f.name)) for f in fields(self)}

    def __str__(self) -> str:
        """The numbers over all samples, a line each."""
        told = [f"{f.name}: {_shown(getattr(self, f.name))}" for f in fields(self)
                if not isinstance(getattr(self, f.name), Tensor)]
        return "\n".join([type(self).__name__, *(f"  {line}" for line in told)])


def _shown(value: Any) -> str:
    """A number of a result, or several, for a person."""
    if isinstance(value, dict):
        return ", ".join(f"{k} {_shown(v)}" for k, v in value.items() if not isinstance(v, Tensor)) or "per sample"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


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


def per_batch(op: str, model: Model, x: Data, y: Tensor | None, index: Tensor | None, batch_size: int,
              measure: Callable[[BaseSource, Tensor, Tensor, Tensor], Rows], batch: Pick = None) -> Rows:
    """`measure(source, x, y, index)` of each batch, its rows joined over all batches and brought to the CPU once.

    model: a plain module is used as it is (in eval mode meanwhile) and left exactly as it was. x: images [N, ...], as
    floats in [0, 1] or uint8 levels, on the model's device with labels y (integers or bools [N] or [N, 1]) and,
    optionally, index (int64 [N], 0..N-1 where absent), taken `batch_size` at a time; or any iterable of (x, y) or
    (x, y, index), which is walked through once and whose batches are moved to the model's device. batch: makes such a
    batch of what the iterable gives, where that has another form (dicts, rows, paths or metadata beside the labels).
    Raises TypeError, ValueError: naming the argument, also where there is no image.
    """
    source = as_source(model)
    if isinstance(x, Tensor):
        data = _batches_of_tensor(op, source.device, x, y, index, batch_size)
    elif isinstance(x, Iterable):
        if y is not None or index is not None:
            raise ValueError(f"{op}: y and index must be in the loader's batches, got them beside a loader")
        data = _batches_of_loader(op, source.device, x, batch)
    else:
        raise TypeError(f"{op}: x must be a tensor or an iterable of batches, got {type(x).__name__}")
    found: dict[str, list[Tensor]] = {}
    for part in data:
        for name, rows in measure(source, *part).items():
            found.setdefault(name, []).append(rows)
    if not found:
        raise ValueError(f"{op}: x must give at least one image, got none")
    return {name: torch.cat(rows).cpu() for name, rows in found.items()}


def _batches_of_tensor(op: str, device: torch.device, x: Tensor, y: Tensor | None, index: Tensor | None,
                       batch_size: int) -> Iterator[Batch]:
    x = checks.images(op, x)
    if x.device != device:
        raise ValueError(f"{op}: x must be on the model's device {device}, got {x.device}")
    y = checks.labels(op, "y", y, len(x), x.device)
    index = checks.index(op, index, len(x), x.device)
    index = torch.arange(len(x), device=x.device) if index is None else index
    checks.integer(op, "batch_size", batch_size, 1)
    for start in range(0, len(x), batch_size):
        part = slice(start, start + batch_size)
        yield widen(x[part]), y[part], index[part]


def _batches_of_loader(op: str, device: torch.device, loader: Iterable[Any], pick: Pick) -> Iterator[Batch]:
    seen = 0
    for given in loader:
        parts = checks.batch_parts(op, given, pick, name="x", error=ValueError)
        x, y, *rest = (t.to(device) if isinstance(t, Tensor) else t for t in parts)
        x = checks.images(op, x)
        n = len(x)
        y = checks.labels(op, "y", y, n, x.device)
        index = checks.index(op, rest[0] if rest else None, n, x.device)
        if n:
            yield widen(x), y, torch.arange(seen, seen + n, device=x.device) if index is None else index
        seen += n


def child_keys(op: str, key: Tensor | None, n: int) -> list[Tensor]:
    """n keys on the CPU from `key` (int64 [2]); None: from the package's next key."""
    key = ops.fresh_key("cpu") if key is None else checks.key(op, key, key.device if isinstance(key, Tensor) else None)
    return list(ops.split(key.cpu(), n).unbind())


def noise(x: Tensor, key: Tensor, eps: float, kind: str, index: Tensor) -> Tensor:
    """Noise of x's shape and size eps, of a `kind` of ops.random_step: a function of (key, index, element)."""
    return ops.random_step(torch.zeros_like(x), key.to(x.device), eps, kind=kind, index=index, clip=False)


# A model may write into its input (a normalisation in place), so each gets images of its own.


def crafted(attack: BaseAttack, source: BaseSource, x: Tensor, y: Tensor | None, key: Tensor, index: Tensor) -> Tensor:
    """What an attack makes of images x, which stay as they are."""
    return attack(source, x.clone(), y, key=key, index=index)


def gradient(source: BaseSource, x: Tensor, y: Tensor) -> Tensor:
    """The true gradient of each sample's cross-entropy by its image, at least float32."""
    return widen(source.input_grad(x.clone(), y, rescale=False).grad)


def direction(source: BaseSource, x: Tensor, y: Tensor) -> Tensor:
    """The gradient times a power of two per sample, chosen against underflow; elements that are not finite are 0."""
    return widen(source.input_grad(x.clone(), y).grad).nan_to_num(0, 0, 0)


def judge(source: BaseSource, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
    """(cross-entropy [N], at least float32; predictions int64 [N]) of images x."""
    with source.session(), torch.no_grad():  # in this order: entering a session turns autograd on
        logits = source.logits(x.clone())
        return sample_losses(logits, y), logits.argmax(1)


def is_wrong(source: BaseSource, x: Tensor, y: Tensor) -> Tensor:
    """bool [N]: true where the prediction is not y."""
    return judge(source, x, y)[1] != y


def cosine(a: Tensor, b: Tensor) -> Tensor:
    """Per-sample cosine [N] of two tensors [N, ...], in float64; NaN where one of the two is zero or not finite."""
    a, b = a.flatten(1).double(), b.flatten(1).double()
    return ((a * b).sum(1) / (a.norm(dim=1) * b.norm(dim=1))).clamp(-1, 1)


def check_eps(op: str, eps: float) -> float:
    if checks.finite(op, "eps", eps) <= 0:
        raise ValueError(f"{op}: eps must be > 0, got {eps}")
    return float(eps)


def mean(values: Tensor) -> float:
    """Mean of the finite values; NaN where there are none."""
    return values[values.isfinite()].double().mean().item()
