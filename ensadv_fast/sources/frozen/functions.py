"""Layers of a frozen network whose backward pass keeps weights, shapes and bits: no activation.

Plain PyTorch keeps a convolution's input for a weight gradient, a ReLU's output for its sign, a pooling's input for
its shape. Who wants the input gradient alone needs none of the three. Values are PyTorch's own, and so are gradients,
but for what NaN activations let through: here they stop the gradient (law 4).
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
        """Memory that nobody reads or writes: backends take shape and format from it, and make no copy to get there."""
        return torch.empty_strided(self.shape, self.strides, dtype=self.dtype, device=self.device)


def first_only() -> None:
    """What a second differentiation needs was not kept: refuse create_graph=True instead of giving half an answer."""
    if torch.is_grad_enabled():
        raise RuntimeError("Source: a folded source keeps too little to differentiate its gradient again "
                           "(create_graph=True); make it with fold=False for that")


class Convolution(Function):
    """Keeps the weight. Arguments are those of aten::convolution, and the weight packed, or None; weight and bias get
    no gradient."""

    @staticmethod
    def forward(ctx, x, weight, bias, packed, *how):
        ctx.save_for_backward(weight)
        ctx.form, ctx.how, ctx.packed = Form(x), how, packed
        return aten.convolution(x, weight, bias, *how) if packed is None else packed.forward(x, bias)

    @staticmethod
    def backward(ctx, grad):
        first_only()
        weight, = ctx.saved_tensors
        if ctx.packed is not None and grad.is_contiguous(memory_format=torch.channels_last):
            return ctx.packed.backward(grad), *[None] * (3 + len(ctx.how))
        dx, _, _ = aten.convolution_backward(grad, ctx.form.empty(), weight, None, *ctx.how, [True, False, False])
        return dx, *[None] * (3 + len(ctx.how))


class Relu(Function):
    """relu(x + residual), of 2 to 5 dimensions: keeps one bit an element. `inplace`: in x's memory.

    how: what bias_act is told of another act than ReLU, whose gradient passes whole, or scaled by a slope, too.
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
        first_only()
        mask, = ctx.saved_tensors
        dx = ops.act_grad(grad, mask, slope=ctx.slope, channels_last=ctx.channels_last)
        return dx, dx if ctx.needs_input_grad[1] else None, None, None


class MaxPool2d(Function):
    """Keeps where each window's maximum lies, counted from the window's corner: in a byte, if its rows are short.

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
        first_only()
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
        first_only()
        return aten.avg_pool2d_backward(grad, ctx.form.empty(), *ctx.how), *[None] * len(ctx.how)


class BatchNorm(Function):
    """A normalisation by constant statistics: keeps its factor per channel. `norm` computes the output from x."""

    @staticmethod
    def forward(ctx, x, norm, running_var, weight, eps):
        factor = (running_var + eps).rsqrt()
        ctx.save_for_backward(factor if weight is None else factor * weight)
        return norm(x)

    @staticmethod
    def backward(ctx, grad):
        first_only()
        factor, = ctx.saved_tensors
        factor = factor.view(-1, *[1] * (grad.dim() - 2))
        return torch.mul(grad, factor, out=torch.empty_like(grad)), *[None] * 4  # rounded once, if grad is narrower
