"""Who is timed against whom: sizes, arguments, the contenders of a case, and the check that they compute the same.

Shared by the quick form (`ensadv-fast bench`) and the long one (bench/test_ops.py).
"""
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

from .. import ops
from ..ops.cases import FLOATS, Inputs, OpCase
from .eager import EAGER

# Image batches; `tiny` shows what a call costs whatever it computes, `roofline` exceeds 1 GiB in float32.
SIZES = {"tiny": (1, 1, 4, 4), "mnist": (64, 1, 28, 28), "cifar": (128, 3, 32, 32), "imagenet": (64, 3, 224, 224)}
GPU_SIZES = {**SIZES, "imagenet": (256, 3, 224, 224), "roofline": (2048, 3, 224, 224)}
# [B, C] of the same jobs; ensembles have MEMBERS of them.
LOGITS = {"tiny": (1, 16), "mnist": (64, 10), "cifar": (128, 10), "imagenet": (256, 1000), "roofline": (300_000, 1000)}
MEMBERS = 4
# [B, I] of an ensemble's linear layer, with as many outputs.
LINEAR = {"tiny": (1, 16), "mnist": (64, 784), "cifar": (128, 300), "imagenet": (256, 1000),
          "roofline": (300_000, 1000)}
# Batches of ops that draw one number or key per sample; nobody draws a GiB of them.
SAMPLES = {"tiny": (16,), "mnist": (64,), "cifar": (128,), "imagenet": (256,)}
PER_SAMPLE_OPS = ("sample_eps", "split_key")
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16, "uint8": torch.uint8}
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}

Call = Callable[[], object]


@dataclass(frozen=True)
class Setting:
    """One row of a benchmark: what every contender of it is given."""

    case: OpCase
    size: str
    dtype: str
    format: str
    device: str = "cpu"

    @property
    def name(self) -> str:
        """CASE-SIZE-DTYPE-FORMAT."""
        return f"{self.case.name}-{self.size}-{self.dtype}-{self.format}"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the case's first argument."""
        if self.case.op == "logit_grad":
            n, classes = LOGITS[self.size]
            return (n // MEMBERS if "fused" in self.case.mode and self.size == "roofline" else n, classes)
        if self.case.op == "ensemble_linear":
            return LINEAR[self.size]
        if self.case.op in PER_SAMPLE_OPS:
            return SAMPLES[self.size]
        return (GPU_SIZES if self.device == "cuda" else SIZES)[self.size]

    def exists(self) -> bool:
        """Does this combination mean something? Not bytes where users have none, nor a format without channels."""
        case, dtype = self.case, DTYPES[self.dtype]
        if self.size == "roofline" and (self.device != "cuda" or case.op in PER_SAMPLE_OPS):
            return False
        if self.format != "contiguous" and (len(self.shape) < 4 or self.shape[1] == 1):
            return False
        if not case.sweeps:
            return self.dtype == "float32"
        return dtype in case.dtypes and (dtype in FLOATS or case.op == "model_entry")

    def arguments(self):
        """(arguments, keyword arguments) of the case, without the NaN that its gradient has for the tests."""
        inputs = Inputs(self.shape, DTYPES[self.dtype], self.device, FORMATS[self.format],
                        classes=self.shape[-1], members=MEMBERS)
        args, kw = self.case.make(inputs)
        return tuple(map(_finite, args)), {name: _finite(value) for name, value in kw.items()}


def _finite(value):
    return value.nan_to_num(0.0) if isinstance(value, Tensor) and value.is_floating_point() else value


def copy_arguments(args, kw):
    """The same arguments in other memory."""
    def copy(v):
        return v.clone() if isinstance(v, Tensor) else v
    return tuple(map(copy, args)), {name: copy(value) for name, value in kw.items()}


def tensors(result) -> tuple[Tensor, ...]:
    """The tensors of an op's result."""
    return (result,) if isinstance(result, Tensor) else tuple(t for t in result if t is not None)


def first(result) -> Tensor:
    """The tensor of a result that is as large as the input; eager twins need to give no other."""
    return tensors(result)[0]


def takes_out(case: OpCase) -> bool:
    """Has the case's op an argument `out`?"""
    return "out" in inspect.signature(getattr(ops, case.op, ops.split)).parameters


def streamed_bytes(setting: Setting, args, kw, result) -> int | None:
    """Bytes that an ideal kernel reads and writes; None where nothing large is streamed.

    Each large tensor counts once; the case's further passes count as passes over the first argument.
    """
    case = setting.case
    if not isinstance(args[0], Tensor) or not (case.streams or case.op == "logit_grad"):
        return None
    whole = first(result).numel()
    large = [t for t in (*args, *kw.values(), first(result)) if isinstance(t, Tensor) and t.numel() == whole]
    more = max(0, case.streams - len(large)) * args[0].element_size() * args[0].numel()
    return sum(t.element_size() * t.numel() for t in large) + more


def rate(name: str, ms: float, moved: int | None, copy_bytes: int, copy_ms: float) -> dict[str, float]:
    """{"gb_per_s": of an ideal kernel's bytes, "of_copy": its ratio to the copy's GB/s}; empty where nothing is
    streamed."""
    moved = {"copy": copy_bytes, "torch.add out=": 3 * copy_bytes // 2}.get(name, moved)
    if moved is None:
        return {}
    return {"gb_per_s": moved / ms / 1e6, "of_copy": moved / ms / (copy_bytes / copy_ms)}


def binders(case: OpCase, compiled: bool = True) -> dict[str, Callable]:
    """Contenders by name; each takes (args, kw) and gives a function of no argument on them, with buffers of its own.

    One contender is bound to several copies of the arguments where buffers rotate.
    """
    function = case.timed or case.function
    found: dict[str, Callable] = {"copy": _bind_copy(case)}
    if case.op == "sign_step":
        found["torch.add out="] = _bind_add
    if case.name in EAGER:
        eager = EAGER[case.name]
        found["eager"] = lambda args, kw: lambda: eager(*args, **kw)
        if compiled:
            found["torch.compile"] = _bind_compiled(eager)
    found["ours"] = _bind_ours(case, function, False)
    if takes_out(case):
        found["ours out="] = _bind_ours(case, function, True)
    return found


def _bind_compiled(eager: Callable):
    whole = cache(lambda: torch.compile(eager, dynamic=False))  # the compiler is imported where it is used

    def bind(args, kw):
        function = whole()
        return lambda: function(*args, **kw)
    return bind


def _bind_ours(case: OpCase, function, out: bool):
    def bind(args, kw):
        # The in-place form changes a copy of its own; its values stay bounded however often it runs.
        own, named = copy_arguments(args, kw) if case.timed else (args, kw)
        if not out:
            return lambda: function(*own, **named)
        into = torch.empty_like(first(case.function(*args, **kw)))
        return lambda: function(*own, **named, out=into)
    return bind


def _bind_copy(case: OpCase):
    def bind(args, kw):
        source = first(case.function(*args, **kw))
        into = torch.empty_like(source)
        return lambda: into.copy_(source)
    return bind


def _bind_add(args, kw):
    x, grad = args[:2]
    into = torch.empty_like(x)
    return lambda: torch.add(x, grad, out=into)


YARDSTICKS = ("copy", "torch.add out=")  # they compute something else than the case, on purpose


def verify(setting: Setting, args, kw, calls: dict[str, Callable[[], Any]], wanted=None) -> None:
    """AssertionError unless ours equals the reference and the others compute the same thing.

    wanted: the reference's result where it is known already; it takes longer than all the others.
    """
    case = setting.case
    wanted = case.reference(*args, **kw) if wanted is None else wanted
    for name, call in calls.items():
        if name in YARDSTICKS:
            continue
        ours = name.startswith("ours")
        got = call()
        if not ours and case.op in ("random_step", "sample_eps") and "fixed" not in case.mode:
            _verify_noise(case, name, args, wanted, got)
        elif case.op == "logit_grad":
            _verify_gradient(case, name, args, kw, wanted, got)
        else:
            dtype = first(got).dtype
            limit = 0.0 if ours and case.exact else TOLERANCE.get(dtype, 0.0)
            share = FLIPPED if case.op == "momentum_step" and not ours else 0.0
            # Where roundings are free, a bit of a mask may go either way: only the values are compared then.
            pairs = zip(tensors(got), tensors(wanted), strict=ours) if case.exact else [(first(got), first(wanted))]
            worst = max(_worst(*pair, share) for pair in pairs)
            if not worst <= limit:
                raise AssertionError(f"{case.name}: {name} differs from the reference by {worst}, allowed {limit}")


TOLERANCE = {torch.float32: 4e-6, torch.bfloat16: 1e-2, torch.float16: 3e-3}
FLIPPED = 0.005  # share of pixels that may step the other way: the sign of a sum that nearly cancels decides there


def _worst(got: Tensor, wanted: Tensor, share: float = 0.0) -> float:
    """The largest difference, relative to the largest value or to 1; a share of the elements is left out, those that
    differ most."""
    if got.shape != wanted.shape:
        return torch.inf
    if not got.numel():
        return 0.0
    difference = (got.double() - wanted.double()).abs().flatten()
    worst = difference.kthvalue(difference.numel() - int(share * difference.numel())).values if share else (
        difference.max())
    return (worst / wanted.double().abs().max().clamp(min=1)).item()


def _verify_noise(case: OpCase, name: str, args, wanted: Tensor, got: Tensor) -> None:
    """AssertionError unless the contender's noise, other draws, has about the reference's standard deviation."""
    base = args[0].float() if isinstance(args[0], Tensor) else 0.0
    ours, theirs = ((r.float() - base).std().item() for r in (wanted, got))
    if got.shape != wanted.shape or abs(theirs - ours) > (0.05 + 4 / got.numel() ** 0.5) * ours + 1e-3:
        raise AssertionError(f"{case.name}: {name} adds noise of another size: {theirs} instead of {ours}")


def _verify_gradient(case: OpCase, name: str, args, kw, wanted, got) -> None:
    """AssertionError unless the rule allows the labels that the contender chose and its gradient is the true one for
    them."""
    grad, labels = got[:2]
    scale = got.scale if name.startswith("ours") else torch.ones_like(wanted.scale)
    if kw["rule"] == "random":
        proper = (labels != args[1]) & (labels >= 0) & (labels < args[0].shape[-1])
    else:
        scores = _scores(args[0], kw)
        mine, theirs = (scores.gather(1, y[:, None]) for y in (labels, wanted.labels))
        proper = (mine - theirs).abs() <= TOLERANCE[args[0].dtype] * scores.abs().max()
    if not proper.all():
        raise AssertionError(f"{case.name}: {name} chose labels that its rule does not allow")
    true = case.reference(args[0], labels, **{**kw, "rule": "true", "rescale": False}).grad
    worst = _worst(grad.double() / scale.view(-1, 1).double(), true)
    if not worst <= TOLERANCE[args[0].dtype]:
        raise AssertionError(f"{case.name}: {name} differs from the reference's gradient by {worst}")


def _scores(logits: Tensor, kw) -> Tensor:
    """What the labels are chosen by: logits, or those of an ensemble fused; float64."""
    z = logits.double()
    if kw.get("fuse") is None:
        return z
    return (kw["weights"].view(-1, 1, 1) * (z if kw["fuse"] == "logits" else z.softmax(2))).sum(0)
