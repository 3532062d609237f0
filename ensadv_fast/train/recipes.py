"""How a model is trained adversarially: recipes, and the presets among them."""
from __future__ import annotations

from dataclasses import dataclass

from .. import attacks


@dataclass(frozen=True)
class Recipe:
    """How a model is trained adversarially. suffix: is added to the model's name for the result: D, D_adv, D_ens."""

    suffix: str = ""
    attack: str | attacks.Attack | None = None  # a name in ATTACKS, or an attack; None: clean images only
    rule: str | None = None  # the label that the attack uses; None: the attack's own
    step: float | None = None  # in units of eps, of iterative attacks
    steps: int | None = None
    static: bool = False  # static sources besides the live model
    fraction: float = 0.5
    mix: str = "replace"
    lam: float = 1.0
    eps_dist: str = "fixed"
    select: str = "uniform"
    crafting: str = "eval"
    crafting_loss: str = "plain"  # or "training": with its label smoothing and auxiliary logits
    delay: float = 0.0  # the share of all steps that comes before the first adversarial batch
    start_step: int | None = None  # instead of `delay`: that many steps

    def start(self, total: int) -> int:
        """Steps, of `total`, before the first adversarial batch."""
        return round(self.delay * total) if self.start_step is None else self.start_step

    def is_weightless(self) -> bool:
        """Is every sample of an adversarial batch left out of the loss?"""
        return self.attack is not None and self.mix == "replace" and self.fraction == 1 and self.lam == 0


PRESETS = {
    "plain": Recipe(),
    # The released MNIST code (Tramer et al.): doubled batch, half and half, the source's predicted label, dropout
    # active while crafting; without static sources it is their "standard" adversarial training.
    "fgsm-at": Recipe("_adv", "fgsm", rule="predicted", mix="append", crafting="train"),
    "tramer": Recipe("_ens", "fgsm", rule="predicted", mix="append", crafting="train", static=True),
    # Kurakin et al., Algorithm 1: k = m/2 replaced, lambda 0.3, eps per sample; adversarial examples from iteration
    # 10,000 of about 150,000 on.
    "kurakin": Recipe("_kurakin", "step_ll", lam=0.3, eps_dist="truncated_normal", delay=1 / 15),
    # Tramer et al. on ImageNet: Step-LL on one of n sources, half of the batch replaced; lambda and eps per sample as
    # Kurakin's, to whom they refer.
    "eat": Recipe("_eat", "step_ll", lam=0.3, eps_dist="truncated_normal", static=True),
    # Wong et al., "Fast is better than free" (ICLR 2020): uniform start, one step of 1.25 eps, crafted in train mode.
    "fast-at": Recipe("_fast", "pgd", step=1.25, steps=1, fraction=1.0, crafting="train"),
    # Madry et al. (ICLR 2018): adversarial batch only.
    "pgd-at": Recipe("_pgd", "pgd", steps=10, fraction=1.0),
}
MAIN = ("plain", "fgsm-at", "tramer")
