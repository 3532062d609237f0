"""Memory formats, dtypes and scratch memory of the ops, and where their results are written."""
from typing import overload

import torch
from torch import Tensor

from .checks import Given

_WIDE = (torch.float32, torch.float64)


def memory_format(x: Tensor) -> torch.memory_format | None:
    """The format in which the kernels can walk `x` as flat memory, or None."""
    if x.is_contiguous():
        return torch.contiguous_format
    if x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
        return torch.channels_last
    if x.dim() == 5 and x.is_contiguous(memory_format=torch.channels_last_3d):
        return torch.channels_last_3d
    return None


def chunks(inner: int) -> int:
    """How many partial sums a reduction over `inner` elements keeps: `chunks_of` of csrc/kernels/reduce.h."""
    size = -(-inner // 64)
    size = 16384 if size <= 16384 else -(-size // 2048) * 2048
    return max(1, -(-inner // size))


def scratch(x: Tensor, sums: int) -> Tensor:
    """Memory for the partial sums of `sums` per-sample reductions over x; float64."""
    n = x.size(0)
    return x.new_empty(sums * n * chunks(x.numel() // n if n else 0), dtype=torch.float64)


def fresh(x: Tensor) -> Tensor:
    """Memory for the result of a step that is given no `out`."""
    return torch.empty_like(x, dtype=torch.float32) if x.dtype == torch.uint8 else torch.empty_like(x)


def mark_written(out: Tensor) -> Tensor:
    """Tell autograd that `out` has changed, so that it notices where the old value was saved for a backward pass.

    Our kernels write past autograd's bookkeeping.
    """
    if not torch.compiler.is_compiling() and not out.is_inference():
        torch.autograd.graph.increment_version(out)
    return out


class Destination:
    """Where a kernel writes: `out` itself, or a dense stand-in that :meth:`result` copies to `out`.

    `format` is the memory format to which :meth:`input` brings every input.
    """

    __slots__ = ("dense", "format", "given", "out")

    def __init__(self, x: Tensor, out: Tensor | None) -> None:
        self.format = memory_format(x) or torch.contiguous_format
        self.given = out is not None
        self.out = self.dense = out = fresh(x) if out is None else out
        if not self._has_format(out):
            self.dense = torch.empty_like(out, memory_format=self.format)

    def _has_format(self, t: Tensor) -> bool:
        plain = self.format is torch.contiguous_format
        return t.is_contiguous() if plain else t.is_contiguous(memory_format=self.format)

    def input(self, t: Given) -> Given:
        return t if t is None or self._has_format(t) else t.contiguous(memory_format=self.format)

    def result(self) -> Tensor:
        if self.dense is not self.out:
            self.out.copy_(self.dense)
        elif self.given:
            mark_written(self.out)
        return self.out


@overload
def broadcast(value: float, x: Tensor) -> float: ...


@overload
def broadcast(value: Tensor, x: Tensor) -> Tensor: ...


def broadcast(value: float | Tensor, x: Tensor) -> float | Tensor:
    """A tensor [N], one value per sample, as [N, 1, ...], which broadcasts over x; a number as it is."""
    return value.view(-1, *[1] * (x.dim() - 1)) if isinstance(value, Tensor) else value


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype in which the ops compute on inputs of `dtype`: float64 for float64, else float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def result_dtype(x: Tensor) -> torch.dtype:
    """The dtype of an op's result where no `out` is given."""
    return torch.float32 if x.dtype == torch.uint8 else x.dtype


def widen(x: Tensor) -> Tensor:
    """x in its compute dtype, and x itself where it already has that dtype. uint8 images are level / 255."""
    if x.dtype in _WIDE:
        return x  # asking first takes a tenth of the time of a cast that does nothing
    return x.float() / 255 if x.dtype == torch.uint8 else x.float()
