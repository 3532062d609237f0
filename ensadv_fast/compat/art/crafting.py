"""What our ART attacks share: the choice between ART's own code, exact steps and our engine."""
import warnings
from typing import Any

import numpy as np
import torch
from art.attacks import EvasionAttack
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification.pytorch import PyTorchClassifier
from torch.utils.data import DataLoader, TensorDataset

from ... import attacks
from ..precisions import check_precision, is_fast
from .steps import batches
from .target import Target


class Precise:
    """The attribute that our attacks have and ART's have not."""

    _precision: str | None = None

    @property
    def precision(self) -> str | None:
        """"exact", "fast", or None for what :func:`ensadv_fast.compat.precision` chose. ART has none."""
        return self._precision

    @precision.setter
    def precision(self, which: str | None) -> None:
        self._set_precision(check_precision(type(self).__name__, which))

    def _set_precision(self, which: str | None) -> None:
        self._precision = which


class Crafting(EvasionAttack, Precise):  # ART's class first: Python then lets an ART object become one of ours
    """The first base of our attacks; the second is ART's class of the same attack, ``theirs``.

    own_methods: ART's methods whose work our code does. Where a subclass overrides one of them, ART's code runs.
    """

    theirs: type
    own_methods: tuple[str, ...] = ()

    def generate(self, x: np.ndarray, y: np.ndarray | None = None, **kwargs: Any) -> np.ndarray:
        """Adversarial images float32 [N, ...] for images x [N, ...].

        y: labels, int [N] or one weight per class [N, C]; None: the predictions. mask: an array that broadcasts over x;
        pixels where it is 0 stay. Raises what ART raises.
        """
        if not self._is_ours(x):
            return super().generate(x, y, **kwargs)
        mask = self._get_mask(x, **kwargs)
        self._check_compatibility_input_and_eps(x=x)
        return self._craft(Target(self.estimator, x), x, y, mask)

    def _craft(self, target: Target, x: np.ndarray, y: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
        """What :meth:`generate` returns, of checked arguments."""
        raise NotImplementedError

    def _is_ours(self, x: np.ndarray) -> bool:
        """Can our code compute what ART would?"""
        estimator = self.estimator
        return (isinstance(estimator, PyTorchClassifier) and estimator.all_framework_preprocessing
                and type(estimator).loss_gradient is PyTorchClassifier.loss_gradient
                and not estimator.use_amp and x.dtype != object and len(x) > 0 and self.summary_writer is None
                and self.norm in (np.inf, "inf", 2)
                and all(getattr(type(self), m) is getattr(self.theirs, m) for m in self.own_methods))

    def _craft_with_source(self, target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None,
                           why: str | None, **how: Any) -> np.ndarray | None:
        """Adversarial images by our engine, or None: exact is chosen, or a warning says why our engine cannot do it.

        why: a reason against our engine that the caller knows, or None. how: further options of
        :class:`ensadv_fast.attacks.Attack`.
        """
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
            source, result = target.get_source(), np.empty(x.shape, ART_NUMPY_DTYPE)
            for batch in batches(target, x, targets, None, self.eps, self.eps_step, self.batch_size):
                result[batch.at] = attack(source, batch.clean, batch.labels).cpu().numpy()
        return result

    def _why_exact(self, targets: np.ndarray, mask: np.ndarray | None) -> str | None:
        """What in these arguments our engine cannot do, or None."""
        if mask is not None:
            return "it has a mask"
        if isinstance(self.eps, np.ndarray):
            return "eps is an array"
        one_hot = targets.ndim == 2 and targets.shape[1] > 1 and np.array_equal(targets, targets.astype(bool))
        return None if one_hot else "its labels are not one class each"


def draw_like_loaders(passes: int) -> None:
    """Draw the seeds that torch's DataLoader would draw from torch's generator in so many passes over the images.

    ART passes images through such a loader and our code does not. A training that calls an attack then goes on with the
    random numbers that it would have had.
    """
    for _ in range(passes):
        iter(DataLoader(TensorDataset(torch.empty(1))))
