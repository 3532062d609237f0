"""The networks and attacks that the MNIST tables share (Tramer et al.'s released code: eps 0.3, Adam, batch 64)."""
from __future__ import annotations

from dataclasses import replace

from ensadv_fast import attacks, train

from .common import ADV, ENS, PLAIN, Net, Sizes

EPS = 0.3
FGSM = attacks.fgsm(EPS)
RAND_FGSM = attacks.rand_fgsm(EPS, alpha=EPS / 6)
STEP_LL = attacks.step_ll(EPS)
IFGSM = attacks.ifgsm(EPS, step=EPS / 10, steps=10)
ITER_LL = attacks.iter_ll(EPS, step=EPS / 10, steps=10)
PGD_CW = attacks.pgd(EPS, steps=10, loss="cw")
PGD_20 = attacks.pgd(EPS, steps=20)
# Paper 2's training on MNIST's scale: Step-LL, half of the batch, lambda 0.3, eps per image up to 0.3, no delay.
KURAKIN = replace(train.PRESETS["kurakin"], delay=0.0)


def spec(name: str) -> str:
    """D -> mnist:D; a network of networks.py by its name there."""
    return f"mnist:{name}" if name in ("A", "B", "C", "C_tanh", "D") else f"papers.networks:{name}"


def options(name: str) -> tuple[tuple[str, str], ...]:
    """Convolutions train under bfloat16 autocast, where they take a third of the time on a processor that has it."""
    return () if name.startswith("D") else (("dtype", "bfloat16"),)


def plain(sizes: Sizes, name: str, seed: int = 0, role: str = "target", epochs: int | None = None) -> Net:
    return Net(spec(name), PLAIN, sizes.epochs if epochs is None else epochs, sizes.train, seed, role,
               options=options(name))


def trained(sizes: Sizes, name: str, recipe: train.Recipe, seed: int, epochs: int | None = None, **more) -> Net:
    return Net(spec(name), recipe, sizes.adv_epochs if epochs is None else epochs, sizes.train, seed,
               **{"options": options(name), **more})


def adversarial(sizes: Sizes, name: str, seed: int) -> Net:
    """FGSM adversarial training of the released code."""
    return trained(sizes, name, ADV, seed)


def ensemble(sizes: Sizes, name: str, seed: int, static: tuple[str, ...]) -> Net:
    """Ensemble adversarial training on static networks, which are trained apart from all others."""
    return trained(sizes, name, replace(ENS, suffix=f"_ens{len(static)}"), seed,
                   static=tuple(plain(sizes, s, role="static") for s in static))


def held_out(sizes: Sizes, names: tuple[str, ...]) -> dict[str, Net]:
    """Networks that no target is trained on, for black-box attacks."""
    return {name: plain(sizes, name, role="held-out") for name in names}
