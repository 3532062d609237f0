"""(b) Training on R+FGSM: robust to R+FGSM, not to PGD (paper 1, section 4.1)."""
from __future__ import annotations

from dataclasses import dataclass, replace

from . import mnist
from .claims import accuracy, claim, greater, less, scaled
from .common import ADV, Group, Images, Lab, Result, Sizes, estimates, number, seeded


@dataclass(frozen=True)
class SizesB(Sizes):
    adv_epochs: int = 30


SIZES = {"small": SizesB(),
         "full": SizesB(Images("mnist"), networks=("A",), adv_epochs=100)}
RECIPE = replace(ADV, attack="rand_fgsm", suffix="_rand")
TRIED = {"R+FGSM": mnist.RAND_FGSM, "FGSM": mnist.FGSM, "PGD-20": mnist.PGD_20}
PAPER = {"R+FGSM": 90.0, "PGD-20": 18.0}


def run(lab: Lab, sizes: Sizes) -> Result:
    result = Result("R+FGSM adversarial training",
                    "Accuracy in %, white-box, eps 0.3, R+FGSM with alpha 0.05, PGD of 20 steps of 0.0375. The paper's "
                    "numbers are of network A on 60,000 digits, 100 epochs.")
    n = len(lab.split(sizes.test))
    groups = [Group(f"{name}, R+FGSM-trained", seeded(lambda s, name=name: mnist.trained(sizes, name, RECIPE, s),
                                                      sizes.seeds)) for name in sizes.networks]
    matrix = lab.white_box(Group.targets(groups), TRIED, sizes.test)
    clean = estimates(groups, matrix.clean_error, n)
    error = {a: estimates(groups, lambda t, a=a: matrix.error(a, t, t), n) for a in TRIED}
    result.block("White-box accuracy", ["clean", *TRIED], [
        (g.label, g.size(lab, n), [number(accuracy(clean[g.label])),
                                   *(number(accuracy(error[a][g.label]), PAPER.get(a), "V") for a in TRIED)])
        for g in groups])
    rand, pgd = ({g.label: accuracy(error[a][g.label]) for g in groups} for a in ("R+FGSM", "PGD-20"))
    result.claims = [
        claim("Training on R+FGSM gives at least 90 % accuracy under R+FGSM", "paper 1, section 4.1", "V",
              [greater(g.label, rand[g.label], 0.9) for g in groups]),
        claim("and no robustness to PGD: less than half of that accuracy is left (paper: 18 of 90)",
              "paper 1, section 4.1", "V",
              [less(g.label, pgd[g.label], scaled(rand[g.label], 0.5)) for g in groups])]
    return result
