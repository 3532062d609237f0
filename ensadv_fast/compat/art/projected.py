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

from ...ops.memory import broadcast
from .crafting import Crafting, Precise, draw_like_loaders
from .steps import Batch, Norm, Size, Steps, batches, draw_noise
from .target import Target

logger = logging.getLogger(Theirs.__module__)


class _Loader:
    """The batches of ART's DataLoader, which draws from torch's generator whenever an iterator is asked for."""

    def __init__(self, n: int, size: int, cut: Callable[[int], Iterator[Batch]]):
        self.n, self.size, self.cut = n, size, cut

    def __iter__(self) -> Iterator[Batch]:
        draw_like_loaders(1)
        return self.cut(self.size)

    def __len__(self) -> int:
        return -(-self.n // self.size)


class ProjectedGradientDescentPyTorch(Crafting, Theirs):
    """Steps of eps_step, each projected on the ball of eps (Madry et al. 2018), on a PyTorchClassifier, with all of
    ART's arguments. Where `decay` is given, the steps follow a momentum (Dong et al. 2018).

    precision: "exact", "fast", or None for what :func:`ensadv_fast.compat.precision` chose. ART has no such argument.
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

    def _craft(self, target: Target, x: np.ndarray, y: np.ndarray | None, mask: np.ndarray | None) -> np.ndarray:
        self._random_eps()
        with target.predicting():
            targets = self._set_targets(x.astype(ART_NUMPY_DTYPE), y)
        why = "it takes no step" if self.max_iter < 1 else None
        how = {} if isinstance(self.eps_step, np.ndarray) else {"step": float(self.eps_step)}
        fast = self._craft_with_source(target, x, targets, mask, why, steps=max(1, self.max_iter), momentum=self.decay,
                                       **how)
        if fast is not None:
            return fast
        result, fooled = np.empty(x.shape, ART_NUMPY_DTYPE), 0
        with target.attacking():
            cut = partial(batches, target, x, targets, mask, self.eps, self.eps_step)
            parts = _Loader(len(x), self.batch_size, cut)
            for batch in tqdm(parts, desc="PGD - Batches", leave=False, disable=not self.verbose):
                aims = torch.tensor(targets[batch.at].argmax(1), device=target.device) if self.targeted else None
                adv, success = self._run_restarts(target, batch, aims)
                result[batch.at] = adv.cpu().numpy()
                fooled += 0 if success is None else int(success.sum())
        checked_runs = 1 + len(parts) * (max(1, self.num_random_init) - 1)
        draw_like_loaders(checked_runs * (1 if self.targeted else 2))
        if logger.isEnabledFor(logging.INFO):
            logger.info("Success rate of attack: %.2f%%", 100 * fooled / len(x))
        return result

    def _run_restarts(self, target: Target, batch: Batch, aims: Tensor | None) -> tuple[Tensor, Tensor | None]:
        """For each sample the last run that succeeded, else the first; and whether any did (bool [N]).

        The second is None where nobody needs it: there is one run, and no log.
        """
        adv, success = self._run(target, batch), None
        asked = self.num_random_init > 1 or logger.isEnabledFor(logging.INFO)
        if asked and aims is None:
            aims = target.predict(batch.clean)
        for number in range(max(1, self.num_random_init)):
            run = adv if number == 0 else self._run(target, batch)
            if asked:
                succeeded = (target.predict(run) == aims) == self.targeted
                success = succeeded if success is None else success | succeeded
                adv = torch.where(broadcast(succeeded, adv), run, adv)
        return adv, success

    def _run(self, target: Target, batch: Batch) -> Tensor:
        """One run of all steps on a batch."""
        steps = Steps(target, batch, self.norm, self.targeted)
        point, momentum = batch.clean, None if self.decay is None else torch.zeros_like(batch.clean)
        if self.num_random_init and self.max_iter:
            point = steps.start(draw_noise(tuple(point.shape), batch.eps, self.norm))
        for _ in range(self.max_iter):
            grad = steps.gradient(point)
            if momentum is not None:
                steps.accumulate(grad, momentum, self.decay)
            point = steps.step(point, grad if momentum is None else momentum)
        return point


class ProjectedGradientDescent(Precise, TheirDescent):
    """Projected gradient descent (Madry et al. 2018) on any estimator: by our
    :class:`ProjectedGradientDescentPyTorch` on a PyTorchClassifier, elsewhere by ART's own class.

    precision: "exact", "fast", or None for what :func:`ensadv_fast.compat.precision` chose. ART has no such argument.
    """

    def __init__(self, estimator: Any, norm: Norm = np.inf, eps: Size = 0.3, eps_step: Size = 0.1,
                 decay: float | None = None, max_iter: int = 100, targeted: bool = False, num_random_init: int = 0,
                 batch_size: int = 32, random_eps: bool = False, summary_writer: Any = False, verbose: bool = True, *,
                 precision: str | None = None):
        TheirDescent.__init__(self, estimator, norm, eps, eps_step, decay, max_iter, targeted, num_random_init,
                              batch_size, random_eps, summary_writer, verbose)
        self._use_our_class(precision)

    def _use_our_class(self, precision: str | None) -> None:
        """Turn the attack that ART chose into ours where we have its class; its arguments and writer stay."""
        if type(self._attack) is Theirs:
            self._attack.__class__ = ProjectedGradientDescentPyTorch
        self.precision = precision

    def _set_precision(self, which: str | None) -> None:
        super()._set_precision(which)
        if isinstance(self._attack, Crafting):
            self._attack.precision = which


class BasicIterativeMethod(ProjectedGradientDescent, TheirBasic):
    """The basic iterative method (Kurakin et al. 2017): sign steps, each projected. ART has no `precision`."""

    def __init__(self, estimator: Any, eps: Size = 0.3, eps_step: Size = 0.1, max_iter: int = 100,
                 targeted: bool = False, batch_size: int = 32, verbose: bool = True, *, precision: str | None = None):
        TheirBasic.__init__(self, estimator, eps, eps_step, max_iter, targeted, batch_size, verbose)
        self._use_our_class(precision)


class MomentumIterativeMethod(ProjectedGradientDescent, TheirMomentum):
    """Steps along a momentum of gradients, each divided by its L1 norm (Dong et al. 2018). ART has no `precision`."""

    def __init__(self, estimator: Any, norm: Norm = np.inf, eps: Size = 0.3, eps_step: Size = 0.1,
                 decay: float = 1.0, max_iter: int = 100, targeted: bool = False, batch_size: int = 32,
                 verbose: bool = True, *, precision: str | None = None):
        TheirMomentum.__init__(self, estimator, norm, eps, eps_step, decay, max_iter, targeted, batch_size, verbose)
        self._use_our_class(precision)
