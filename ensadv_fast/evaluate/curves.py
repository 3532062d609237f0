"""Accuracy against eps, white-box and transferred."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import Tensor

from ..attacks import BaseAttack
from ..ops import checks
from .matrix import TransferMatrix
from .run import Model, Sources
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
        return [rate.value for rate in self.top1]

    def to_dict(self) -> dict[str, Any]:
        """{"attack", "source", "target", "white_box", "eps": [...], "top1": [rate, ...], "top5": [rate, ...]}, with a
        rate as `Rate.to_dict` gives it: here of accuracy, not of error."""
        return {"attack": self.attack, "source": self.source, "target": self.target,
                "white_box": self.source == self.target, "eps": list(self.eps),
                "top1": [rate.to_dict() for rate in self.top1], "top5": [rate.to_dict() for rate in self.top5]}


@dataclass(frozen=True)
class Curves:
    """matrices[eps]: the errors at each eps, ascending; at eps 0 the clean ones alone."""

    matrices: dict[float, TransferMatrix]

    def curve(self, attack: str, source: str, target: str) -> Curve:
        def rates(top: int) -> tuple[Rate, ...]:
            wrong = [m.error_rate(attack, source, target, top=top) if eps else m.clean_rate(target, top=top)
                     for eps, m in self.matrices.items()]
            return tuple(Rate(rate.n - rate.count, rate.n) for rate in wrong)

        return Curve(attack, source, target, tuple(self.matrices), rates(1), rates(5))

    def all(self) -> list[Curve]:
        return [self.curve(*names) for names in next(reversed(self.matrices.values())).wrong]


def accuracy_curves(targets: Mapping[str, Model], sources: Sources, attacks: Mapping[str, AnyEps],
                    eps_values: Iterable[float], loader: Iterable[Any], *, key: Tensor | None = None,
                    progress: Progress = False, white_box: bool = False, folder: str | Path | None = None) -> Curves:
    """The errors of :func:`transfer_matrix` at every eps, in one pass over the loader.

    attacks: name -> an :class:`Attack`, whose eps is replaced (alpha, step and steps that it fixes stay as they are;
    those left None follow), or what makes one of eps, such as `ensadv_fast.pgd` itself. eps_values: in image units,
    >= 0; 0 stands for the clean inputs. The noise is the same at every eps. Sources are models, not saved sets, which
    have one eps. The other arguments are those of :func:`transfer_matrix`. Raises ValueError, TypeError.
    """
    op = "accuracy_curves"
    values = sorted({checks.finite(op, "eps_values", eps) for eps in eps_values})
    if not values or values[0] < 0:
        raise ValueError(f"{op}: eps_values: want at least one, each >= 0, got {values}")
    at = {(a, eps): f"{a} at eps {eps!r}" for eps in values if eps for a in attacks}
    whole = measure(targets, sources, {name: _sized(attacks[a], eps) for (a, eps), name in at.items()}, loader,
                    key=key, progress=progress, white_box=white_box, folder=folder,
                    noise={name: a for (a, _), name in at.items()})
    return Curves({eps: _renamed(whole, {name: a for (a, e), name in at.items() if e == eps}) for eps in values})


def accuracy_curve(target: Model, source: Model, attack: AnyEps, eps_values: Sequence[float], loader: Iterable[Any], *,
                   key: Tensor | None = None, progress: Progress = False, folder: str | Path | None = None) -> Curve:
    """The accuracy of `target` at each eps under `attack` crafted on `source`: white-box where that is the target
    itself, transferred where it is another model. Everything else is :func:`accuracy_curves`'s."""
    source_name = "target" if source is target else "source"
    name = getattr(attack, "name", getattr(attack, "__name__", "attack"))
    return accuracy_curves({"target": target}, {source_name: source}, {name: attack}, eps_values, loader, key=key,
                           progress=progress, folder=folder).curve(name, source_name, "target")


def _sized(attack: AnyEps, eps: float) -> BaseAttack:
    return replace(attack, eps=eps) if isinstance(attack, BaseAttack) else attack(eps)


def _renamed(whole: TransferMatrix, names: Mapping[str, str]) -> TransferMatrix:
    """The part of these attacks, under the names they are given here, with the clean verdicts."""
    def part(bits: Mapping) -> dict:
        return {(names[key[0]], *key[1:]): b for key, b in bits.items() if key[0] in names}

    return TransferMatrix(part(whole.wrong), whole.clean, part(whole.wrong5), whole.clean5, part(whole.counted),
                          part(whole.counted5), whole.data)
