"""Projected gradient descent, the basic iterative method and the momentum iterative method."""
import logging
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import numpy as np
import torch
from art.attacks.evasion.iterative_method import BasicIterativeMethod as TheirBasic
from art.attacks.evasion.momentum_iterative_method import MomentumIterativeMethod as TheirMomentum
from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent import (
    ProjectedGradientDescent as TheirDescent,
)
from art.attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch import (
    ProjectedGradientDescentPyTorch as Theirs,
)
from art.config import ART_NUMPY_DTYPE
from torch import Tensor
from tqdm.auto import tqdm

from .crafting import Crafting, Precise, draw_like_loaders
from .steps import Batch, Norm, Size, Steps, batches, noise
from .target import Target

logger = logging.getLogger(Theirs.__module__)


class _Loader:
    """Batches as ART's DataLoader gives them: the progress bar, too, asks for an iterator, and so draws."""

    def __init__(self, n: int, size: int, cut: Callable[[int], Iterator[Batch]]):
        self.n, self.size, self.cut = n, size, cut

    def __iter__(self) -> Iterator[Batch]:
        draw_like_loaders(1)
        return self.cut(self.size)

    def __len__(self) -> int:
        return -(-self.n // self.size)


class ProjectedGradientDescentPyTorch(Crafting, Theirs):
    """Steps of eps_step, each projected on the ball of eps (Madry et al. 2018), on a PyTorchClassifier; with decay
    along a momentum (Dong et al. 2018), and with all of ART's arguments.

    precision: "exact", "fast" or None, what :func:`ensadv_fast.compat.precision` chose. Ours alone.
    """

    theirs = Theirs
    own_methods = ("_generate_batch", "_compute_pytorch", "_compute_perturbation_pytorch",
                   "_apply_perturbation_pytorch", "_projection")

    def __init__(self, estimator: Any, norm: Norm = np.inf, eps: Size = 0.3, eps_step: Size = 0.1,
                 decay: float | None = None, max_iter: int = 100, targeted: bool = False, num_random_init: int = 0,
                 batch_size: int = 32, random_eps: bool = False, summary_writer: Any = False, verbose: bool = True, *,
                 precision: str | None = None):
        Theirs.__init__(self, estimator, norm, eps, eps_step, decay, max_iter, targeted, num_random_init, batch_size,
                        random_eps, summary_writer, verbose)
        self.precision = precision

    def _generated(self, target: Target, x: np.ndarray, y: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
        self._random_eps()
        with target.predicting():
            targets = self._set_targets(x.astype(ART_NUMPY_DTYPE), y)
        why = "it takes no step" if self.max_iter < 1 else None
        how = {} if isinstance(self.eps_step, np.ndarray) else {"step": float(self.eps_step)}
        fast = self._with_source(target, x, targets, mask, why, steps=max(1, self.max_iter), momentum=self.decay, **how)
        if fast is not None:
            return fast
        result, fooled = np.empty(x.shape, ART_NUMPY_DTYPE), 0
        with target.attacking():
            cut = partial(batches, target, x, targets, mask, self.eps, self.eps_step)
            parts = _Loader(len(x), self.batch_size, cut)
            for batch in tqdm(parts, desc="PGD - Batches", leave=False, disable=not self.verbose):
                aims = torch.tensor(targets[batch.at].argmax(1), device=target.device) if self.targeted else None
                adv, success = self._worst_of(target, batch, aims)
                result[batch.at] = adv.cpu().numpy()
                fooled += 0 if success is None else int(success.sum())
        checked_runs = 1 + len(parts) * (max(1, self.num_random_init) - 1)
        draw_like_loaders(checked_runs * (1 if self.targeted else 2))
        if logger.isEnabledFor(logging.INFO):
            logger.info("Success rate of attack: %.2f%%", 100 * fooled / len(x))
        return result

    def _worst_of(self, target: Target, batch: Batch, aims: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """The last of the runs that succeeded, per sample, else the first; and whether any did, where that is asked."""
        adv, success = self._run(target, batch), None
        asked = self.num_random_init > 1 or logger.isEnabledFor(logging.INFO)
        if asked and aims is None:
            aims = target.predicted(batch.clean)
        for number in range(max(1, self.num_random_init)):
            run = adv if number == 0 else self._run(target, batch)
            if asked:
                met = (target.predicted(run) == aims) == self.targeted
                success = met if success is None else success | met
                adv = torch.where(met.view(-1, *[1] * (adv.dim() - 1)), run, adv)
        return adv, success

    def _run(self, target: Target, batch: Batch) -> Tensor:
        steps = Steps(target, batch, self.norm, self.targeted)
        point, momentum = batch.clean, None if self.decay is None else torch.zeros_like(batch.clean)
        if self.num_random_init and self.max_iter:
            point = steps.started(noise(tuple(point.shape), batch.eps, self.norm))
        for _ in range(self.max_iter):
            grad = steps.gradient(point)
            if momentum is not None:
                steps.accumulate(grad, momentum, self.decay)
            point = steps.step(point, grad if momentum is None else momentum)
        return point


class ProjectedGradientDescent(Precise, TheirDescent):
    """Projected gradient descent (Madry et al. 2018) on any estimator: on a PyTorchClassifier by
    :class:`ProjectedGradientDescentPyTorch` of ours, elsewhere by ART's own.

    precision: "exact", "fast" or None, what :func:`ensadv_fast.compat.precision` chose. Ours alone.
    """

    def __init__(self, estimator: Any, norm: Norm = np.inf, eps: Size = 0.3, eps_step: Size = 0.1,
                 decay: float | None = None, max_iter: int = 100, targeted: bool = False, num_random_init: int = 0,
                 batch_size: int = 32, random_eps: bool = False, summary_writer: Any = False, verbose: bool = True, *,
                 precision: str | None = None):
        TheirDescent.__init__(self, estimator, norm, eps, eps_step, decay, max_iter, targeted, num_random_init,
                              batch_size, random_eps, summary_writer, verbose)
        self._compute_by_ours(precision)

    def _compute_by_ours(self, precision: str | None) -> None:
        """Give the attack that ART chose our class, if we have one for it: with its arguments, and its writer."""
        if type(self._attack) is Theirs:
            self._attack.__class__ = ProjectedGradientDescentPyTorch
        self.precision = precision

    def _choose(self, which: str | None) -> None:
        super()._choose(which)
        if isinstance(self._attack, Crafting):
            self._attack.precision = which


class BasicIterativeMethod(ProjectedGradientDescent, TheirBasic):
    """The basic iterative method (Kurakin et al. 2017): sign steps, each projected. precision: ours alone."""

    def __init__(self, estimator: Any, eps: Size = 0.3, eps_step: Size = 0.1, max_iter: int = 100,
                 targeted: bool = False, batch_size: int = 32, verbose: bool = True, *, precision: str | None = None):
        TheirBasic.__init__(self, estimator, eps, eps_step, max_iter, targeted, batch_size, verbose)
        self._compute_by_ours(precision)


class MomentumIterativeMethod(ProjectedGradientDescent, TheirMomentum):
    """Steps along a momentum of gradients over their L1 norms (Dong et al. 2018). precision: ours alone."""

    def __init__(self, estimator: Any, norm: Norm = np.inf, eps: Size = 0.3, eps_step: Size = 0.1,
                 decay: float = 1.0, max_iter: int = 100, targeted: bool = False, batch_size: int = 32,
                 verbose: bool = True, *, precision: str | None = None):
        TheirMomentum.__init__(self, estimator, norm, eps, eps_step, decay, max_iter, targeted, batch_size, verbose)
        self._compute_by_ours(precision)
