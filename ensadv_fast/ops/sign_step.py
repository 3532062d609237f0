"""sign_step: one step of FGSM, I-FGSM and PGD in one pass."""
import torch
from torch import Tensor

from . import checks, fast_path, memory
from . import reference as ref
from .library import register_fake

call = torch.ops.ensadv_fast.sign_step.default


def sign_step(x: Tensor, grad: Tensor, step: float | Tensor, *, center: Tensor | None = None,
              eps: float | Tensor | None = None, lo: float = 0.0, hi: float = 1.0,
              out: Tensor | None = None) -> Tensor:
    """clip(x + step * sign(grad), lo, hi), projected first on the L-inf ball (center, eps) when given.

    FGSM (Goodfellow et al. 2015; equation 2 of Tramer et al. 2018, equation 1 of Kurakin et al. 2017); with a ball,
    one iteration of the basic iterative method and of PGD (Madry et al. 2018).

    Args:
        x: images [N, ...], float32, float16, bfloat16, float64, or uint8 (level / 255). Contiguous and channels_last
            need no copy.
        grad: gradient of the loss by x, x's shape; its dtype and memory format may differ. sign(0) = 0, and NaN
            counts as 0.
        step: signed step in the units of x; negative descends (targeted attacks). A number or a tensor [N].
        center, eps: the ball |result - center| <= eps; both or neither. eps >= 0: a number or a tensor [N].
        lo, hi: range of valid pixels. It holds exactly, and wins over the ball where the center lies outside of it.
        out: written and returned where given; x's shape and device, x's dtype, or 16-bit or uint8 for float32 x. It may
            be x, grad or center.

    Returns:
        A tensor of x's dtype (float32 for uint8 x) and memory format, without autograd history. float32 and float64
        results are bit for bit ``min(max(x + step*sign(grad), center - eps), center + eps).clamp(lo, hi)``; 16-bit
        results are at most float32(eps) from the center, and rounded toward it where the nearest number would not be
        (without a ball: |step| from x); uint8 results (out) are at most floor(255 eps) levels from it. As in PyTorch,
        the numbers given are rounded to float32 first, and used as they are for float64 x.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    sizes = fast_path.fast_step_sizes(x, step, center, eps, lo, hi, grad, out)
    if sizes:
        result = memory.fresh(x) if out is None else out
        if fast_path.accepted(call, x, grad, center, *sizes, lo, hi, result):
            return result if out is None else memory.mark_written(out)
    op = "sign_step"
    x = checks.images(op, x)
    grad = checks.like(op, "grad", grad, x)
    step_n, step_1 = checks.per_sample(op, "step", step, x, is_size=False)
    center, eps_n, eps_1 = checks.ball(op, center, eps, x)
    checks.output(op, out, x, checks.out_dtypes(x))
    lo, hi = checks.bounds(op, lo, hi, x.dtype if out is None else out.dtype)
    if grad.dtype == torch.float64 != x.dtype:
        grad = grad.sign()  # a small float64 would become 0 as float32 and lose its sign
    to = memory.Destination(x, out)
    x, grad, center = to.input(x), to.input(as_step_gradient(grad, x)), to.input(center)
    call(x, grad, center, step_n, eps_n, step_1, eps_1, lo, hi, to.dense)
    return to.result()


def as_step_gradient(grad: Tensor, x: Tensor) -> Tensor:
    """The gradient in a dtype that the kernels take beside x: float64 for float64 x, and never for another x."""
    if x.dtype == torch.float64:
        return grad.double()
    return grad.float() if grad.dtype == torch.float64 else grad


def reference(x: Tensor, grad: Tensor, step: float | Tensor, *, center: Tensor | None = None,
              eps: float | Tensor | None = None, lo: float = 0.0, hi: float = 1.0,
              dtype: torch.dtype | None = None) -> Tensor:
    """The same in plain PyTorch; `dtype` is that of the result (default: x's)."""
    dtype = dtype or memory.result_dtype(x)
    wide = memory.widen(x)
    step = ref.scalars(step, x)
    v = wide + step * grad.nan_to_num(nan=0.0).sign().to(wide.dtype)
    if center is None or eps is None:
        return ref.finish(v, wide, step.abs(), lo, hi, dtype)
    center, eps = memory.widen(center), ref.scalars(eps, x)
    v = torch.minimum(torch.maximum(v, center - eps), center + eps)
    return ref.finish(v, center, eps, lo, hi, dtype)


register_fake("sign_step")
