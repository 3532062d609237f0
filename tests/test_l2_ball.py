"""How far l2_step may leave its ball, in float64: its documented bounds, for every dtype that it reads and writes."""
import pytest
import torch

from ensadv_fast import ops

SPACING = {torch.float16: 2.0 ** -10, torch.bfloat16: 2.0 ** -7}  # of numbers in [1, 2)
CASES = [(torch.float32, torch.float32), (torch.float16, torch.float16), (torch.bfloat16, torch.bfloat16),
         (torch.uint8, torch.uint8), (torch.float32, torch.float16), (torch.float32, torch.bfloat16),
         (torch.uint8, torch.float32), (torch.float64, torch.float64)]


def exact(images: torch.Tensor) -> torch.Tensor:
    return images.double() / 255 if images.dtype == torch.uint8 else images.double()


def drawn(generator, n: int, dtype, near: torch.Tensor | None, spread: float) -> torch.Tensor:
    values = torch.rand(4, n, generator=generator, dtype=torch.float64)
    if near is not None:
        values = (exact(near) + spread * torch.randn(4, n, generator=generator, dtype=torch.float64)).clamp(0, 1)
    return (values * 255).round().to(dtype) if dtype == torch.uint8 else values.to(dtype)


def bound(result: torch.Tensor, center: torch.Tensor, eps: torch.Tensor) -> torch.Tensor:
    """eps [4] and what rounding may add to it."""
    dtype = center.dtype
    if dtype == torch.float64:
        return eps * (1 + 2.0 ** -48) + 2.0 ** -52 * result.shape[1] ** 0.5
    close = eps * (1 + 2.0 ** -21)
    if result.dtype == dtype and dtype in SPACING:
        return close  # center and result are of one 16-bit dtype: every element is rounded toward the center
    rounded = torch.full_like(exact(result), 2.0 ** -24)  # pixels are moved and compared in float32
    if result.dtype in SPACING:  # a float32 center may lie anywhere between two numbers of the result's dtype
        _, exponent = torch.frexp(torch.maximum(exact(result), exact(center)).clamp(min=2.0 ** -14))
        rounded += SPACING[result.dtype] * 2.0 ** (exponent.double() - 1)
    return close + rounded.norm(dim=1)


@pytest.mark.parametrize("dtype,to", CASES)
def test_results_stay_in_the_ball(dtype, to):
    generator = torch.Generator().manual_seed(0)
    for case in range(240):
        n = (1, 10, 100, 3072)[case % 4]
        center = drawn(generator, n, dtype, None, 0.0)
        x = drawn(generator, n, dtype, center, (1e-3, 0.02, 0.3)[case // 4 % 3])
        eps = torch.rand(4, generator=generator, dtype=torch.float64) * (0.05, 0.5, 3.0)[case // 12 % 3]
        wide = torch.float64 if dtype == torch.float64 else torch.float32
        grad = torch.randn(4, n, generator=generator, dtype=wide)
        result = ops.l2_step(x, grad, (0.01, 0.3, -3.0)[case % 3], center=center, eps=eps.to(wide),
                             out=torch.empty(4, n, dtype=to))
        length = (exact(result) - exact(center)).norm(dim=1)
        assert (length <= bound(result, center, eps.to(wide).double())).all(), (case, length, eps)
