"""Measurements that compare attacks on the same images: one step against many, with a random start and without it,
with the true label and without it."""
from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .. import attacks
from ..attacks import Attack
from ..sources.base import BaseSource
from . import batches
from .batches import Data, Model, Result
from .statistics import Interval, difference, proportion, share


def single_step(op: str, single: Attack | None, eps: float) -> Attack:
    """FGSM unless another is given."""
    return _attack(op, "single", attacks.fgsm(eps) if single is None else single)


def iterative(op: str, multi: Attack | None, eps: float) -> Attack:
    """PGD with 20 steps (the paper's number on MNIST) from the image itself unless another is given."""
    return _attack(op, "multi", attacks.pgd(eps, steps=20, random_start=False) if multi is None else multi)


def _attack(op: str, name: str, attack: Attack) -> Attack:
    if not isinstance(attack, Attack):
        raise TypeError(f"{op}: {name} must be an Attack, got {type(attack).__name__}")
    return attack


# ---------------------------------------------------------------------------------------- one step and many


@dataclass(frozen=True)
class ApproximationRatio(Result):
    """How much of the loss that an iterative attack reaches one step reaches.

    ratio: the mean over samples of loss(single) / loss(multi), the paper's. ratio_of_means: mean loss(single) over mean
    loss(multi), which samples of tiny loss do not sway. increase_ratio: the same of the increases over the clean loss;
    NaN where the iterative attack raises no loss. undefined: share of samples where loss(multi) is 0 or not finite,
    left out of `ratio`. clean, single, multi: the losses, [N] each.
    """

    ratio: float
    ratio_of_means: float
    increase_ratio: float
    undefined: float
    clean: Tensor
    single: Tensor
    multi: Tensor

    @property
    def ratios(self) -> Tensor:
        """loss(single) / loss(multi), [N]; NaN where undefined."""
        return ratios(self.single, self.multi)


def ratios(single: Tensor, multi: Tensor) -> Tensor:
    return (single / multi).where(multi.isfinite() & (multi > 0), float("nan"))


def ratio_summary(clean: Tensor, single: Tensor, multi: Tensor) -> ApproximationRatio:
    per_sample = ratios(single, multi)
    c, s, m = (batches.mean(v) for v in (clean, single, multi))
    return ApproximationRatio(batches.mean(per_sample), share(s, m), share(s - c, m - c),
                              per_sample.isnan().sum().item() / len(clean), clean, single, multi)


def approximation_ratio(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                        single: Attack | None = None, multi: Attack | None = None, key: Tensor | None = None,
                        index: Tensor | None = None, batch_size: int = batches.BATCH_SIZE) -> ApproximationRatio:
    """Mean over samples of L(x_single, y) / L(x_multi, y): how good the linear approximation behind one step is.

    Tramer et al. 2018, section 4.1: the loss of Step-LL over that of an iterative attack, a lower bound of the maximum
    in the ball, averaged over 1,000 points (v3 19 %, v3adv 7 %, v3adv-ens4 18 %). L is the cross-entropy with y for
    both. It is 1 where the loss is linear, and small where the gradient at x does not lead to the maximum.

    single: default ``fgsm(eps)`` (the paper's is ``step_ll(eps)``); multi: default PGD, 20 steps, from x itself. eps:
    of the defaults, in image units. Other arguments and errors: :func:`ensadv_fast.diagnose.batches.over`.
    """
    op = "approximation_ratio"
    eps = batches.eps_of(op, eps)
    single, multi = single_step(op, single, eps), iterative(op, multi, eps)
    (attack_key,) = batches.child_keys(op, key, 1)

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        made = {"clean": x, "single": single(source, x, y, key=attack_key, index=index),
                "multi": multi(source, x, y, key=attack_key, index=index)}
        return {name: batches.judged(source, images, y)[0] for name, images in made.items()}

    return ratio_summary(**batches.over(op, model, x, y, index, batch_size, measure))


@dataclass(frozen=True)
class PerturbationCosine(Result):
    """mean: over the samples where it is defined, -1..1; undefined: share of the others (an attack moved nothing).
    cosine: [N], NaN where undefined."""

    mean: float
    undefined: float
    cosine: Tensor


def perturbation_cosine(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                        single: Attack | None = None, multi: Attack | None = None, key: Tensor | None = None,
                        index: Tensor | None = None, batch_size: int = batches.BATCH_SIZE) -> PerturbationCosine:
    """Mean cosine of the perturbations of a single-step and of a multi-step attack on the same images.

    Tramer et al. 2018, section 4.1: 0.13 on v3, 0.02 on v3adv. Arguments: as of :func:`approximation_ratio`.
    """
    op = "perturbation_cosine"
    eps = batches.eps_of(op, eps)
    single, multi = single_step(op, single, eps), iterative(op, multi, eps)
    (attack_key,) = batches.child_keys(op, key, 1)

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        return {"cosine": batches.cosine(*(a(source, x, y, key=attack_key, index=index) - x
                                           for a in (single, multi)))}

    cosine = batches.over(op, model, x, y, index, batch_size, measure)["cosine"]
    return PerturbationCosine(batches.mean(cosine), cosine.isnan().sum().item() / len(cosine), cosine)


# ----------------------------------------------------------------------------------------- the random start


@dataclass(frozen=True)
class RandomStartGap(Result):
    """Errors, as shares of all samples, and their difference random - plain, with 95 % intervals (Wilson's; of the
    difference: paired). plain_wrong, random_wrong: bool [N]."""

    plain: Interval
    random: Interval
    gap: Interval
    plain_wrong: Tensor
    random_wrong: Tensor


def random_start_gap(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                     alpha: float | None = None, key: Tensor | None = None, index: Tensor | None = None,
                     batch_size: int = batches.BATCH_SIZE) -> RandomStartGap:
    """Error under R+FGSM minus error under FGSM, both of budget eps.

    Tramer et al. 2018, table 2: a random step before the gradient escapes the sharp curvature at the data points of a
    masked model: the gap was 38 and 16 points on the adversarially trained networks, at most 10.4 on the others. alpha:
    the random part of the budget in image units; None: eps / 2. Other arguments and errors:
    :func:`ensadv_fast.diagnose.batches.over`.
    """
    op = "random_start_gap"
    eps = batches.eps_of(op, eps)
    plain, random = attacks.fgsm(eps), attacks.rand_fgsm(eps, alpha)
    (attack_key,) = batches.child_keys(op, key, 1)

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        return {name: batches.wrong(source, attack(source, x, y, key=attack_key, index=index), y)
                for name, attack in (("plain", plain), ("random", random))}

    rows = batches.over(op, model, x, y, index, batch_size, measure)
    return gap_summary(rows["plain"], rows["random"])


def gap_summary(plain_wrong: Tensor, random_wrong: Tensor) -> RandomStartGap:
    return RandomStartGap(proportion(plain_wrong), proportion(random_wrong), difference(random_wrong, plain_wrong),
                          plain_wrong, random_wrong)


# -------------------------------------------------------------------------------------------- label leaking


LABEL_FREE = ("predicted", "least_likely", "random")


@dataclass(frozen=True)
class LabelLeaking(Result):
    """Counts of leaked labels, and the symptom.

    leaked: {rule: count}; share: {rule: its share of all samples with Wilson's interval}. clean_accuracy,
    adversarial_accuracy (true label), label_free_accuracy {rule: accuracy}. advantage: adversarial minus clean
    accuracy, with the paired interval; above 0 is the symptom. is_leaked: {rule: bool [N]}.
    """

    leaked: dict[str, int]
    share: dict[str, Interval]
    clean_accuracy: float
    adversarial_accuracy: float
    label_free_accuracy: dict[str, float]
    advantage: Interval
    is_leaked: dict[str, Tensor]


def label_free(attack: Attack, rule: str) -> Attack:
    """`attack` with a label that does not come from y: it leaves the prediction, or goes toward another class."""
    return replace(attack, name=f"{attack.name}, {rule} label", rule=rule, targeted=rule != "predicted")


def label_leaking(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                  attack: Attack | None = None, rules: tuple[str, ...] = ("predicted", "least_likely"),
                  key: Tensor | None = None, index: Tensor | None = None,
                  batch_size: int = batches.BATCH_SIZE) -> LabelLeaking:
    """How many labels leak: the model classifies correctly the adversarial example made WITH the true label, and
    misclassifies the one made WITHOUT it.

    Kurakin et al. 2017, section 4.3 (79 of 10,000 MNIST digits at eps 0.3). The symptom: accuracy on adversarial
    examples made with true labels exceeds that on clean images. attack: an untargeted attack with rule "true"; default
    ``fgsm(eps)``. rules: what stands in for the true label, any of "predicted", "least_likely" and "random" (the last
    two targeted: step l.l. and step rnd., where the attack is FGSM). Other arguments and errors:
    :func:`ensadv_fast.diagnose.batches.over`.
    """
    op = "label_leaking"
    attack = _attack(op, "attack", attacks.fgsm(batches.eps_of(op, eps)) if attack is None else attack)
    if attack.targeted or attack.rule != "true":
        raise ValueError(f"{op}: attack must be untargeted with rule 'true', got rule {attack.rule!r}"
                         f"{', targeted' if attack.targeted else ''}")
    rules = tuple(rules)
    if not rules or not set(rules) <= set(LABEL_FREE):
        raise ValueError(f"{op}: rules must be some of {', '.join(LABEL_FREE)}, got {rules!r}")
    (attack_key,) = batches.child_keys(op, key, 1)
    made = {"true": attack, **{rule: label_free(attack, rule) for rule in rules}}

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        rows = {"clean": batches.wrong(source, x, y)}
        for rule, a in made.items():
            rows[rule] = batches.wrong(source, a(source, x, None if rule == "predicted" else y, key=attack_key,
                                                 index=index), y)
        return rows

    rows = batches.over(op, model, x, y, index, batch_size, measure)
    return leak_summary(rows.pop("clean"), rows.pop("true"), rows)


def leak_summary(clean: Tensor, true: Tensor, free: dict[str, Tensor]) -> LabelLeaking:
    """From where the model errs: on clean images, on the attack with true labels, on those with each other label."""
    leaks = {rule: ~true & w for rule, w in free.items()}

    def accuracy(w: Tensor) -> float:
        return 1 - w.sum().item() / len(w)

    return LabelLeaking({rule: int(v.sum()) for rule, v in leaks.items()},
                        {rule: proportion(v) for rule, v in leaks.items()}, accuracy(clean), accuracy(true),
                        {rule: accuracy(w) for rule, w in free.items()}, difference(~true, ~clean), leaks)
