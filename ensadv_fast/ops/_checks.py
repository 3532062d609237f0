"""Argument checks and memory formats, shared by the ops. Errors name the op, the argument, what came, what is wanted.

Types, shapes and Python numbers are always checked. Values inside tensors are checked where that needs no
synchronisation: on the CPU, or anywhere with ENSADV_CHECK=1 in the environment. Nothing is read while
torch.compile traces.
"""
import math
import os
from collections.abc import Callable, Sequence
from numbers import Real
from typing import TypeVar

import torch
from torch import Tensor

FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
IMAGES = (*FLOATS, torch.uint8)
NARROW = (torch.float16, torch.bfloat16)
_Given = TypeVar("_Given", Tensor, Tensor | None)
_CHECK_CUDA = os.environ.get("ENSADV_CHECK") == "1"


def readable(t: Tensor) -> bool:
    """May the values of `t` be looked at?"""
    return (t.device.type == "cpu" or _CHECK_CUDA) and not torch.compiler.is_compiling()


def names(dtypes: Sequence[torch.dtype]) -> str:
    return ", ".join(str(d).removeprefix("torch.") for d in dtypes)


def tensor(op: str, name: str, t: object, dtypes: Sequence[torch.dtype] = FLOATS) -> Tensor:
    """t, detached; :func:`like` and its kin check the device."""
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
    t = tensor(op, name, t, dtypes)
    same_device(op, name, t, x, of)
    if t.shape != x.shape:
        raise ValueError(f"{op}: {name} must have {of} shape {tuple(x.shape)}, got {tuple(t.shape)}")
    return t


def same_device(op: str, name: str, t: Tensor, x: Tensor, of: str = "x's") -> None:
    if t.device != x.device:
        raise ValueError(f"{op}: {name} must be on {of} device {x.device}, got {t.device}")


def out_dtypes(x: Tensor) -> tuple[torch.dtype, ...]:
    """What `out` may be: x's dtype, a narrower one for a float32 iterate, float32 for uint8 images."""
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


def bounds(op: str, lo: object, hi: object, dtype: torch.dtype) -> tuple[float, float]:
    lo, hi = number(op, "lo", lo), number(op, "hi", hi)
    if lo > hi:
        raise ValueError(f"{op}: lo must not exceed hi, got lo={lo}, hi={hi}")
    if dtype in NARROW and lo == hi and torch.tensor(lo, dtype=dtype).item() != lo:
        raise ValueError(f"{op}: [lo, hi] = [{lo}, {hi}] holds no {names([dtype])} value")
    return lo, hi


def per_sample(op: str, name: str, value: object, x: Tensor, *, size: bool) -> tuple[Tensor | None, float]:
    """A number, or a tensor with one per sample, as the pair (tensor or None, number) that schemas take.

    `size`: it measures something, so it must not be negative.
    """
    if not isinstance(value, Tensor):
        value = number(op, name, value)
        if size and value < 0:
            raise ValueError(f"{op}: {name} must be >= 0, got {value}")
        return None, value
    value = tensor(op, name, value)
    same_device(op, name, value, x)
    if value.shape != x.shape[:1]:
        raise ValueError(f"{op}: {name} must be a number or have shape [N] = [{x.shape[0]}], got {tuple(value.shape)}")
    if readable(value):
        bad = value.isnan() | (value < 0) if size else value.isnan()
        if bad.any():
            i = int(bad.nonzero()[0])
            wanted = ">= 0" if size else "a number"
            raise ValueError(f"{op}: {name} must be {wanted}, got {value[i].item()} for sample {i}")
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
    if readable(t) and t.numel() and not 0 <= int(t.min()) <= int(t.max()) < 2**32:
        raise ValueError(f"{op}: index must lie in [0, 2^32), got [{int(t.min())}, {int(t.max())}]")
    return t.contiguous()


def labels(op: str, name: str, t: object, n: int, device: torch.device, classes: int | None = None, *,
           shape: str = "[N]", of: str = "x's", whose: str = ", the model's classes") -> Tensor:
    """int64 [n] on the device, and within [0, classes) where that is known and looking costs no synchronisation.

    shape, of, whose: the words of the caller's documentation for the batch, the owner of the device and the classes.
    """
    t = tensor(op, name, t, (torch.int64,))
    if t.shape != (n,):
        raise ValueError(f"{op}: {name} must have shape {shape} = [{n}], got {tuple(t.shape)}")
    if t.device != device:
        raise ValueError(f"{op}: {name} must be on {of} device {device}, got {t.device}")
    if classes is not None and n and readable(t):
        low, high = (int(v) for v in t.aminmax())
        if low < 0 or high >= classes:
            raise ValueError(f"{op}: {name} must lie in [0, {classes}){whose}, got [{low}, {high}]")
    return t


def choice(op: str, name: str, value: str | None, known: Sequence[str | None]) -> int:
    if value not in known:
        raise ValueError(f"{op}: {name} must be one of {', '.join(map(str, known))}, got {value!r}")
    return known.index(value)


def memory_format(x: Tensor) -> torch.memory_format | None:
    """The format in which the kernels can walk `x` as flat memory, or None."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def ball(op: str, center: object, eps: object, x: Tensor) -> tuple[Tensor | None, Tensor | None, float]:
    """center, and eps as :func:`per_sample` gives it; both or neither."""
    if (center is None) != (eps is None):
        raise ValueError(f"{op}: center and eps go together, got only {'eps' if center is None else 'center'}")
    if center is None:
        return None, None, 0.0
    eps_n, eps_1 = per_sample(op, "eps", eps, x, size=True)
    return like(op, "center", center, x, (x.dtype,)), eps_n, eps_1


def chunks(inner: int) -> int:
    """How many partial sums a per-sample reduction keeps: `chunks_of` of csrc/kernels/reduce.h."""
    size = -(-inner // 64)
    size = 16384 if size <= 16384 else -(-size // 2048) * 2048
    return max(1, -(-inner // size))


def scratch(x: Tensor, sums: int) -> Tensor:
    """float64 room for `sums` per-sample sums over x."""
    n = x.size(0)
    return x.new_empty(sums * n * chunks(x.numel() // n if n else 0), dtype=torch.float64)


def direct(x: object, *others: object) -> bool:
    """May the op be tried on these (None: absent) as they are, before anything is checked or brought to a format?

    Most calls may, and the checks take longer than a small op. What it refuses it refuses before it writes, and
    :func:`tried` then says so: the checks know how to put it.
    """
    if torch.compiler.is_compiling() or type(x) is not Tensor or not x.dim():
        return False
    cpu = x.is_cpu
    if not cpu and _CHECK_CUDA:
        return False
    for t in (x, *others):
        if t is not None and (type(t) is not Tensor or t.layout is not torch.strided or not t.is_contiguous()
                              or t.requires_grad or not (t.is_cpu if cpu else t.is_cuda)):
            return False
    return True


def as_given(value: object) -> tuple[Tensor | None, float] | None:
    """What :func:`per_sample` makes of a number or tensor that the op may be tried on; else None."""
    if type(value) is float:
        return None, value
    return (value, 0.0) if type(value) is Tensor else None


def direct_bounds(lo: object, hi: object) -> bool:
    """Are these bounds that :func:`bounds` leaves as they are?"""
    return type(lo) is type(hi) is float and lo < hi


def direct_step(x: object, step: object, center: object, eps: object, lo: object, hi: object,
                *others: object) -> tuple[Tensor | None, Tensor | None, float, float] | None:
    """step and eps as schemas take them, both tensors first, where a step may be tried on all of this; else None."""
    s, e = as_given(step), as_given(0.0 if eps is None else eps)
    if (s and e and (center is None) == (eps is None) and direct_bounds(lo, hi)
            and direct(x, center, s[0], e[0], *others)):
        return s[0], e[0], s[1], e[1]
    return None


def tried(op: Callable[..., object], *args: object) -> bool:
    """Call the op; False if it refuses its arguments."""
    try:
        op(*args)
    except RuntimeError:
        return False
    return True


def fresh(x: Tensor) -> Tensor:
    """Where the result of a step goes that is given no `out`."""
    return torch.empty_like(x, dtype=torch.float32) if x.dtype == torch.uint8 else torch.empty_like(x)


def written(out: Tensor) -> Tensor:
    """Let autograd notice if somebody saved the old value of `out`: our kernels bypass its bookkeeping."""
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


class Destination:
    """Where a kernel writes: `out` itself, or a dense stand-in that is copied to it afterwards.

    `format` is the memory format that every input must be brought to.
    """

    __slots__ = ("dense", "format", "given", "out")

    def __init__(self, x: Tensor, out: Tensor | None) -> None:
        self.format = memory_format(x) or torch.contiguous_format
        self.given = out is not None
        self.out = self.dense = out = fresh(x) if out is None else out
        if not self._flat(out):
            self.dense = torch.empty_like(out, memory_format=self.format)

    def _flat(self, t: Tensor) -> bool:
        plain = self.format is torch.contiguous_format
        return t.is_contiguous() if plain else t.is_contiguous(memory_format=self.format)

    def input(self, t: _Given) -> _Given:
        return t if t is None or self._flat(t) else t.contiguous(memory_format=self.format)

    def result(self) -> Tensor:
        if self.dense is not self.out:
            self.out.copy_(self.dense)
        elif self.given:
            written(self.out)
        return self.out
