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
# What decides whose product is faster: device, dtype, direction, and whether rows of weights are long (WIDE inputs and
# more), so that a gradient, which reads some columns of each, finds every row in another page of memory.
CASES = tuple(itertools.product(("cpu", "cuda"), DTYPES, ("forward", "gradient"), (False, True)))
WIDE = 1500
# Up to how many products of two numbers our own kernel is the faster, else torch's with a pass of ours for bias and
# ReLU; measured by bench/ensemble_linear.py. What is not here is always ours.
OURS_UP_TO = {case: 2**21 for case in CASES if case[0] == "cpu"}
if torch.cpu._is_amx_tile_supported():  # which our kernel uses for all three dtypes
    OURS_UP_TO = {("cpu", torch.bfloat16, "gradient", True): 9 * 2**25}


def ensemble_linear(x: Tensor, weight: Tensor, bias: Tensor | None, *,
                    act: str | None = None) -> tuple[Tensor, Tensor | None]:
    """act(x @ weight[k].T + bias[k]) for every member k, and where the ReLU let through.

    Args:
        x: [K, B, I], or [B, I], which all members are given; float32, float16 or bfloat16.
        weight: [K, O, I], of x's dtype and device: K `nn.Linear.weight`, stacked.
        bias: [K, O], of x's dtype and device, or None.
        act: ``"relu"``, or None for the products and bias alone.

    Returns:
        y, [K, B, O] of x's dtype, and mask, uint8 [K, B, ceil(O / 8)]: bit o % 8 of byte o // 8 of a row is 1 where
        y > 0, bits beyond the last output are 0; None where `act` is None. No autograd history:
        :func:`ensemble_linear_grad` takes the mask. Sums are float32's, also those of 16-bit numbers, which are
        rounded once, at the end; float32 is never narrowed to TF32, whatever torch is set to, where our kernel runs.
        NaN passes the ReLU, with its bit 0. On a CPU with tiles (AMX) numbers are multiplied by these, float16 and
        float32 as sums of two and three bfloat16 parts: no less exact than products of floats, but what is below
        2^-126 counts as 0 there. On other CPUs large products are `torch.bmm`'s, with bias, ReLU and mask in one pass
        of ours. Which is faster was measured (bench/ensemble_linear.py).

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    if act in ACTS and fast_path.fits(x, weight, bias) and x.dim() > 1 and weight.dim() == 3 and _ours(
            x, "forward", weight, x.shape[-2]):
        y, mask = _results(x, weight, act)
        if fast_path.accepted(call, x, weight, bias, y, mask):
            return y, mask
    op = "ensemble_linear"
    x, weight = _operands(op, "x", x, weight, "[K, B, I] or [B, I]", (2, 3))
    if not _fit(x, weight):
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
    return _linear(x, weight, bias, act)


def _fit(x: Tensor, weight: Tensor) -> bool:
    """Are these [K, B, I] or [B, I], and [K, O, I], of one dtype and device?"""
    if weight.dim() != 3 or x.dtype != weight.dtype or x.dtype not in DTYPES or x.device != weight.device:
        return False
    return x.dim() in (2, 3) and x.shape[-1] == weight.shape[2] and (x.dim() == 2 or x.shape[0] == weight.shape[0])


def _linear(x: Tensor, weight: Tensor, bias: Tensor | None, act: str | None) -> tuple[Tensor, Tensor | None]:
    y, mask = _results(x, weight, act)
    if _ours(x, "forward", weight, x.shape[-2]):
        call(x, weight, bias, y, mask)
        return y, mask
    x = x.expand(len(weight), -1, -1) if x.dim() == 2 else x
    # `out=` also keeps autocast away, which would narrow float32.
    if bias is not None and x.dtype != torch.float32:  # 16-bit sums are rounded once only with the bias in them
        torch.baddbmm(bias[:, None], x, weight.mT, out=y)
        bias = None
    else:
        torch.bmm(x, weight.mT, out=y)
    if bias is not None or mask is not None:
        call_act(bias, y, mask)
    return y, mask


def _results(x: Tensor, weight: Tensor, act: str | None) -> tuple[Tensor, Tensor | None]:
    """Memory for y and, with an activation, its mask."""
    members, outputs, _ = weight.shape
    batch = x.shape[-2]
    y = x.new_empty(members, batch, outputs)
    return y, None if act is None else x.new_empty(members, batch, -(-outputs // 8), dtype=torch.uint8)


def ensemble_linear_grad(grad: Tensor, weight: Tensor, mask: Tensor | None, *, reduce: bool = False) -> Tensor:
    """(grad[k] where mask[k], else 0) @ weight[k] for every member k: the gradient by the input.

    Args:
        grad: gradient by y, [K, B, O]; float32, float16 or bfloat16.
        weight: [K, O, I], of grad's dtype and device, as :func:`ensemble_linear` was given it.
        mask: what :func:`ensemble_linear` returned beside y; None where it had no activation.
        reduce: sum over the members too, which is the gradient by an x that all of them were given.

    Returns:
        [K, B, I], or [B, I] with `reduce`, of grad's dtype; summed in float32, the members too, and rounded once.
        Where the mask has 0, NaN in grad counts for nothing.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    if fast_path.fits(grad, weight, mask) and grad.dim() == weight.dim() == 3 and _ours(
            grad, "gradient", weight, grad.shape[1]):
        out = _result(grad, weight, reduce)
        if fast_path.accepted(call_grad, grad, weight, mask, out):
            return out
    op = "ensemble_linear_grad"
    grad, weight = _operands(op, "grad", grad, weight, "[K, B, O]", (3,))
    if not _fit_back(grad, weight):
        raise ValueError(f"{op}: weight must have shape [K, O, I] = [{grad.shape[0]}, {grad.shape[2]}, I], got "
                         f"{tuple(weight.shape)}")
    if mask is not None:
        mask = checks.tensor(op, "mask", mask, (torch.uint8,))
        checks.same_device(op, "mask", mask, grad)
        if mask.shape != _mask_shape(grad):
            raise ValueError(f"{op}: mask must have shape [K, B, ceil(O / 8)] = {list(_mask_shape(grad))}, got "
                             f"{tuple(mask.shape)}")
        mask = mask.contiguous()
    return _gradient(grad, weight, mask, reduce)


def _fit_back(grad: Tensor, weight: Tensor) -> bool:
    """Are these [K, B, O] and [K, O, I], of one dtype and device?"""
    if grad.dim() != 3 or weight.dim() != 3 or grad.dtype != weight.dtype or grad.dtype not in DTYPES:
        return False
    return grad.device == weight.device and grad.shape[0] == weight.shape[0] and grad.shape[2] == weight.shape[1]


def _gradient(grad: Tensor, weight: Tensor, mask: Tensor | None, reduce: bool) -> Tensor:
    out = _result(grad, weight, reduce)
    if _ours(grad, "gradient", weight, grad.shape[1]):
        call_grad(grad, weight, mask, out)
        return out
    if mask is not None:
        kept = torch.empty_like(grad)
        call_act_grad(grad, mask, kept)
        grad = kept
    if reduce:  # one product over outputs and members, so that 16-bit numbers are rounded once
        return torch.mm(grad.transpose(0, 1).reshape(grad.shape[1], -1), weight.view(-1, weight.shape[2]), out=out)
    return torch.bmm(grad, weight, out=out)


def _result(grad: Tensor, weight: Tensor, reduce: bool) -> Tensor:
    """Memory for the gradient by x."""
    (members, batch, _), inner = grad.shape, weight.shape[2]
    return grad.new_empty(batch, inner) if reduce else grad.new_empty(members, batch, inner)


def _mask_shape(y: Tensor) -> tuple[int, int, int]:
    members, batch, outputs = y.shape
    return members, batch, -(-outputs // 8)


def _operands(op: str, name: str, x: Tensor, weight: Tensor, shape: str,
              dims: tuple[int, ...]) -> tuple[Tensor, Tensor]:
    """Contiguous, of one dtype and device, and of so many dimensions."""
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


def _ours(x: Tensor, direction: str, weight: Tensor, batch: int) -> bool:
    most = OURS_UP_TO.get((x.device.type, x.dtype, direction, weight.shape[2] >= WIDE))
    return most is None or weight.numel() * batch <= most


def reference(x: Tensor, weight: Tensor, bias: Tensor | None, *,
              act: str | None = None) -> tuple[Tensor, Tensor | None]:
    """The same in plain PyTorch, in float64, rounded once."""
    y = x.double() @ weight.double().mT
    y = y if bias is None else y + bias.double()[:, None]
    if act is None:
        return y.to(x.dtype), None
    y = y.relu().to(x.dtype)
    return y, ref.pack_bits(y > 0)


def grad_reference(grad: Tensor, weight: Tensor, mask: Tensor | None, *, reduce: bool = False) -> Tensor:
    """The same in plain PyTorch, in float64, rounded once."""
    wide = grad.double()
    if mask is not None:
        wide = wide.where(ref.unpack_bits(mask, grad.shape[-1]), 0.0)
    out = wide @ weight.double()
    return (out.sum(0) if reduce else out).to(grad.dtype)


register_fake("ensemble_linear")
register_fake("ensemble_linear_grad")
register_fake("ensemble_linear_act")
register_fake("ensemble_linear_act_grad")
