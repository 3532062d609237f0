"""Projected steps: FGSM, FFGSM, BIM, RFGSM and PGD in the L-inf ball, PGDL2 in the L2 ball."""
import torch
from torch import Tensor, nn

from ... import attacks, ops
from ..steps import sample_norms
from .gradient import GradientAttack, Iteration, Size, flatten_size


class FGSM(GradientAttack):
    """clamp(x + eps sign(grad), 0, 1) (Goodfellow et al. 2015)."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, *, precision: str | None = None):
        super().__init__("FGSM", model, eps, precision)
        self.supported_mode = ["default", "targeted"]

    def _run_exact(self, iteration: Iteration) -> Tensor:
        return ops.sign_step(iteration.images, iteration.gradient(iteration.images), flatten_size(iteration.eps))

    def _make_fast(self) -> attacks.Attack:
        return attacks.fgsm(float(self.eps), targeted=self.targeted)


class FFGSM(GradientAttack):
    """One sign step of alpha from a uniform start in the ball (Wong et al. 2020)."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 10 / 255, *,
                 precision: str | None = None):
        super().__init__("FFGSM", model, eps, precision)
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def _run_exact(self, iteration: Iteration) -> Tensor:
        # The normal draws move the generator as the library's do.
        noise = iteration.draw_uniform(iteration.eps, torch.randn_like(iteration.images))
        point = noise.add_(iteration.clean).clamp_(0, 1)
        return iteration.sign_step(point, iteration.gradient(point))

    def _make_fast(self) -> attacks.Attack:
        return attacks.Attack("ffgsm", float(self.eps), start="uniform", step=float(self.alpha), targeted=self.targeted)


class _Steps(GradientAttack):
    """Sign steps of alpha, each projected."""

    def __init__(self, name: str, model: nn.Module, eps: Size, alpha: Size, steps: int, precision: str | None):
        super().__init__(name, model, eps, precision)
        self.alpha = alpha
        self.steps = steps

    def _start(self, iteration: Iteration) -> Tensor:
        """The point of the first step: the images, unless a subclass says otherwise."""
        return iteration.clean

    def _run_exact(self, iteration: Iteration) -> Tensor:
        point = self._start(iteration)
        for _ in range(self.steps):
            point = iteration.sign_step(point, iteration.gradient(point))
        return point


class BIM(_Steps):
    """The basic iterative method (Kurakin et al. 2017). steps 0: int(min(255 eps + 4, 1.25 * 255 eps))."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10, *,
                 precision: str | None = None):
        steps = int(min(eps * 255 + 4, 1.25 * eps * 255)) if steps == 0 else steps
        super().__init__("BIM", model, eps, alpha, steps, precision)
        self.supported_mode = ["default", "targeted"]

    def _run_exact(self, iteration: Iteration) -> Tensor:
        clean, alpha, eps = iteration.clean, flatten_size(iteration.alpha), flatten_size(iteration.eps)
        point = clean
        for _ in range(self.steps):  # the library's comparisons give the bits of the kernel's min and max
            point = ops.sign_step(point, iteration.gradient(point), alpha, center=clean, eps=eps,
                                  out=None if point is clean else point)
        return point

    def _make_fast(self) -> attacks.Attack:
        return attacks.ifgsm(float(self.eps), float(self.alpha), self.steps, targeted=self.targeted)


class RFGSM(_Steps):
    """Sign steps of alpha from x + alpha sign(N(0, I)). With steps 1 and alpha eps / 2 it is R+FGSM (Tramer et al.
    2018)."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10, *,
                 precision: str | None = None):
        super().__init__("RFGSM", model, eps, alpha, steps, precision)
        self.supported_mode = ["default", "targeted"]

    def _start(self, iteration: Iteration) -> Tensor:
        noise = torch.randn_like(iteration.images).sign_().to(iteration.clean.dtype)
        return noise.mul_(iteration.alpha).add_(iteration.clean).clamp_(0, 1)

    def _make_fast(self) -> attacks.Attack:
        return attacks.Attack("rfgsm", float(self.eps), start="rademacher", alpha=float(self.alpha),
                              step=float(self.alpha), steps=self.steps, targeted=self.targeted)

    def _why_exact(self, images: Tensor, labels: Tensor) -> str | None:
        why = super()._why_exact(images, labels)
        return "alpha exceeds eps" if why is None and self.alpha > self.eps else why


class PGD(_Steps):
    """Projected gradient descent (Madry et al. 2018), from a uniform start in the ball."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10,
                 random_start: bool = True, *, precision: str | None = None):
        super().__init__("PGD", model, eps, alpha, steps, precision)
        self.random_start = random_start
        self.supported_mode = ["default", "targeted"]

    def _start(self, iteration: Iteration) -> Tensor:
        return iteration.start_uniformly() if self.random_start else iteration.clean

    def _make_fast(self) -> attacks.Attack:
        return attacks.pgd(float(self.eps), float(self.alpha), self.steps, self.random_start, targeted=self.targeted)


class PGDL2(_Steps):
    """Projected gradient descent in the L2 ball (Madry et al. 2018): steps along grad / (norm2(grad) +
    eps_for_division). The start has a normal's direction and a length uniform in [0, eps]; a fast one is uniform in
    the ball."""

    norm = "l2"

    def __init__(self, model: nn.Module, eps: Size = 1.0, alpha: Size = 0.2, steps: int = 10,
                 random_start: bool = True, eps_for_division: float = 1e-10, *, precision: str | None = None):
        super().__init__("PGDL2", model, eps, alpha, steps, precision)
        self.random_start = random_start
        self.eps_for_division = eps_for_division
        self.supported_mode = ["default", "targeted"]

    def _start(self, iteration: Iteration) -> Tensor:
        if not self.random_start:
            return iteration.clean
        noise = torch.empty_like(iteration.images).normal_()
        norms = sample_norms(noise)
        lengths = torch.zeros_like(norms).uniform_(0, 1)
        noise = noise.to(iteration.clean.dtype).mul_((lengths / norms).to(iteration.clean.dtype) * iteration.eps)
        return noise.add_(iteration.clean).clamp_(0, 1)

    def _run_exact(self, iteration: Iteration) -> Tensor:
        point = self._start(iteration)
        for _ in range(self.steps):
            grad = iteration.gradient(point)
            grad = grad / (sample_norms(grad) + self.eps_for_division)
            delta = grad.mul_(iteration.alpha).add_(point).sub_(iteration.clean)
            norms = sample_norms(delta)
            delta *= torch.where(norms > iteration.eps, iteration.eps / norms, 1.0)  # no NaN where both are 0
            point = delta.add_(iteration.clean).clamp_(0, 1)
        return point

    def _make_fast(self) -> attacks.Attack:
        return attacks.pgd_l2(float(self.eps), float(self.alpha), self.steps, self.random_start,
                              targeted=self.targeted)
