"""The claims of Tramer et al. (ICLR 2018) that a run's networks allow to check, decided by intervals."""
from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict

import numpy as np

from ..evaluate import TransferMatrix, black_box
from ..evaluate.statistics import Z95, student
from ..report.train_page import Claim


def claims_of(matrix: TransferMatrix, targets: Mapping[str, Iterable[int]], held_out: Sequence[str]) -> list[dict]:
    """:class:`ensadv_fast.report.train_page.Claim` of each claim, as JSON holds it. targets: model -> its seeds;
    held_out: the sources that the black-box errors are over."""
    by_suffix = {name.rpartition("_")[2]: name for name in targets if "_" in name}
    adv, ens = by_suffix.get("adv"), by_suffix.get("ens")

    def networks(name: str) -> list[str]:
        return [f"{name}-seed{seed}" for seed in targets[name]]

    def strongest(t: str) -> np.ndarray:
        attack, source = black_box(matrix, t, held_out).pair
        return matrix.wrong[attack, source, t]

    found = []
    if adv and ens and held_out:
        a, e = ([strongest(t) for t in networks(name)] for name in (adv, ens))
        found.append(_decided("Ensemble training lowers the held-out black-box error of adversarial training",
                              a, e, f"maximum {_percent(a)} → {_percent(e)}"))
    if adv and {"fgsm", "rand_fgsm"} <= set(matrix.attacks):
        r, f = ([matrix.wrong[attack, t, t] for t in networks(adv)] for attack in ("rand_fgsm", "fgsm"))
        found.append(_decided("A random start finds more errors on the adversarially trained model than FGSM alone",
                              r, f, f"FGSM {_percent(f)}, R+FGSM {_percent(r)}"))
    return [asdict(claim) for claim in found]


def _percent(bits: Sequence[np.ndarray]) -> str:
    return f"{100 * np.mean([b.mean() for b in bits]):.1f} %"


def _decided(text: str, more: Sequence[np.ndarray], less: Sequence[np.ndarray], numbers: str) -> Claim:
    """A claim that the first errs more often than the second: it holds, or does not, where the difference's interval
    leaves no doubt."""
    value, low, high = difference(more, less)
    holds = True if low > 0 else False if high < 0 else None
    said = f"{100 * value:.1f} points, {100 * low:.1f} to {100 * high:.1f}"
    return Claim(text, holds, f"{numbers}; difference {said}")


def difference(a: Sequence[np.ndarray], b: Sequence[np.ndarray]) -> tuple[float, float, float]:
    """The share of errors of a minus that of b, and its 95 % interval. a, b: bool [N] of each seed, of the same images.

    The images' part is Wald's interval of the mean over images of the seeds' mean difference, with one image more on
    each side (Agresti and Min 2005); the seeds' part is Student's interval of the seeds' differences. They are added in
    quadrature. One seed's interval is the images' alone. Seeds of a and b are paired where there are as many.
    """
    each = [np.mean([bits.astype(float) for bits in group], axis=0) for group in (a, b)]
    per_image = each[0] - each[1]
    with_two = np.concatenate([per_image, [1.0, -1.0]])
    half = Z95 * with_two.std() / math.sqrt(len(with_two))
    value, seeds = float(per_image.mean()), min(len(a), len(b))
    if seeds > 1:
        per_seed = [float(x.mean() - y.mean()) for x, y in zip(a, b)]
        half = math.hypot(half, student(seeds - 1) * float(np.std(per_seed, ddof=1)) / math.sqrt(seeds))
    return value, value - half, value + half
