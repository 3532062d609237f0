"""(e) Transfer rates by attack and eps; one-step attacks on a trained network; which attack to train on (paper 2)."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ensadv_fast import attacks, evaluate

from . import mnist
from .claims import Estimate, accuracy, claim, estimate, greater, less, same, scaled
from .common import PLAIN, Group, Images, Lab, Result, Sizes, estimates, number, seeded

EPSILONS = (0.05, 0.1, 0.2, 0.3)


@dataclass(frozen=True)
class SizesE(Sizes):
    sources: tuple[str, ...] = ("B", "C", "D")
    transferred: Images = Images("mnist", 1000, "test")  # the paper's 1,000 random test images


SIZES = {"small": SizesE(), "full": SizesE(Images("mnist"), sources=("A", "B", "C", "D"))}


def one_step(eps: float) -> dict[str, attacks.Attack]:
    """The single-step attacks of appendix A and figure 3, and R+FGSM."""
    return {"FGSM": attacks.fgsm(eps), "FGSM-pred": attacks.fgsm(eps, rule="predicted"),
            "fast entropy": attacks.fast_entropy(eps), "step rnd.": attacks.step_rnd(eps),
            "step l.l.": attacks.step_ll(eps), "fast grad. L2": attacks.fast_grad_l2(eps),
            "fast grad. Linf": attacks.fast_grad_linf(eps),
            "sign of random": attacks.random_sign(eps), "random normal": attacks.random_normal(eps),
            "R+FGSM": attacks.rand_fgsm(eps, alpha=eps / 6)}


def run(lab: Lab, sizes: SizesE) -> Result:
    result = Result("Transfer, one-step attacks, training attacks",
                    "In %. Networks without adversarial training are plain; AT is paper 2's: half of each batch, eps "
                    "per image up to 0.3, lambda 0.3. The paper's numbers are of ImageNet, eps 16/255 for transfer.")
    transfer(lab, sizes, result)
    accuracies(lab, sizes, result)
    training_attacks(lab, sizes, result)
    return result


def rate(matrix: evaluate.TransferMatrix, attack: str, pairs: list[tuple[str, str]]) -> Estimate:
    """Kurakin's transfer rate over (source, target) pairs: of the images that the source has right clean and wrong
    attacked, the share that the target gets wrong. The interval takes the smallest pair's count for the images', since
    all pairs have them in common."""
    kept = [~matrix.clean[s] & matrix.wrong[attack, s, s] for s, _ in pairs]
    both = [int((k & matrix.wrong[attack, s, t]).sum()) for k, (s, t) in zip(kept, pairs)]
    counts = [int(k.sum()) for k in kept]
    if not sum(counts):
        return Estimate(0.0, 0.0, 1.0)
    return replace(estimate([sum(both) / sum(counts)], max(1, min(counts))), n=sum(counts))


def transfer(lab: Lab, sizes: SizesE, result: Result) -> None:
    nets = mnist.held_out(sizes, sizes.sources)
    kinds = {"FGSM": lambda e: attacks.fgsm(e), "basic iterative": lambda e: attacks.ifgsm(e, step=e / 10, steps=10),
             "iter. l.l.": lambda e: attacks.iter_ll(e, step=e / 10, steps=10)}
    tried = {f"{kind}, eps {e}": make(e) for kind, make in kinds.items() for e in EPSILONS}
    matrix = lab.matrix(nets, nets, tried, sizes.transferred)
    n = len(lab.split(sizes.transferred))
    pairs = [(s, t) for s in nets for t in nets if s != t]
    size = f"{len(lab.split(sizes.train)):,} x {sizes.epochs} epochs, 1 seed, n {n:,}"
    at = f"eps {EPSILONS[-1]}"
    result.block(f"Transfer rate at {at}, ten steps", [f"{kind} to {t}" for kind in kinds for t in nets], [
        (f"from {s}", size, ["white-box" if s == t else number(rate(matrix, f"{kind}, {at}", [(s, t)]))
                             for kind in kinds for t in nets]) for s in nets])
    mean = {a: rate(matrix, a, pairs) for a in tried}
    result.block("Transfer rate over all pairs; images that fooled their source in brackets",
                 [f"{kind}{what}" for kind in kinds for what in ("", ", images")], [
                     (f"eps {e}", size, [c for kind in kinds for c in (
                         number(mean[f"{kind}, eps {e}"]), f"{mean[f'{kind}, eps {e}'].n:,}")]) for e in EPSILONS])
    error = {a: estimate([float(np.mean([matrix.error(a, s, t) for s, t in pairs]))], n) for a in tried}
    result.block("Error rate of all transferred images over all pairs", list(kinds), [
        (f"eps {e}", size, [number(error[f"{kind}, eps {e}"]) for kind in kinds]) for e in EPSILONS])
    fast, basic, least = (mean[f"{kind}, {at}"] for kind in kinds)
    result.claims += [
        claim("FGSM transfers better than the basic iterative method", "paper 2, table 4", "V",
              [greater(at, fast, basic)]),
        claim("and that better than iter. l.l.", "paper 2, table 4", "V", [greater(at, basic, least)]),
        *(claim(f"The transfer rate of {kind} rises with eps", "paper 2, figure 2", "V",
                [greater(f"eps {EPSILONS[-1]} against {EPSILONS[0]}", mean[f"{kind}, {at}"],
                         mean[f"{kind}, eps {EPSILONS[0]}"])]) for kind in kinds)]


def accuracies(lab: Lab, sizes: SizesE, result: Result) -> None:
    n = len(lab.split(sizes.test))
    tried = {f"{a}, eps {e}": attack for e in EPSILONS for a, attack in one_step(e).items()}
    groups = [Group("plain", seeded(lambda s: mnist.plain(sizes, "D", s, epochs=sizes.adv_epochs), sizes.seeds)),
              Group("AT (step l.l.)", seeded(lambda s: mnist.trained(sizes, "D", mnist.KURAKIN, s), sizes.seeds))]
    matrix = lab.white_box(Group.targets(groups), tried, sizes.test)
    clean = estimates(groups, matrix.clean_error, n)
    error = {a: estimates(groups, lambda t, a=a: matrix.error(a, t, t), n) for a in tried}
    result.block("Accuracy of D under one-step attacks", ["clean", *(f"eps {e}" for e in EPSILONS)], [
        (f"{g.label}, {a}", g.size(lab, n), [number(accuracy(clean[g.label])),
                                             *(number(accuracy(error[f"{a}, eps {e}"][g.label])) for e in EPSILONS)])
        for g in groups for a in one_step(EPSILONS[0])])
    for a in ("FGSM", "FGSM-pred", "fast entropy", "step rnd.", "R+FGSM"):
        last = error[f"{a}, eps {EPSILONS[-1]}"]
        result.claims.append(claim(
            f"Training on step l.l. protects against other one-step attacks ({a}): less than half of plain training's "
            "error", "paper 2, figure 3", "V",
            [less(f"error, eps {EPSILONS[-1]}", last["AT (step l.l.)"], scaled(last["plain"], 0.5))]))


# Table 5, from memory: accuracy clean and at eps 16/255 after 90,000 steps.
PAPER = {"none": (76.8, 36.7), "FGSM": (74.9, 83.2), "FGSM-pred": (76.4, 40.0), "fast entropy": (76.4, 54.8),
         "step rnd.": (76.4, 72.5), "step l.l.": (76.3, 72.2), "fast grad. L2": (76.8, 22.5),
         "fast grad. Linf": (75.6, 25.0), "sign of random": (76.5, 32.7), "random normal": (76.6, 31.8)}


def training_attacks(lab: Lab, sizes: SizesE, result: Result) -> None:
    n = len(lab.split(sizes.test))
    own = one_step(mnist.EPS)

    def recipe(a: str):
        if a == "none":
            return PLAIN
        return mnist.KURAKIN if a == "step l.l." else replace(
            mnist.KURAKIN, attack=own[a], suffix="_on_" + a.replace(" ", "_").replace(".", ""))

    groups = [Group(f"trained on {a}", seeded(lambda s, a=a: mnist.trained(sizes, "D", recipe(a), s), sizes.seeds))
              for a in PAPER]
    tried = {f"{kind}, eps {e}": make(e) for kind, make in (("FGSM", attacks.fgsm), ("step l.l.", attacks.step_ll))
             for e in EPSILONS[1:]}
    matrix = lab.white_box(Group.targets(groups), tried, sizes.test)
    clean = estimates(groups, matrix.clean_error, n)
    error = {a: estimates(groups, lambda t, a=a: matrix.error(a, t, t), n) for a in tried}

    def cells(a: str, label: str) -> list[dict]:
        by = "step l.l." if a.startswith("fast grad") else "FGSM"  # as the paper evaluates them
        return [number(accuracy(clean[label]), PAPER[a][0]),
                *(number(accuracy(error[f"{kind}, eps {e}"][label]),
                         PAPER[a][1] if kind == by and e == EPSILONS[-1] else None)
                  for kind in ("FGSM", "step l.l.") for e in EPSILONS[1:])]

    result.block("Accuracy of D by the attack it was trained on", ["clean", *tried], [
        (g.label, g.size(lab, n), cells(a, g.label)) for a, g in zip(PAPER, groups)])
    by_fgsm = {a: error[f"FGSM, eps {EPSILONS[-1]}"][g.label] for a, g in zip(PAPER, groups)}
    at = f"error under FGSM, eps {EPSILONS[-1]}"
    result.claims += [
        claim("Training on FGSM with the true label leaks: accuracy under FGSM is above clean accuracy",
              "paper 2, table 5", "M", [less(at, by_fgsm["FGSM"], clean["trained on FGSM"])]),
        claim("Step l.l. and step rnd. are equally good to train on (within 5 points)", "paper 2, table 5", "M",
              [same(at, by_fgsm["step l.l."], by_fgsm["step rnd."], 0.05)]),
        claim("Training on FGSM-pred protects far less than on step l.l.", "paper 2, table 5", "M",
              [greater(at, by_fgsm["FGSM-pred"], by_fgsm["step l.l."])]),
        claim("Training on fast entropy protects less than on step l.l.", "paper 2, table 5", "M",
              [greater(at, by_fgsm["fast entropy"], by_fgsm["step l.l."])]),
        *(claim(f"Training on {a} protects little: more than half of the error of plain training remains",
                "paper 2, table 5", "M", [greater(at, by_fgsm[a], scaled(by_fgsm["none"], 0.5))])
          for a in ("fast grad. L2", "fast grad. Linf", "sign of random", "random normal"))]
