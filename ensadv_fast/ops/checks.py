"""Argument checks, shared by the ops and by what is built on them.

Every message reads "{op}: {name} must be {wanted}, got {value}".

Types, shapes and Python numbers are always checked. Values inside tensors are checked where that needs no
synchronisation: on the CPU, or anywhere with ENSADV_CHECK=1 in the environment. Nothing is read while
torch.compile traces.
"""
import math
import os
from collections.abc import Callable, Sequence
from numbers import Real
from typing import Any, TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMAGES = (*FLOATS, torch.uint8)
NARROW = (torch.float16, torch.bfloat16)
INTEGERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8)
Given = TypeVar("Given", Tensor, Tensor | None)
CHECK_CUDA = os.environ.get("ENSADV_CHECK") == "1"


def is_readable(t: Tensor) -> bool:
    """May the values of `t` be looked at?"""
    return (t.device.type == "cpu" or CHECK_CUDA) and not torch.compiler.is_compiling()


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(op: str, name: str, t: object, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """t, detached, where it is a dense tensor of one of `dtypes`. The device is not checked here."""
    if not isinstance(t, Tensor):
        raise TypeError(f"{op}: {name} must be a torch.Tensor, got {type(t).__name__}")
    if t.layout != torch.strided:
        raise ValueError(f"{op}: {name} must be a dense tensor, got {t.layout}")
    if t.dtype not in dtypes:
        raise TypeError(f"{op}: {name} must be {names(dtypes)}, got {names([t.dtype])}")
    return t.detach() if t.requires_grad else t


def images(op: str, t: object, dtypes: Sequence[torch.dtype] = IMAGES) -> Tensor:
    t = tensor(op, "x", t, dtypes)
    if t.dim() == 0:
        raise ValueError(f"{op}: x must have shape [N, ...], got a 0-dimensional tensor")
    if not (t.is_cpu or t.is_cuda or t.is_meta):
        raise ValueError(f"{op}: x must be on the CPU or a CUDA device, got {t.device}")
    return t


def like(op: str, name: str, t: object, x: Tensor, dtypes: Sequence[torch.dtype] = FLOATS,
         of: str = "x's") -> Tensor:
    """t, detached, where it has x's shape and device. of: whose shape and device the message says they must be."""
    t = tensor(op, name, t, dtypes)
    same_device(op, name, t, x, of)
    if t.shape != x.shape:
        raise ValueError(f"{op}: {name} must have {of} shape {tuple(x.shape)}, got {tuple(t.shape)}")
    return t


def same_device(op: str, name: str, t: Tensor, x: Tensor, of: str = "x's") -> None:
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on {of} device {x.device}, got {t.device}")


def out_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """The dtypes that `out` may have: x's, also a narrower one for float32 x, and float32 for uint8 images."""
    if x.dtype == torch.float32:
        return (x.dtype, *NARROW, torch.uint8)
    return (torch.float32, x.dtype) if x.dtype == torch.uint8 else (x.dtype,)


def output(op: str, out: Tensor | None, x: Tensor, dtypes: Sequence[torch.dtype], name: str = "out",
           of: str = "x's") -> None:
    if out is None:
        return
    like(op, name, out, x, dtypes, of)
    if out.requires_grad:
        raise ValueError(f"{op}: {name} must not require grad: the op writes into it and is not differentiable")


def number(op: str, name: str, value: object) -> float:
    if type(value) is not float:  # the check by abstract base class takes ten times as long
        if isinstance(value, bool) or not isinstance(value, Real):
            raise TypeError(f"{op}: {name} must be a number, got {type(value).__name__}")
        value = float(value)
    if value != value:
        raise ValueError(f"{op}: {name} must not be NaN")
    return value


def finite(op: str, name: str, value: object) -> float:
    value = number(op, name, value)
    if math.isinf(value):
        raise ValueError(f"{op}: {name} must be finite, got {value}")
    return value


def integer(op: str, name: str, value: object, least: int | None = None) -> int:
    if isinstance(value, bool) or not isinstance(value, int):
        raise TypeError(f"{op}: {name} must be an int, got {type(value).__name__}")
    if least is not None and value < least:
        raise ValueError(f"{op}: {name} must be >= {least}, got {value}")
    return value


def flag(op: str, name: str, value: object) -> bool:
    if not isinstance(value, bool):
        raise TypeError(f"{op}: {name} must be a bool, got {type(value).__name__}")
    return value


def size(op: str, name: str, value: object) -> float:
    value = number(op, name, value)
    if value < 0:
        raise ValueError(f"{op}: {name} must be >= 0, got {value}")
    return value


def bounds(op: str, lo: object, hi: object, dtype: torch.dtype) -> tuple[float, float]:
    lo, hi = number(op, "lo", lo), number(op, "hi", hi)
    if lo > hi:
        raise ValueError(f"{op}: lo must not exceed hi, got lo={lo}, hi={hi}")
    if dtype in NARROW and lo == hi and torch.tensor(lo, dtype=dtype, device="cpu").item() != lo:
        raise ValueError(f"{op}: [lo, hi] must hold a {names([dtype])} value, got [{lo}, {hi}]")
    return lo, hi


def at_most(op: str, name: str, value: float, most: float, units: str) -> float:
    """value, where it does not exceed `most` by more than roundings. units: what `most` is."""
    if value > most * (1 + 1e-6):
        raise ValueError(f"{op}: {name} must be <= {most:g}, {units}; got {value:g}")
    return value


def per_sample(op: str, name: str, value: object, x: Tensor, *, is_size: bool, most: float = math.inf,
               units: str = "") -> tuple[Tensor | None, float]:
    """A number, or a tensor [N] or [N, 1, ...], as the pair (tensor or None, number) that the ops' schemas take.

    A tensor of no dimensions is a number; on a GPU, where reading it would wait, one for each sample.

    is_size: the value is a length or a radius, so it must not be negative. most, units: see :func:`at_most`.
    """
    if isinstance(value, Tensor) and value.dim() == 0 and is_readable(value):
        value = value.item()
    if not isinstance(value, Tensor):
        return None, at_most(op, name, size(op, name, value) if is_size else number(op, name, value), most, units)
    value = tensor(op, name, value)
    same_device(op, name, value, x)
    if value.dim() == 0:
        value = value.expand(len(x))
    elif value.dim() > 1 and value.shape == (len(x), *[1] * (value.dim() - 1)) and value.dim() == x.dim():
        value = value.flatten()
    if value.shape != x.shape[:1]:
        raise ValueError(f"{op}: {name} must be a number or have shape [N] = [{x.shape[0]}], got {tuple(value.shape)}")
    if is_readable(value):
        bad = value.isnan() | (value < 0) if is_size else value.isnan()
        if bad.any():
            i = int(bad.nonzero()[0])
            wanted = ">= 0" if is_size else "a number"
            raise ValueError(f"{op}: {name} must be {wanted}, got {value[i].item()} for sample {i}")
        if most < math.inf and len(value):
            at_most(op, name, float(value.max()), most, units)
    return value.to(torch.float64 if x.dtype == torch.float64 else torch.float32).contiguous(), 0.0


def key(op: str, t: object, device: torch.device) -> Tensor:
    t = tensor(op, "key", t, (torch.int64,))
    if t.shape != (2,):
        raise ValueError(f"{op}: key must have shape [2] = (seed, offset), got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{op}: key must be on {device}, got {t.device}: make one with fresh_key({str(device)!r})")
    return t.contiguous()


def index(op: str, t: object, n: int, device: torch.device) -> Tensor | None:
    if t is None:
        return None
    t = tensor(op, "index", t, (torch.int64,))
    if t.shape != (n,):
        raise ValueError(f"{op}: index must have shape [N] = [{n}], got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{op}: index must be on {device}, got {t.device}")
    if is_readable(t) and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < 2**32:
        raise ValueError(f"{op}: index must lie in [0, 2^32), got [{int(t.min())}, {int(t.max())}]")
    return t.contiguous()


def class_numbers(op: str, name: str, t: object, n: int, where: str = "") -> Tensor:
    """Labels of any integer dtype or bool, [n] or [n, 1] (as some data sets have them), as int64 [n].

    where: what the messages end with. The device is not checked here.
    """
    t = tensor(op, name, t, (*INTEGERS, torch.bool))
    if t.shape != (n,):
        if t.shape != (n, 1):
            raise ValueError(f"{op}: {name} must have shape [N] = [{n}], got {tuple(t.shape)}{where}")
        t = t.squeeze(1)
    return t if t.dtype == torch.int64 else t.long()


def labels(op: str, name: str, t: object, n: int, device: torch.device, classes: int | None = None, *,
           of: str = "x's", whose: str = ", the model's classes") -> Tensor:
    """:func:`class_numbers` that are on the device, and within [0, classes) where that is known and looking costs no
    synchronisation.

    of, whose: how the messages name the tensor whose device is meant, and the classes.
    """
    t = class_numbers(op, name, t, n)
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on {of} device {device}, got {t.device}")
    if classes is not None and n and is_readable(t):
        low, high = (int(v) for v in t.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"{op}: {name} must lie in [0, {classes}){whose}, got [{low}, {high}]")
    return t


def batch_parts(op: str, item: Any, pick: Callable[[Any], Any] | None = None, *, name: str = "loader", most: int = 3,
                error: type[Exception] = TypeError) -> Sequence[Any]:
    """(x, y) or (x, y, index) of what a loader gives, and with `most` 4 a fourth part.

    pick: makes that of an item of any other form; None: items have that form. name, error: of the message.
    """
    given = item if pick is None else pick(item)
    if isinstance(given, (tuple, list)) and 2 <= len(given) <= most:
        if len(given) == 2 or given[2] is None or isinstance(given[2], Tensor):
            return given
    hint = "; a function given as batch= makes (x, y) of that" if pick is None else " from batch="
    raise error(f"{op}: {name} must give batches (x, y) or (x, y, index), got {told(given)}{hint}")


def told(value: Any) -> str:
    """What came, in a few words, with what is in it."""
    if isinstance(value, Tensor):
        return f"Tensor {names([value.dtype])} {list(value.shape)}"
    if isinstance(value, dict):
        return f"dict with {', '.join(f'{k!r}: {told(v)}' for k, v in list(value.items())[:6])}"
    if isinstance(value, (tuple, list)):
        parts = [told(v) if isinstance(v, Tensor) else type(v).__name__ for v in value[:4]]
        return f"{len(value)} parts ({', '.join([*parts, '...'][:len(parts) + (len(value) > 4)])})"
    return type(value).__name__


def choice(op: str, name: str, value: str | None, known: Sequence[str | None]) -> int:
    """The position of `value` in `known`."""
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, known))}, got {value!r}")
    return known.index(value)


def ball(op: str, center: object, eps: object, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """center, and eps as :func:`per_sample` returns it. Both are given, or neither is (then None, None, 0)."""
    if (center is None) != (eps is None):
        raise ValueError(f"{op}: center and eps go together, got only {'eps' if center is None else 'center'}")
    if center is None:
        return None, None, 0.0
    eps_n, eps_1 = per_sample(op, "eps", eps, x, is_size=True)
    return like(op, "center", center, x, (x.dtype,)), eps_n, eps_1
