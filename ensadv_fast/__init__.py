"""Fast, correct adversarial examples for PyTorch classifiers, and ensemble adversarial training on them."""
from . import ops
from .attacks import (Attack, AttackResult, fgsm, ifgsm, iter_ll, pgd, rand_fgsm, rand_step_ll, step_ll, step_rnd)
from .ops import fresh_key, manual_seed, split
from .source import InputGrad, Source

__all__ = [
    "Attack", "AttackResult", "InputGrad", "Source", "fgsm", "fresh_key", "ifgsm", "iter_ll", "manual_seed", "ops",
    "pgd", "rand_fgsm", "rand_step_ll", "split", "step_ll", "step_rnd",
]
