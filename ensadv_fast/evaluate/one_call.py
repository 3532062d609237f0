"""A model under attack in one call."""
from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from .. import attacks
from ..attacks import BaseAttack
from ..ops import checks
from .cells import Model
from .matrix import TransferMatrix
from .transfer import transfer_matrix

NAMES = tuple(name for name in attacks.__all__ if name.islower())  # of the constructors


def quick(model: Model, x: Tensor, y: Tensor, eps: float, attacks: Sequence[str | BaseAttack] = ("fgsm", "pgd"), *,
          batch_size: int = 250, key: Tensor | None = None) -> TransferMatrix:
    """The white-box errors of one model: `print(quick(model, x, y, 8 / 255))` is a table.

    model: as a target of :func:`transfer_matrix`, called "model" in the matrix. x: images [N, ...] in [0, 1], float or
    uint8 levels; y: integers or bools [N] or [N, 1]. eps: of the attacks that are given by name, in image units.
    attacks: names of constructors, such as "fgsm", or attacks, under their own names. batch_size: images at a time.
    key: int64 [2], of the noise; None draws one. Raises TypeError, ValueError: as :func:`transfer_matrix`, and for a
    name that no attack has.
    """
    op = "quick"
    checks.images(op, x)
    y = checks.class_numbers(op, "y", y, len(x))
    checks.integer(op, "batch_size", batch_size, 1)
    made = [_made(op, attack, eps) for attack in attacks]
    return transfer_matrix({"model": model}, {"model": model}, {attack.name: attack for attack in made},
                           zip(x.split(batch_size), y.split(batch_size)), key=key)


def _made(op: str, attack: str | BaseAttack, eps: float) -> BaseAttack:
    """The attack itself, or the one of this name."""
    if isinstance(attack, BaseAttack):
        return attack
    checks.choice(op, "attacks", attack, NAMES)
    made = getattr(attacks, attack)(eps)
    assert isinstance(made, BaseAttack)
    return made
