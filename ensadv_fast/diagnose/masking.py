"""Is a model robust, or does it only mask its gradients? A list of checks, each with its numbers, and a verdict.

The checks follow Tramer et al. 2018 (section 4), Athalye, Carlini and Wagner 2018 ("Obfuscated gradients give a false
sense of security", section 3.1) and Carlini et al. 2019 ("On evaluating adversarial robustness", section 4).
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from .. import attacks, ops
from ..attacks import Attack
from ..ops import checks
from ..sources.base import BaseSource
from ..sources.source import as_source
from . import batches, gradients, perturbations
from .batches import Data, Model, Pick, Result, Rows
from .statistics import Interval, average, difference, proportion
from .verdict import PASSED, SUSPICIOUS, UNDECIDED, Check, verdict_of

TOLERANCE = 0.05  # of a share of samples: what a check must exclude to be passed
START_GAP = 0.104  # the largest R+FGSM minus FGSM gap of an undefended network in table 2 of Tramer et al. 2018
LEAKED = 0.005  # Kurakin et al. 2017 call it leaking where 0.0079 of the labels leak, on MNIST
MISSED = 0.01  # share of samples that random noise may break although gradient attacks, being finite, did not
COSINE = 0.05  # between the 0.13 of v3 and the 0.02 of the masked v3adv, Tramer et al. 2018, section 4.1
RATIO = 0.10  # between the 19 % of v3 and the 7 % of v3adv, in the same section
ALIGNMENT = 0.20  # below it: catastrophic overfitting, in the figures of Andriushchenko and Flammarion 2020
MULTIPLES = (0.25, 0.5, 1.0, 2.0, 4.0)  # of eps, in the check that error grows with it

# The checks that no model with useful gradients fails. The others say that single steps fail, where many may succeed.
HARD = ("single step against many", "black box against white box, PGD", "unbounded eps", "growing eps", "random search",
        "zero gradients")


@dataclass(frozen=True)
class MaskingReport(Result):
    """checks: see below; verdict: in words, how robust the model is first; masked: True, False, or None where a check
    is open and none is suspicious.

    errors: {what was tried: error with Wilson's interval}, "clean" first; strongest: the key of the largest error.
    worst_case: the share of samples that at least one of these fools. eps: the budget; n: the number of samples.

    Every check is over all samples and compares two attacks sample by sample (95 % intervals; several comparisons in
    one check share that level):

    - single step against many: FGSM must not find more errors than PGD of the same eps;
    - black box against white box, PGD; the same, FGSM: examples crafted on a held-out source must not find more errors
      than the same attack on the target itself. With FGSM, TOLERANCE more is allowed: at a large eps one step
      overshoots on any network, and on another's gradient sometimes less;
    - random start: R+FGSM may find at most START_GAP more than FGSM (table 2 of Tramer et al. 2018);
    - unbounded eps: iterated steps with eps = 1 must fool every sample;
    - growing eps: PGD's error must not fall from one multiple of eps to the next;
    - random search: signs of noise of size eps must not fool what PGD could not, in more than MISSED of the samples;
    - zero gradients: at most TOLERANCE of the samples may have a true float32 gradient that is zero or not finite;
    - direction: the mean cosine of FGSM's and PGD's perturbations must not be near zero (COSINE);
    - linear approximation: the mean of loss(FGSM) / loss(PGD) must not be near zero (RATIO);
    - gradient alignment: the mean cosine of the gradients at x and at x + U(-eps, eps) must not be near zero
      (ALIGNMENT);
    - label leaking: accuracy under FGSM with the true label must not exceed clean accuracy, and at most LEAKED of the
      labels may leak.

    PGD here starts at the sample itself, so that a gradient of zero shows; `errors` has PGD with a random start too.
    """

    checks: tuple[Check, ...]
    verdict: str
    masked: bool | None
    errors: dict[str, Interval]
    strongest: str
    worst_case: Interval
    eps: float
    n: int

    def __str__(self) -> str:
        """The verdict, then what each check found."""
        width = max(len(c.status) for c in self.checks)
        return "\n".join([self.verdict, "", *(f"{c.status:{width}}  {c.name}: {c.sentence}" for c in self.checks)])

    def __getitem__(self, name: str) -> Check:
        return next(c for c in self.checks if c.name == name)


def masking_report(target: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255,
                   sources: Mapping[str, Model] | None = None, steps: int = 20, noises: int = 50,
                   alpha: float | None = None, key: Tensor | None = None, index: Tensor | None = None,
                   batch_size: int = batches.BATCH_SIZE, batch: Pick = None) -> MaskingReport:
    """Run the checklist of :class:`MaskingReport` on `target` and say in words whether its gradients can be believed.

    target: what is diagnosed; a plain module is attacked as it is and left as it was. sources: held-out models by name
    that the target was not trained on, for black-box attacks; without them that check is not decidable. eps: the budget
    in image units, images in [0, 1]. steps: of PGD; noises: draws of random search; alpha: the random part of R+FGSM
    (None: eps / 2). x is walked through once. Other arguments and errors:
    :func:`ensadv_fast.diagnose.batches.per_batch`.
    """
    op = "masking_report"
    eps = batches.check_eps(op, eps)
    checks.integer(op, "noises", noises, 1)
    checks.integer(op, "steps", steps, 1)
    craft_key, noise_key, align_key = batches.child_keys(op, key, 3)
    tried = _Trials(eps, _attacks(eps, steps, alpha), {s: as_source(m) for s, m in (sources or {}).items()}, craft_key,
                    ops.split(noise_key, noises).unbind(), align_key)
    rows = batches.per_batch(op, target, x, y, index, batch_size, tried.measure, batch)
    found = (_single_step(rows), _black_box(rows, "FGSM", tuple(tried.sources)),
             _black_box(rows, "PGD", tuple(tried.sources)), _random_start(rows), _unbounded(rows), _growing(rows),
             _random_search(rows, noises), _zero_gradients(rows), _direction(rows), _approximation(rows),
             _alignment(rows), _leaking(rows))
    within = [k for k in rows if rows[k].dtype == torch.bool and not k.startswith(("eps", "unbounded"))]
    errors = {k: proportion(rows[k]) for k in within}
    strongest = max(within, key=lambda k: errors[k].value)
    worst = proportion(torch.stack([rows[k] for k in within]).any(0))
    masked, verdict = verdict_of(found, HARD, errors, strongest, worst, eps, nan=int(rows["clean_loss"].isnan().sum()))
    return MaskingReport(found, verdict, masked, errors, strongest, worst, eps, worst.n)


# --------------------------------------------------------------------------------------------- what is tried


def _attacks(eps: float, steps: int, alpha: float | None) -> dict[str, Attack]:
    fgsm = attacks.fgsm(eps)

    def pgd(size: float, random_start: bool = False) -> Attack:
        return attacks.pgd(size, steps=steps, random_start=random_start)

    return {"FGSM": fgsm, "FGSM without the label": perturbations.label_free(fgsm, "predicted"),
            "R+FGSM": attacks.rand_fgsm(eps, alpha), "PGD": pgd(eps), "PGD with random start": pgd(eps, True),
            **{f"eps x {m:g}": pgd(min(1.0, m * eps)) for m in MULTIPLES if m != 1 and m * eps < 1},
            "unbounded": pgd(1.0)}


@dataclass(frozen=True)
class _Trials:
    """What is tried on every batch. craft_key, noise_keys, align_key: of the attacks, of random search, and of the
    second point at which the gradient is taken."""

    eps: float
    attacks: Mapping[str, Attack]
    sources: Mapping[str, BaseSource]
    craft_key: Tensor
    noise_keys: Sequence[Tensor]
    align_key: Tensor

    def measure(self, source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> Rows:
        """Of each sample, under the name of what was tried: true where it makes `source` err; besides, losses and
        measures of gradients."""
        loss, predicted = batches.judge(source, x, y)
        rows = {"clean": predicted != y, "clean_loss": loss}
        made = {name: batches.crafted(attack, source, x, None if attack.rule == "predicted" else y, self.craft_key,
                                      index) for name, attack in self.attacks.items()}
        for name, images in made.items():
            rows[f"{name}_loss"], predicted = batches.judge(source, images, y)
            rows[name] = predicted != y
        rows |= {"random noise": self._noise_fools(source, x, y, index), **self._others_fool(source, x, y, index)}
        rows["cosine"] = batches.cosine(made["FGSM"] - x, made["PGD"] - x)
        return rows | self._gradient_rows(source, x, y, index)

    def _noise_fools(self, source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> Tensor:
        """bool [N]: true where one of the draws of noise makes `source` err."""
        found = torch.zeros_like(y, dtype=torch.bool)
        for key in self.noise_keys:
            images = (x + batches.noise(x, key, self.eps, "rademacher", index)).clamp_(0, 1)
            found |= batches.is_wrong(source, images, y)
        return found

    def _others_fool(self, source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> Rows:
        """Where what is crafted on the held-out sources makes `source` err."""
        rows = {}
        for s, other in self.sources.items():
            for name in ("FGSM", "PGD"):
                images = batches.crafted(self.attacks[name], other, x, y, self.craft_key, index)
                rows[f"{name} from {s}"] = batches.is_wrong(source, images, y)
        return rows

    def _gradient_rows(self, source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> Rows:
        grad = batches.gradient(source, x, y)
        nearby = batches.gradient(source, x + batches.noise(x, self.align_key, self.eps, "uniform", index), y)
        return {"alignment": batches.cosine(grad, nearby), **gradients.norm_rows(grad)}


# -------------------------------------------------------------------------------------------------- the checks


def _status(bad: bool, good: bool) -> str:
    return SUSPICIOUS if bad else PASSED if good else UNDECIDED


def _compare(name: str, pairs: dict[str, tuple[Tensor, Tensor]], weak: str, strong: str, allowed: float = 0.0) -> Check:
    """A check of pairs (weaker, stronger), bool [N] each: it passes where in no pair the weaker one finds more errors,
    and is suspicious where in some pair it finds more than `allowed` more. weak, strong: the words for them."""
    gaps = {k: difference(a, b, len(pairs)) for k, (a, b) in pairs.items()}
    status = _status(any(g.low > allowed for g in gaps.values()), all(g.high <= TOLERANCE for g in gaps.values()))
    worst = max(gaps, key=lambda k: gaps[k].low if status == SUSPICIOUS else gaps[k].high)
    a, b = (proportion(t) for t in pairs[worst])
    which = f" ({worst})" if len(pairs) > 1 else ""
    said = {SUSPICIOUS: f"{weak} finds more errors than {strong}{which}", PASSED: f"{weak} finds no more than {strong}",
            UNDECIDED: f"whether {weak} finds more than {strong} is open{which}"}[status]
    return Check(name, status, {"differences": gaps, "weaker": a, "stronger": b},
                 f"{said[0].upper()}{said[1:]}: {a.percent()} against {b.percent()}.")


def _single_step(rows: Rows) -> Check:
    return _compare("single step against many", {"FGSM": (rows["FGSM"], rows["PGD"])}, "one step", "many")


def _black_box(rows: Rows, attack: str, sources: tuple[str, ...]) -> Check:
    name = f"black box against white box, {attack}"
    if not sources:
        return Check(name, UNDECIDED, {}, "No held-out source was given, so no black-box attack was tried.")
    pairs = {f"from {s}": (rows[f"{attack} from {s}"], rows[attack]) for s in sources}
    return _compare(name, pairs, f"transferred {attack}", f"{attack} on the model itself",
                    TOLERANCE if attack == "FGSM" else 0.0)


def _random_start(rows: Rows) -> Check:
    found = perturbations.gap_summary(rows["FGSM"], rows["R+FGSM"])
    status = _status(found.gap.low > START_GAP, found.gap.high <= START_GAP)
    said = {SUSPICIOUS: "more than undefended networks show", PASSED: "no more than undefended networks show",
            UNDECIDED: "which may or may not be more than undefended networks show"}[status]
    return Check("random start", status, {"FGSM": found.plain, "R+FGSM": found.random, "gap": found.gap},
                 f"A random step before FGSM changes its error by {found.gap.percent(' points')}, {said} "
                 f"({100 * START_GAP:.1f}).")


def _unbounded(rows: Rows) -> Check:
    error = proportion(rows["unbounded"])
    status = _status(error.high < 0.99, error.value == 1 or error.low >= 1 - TOLERANCE)
    said = {SUSPICIOUS: "which should be 100 %", PASSED: "as it should",
            UNDECIDED: "too few samples to tell whether that is 100 %"}[status]
    return Check("unbounded eps", status, {"error": error},
                 f"PGD that may change every pixel to anything fools {error.percent()} of the images, {said}.")


def _growing(rows: Rows) -> Check:
    names = {0.0: "clean", **{m: f"eps x {m:g}" for m in MULTIPLES}, 1.0: "PGD"}
    curve = {m: rows[name] for m, name in names.items() if name in rows}
    sizes = list(curve)
    pairs = {f"{a:g} to {b:g} times eps": (curve[a], curve[b]) for a, b in zip(sizes, sizes[1:])}
    found = _compare("growing eps", pairs, "a smaller eps", "a larger one")
    return replace(found, numbers={**found.numbers, "error": {f"{m:g}": proportion(w) for m, w in curve.items()}})


def _random_search(rows: Rows, noises: int) -> Check:
    only = proportion(rows["random noise"] & ~rows["PGD"])
    status = _status(only.low > MISSED, only.high <= TOLERANCE)
    return Check("random search", status, {"noise only": only, "noise": proportion(rows["random noise"])},
                 f"{noises} draws of random signs fool {only.percent()} of the images that PGD could not fool.")


def _zero_gradients(rows: Rows) -> Check:
    useless = proportion((rows["zero"] == rows["elements"]) | (rows["nonfinite"] > 0))
    norm = gradients.norm_summary(rows)
    status = _status(useless.low > TOLERANCE, useless.high <= TOLERANCE)
    return Check("zero gradients", status, {"useless": useless, "zero elements": norm.zero_elements,
                                            "nonfinite elements": norm.nonfinite_elements, "mean l2": norm.mean_l2},
                 f"The true gradient is zero everywhere, or not finite, for {useless.percent()} of the images; "
                 f"{100 * norm.zero_elements:.1f} % of all elements are zero, the mean norm is {norm.mean_l2:.3g}.")


def _compare_mean(name: str, values: Tensor, threshold: float, what: str, undefined: str) -> Check:
    """A check that the mean of the finite values is above the threshold. undefined: the sentence where none is."""
    found = average(values)
    status = _status(found.high < threshold, found.low > threshold)
    said = {SUSPICIOUS: "near zero", PASSED: "not near zero", UNDECIDED: "on both sides of the threshold"}[status]
    if not found.n:
        return Check(name, UNDECIDED, {"mean": found}, undefined)
    return Check(name, status, {"mean": found, "defined": found.n}, f"{what} is {found}: {said} ({threshold:g}).")


def _direction(rows: Rows) -> Check:
    return _compare_mean("direction", rows["cosine"], COSINE, "The mean cosine of one step and of many",
                         "An attack moved no image at all.")


def _approximation(rows: Rows) -> Check:
    name = "linear approximation"
    found = perturbations.ratio_summary(rows["clean_loss"], rows["FGSM_loss"], rows["PGD_loss"])
    if average(rows["PGD_loss"] - rows["clean_loss"]).low <= 0:
        return Check(name, UNDECIDED, {"ratio of means": found.ratio_of_means},
                     "PGD raised the loss of no image noticeably: there is nothing to compare one step with.")
    checked = _compare_mean(name, found.ratios, RATIO, "The mean of loss(FGSM) / loss(PGD)",
                            "No loss of PGD is above 0.")
    return replace(checked, numbers={**checked.numbers, "ratio of means": found.ratio_of_means,
                                     "increase ratio": found.increase_ratio})


def _alignment(rows: Rows) -> Check:
    return _compare_mean("gradient alignment", rows["alignment"], ALIGNMENT,
                         "The mean cosine of the gradients at x and at x + U(-eps, eps)",
                         "No image has a gradient to compare.")


def _leaking(rows: Rows) -> Check:
    found = perturbations.leak_summary(rows["clean"], rows["FGSM"], {"predicted": rows["FGSM without the label"]})
    leaked = found.share["predicted"]
    status = _status(leaked.low > LEAKED or found.advantage.low > 0,
                     leaked.high <= TOLERANCE and found.advantage.high <= TOLERANCE)
    return Check("label leaking", status, {"leaked": found.leaked["predicted"], "share": leaked,
                                           "advantage": found.advantage},
                 f"{found.leaked['predicted']} labels leak ({leaked.percent()}); accuracy under FGSM with the true "
                 f"label minus clean accuracy is {found.advantage.percent(' points')}.")
