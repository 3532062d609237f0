"""What our ART attacks share: when ART's own implementation runs instead, and when our engine does."""
import warnings
from typing import Any

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification.pytorch import PyTorchClassifier
from torch.utils.data import DataLoader, TensorDataset

from ... import attacks
from ..precisions import checked, is_fast
from .steps import batches
from .target import Target


class Precise:
    """What attacks have beside ART's attributes."""

    _precision: str | None = None

    @property
    def precision(self) -> str | None:
        """"exact", "fast", or None: as :func:`ensadv_fast.compat.precision` says. Ours alone."""
        return self._precision

    @precision.setter
    def precision(self, which: str | None) -> None:
        self._choose(checked(type(self).__name__, which))

    def _choose(self, which: str | None) -> None:
        self._precision = which


class Crafting(EvasionAttack, Precise):  # ART's first: Python then lets an object of ART's become one of ours
    """Before ART's class of the same attack, ``theirs``, among a class's bases."""

    theirs: type
    own_methods: tuple[str, ...] = ()  # ART's methods whose work ours do in one: where overridden, ART's run

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Adversarial images float32 for images x [N, ...] and labels y, int [N] or one per class [N, C]; without y
        the predictions. mask: an array that broadcasts over x; pixels where it is 0 stay."""
        if not self._is_ours(x):
            return super().generate(x, y, **kwargs)
        mask = self._get_mask(x, **kwargs)
        self._check_compatibility_input_and_eps(x=x)
        return self._generated(Target(self.estimator, x), x, y, mask)

    def _generated(self, target: Target, x: np.ndarray, y: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
        """The images that :meth:`generate` gives, of arguments that are checked."""
        raise NotImplementedError

    def _is_ours(self, x: np.ndarray) -> bool:
        """Can we compute what ART would?"""
        estimator = self.estimator
        return (isinstance(estimator, PyTorchClassifier) and estimator.all_framework_preprocessing
                and type(estimator).loss_gradient is PyTorchClassifier.loss_gradient
                and not estimator.use_amp and x.dtype != object and len(x) > 0 and self.summary_writer is None
                and self.norm in (np.inf, "inf", 2)
                and all(getattr(type(self), m) is getattr(self.theirs, m) for m in self.own_methods))

    def _with_source(self, target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None,
                     why: str | None, **how: Any) -> np.ndarray | None:
        """Adversarial images by our engine, where that is wanted and can be. how: of :class:`ensadv_fast.Attack`."""
        if not is_fast(self.precision):
            return None
        why = why or target.why_no_source(x) or self._why_exact(targets, mask)
        if why is not None:
            warnings.warn(f"{type(self).__name__}: is exact, not fast, since {why}", stacklevel=3)
            return None
        box = {"lo": -torch.inf, "hi": torch.inf} if target.lo is None else {"lo": target.lo, "hi": target.hi}
        random = {"start": "uniform", "restarts": self.num_random_init} if self.num_random_init else {}
        attack = attacks.Attack(type(self).__name__, float(self.eps), targeted=self.targeted,
                                direction="l2" if self.norm == 2 else "sign", **box, **random, **how)
        with torch.inference_mode(False):
            source, result = target.source(), np.empty(x.shape, ART_NUMPY_DTYPE)
            for batch in batches(target, x, targets, None, self.eps, self.eps_step, self.batch_size):
                result[batch.at] = attack(source, batch.clean, batch.labels).cpu().numpy()
        return result

    def _why_exact(self, targets: np.ndarray, mask: np.ndarray | None) -> str | None:
        if mask is not None:
            return "it has a mask"
        if isinstance(self.eps, np.ndarray):
            return "eps is an array"
        one_hot = targets.ndim == 2 and targets.shape[1] > 1 and np.array_equal(targets, targets.astype(bool))
        return None if one_hot else "its labels are not one class each"


def draw_like_loaders(passes: int) -> None:
    """ART passes images through torch's DataLoader, which draws a seed from torch's generator for each pass. Ours does
    not, but draws, so that a training goes on with the numbers that it would have had."""
    for _ in range(passes):
        iter(DataLoader(TensorDataset(torch.empty(1))))
