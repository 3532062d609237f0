"""project: back onto the ball and into [lo, hi], by the kernels of sign_step and l2_step with a step of 0."""
import torch
from torch import Tensor

from . import checks, fast_path, memory
from .l2_step import call as l2_call
from .l2_step import project_reference
from .l2_step import run as l2_run
from .sign_step import call as sign_step_call
from .sign_step import reference as sign_step_reference

NORMS = ("linf", "l2")


def project(x: Tensor, center: Tensor, eps: float | Tensor, *, norm: str = "linf", lo: float = 0.0, hi: float = 1.0,
            out: Tensor | None = None) -> Tensor:
    """The point of the ball (center, eps) nearest to x, clipped to [lo, hi].

    Args:
        x: images [N, ...], float32, float16, bfloat16, float64, or uint8 (level / 255).
        center: x's shape and dtype.
        eps: radius in image units, >= 0: a number or a tensor [N].
        norm: "linf", or "l2" (per sample).
        lo, hi, out: as :func:`sign_step`.

    Returns:
        As :func:`sign_step`; with norm "l2" as :func:`l2_step`.

    Raises:
        TypeError, ValueError: naming the argument, what came and what is wanted.
    """
    sizes = fast_path.fast_step_sizes(x, 0.0, center, eps, lo, hi, out)
    if sizes and center is not None and norm in NORMS and x.dtype != torch.uint8:
        result = torch.empty_like(x) if out is None else out
        if norm == "l2":
            done = fast_path.accepted(l2_call, x, None, center, *sizes, lo, hi, memory.scratch(x, 2), result)
        else:
            done = fast_path.accepted(sign_step_call, x, x, center, *sizes, lo, hi, result)
        if done:
            return result if out is None else memory.mark_written(out)
    op = "project"
    x = checks.images(op, x)
    checks.choice(op, "norm", norm, NORMS)
    ball, eps_n, eps_1 = checks.ball(op, center, eps, x)
    if ball is None:
        raise TypeError(f"{op}: center must be a torch.Tensor, got None")
    checks.output(op, out, x, checks.out_dtypes(x))
    lo, hi = checks.bounds(op, lo, hi, x.dtype if out is None else out.dtype)
    if norm == "l2":
        return l2_run(x, None, ball, None, eps_n, 0.0, eps_1, lo, hi, out)
    to = memory.Destination(x, out)
    x, center = to.input(x), to.input(ball)
    grad = x if x.dtype != torch.uint8 else torch.zeros_like(x, dtype=torch.float16)  # not followed: the step is 0
    sign_step_call(x, grad, center, None, eps_n, 0.0, eps_1, lo, hi, to.dense)
    return to.result()


def reference(x: Tensor, center: Tensor, eps: float | Tensor, *, norm: str = "linf", lo: float = 0.0,
              hi: float = 1.0) -> Tensor:
    """The same in plain PyTorch."""
    if norm == "linf":
        return sign_step_reference(x, torch.zeros_like(x, dtype=torch.float32), 0.0, center=center, eps=eps, lo=lo,
                                   hi=hi)
    wide = memory.widen(x)
    return project_reference(wide, center, eps, lo, hi, wide, memory.result_dtype(x))
