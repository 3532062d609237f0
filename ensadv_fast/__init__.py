"""Fast, correct adversarial examples for PyTorch classifiers, and ensemble adversarial training on them."""
import importlib
from types import ModuleType
from typing import TYPE_CHECKING

from . import diagnose, evaluate, ops
from .adversary.adversary import EnsembleAdversary
from .adversary.batches import AdversarialBatch, EpsDistribution
from .adversary.loss import mixed_cross_entropy
from .attacks import (
    Attack,
    AttackResult,
    AutoAttack,
    CwLinf,
    autoattack,
    cw_linf,
    difgsm,
    fast_entropy,
    fast_grad_l2,
    fast_grad_linf,
    fgsm,
    ifgsm,
    iter_ll,
    mifgsm,
    nifgsm,
    pgd,
    pgd_l2,
    rand_fgsm,
    rand_step_ll,
    random_normal,
    random_sign,
    sinifgsm,
    step_ll,
    step_rnd,
    tifgsm,
    vmifgsm,
    vnifgsm,
)
from .attacks.transforms import di, si, ti, vt
from .ops import LogitGrad, fresh_key, manual_seed, split
from .sources.base import InputGrad
from .sources.calibration import Agreement
from .sources.ensemble import Ensemble
from .sources.source import Source

if TYPE_CHECKING:
    from . import compat, data, models, train  # noqa: F401 - names of the package, imported by __getattr__

__all__ = [
    "AdversarialBatch", "Agreement", "Attack", "AttackResult", "AutoAttack", "CwLinf", "Ensemble", "EnsembleAdversary",
    "EpsDistribution", "InputGrad", "LogitGrad", "Source", "autoattack", "compat", "cw_linf", "di", "diagnose",
    "difgsm", "evaluate", "fast_entropy", "fast_grad_l2", "fast_grad_linf", "fgsm", "fresh_key", "ifgsm", "iter_ll",
    "manual_seed", "mifgsm", "mixed_cross_entropy", "nifgsm", "ops", "pgd", "pgd_l2", "rand_fgsm", "rand_step_ll",
    "random_normal", "random_sign", "si", "sinifgsm", "split", "step_ll", "step_rnd", "ti", "tifgsm", "vmifgsm",
    "vnifgsm", "vt",
]


def __getattr__(name: str) -> ModuleType:
    """The training driver, networks by name, data sets and drop-in backends are imported when they are first named."""
    if name in ("compat", "data", "models", "train"):
        return importlib.import_module(f".{name}", __name__)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
