"""The arguments of an `EnsembleAdversary`: what they may be, and the sources that they become."""
from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from ..attacks import BaseAttack
from ..ops import checks
from ..sources.base import BaseSource
from ..sources.source import Source

OP = "EnsembleAdversary"
EpsDist = float | Callable[[int, Tensor], Tensor] | None
Select = str | Sequence[float] | Callable[[int, int], int]


def check_arguments(model: object, attack: object, fraction: float, mix: str, eps_dist: object, start_step: int,
                    crafting: str) -> None:
    """ValueError or TypeError for an argument that does not fit by itself."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"{OP}: model must be an nn.Module, got {type(model).__name__}")
    if attack is not None and not isinstance(attack, BaseAttack):
        raise TypeError(f"{OP}: attack must be an Attack, got {type(attack).__name__}")
    if not 0.0 <= fraction <= 1.0:
        raise ValueError(f"{OP}: fraction must be in [0, 1], got {fraction}")
    checks.choice(OP, "mix", mix, ("replace", "append"))
    checks.choice(OP, "crafting", crafting, ("eval", "train"))
    if start_step < 0:
        raise ValueError(f"{OP}: start_step must be >= 0, got {start_step}")
    if eps_dist is not None and not callable(eps_dist) and not isinstance(eps_dist, (int, float)):
        raise TypeError(f"{OP}: eps_dist must be None, a float or a callable (n, key) -> [n], got "
                        f"{type(eps_dist).__name__}")


def make_static(source: object, crafting: str) -> BaseSource:
    """A static source; a plain module becomes a frozen copy."""
    if isinstance(source, nn.Module):
        return Source(source, crafting=crafting)
    if not isinstance(source, BaseSource):
        raise TypeError(f"{OP}: static must be of Source, Ensemble or nn.Module each, got {type(source).__name__}")
    return source


def make_live(model: nn.Module, live: object, crafting: str) -> tuple[Source, ...]:
    """The model in training as a source; nothing where `live` is False."""
    if not isinstance(live, bool | Source):
        raise TypeError(f"{OP}: live must be a bool or a live Source of model, got {type(live).__name__}")
    if live is False:
        return ()
    own = Source(model, live=True, fold=False, channels_last=False, dtype=None, crafting=crafting)
    if live is True:
        return (own,)
    if not (live.live and live.module is own.module):
        raise ValueError(f"{OP}: live must be Source(model, live=True, ...), got a Source that is not live or not of "
                         "model")
    return (live,)


def check_select(select: Select, n: int) -> Select:
    """`select` for n sources; weights become floats."""
    if callable(select) or select in ("uniform", "rotate"):
        return select
    if isinstance(select, str):
        raise ValueError(f"{OP}: select must be 'uniform', 'rotate', weights or a callable, got {select!r}")
    weights = [float(w) for w in select]
    if len(weights) != n or not all(w >= 0 and math.isfinite(w) for w in weights) or sum(weights) <= 0:
        raise ValueError(f"{OP}: select must be a name, a callable or {n} weights that are finite, not negative and "
                         f"not all zero (static sources first, the live model last), got {weights}")
    return weights


def check_key(key: object) -> Tensor:
    """The key, if it is one."""
    if not isinstance(key, Tensor) or key.dtype != torch.int64 or key.shape != (2,):
        got = f"{key.dtype} {list(key.shape)}" if isinstance(key, Tensor) else type(key).__name__
        raise TypeError(f"{OP}: key must be an int64 tensor [2] from ops.fresh_key, got {got}")
    return key
