"""The frozen pass: while it is entered, a frozen network's layers keep bits for the backward pass, not activations.

It replaces torch's functions as the network calls them (a TorchFunctionMode) and leaves the network as it is: modules,
their hooks and their Python forwards do not change, functions that a forward calls itself are replaced as well, and
nothing needs to be traced.
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
from .relus import NOTHING_FUSED, ReluPlan


def _as_tuple(value, n: int) -> tuple[int, ...]:
    """One number for all n dimensions, or one for each."""
    values = (value,) * n if isinstance(value, int) else tuple(value)
    return values * n if len(values) == 1 else values


def _only_first_needs_grad(x, *constants) -> bool:
    """Does x, a plain tensor, need a gradient, and do the others (None: absent) need none?"""
    return (type(x) is Tensor and x.requires_grad and x.is_floating_point()
            and not any(c is not None and c.requires_grad for c in constants))


def _convolution(dims: int):
    def run(x, weight, bias=None, stride=1, padding=0, dilation=1, groups=1, packs=None):
        if not _only_first_needs_grad(x, weight, bias) or x.dim() != dims + 2:
            return NotImplemented
        dilation = _as_tuple(dilation, dims)
        if isinstance(padding, str):
            total = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, weight.shape[2:])]
            if any(t % 2 for t in total):  # one side would be padded more than the other
                return NotImplemented
            padding = [t // 2 for t in total]
        stride, padding = _as_tuple(stride, dims), _as_tuple(padding, dims)
        packed = packs.of(x, weight, bias, stride, padding, dilation, groups) if packs is not None else None
        return functions.Convolution.apply(x, weight, bias, packed, stride, padding, dilation, False, (0,) * dims,
                                           groups)
    return run


def _transposed_convolution(dims: int):
    def run(x, weight, bias=None, stride=1, padding=0, output_padding=0, groups=1, dilation=1):
        if not _only_first_needs_grad(x, weight, bias) or x.dim() != dims + 2:
            return NotImplemented
        how = (_as_tuple(v, dims) for v in (stride, padding, dilation))
        return functions.Convolution.apply(x, weight, bias, None, *how, True, _as_tuple(output_padding, dims), groups)
    return run


def _can_be_masked(x, inplace: bool) -> bool:
    """May bias_act work on x (inplace: in x's memory)?"""
    if not _only_first_needs_grad(x) or not 2 <= x.dim() <= 5 or memory.memory_format(x) is None:
        return False
    # In place, autograd must notify a view's base and refuse to change a leaf. PyTorch's own function does both.
    return not (inplace and (x._is_view() or x.is_leaf))


def _relu(x, inplace=False):
    return functions.Relu.apply(x, None, inplace, {}) if _can_be_masked(x, inplace) else NotImplemented


def _hardtanh(x, min_val=-1.0, max_val=1.0, inplace=False):
    # A bound that x's dtype cannot hold is rounded in PyTorch's forward pass, but not in its backward pass.
    if not (_can_be_masked(x, inplace) and min_val < max_val
            and _can_hold(x.dtype, min_val) and _can_hold(x.dtype, max_val)):
        return NotImplemented
    return functions.Relu.apply(x, None, inplace, {"act": "hardtanh", "lo": float(min_val), "hi": float(max_val)})


@functools.cache
def _can_hold(dtype: torch.dtype, bound: float) -> bool:
    return dtype not in checks.NARROW or torch.tensor(bound, dtype=dtype, device="cpu").item() == bound


def _leaky_relu(x, negative_slope=0.01, inplace=False):
    # With a negative slope the sign of a result does not tell the sign of the input.
    if not _can_be_masked(x, inplace) or not 0 <= negative_slope < float("inf"):
        return NotImplemented
    return functions.Relu.apply(x, None, inplace, {"act": "leaky_relu", "slope": float(negative_slope)})


def _add(x, other, inplace=False):
    """The sum, rectified already."""
    if (not _can_be_masked(x, inplace) or type(other) is not Tensor
            or (x.shape, x.dtype) != (other.shape, other.dtype)):
        return NotImplemented
    return functions.Relu.apply(x, other, inplace, {})


def _add_in_place(x, other):
    return _add(x, other, inplace=True)


def _max_pool2d(x, kernel_size, stride=None, padding=0, dilation=1, ceil_mode=False, return_indices=False):
    if not _only_first_needs_grad(x) or x.dim() != 4 or return_indices:
        return NotImplemented
    kernel = _as_tuple(kernel_size, 2)
    return functions.MaxPool2d.apply(x, kernel, _as_tuple(stride, 2) if stride else kernel, _as_tuple(padding, 2),
                                     _as_tuple(dilation, 2), ceil_mode)


def _avg_pool2d(x, kernel_size, stride=None, padding=0, ceil_mode=False, count_include_pad=True,
                divisor_override=None):
    if not _only_first_needs_grad(x):
        return NotImplemented
    kernel = _as_tuple(kernel_size, 2)
    return functions.AvgPool2d.apply(x, kernel, _as_tuple(stride, 2) if stride else kernel, _as_tuple(padding, 2),
                                     ceil_mode, count_include_pad, divisor_override)


def _batch_norm(x, running_mean, running_var, weight=None, bias=None, training=False, momentum=0.1, eps=1e-5):
    if training or not _only_first_needs_grad(x, weight, bias):
        return NotImplemented

    def norm(x):
        return F.batch_norm(x, running_mean, running_var, weight, bias, False, momentum, eps)

    return functions.BatchNorm.apply(x, norm, running_var, weight, eps)


def _relu_in_place(x):
    return _relu(x, inplace=True)


# torch's functions and what replaces them, called with the same arguments. A replacement that returns NotImplemented
# leaves the call to torch.
_REPLACEMENTS = {
    torch.conv1d: _convolution(1), torch.conv2d: _convolution(2), torch.conv3d: _convolution(3),
    torch.conv_transpose1d: _transposed_convolution(1), torch.conv_transpose2d: _transposed_convolution(2),
    torch.conv_transpose3d: _transposed_convolution(3),
    F.relu: _relu, torch.relu: _relu, Tensor.relu: _relu,
    torch.relu_: _relu_in_place, Tensor.relu_: _relu_in_place,
    F.relu6: lambda x, inplace=False: _hardtanh(x, 0.0, 6.0, inplace),
    F.hardtanh: _hardtanh, F.hardtanh_: functools.partial(_hardtanh, inplace=True),
    F.leaky_relu: _leaky_relu, F.leaky_relu_: functools.partial(_leaky_relu, inplace=True),
    F.max_pool2d: _max_pool2d, torch.max_pool2d: _max_pool2d,
    F.avg_pool2d: _avg_pool2d,
    F.batch_norm: _batch_norm,
}

_ADDS = dict.fromkeys((torch.add, Tensor.add, Tensor.__add__), _add)
_ADDS_IN_PLACE = dict.fromkeys((Tensor.add_, Tensor.__iadd__), _add_in_place)
_RELUS = {f for f, run in _REPLACEMENTS.items() if run in (_relu, _relu_in_place)}


class FrozenPass(TorchFunctionMode):
    """Within it, frozen layers keep bits, and their results are differentiable once and only by the input.

    It replaces convolutions, ReLU, hardtanh (ReLU6) and leaky ReLU, 2-d pooling, and normalisation by constant
    statistics, on plain tensors with constant weights. Everything else, and everything without gradients, is computed
    as outside of it.

    Args:
        plan: which sums are rectified as they are added, in one pass over memory
            (:func:`ensadv_fast.sources.frozen.relus.plan_relus`). The ReLU after such a sum then returns it as it is.
        packs: the weights of the network's convolutions on the CPU in oneDNN's order; None: PyTorch orders them at
            every call.
    """

    def __init__(self, plan: ReluPlan = NOTHING_FUSED, packs: Packs | None = None):
        super().__init__()
        self.packs = packs
        self.sums: dict[Any, Any] = (_ADDS if plan.fuse_sums else {}) | (_ADDS_IN_PLACE if plan.in_place else {})
        self.rectified: Tensor | None = None  # the last sum that was rectified, until the ReLU after it has run

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if torch.is_grad_enabled():
            if self.rectified is not None and func in _RELUS:
                done, self.rectified = self.rectified, None
                if done is (args[0] if args else kwargs.get("input")):
                    return done
            run = _REPLACEMENTS.get(func)
            is_sum = run is None and (run := self.sums.get(func)) is not None
            if run is not None and not (is_sum and kwargs):
                if func is torch.conv2d:
                    run = functools.partial(run, packs=self.packs)
                result = run(*args, **{"x" if k == "input" else k: v for k, v in kwargs.items()})
                if result is not NotImplemented:
                    if is_sum:
                        self.rectified = result
                    return result
        return func(*args, **kwargs)
