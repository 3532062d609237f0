"""The numbers' definition in plain PyTorch: what every kernel must reproduce bit for bit."""
import torch
from torch import Tensor

_MASK = 0xFFFFFFFF


def philox(counter: list[Tensor], key: list[Tensor]) -> list[Tensor]:
    """Philox-4x32-10 (Salmon et al., SC'11) on int64 tensors that hold 32-bit words."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        p0, p1 = c0 * 0xD2511F53, c2 * 0xCD9E8D57  # wraps modulo 2^64, as wanted
        c0, c1, c2, c3 = (p1 >> 32 & _MASK) ^ c1 ^ k0, p1 & _MASK, (p0 >> 32 & _MASK) ^ c3 ^ k1, p0 & _MASK
        k0, k1 = k0 + 0x9E3779B9 & _MASK, k1 + 0xBB67AE85 & _MASK
    return [c0, c1, c2, c3]


def halves(v: Tensor) -> tuple[Tensor, Tensor]:
    return v & _MASK, v >> 32 & _MASK


def draw(key: Tensor, block: Tensor, sample: Tensor) -> Tensor:
    """Words [..., 4] of `block` of `sample` (int64, broadcast) under `key`; the layout of API.md, Keys."""
    seed, offset = halves(key[0]), halves(key[1])
    block, sample = torch.broadcast_tensors(block, sample)
    return torch.stack(philox([block & _MASK, sample & _MASK, *map(torch.broadcast_to, offset, [block.shape] * 2)],
                              list(seed)), dim=-1)


def sample_ids(n: int, index: Tensor | None, device: torch.device) -> Tensor:
    return torch.arange(n, device=device) if index is None else index


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.float64 if dtype == torch.float64 else torch.float32


def scalars(value: float | Tensor, x: Tensor) -> Tensor:
    """A number or one per sample, in x's compute dtype, shaped to broadcast over x."""
    dtype = compute_dtype(x.dtype)
    if isinstance(value, Tensor):
        return value.to(dtype).reshape(-1, *[1] * (x.dim() - 1))
    return torch.tensor(value, dtype=dtype, device=x.device)


def _ordered(t: Tensor) -> Tensor:
    """16-bit floats as integers in the order of the numbers; both zeros are 0."""
    bits = t.view(torch.int16).to(torch.int32) & 0xFFFF
    return torch.where(bits >= 0x8000, -(bits & 0x7FFF), bits)


def _unordered(k: Tensor, dtype: torch.dtype) -> Tensor:
    bits = torch.where(k < 0, 0x8000 | -k, k)
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16).view(dtype)


def inward(value: float, dtype: torch.dtype, toward: int) -> Tensor:
    """`value`, rounded to float32, as the nearest 16-bit number on the side `toward` (+1: not below it)."""
    value = torch.tensor(value, dtype=torch.float32)
    k = _ordered(value.to(dtype))
    off = (value.double() - _unordered(k, dtype).double()) * toward > 0
    return k + toward * off


def finish(v: Tensor, center: Tensor, eps: Tensor, lo: float, hi: float, dtype: torch.dtype) -> Tensor:
    """Clamp v to [lo, hi] and round it to `dtype`, no further from `center` than eps (law 1 of the numbers).

    float32 and float64 are the plain expression. 16-bit results are rounded to nearest, then moved to the
    neighbour toward `center` where they left the ball; distances are exact (TwoSum in float64).
    """
    v = v.clamp(scalars(lo, v).item(), scalars(hi, v).item())
    if dtype not in (torch.float16, torch.bfloat16):
        return v
    r, c, eps = v.to(dtype), center.double(), eps.double()
    a = r.double()
    d = a - c
    back = d - a
    e = (a - (d - back)) + (-c - back)
    above = (d > eps) | ((d == eps) & (e > 0))
    below = (d < -eps) | ((d == -eps) & (e < 0))
    k = _ordered(r) - above.int() + below.int()
    k = torch.maximum(k, inward(lo, dtype, +1).to(k))
    k = torch.minimum(k, inward(hi, dtype, -1).to(k))
    return torch.where(v.isnan(), r, _unordered(k, dtype))
