"""Projected steps: FGSM, FFGSM, BIM, RFGSM and PGD in the L-inf ball, PGDL2 in the L2 ball."""
import torch
from torch import Tensor, nn

from ... import attacks, ops
from .gradient import GradientAttack, Run, Size, flat


class FGSM(GradientAttack):
    """clamp(x + eps sign(grad), 0, 1) (Goodfellow et al. 2015)."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, *, precision: str | None = None):
        super().__init__("FGSM", model, eps, precision)
        self.supported_mode = ["default", "targeted"]

    def _exact(self, run: Run) -> Tensor:
        return ops.sign_step(run.images, run.gradient(run.images), flat(run.eps))

    def _fast(self) -> attacks.Attack:
        return attacks.fgsm(float(self.eps), targeted=self.targeted)


class FFGSM(GradientAttack):
    """One sign step of alpha from a uniform start in the ball (Wong et al. 2020)."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 10 / 255, *,
                 precision: str | None = None):
        super().__init__("FFGSM", model, eps, precision)
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def _exact(self, run: Run) -> Tensor:
        noise = run.noise_uniform(run.eps, torch.randn_like(run.images))  # the normal draws move the generator
        point = noise.add_(run.clean).clamp_(0, 1)
        return run.sign_step(point, run.gradient(point))

    def _fast(self) -> attacks.Attack:
        return attacks.Attack("ffgsm", float(self.eps), start="uniform", step=float(self.alpha), targeted=self.targeted)


class _Steps(GradientAttack):
    """Sign steps of alpha, each projected."""

    def __init__(self, name: str, model: nn.Module, eps: Size, alpha: Size, steps: int, precision: str | None):
        super().__init__(name, model, eps, precision)
        self.alpha = alpha
        self.steps = steps

    def _start(self, run: Run) -> Tensor:
        return run.clean

    def _exact(self, run: Run) -> Tensor:
        point = self._start(run)
        for _ in range(self.steps):
            point = run.sign_step(point, run.gradient(point))
        return point


class BIM(_Steps):
    """The basic iterative method (Kurakin et al. 2017). steps 0: int(min(255 eps + 4, 1.25 * 255 eps))."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10, *,
                 precision: str | None = None):
        steps = int(min(eps * 255 + 4, 1.25 * eps * 255)) if steps == 0 else steps
        super().__init__("BIM", model, eps, alpha, steps, precision)
        self.supported_mode = ["default", "targeted"]

    def _exact(self, run: Run) -> Tensor:
        point = run.clean
        for _ in range(self.steps):  # the library's comparisons are the kernel's min and max, to the bit
            point = ops.sign_step(point, run.gradient(point), flat(run.alpha), center=run.clean, eps=flat(run.eps),
                                  out=None if point is run.clean else point)
        return point

    def _fast(self) -> attacks.Attack:
        return attacks.ifgsm(float(self.eps), float(self.alpha), self.steps, targeted=self.targeted)


class RFGSM(_Steps):
    """Sign steps of alpha from x + alpha sign(N(0, I)). With steps 1 and alpha eps / 2 it is R+FGSM (Tramer et al.
    2018)."""

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10, *,
                 precision: str | None = None):
        super().__init__("RFGSM", model, eps, alpha, steps, precision)
        self.supported_mode = ["default", "targeted"]

    def _start(self, run: Run) -> Tensor:
        return torch.randn_like(run.images).sign_().to(run.clean.dtype).mul_(run.alpha).add_(run.clean).clamp_(0, 1)

    def _fast(self) -> attacks.Attack:
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

    def _start(self, run: Run) -> Tensor:
        return run.uniform_start() if self.random_start else run.clean

    def _fast(self) -> attacks.Attack:
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

    def _start(self, run: Run) -> Tensor:
        if not self.random_start:
            return run.clean
        noise = torch.empty_like(run.images).normal_()
        norms = _norms(noise)
        lengths = torch.zeros_like(norms).uniform_(0, 1)
        noise = noise.to(run.clean.dtype).mul_((lengths / norms).to(run.clean.dtype) * run.eps)
        return noise.add_(run.clean).clamp_(0, 1)

    def _exact(self, run: Run) -> Tensor:
        point = self._start(run)
        for _ in range(self.steps):
            grad = run.gradient(point)
            grad = grad / (_norms(grad) + self.eps_for_division)
            delta = grad.mul_(run.alpha).add_(point).sub_(run.clean)
            norms = _norms(delta)
            delta *= torch.where(norms > run.eps, run.eps / norms, 1.0)  # no NaN where both are 0
            point = delta.add_(run.clean).clamp_(0, 1)
        return point

    def _fast(self) -> attacks.Attack:
        return attacks.pgd_l2(float(self.eps), float(self.alpha), self.steps, self.random_start,
                              targeted=self.targeted)


def _norms(t: Tensor) -> Tensor:
    """L2 norm per sample, shaped to broadcast."""
    return torch.linalg.vector_norm(t.flatten(1), dim=1).view(-1, *[1] * (t.dim() - 1))
