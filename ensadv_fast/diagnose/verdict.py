"""What the checks of a masking report come to, in words."""
from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .batches import Result
from .statistics import Interval

PASSED, SUSPICIOUS, UNDECIDED = "passed", "suspicious", "not decidable at this sample size"


@dataclass(frozen=True)
class Check(Result):
    """One check of :class:`ensadv_fast.diagnose.masking.MaskingReport`. status: PASSED, SUSPICIOUS or UNDECIDED;
    sentence: says why."""

    name: str
    status: str
    numbers: dict[str, Any]
    sentence: str


def verdict_of(found: Sequence[Check], hard_names: Collection[str], errors: Mapping[str, Interval], strongest: str,
               worst: Interval, eps: float, *, nan: int) -> tuple[bool | None, str]:
    """Whether gradients are masked (None: the checks do not tell), and all that was found in words: first how robust
    the model is, then whether that can be believed.

    hard_names: the checks that no model with useful gradients fails. errors, strongest, worst, eps: as of
    :class:`ensadv_fast.diagnose.masking.MaskingReport`. nan: of how many images the model's loss is NaN.
    """
    suspicious = [c.name for c in found if c.status == SUSPICIOUS]
    open_ = [c.name for c in found if c.status == UNDECIDED]
    if suspicious:
        hard = any(name in hard_names for name in suspicious)
        masked, said = True, (f"The model masks its gradients{'' if hard else ' from single steps'} "
                              f"({'; '.join(suspicious)}): what "
                              f"{'gradient attacks find, also with many steps,' if hard else 'they find'} understates "
                              "its error." + ("" if hard else " Nothing here speaks against attacks with many steps."))
        said += f" Not decided: {'; '.join(open_)}." if open_ else ""
    elif open_:
        masked, said = None, _undecided(found, open_, worst.n)
    else:
        masked, said = False, ("No sign of masked gradients: what white-box attacks with many steps find can be "
                               "believed.")
    broken = f" On {nan} of {worst.n} images the model's output is NaN, so little here means anything." if nan else ""
    return masked, f"{_robustness(errors, strongest, worst, eps, masked)}{broken} {said}"


def _undecided(found: Sequence[Check], open_: Sequence[str], n: int) -> str:
    """What is missing to tell whether gradients are masked."""
    untried = [c.name for c in found if c.status == UNDECIDED and not c.numbers]
    few = [name for name in open_ if name not in untried]
    said = (f"{n} images are too few to tell whether the model masks its gradients" if len(open_) > len(found) // 2 else
            "Undecided whether the model masks its gradients, though no check speaks for it")
    needed = [f"more images (--images) for {'; '.join(few)}"] if few else []
    needed += [f"a held-out network (--source) for {'; '.join(untried)}"] if untried else []
    return f"{said}. It takes {', and '.join(needed)}."


def _robustness(errors: Mapping[str, Interval], strongest: str, worst: Interval, eps: float,
                masked: bool | None) -> str:
    """How robust the model is, and the numbers."""
    lost = worst.low - errors["clean"].high
    strength = ("The model is not robust at this eps." if lost > 0.5 else
                "The model loses much at this eps." if lost > 0.1 else
                "Nothing tried here makes it much worse than on clean images" +
                (", which proves little while gradients are masked." if masked else "."))
    return (f"{strength} The strongest attack tried at eps {eps:.3g} ({strongest}) finds {errors[strongest].percent()} "
            f"error, all together {worst.percent()}; on clean images it is {errors['clean'].percent()}.")
