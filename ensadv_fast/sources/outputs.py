"""What a model returns, read as logits; and plain callables, taken as models."""
import functools
from collections.abc import Callable, Hashable, Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

PROBABILITIES = "probabilities"


class Outputs(NamedTuple):
    """How the outputs of a source's model are read.

    output: None, a key, a callable from what the model returns to logits [N, C], or "probabilities": the model returns
    those, and their logarithms are the logits. binary: the model gives one logit [N] or [N, 1], of class 1 against 0,
    which is read as the logits (0, z); with "probabilities", one probability of class 1.
    """

    output: Hashable = None
    binary: bool = False

    def read(self, out: Any, n: int, any_shape: bool = False) -> Sequence[Tensor]:
        """The logits [N, C] for n images, and what else the model gives beside them.

        any_shape: logits [N, ...] will do, which a loss of the caller's own reads.
        Raises ValueError where there are none, or where it is open which of several they are.
        """
        if type(out) is Tensor and self == _PLAIN and out.dim() == 2 and len(out) == n and out.shape[1] > 1:
            return (out,)
        outputs = self._chosen(out, n)
        logits = outputs[0]
        shape = tuple(logits.shape) if isinstance(logits, Tensor) else None
        if shape is not None and self.binary and not any_shape:
            if shape not in ((n,), (n, 1)):
                raise ValueError(f"Source: model must return one logit [N] or [N, 1] for x [N, ...], N = {n}, since "
                                 f"binary is True; got shape {shape}")
            z = logits.reshape(n)
            if self.output == PROBABILITIES:
                return (torch.stack([_log(1 - z), _log(z)], 1),)
            return (torch.stack([torch.zeros_like(z), z], 1),)
        fits = shape is not None and len(shape) > 0 and shape[0] == n
        if not (fits and (any_shape or len(shape or ()) == 2 and (shape or (0, 0))[1] != 1)):
            got = type(logits).__name__ if shape is None else f"shape {shape}"
            raise ValueError(f"Source: model must return logits [N, C] for x [N, ...], N = {n}; got {got}"
                             f"{_way_out(shape, n)}")
        return (_log(logits),) if self.output == PROBABILITIES else outputs

    def undeclared(self, logits: Tensor) -> list[Tensor]:
        """The logits, unless they were said to come from probabilities."""
        return [] if self.output == PROBABILITIES else [logits]

    def _chosen(self, out: Any, n: int) -> Sequence[Any]:
        """The output that is meant, first, and those beside it."""
        key = self.output
        if callable(key):
            return (key(out),)
        if key == PROBABILITIES and not (isinstance(out, Mapping) and key in out):
            key = None
        if key is not None:
            return (_at(out, key),)
        if isinstance(out, Tensor):
            return (out,)
        if isinstance(out, Mapping) and "logits" in out:
            return (out["logits"],)
        logits = getattr(out, "logits", None)
        if isinstance(out, (tuple, list)) and len(out):
            if logits is not None:
                return (logits, *(t for t in out if t is not logits))
            _refuse_ambiguous(out, n)
            return out
        if logits is not None:
            return (logits,)
        got = f"keys {', '.join(map(repr, out))}" if isinstance(out, Mapping) else type(out).__name__
        raise ValueError(f"Source: model must return logits [N, C], alone, first in a tuple, or named 'logits'; got "
                         f"{got}: output= takes the key, or a callable from what the model returns to logits")


_PLAIN = Outputs()


def _at(out: Any, key: Hashable) -> Any:
    """out[key], or the attribute of that name."""
    try:
        if isinstance(key, str) and not isinstance(out, Mapping):
            return getattr(out, key)
        return out[key]
    except (KeyError, IndexError, TypeError, AttributeError):
        has = f" with keys {', '.join(map(repr, out))}" if isinstance(out, Mapping) else ""
        raise ValueError(f"Source: output must be a key of what the model returns, a {type(out).__name__}{has}; got "
                         f"{key!r}") from None


def _refuse_ambiguous(out: Sequence[Any], n: int) -> None:
    """ValueError where more than one of the outputs could be the logits."""
    found = {i: t.shape[1] for i, t in enumerate(out) if isinstance(t, Tensor) and t.dim() == 2 and len(t) == n}
    if len(set(found.values())) > 1:
        seen = ", ".join(f"[N, {width}] at {i}" for i, width in found.items())
        raise ValueError(f"Source: output must say which of the model's outputs are the logits, got None for {seen}: "
                         f"Source(model, output={max(found)}), say")


def _way_out(shape: tuple[int, ...] | None, n: int) -> str:
    if shape in ((n,), (n, 1)):
        return ": one logit a sample, of class 1 against 0, is Source(model, binary=True)"
    if shape is not None and len(shape) == 1 and n == 1:
        return ": the batch's dimension was squeezed away; Source(model, output=lambda out: out[None]) restores it"
    return ": output= takes the key, or a callable from what the model returns to logits"


def _log(p: Tensor) -> Tensor:
    """Logits from probabilities. One that is 0 counts as the least that the dtype holds."""
    p = p if p.dtype == torch.float64 else p.float()
    return p.clamp_min(torch.finfo(p.dtype).tiny).log()


class Called(nn.Module):
    """A plain callable as a module: it is called as it is.

    The module behind a bound method or a partial is a submodule, so that its mode and device are known. What a lambda
    calls is not.
    """

    def __init__(self, function: Callable[..., Any]) -> None:
        super().__init__()
        self.function = (function,)  # in a tuple, lest a module's method were taken for more than it is
        owner: Any = function
        while isinstance(owner, functools.partial):
            owner = owner.func
        owner = getattr(owner, "__self__", owner)
        if isinstance(owner, nn.Module):
            self.owner = owner
            self.training = owner.training

    def forward(self, x: Tensor) -> Any:
        return self.function[0](x)


def as_module(model: nn.Module | Callable[..., Any], live: bool) -> nn.Module:
    """A source's model as a module. TypeError for what is none, unless it is a callable for a live source."""
    if isinstance(model, nn.Module):
        return model
    if not callable(model) or isinstance(model, type):
        raise TypeError(f"Source: model must be a torch.nn.Module, got {type(model).__name__}")
    if not live:
        raise TypeError(f"Source: model must be a torch.nn.Module, got {type(model).__name__}: any callable will do "
                        "for a live source, Source(model, live=True)")
    return Called(model)
