"""(c) Label leaking (paper 2, sections 2.2 and 4.2): what training with the true label does to FGSM's examples."""
from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ensadv_fast import attacks

from . import mnist
from .claims import claim, greater, less
from .common import ADV, Group, Images, Lab, Result, Sizes, differences, estimates, number, seeded


@dataclass(frozen=True)
class SizesC(Sizes):
    conv_seeds: int = 1  # of all networks but D, which take longer


SIZES = {"small": SizesC(networks=("D", "B")),
         "full": SizesC(Images("mnist"), networks=("A", "B", "C", "D"), conv_seeds=3)}
# The same training but for the label that the attack sees.
RECIPES = {"true": replace(ADV, rule="true", suffix="_true"), "predicted": replace(ADV, suffix="_predicted"),
           "least likely": replace(ADV, attack="step_ll", rule=None, suffix="_ll")}
TRIED = {"FGSM": mnist.FGSM, "FGSM, predicted label": attacks.fgsm(mnist.EPS, rule="predicted"),
         "Step-LL": mnist.STEP_LL, "I-FGSM": mnist.IFGSM}


def run(lab: Lab, sizes: Sizes) -> Result:
    result = Result(
        "Label leaking",
        "Error in %, white-box, eps 0.3. An image's label is leaked where the network is right about the "
        "example built with it and wrong about the one built without it (with the predicted label, or Step-LL). The "
        "paper's 79 of 10,000 is of a maxout network.")
    n = len(lab.split(sizes.test))
    groups = {(name, label): Group(f"{name}, {label} label", seeded(
        lambda s, name=name, recipe=recipe: mnist.trained(sizes, name, recipe, s),
        sizes.seeds if name == "D" else min(sizes.seeds, sizes.conv_seeds)))
        for name in sizes.networks for label, recipe in RECIPES.items()}
    every = list(groups.values())
    matrix = lab.white_box(Group.targets(every), TRIED, sizes.test)
    clean = estimates(every, matrix.clean_error, n)
    error = {a: estimates(every, lambda t, a=a: matrix.error(a, t, t), n) for a in TRIED}

    def leaks(t: str, without: str) -> np.ndarray:
        return ~matrix.wrong["FGSM", t, t] & matrix.wrong[without, t, t]

    leaked = {a: estimates(every, lambda t, a=a: float(leaks(t, a).mean()), n)
              for a in ("FGSM, predicted label", "Step-LL")}
    result.block("Error by the label that training used", ["clean", *TRIED], [
        (g.label, g.size(lab, n), [number(clean[g.label]), *(number(error[a][g.label]) for a in TRIED)])
        for g in every])
    counts = []
    for g in every:
        cells = []
        for a in leaked:
            each = [int(leaks(t, a).sum()) for t in g.names]
            cells.append(f"{np.mean(each):.0f} ({', '.join(map(str, each))})"
                         + ("; paper 79 [V]" if (g.label.endswith("true label") and a != "Step-LL") else ""))
        counts.append((g.label, g.size(lab, n), cells))
    result.block(f"Leaked labels of {n:,}: mean (each seed)", ["against FGSM, predicted label", "against Step-LL"],
                 counts)
    of = {key: g.label for key, g in groups.items()}
    above = differences(every, lambda t: matrix.error("FGSM", t, t), matrix.clean_error, n)
    pairs = [(name, other) for name in sizes.networks for other in ("predicted", "least likely")]
    result.claims = [
        claim("Training with the true label leaks it: adversarial error falls below clean error",
              "paper 2, section 4.2 (ImageNet)", "V",
              [less(f"{name}: FGSM minus clean", above[of[name, "true"]], 0.0) for name in sizes.networks]),
        claim("On MNIST it does not: adversarial error stays above clean error", "paper 2, appendix", "V",
              [greater(f"{name}: FGSM minus clean", above[of[name, "true"]], 0.0) for name in sizes.networks]),
        claim("Some labels do leak on MNIST (79 of 10,000); fewer than 10 are none", "paper 2, appendix", "V",
              [greater(f"{name}: leaked, true label", leaked["FGSM, predicted label"][of[name, "true"]], 0.0,
                       least=0.001) for name in sizes.networks]),
        claim("Training without the true label leaks less", "paper 2, section 4.2", "V",
              [less(f"{name}: leaked, {other} against true label", leaked["Step-LL"][of[name, other]],
                    leaked["Step-LL"][of[name, "true"]], least=0.001) for name, other in pairs])]
    return result
