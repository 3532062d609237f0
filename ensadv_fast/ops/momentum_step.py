"""momentum_step: one step of MI-FGSM in two passes."""
import math

import torch
from torch import Tensor

from . import checks, fast_path, memory
from . import reference as ref
from .library import register_fake
from .sign_step import as_step_gradient
from .sign_step import reference as sign_step_reference

call = torch.ops.ensadv_fast.momentum_step.default


def momentum_step(x: Tensor, grad: Tensor, momentum: Tensor, step: float | Tensor, *, decay: float = 1.0,
                  center: Tensor | None = None, eps: float | Tensor | None = None, lo: float = 0.0, hi: float = 1.0,
                  out: Tensor | None = None) -> Tensor:
    """momentum = decay * momentum + grad / mean(abs(grad)), in place, then a sign step along the momentum.

    MI-FGSM (Dong et al. 2018, equations 6 and 7), with the mean over each sample in place of their L1 norm: the two
    differ by a constant factor, on which the sign does not depend. An all-zero or non-finite gradient adds nothing; NaN
    elements count as 0.

    Args:
        x: images [N, ...], float32, float16, bfloat16, float64, or uint8 (level / 255).
        grad: gradient of the loss by x, x's shape; its dtype and memory format may differ. Its scale does not matter.
        momentum: float32 (float64 for float64 x), x's shape; updated in place. Start from zeros.
        step: signed step in image units; negative descends. A number or a tensor [N].
        decay: what the old momentum is multiplied by, finite.
        center, eps, lo, hi, out: as :func:`sign_step`; out may not be momentum.

    Returns:
        As :func:`sign_step`. The sum over a sample is made in float64 in an order that depends on the shape only, so
        that CPU and CUDA agree bit for bit.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted; nothing is changed then.
    """
    sizes = fast_path.fast_step_sizes(x, step, center, eps, lo, hi, grad, momentum, out)
    if sizes and type(decay) is float and math.isfinite(decay):
        result = memory.fresh(x) if out is None else out
        if fast_path.accepted(call, x, grad, momentum, center, *sizes[:2], decay, *sizes[2:], lo, hi,
                              memory.scratch(x, 1), result):
            memory.mark_written(momentum)
            return result if out is None else memory.mark_written(out)
    op = "momentum_step"
    x = checks.images(op, x)
    grad = checks.like(op, "grad", grad, x)
    wanted = torch.float64 if x.dtype == torch.float64 else torch.float32
    checks.output(op, momentum, x, (wanted,), name="momentum")
    step_n, step_1 = checks.per_sample(op, "step", step, x, is_size=False)
    decay = checks.finite(op, "decay", decay)
    center, eps_n, eps_1 = checks.ball(op, center, eps, x)
    checks.output(op, out, x, checks.out_dtypes(x))
    lo, hi = checks.bounds(op, lo, hi, x.dtype if out is None else out.dtype)
    to = memory.Destination(x, out)
    kept = memory.Destination(x, momentum)
    if kept.dense is not momentum:
        kept.dense.copy_(momentum)
    x, grad, center = to.input(x), to.input(as_step_gradient(grad, x)), to.input(center)
    call(x, grad, kept.dense, center, step_n, eps_n, decay, step_1, eps_1, lo, hi, memory.scratch(x, 1), to.dense)
    kept.result()
    return to.result()


def reference(x: Tensor, grad: Tensor, momentum: Tensor, step: float | Tensor, *, decay: float = 1.0,
              center: Tensor | None = None, eps: float | Tensor | None = None, lo: float = 0.0,
              hi: float = 1.0, dtype: torch.dtype | None = None) -> Tensor:
    """The same in plain PyTorch, momentum updated in place too; sums in PyTorch's order."""
    g = grad.to(momentum.dtype).nan_to_num(nan=0.0, posinf=torch.inf, neginf=-torch.inf)
    mean = memory.broadcast(g.abs().flatten(1).double().mean(1).to(momentum.dtype), x)
    usable = (mean > 0) & (mean < torch.inf)
    momentum.mul_(ref.scalars(decay, x)).add_(torch.where(usable, g / mean, 0.0))
    return sign_step_reference(x, momentum, step, center=center, eps=eps, lo=lo, hi=hi, dtype=dtype)


register_fake("momentum_step")
