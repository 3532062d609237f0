"""(d) What matters in paper 2's training: how many adversarial images, which eps, lambda, delay, regularisers."""
from __future__ import annotations

from dataclasses import dataclass, replace

from ensadv_fast import attacks

from . import mnist
from .claims import claim, greater, less, same, scaled
from .common import Group, Images, Lab, Result, Sizes, estimates, number, seeded

EPSILONS = (0.1, 0.2, 0.3)


@dataclass(frozen=True)
class SizesD(Sizes):
    seeds: int = 2


SIZES = {"small": SizesD(), "full": SizesD(Images("mnist"), seeds=3)}
BASE = "base: k/m 1/2, random eps, lambda 0.3"
FEW, ALL, FIXED, LATE, SOON, SMOOTH, BARE = (
    "k/m 1/8", "k/m 1", "fixed eps", "first 1/2 of the steps clean", "first 1/15 of the steps clean",
    "label smoothing 0.1", "no dropout")
K = mnist.KURAKIN


def settings() -> dict[str, dict]:
    """What is trained, as arguments of mnist.trained besides the seed."""
    def recipe(**changes) -> dict:
        return {"name": "D", "recipe": replace(K, **changes)}

    return {
        "no adversarial images": {"name": "D", "recipe": mnist.PLAIN}, BASE: recipe(),
        FEW: recipe(fraction=1 / 8), "k/m 1/4": recipe(fraction=1 / 4), "k/m 3/4": recipe(fraction=3 / 4),
        ALL: recipe(fraction=1.0), FIXED: recipe(eps_dist="fixed"), "uniform eps": recipe(eps_dist="uniform"),
        "lambda 0.1": recipe(lam=0.1), "lambda 1": recipe(lam=1.0), SOON: recipe(delay=1 / 15),
        "first 1/4 of the steps clean": recipe(delay=1 / 4), LATE: recipe(delay=1 / 2),
        SMOOTH: {**recipe(), "options": (("label_smoothing", 0.1),)},
        BARE: {"name": "D_no_dropout", "recipe": K}}


def run(lab: Lab, sizes: Sizes) -> Result:
    result = Result("Ablations of paper 2",
                    "Error in %, white-box Step-LL, network D, batch 64. The paper's are of Inception v3, batch 32; "
                    "its claims in words are compared, not its numbers. With two seeds their spread is pooled over the "
                    "rows.")
    n = len(lab.split(sizes.test))
    tried = {f"Step-LL, eps {e}": attacks.step_ll(e) for e in EPSILONS}
    tried["FGSM, eps 0.3"] = mnist.FGSM
    groups = [Group(label, seeded(lambda s, how=how: mnist.trained(sizes, seed=s, **how), sizes.seeds))
              for label, how in settings().items()]
    matrix = lab.white_box(Group.targets(groups), tried, sizes.test)
    clean = estimates(groups, matrix.clean_error, n)
    error = {a: estimates(groups, lambda t, a=a: matrix.error(a, t, t), n) for a in tried}
    result.block("Error by setting", ["clean", *tried], [
        (g.label, g.size(lab, n), [number(clean[g.label]), *(number(error[a][g.label]) for a in tried)])
        for g in groups])
    small, large = (error[f"Step-LL, eps {e}"] for e in (EPSILONS[0], EPSILONS[-1]))
    result.claims = [
        claim("A few adversarial images already help much: with k = m/8 the Step-LL error is less than half of that of "
              "plain training", "paper 2, table 8", "M",
              [less("eps 0.3", large[FEW], scaled(large["no adversarial images"], 0.5))]),
        claim("More than half of the batch brings no gain against Step-LL (within 2 points)", "paper 2, appendix E",
              "V", [same("eps 0.3, k/m 1 and 1/2", large[ALL], large[BASE], 0.02)]),
        claim("and costs clean accuracy", "paper 2, appendix E", "V",
              [greater("clean", clean[ALL], clean[BASE], 0.002)]),
        claim("Training at one fixed eps protects less at another: its error at eps 0.1 is higher than with random eps",
              "paper 2, section 4.1", "V", [greater("eps 0.1", small[FIXED], small[BASE])]),
        claim("A short delay costs nothing: clean error within 0.2 points", "paper 2, section 4.1", "V",
              [same("1/15 of the steps", clean[SOON], clean[BASE], 0.002)]),
        claim("A long delay costs adversarial accuracy at large eps", "paper 2, section 4.1", "V",
              [greater("1/2 of the steps, eps 0.3", large[LATE], large[BASE])]),
        claim("Fewer regularisers: adversarial accuracy rises (without dropout)", "paper 2, section 4.1", "V",
              [less("eps 0.3", large[BARE], large[BASE])]),
        claim("Fewer regularisers: adversarial accuracy rises (without label smoothing)", "paper 2, section 4.1", "V",
              [less("eps 0.3", large[BASE], large[SMOOTH])])]
    return result
