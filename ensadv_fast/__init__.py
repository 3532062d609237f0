"""Fast, correct adversarial examples for PyTorch classifiers, and ensemble adversarial training on them."""
from . import diagnose, evaluate, ops
from .adversary import AdversarialBatch, EnsembleAdversary, EpsDistribution, mixed_cross_entropy
from .agreement import Agreement
from .attacks import (
    Attack,
    AttackResult,
    fgsm,
    ifgsm,
    iter_ll,
    pgd,
    rand_fgsm,
    rand_step_ll,
    step_ll,
    step_rnd,
)
from .ensemble import Ensemble
from .ops import LogitGrad, fresh_key, manual_seed, split
from .protocol import InputGrad
from .source import Source

__all__ = [
    "AdversarialBatch", "Agreement", "Attack", "AttackResult", "Ensemble", "EnsembleAdversary", "EpsDistribution",
    "InputGrad", "LogitGrad", "Source", "diagnose", "evaluate", "fgsm", "fresh_key", "ifgsm", "iter_ll", "manual_seed",
    "mixed_cross_entropy", "ops", "pgd", "rand_fgsm", "rand_step_ll", "split", "step_ll", "step_rnd",
]
