"""(a) Ensemble adversarial training on MNIST (paper 1, tables 7 and 8)."""
from __future__ import annotations

from dataclasses import dataclass, replace

from ensadv_fast import attacks, evaluate

from . import mnist
from .claims import Estimate, claim, greater, less, same
from .common import Group, Images, Lab, Result, Sizes, differences, estimates, number, seeded


@dataclass(frozen=True)
class SizesA(Sizes):
    held_out: tuple[str, ...] = ("A", "B", "C", "D")
    cw_images: int = 100
    cw_iterations: int = 100


SIZES = {"small": SizesA(test=Images("digits", part="test"), networks=("D", "B")),
         "full": SizesA(Images("mnist"), networks=("A", "B", "C", "D"), cw_images=1000, cw_iterations=1000)}
TRIED = {"FGSM": mnist.FGSM, "I-FGSM": mnist.IFGSM, "PGD-CW": mnist.PGD_CW}
WHITE = {"FGSM": mnist.FGSM, "R+FGSM": mnist.RAND_FGSM}
KINDS = ("plain", "AT", "EAT, 1 static", "EAT, 3 static")
# Tables 7 (FGSM, R+FGSM of A and B and D, plain and AT) and 8, from memory: clean, FGSM, R+FGSM, max, mean black-box.
PAPER = {
    ("A", "plain"): (None, 64.7, 69.7, None, None), ("A", "AT"): (0.8, 2.2, 14.8, 10.8, 7.7),
    ("A", KINDS[2]): (0.8, 7.0, None, 6.6, 5.2), ("A", KINDS[3]): (0.7, 5.4, None, 6.5, 4.3),
    ("B", "plain"): (None, 85.0, 86.0, None, None), ("B", "AT"): (0.8, 11.6, 11.1, 8.9, 5.5),
    ("B", KINDS[2]): (0.7, 10.5, None, 6.8, 5.3), ("B", KINDS[3]): (0.8, 14.0, None, 8.8, 5.1),
    ("C", "plain"): (None, 81.8, 81.8, None, None), ("C", "AT"): (1.0, 3.7, 17.1, 29.3, 18.7),
    ("C", KINDS[2]): (1.3, 1.9, None, 17.2, 10.7), ("C", KINDS[3]): (1.4, 3.6, None, 14.5, 8.4),
    ("D", "plain"): (None, 92.4, 95.4, None, None), ("D", "AT"): (2.6, 25.5, 47.5, 32.5, 23.5),
    ("D", KINDS[2]): (2.6, 21.5, None, 38.6, 28.0), ("D", KINDS[3]): (2.6, 29.4, None, 29.8, 15.6)}


def targets(sizes: Sizes) -> dict[tuple[str, str], Group]:
    made = {}
    for name in sizes.networks:
        three = ("A", "C", "D") if name == "A" else ("B", "C", "D")
        for kind, net in (("plain", lambda s, name=name: mnist.plain(sizes, name, s)),
                          ("AT", lambda s, name=name: mnist.adversarial(sizes, name, s)),
                          (KINDS[2], lambda s, name=name: mnist.ensemble(sizes, name, s, (name,))),
                          (KINDS[3], lambda s, name=name, three=three: mnist.ensemble(sizes, name, s, three))):
            made[name, kind] = Group(f"{name}, {kind}", seeded(net, sizes.seeds))
    return made


def run(lab: Lab, sizes: SizesA) -> Result:
    result = Result(
        "Ensemble adversarial training on MNIST",
        "Error in %, eps 0.3; R+FGSM with alpha 0.05, I-FGSM and PGD (CW loss) of 10 steps. Black-box: from held-out "
        f"networks {', '.join(sizes.held_out)}, which no target is trained on; maximum and mean over FGSM, I-FGSM, "
        f"PGD-CW times these sources. CW: {sizes.cw_images} of the test images, at most {sizes.cw_iterations} "
        "iterations for each constant. One static source has the target's architecture; three are B, C, D (A, C, D for "
        "A).")
    n = len(lab.split(sizes.test))
    groups = targets(sizes)
    every, nets = list(groups.values()), Group.targets(list(groups.values()))
    sources = mnist.held_out(sizes, sizes.held_out)
    white = lab.white_box(nets, WHITE, sizes.test)
    black = lab.matrix(nets, sources, TRIED, sizes.test)
    few = replace(sizes.test, n=sizes.cw_images)
    cw_linf = attacks.cw_linf(mnist.EPS, max_iterations=sizes.cw_iterations, kappa=100.0)
    carlini = lab.matrix(nets, sources, {"CW": cw_linf}, few)

    def over(matrix: evaluate.TransferMatrix, what: str, images: int) -> dict[str, Estimate]:
        return estimates(every, lambda t: getattr(evaluate.black_box(matrix, t, list(sources)), what), images)

    clean = estimates(every, white.clean_error, n)
    error = {a: estimates(every, lambda t, a=a: white.error(a, t, t), n) for a in WHITE}
    most, mean = over(black, "max", n), over(black, "mean", n)
    cw_most, cw_mean = over(carlini, "max", sizes.cw_images), over(carlini, "mean", sizes.cw_images)

    def highest(a: str, t: str) -> float:
        return max(black.error(a, s, t) for s in sources)

    single = {a: estimates(every, lambda t, a=a: highest(a, t), n) for a in TRIED}
    cw = f"{sizes.cw_images} images"
    rows = []
    for (name, kind), g in groups.items():
        mine = (clean, error["FGSM"], error["R+FGSM"], most, mean)
        rows.append((g.label, g.size(lab, n), [
            *(number(of[g.label], paper) for of, paper in zip(mine, PAPER[name, kind])),
            *(number(of[g.label]) for of in (cw_most, cw_mean))]))
    result.block("Errors", ["clean", "white-box FGSM", "white-box R+FGSM", "black-box maximum", "black-box mean",
                            f"CW maximum, {cw}", f"CW mean, {cw}"], rows)
    result.block("Highest black-box error by attack, over sources", list(TRIED), [
        (g.label, g.size(lab, n), [number(single[a][g.label]) for a in TRIED]) for g in every])

    def label(name: str, kind: str) -> str:
        return groups[name, kind].label

    gap = differences(every, lambda t: white.error("R+FGSM", t, t), lambda t: white.error("FGSM", t, t), n)
    masked = differences(every, lambda t: highest("FGSM", t), lambda t: white.error("FGSM", t, t), n)
    faster = differences(every, lambda t: highest("FGSM", t), lambda t: highest("I-FGSM", t), n)
    at = [label(name, "AT") for name in sizes.networks]
    result.claims = [
        *(claim(f"Adversarial training masks gradients ({g}): transferred FGSM is stronger than white-box FGSM",
                "paper 1, table 7 and released code", "V",
                [greater("transferred minus white-box FGSM", masked[g], 0.0)]) for g in at),
        *(claim(f"R+FGSM is stronger than FGSM after adversarial training ({g})", "paper 1, table 7 and released code",
                "V", [greater("R+FGSM minus FGSM", gap[g], 0.0)]) for g in at),
        *(claim(f"and its gain is larger than on the plain network ({name})", "paper 1, table 7 and released code", "V",
                [greater("R+FGSM minus FGSM", gap[label(name, "AT")], gap[label(name, "plain")])])
          for name in sizes.networks),
        *(claim(f"Ensemble training is more robust to black-box attacks than adversarial training ({name}, {kind})",
                "paper 1, table 8 and released code", "V",
                [less("maximum", most[label(name, kind)], most[label(name, "AT")]),
                 less("mean", mean[label(name, kind)], mean[label(name, "AT")])])
          for name in sizes.networks for kind in KINDS[2:]),
        *(claim(f"Ensemble training costs no clean accuracy against adversarial training: within 1 point ({name})",
                "paper 1, table 8", "M", [same(kind, clean[label(name, kind)], clean[label(name, "AT")], 0.01)
                                          for kind in KINDS[2:]]) for name in sizes.networks),
        claim("On adversarially trained networks single-step examples transfer better than iterated ones",
              "paper 1, section 4.2 (ImageNet)", "V",
              [greater(f"{g}: FGSM minus I-FGSM", faster[g], 0.0) for g in at])]
    return result
