"""Layers of a frozen network that keep weights, shapes and bits for the backward pass, and no activation.

Plain PyTorch keeps a convolution's input for a weight gradient, a ReLU's output for its sign, and a pooling's input for
its shape. An input gradient alone needs none of the three. Values are PyTorch's own, and so are gradients, except where
activations are NaN: a ReLU here stops the gradient there, and PyTorch's may pass it.
"""
import torch
from torch import Tensor
from torch.autograd import Function

from ... import ops

aten = torch.ops.aten


class Form:
    """Shape, strides, dtype and device of a tensor that is not kept."""

    __slots__ = ("device", "dtype", "shape", "strides")

    def __init__(self, x: Tensor):
        self.shape, self.strides, self.dtype, self.device = x.shape, x.stride(), x.dtype, x.device

    def empty(self) -> Tensor:
        """A tensor of this form, of which PyTorch's backward functions read only shape and strides, no values."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def refuse_create_graph() -> None:
    """RuntimeError where a backward pass is to be differentiated again: what that needs was not kept."""
    if torch.is_grad_enabled():
        raise RuntimeError("Source: a folded source keeps too little to differentiate its gradient again "
                           "(create_graph=True); make it with fold=False for that")


class Convolution(Function):
    """Keeps the weight. The arguments are those of aten::convolution, with the packed weight, or None, after the bias.
    Weight and bias get no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, packed, *how):
        ctx.save_for_backward(weight)
        ctx.form, ctx.how, ctx.packed = Form(x), how, packed
        return aten.convolution(x, weight, bias, *how) if packed is None else packed.forward(x, bias)

    @staticmethod
    def backward(ctx, grad):
        refuse_create_graph()
        weight, = ctx.saved_tensors
        if ctx.packed is not None and grad.is_contiguous(memory_format=torch.channels_last):
            return ctx.packed.backward(grad), *[None] * (3 + len(ctx.how))
        dx, _, _ = aten.convolution_backward(grad, ctx.form.empty(), weight, None, *ctx.how, [True, False, False])
        return dx, *[None] * (3 + len(ctx.how))


class Relu(Function):
    """relu(x + residual), of 2 to 5 dimensions: keeps one bit per element. inplace: the result is in x's memory.

    how: keyword arguments of :func:`ensadv_fast.ops.bias_act` for another activation than ReLU.
    """

    @staticmethod
    def forward(ctx, x, residual, inplace, how):
        y, mask = ops.bias_act(x.detach(), None, residual, out=x.detach() if inplace else None, **how)
        if inplace:
            ctx.mark_dirty(x)
            y = x
        ctx.save_for_backward(mask)
        ctx.channels_last, ctx.slope = not y.is_contiguous(), how.get("slope")
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_create_graph()
        mask, = ctx.saved_tensors
        dx = ops.act_grad(grad, mask, slope=ctx.slope, channels_last=ctx.channels_last)
        return dx, dx if ctx.needs_input_grad[1] else None, None, None


class MaxPool2d(Function):
    """Keeps where each window's maximum lies, counted from the window's first element; in one byte where that suffices.

    Arguments are those of aten::max_pool2d_with_indices, all in pairs.
    """

    @staticmethod
    def forward(ctx, x, kernel, stride, padding, dilation, ceil_mode):
        y, indices = aten.max_pool2d_with_indices(x, kernel, stride, padding, dilation, ceil_mode)
        farthest = (kernel[0] - 1) * dilation[0] * x.shape[-1] + (kernel[1] - 1) * dilation[1]
        dtype = torch.uint8 if farthest < 256 else torch.int16 if farthest < 2**15 else torch.int64
        ctx.form, ctx.how = Form(x), (kernel, stride, padding, dilation, ceil_mode)
        offsets = torch.empty_like(indices, dtype=dtype)
        ctx.save_for_backward(torch.sub(indices, _corners(indices, ctx.form, ctx.how), out=offsets))
        return y

    @staticmethod
    def backward(ctx, grad):
        refuse_create_graph()
        offsets, = ctx.saved_tensors
        indices = offsets + _corners(offsets, ctx.form, ctx.how)
        return aten.max_pool2d_with_indices_backward(grad, ctx.form.empty(), *ctx.how, indices), *[None] * 5


def _corners(indices: Tensor, form: Form, how) -> Tensor:
    """Index [H', W'] of the first element of each window in a plane of the input, negative in the padding."""
    _, stride, padding, _, _ = how
    rows, columns = (torch.arange(n, device=indices.device) * s - p
                     for n, s, p in zip(indices.shape[-2:], stride, padding))
    return rows[:, None] * form.shape[-1] + columns


class AvgPool2d(Function):
    """Keeps nothing. Arguments are those of aten::avg_pool2d."""

    @staticmethod
    def forward(ctx, x, *how):
        ctx.form, ctx.how = Form(x), how
        return aten.avg_pool2d(x, *how)

    @staticmethod
    def backward(ctx, grad):
        refuse_create_graph()
        return aten.avg_pool2d_backward(grad, ctx.form.empty(), *ctx.how), *[None] * len(ctx.how)


class BatchNorm(Function):
    """A normalisation by constant statistics: keeps its factor per channel. norm: computes the output from x."""

    @staticmethod
    def forward(ctx, x, norm, running_var, weight, eps):
        factor = (running_var + eps).rsqrt()
        ctx.save_for_backward(factor if weight is None else factor * weight)
        return norm(x)

    @staticmethod
    def backward(ctx, grad):
        refuse_create_graph()
        factor, = ctx.saved_tensors
        factor = factor.view(-1, *[1] * (grad.dim() - 2))
        return torch.mul(grad, factor, out=torch.empty_like(grad)), *[None] * 4  # rounded once, if grad is narrower
