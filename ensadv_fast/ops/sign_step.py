"""sign_step: one step of FGSM, I-FGSM and PGD in one pass."""
import torch
from torch import Tensor

from . import _checks as check
from . import _reference as ref
from ._library import register_fake


def sign_step(x: Tensor, grad: Tensor, step: float | Tensor, *, center: Tensor | None = None,
              eps: float | Tensor | None = None, lo: float = 0.0, hi: float = 1.0,
              out: Tensor | None = None) -> Tensor:
    """clip(x + step * sign(grad), lo, hi), projected first on the L-inf ball (center, eps) when given.

    Goodfellow et al. 2015; equation 2 of Tramer et al. 2018 (FGSM), equation 1 of Kurakin et al. 2017; with a
    ball, one iteration of the basic iterative method and of PGD (Madry et al. 2018).

    Args:
        x: images [N, ...], float32, float16, bfloat16 or float64, contiguous or channels_last without a copy.
        grad: gradient of the loss by x, x's shape; its dtype and memory format may differ. sign(0) = 0, and NaN
            counts as 0.
        step: signed step in the units of x; negative descends (targeted attacks). A number or a tensor [N].
        center, eps: the ball |result - center| <= eps; both or neither. eps >= 0: a number or a tensor [N].
        lo, hi: range of valid pixels. It holds exactly and wins over the ball where the center lies outside it.
        out: written and returned where given; x's shape and device, x's dtype or, for float32 x, a 16-bit one. It
            may be x, grad or center.

    Returns:
        A tensor of x's dtype and memory format, without autograd history. float32 and float64 results are bit
        for bit ``min(max(x + step*sign(grad), center - eps), center + eps).clamp(lo, hi)``; 16-bit results never
        exceed float32(eps) (without a ball: |step|) from the center (x), rounded toward it where they must be.
        As in PyTorch, numbers are rounded to float32 first, and used as they are for float64 x.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    op = "sign_step"
    x = check.images(op, x)
    grad = check.like(op, "grad", grad, x)
    step_n, step_1 = check.per_sample(op, "step", step, x, size=False)
    if (center is None) != (eps is None):
        raise ValueError(f"{op}: center and eps go together, got only {'eps' if center is None else 'center'}")
    eps_n, eps_1 = (None, 0.0) if eps is None else check.per_sample(op, "eps", eps, x, size=True)
    dtypes = (x.dtype, *check.NARROW) if x.dtype == torch.float32 else (x.dtype,)
    if center is not None:
        center = check.like(op, "center", center, x, (x.dtype,))
    if out is not None:
        check.output(op, out, x, dtypes)
    lo, hi = check.bounds(op, lo, hi, x.dtype if out is None else out.dtype)
    if (grad.dtype == torch.float64) != (x.dtype == torch.float64):
        # Only the sign counts, and it must survive: a small double would be zero as a float.
        grad = (grad.sign() if grad.dtype == torch.float64 else grad).to(x.dtype)
    to = check.Destination(x, out)
    x, grad, center = to.inputs(x, grad, center)
    torch.ops.ensadv_fast.sign_step(x, grad, center, step_n, eps_n, step_1, eps_1, lo, hi, to.dense)
    return to.result()


def reference(x: Tensor, grad: Tensor, step: float | Tensor, *, center: Tensor | None = None,
              eps: float | Tensor | None = None, lo: float = 0.0, hi: float = 1.0,
              dtype: torch.dtype | None = None) -> Tensor:
    """The same in plain PyTorch; `dtype` is that of the result (default: x's)."""
    dtype = dtype or x.dtype
    wide = x.to(ref.compute_dtype(x.dtype))
    step = ref.scalars(step, x)
    v = wide + step * grad.nan_to_num(nan=0.0).sign().to(wide.dtype)
    if center is None:
        return ref.finish(v, wide, step.abs(), lo, hi, dtype)
    center, eps = center.to(wide.dtype), ref.scalars(eps, x)
    v = torch.minimum(torch.maximum(v, center - eps), center + eps)
    return ref.finish(v, center, eps, lo, hi, dtype)


register_fake("sign_step")
