"""act_grad: the backward pass of bias_act."""
import torch
from torch import Tensor

from . import checks, fast_path, memory
from . import reference as ref
from .bias_act import check_mask, check_slope
from .library import register_fake

call = torch.ops.ensadv_fast.act_grad.default
_LAST = {4: torch.channels_last, 5: torch.channels_last_3d}


def act_grad(grad: Tensor, mask: Tensor, *, slope: float | None = None, channels_last: bool | None = None,
             out: Tensor | None = None) -> Tensor:
    """grad where the mask of :func:`bias_act` has a bit, and 0 elsewhere, also where grad is NaN or infinite.

    This is the gradient by x, and by the residual too. It differs from torch's own only where y is NaN: torch.relu
    passes the gradient there, and torch's hardtanh passes it or not, depending on the element's place in memory.

    Args:
        grad: gradient by y, of y's shape, float32, float16, bfloat16 or float64. **In y's memory format**, since the
            mask's bits are in the order of memory: contiguous or channels_last; any other layout is treated as
            contiguous.
        mask: uint8 [ceil(numel / 8)] on grad's device, contiguous, as bias_act returned it.
        slope: of a leaky ReLU, >= 0: the result is grad * slope, rounded once, where there is no bit. None: 0 there.
        channels_last: whether y is channels_last, where grad may be in another memory format; grad is then copied to
            y's. None: y's memory format is grad's.
        out: written and returned where given; grad's shape, dtype and device, in any memory format. It may be grad.

    Returns:
        A tensor of grad's dtype, in y's memory format, without autograd history.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    if channels_last is None and slope is None and fast_path.fits(grad, mask, out):
        result = torch.empty_like(grad) if out is None else out
        if fast_path.accepted(call, grad, mask, result):
            return result if out is None else memory.mark_written(result)
    op = "act_grad"
    grad = checks.tensor(op, "grad", grad)
    mask = check_mask(op, mask, grad, of="grad's")
    slope = None if slope is None else check_slope(op, slope)
    checks.output(op, out, grad, (grad.dtype,), of="grad's")
    grad = grad.contiguous(memory_format=_layout(op, grad, channels_last))
    to = memory.Destination(grad, out)
    call(grad, mask, to.dense, slope)
    return to.result()


def _layout(op: str, grad: Tensor, channels_last: bool | None) -> torch.memory_format:
    if channels_last is None:
        return memory.memory_format(grad) or torch.contiguous_format
    if not isinstance(channels_last, bool):
        raise TypeError(f"{op}: channels_last must be True, False or None, got {type(channels_last).__name__}")
    if channels_last and grad.dim() not in _LAST:
        raise ValueError(f"{op}: channels_last must be False or None unless grad has 4 or 5 dimensions, "
                         f"got {channels_last} and shape {tuple(grad.shape)}")
    return _LAST[grad.dim()] if channels_last else torch.contiguous_format


def reference(grad: Tensor, mask: Tensor, *, slope: float | None = None,
              channels_last: bool | None = None) -> Tensor:
    """The same in plain PyTorch."""
    grad = grad.contiguous(memory_format=_layout("act_grad", grad, channels_last))
    bits = ref.unpack_bits(mask, grad.numel())
    last = grad.dim() in _LAST and not grad.is_contiguous()
    kept = bits.view_as(grad.movedim(1, -1)).movedim(-1, 1) if last else bits.view_as(grad)
    rest = torch.zeros((), dtype=grad.dtype, device=grad.device)
    if slope is not None:
        rest = (memory.widen(grad) * slope).to(grad.dtype)
    return torch.where(kept, grad, rest)


register_fake("act_grad")
