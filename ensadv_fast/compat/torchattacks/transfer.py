"""Attacks along a momentum: MIFGSM, NIFGSM, DIFGSM, TIFGSM, SINIFGSM, VMIFGSM, VNIFGSM."""
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ... import attacks
from ...attacks.transforms import ti
from .gradient import GradientAttack, Iteration, Size

# (point, momentum, is it the last step) -> the gradient that is added to the momentum
Gradient = Callable[[Tensor, Tensor, bool], Tensor]


class MIFGSM(GradientAttack):
    """Sign steps along a momentum of gradients, each divided by its mean absolute value (Dong et al. 2018)."""

    _name = "MIFGSM"

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10,
                 decay: float = 1.0, *, precision: str | None = None):
        super().__init__(type(self)._name, model, eps, precision)
        self.steps = steps
        self.decay = decay
        self.alpha = alpha
        self.supported_mode = ["default", "targeted"]

    def _start(self, iteration: Iteration) -> Tensor:
        return iteration.start_uniformly() if getattr(self, "random_start", False) else iteration.clean

    def _run_exact(self, iteration: Iteration) -> Tensor:
        point, momentum = self._start(iteration), torch.zeros_like(iteration.clean)
        gradient = self._make_gradient(iteration)
        for i in range(self.steps):
            grad = gradient(point, momentum, i == self.steps - 1)
            mean = grad.abs().mean(dim=tuple(range(1, grad.dim())), keepdim=True)
            momentum.mul_(self.decay).add_(grad / mean.masked_fill_(mean == 0, 1))  # no NaN where nothing moves
            point = iteration.sign_step(point, momentum)
        return point

    def _make_gradient(self, iteration: Iteration) -> Gradient:
        """What this attack adds to the momentum; subclasses differ in it."""
        return lambda point, momentum, last: iteration.gradient(point)

    def _look_ahead(self, point: Tensor, momentum: Tensor, iteration: Iteration) -> Tensor:
        """The point where Nesterov's momentum takes the gradient."""
        return point + self.decay * iteration.alpha * momentum

    def _make_fast(self) -> attacks.Attack:
        return self._make(attacks.mifgsm)

    def _make(self, constructor: Callable[..., attacks.Attack], **kw: Any) -> attacks.Attack:
        """Our attack with the options that all attacks along a momentum have."""
        return constructor(float(self.eps), float(self.alpha), self.steps, self.decay, targeted=self.targeted, **kw)


class NIFGSM(MIFGSM):
    """MIFGSM with the gradient taken ahead, at x + decay alpha momentum (Lin et al. 2020)."""

    _name = "NIFGSM"

    def _make_gradient(self, iteration: Iteration) -> Gradient:
        return lambda point, momentum, last: iteration.gradient(self._look_ahead(point, momentum, iteration))

    def _make_fast(self) -> attacks.Attack:
        return self._make(attacks.nifgsm)


class DIFGSM(MIFGSM):
    """MIFGSM on images resized and padded at random, one draw of torch's CPU generator for the batch (Xie et al.
    2019)."""

    _name = "DIFGSM"

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10,
                 decay: float = 0.0, resize_rate: float = 0.9, diversity_prob: float = 0.5,
                 random_start: bool = False, *, precision: str | None = None):
        super().__init__(model, eps, alpha, steps, decay, precision=precision)
        self.resize_rate = resize_rate
        self.diversity_prob = diversity_prob
        self.random_start = random_start

    def input_diversity(self, x: Tensor) -> Tensor:
        """x [N, C, H, W] with probability diversity_prob resized to a random square and padded, else as it is."""
        side = x.shape[-1]
        small, large = sorted((side, int(side * self.resize_rate)))

        def draw(low: int, high: int) -> int:
            return int(torch.randint(low=low, high=high, size=(1,), dtype=torch.int32, device="cpu"))

        size = draw(small, large)
        top, left = draw(0, large - size), draw(0, large - size)
        if not torch.rand(1, device="cpu") < self.diversity_prob:
            return x
        resized = F.interpolate(x, size=[size, size], mode="bilinear", align_corners=False)
        return F.pad(resized, [left, large - size - left, top, large - size - top])

    def _make_gradient(self, iteration: Iteration) -> Gradient:
        return lambda point, momentum, last: iteration.gradient(point, self.input_diversity)

    def _make_fast(self) -> attacks.Attack:
        start = "uniform" if self.random_start else None
        return self._make(attacks.difgsm, rate=self.resize_rate, prob=self.diversity_prob, start=start)

    def _why_exact(self, images: Tensor, labels: Tensor) -> str | None:
        own = type(self).input_diversity is DIFGSM.input_diversity and "input_diversity" not in vars(self)
        return super()._why_exact(images, labels) if own else "input_diversity is overridden"


class TIFGSM(DIFGSM):
    """DIFGSM whose gradients are convolved with a kernel (Dong et al. 2019). kernel_name: "gaussian", "linear" or
    "uniform". len_kernel: its side in pixels. nsig: half of it in standard deviations of the normal."""

    _name = "TIFGSM"

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10,
                 decay: float = 0.0, kernel_name: str = "gaussian", len_kernel: int = 15, nsig: float = 3,
                 resize_rate: float = 0.9, diversity_prob: float = 0.5, random_start: bool = False, *,
                 precision: str | None = None):
        super().__init__(model, eps, alpha, steps, decay, resize_rate, diversity_prob, random_start,
                         precision=precision)
        self.kernel_name = kernel_name
        self.len_kernel = len_kernel
        self.nsig = nsig
        self.stacked_kernel = torch.from_numpy(self.kernel_generation())

    def kernel_generation(self) -> np.ndarray:
        """The kernel for 3 channels, float32 [3, 1, len_kernel, len_kernel], each of sum 1."""
        if self.kernel_name == "gaussian":
            kernel = self.gkern(self.len_kernel, self.nsig)
        elif self.kernel_name == "linear":
            kernel = self.lkern(self.len_kernel)
        elif self.kernel_name == "uniform":
            kernel = self.ukern(self.len_kernel)
        else:
            raise NotImplementedError("TIFGSM: kernel_name must be one of gaussian, linear, uniform, "
                                      f"got {self.kernel_name!r}")
        return np.stack([kernel.astype(np.float32)[None]] * 3)

    def gkern(self, kernlen: int = 15, nsig: float = 3) -> np.ndarray:
        """[kernlen, kernlen], of sum 1: the normal density over [-nsig, nsig]."""
        at = np.linspace(-nsig, nsig, kernlen)
        return _outer(np.exp(-at**2 / 2) / np.sqrt(2 * np.pi))

    def ukern(self, kernlen: int = 15) -> np.ndarray:
        """[kernlen, kernlen], of sum 1: all alike."""
        return np.full((kernlen, kernlen), 1.0) / (kernlen * kernlen)

    def lkern(self, kernlen: int = 15) -> np.ndarray:
        """[kernlen, kernlen], of sum 1: falls linearly from the middle, to 0 one pixel beyond the kernel."""
        return _outer(1 - np.abs(np.linspace((1 - kernlen) / 2, (kernlen - 1) / 2, kernlen) / (kernlen + 1) * 2))

    def _make_gradient(self, iteration: Iteration) -> Gradient:
        channels = iteration.clean.shape[1]
        kernel = self.stacked_kernel[:1].to(iteration.clean).expand(channels, -1, -1, -1)
        diverse = super()._make_gradient(iteration)
        return lambda *step: F.conv2d(diverse(*step), kernel, padding="same", groups=channels)

    def _make_fast(self) -> attacks.Attack:
        start = "uniform" if self.random_start else None
        smooth = ti(self.kernel_name, self.len_kernel, float(self.nsig))
        return self._make(attacks.difgsm, rate=self.resize_rate, prob=self.diversity_prob, start=start,
                          transforms=[smooth])

    def _why_exact(self, images: Tensor, labels: Tensor) -> str | None:
        return "len_kernel is even" if self.len_kernel % 2 == 0 else super()._why_exact(images, labels)


def _outer(row: np.ndarray) -> np.ndarray:
    """The outer product of the row with itself, divided by its sum."""
    kernel = np.outer(row, row)
    return kernel / kernel.sum()


class SINIFGSM(MIFGSM):
    """NIFGSM with the mean gradient over x / 2^i, i < m (Lin et al. 2020)."""

    _name = "SINIFGSM"

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10,
                 decay: float = 1.0, m: int = 5, *, precision: str | None = None):
        super().__init__(model, eps, alpha, steps, decay, precision=precision)
        self.m = m

    def _make_gradient(self, iteration: Iteration) -> Gradient:
        def mean(point: Tensor, momentum: Tensor, last: bool) -> Tensor:
            ahead = self._look_ahead(point, momentum, iteration)
            total = torch.zeros_like(ahead)
            for i in range(self.m):
                total += iteration.gradient(ahead / 2**i).mul_(2.0**-i)
            return total / self.m

        return mean

    def _make_fast(self) -> attacks.Attack:
        return self._make(attacks.sinifgsm, m=self.m)


class VMIFGSM(MIFGSM):
    """MIFGSM with variance tuning (Wang & He 2021). To each step's gradient is added, of the step before, the mean
    gradient at N neighbours, uniform within beta eps, minus that step's own gradient."""

    _name = "VMIFGSM"

    def __init__(self, model: nn.Module, eps: Size = 8 / 255, alpha: Size = 2 / 255, steps: int = 10,
                 decay: float = 1.0, N: int = 5, beta: float = 3 / 2, *, precision: str | None = None):
        super().__init__(model, eps, alpha, steps, decay, precision=precision)
        self.N = N
        self.beta = beta

    def _choose_point(self, point: Tensor, momentum: Tensor, iteration: Iteration) -> Tensor:
        """The point where the step's own gradient is taken."""
        return point

    def _make_gradient(self, iteration: Iteration) -> Gradient:
        tuned = torch.zeros_like(iteration.clean)

        def gradient(point: Tensor, momentum: Tensor, last: bool) -> Tensor:
            own = iteration.gradient(self._choose_point(point, momentum, iteration))
            followed = own + tuned
            total = torch.zeros_like(own)
            for _ in range(self.N):
                # The normal draws only move the generator, as the library's do. After the last step the gradients are
                # not needed, unless a pass in training mode draws random numbers too.
                noise = iteration.draw_uniform(iteration.eps * self.beta, torch.randn_like(iteration.images))
                if not last or self._model_training:
                    total += iteration.gradient(noise.add_(point))
            torch.sub(total / self.N, own, out=tuned)
            return followed

        return gradient

    def _make_fast(self) -> attacks.Attack:
        return self._make(attacks.vmifgsm, n=self.N, beta=self.beta)


class VNIFGSM(VMIFGSM):
    """VMIFGSM with the step's gradient taken ahead, as in NIFGSM (Wang & He 2021)."""

    _name = "VNIFGSM"

    def _choose_point(self, point: Tensor, momentum: Tensor, iteration: Iteration) -> Tensor:
        return self._look_ahead(point, momentum, iteration)

    def _make_fast(self) -> attacks.Attack:
        return self._make(attacks.vnifgsm, n=self.N, beta=self.beta)
