"""A watch over single-step adversarial training: does it overfit to its own attack?"""
from __future__ import annotations

import warnings
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from .. import attacks
from ..ops import checks
from ..sources.base import BaseSource
from . import batches
from .batches import Result

# Catastrophic overfitting is all of these at once. Wong et al. 2020 and Andriushchenko and Flammarion 2020 see PGD
# accuracy fall to near 0 within an epoch or two while FGSM accuracy rises, and alignment fall to a fraction.
COLLAPSE = 0.5  # PGD accuracy is at most this share of its best
BEST = 0.1  # that best is above this, about chance: a model that was never robust cannot collapse
STEP_GAP = 0.2  # FGSM accuracy minus PGD accuracy is at least this
MISALIGNED = 0.7  # alignment is at most this share of its highest


class CatastrophicOverfitting(UserWarning):
    """Robustness against many steps has collapsed while robustness against one step has not."""


@dataclass(frozen=True)
class Watch(Result):
    """One look: the training step, accuracies under FGSM and PGD (0..1), the mean gradient alignment, and whether all
    signs of catastrophic overfitting are there. The same model, images and key give the same numbers."""

    step: int
    fgsm_accuracy: float
    pgd_accuracy: float
    alignment: float
    overfitting: bool


class OverfittingMonitor:
    """Looks at a model in training every `every` calls, and warns once when it overfits catastrophically.

    Args:
        model: the model that is being trained; it is looked at as it is, in eval mode meanwhile, and left as it was.
            Nothing is drawn from torch's generators, so a look changes nothing in training.
        x, y: a few batches of held-out or training images [N, ...], floats in [0, 1] or uint8 levels, and their labels,
            integers [N], on the model's device; every look takes the same.
        eps: the budget trained for, in image units. steps: of PGD (Wong et al. 2020 look with 5). every: number of
            calls from one look to the next. key: int64 [2], of the noise, the same at every look; None: the package's
            next.

    It warns (:class:`CatastrophicOverfitting`) where PGD accuracy is at most half its best so far and that best is over
    0.1, FGSM accuracy is at least 0.2 higher, and gradient alignment is at most 0.7 of its highest so far. A look costs
    steps + 3 forward and backward passes of x and two forward passes: 64 images after each epoch of 4,000 digits took
    5 % of the time of training network D against FGSM, and take a fifteenth of that where an epoch is 60,000.
    Raises TypeError, ValueError: naming the argument.
    """

    def __init__(self, model: nn.Module, x: Tensor, y: Tensor, *, eps: float = 8 / 255, steps: int = 5, every: int = 1,
                 key: Tensor | None = None):
        op = "OverfittingMonitor"
        if not isinstance(model, nn.Module):
            raise TypeError(f"{op}: model must be a torch.nn.Module, got {type(model).__name__}")
        self.x = checks.images(op, x)
        if not len(x):
            raise ValueError(f"{op}: x must hold at least one image, got none")
        self.y = checks.labels(op, "y", y, len(x), x.device)
        self.model, self.eps = model, batches.check_eps(op, eps)
        self.every = checks.integer(op, "every", every, 1)
        self.attacks = {"fgsm": attacks.fgsm(self.eps),
                        "pgd": attacks.pgd(self.eps, steps=checks.integer(op, "steps", steps, 1))}
        self.keys = batches.child_keys(op, key, 2)
        self.calls, self.best, self.highest, self.warned = 0, 0.0, 0.0, False

    def __call__(self, step: int) -> Watch | None:
        """Look at every `every`-th call, else None. step: the training step that the result and the warning name."""
        self.calls += 1
        return self.look(step) if self.calls % self.every == 0 else None

    def look(self, step: int) -> Watch:
        """Look now. step: the training step that the result and the warning name."""
        attack_key, noise_key = self.keys

        def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
            grad = batches.gradient(source, x, y)
            nearby = batches.gradient(source, x + batches.noise(x, noise_key, self.eps, "uniform", index), y)
            rows = {"cosine": batches.cosine(grad, nearby)}
            for name, attack in self.attacks.items():
                rows[name] = batches.is_wrong(source, batches.crafted(attack, source, x, y, attack_key, index), y)
            return rows

        rows = batches.per_batch("OverfittingMonitor", self.model, self.x, self.y, None, batches.BATCH_SIZE, measure)
        fgsm, pgd = (1 - rows[name].sum().item() / len(self.y) for name in ("fgsm", "pgd"))
        alignment = batches.mean(rows["cosine"])
        found = (self.best > BEST and pgd <= COLLAPSE * self.best and fgsm - pgd >= STEP_GAP
                 and not alignment > MISALIGNED * self.highest)  # NaN: there is no gradient left to compare
        self.best, self.highest = max(self.best, pgd), max(self.highest, alignment)
        if found and not self.warned:
            self.warned = True
            warnings.warn(f"catastrophic overfitting at step {step}: accuracy under PGD is {100 * pgd:.0f} % and was "
                          f"{100 * self.best:.0f} %, under FGSM it is {100 * fgsm:.0f} %; gradient alignment fell from "
                          f"{self.highest:.2f} to {alignment:.2f}", CatastrophicOverfitting, stacklevel=3)
        return Watch(step, fgsm, pgd, alignment, found)

    def state_dict(self) -> dict[str, Any]:
        """All that later looks depend on, beside the arguments of the constructor."""
        return {"calls": self.calls, "best": self.best, "highest": self.highest, "warned": self.warned}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what :meth:`state_dict` gave."""
        self.calls, self.best = state["calls"], state["best"]
        self.highest, self.warned = state["highest"], state["warned"]
