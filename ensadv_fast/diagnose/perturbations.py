"""Measurements that compare attacks on the same images: one step and many, with and without a random start, with and
without the true label."""
from __future__ import annotations

from dataclasses import dataclass, replace

from torch import Tensor

from .. import attacks
from ..attacks import Attack
from ..sources.base import BaseSource
from . import batches
from .batches import Data, Model, Pick, Result
from .statistics import Interval, difference, proportion, share


def single_step(op: str, single: Attack | None, eps: float) -> Attack:
    """`single`; None: FGSM."""
    return _check_attack(op, "single", attacks.fgsm(eps) if single is None else single)


def iterative(op: str, multi: Attack | None, eps: float) -> Attack:
    """`multi`; None: PGD from the image itself with 20 steps, the paper's number on MNIST."""
    return _check_attack(op, "multi", attacks.pgd(eps, steps=20, random_start=False) if multi is None else multi)


def _check_attack(op: str, name: str, attack: Attack) -> Attack:
    if not isinstance(attack, Attack):
        raise TypeError(f"{op}: {name} must be an Attack, got {type(attack).__name__}")
    return attack


# ---------------------------------------------------------------------------------------- one step and many


@dataclass(frozen=True)
class ApproximationRatio(Result):
    """The loss that one step reaches, compared with the loss that an iterative attack reaches.

    ratio: the mean over samples of loss(single) / loss(multi), the paper's. ratio_of_means: mean loss(single) over mean
    loss(multi), on which samples of tiny loss have little influence. increase_ratio: the same of the increases over the
    clean loss; NaN where the iterative attack does not raise the mean loss. undefined: share of samples where
    loss(multi) is 0 or not finite; `ratio` leaves them out. clean, single, multi: the losses, [N] each.
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
    """single / multi, [N]; NaN where multi is 0 or less or not finite."""
    return (single / multi).where(multi.isfinite() & (multi > 0), float("nan"))


def ratio_summary(clean: Tensor, single: Tensor, multi: Tensor) -> ApproximationRatio:
    """From the losses, [N] each."""
    per_sample = ratios(single, multi)
    c, s, m = (batches.mean(v) for v in (clean, single, multi))
    return ApproximationRatio(batches.mean(per_sample), share(s, m), share(s - c, m - c),
                              per_sample.isnan().sum().item() / len(clean), clean, single, multi)


def approximation_ratio(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                        single: Attack | None = None, multi: Attack | None = None, key: Tensor | None = None,
                        index: Tensor | None = None, batch_size: int = batches.BATCH_SIZE,
                        batch: Pick = None) -> ApproximationRatio:
    """Mean over samples of L(x_single, y) / L(x_multi, y): how good the linear approximation behind one step is.

    Tramer et al. 2018, section 4.1: the loss of Step-LL over that of an iterative attack, a lower bound of the maximum
    in the ball, averaged over 1,000 points (v3 19 %, v3adv 7 %, v3adv-ens4 18 %). L is the cross-entropy with y for
    both. The ratio is 1 where the loss is linear, and small where the gradient at x does not lead to the maximum.

    single: default ``fgsm(eps)`` (the paper's is ``step_ll(eps)``); multi: default PGD, 20 steps, from x itself. eps:
    of the defaults, in image units. Other arguments and errors: :func:`ensadv_fast.diagnose.batches.per_batch`.
    """
    op = "approximation_ratio"
    eps = batches.check_eps(op, eps)
    single, multi = single_step(op, single, eps), iterative(op, multi, eps)
    (attack_key,) = batches.child_keys(op, key, 1)

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        made = {"clean": x, "single": batches.crafted(single, source, x, y, attack_key, index),
                "multi": batches.crafted(multi, source, x, y, attack_key, index)}
        return {name: batches.judge(source, images, y)[0] for name, images in made.items()}

    return ratio_summary(**batches.per_batch(op, model, x, y, index, batch_size, measure, batch))


@dataclass(frozen=True)
class PerturbationCosine(Result):
    """cosine: [N], -1..1, NaN where one of the attacks moved nothing; mean: over the other samples; undefined: share of
    the samples where it is NaN."""

    mean: float
    undefined: float
    cosine: Tensor


def perturbation_cosine(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                        single: Attack | None = None, multi: Attack | None = None, key: Tensor | None = None,
                        index: Tensor | None = None, batch_size: int = batches.BATCH_SIZE,
                        batch: Pick = None) -> PerturbationCosine:
    """Mean cosine of the perturbations of a single-step and of a multi-step attack on the same images.

    Tramer et al. 2018, section 4.1: 0.13 on v3, 0.02 on v3adv. Arguments: as of :func:`approximation_ratio`.
    """
    op = "perturbation_cosine"
    eps = batches.check_eps(op, eps)
    single, multi = single_step(op, single, eps), iterative(op, multi, eps)
    (attack_key,) = batches.child_keys(op, key, 1)

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        moved = [batches.crafted(attack, source, x, y, attack_key, index) - x for attack in (single, multi)]
        return {"cosine": batches.cosine(*moved)}

    cosine = batches.per_batch(op, model, x, y, index, batch_size, measure, batch)["cosine"]
    return PerturbationCosine(batches.mean(cosine), cosine.isnan().sum().item() / len(cosine), cosine)


# ----------------------------------------------------------------------------------------- the random start


@dataclass(frozen=True)
class RandomStartGap(Result):
    """plain, random: errors as shares of all samples, with Wilson's intervals; gap: random minus plain, with a paired
    interval (all at 95 %). plain_wrong, random_wrong: bool [N]."""

    plain: Interval
    random: Interval
    gap: Interval
    plain_wrong: Tensor
    random_wrong: Tensor


def random_start_gap(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                     alpha: float | None = None, key: Tensor | None = None, index: Tensor | None = None,
                     batch_size: int = batches.BATCH_SIZE, batch: Pick = None) -> RandomStartGap:
    """Error under R+FGSM minus error under FGSM, both of budget eps.

    Tramer et al. 2018, table 2: a random step before the gradient escapes the sharp curvature at the data points of a
    masked model. The gap was 38 and 16 points on the adversarially trained networks, at most 10.4 on the others. alpha:
    the random part of the budget in image units; None: eps / 2. Other arguments and errors:
    :func:`ensadv_fast.diagnose.batches.per_batch`.
    """
    op = "random_start_gap"
    eps = batches.check_eps(op, eps)
    plain, random = attacks.fgsm(eps), attacks.rand_fgsm(eps, alpha)
    (attack_key,) = batches.child_keys(op, key, 1)

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        return {name: batches.is_wrong(source, batches.crafted(attack, source, x, y, attack_key, index), y)
                for name, attack in (("plain", plain), ("random", random))}

    rows = batches.per_batch(op, model, x, y, index, batch_size, measure, batch)
    return gap_summary(rows["plain"], rows["random"])


def gap_summary(plain_wrong: Tensor, random_wrong: Tensor) -> RandomStartGap:
    """From where the model errs under FGSM and under R+FGSM, bool [N] each."""
    return RandomStartGap(proportion(plain_wrong), proportion(random_wrong), difference(random_wrong, plain_wrong),
                          plain_wrong, random_wrong)


# -------------------------------------------------------------------------------------------- label leaking


LABEL_FREE = ("predicted", "least_likely", "random")


@dataclass(frozen=True)
class LabelLeaking(Result):
    """Leaked labels, and the symptom.

    leaked: {rule: their number}; share: {rule: their share of all samples with Wilson's interval}; is_leaked: {rule:
    bool [N]}. clean_accuracy; adversarial_accuracy: with the true label; label_free_accuracy: {rule: accuracy}.
    advantage: adversarial minus clean accuracy, with the paired interval; above 0 is the symptom.
    """

    leaked: dict[str, int]
    share: dict[str, Interval]
    clean_accuracy: float
    adversarial_accuracy: float
    label_free_accuracy: dict[str, float]
    advantage: Interval
    is_leaked: dict[str, Tensor]


def label_free(attack: Attack, rule: str) -> Attack:
    """`attack` with a label that does not come from y: away from the prediction, or toward another rule's class."""
    return replace(attack, name=f"{attack.name}, {rule} label", rule=rule, targeted=rule != "predicted")


def label_leaking(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                  attack: Attack | None = None, rules: tuple[str, ...] = ("predicted", "least_likely"),
                  key: Tensor | None = None, index: Tensor | None = None,
                  batch_size: int = batches.BATCH_SIZE, batch: Pick = None) -> LabelLeaking:
    """How many labels leak: of how many samples the model classifies correctly the adversarial example made WITH the
    true label, and misclassifies the one made WITHOUT it.

    Kurakin et al. 2017, section 4.3 (79 of 10,000 MNIST digits at eps 0.3). The symptom: accuracy on adversarial
    examples made with true labels exceeds accuracy on clean images. attack: an untargeted attack with rule "true";
    default ``fgsm(eps)``. rules: what replaces the true label, any of "predicted", "least_likely" and "random" (the
    last two are targeted; with FGSM they are step l.l. and step rnd.). Other arguments and errors:
    :func:`ensadv_fast.diagnose.batches.per_batch`.
    """
    op = "label_leaking"
    attack = _check_attack(op, "attack", attacks.fgsm(batches.check_eps(op, eps)) if attack is None else attack)
    if attack.targeted or attack.rule != "true":
        raise ValueError(f"{op}: attack must be untargeted with rule 'true', got rule {attack.rule!r}"
                         f"{', targeted' if attack.targeted else ''}")
    rules = tuple(rules)
    if not rules or not set(rules) <= set(LABEL_FREE):
        raise ValueError(f"{op}: rules must be some of {', '.join(LABEL_FREE)}, got {rules!r}")
    (attack_key,) = batches.child_keys(op, key, 1)
    tried = {"true": attack, **{rule: label_free(attack, rule) for rule in rules}}

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        rows = {"clean": batches.is_wrong(source, x, y)}
        for rule, one in tried.items():
            images = batches.crafted(one, source, x, None if rule == "predicted" else y, attack_key, index)
            rows[rule] = batches.is_wrong(source, images, y)
        return rows

    rows = batches.per_batch(op, model, x, y, index, batch_size, measure, batch)
    return leak_summary(rows.pop("clean"), rows.pop("true"), rows)


def leak_summary(clean: Tensor, true: Tensor, free: dict[str, Tensor]) -> LabelLeaking:
    """From where the model errs, bool [N] each: on clean images, under the attack with true labels, and, by rule, under
    the attack without them."""
    leaks = {rule: ~true & wrong for rule, wrong in free.items()}

    def accuracy(wrong: Tensor) -> float:
        return 1 - wrong.sum().item() / len(wrong)

    return LabelLeaking({rule: int(v.sum()) for rule, v in leaks.items()},
                        {rule: proportion(v) for rule, v in leaks.items()}, accuracy(clean), accuracy(true),
                        {rule: accuracy(wrong) for rule, wrong in free.items()}, difference(~true, ~clean), leaks)
