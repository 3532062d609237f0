"""The attacks by name: each chooses start, label, direction, steps and transforms of the one loop.

All take the keywords rule, targeted, loss, kappa, lo and hi; the iterative ones transforms, momentum, nesterov and
variance too, in free combination: :class:`ensadv_fast.Attack` says what they mean. Sizes are in image units (8/255).
"""
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .auto_attack import AutoAttack, autoattack
from .base import BaseAttack
from .cw import CwLinf, cw_linf
from .gradient import Attack
from .options import IterativeOptions, Options
from .request import AttackResult
from .transforms import Transform, di, si, ti, vt

if TYPE_CHECKING:
    from typing_extensions import Unpack  # of typing from Python 3.11 on

__all__ = [
    "Attack", "AttackResult", "AutoAttack", "BaseAttack", "CwLinf", "autoattack", "cw_linf", "difgsm", "fast_entropy",
    "fast_grad_l2", "fast_grad_linf", "fgsm", "ifgsm", "iter_ll", "mifgsm", "nifgsm", "pgd", "pgd_l2", "rand_fgsm",
    "rand_step_ll", "random_normal", "random_sign", "sinifgsm", "step_ll", "step_rnd", "tifgsm", "vmifgsm", "vnifgsm",
]


def fgsm(eps: float = 8 / 255, **kw: "Unpack[Options]") -> Attack:
    """Fast gradient sign method: x + eps * sign(grad) (Goodfellow et al. 2015; Tramer et al. 2018, equation 2)."""
    return Attack("fgsm", eps, **kw)


def rand_fgsm(eps: float = 8 / 255, alpha: float | None = None, clip_start: bool = True,
              **kw: "Unpack[Options]") -> Attack:
    """R+FGSM: x1 = x + alpha * sign(N(0, I)), then x1 + (eps - alpha) * sign(grad at x1) (Tramer et al. 2018,
    equation 4). alpha None: eps / 2, as on ImageNet; the MNIST code has 0.05 for eps 0.3. clip_start: clip x1 to the
    box before the gradient, as the MNIST code does."""
    return Attack("rand_fgsm", eps, start="rademacher", alpha=alpha, clip_start=clip_start, **kw)


def step_ll(eps: float = 8 / 255, **kw: "Unpack[Options]") -> Attack:
    """Step-LL: x - eps * sign(grad) toward the least likely class (Kurakin et al. 2017, equation 2)."""
    return Attack("step_ll", eps, **_over(kw, rule="least_likely", targeted=True))


def rand_step_ll(eps: float = 8 / 255, alpha: float | None = None, clip_start: bool = True,
                 **kw: "Unpack[Options]") -> Attack:
    """R+Step-LL: the random start of R+FGSM, then Step-LL; the least likely class is the clean image's."""
    return Attack("rand_step_ll", eps, start="rademacher", alpha=alpha, clip_start=clip_start,
                  **_over(kw, rule="least_likely", targeted=True))


def step_rnd(eps: float = 8 / 255, **kw: "Unpack[Options]") -> Attack:
    """One step toward a class drawn uniformly from those other than the label (Kurakin et al. 2017, section 2.2)."""
    return Attack("step_rnd", eps, **_over(kw, rule="random", targeted=True))


def ifgsm(eps: float = 8 / 255, step: float | None = None, steps: int | None = None,
          **kw: "Unpack[IterativeOptions]") -> Attack:
    """Basic iterative method: clip_{x, eps}(x + step * sign(grad)), repeated (Kurakin et al. 2017, section 2.2).
    step None: 1/255; steps None: min(eps + 4, 1.25 eps) in units of 1/255, rounded down. The MNIST code of Tramer
    et al. takes 10 steps of eps / 10."""
    return Attack("ifgsm", eps, step=1 / 255 if step is None else step, steps=steps, **_over(kw))


def iter_ll(eps: float = 8 / 255, step: float | None = None, steps: int | None = None,
            **kw: "Unpack[IterativeOptions]") -> Attack:
    """The basic iterative method toward the least likely class of the clean image (Kurakin et al. 2017)."""
    return Attack("iter_ll", eps, step=1 / 255 if step is None else step, steps=steps,
                  **_over(kw, rule="least_likely", targeted=True))


def pgd(eps: float = 8 / 255, step: float | None = None, steps: int = 10, random_start: bool = True,
        restarts: int = 1, **kw: "Unpack[IterativeOptions]") -> Attack:
    """Projected gradient descent (Madry et al. 2018): uniform start in the ball, projected sign steps. step None:
    2.5 * eps / steps. With restarts > 1 the worst example is kept per sample. loss="cw" is the PGD of Tramer et al.
    2018's black-box suite."""
    return _steps("pgd", eps, step, steps, 2.5, start="uniform" if random_start else None, restarts=restarts, **kw)


def pgd_l2(eps: float = 0.5, step: float | None = None, steps: int = 10, random_start: bool = True,
           restarts: int = 1, **kw: "Unpack[IterativeOptions]") -> Attack:
    """PGD in the L2 ball (Madry et al. 2018, appendix): steps along grad / norm2(grad). The start is uniform in the
    ball (torchattacks draws its length, not its volume, uniformly: nearer the center). step None: 2.5 * eps / steps."""
    return _steps("pgd_l2", eps, step, steps, 2.5, start="uniform" if random_start else None, restarts=restarts,
                  direction="l2", **kw)


def mifgsm(eps: float = 16 / 255, step: float | None = None, steps: int = 10, decay: float = 1.0,
           **kw: "Unpack[IterativeOptions]") -> Attack:
    """MI-FGSM: sign steps along a momentum of mean-normalised gradients (Dong et al. 2018, equations 6 and 7).
    step None: eps / steps. decay: of the momentum, where the keyword momentum does not say otherwise."""
    return _steps("mifgsm", eps, step, steps, **_over(kw, momentum=decay))


def nifgsm(eps: float = 16 / 255, step: float | None = None, steps: int = 10, decay: float = 1.0,
           **kw: "Unpack[IterativeOptions]") -> Attack:
    """NI-FGSM: MI-FGSM with the gradient taken at x + step * decay * momentum (Lin et al. 2020, equations 6 and 7)."""
    return _steps("nifgsm", eps, step, steps, **_over(kw, momentum=decay, nesterov=True))


def difgsm(eps: float = 16 / 255, step: float | None = None, steps: int = 10, decay: float = 1.0, rate: float = 1.1,
           prob: float = 0.5, per_sample: bool = False, **kw: "Unpack[IterativeOptions]") -> Attack:
    """M-DI2-FGSM: MI-FGSM on images resized and padded at random (Xie et al. 2019, equations 5 to 7); see :func:`di`.
    decay=0: DI2-FGSM."""
    return _steps("difgsm", eps, step, steps, **_with(kw, di(rate, prob, per_sample), momentum=decay))


def tifgsm(eps: float = 16 / 255, step: float | None = None, steps: int = 10, decay: float = 1.0,
           kernel: str = "gaussian", size: int = 15, nsig: float = 3.0, **kw: "Unpack[IterativeOptions]") -> Attack:
    """TI-MI-FGSM: the gradient is convolved with a kernel (Dong et al. 2019, equation 8); see :func:`ti`.
    torchattacks' TIFGSM has input diversity in it: here, TI-DIM is ``difgsm(transforms=[ti()])``."""
    return _steps("tifgsm", eps, step, steps, **_with(kw, ti(kernel, size, nsig), momentum=decay))


def sinifgsm(eps: float = 16 / 255, step: float | None = None, steps: int = 10, decay: float = 1.0, m: int = 5,
             **kw: "Unpack[IterativeOptions]") -> Attack:
    """SI-NI-FGSM: NI-FGSM with the mean gradient over x / 2^i, i < m (Lin et al. 2020, algorithm 1); see :func:`si`."""
    return _steps("sinifgsm", eps, step, steps, **_with(kw, si(m), momentum=decay, nesterov=True))


def vmifgsm(eps: float = 16 / 255, step: float | None = None, steps: int = 10, decay: float = 1.0, n: int = 20,
            beta: float = 1.5, **kw: "Unpack[IterativeOptions]") -> Attack:
    """VMI-FGSM: MI-FGSM with variance tuning (Wang & He 2021, algorithm 1); see :func:`vt`. n is the paper's 20
    (torchattacks has 5)."""
    return _steps("vmifgsm", eps, step, steps, **_over(kw, momentum=decay, variance=vt(n, beta)))


def vnifgsm(eps: float = 16 / 255, step: float | None = None, steps: int = 10, decay: float = 1.0, n: int = 20,
            beta: float = 1.5, **kw: "Unpack[IterativeOptions]") -> Attack:
    """VNI-FGSM: NI-FGSM with variance tuning, the neighbours being x's (Wang & He 2021, and the authors' code)."""
    return _steps("vnifgsm", eps, step, steps,
                  **_over(kw, momentum=decay, nesterov=True, variance=vt(n, beta)))


def fast_grad_l2(eps: float = 8 / 255, **kw: "Unpack[Options]") -> Attack:
    """x + eps * grad / norm2(grad): the control of Kurakin et al. 2017, appendix A. eps is an L2 norm."""
    return Attack("fast_grad_l2", eps, direction="l2", **kw)


def fast_grad_linf(eps: float = 8 / 255, **kw: "Unpack[Options]") -> Attack:
    """x + eps * grad / max(abs(grad)): the control of Kurakin et al. 2017, appendix A."""
    return Attack("fast_grad_linf", eps, direction="max", **kw)


def fast_entropy(eps: float = 8 / 255, **kw: "Unpack[Options]") -> Attack:
    """One sign step that increases the entropy of the predicted distribution (Kurakin et al. 2017, appendix A). It
    looks at no label; where info is asked for, the label is that of the rule and the loss is the entropy."""
    return Attack("fast_entropy", eps, **_over(kw, loss="entropy"))


def random_sign(eps: float = 8 / 255, **kw: "Unpack[Options]") -> Attack:
    """x + eps * sign(N(0, I)): the control of Kurakin et al. 2017, appendix A. No model is looked at, but for
    return_info: then one forward pass on the result (and one on x where the rule's label needs it)."""
    return Attack("random_sign", eps, start="rademacher", **_over(kw, loss=None))


def random_normal(eps: float = 8 / 255, **kw: "Unpack[Options]") -> Attack:
    """x + T, T truncated normal of standard deviation eps / 2 cut at eps: the control of Kurakin et al. 2017, appendix
    A. As :func:`random_sign`, it looks at no model."""
    return Attack("random_normal", eps, start="truncated_normal", **_over(kw, loss=None))


def _steps(name: str, eps: float, step: float | None, steps: int, over_eps: float = 1.0, **kw: Any) -> Attack:
    """step None: over_eps * eps / steps."""
    share = None if step is not None else over_eps / max(1, steps)
    return Attack(name, eps, steps=steps, step=step, step_over_eps=share, **kw)


def _over(kw: Mapping[str, Any], **defaults: Any) -> dict[str, Any]:
    """kw over defaults."""
    return {**defaults, **kw}


def _with(kw: Mapping[str, Any], transform: Transform, **defaults: Any) -> dict[str, Any]:
    """kw over defaults, with one transform more."""
    return {**defaults, **kw, "transforms": (transform, *kw.get("transforms", ()))}
