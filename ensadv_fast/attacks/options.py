"""The keyword options of the attacks' constructors, as editors and type checkers see them."""
from collections.abc import Sequence
from typing import TypedDict

from ..ops.losses import OwnLoss
from .transforms import Transform, VarianceTuning


class CommonOptions(TypedDict, total=False):
    """Of every attack: :class:`ensadv_fast.attacks.BaseAttack` says what they mean."""

    rule: str
    targeted: bool
    kappa: float
    lo: float
    hi: float


class Options(CommonOptions, total=False):
    """Of every attack that follows gradients."""

    loss: str | OwnLoss | None


class IterativeOptions(Options, total=False):
    """Of every iterative attack: :class:`ensadv_fast.Attack` says what they mean."""

    transforms: Sequence[Transform]
    momentum: float | None
    nesterov: bool
    variance: VarianceTuning | int | None


class SearchOptions(CommonOptions, total=False):
    """Of C&W-L-inf: :func:`ensadv_fast.attacks.cw_linf` says what they mean."""

    max_iterations: int
    learning_rate: float
    initial_const: float
    largest_const: float
    const_factor: float
    abort_early: bool
    check_every: int
