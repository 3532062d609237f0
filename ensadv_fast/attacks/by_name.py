"""Attacks by name."""
from __future__ import annotations

from dataclasses import replace
from typing import Any

from .. import attacks

ITERATIVE = ("ifgsm", "iter_ll", "pgd", "mifgsm", "nifgsm", "difgsm", "tifgsm", "sinifgsm", "vmifgsm", "vnifgsm")
ATTACKS = ("fgsm", "rand_fgsm", "step_ll", "rand_step_ll", "step_rnd", *ITERATIVE, "cw_linf", "fast_grad_l2",
           "fast_grad_linf", "fast_entropy", "random_sign", "random_normal")


def make_attack(name: str, eps: float, *, alpha: float | None = None, step: float | None = None,
                steps: int | None = None, rule: str | None = None) -> attacks.BaseAttack:
    """The attack of this name. alpha, step: in units of eps, for those attacks that have one; None is the attack's
    own default. ValueError for a name that is not in ATTACKS."""
    if name not in ATTACKS:
        raise ValueError(f"attack: name must be one of {', '.join(ATTACKS)}, got {name!r}")
    options: dict[str, Any] = {} if rule is None else {"rule": rule}
    if name.startswith("rand_") and alpha is not None:
        options["alpha"] = alpha * eps
    iterative = name in ITERATIVE
    if iterative and steps is not None:
        options["steps"] = steps
    attack = getattr(attacks, name)(eps=eps, **options)
    # A step in units of eps, so that it follows an eps drawn per sample.
    return replace(attack, step=None, step_over_eps=step) if iterative and step is not None else attack
