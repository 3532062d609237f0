"""A copy of a model made fast: frozen, folded, cast and laid out."""
import copy
from typing import NamedTuple

import torch
from torch import nn
from torch.nn.modules.batchnorm import _NormBase

from ...ops import checks
from ..copies import cast_to, detached, lay_out
from . import folding, relus


class Preparation(NamedTuple):
    """How a model is prepared: the options of :class:`ensadv_fast.Source` of these names.

    bits: its forward passes shall be frozen passes, whose ReLUs may then work in place.
    """

    crafting: str
    fold: bool
    bits: bool
    dtype: torch.dtype | None
    channels_last: bool


class Prepared(NamedTuple):
    """A frozen copy, what a frozen pass of it may fuse, and the parts whose normalisations stay: name -> reason."""

    module: nn.Module
    relu_plan: relus.ReluPlan
    left: dict[str, str]


def prepare(model: nn.Module, how: Preparation) -> Prepared:
    """A copy of `model`, which stays as it is."""
    frozen = detached(model)
    for module in frozen.modules():
        if hasattr(module, "training"):  # frozen script modules have no modes
            module.training = how.crafting == "train"
        if isinstance(module, _NormBase) and how.crafting == "train":
            module.track_running_stats = False
    left = folding.fold_batch_norms(frozen, how.dtype) if how.fold and how.crafting == "eval" else {}
    plan = relus.plan_relus(frozen) if how.bits else relus.NOTHING_FUSED
    if how.dtype is not None:
        narrow = how.dtype in checks.NARROW  # 16-bit statistics would move every activation
        norms = [m for m in frozen.modules() if isinstance(m, _NormBase)] if narrow else []
        states = [copy.deepcopy(norm.state_dict()) for norm in norms]
        cast_to(frozen, how.dtype)
        for norm, state in zip(norms, states):
            norm.float().load_state_dict(state)
    if how.channels_last:
        lay_out(frozen, torch.channels_last)
    return Prepared(frozen, plan, left)
