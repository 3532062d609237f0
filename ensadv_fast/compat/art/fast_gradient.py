"""The fast gradient method."""
import logging
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from art.attacks.evasion.fast_gradient import FastGradientMethod as Theirs
from art.config import ART_NUMPY_DTYPE
from art.utils import check_and_transform_label_format, get_labels_np_array
from torch import Tensor

from .crafting import Crafting, draw_like_loaders
from .steps import Batch, Norm, Size, Steps, batches, noise
from .target import Target

logger = logging.getLogger(Theirs.__module__)


class FastGradientMethod(Crafting, Theirs):
    """x + eps * sign(grad), or eps * grad / norm2(grad) (Goodfellow et al. 2015), with all of ART's arguments.

    precision: "exact", "fast" or None, what :func:`ensadv_fast.compat.precision` chose. Ours alone.
    """

    theirs = Theirs
    own_methods = ("_compute", "_compute_perturbation", "_apply_perturbation", "_minimal_perturbation")

    def __init__(self, estimator: Any, norm: Norm = np.inf, eps: Size = 0.3, eps_step: Size = 0.1,
                 targeted: bool = False, num_random_init: int = 0, batch_size: int = 32, minimal: bool = False,
                 summary_writer: Any = False, *, precision: str | None = None):
        Theirs.__init__(self, estimator, norm, eps, eps_step, targeted, num_random_init, batch_size, minimal,
                        summary_writer)
        self.precision = precision

    def _generated(self, target: Target, x: np.ndarray, y: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
        targets = self._targets(target, x, y)
        why = "it looks for the smallest step" if self.minimal else None
        steps = {"step": float(self.eps)} if self.num_random_init and not isinstance(self.eps, np.ndarray) else {}
        fast = self._with_source(target, x, targets, mask, why, **steps)
        if fast is not None:
            return fast
        with target.attacking():
            if self.minimal:
                adv = self._smallest(target, x, targets, mask)
                draw_like_loaders(1 if self.targeted else 2)
                return self._logged(target, x, targets, adv)
            if self.num_random_init < 2:
                return self._logged(target, x, targets, self._crafted(target, x, targets, mask))
            best, best_rate = x, 0.0
            aims = self._aims(target, x, targets)
            for _ in range(self.num_random_init):
                adv = self._crafted(target, x, targets, mask)
                draw_like_loaders(1 if self.targeted else 2)
                rate = self._rate(target, adv, aims)
                if rate > best_rate:
                    best, best_rate = adv, rate
            logger.info("Success rate of FGM attack: %.2f%%", 100 * best_rate)
        return best

    def _targets(self, target: Target, x: np.ndarray, y: np.ndarray | None) -> np.ndarray:
        """One weight per class: the labels', or the predictions'."""
        classes = self.estimator.nb_classes
        if y is not None:
            y = check_and_transform_label_format(y, nb_classes=classes)
        elif self.targeted:
            raise ValueError("FastGradientMethod: y must be given where targeted, got None")
        else:
            with target.predicting():
                y = get_labels_np_array(self.estimator.predict(x.astype(ART_NUMPY_DTYPE), batch_size=self.batch_size))
        return y / np.sum(y, axis=1, keepdims=True) if classes > 2 else y

    def _batches(self, target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> Iterator[Batch]:
        return batches(target, x, targets, mask, self.eps, self.eps, self.batch_size)

    def _crafted(self, target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """One step for each batch; a random start is drawn for all of them at once."""
        random = noise(x.shape, self.eps, self.norm) if self.num_random_init else None
        result = np.empty(x.shape, ART_NUMPY_DTYPE)
        for batch in self._batches(target, x, targets, mask):
            steps = Steps(target, batch, self.norm, self.targeted)
            point = batch.clean if random is None else steps.started(random[batch.at])
            result[batch.at] = steps.step(point, steps.gradient(point)).cpu().numpy()
        return result

    def _smallest(self, target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """The first of the steps of eps_step, 2 eps_step, ... up to eps that fools; the last where none does."""
        result = np.empty(x.shape, ART_NUMPY_DTYPE)
        for batch in self._batches(target, x, targets, mask):
            labels = torch.tensor(targets[batch.at].argmax(1), device=target.device)
            result[batch.at] = self._smallest_of(target, batch, labels, len(x)).cpu().numpy()
        return result

    def _smallest_of(self, target: Target, batch: Batch, labels: Tensor, n: int) -> Tensor:
        clean, left = batch.clean, torch.arange(len(batch.clean), device=target.device)
        steps = Steps(target, batch, self.norm, self.targeted)
        direction = steps.direct(steps.gradient(clean), torch.empty_like(clean))
        moved, increment = clean.clone(), self.eps_step
        if isinstance(increment, np.ndarray) and increment.ndim == clean.dim() and len(increment) == n:
            increment = increment[batch.at]
        size = increment
        while len(left) and np.all(size <= batch.eps):
            length = Steps(target, batch._replace(step=size), self.norm, self.targeted).length
            step = (direction * length)[left]
            moved[left] = steps._clipped(step.add_(clean[left]))
            draw_like_loaders(1)
            left = left[(target.predicted(moved[left]) == labels[left]) != self.targeted]
            size = size + increment
        return moved

    def _aims(self, target: Target, x: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The classes to reach where targeted, else those predicted for the images, to leave."""
        return targets.argmax(1) if self.targeted else self._predicted(target, x)

    def _predicted(self, target: Target, x: np.ndarray) -> np.ndarray:
        parts = [target.predicted(target.images(x[i:i + self.batch_size])) for i in range(0, len(x), self.batch_size)]
        return torch.cat(parts).cpu().numpy()

    def _rate(self, target: Target, adv: np.ndarray, aims: np.ndarray) -> float:
        return float(np.mean((self._predicted(target, adv) == aims) == self.targeted))

    def _logged(self, target: Target, x: np.ndarray, targets: np.ndarray, adv: np.ndarray) -> np.ndarray:
        if logger.isEnabledFor(logging.INFO):
            rate = self._rate(target, adv, self._aims(target, x, targets))
            logger.info("Success rate of FGM attack: %.2f%%", 100 * rate)
        return adv
