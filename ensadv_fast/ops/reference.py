"""The definition of the numbers in plain PyTorch, which every kernel must reproduce bit for bit."""
import math

import torch
from torch import Tensor

from .memory import broadcast, compute_dtype

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
    """The low and the high 32 bits of int64 numbers."""
    return v & _MASK, v >> 32 & _MASK


def draw(key: Tensor, block: Tensor, sample: Tensor) -> Tensor:
    """Words [..., 4] of `block` of `sample` (int64, broadcast against each other) under `key`.

    Philox key = (seed low, seed high); counter words = (block, sample, offset low, offset high), as in
    csrc/kernels/philox.h.
    """
    seed, offset = halves(key[0]), halves(key[1])
    block, sample = torch.broadcast_tensors(block, sample)
    return torch.stack(philox([block & _MASK, sample & _MASK, *map(torch.broadcast_to, offset, [block.shape] * 2)],
                              list(seed)), dim=-1)


def sample_ids(n: int, index: Tensor | None, device: torch.device) -> Tensor:
    return torch.arange(n, device=device) if index is None else index


def scalars(value: float | Tensor, x: Tensor) -> Tensor:
    """A number, or a tensor [N], in x's compute dtype, shaped to broadcast over x."""
    dtype = compute_dtype(x.dtype)
    if isinstance(value, Tensor):
        return broadcast(value.to(dtype), x)
    return torch.tensor(value, dtype=dtype, device=x.device)


def pack_bits(flags: Tensor) -> Tensor:
    """bool [..., n] as uint8 [..., ceil(n / 8)]: bit i % 8 of byte i / 8; bits beyond n are 0."""
    bits = torch.nn.functional.pad(flags, (0, -flags.shape[-1] % 8)).unflatten(-1, (-1, 8))
    return (bits << torch.arange(8, device=flags.device)).sum(-1).to(torch.uint8)


def unpack_bits(packed: Tensor, n: int) -> Tensor:
    """The inverse of :func:`pack_bits`: bool [..., n]."""
    bits = packed[..., None] >> torch.arange(8, dtype=torch.uint8, device=packed.device) & 1
    return bits.flatten(-2)[..., :n].bool()


def _ordered(t: Tensor) -> Tensor:
    """16-bit floats as integers that are ordered as the floats are; both zeros are 0."""
    bits = t.view(torch.int16).to(torch.int32) & 0xFFFF
    return torch.where(bits >= 0x8000, -(bits & 0x7FFF), bits)


def _unordered(k: Tensor, dtype: torch.dtype) -> Tensor:
    """The inverse of :func:`_ordered`: floats of `dtype`."""
    bits = torch.where(k < 0, 0x8000 | -k, k)
    return torch.where(bits >= 0x8000, bits - 0x10000, bits).to(torch.int16).view(dtype)


def inward(value: float, dtype: torch.dtype, toward: int) -> Tensor:
    """float32(value) rounded to the nearest 16-bit number on one side of it (toward +1: not below; -1: not above).

    The result is an integer in the order of :func:`_ordered`.
    """
    exact = torch.tensor(value, dtype=torch.float32, device="cpu")
    k = _ordered(exact.to(dtype))
    off = (exact.double() - _unordered(k, dtype).double()) * toward > 0
    return k + toward * off


def clamp_open(v: Tensor, lo: float | None = None, hi: float | None = None) -> Tensor:
    """v.clamp(lo, hi), with gradient 1 where nothing was cut, the ends included, and 0 elsewhere (also for NaN).

    torch.clamp passed the gradient at its ends in version 2.13 and no longer does in 2.15. The gradient here must not
    change with the version: images have many pixels at exactly 0 and 1.
    """
    cut = v.detach().clamp(lo, hi)
    return torch.where(v.detach() == cut, v, cut)


def finish(v: Tensor, center: Tensor, eps: Tensor, lo: float, hi: float, dtype: torch.dtype) -> Tensor:
    """Clamp v to [lo, hi] and round it to `dtype`, no further from `center` than eps (docs/design.md, law 1).

    float32 and float64 results are the plain expression. uint8 results are the nearest of the levels allowed. 16-bit
    results are rounded to nearest, then moved to the neighbour toward `center` where rounding took them out of the
    ball. Distances are exact (TwoSum in float64).
    """
    if dtype == torch.uint8:
        return _finish_levels(v, center, eps, lo, hi)
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


def _finish_levels(v: Tensor, center: Tensor, eps: Tensor, lo: float, hi: float) -> Tensor:
    level = (center * 255 + 0.5).floor()
    reach = (eps * 255).clamp(0, 255).floor()
    low, high = (min(max(255 * float(b), 0), 255) for b in (lo, hi))
    v = torch.where(v.isnan(), center, v.clamp(0, 1))
    k = torch.minimum(torch.maximum((v * 255 + 0.5).floor(), level - reach), level + reach)
    return k.clamp(math.ceil(low - 1e-4), math.floor(high + 1e-4)).to(torch.uint8)


def quantile(q: Tensor) -> Tensor:
    """Phi^-1(1/2 + q) in float32: Wichura's AS 241, PPND7 (Applied Statistics 37, 1988), step by step as kernels do."""
    a = q.abs()
    r = 0.180625 - q * q
    central = q * _poly(r, 59.109374720, 159.29113202, 50.434271938, 3.3871327179) / _poly(
        r, 67.187563600, 78.757757664, 17.895169469, 1.0)
    # In float64, because torch's float32 square root is not always the nearest number.
    t = (-_log(0.5 - a)).double().sqrt().float() - 1.6
    tail = _poly(t, 0.17023821103, 1.3067284816, 2.7568153900, 1.4234372777) / _poly(
        t, 0.12021132975, 0.73700164250, 1.0)
    return torch.where(a <= 0.425, central, torch.where(q < 0, -tail, tail))


def _poly(x: Tensor, *coefficients: float) -> Tensor:
    value = torch.full_like(x, coefficients[0])
    for c in coefficients[1:]:
        value = value * x + c
    return value


def _log(x: Tensor) -> Tensor:
    """log x for normal float32 x > 0 (Cephes' polynomial), in the steps of the kernels."""
    u = x.view(torch.int32) - 0x3F3504F3
    e = (u >> 23).float()
    m = ((u & 0x007FFFFF) + 0x3F3504F3).view(torch.float32) - 1
    p = _poly(m, 7.0376836292e-2, -1.1514610310e-1, 1.1676998740e-1, -1.2420140846e-1, 1.4249322787e-1,
              -1.6668057665e-1, 2.0000714765e-1, -2.4999993993e-1, 3.3333331174e-1)
    square = m * m
    return m + (m * square * p - 2.12194440e-4 * e - 0.5 * square) + 0.693359375 * e
