"""(h) Capacity, activations (paper 2), input dropout, binarised digits, number of static sources (paper 1)."""
from __future__ import annotations

from dataclasses import dataclass

from . import mnist
from .claims import Estimate, accuracy, claim, difference, estimate, greater, less, ratio, same, scaled
from .common import Group, Images, Lab, Net, Result, Sizes, differences, estimates, number, seeded


@dataclass(frozen=True)
class SizesH(Sizes):
    conv: bool = True  # B, B* and C, which take most of the time
    star_seeds: int = 2  # of B*


SIZES = {"small": SizesH(), "full": SizesH(Images("mnist"), star_seeds=3)}
WIDTHS = {"D_half": "0.5", "D_071": "0.71", "D": "1", "D_141": "1.41", "D_double": "2"}
STATIC = ("B", "C", "D")  # as in table (a)


def run(lab: Lab, sizes: SizesH) -> Result:
    result = Result("Capacity, activations, input dropout, binarised digits, static sources",
                    "White-box, eps 0.3, in %; I-FGSM of 10 steps of 0.03. D is trained as in paper 2 (Step-LL, k = "
                    "m/2, random eps, lambda 0.3) where it says AT, B as in paper 1 (FGSM, doubled batch).")
    n = len(lab.split(sizes.test))
    capacity(lab, sizes, result, n)
    activations(lab, sizes, result, n)
    if sizes.conv:
        input_dropout(lab, sizes, result, n)
    binarised(lab, sizes, result, n)
    static_sources(lab, sizes, result, n)
    return result


def errors(lab: Lab, groups: list[Group], tried: dict, sizes: Sizes, n: int) -> dict[str, dict[str, Estimate]]:
    """White-box errors by attack and group, `clean` among them."""
    matrix = lab.white_box(Group.targets(groups), tried, sizes.test)
    return {"clean": estimates(groups, matrix.clean_error, n),
            **{a: estimates(groups, lambda t, a=a: matrix.error(a, t, t), n) for a in tried}}


def kurakin(sizes: Sizes, name: str, label: str) -> Group:
    return Group(label, seeded(lambda s: mnist.trained(sizes, name, mnist.KURAKIN, s), sizes.seeds))


def capacity(lab: Lab, sizes: Sizes, result: Result, n: int) -> None:
    tried = {"Step-LL": mnist.STEP_LL, "I-FGSM": mnist.IFGSM}
    groups = []
    for name, width in WIDTHS.items():
        groups += [Group(f"width {width}, plain", seeded(
            lambda s, name=name: mnist.plain(sizes, name, s, epochs=sizes.adv_epochs), sizes.seeds)),
            kurakin(sizes, name, f"width {width}, AT")]
    error = errors(lab, groups, tried, sizes, n)
    right = {a: {label: accuracy(e) for label, e in of.items()} for a, of in error.items()}
    ratios = {a: {label: ratio(right[a][label], right["clean"][label]) for label in right[a]} for a in tried}
    result.block("Capacity: accuracy, and adversarial over clean accuracy", ["clean", "Step-LL", "Step-LL over clean",
                                                                             "I-FGSM over clean"], [
        (g.label, g.size(lab, n), [number(e[g.label]) for e in (right["clean"], right["Step-LL"], ratios["Step-LL"],
                                                                ratios["I-FGSM"])]) for g in groups])
    step, iterative = ratios["Step-LL"], ratios["I-FGSM"]
    result.claims += [
        claim("With adversarial training the ratio of adversarial to clean accuracy rises with capacity",
              "paper 2, figure 1", "V",
              [greater("Step-LL, width 2 against 0.5", step["width 2, AT"], step["width 0.5, AT"])]),
        claim("and comes near 1 at width 2 for one-step attacks (over 0.9)", "paper 2, figure 1", "V",
              [greater("Step-LL", step["width 2, AT"], 0.9)]),
        claim("but never for iterative ones (under 0.5 at every width)", "paper 2, figure 1", "V",
              [less(f"I-FGSM, width {w}", iterative[f"width {w}, AT"], 0.5) for w in WIDTHS.values()])]


def activations(lab: Lab, sizes: Sizes, result: Result, n: int) -> None:
    tried = {"Step-LL": mnist.STEP_LL, "I-FGSM": mnist.IFGSM}
    groups = [kurakin(sizes, "D", "relu, AT"), kurakin(sizes, "D_tanh", "tanh, AT"),
              kurakin(sizes, "D_relu6", "relu6, AT")]
    error = errors(lab, groups, tried, sizes, n)
    result.block("Activations: error", ["clean", *tried], [
        (g.label, g.size(lab, n), [number(of[g.label]) for of in error.values()]) for g in groups])
    clean, step = error["clean"], error["Step-LL"]
    result.claims += [
        claim("Tanh costs clean accuracy", "paper 2, appendix D", "V",
              [greater("clean", clean["tanh, AT"], clean["relu, AT"])]),
        claim("Tanh costs 10 points or more under Step-LL", "paper 2, appendix D", "V",
              [greater("Step-LL", difference(step["tanh, AT"], step["relu, AT"]), 0.1)]),
        claim("Relu6 changes clean accuracy by less than 1 point", "paper 2, appendix D", "V",
              [same("clean", clean["relu6, AT"], clean["relu, AT"], 0.01)])]


def input_dropout(lab: Lab, sizes: Sizes, result: Result, n: int) -> None:
    tried = {"FGSM": mnist.FGSM, "R+FGSM": mnist.RAND_FGSM}
    paper = {("B", "FGSM"): 11.6, ("B", "R+FGSM"): 11.1, ("B_star", "FGSM"): 4.3, ("B_star", "R+FGSM"): 40.6}
    groups = {name: Group(label, seeded(lambda s, name=name: mnist.adversarial(sizes, name, s), seeds))
              for name, label, seeds in (("B", "B, AT", sizes.seeds), ("B_star", "B without input dropout, AT",
                                                                       min(sizes.seeds, sizes.star_seeds)))}
    matrix = lab.white_box(Group.targets(list(groups.values())), tried, sizes.test)
    error = errors(lab, list(groups.values()), tried, sizes, n)
    gap = dict(zip(groups, differences(list(groups.values()), lambda t: matrix.error("R+FGSM", t, t),
                                       lambda t: matrix.error("FGSM", t, t), n).values()))
    result.block("Input dropout: error", ["clean", *tried, "R+FGSM minus FGSM"], [
        (g.label, g.size(lab, n), [number(error["clean"][g.label]),
                                   *(number(error[a][g.label], paper[name, a]) for a in tried), number(gap[name])])
        for name, g in groups.items()])
    result.claims.append(claim(
        "Input dropout lessens gradient masking: without it R+FGSM gains more over FGSM", "paper 1, appendix", "V",
        [greater("R+FGSM minus FGSM", gap["B_star"], gap["B"])]))


def binarised(lab: Lab, sizes: Sizes, result: Result, n: int) -> None:
    tried = {"FGSM": mnist.FGSM, "R+FGSM": mnist.RAND_FGSM, "PGD-20": mnist.PGD_20}
    groups = [Group(label, seeded(
        lambda s, name=name: mnist.plain(sizes, name, s, epochs=sizes.adv_epochs), sizes.seeds))
              for name, label in (("D", "D, plain"), ("D_binarised", "D on binarised digits, plain"))]
    error = errors(lab, groups, tried, sizes, n)
    result.block("Binarised digits: error (attacks see through the binarisation)", ["clean", *tried], [
        (g.label, g.size(lab, n), [number(of[g.label]) for of in error.values()]) for g in groups])
    pixels = lab.split(sizes.test).images
    gray = ((pixels > 51) & (pixels < 204)).float().mean().item()  # 0.2 and 0.8 of 255
    # Pixels of one image hang together: n is the number of images.
    share = estimate([gray], n)
    result.block("Pixels between 0.2 and 0.8", ["share"], [
        ("test digits", f"n {n:,} images", [number(share, 6.0, "V")])])
    bits, plain = groups[1].label, groups[0].label
    result.claims += [
        claim("Only about 6 % of the pixels can change their binary value at eps 0.3 (4 to 8 %)", "paper 1, appendix",
              "V", [same("share", share, 0.06, 0.02)]),
        claim("Binarising the digits alone is a strong defence: less than half of the plain network's error",
              "paper 1, appendix", "V", [less(a, error[a][bits], scaled(error[a][plain], 0.5)) for a in tried])]


def static_sources(lab: Lab, sizes: Sizes, result: Result, n: int) -> None:
    groups = [Group("D, 0 static", seeded(lambda s: mnist.adversarial(sizes, "D", s), sizes.seeds))]
    kinds = (("D",), ("B", "D"), STATIC) if sizes.conv else (("D",),)

    def made(seed: int, static: tuple[str, ...]) -> Net:
        return mnist.ensemble(sizes, "D", seed, static)

    groups += [Group(f"D, {len(static)} static ({', '.join(static)})",
                     seeded(lambda s, static=static: made(s, static), sizes.seeds)) for static in kinds]
    error = errors(lab, groups, {"FGSM": mnist.FGSM, "R+FGSM": mnist.RAND_FGSM}, sizes, n)
    paper = dict(zip((g.label for g in groups), (25.5, 21.5, None, 29.4) if sizes.conv else (25.5, 21.5)))
    result.block("Static sources: white-box error", ["clean", "FGSM", "R+FGSM"], [
        (g.label, g.size(lab, n), [number(error["clean"][g.label]), number(error["FGSM"][g.label], paper[g.label]),
                                   number(error["R+FGSM"][g.label])]) for g in groups])
    result.claims.append(claim(
        "The more static sources, the higher the white-box FGSM error (the model crafts a smaller share)",
        "paper 1, table 4", "V", [greater("most against one", error["FGSM"][groups[-1].label],
                                          error["FGSM"][groups[1].label])]))
