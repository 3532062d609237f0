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
from .steps import Batch, Norm, Size, Steps, batches, draw_noise
from .target import Target

logger = logging.getLogger(Theirs.__module__)


class FastGradientMethod(Crafting, Theirs):
    """x + eps * sign(grad), or x + eps * grad / norm2(grad) (Goodfellow et al. 2015), with all of ART's arguments.

    precision: "exact", "fast", or None for what :func:`ensadv_fast.compat.precision` chose. ART has no such argument.
    """

    theirs = Theirs
    own_methods = ("_compute", "_compute_perturbation", "_apply_perturbation", "_minimal_perturbation")

    def __init__(self, estimator: Any, norm: Norm = np.inf, eps: Size = 0.3, eps_step: Size = 0.1,
                 targeted: bool = False, num_random_init: int = 0, batch_size: int = 32, minimal: bool = False,
                 summary_writer: Any = False, *, precision: str | None = None):
        Theirs.__init__(self, estimator, norm, eps, eps_step, targeted, num_random_init, batch_size, minimal,
                        summary_writer)
        self.precision = precision

    def _craft(self, target: Target, x: np.ndarray, y: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
        targets = self._choose_targets(target, x, y)
        why = "it looks for the smallest step" if self.minimal else None
        steps = {"step": float(self.eps)} if self.num_random_init and not isinstance(self.eps, np.ndarray) else {}
        fast = self._craft_with_source(target, x, targets, mask, why, **steps)
        if fast is not None:
            return fast
        with target.attacking():
            if self.num_random_init > 1 and not self.minimal:
                return self._take_best_step(target, x, targets, mask)
            if self.minimal:
                adv = self._take_smallest_steps(target, x, targets, mask)
                draw_like_loaders(1 if self.targeted else 2)
            else:
                adv = self._take_step(target, x, targets, mask)
            if logger.isEnabledFor(logging.INFO):
                _log(self._measure_success(target, adv, self._choose_aims(target, x, targets)))
        return adv

    def _take_best_step(self, target: Target, x: np.ndarray, targets: np.ndarray,
                        mask: np.ndarray | None) -> np.ndarray:
        """The step with the highest success rate of those from num_random_init random starts."""
        best, best_rate = x, 0.0
        aims = self._choose_aims(target, x, targets)
        for _ in range(self.num_random_init):
            adv = self._take_step(target, x, targets, mask)
            draw_like_loaders(1 if self.targeted else 2)
            rate = self._measure_success(target, adv, aims)
            if rate > best_rate:
                best, best_rate = adv, rate
        _log(best_rate)
        return best

    def _choose_targets(self, target: Target, x: np.ndarray, y: np.ndarray | None) -> np.ndarray:
        """One weight per class [N, C], of the labels given or of the predictions."""
        classes = self.estimator.nb_classes
        if y is not None:
            y = check_and_transform_label_format(y, nb_classes=classes)
        elif self.targeted:
            raise ValueError("FastGradientMethod: y must be given where targeted, got None")
        else:
            with target.predicting():
                y = get_labels_np_array(self.estimator.predict(x.astype(ART_NUMPY_DTYPE), batch_size=self.batch_size))
        return y / np.sum(y, axis=1, keepdims=True) if classes > 2 else y

    def _cut(self, target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> Iterator[Batch]:
        return batches(target, x, targets, mask, self.eps, self.eps, self.batch_size)

    def _take_step(self, target: Target, x: np.ndarray, targets: np.ndarray, mask: np.ndarray | None) -> np.ndarray:
        """One step for each batch; the random starts of all batches are drawn at once."""
        random = draw_noise(x.shape, self.eps, self.norm) if self.num_random_init else None
        result = np.empty(x.shape, ART_NUMPY_DTYPE)
        for batch in self._cut(target, x, targets, mask):
            steps = Steps(target, batch, self.norm, self.targeted)
            point = batch.clean if random is None else steps.start(random[batch.at])
            result[batch.at] = steps.step(point, steps.gradient(point)).cpu().numpy()
        return result

    def _take_smallest_steps(self, target: Target, x: np.ndarray, targets: np.ndarray,
                             mask: np.ndarray | None) -> np.ndarray:
        """Of the steps of length eps_step, 2 eps_step, ... up to eps the first that fools; the last where none does."""
        result = np.empty(x.shape, ART_NUMPY_DTYPE)
        for batch in self._cut(target, x, targets, mask):
            labels = torch.tensor(targets[batch.at].argmax(1), device=target.device)
            result[batch.at] = self._take_smallest_of(target, batch, labels, len(x)).cpu().numpy()
        return result

    def _take_smallest_of(self, target: Target, batch: Batch, labels: Tensor, n: int) -> Tensor:
        """The same for one batch of the n images. labels: the classes to leave, or where targeted to reach."""
        clean, left = batch.clean, torch.arange(len(batch.clean), device=target.device)
        steps = Steps(target, batch, self.norm, self.targeted)
        direction = steps.write_direction(steps.gradient(clean), torch.empty_like(clean))
        moved, increment = clean.clone(), self.eps_step
        if isinstance(increment, np.ndarray) and increment.ndim == clean.dim() and len(increment) == n:
            increment = increment[batch.at]
        size = increment
        while len(left) and np.all(size <= batch.eps):
            length = Steps(target, batch._replace(step=size), self.norm, self.targeted).length
            step = (direction * length)[left]
            moved[left] = steps.clip(step.add_(clean[left]))
            draw_like_loaders(1)
            left = left[(target.predict(moved[left]) == labels[left]) != self.targeted]
            size = size + increment
        return moved

    def _choose_aims(self, target: Target, x: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """The classes to reach where targeted, else those predicted for the images, to leave."""
        return targets.argmax(1) if self.targeted else self._predict(target, x)

    def _predict(self, target: Target, x: np.ndarray) -> np.ndarray:
        """Classes int [N], predicted batch by batch."""
        parts = [x[i:i + self.batch_size] for i in range(0, len(x), self.batch_size)]
        return torch.cat([target.predict(target.to_images(part)) for part in parts]).cpu().numpy()

    def _measure_success(self, target: Target, adv: np.ndarray, aims: np.ndarray) -> float:
        """The share of images that reach their aim where targeted, else that leave it."""
        return float(np.mean((self._predict(target, adv) == aims) == self.targeted))


def _log(rate: float) -> None:
    logger.info("Success rate of FGM attack: %.2f%%", 100 * rate)
