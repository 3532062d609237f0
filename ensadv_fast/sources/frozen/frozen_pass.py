"""The frozen pass: while it is entered, a frozen network's layers keep bits for the backward pass, not activations.

It stands between the network and torch's functions (a TorchFunctionMode), not in the network: modules, their hooks
and their Python forwards are as they were, functions that a forward calls itself are seen as well, and nothing needs
to be traced.
"""
import functools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from ...ops import checks, memory
from . import functions
from .packing import Packs
from .relus import NONE, Joins


def _tuple(value, n: int) -> tuple[int, ...]:
    values = (value,) * n if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _frozen(x, *constants) -> bool:
    """Is x a plain tensor on its way to a gradient, and are the others (None: absent) constants?"""
    return (type(x) is Tensor and x.requires_grad and x.is_floating_point()
            and not any(c is not None and c.requires_grad for c in constants))


def _convolution(dims: int):
    def run(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, packs=None):
        if not _frozen(x, weight, bias) or x.dim() != dims + 2:
            return NotImplemented
        dilation = _tuple(dilation, dims)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:])]
            if any(t % 2 for t in total):  # more on one side than on the other
                return NotImplemented
            padding = [t // 2 for t in total]
        stride, padding = _tuple(stride, dims), _tuple(padding, dims)
        packed = packs.of(x, weight, bias, stride, padding, dilation, groups) if packs is not None else None
        return functions.Convolution.apply(x, weight, bias, packed, stride, padding, dilation, False, (0,) * dims,
                                           groups)
    return run


def _transposed_convolution(dims: int):
    def run(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        if not _frozen(x, weight, bias) or x.dim() != dims + 2:
            return NotImplemented
        how = (_tuple(v, dims) for v in (stride, padding, dilation))
        return functions.Convolution.apply(x, weight, bias, None, *how,
                                           True, _tuple(output_padding, dims), groups)
    return run


def _maskable(x, inplace: bool) -> bool:
    """May bias_act work on x, or in its memory?"""
    if not _frozen(x) or not 2 <= x.dim() <= 5 or memory.memory_format(x) is None:
        return False
    # A view's base must hear of the change, a leaf must not be changed: autograd's own function sees to both.
    return not (inplace and (x._is_view() or x.is_leaf))


def _relu(x, inplace=False):
    return functions.Relu.apply(x, None, inplace, {}) if _maskable(x, inplace) else NotImplemented


def _hardtanh(x, min_val=-1.0, max_val=1.0, inplace=False):
    # What x's dtype cannot hold PyTorch rounds in the forward pass and does not in the backward pass.
    if not _maskable(x, inplace) or not (_holds(x.dtype, min_val) and _holds(x.dtype, max_val) and min_val < max_val):
        return NotImplemented
    return functions.Relu.apply(x, None, inplace, {"act": "hardtanh", "lo": float(min_val), "hi": float(max_val)})


@functools.cache
def _holds(dtype: torch.dtype, bound: float) -> bool:
    return dtype not in checks.NARROW or torch.tensor(bound, dtype=dtype).item() == bound


def _leaky_relu(x, negative_slope=0.01, inplace=False):
    # Of a result by a negative slope its sign does not tell which side it is from.
    if not _maskable(x, inplace) or not 0 <= negative_slope < float("inf"):
        return NotImplemented
    return functions.Relu.apply(x, None, inplace, {"act": "leaky_relu", "slope": float(negative_slope)})


def _add(x, other, inplace=False):
    """The sum and its ReLU at once."""
    if (not _maskable(x, inplace) or type(other) is not Tensor
            or (x.shape, x.dtype) != (other.shape, other.dtype)):
        return NotImplemented
    return functions.Relu.apply(x, other, inplace, {})


def _add_in_place(x, other):
    return _add(x, other, inplace=True)


def _max_pool2d(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if not _frozen(x) or x.dim() != 4 or return_indices:
        return NotImplemented
    kernel = _tuple(kernel_size, 2)
    return functions.MaxPool2d.apply(x, kernel, _tuple(stride, 2) if stride else kernel, _tuple(padding, 2),
                                     _tuple(dilation, 2), ceil_mode)


def _avg_pool2d(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
                divisor_override=None):
    if not _frozen(x):
        return NotImplemented
    kernel = _tuple(kernel_size, 2)
    return functions.AvgPool2d.apply(x, kernel, _tuple(stride, 2) if stride else kernel, _tuple(padding, 2),
                                     ceil_mode, count_include_pad, divisor_override)


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training or not _frozen(x, weight, bias):
        return NotImplemented

    def norm(x):
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)

    return functions.BatchNorm.apply(x, norm, running_var, weight, eps)


def _in_place(x):
    return _relu(x, inplace=True)


# Called with a function's arguments; NotImplemented: this call is not one that keeps less.
_TABLE = {
    torch.conv1d: _convolution(1), torch.conv2d: _convolution(2), torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1), torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
    F.relu: _relu, torch.relu: _relu, Tensor.relu: _relu, torch.relu_: _in_place, Tensor.relu_: _in_place,
    F.relu6: lambda x, inplace=False: _hardtanh(x, 0.0, 6.0, inplace),
    F.hardtanh: _hardtanh, F.hardtanh_: functools.partial(_hardtanh, inplace=True),
    F.leaky_relu: _leaky_relu, F.leaky_relu_: functools.partial(_leaky_relu, inplace=True),
    F.max_pool2d: _max_pool2d, torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.batch_norm: _batch_norm,
}


_ADDS = dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), _add)
_ADDS_IN_PLACE = dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_in_place)
_RELUS = {f for f, run in _TABLE.items() if run in (_relu, _in_place)}


class FrozenPass(TorchFunctionMode):
    """Within it, what frozen layers compute is differentiable once, by the input alone, and keeps bits.

    It knows convolutions, ReLU and its clipped and leaky kin, 2-d pooling and normalisation by constant statistics, on
    plain tensors with constant weights. All else, and all without gradients, is what it would be outside.

    Args:
        joins: which sums go to a ReLU alone (:func:`ensadv_fast.sources.frozen.relus.join`): they are rectified as they
            are added, in one pass over memory, and the ReLU then has nothing to do.
        packs: where the network's convolutions on the CPU find their weights in oneDNN's order; None: PyTorch's.
    """

    def __init__(self, joins: Joins = NONE, packs: Packs | None = None):
        super().__init__()
        self.packs = packs
        self.adds: dict[Any, Any] = (_ADDS if joins.fresh else {}) | (_ADDS_IN_PLACE if joins.over else {})
        self.rectified: Tensor | None = None

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if self.rectified is not None and func in _RELUS:
                done, self.rectified = self.rectified, None
                if done is (args[0] if args else kwargs.get("input")):
                    return done
            run = _TABLE.get(func)
            adds = run is None and (run := self.adds.get(func)) is not None
            if run is not None and not (adds and kwargs):
                if func is torch.conv2d:
                    run = functools.partial(run, packs=self.packs)
                result = run(*args, **{"x" if k == "input" else k: v for k, v in kwargs.items()})
                if result is not NotImplemented:
                    if adds:
                        self.rectified = result
                    return result
        return func(*args, **kwargs)
