"""model_entry: from an image to the input of a model's first layer, in one pass."""
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from . import checks, fast_path, memory
from . import reference as ref
from .library import register_fake

call = torch.ops.ensadv_fast.model_entry.default
_DTYPES = (None, *checks.FLOATS)
_LAYOUTS = (torch.contiguous_format, torch.channels_last)


def model_entry(x: Tensor, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None, *,
                delta: Tensor | None = None, dtype: torch.dtype | None = None, channels_last: bool = True,
                clamp: bool = True, out: Tensor | None = None) -> Tensor:
    """((x + delta).clamp(0, 1) - mean) / std in the model's dtype and memory format, in one pass.

    Args:
        x: images [N, C, H, W] in [0, 1], float32, float16, bfloat16 or float64; or uint8, 0..255, read as x / 255.
            Contiguous and channels_last need no copy.
        mean, std: per-channel normalisation, C numbers or a tensor [C] on x's device; None: 0 and 1. Numbers are
            copied to the device at every call: a GPU loop passes tensors. std != 0.
        delta: perturbation of x's shape and device, any float dtype and memory format.
        dtype: of the result; default: x's, or float32 for uint8 x.
        channels_last: the result's memory format is channels_last; False: contiguous.
        clamp: cut x + delta to [0, 1]. NaN passes.
        out: written and returned where given, in its own dtype and memory format; x's shape and device. It must not
            share memory with x or delta, and no gradient may be asked for.

    Returns:
        A tensor of x's shape. It is computed in float32 (float64 for float64 x), bit for bit the plain expression,
        and rounded once. Differentiable in x (where float) and delta: the gradient is grad / std where the clamp
        did not cut, also at 0 and 1 exactly, and 0 where it did; the gradient has x's memory format.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    if fast_path.fits(x, mean, std, delta, out) and _are_in_compute_dtype(x, mean, std) and dtype in _DTYPES and (
            out is None or dtype in (None, out.dtype)) and x.dim() == 4:
        result = _empty(x, dtype or memory.result_dtype(x), _LAYOUTS[bool(channels_last)]) if out is None else out
        if fast_path.accepted(call, x, delta, mean, std, bool(clamp), result):
            return result if out is None else memory.mark_written(out)
    op = "model_entry"
    _images(op, x)
    wide = memory.compute_dtype(x.dtype)
    if delta is not None:
        checks.like(op, "delta", delta, x)
    mean, std = _channels(op, "mean", mean, 0.0, x, wide), _channels(op, "std", std, 1.0, x, wide)
    if checks.is_readable(std) and not bool(std.all()):
        raise ValueError(f"{op}: std must not be 0, got {std.tolist()}")
    wants_grad = torch.is_grad_enabled() and (x.requires_grad or (delta is not None and delta.requires_grad))
    if out is not None:
        _check_out(op, out, x, dtype, wants_grad)
        to = memory.Destination(out, out)
        _forward(x, delta, mean, std, bool(clamp), to.dense)
        return to.result()
    if dtype is None:
        dtype = memory.result_dtype(x)
    elif dtype not in checks.FLOATS:
        raise ValueError(f"{op}: dtype must be {checks.names(checks.FLOATS)} or None, got {dtype}")
    layout = _LAYOUTS[bool(channels_last)]
    if wants_grad:
        return _Entry.apply(x, delta, mean, std, bool(clamp), dtype, layout)
    return _forward(x, delta, mean, std, bool(clamp), _empty(x, dtype, layout))


def _are_in_compute_dtype(x: Tensor, mean: object, std: object) -> bool:
    """Are mean and std tensors of the dtype in which the op computes?"""
    wide = memory.compute_dtype(x.dtype)
    return isinstance(mean, Tensor) and isinstance(std, Tensor) and mean.dtype is std.dtype is wide


def _images(op: str, x: Tensor) -> None:
    checks.images(op, x)
    if x.dim() != 4:
        raise ValueError(f"{op}: x must have shape [N, C, H, W], got {tuple(x.shape)}")


def _channels(op: str, name: str, values: Sequence[float] | Tensor | None, default: float, x: Tensor,
              wide: torch.dtype) -> Tensor:
    channels = x.shape[1]
    if values is None:
        return torch.full((channels,), default, dtype=wide, device=x.device)
    if not isinstance(values, Tensor):
        values = torch.tensor([checks.number(op, name, v) for v in values], dtype=wide, device=x.device)
    values = checks.tensor(op, name, values)
    checks.same_device(op, name, values, x)
    if values.shape != (channels,):
        raise ValueError(f"{op}: {name} must have shape [C] = [{channels}], got {tuple(values.shape)}")
    return values.to(wide).contiguous()


def _check_out(op: str, out: Tensor, x: Tensor, dtype: torch.dtype | None, wants_grad: bool) -> None:
    checks.output(op, out, x, checks.FLOATS)
    if wants_grad:
        raise ValueError(f"{op}: out must be None where x or delta requires grad, got a tensor")
    if dtype not in (None, out.dtype):
        raise ValueError(f"{op}: dtype must be out's {checks.names([out.dtype])} or None, got {dtype}")


def _empty(x: Tensor, dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
    return torch.empty_like(x, dtype=dtype, memory_format=layout, requires_grad=False)


def _dense(t: checks.Given) -> checks.Given:
    """t itself where it is contiguous or channels_last, else a contiguous copy."""
    return t if t is None or memory.memory_format(t) is not None else t.contiguous()


def _forward(x: Tensor, delta: Tensor | None, mean: Tensor, std: Tensor, clamp: bool, out: Tensor) -> Tensor:
    call(_dense(x), _dense(delta), mean, std, clamp, out)
    return out


class _EntryGrad(torch.autograd.Function):
    """The backward pass. It is linear in its gradient, so it is its own backward pass too."""

    @staticmethod
    def forward(ctx: Any, grad: Tensor, x: Tensor | None, delta: Tensor | None, std: Tensor, clamp: bool,
                dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        ctx.save_for_backward(std, x, delta)
        ctx.clamp, ctx.dtype, ctx.layout = clamp, grad.dtype, layout
        out = _empty(grad, dtype, layout)
        torch.ops.ensadv_fast.model_entry_grad.default(_dense(grad), x, delta, std, clamp, out)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        std, x, delta = ctx.saved_tensors
        return _EntryGrad.apply(grad, x, delta, std, ctx.clamp, ctx.dtype, ctx.layout), *[None] * 6


class _Entry(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, delta: Tensor | None, mean: Tensor, std: Tensor, clamp: bool,
                dtype: torch.dtype, layout: torch.memory_format) -> Tensor:
        x, delta = _dense(x), _dense(delta)
        ctx.clamp, ctx.layout = clamp, memory.memory_format(x)
        ctx.dtypes = x.dtype, None if delta is None else delta.dtype
        ctx.save_for_backward(std, *((x, delta) if clamp else (None, None)))
        return _forward(x, delta, mean, std, clamp, _empty(x, dtype, layout))

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        std, x, delta = ctx.saved_tensors
        grads: list[Tensor | None] = [None, None]
        for i, dtype in enumerate(ctx.dtypes):
            if ctx.needs_input_grad[i]:
                same = i == 1 and grads[0] is not None and ctx.dtypes[0] == dtype
                grads[i] = grads[0] if same else _EntryGrad.apply(grad, x, delta, std, ctx.clamp, dtype, ctx.layout)
        return *grads, None, None, None, None, None


def reference(x: Tensor, mean: Sequence[float] | Tensor | None, std: Sequence[float] | Tensor | None, *,
              delta: Tensor | None = None, dtype: torch.dtype | None = None, channels_last: bool = True,
              clamp: bool = True) -> Tensor:
    """The same in plain PyTorch, differentiable by its autograd."""
    wide = memory.compute_dtype(x.dtype)
    mean, std = (None if v is None else torch.as_tensor(v, dtype=wide, device=x.device).view(-1, 1, 1)
                 for v in (mean, std))
    v = x.to(wide) / 255 if x.dtype == torch.uint8 else x.to(wide)
    v = v if delta is None else v + delta.to(wide)
    v = ref.clamp_open(v, 0, 1) if clamp else v
    v = v if mean is None else v - mean
    v = v if std is None else v / std
    return v.to(dtype or memory.result_dtype(x)).contiguous(memory_format=_LAYOUTS[bool(channels_last)])


register_fake("model_entry")
register_fake("model_entry_grad")
