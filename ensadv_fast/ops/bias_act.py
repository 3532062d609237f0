"""bias_act: bias, residual and activation after a convolution, in one pass that keeps a bit per element."""
import torch
from torch import Tensor

from . import checks, fast_path, memory
from . import reference as ref
from .library import register_fake

call = torch.ops.ensadv_fast.bias_act.default
ACTS = ("relu", "hardtanh", "leaky_relu")  # in the order of Act in csrc/kernels/bias_act.h


def bias_act(x: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, act: str | None = "relu",
             lo: float = -1.0, hi: float = 1.0, slope: float = 0.01, out: Tensor | None = None,
             mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """relu(x + bias[c] + residual), and one bit per element for the backward pass: see :func:`act_grad`.

    The epilogue of a convolution into which its batch normalisation was folded (Jacob et al. 2018, section 3.2), with
    the residual connection of He et al. 2016. The input gradient of a frozen network needs to know only where each ReLU
    was positive: 1 bit per element, where autograd keeps 16 or 32.

    Args:
        x: [N, C, ...], float32, float16, bfloat16 or float64, for example a convolution's result. Contiguous and
            channels_last need no copy.
        bias: [C] on x's device, in float32 (float64 for float64 x), which needs no copy, or in x's dtype; None: nothing
            is added.
        residual: of x's shape, dtype and device, in any memory format; None: nothing is added.
        act: "relu"; "hardtanh", the sum clipped to [lo, hi] (ReLU6: [0, 6]); "leaky_relu", slope times the sum where
            that is not positive; or None: the sum as it is, without a mask.
        lo, hi: of hardtanh, rounded to x's dtype; lo <= hi.
        slope: of leaky_relu, >= 0.
        out: written and returned where given; x's shape, dtype and device. It may be x (in place, which is the fastest)
            or residual.
        mask: written and returned where given: uint8 [ceil(numel / 8)] on x's device, contiguous. Not with act None.

    Returns:
        (y, mask). y has x's dtype and memory format (contiguous where x is neither contiguous nor channels_last). It is
        computed in float32 (float64 for float64 x), x + bias first, then + residual, and rounded once. As in torch.relu
        NaN passes and -0 stays -0. mask: uint8 [ceil(numel / 8)]; bit e % 8 of byte e / 8 is 1 where y > 0 (hardtanh:
        lo < y < hi) for the e-th element in y's order of memory, and 0 where y is NaN and beyond the last element; None
        where act is None. Neither has autograd history: callers arrange the backward pass themselves.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    numbers = _fast_act_numbers(act, lo, hi, slope)
    if numbers is not None and fast_path.fits(x, bias, residual, out, mask) and (
            bias is None or bias.dtype is memory.compute_dtype(x.dtype)):
        y = torch.empty_like(x) if out is None else out
        bits: Tensor | None = mask_for(x) if mask is None else mask
        if fast_path.accepted(call, x, bias, residual, y, bits, *numbers):
            if mask is not None:
                memory.mark_written(mask)
            return y if out is None else memory.mark_written(y), bits
    op = "bias_act"
    x = checks.images(op, x, checks.FLOATS)
    if x.dim() < 2:
        raise ValueError(f"{op}: x must have shape [N, C, ...], got {tuple(x.shape)}")
    bias = _channels(op, bias, x)
    residual = None if residual is None else checks.like(op, "residual", residual, x, (x.dtype,))
    numbers = _act_numbers(op, act, lo, hi, slope, x.dtype)
    checks.output(op, out, x, (x.dtype,))
    if mask is not None:
        if act is None:
            raise ValueError(f"{op}: mask must be None where act is None, got a tensor")
        check_mask(op, mask, x)
    layout = memory.memory_format(x) or torch.contiguous_format
    to = memory.Destination(x, torch.empty_like(x, memory_format=layout) if out is None else out)
    bits = mask_for(x) if act is not None and mask is None else mask
    x, residual = to.input(x), to.input(residual)
    call(x, bias, residual, to.dense, bits, *numbers)
    if mask is not None:
        memory.mark_written(mask)
    return to.result(), bits


def _fast_act_numbers(act: object, lo: object, hi: object, slope: object) -> tuple[object, ...] | None:
    """What :func:`_act_numbers` returns, where these need no checking; else None."""
    if act == "relu":
        return ()
    if act == "hardtanh" and fast_path.plain_bounds(lo, hi):
        return 1, lo, hi
    if act == "leaky_relu" and type(slope) is float and 0 <= slope < float("inf"):
        return 2, 0.0, 0.0, slope
    return None


def _act_numbers(op: str, act: str | None, lo: object, hi: object, slope: object,
                 dtype: torch.dtype) -> tuple[object, ...]:
    """The activation as the schema takes it after the tensors: (kind, lo, hi, slope), less what it has defaults for."""
    kind = checks.choice(op, "act", act, (*ACTS, None))
    if act == "hardtanh":
        return kind, *checks.bounds(op, lo, hi, dtype)
    if act == "leaky_relu":
        return kind, 0.0, 0.0, check_slope(op, slope)
    return ()


def check_slope(op: str, slope: object) -> float:
    return checks.size(op, "slope", checks.finite(op, "slope", slope))


def mask_for(x: Tensor) -> Tensor:
    """Memory for one bit per element of x."""
    return x.new_empty((x.numel() + 7) // 8, dtype=torch.uint8)


def check_mask(op: str, mask: object, like: Tensor, *, of: str = "x's") -> Tensor:
    """mask, where it has a bit for each element of `like`. of: whose elements the message says they are."""
    mask = checks.tensor(op, "mask", mask, (torch.uint8,))
    checks.same_device(op, "mask", mask, like, of)
    wanted = (like.numel() + 7) // 8
    if mask.shape != (wanted,) or not mask.is_contiguous():
        raise ValueError(f"{op}: mask must be contiguous, of shape [{wanted}]: a bit for each of {of} {like.numel()} "
                         f"elements, got {tuple(mask.shape)}")
    return mask


def _channels(op: str, bias: object, x: Tensor) -> Tensor | None:
    if bias is None:
        return None
    wide = memory.compute_dtype(x.dtype)
    bias = checks.tensor(op, "bias", bias, tuple(dict.fromkeys((x.dtype, torch.float32))))
    checks.same_device(op, "bias", bias, x)
    if bias.shape != x.shape[1:2]:
        raise ValueError(f"{op}: bias must have shape [C] = [{x.shape[1]}], got {tuple(bias.shape)}")
    return bias.to(wide).contiguous()


def _in_memory_order(t: Tensor) -> Tensor:
    """t's elements, flat, in the order of memory; for any layout but contiguous and channels_last in logical order."""
    layout = memory.memory_format(t)
    return (t if layout in (None, torch.contiguous_format) else t.movedim(1, -1)).reshape(-1)


def reference(x: Tensor, bias: Tensor | None, residual: Tensor | None = None, *, act: str | None = "relu",
              lo: float = -1.0, hi: float = 1.0, slope: float = 0.01) -> tuple[Tensor, Tensor | None]:
    """The same in plain PyTorch."""
    v = memory.widen(x)
    v = v if bias is None else v + bias.to(v.dtype).view(-1, *[1] * (x.dim() - 2))
    v = v if residual is None else v + residual.to(v.dtype)
    layout = memory.memory_format(x) or torch.contiguous_format
    if act == "relu":
        v = v.relu()
    elif act == "hardtanh":
        low, high = (torch.tensor(b, dtype=x.dtype, device=x.device) for b in (lo, hi))
        v = torch.where(v < low, low, torch.where(v > high, high, v))
    elif act == "leaky_relu":
        v = torch.where(v > 0, v, v * slope)
    y = v.to(x.dtype).contiguous(memory_format=layout)
    if act is None:
        return y, None
    return y, ref.pack_bits(_in_memory_order((lo < y) & (y < hi) if act == "hardtanh" else y > 0))


register_fake("bias_act")
