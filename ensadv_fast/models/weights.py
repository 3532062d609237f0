"""From the tensors of a file to the weights of a network."""
from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

WRAPPERS = ("module.", "_orig_mod.")  # of DDP and of torch.compile
SHOWN = 3  # names in a message


def fit_weights(model: nn.Module, state: Mapping[str, Tensor], origin: object) -> None:
    """Load tensors by name into `model`, in place. Prefixes that wrappers give all names are dropped.

    Raises ValueError, naming `origin`, where they do not fit, and where weights or statistics are NaN, or weights
    infinite. Infinite buffers, such as masks, are taken.
    """
    wanted = model.state_dict()
    state = OrderedDict(_unwrap(state, wanted))
    try:
        model.load_state_dict(state)
    except (RuntimeError, TypeError, ValueError, AttributeError) as e:
        raise ValueError(f"model: the weights in {origin} do not fit {type(model).__name__}:"
                         f"{_differences(state, wanted) or f' {e}'}") from e
    bad = [name for name, t in model.named_parameters() if _is_float(t) and not torch.isfinite(t).all()]
    bad += [name for name, t in model.named_buffers() if _is_float(t) and torch.isnan(t).any()]
    if bad:
        raise ValueError(f"model: the weights in {origin} must be finite, got NaN or infinity in {_some(bad)}")


def _is_float(t: Tensor) -> bool:
    return (t.is_floating_point() or t.is_complex()) and t.device.type != "meta"


def _unwrap(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> Mapping[str, Tensor]:
    """The tensors under the network's own names, where all have one prefix more."""
    for prefix in WRAPPERS * 2:
        if state and not any(name.startswith(prefix) for name in wanted):
            state = {name.removeprefix(prefix): t for name, t in state.items()}
    first = next(iter(state), "").partition(".")[0] + "."
    if state.keys() != wanted.keys() == {name.removeprefix(first) for name in state}:
        return {name.removeprefix(first): t for name, t in state.items()}
    return state


def _differences(state: Mapping[str, Tensor], wanted: Mapping[str, Any]) -> str:
    """A line for each kind of misfit; "" where names and shapes fit."""
    lines = []
    if lacking := [name for name in wanted if name not in state]:
        lines.append(f"{len(lacking)} of its {len(wanted)} tensors are missing: {_some(lacking)}")
    if unknown := [name for name in state if name not in wanted]:
        lines.append(f"{len(unknown)} of the {len(state)} in the file are unknown to it: {_some(unknown)}")
    other = [f"{name} must be {list(t.shape)}, got {list(state[name].shape)}" for name, t in wanted.items()
             if name in state and isinstance(t, Tensor) and t.shape != state[name].shape]
    if other:
        lines.append(f"{len(other)} have another shape: {_some(other)}")
    return "".join(f"\n  {line}" for line in lines)


def _some(names: Iterable[str]) -> str:
    """The first few names."""
    found = list(names)
    return ", ".join(found[:SHOWN]) + (" ..." if len(found) > SHOWN else "")
