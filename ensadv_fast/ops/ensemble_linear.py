"""ensemble_linear: one linear layer of all members of an ensemble in one launch, and its gradient by the input."""
import itertools

import torch
from torch import Tensor

from . import checks, fast_path
from . import reference as ref
from .library import register_fake

call = torch.ops.ensadv_fast.ensemble_linear.default
call_grad = torch.ops.ensadv_fast.ensemble_linear_grad.default
call_act = torch.ops.ensadv_fast.ensemble_linear_act.default
call_act_grad = torch.ops.ensadv_fast.ensemble_linear_act_grad.default

DTYPES = (torch.float32, torch.float16, torch.bfloat16)
ACTS = (None, "relu")
# What decides whether our product or torch's is faster: device, dtype, direction, and whether rows of weights are long
# (WIDE inputs or more). A gradient reads some columns of each row, and long rows lie in different pages of memory.
CASES = tuple(itertools.product(("cpu", "cuda"), DTYPES, ("forward", "gradient"), (False, True)))
WIDE = 1500
# Up to this many products of two numbers our own kernel is faster; above it torch's is, with a pass of ours for bias
# and ReLU. Measured by bench/ensemble_linear.py. A case without an entry always runs our kernel.
OURS_UP_TO = {case: 2**21 for case in CASES if case[0] == "cpu"}
if torch.cpu._is_amx_tile_supported():  # our kernel uses the tiles for all three dtypes
    OURS_UP_TO = {("cpu", torch.bfloat16, "gradient", True): 9 * 2**25}


def ensemble_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *,
                    act: str | None = None) -> tuple[Tensor, Tensor | None]:
    """act(x @ weight[k].T + bias[k]) for every member k, and a mask of where the ReLU's result is positive.

    Args:
        x: [K, B, I], or [B, I] for all members alike; float32, float16 or bfloat16.
        weight: [K, O, I], of x's dtype and device: the members' `nn.Linear.weight`, stacked.
        bias: [K, O], of x's dtype and device, or None.
        act: ``"relu"``, or None for the products and bias alone.

    Returns:
        y, [K, B, O] of x's dtype, and mask, uint8 [K, B, ceil(O / 8)]: bit o % 8 of byte o // 8 of a row is 1 where
        y > 0, and bits beyond the last output are 0; None where `act` is None. Neither has autograd history:
        :func:`ensemble_linear_grad` takes the mask. Sums are made in float32 for every dtype, and 16-bit results are
        rounded once, at the end. Our kernel never narrows float32 to TF32, whatever torch is set to. NaN passes the
        ReLU, with its bit 0. A CPU with tiles (AMX) multiplies by tiles, float16 and float32 as sums of two and three
        bfloat16 parts: this is no less exact than products of floats, but numbers below 2^-126 count as 0. Other CPUs
        compute large products by `torch.bmm`, and bias, ReLU and mask in one pass of ours. Which is faster was measured
        (bench/ensemble_linear.py).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    if act in ACTS and fast_path.fits(x, weight, bias) and x.dim() > 1 and weight.dim() == 3 and ours_is_faster(
            x, "forward", weight, x.shape[-2]):
        y, mask = _empty_results(x, weight, act)
        if fast_path.accepted(call, x, weight, bias, y, mask):
            return y, mask
    op = "ensemble_linear"
    x, weight = _check_operands(op, "x", x, weight, "[K, B, I] or [B, I]", (2, 3))
    if x.shape[-1] != weight.shape[2] or (x.dim() == 3 and x.shape[0] != weight.shape[0]):
        raise ValueError(f"{op}: weight must have shape [K, O, I] for x [K, B, I] or [B, I], got {tuple(weight.shape)} "
                         f"for {tuple(x.shape)}")
    if bias is not None:
        bias = checks.tensor(op, "bias", bias, (x.dtype,))
        checks.same_device(op, "bias", bias, x)
        if bias.shape != weight.shape[:2]:
            raise ValueError(f"{op}: bias must have shape [K, O] = {list(weight.shape[:2])}, got {tuple(bias.shape)}")
        bias = bias.contiguous()
    if act not in ACTS:
        raise ValueError(f"{op}: act must be 'relu' or None, got {act!r}")
    return _multiply(x, weight, bias, act)


def _multiply(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> tuple[Tensor, Tensor | None]:
    """The op on checked arguments, by our kernel or by torch's, whichever is faster."""
    y, mask = _empty_results(x, weight, act)
    if ours_is_faster(x, "forward", weight, x.shape[-2]):
        call(x, weight, bias, y, mask)
        return y, mask
    x = x.expand(len(weight), -1, -1) if x.dim() == 2 else x
    # `out=` also keeps autocast away, which would narrow float32.
    if bias is not None and x.dtype != torch.float32:  # added here, so that 16-bit sums are rounded once
        torch.baddbmm(bias[:, None], x, weight.mT, out=y)
        bias = None
    else:
        torch.bmm(x, weight.mT, out=y)
    if bias is not None or mask is not None:
        call_act(bias, y, mask)
    return y, mask


def _empty_results(x: Tensor, weight: Tensor, act: str | None) -> tuple[Tensor, Tensor | None]:
    """Memory for y and, with an activation, its mask."""
    members, outputs, _ = weight.shape
    batch = x.shape[-2]
    y = x.new_empty(members, batch, outputs)
    return y, None if act is None else x.new_empty(members, batch, -(-outputs // 8), dtype=torch.uint8)


def ensemble_linear_grad(grad: Tensor, weight: Tensor, mask: Tensor | None, *, reduce: bool = False) -> Tensor:
    """(grad[k] where mask[k], else 0) @ weight[k] for every member k: the gradient by the input.

    Args:
        grad: gradient by y, [K, B, O]; float32, float16 or bfloat16.
        weight: [K, O, I], of grad's dtype and device, the same as in :func:`ensemble_linear`.
        mask: what :func:`ensemble_linear` returned beside y; None where it had no activation.
        reduce: sum over the members too, for an x [B, I] that all members share.

    Returns:
        [K, B, I], or [B, I] with `reduce`, of grad's dtype. All sums, those over members too, are made in float32 and
        rounded once. NaN in grad has no effect where the mask has 0.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    if fast_path.fits(grad, weight, mask) and grad.dim() == weight.dim() == 3 and ours_is_faster(
            grad, "gradient", weight, grad.shape[1]):
        out = _empty_gradient(grad, weight, reduce)
        if fast_path.accepted(call_grad, grad, weight, mask, out):
            return out
    op = "ensemble_linear_grad"
    grad, weight = _check_operands(op, "grad", grad, weight, "[K, B, O]", (3,))
    if grad.shape[0] != weight.shape[0] or grad.shape[2] != weight.shape[1]:
        raise ValueError(f"{op}: weight must have shape [K, O, I] = [{grad.shape[0]}, {grad.shape[2]}, I], got "
                         f"{tuple(weight.shape)}")
    if mask is not None:
        mask = checks.tensor(op, "mask", mask, (torch.uint8,))
        checks.same_device(op, "mask", mask, grad)
        if mask.shape != _mask_shape(grad):
            raise ValueError(f"{op}: mask must have shape [K, B, ceil(O / 8)] = {list(_mask_shape(grad))}, got "
                             f"{tuple(mask.shape)}")
        mask = mask.contiguous()
    return _multiply_back(grad, weight, mask, reduce)


def _multiply_back(grad: Tensor, weight: Tensor, mask: Tensor | None, reduce: bool) -> Tensor:
    """The gradient of checked arguments, by our kernel or by torch's, whichever is faster."""
    out = _empty_gradient(grad, weight, reduce)
    if ours_is_faster(grad, "gradient", weight, grad.shape[1]):
        call_grad(grad, weight, mask, out)
        return out
    if mask is not None:
        kept = torch.empty_like(grad)
        call_act_grad(grad, mask, kept)
        grad = kept
    if reduce:  # one product over outputs and members, so that 16-bit numbers are rounded once
        return torch.mm(grad.transpose(0, 1).reshape(grad.shape[1], -1), weight.view(-1, weight.shape[2]), out=out)
    return torch.bmm(grad, weight, out=out)


def _empty_gradient(grad: Tensor, weight: Tensor, reduce: bool) -> Tensor:
    """Memory for the gradient by x."""
    (members, batch, _), inner = grad.shape, weight.shape[2]
    return grad.new_empty(batch, inner) if reduce else grad.new_empty(members, batch, inner)


def _mask_shape(y: Tensor) -> tuple[int, int, int]:
    members, batch, outputs = y.shape
    return members, batch, -(-outputs // 8)


def _check_operands(op: str, name: str, x: Tensor, weight: Tensor, shape: str,
                    dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """x, of as many dimensions as one of `dims`, and weight, of three, contiguous and of one dtype and device."""
    x = checks.tensor(op, name, x, DTYPES)
    if x.dim() not in dims:
        raise ValueError(f"{op}: {name} must have shape {shape}, got {tuple(x.shape)}")
    if not (x.is_cpu or x.is_cuda or x.is_meta):
        raise ValueError(f"{op}: {name} must be on the CPU or a CUDA device, got {x.device}")
    weight = checks.tensor(op, "weight", weight, (x.dtype,))
    if weight.device != x.device:
        raise ValueError(f"{op}: weight must be on {name}'s device {x.device}, got {weight.device}")
    if weight.dim() != 3:
        raise ValueError(f"{op}: weight must have shape [K, O, I], got {tuple(weight.shape)}")
    return x.contiguous(), weight.contiguous()


def ours_is_faster(x: Tensor, direction: str, weight: Tensor, batch: int) -> bool:
    most = OURS_UP_TO.get((x.device.type, x.dtype, direction, weight.shape[2] >= WIDE))
    return most is None or weight.numel() * batch <= most


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, *,
              act: str | None = None) -> tuple[Tensor, Tensor | None]:
    """:func:`ensemble_linear` in plain PyTorch, in float64, rounded once."""
    y = x.double() @ weight.double().mT
    y = y if bias is None else y + bias.double()[:, None]
    if act is None:
        return y.to(x.dtype), None
    y = y.relu().to(x.dtype)
    return y, ref.pack_bits(y > 0)


def grad_reference(grad: Tensor, weight: Tensor, mask: Tensor | None, *, reduce: bool = False) -> Tensor:
    """:func:`ensemble_linear_grad` in plain PyTorch, in float64, rounded once."""
    wide = grad.double()
    if mask is not None:
        wide = wide.where(ref.unpack_bits(mask, grad.shape[-1]), 0.0)
    out = wide @ weight.double()
    return (out.sum(0) if reduce else out).to(grad.dtype)


register_fake("ensemble_linear")
register_fake("ensemble_linear_grad")
register_fake("ensemble_linear_act")
register_fake("ensemble_linear_act_grad")
