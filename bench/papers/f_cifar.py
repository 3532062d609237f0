"""(f) Ensemble adversarial training on CIFAR-10: under the attacks of its time, and under those that came later."""
from __future__ import annotations

from dataclasses import dataclass, replace

import ensadv_fast as ea
from ensadv_fast import attacks, evaluate, train

from .claims import Estimate, claim, greater, less
from .common import PLAIN, Group, Images, Lab, Net, Result, Sizes, differences, estimates, number, seeded

EPS = 8 / 255
TI_KERNEL = 7  # its authors' 15 is meant for images of 299 pixels


@dataclass(frozen=True)
class SizesF(Sizes):
    train: Images = Images("cifar10", 10_000)
    test: Images = Images("cifar10", 500, "test")
    networks: tuple[str, ...] = ("resnet8",)
    static: tuple[str, ...] = ("resnet8", "convnet")
    held_out: tuple[str, ...] = ("resnet14", "convnet24")
    seeds: int = 1
    epochs: int = 8
    adv_epochs: int = 8
    neighbours: int = 5  # of VMI
    options: tuple[tuple[str, object], ...] = (("dtype", "bfloat16"), ("lr", 2e-3), ("schedule", "cyclic"))


SIZES = {"small": SizesF(),
         "full": SizesF(Images("cifar10"), Images("cifar10", part="test"), ("resnet18",), seeds=3, epochs=30,
                        adv_epochs=30, static=("resnet18", "convnet64"), held_out=("resnet34", "convnet48"),
                        neighbours=20,
                        options=(("dtype", "bfloat16"), ("lr", 0.1), ("schedule", "cyclic"), ("optimizer", "sgd"),
                                 ("weight_decay", 5e-4), ("batch_size", 128)))}
AT = train.Recipe("_adv", "step_ll")  # half of each batch replaced, as on ImageNet, every image with the same eps
RECIPES = {"plain": PLAIN, "AT (Step-LL)": AT, "EAT, 2 static": replace(AT, suffix="_ens", static=True),
           "Fast-AT": train.PRESETS["fast-at"]}
WHITE = {"FGSM": attacks.fgsm(EPS), "R+FGSM": attacks.rand_fgsm(EPS), "Step-LL": attacks.step_ll(EPS),
         "R+Step-LL": attacks.rand_step_ll(EPS), "PGD-20": attacks.pgd(EPS, steps=20)}
# The five of paper 1's black-box suite.
THEN = {"FGSM": attacks.fgsm(EPS), "Step-LL": attacks.step_ll(EPS), "R+Step-LL": attacks.rand_step_ll(EPS),
        "I-FGSM": attacks.ifgsm(EPS, step=EPS / 10, steps=10), "PGD-CW": attacks.pgd(EPS, steps=10, loss="cw")}


def later(sizes: SizesF) -> dict[str, attacks.Attack]:
    """The attacks that broke the defence: ten steps of eps / 10 each, from one source or from the ensemble."""
    return {"MI": attacks.mifgsm(EPS), "DI": attacks.difgsm(EPS), "TI": attacks.tifgsm(EPS, size=TI_KERNEL),
            "SI": attacks.sinifgsm(EPS), "VMI": attacks.vmifgsm(EPS, n=sizes.neighbours)}


def together(tried: dict[str, attacks.Attack]) -> dict[str, attacks.Attack]:
    """From the ensemble; and DI, SI and momentum at once."""
    return {"I-FGSM": THEN["I-FGSM"], **{a: tried[a] for a in ("MI", "DI", "SI")},
            "DI+SI": attacks.difgsm(EPS, transforms=[ea.si()])}


def run(lab: Lab, sizes: SizesF) -> Result:
    result = Result(
        "Ensemble adversarial training on CIFAR-10, then and now",
        f"Error in % on {sizes.networks[0]}, eps 8/255. AT: half of each batch replaced by Step-LL examples; EAT: the "
        f"same on static {' and '.join(sizes.static)} and the network itself; Fast-AT: Wong et al. 2020. Black-box: "
        f"from held-out {' and '.join(sizes.held_out)}, or both as an ensemble of fused logits; maximum over sources. "
        f"Iterated attacks of 10 steps, VMI with {sizes.neighbours} neighbours, TI with a kernel of {TI_KERNEL} "
        "pixels. Neither paper has CIFAR experiments: their claims are on ImageNet. "
        f"Options of training: {', '.join(f'{k} {v}' for k, v in sizes.options)}.")
    n = len(lab.split(sizes.test))
    groups = targets(sizes)
    every, nets = list(groups.values()), Group.targets(list(groups.values()))
    sources = {name: plain(sizes, name, role="held-out") for name in sizes.held_out}
    team = {"ensemble": tuple(sources.values())}
    new = later(sizes)
    joint = together(new)
    white = lab.white_box(nets, WHITE, sizes.test)
    black = lab.matrix(nets, sources, {**THEN, **new}, sizes.test)
    allied = lab.matrix(nets, team, joint, sizes.test)

    def most(matrix: evaluate.TransferMatrix, tried: dict, of: list[str]) -> dict[str, Estimate]:
        return estimates(every, lambda t: max(matrix.error(a, s, t) for a in tried for s in of), n)

    clean = estimates(every, white.clean_error, n)
    own = {a: estimates(every, lambda t, a=a: white.error(a, t, t), n) for a in WHITE}
    result.block("White-box error", ["clean", *WHITE], [
        (g.label, g.size(lab, n), [number(clean[g.label]), *(number(of[g.label]) for of in own.values())])
        for g in every])
    one = {a: most(black, {a: 0}, list(sources)) for a in {**THEN, **new}}
    result.block("Black-box error by attack, higher of the two sources", list(one), [
        (g.label, g.size(lab, n), [number(one[a][g.label]) for a in one]) for g in every])
    all_of = {a: most(allied, {a: 0}, list(team)) for a in joint}
    result.block("Black-box error, from the ensemble of both sources", list(joint), [
        (g.label, g.size(lab, n), [number(all_of[a][g.label]) for a in joint]) for g in every])
    then, now = most(black, THEN, list(sources)), most(black, new, list(sources))
    ensemble = most(allied, joint, list(team))
    result.block("Highest black-box error", ["attacks of 2018", "later attacks", "later attacks, from the ensemble"], [
        (g.label, g.size(lab, n), [number(of[g.label]) for of in (then, now, ensemble)]) for g in every])
    pgd = own["PGD-20"]
    masked = differences(every, lambda t: max(black.error("Step-LL", s, t) for s in sources),
                         lambda t: white.error("Step-LL", t, t), n)
    gap = differences(every, lambda t: white.error("R+Step-LL", t, t), lambda t: white.error("Step-LL", t, t), n)
    at, eat, fast = (groups[k].label for k in list(RECIPES)[1:])
    result.claims = [
        claim("Adversarial training masks gradients: transferred Step-LL is stronger than white-box Step-LL",
              "paper 1, table 1 (ImageNet)", "V", [greater("transferred minus white-box Step-LL", masked[at], 0.0)]),
        claim("R+Step-LL is stronger than Step-LL on the adversarially trained network", "paper 1, table 2 (ImageNet)",
              "V", [greater("R+Step-LL minus Step-LL", gap[at], 0.0)]),
        claim("EAT is more robust than adversarial training to the black-box attacks of its time",
              "paper 1, table 4 (ImageNet)", "V", [less("maximum over five attacks", then[eat], then[at])]),
        claim("EAT is not robust to white-box iterated attacks (error over 90 %)", "paper 1, section 4.2 (ImageNet)",
              "V", [greater("PGD-20", pgd[eat], 0.9)]),
        claim("Later attacks transfer to EAT better than those of its time", "paper 1, abstract of v5", "V",
              [greater("from one source", now[eat], then[eat]),
               greater("from the ensemble", ensemble[eat], then[eat])]),
        claim("Later work trains more robust networks: Fast-AT beats EAT under PGD-20", "Wong et al. 2020", "V",
              [less("PGD-20", pgd[fast], pgd[eat])])]
    return result


def plain(sizes: SizesF, name: str, seed: int = 0, role: str = "target") -> Net:
    return network(sizes, name, PLAIN, sizes.epochs, seed, role=role)


def network(sizes: SizesF, name: str, recipe: train.Recipe, epochs: int, seed: int, **more) -> Net:
    return Net(f"papers.networks:{name}", recipe, epochs, sizes.train, seed, eps=EPS, options=sizes.options, **more)


def targets(sizes: SizesF) -> dict[str, Group]:
    (name,) = sizes.networks
    static = tuple(plain(sizes, s, role="static") for s in sizes.static)

    def made(recipe: train.Recipe, seed: int) -> Net:
        epochs = sizes.epochs if recipe.attack is None else sizes.adv_epochs
        return network(sizes, name, recipe, epochs, seed, **({"static": static} if recipe.static else {}))

    return {label: Group(label, seeded(lambda s, recipe=recipe: made(recipe, s), sizes.seeds))
            for label, recipe in RECIPES.items()}
