"""l2_step: one step of the L2 forms of FGM and PGD."""
import torch
from torch import Tensor

from . import checks, fast_path, memory
from . import reference as ref
from .library import register_fake
from .sign_step import as_step_gradient

call = torch.ops.ensadv_fast.l2_step.default


def l2_step(x: Tensor, grad: Tensor, step: float | Tensor, *, center: Tensor | None = None,
            eps: float | Tensor | None = None, lo: float = 0.0, hi: float = 1.0, out: Tensor | None = None) -> Tensor:
    """clip(x + step * grad / norm2(grad), lo, hi), projected first on the L2 ball (center, eps) when given.

    The fast gradient L2 of Kurakin et al. 2017, appendix A; with a ball, one iteration of PGD-L2. Norms are per
    sample. An all-zero or non-finite gradient moves nothing; NaN elements count as 0, and a NaN pixel adds nothing to
    its sample's distance from the center.

    Args:
        x: images [N, ...], float32, float16, bfloat16, float64, or uint8 (level / 255).
        grad: gradient of the loss by x, x's shape; its dtype and memory format may differ. Its scale does not matter.
        step: signed length of the step in image units; negative descends. A number or a tensor [N].
        center, eps: the ball norm2(result - center) <= eps per sample; both or neither. eps >= 0: number or [N].
        lo, hi, out: as :func:`sign_step`.

    Returns:
        As :func:`sign_step`. Distances exceed eps only by rounding: 2^-21 of eps, and 2^-24 for each float32 or
        uint8 element. In 16 bits every element is rounded toward the center. A float32 center may lie between two
        16-bit numbers; such an element may be off by their spacing.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    sizes = fast_path.fast_step_sizes(x, step, center, eps, lo, hi, grad, out)
    if sizes:
        result = memory.fresh(x) if out is None else out
        if fast_path.accepted(call, x, grad, center, *sizes, lo, hi, memory.scratch(x, 2), result):
            return result if out is None else memory.mark_written(out)
    op = "l2_step"
    x = checks.images(op, x)
    grad = as_step_gradient(checks.like(op, "grad", grad, x), x)
    step_n, step_1 = checks.per_sample(op, "step", step, x, is_size=False)
    center, eps_n, eps_1 = checks.ball(op, center, eps, x)
    checks.output(op, out, x, checks.out_dtypes(x))
    lo, hi = checks.bounds(op, lo, hi, x.dtype if out is None else out.dtype)
    return run(x, grad, center, step_n, eps_n, step_1, eps_1, lo, hi, out)


def run(x: Tensor, grad: Tensor | None, center: Tensor | None, step_n: Tensor | None, eps_n: Tensor | None,
        step: float, eps: float, lo: float, hi: float, out: Tensor | None) -> Tensor:
    """The op on checked arguments. Without a gradient it only projects."""
    to = memory.Destination(x, out)
    x, grad, center = to.input(x), to.input(grad), to.input(center)
    call(x, grad, center, step_n, eps_n, step, eps, lo, hi, memory.scratch(x, 2), to.dense)
    return to.result()


def norms(t: Tensor) -> Tensor:
    """L2 norm per sample, in float64, shaped to broadcast."""
    return memory.broadcast(t.flatten(1).double().square().sum(1).sqrt(), t)


def reference(x: Tensor, grad: Tensor, step: float | Tensor, *, center: Tensor | None = None,
              eps: float | Tensor | None = None, lo: float = 0.0, hi: float = 1.0) -> Tensor:
    """The same in plain PyTorch; sums in PyTorch's order."""
    wide = memory.widen(x)
    g = grad.to(wide.dtype).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    norm = norms(g).to(wide.dtype)
    usable = (norm > 0) & (norm < torch.inf)
    v = torch.where(usable, wide + ref.scalars(step, x) * (g / norm), wide)
    return project_reference(v, center, eps, lo, hi, wide, memory.result_dtype(x))


def project_reference(v: Tensor, center: Tensor | None, eps: float | Tensor | None, lo: float, hi: float,
                      x: Tensor, dtype: torch.dtype) -> Tensor:
    """v projected on the ball and rounded to `dtype` toward its center; without a ball, only rounded toward x."""
    if center is None or eps is None:
        return ref.finish(v, x, (v - x).abs(), lo, hi, dtype)
    center = memory.widen(center)
    delta = v - center
    moved = v.double() - center.double()
    length = norms(torch.where(moved.isnan(), 0.0, moved)).to(v.dtype)
    eps = ref.scalars(eps, v)
    shrink = torch.where(length > eps, eps / length, 1.0)
    v = torch.where(shrink != 1, center + delta * shrink, v)
    return ref.finish(v, center, (delta * shrink).abs(), lo, hi, dtype)


register_fake("l2_step")
