"""The numerical proof of a fold: on random images the folded copy gives what the model itself gives."""
import warnings
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from ..copies import detached
from ..modes import forked_generators
from .frozen_pass import FrozenPass
from .preparation import Preparation, Prepared, prepare
from .tracing import HOOKS

TOLERANCE = {torch.float64: 1e-6, torch.float32: 1e-2}  # of the largest value: float32's is for its own roundings
IMAGES = 2


class _Passed(NamedTuple):
    """What a forward pass gives, and the gradient by the images of a random combination of it (None: there is none)."""

    outputs: list[Tensor]
    grad: Tensor | None


class Unfit(Exception):
    """The model as it came cannot be computed on random images, so nothing can be compared."""


def first_right(original: nn.Module, shape: torch.Size, normalise: Callable[[Tensor], Tensor], device: torch.device,
                tries: list[Preparation]) -> int:
    """Index of the first of these preparations that gives the original's values and gradients; len(tries): of none.

    The images are `IMAGES` random ones of `shape` [N, ...], in float64; where the model cannot be run in float64, or on
    so few, N of them in float32. Every copy is gone before the next is made. A model whose own values differ from one
    run to the next cannot be judged, and keeps the first. Raises :class:`Unfit`.
    """
    for dtype, n in ((torch.float64, min(IMAGES, shape[0])), (torch.float32, shape[0])):
        g = torch.Generator("cpu").manual_seed(0)
        x = normalise(torch.rand((n, *shape[1:]), generator=g, dtype=dtype, device="cpu").to(device))
        plain = tries[0]._replace(fold=False, bits=False)

        def passed(how: Preparation, x: Tensor = x, dtype: torch.dtype = dtype) -> _Passed:
            how = how._replace(dtype=dtype, channels_last=False)
            return _pass(prepare(detached(original).to(device), how), how, x)

        try:
            wanted = passed(plain)
        except Exception:  # noqa: BLE001 - models fail in any way; the source's own pass says how
            continue
        for i, how in enumerate(tries):
            try:
                if _are_equal(passed(how), wanted, TOLERANCE[dtype]):
                    return i
            except Exception:  # noqa: BLE001, S112 - a preparation under which the model fails is a wrong one
                continue
        return len(tries) if _are_equal(passed(plain), wanted, TOLERANCE[dtype]) else 0
    raise Unfit


def _pass(prepared: Prepared, how: Preparation, x: Tensor) -> _Passed:
    for module in prepared.module.modules():  # hooks may keep what they see, and shall not see this
        for name in HOOKS:
            if name in vars(module):
                getattr(module, name).clear()
    leaf = x.clone().requires_grad_()
    with (torch.inference_mode(False), torch.enable_grad(), torch.autocast(x.device.type, enabled=False), _keeping(),
          forked_generators(x.device, torch.zeros(2, dtype=torch.int64, device="cpu")), warnings.catch_warnings()):
        warnings.simplefilter("ignore")
        if how.bits:
            with FrozenPass(prepared.relu_plan):
                out = prepared.module(leaf * 1)
        else:
            out = prepared.module(leaf * 1)
        outputs = [t for t in pytree.tree_leaves(out if not hasattr(out, "logits") else out.logits)
                   if isinstance(t, Tensor) and t.is_floating_point()]
        ends = [t for t in outputs if t.requires_grad]
        if not ends:
            return _Passed(outputs, None)
        g = torch.Generator().manual_seed(1)
        starts = [torch.rand(t.shape, generator=g, dtype=torch.float64).to(t) for t in ends]
        (grad,) = torch.autograd.grad(ends, leaf, starts, allow_unused=True)
    return _Passed([t.detach() for t in outputs], grad)


def _keeping() -> torch.autograd.graph.saved_tensors_hooks:
    """Hooks of the caller's, such as those of checkpointing, do not see what is kept here; writes into it are found."""
    def unpack(kept: tuple[Tensor, int]) -> Tensor:
        tensor, version = kept
        if tensor._version != version:
            raise RuntimeError("a tensor that the backward pass needs was changed in place")
        return tensor

    return torch.autograd.graph.saved_tensors_hooks(lambda t: (t, t._version), unpack)


def _are_equal(one: _Passed, other: _Passed, tolerance: float) -> bool:
    if len(one.outputs) != len(other.outputs) or (one.grad is None) != (other.grad is None):
        return False
    pairs = list(zip(one.outputs, other.outputs))
    if one.grad is not None and other.grad is not None:
        pairs.append((one.grad, other.grad))
    return all(_are_close(a, b, tolerance) for a, b in pairs)


def _are_close(a: Tensor, b: Tensor, tolerance: float) -> bool:
    if a.shape != b.shape:
        return False
    largest = b.abs().nan_to_num(0.0, 0.0, 0.0).amax().item() if b.numel() else 0.0
    return torch.allclose(a, b, rtol=0.0, atol=tolerance * largest, equal_nan=True)
