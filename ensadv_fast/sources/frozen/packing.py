"""Convolutions with constant weights on the CPU, whose weights are kept in the order in which oneDNN computes.

PyTorch brings a convolution's weights to oneDNN's order at every call, and once more for the backward pass. The weights
of a frozen network can stay in these orders, which takes two more copies of them in the network's dtype. The ops that
take such weights are PyTorch's own, private ones. Convolutions that these ops refuse, or that PyTorch would not give to
oneDNN, are computed as before. Values are the same to the bit.
"""
import functools
from typing import Any

import torch
from torch import Tensor, nn

_DTYPES = (torch.float32, torch.bfloat16)
_C: Any = torch._C  # its private functions are not, or not fully, in torch's stubs


class Packed:
    """A convolution's weight [O, I, kH, kW] in oneDNN's order, for inputs of `shape` and for the gradient by them.

    Weight, inputs and gradients are channels_last. stride, padding and dilation are pairs.
    """

    __slots__ = ("backward_how", "backward_weight", "forward_how", "weight")

    def __init__(self, shape: torch.Size, weight: Tensor, stride: tuple[int, ...], padding: tuple[int, ...],
                 dilation: tuple[int, ...]) -> None:
        reach = [d * (k - 1) + 1 for d, k in zip(dilation, weight.shape[2:])]
        room = [n + 2 * p - r for n, p, r in zip(shape[2:], padding, reach)]
        rest, out = ([f(r, s) for r, s in zip(room, stride)] for f in (int.__mod__, lambda r, s: r // s + 1))
        weight = weight.detach()
        self.weight: Tensor = _C._nn.mkldnn_reorder_conv2d_weight(weight.to_mkldnn(), padding, stride, dilation, 1,
                                                                  list(shape))
        self.backward_weight = torch.ops.mkldnn._reorder_convolution_transpose_weight(
            weight, padding, rest, stride, dilation, 1, [shape[0], weight.shape[0], *out])
        self.forward_how: tuple[object, ...] = padding, stride, dilation, 1, "none", [], ""
        self.backward_how: tuple[object, ...] = padding, rest, stride, dilation, 1, "none", [], ""

    def forward(self, x: Tensor, bias: Tensor | None) -> Tensor:
        return torch.ops.mkldnn._convolution_pointwise(x, self.weight, bias, *self.forward_how)

    def backward(self, grad: Tensor) -> Tensor:
        return torch.ops.mkldnn._convolution_transpose_pointwise(grad, self.backward_weight, None, *self.backward_how)


class Packs:
    """The packed weights of one frozen network, each made when its convolution is called, and anew for another size."""

    def __init__(self) -> None:
        self._made: dict[int, tuple[Any, ...]] = {}

    def __reduce__(self) -> tuple[type, tuple[()]]:
        return Packs, ()  # copies make their own

    def of(self, x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...],
           dilation: tuple[int, ...], groups: int) -> Packed | None:
        """The packed weight for x [N, C, H, W]; None where PyTorch must compute this convolution."""
        if (not x.is_cpu or type(weight) is not nn.Parameter or x.dtype not in _DTYPES or weight.dtype != x.dtype
                or x.dim() != 4 or groups != 1 or not x.is_contiguous(memory_format=torch.channels_last)):
            return None
        made, state = self._made.get(id(weight)), (weight._version, x.shape, stride, padding, dilation)
        if made is None or made[0] is not weight or made[1] != state:
            made = self._made[id(weight)] = weight, state, _pack(x, weight, bias, stride, padding, dilation)
        return made[2]


def _pack(x: Tensor, weight: Tensor, bias: Tensor | None, stride: tuple[int, ...], padding: tuple[int, ...],
          dilation: tuple[int, ...]) -> Packed | None:
    # oneDNN has another kernel for the few channels of an image, and the gradient by them takes little time.
    if x.shape[1] < 4 or not works(x.dtype):
        return None
    chosen = _C._select_conv_backend(x, weight, bias, stride, padding, dilation, False, (0, 0), 1, None)
    return Packed(x.shape, weight, stride, padding, dilation) if chosen == _C._ConvBackend.Mkldnn else None


@functools.cache
def works(dtype: torch.dtype) -> bool:
    """Does this PyTorch have these ops, and do they compute convolutions rightly in `dtype` on this processor?"""
    g = torch.Generator().manual_seed(0)
    drawn = (torch.randn(shape, generator=g, device="cpu") for shape in ((2, 16, 9, 9), (2, 32, 5, 5), (32, 16, 3, 3)))
    x, grad, weight = (t.to(dtype).contiguous(memory_format=torch.channels_last) for t in drawn)
    two, one = (2, 2), (1, 1)
    try:
        packed = Packed(x.shape, weight, two, one, one)
        got = packed.forward(x, None), packed.backward(grad)
        _C._select_conv_backend(x, weight, None, two, one, one, False, (0, 0), 1, None)
    except (AttributeError, NotImplementedError, RuntimeError, TypeError):
        return False
    wanted = (torch.conv2d(x, weight, None, two, one),
              torch.ops.aten.convolution_backward(grad, x, weight, None, two, one, one, False, (0, 0), 1,
                                                  [True, False, False])[0])
    return all(a.shape == b.shape and a.stride() == b.stride() and torch.allclose(a, b, rtol=0.05, atol=0.1)
               for a, b in zip(got, wanted))
