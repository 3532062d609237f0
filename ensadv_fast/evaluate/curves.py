"""Accuracy against eps, white-box and transferred."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attacks import BaseAttack
from ..ops import checks
from .cells import Model, Sources
from .loader import Pick
from .matrix import TransferMatrix
from .statistics import Rate
from .transfer import Progress, measure

AnyEps = BaseAttack | Callable[[float], BaseAttack]


@dataclass(frozen=True)
class Curve:
    """A target's accuracy at each eps: correctly classified of all test inputs, top-1 and top-5."""

    attack: str
    source: str
    target: str
    eps: tuple[float, ...]
    top1: tuple[Rate, ...]
    top5: tuple[Rate, ...]

    @property
    def accuracy(self) -> list[float | None]:
        """Top-1 at each eps, 0..1."""
        return [rate.value for rate in self.top1]

    def to_dict(self) -> dict[str, Any]:
        """{"attack", "source", "target", "white_box", "eps": [...], "top1": [rate, ...], "top5": [rate, ...]}.

        A rate is what `Rate.to_dict` gives, here of accuracy, not of error.
        """
        return {"attack": self.attack, "source": self.source, "target": self.target,
                "white_box": self.source == self.target, "eps": list(self.eps),
                "top1": [rate.to_dict() for rate in self.top1], "top5": [rate.to_dict() for rate in self.top5]}


@dataclass(frozen=True)
class Curves:
    """matrices[eps]: the errors at each eps, ascending; at eps 0 only the clean ones."""

    matrices: dict[float, TransferMatrix]

    def curve(self, attack: str, source: str, target: str) -> Curve:
        """The accuracy of `target` at each eps under `attack` crafted on `source`. KeyError where there is none."""
        def rates(top: int) -> tuple[Rate, ...]:
            wrong = [m.error_rate(attack, source, target, top=top) if eps else m.clean_rate(target, top=top)
                     for eps, m in self.matrices.items()]
            return tuple(Rate(rate.n - rate.count, rate.n) for rate in wrong)

        return Curve(attack, source, target, tuple(self.matrices), rates(1), rates(5))

    def all(self) -> list[Curve]:
        """The curve of every (attack, source, target)."""
        return [self.curve(*names) for names in next(reversed(self.matrices.values())).wrong]


def accuracy_curves(targets: Mapping[str, Model], sources: Sources, attacks: Mapping[str, AnyEps],
                    eps_values: Iterable[float], loader: Iterable[Any], *, key: Tensor | None = None,
                    progress: Progress = False, white_box: bool = False, folder: str | Path | None = None,
                    batch: Pick = None, classes: int | Sequence[int] | None = None) -> Curves:
    """The errors of :func:`transfer_matrix` at every eps, in one pass over the loader.

    attacks: name -> an :class:`Attack`, whose eps is replaced (alpha, step and steps stay as they are where the attack
    fixes them, and follow eps where it leaves them None); or what makes an attack of eps, such as `ensadv_fast.pgd`
    itself. eps_values: in image units, >= 0; 0 is the clean inputs. The noise is the same at every eps. sources:
    models, no saved sets, which have one eps. The other arguments and the errors are those of
    :func:`transfer_matrix`.
    """
    op = "accuracy_curves"
    values = sorted({checks.finite(op, "eps_values", eps) for eps in eps_values})
    if not values or values[0] < 0:
        raise ValueError(f"{op}: eps_values must be at least one number, each >= 0, got {values}")
    names = {(a, eps): f"{a} at eps {eps!r}" for eps in values if eps for a in attacks}
    whole = measure(targets, sources, {name: _with_eps(attacks[a], eps) for (a, eps), name in names.items()}, loader,
                    key=key, progress=progress, white_box=white_box, folder=folder,
                    noise={name: a for (a, _), name in names.items()}, batch=batch, classes=classes)

    def at(eps: float) -> TransferMatrix:
        return _select(whole, {name: a for (a, its_eps), name in names.items() if its_eps == eps})

    return Curves({eps: at(eps) for eps in values})


def accuracy_curve(target: Model, source: Model, attack: AnyEps, eps_values: Sequence[float], loader: Iterable[Any], *,
                   key: Tensor | None = None, progress: Progress = False, folder: str | Path | None = None,
                   batch: Pick = None, classes: int | Sequence[int] | None = None) -> Curve:
    """The accuracy of `target` at each eps under `attack` crafted on `source`: white-box where the source is the target
    itself, transferred where it is another model. The arguments and errors are those of :func:`accuracy_curves`."""
    source_name = "target" if source is target else "source"
    name = getattr(attack, "name", getattr(attack, "__name__", "attack"))
    curves = accuracy_curves({"target": target}, {source_name: source}, {name: attack}, eps_values, loader, key=key,
                             progress=progress, folder=folder, batch=batch, classes=classes)
    return curves.curve(name, source_name, "target")


def _with_eps(attack: AnyEps, eps: float) -> BaseAttack:
    return replace(attack, eps=eps) if isinstance(attack, BaseAttack) else attack(eps)


def _select(whole: TransferMatrix, names: Mapping[str, str]) -> TransferMatrix:
    """The part of some attacks, with the clean verdicts. names: an attack's name in `whole` -> its name in the part."""
    def part(bits: Mapping) -> dict:
        return {(names[key[0]], *key[1:]): b for key, b in bits.items() if key[0] in names}

    return TransferMatrix(part(whole.wrong), whole.clean, part(whole.wrong5), whole.clean5, part(whole.counted),
                          part(whole.counted5), whole.data)
