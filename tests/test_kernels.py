"""Layer 1 without torch: the CPU kernels on numpy arrays, against independent numpy and exact arithmetic.

Runs under the sanitizers too (.ci/sanitize), where ENSADV_EXAMPLES asks for fewer random examples.
"""
import math
from fractions import Fraction
from functools import cache
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels_arrays import (
    DTYPES,
    INF,
    NAN,
    NARROW,
    RAW,
    SPECIALS,
    WIDE,
    Output,
    batches,
    cast,
    compute,
    examples,
    gradients,
    images,
    infinity,
    kernels,
    nearest,
    numbers,
    ref,
    same,
    values,
)

KINDS = ("rademacher", "uniform", "truncated_normal", "normal")
# (x, grad, out): out in x's dtype, or narrower than a float32 iterate, or float32 for uint8 images.
STEP_DTYPES = [("float64",) * 3, *((x, g, o) for x, o in [*((t, t) for t in DTYPES if t != "float64"),
                                                          ("float32", "float16"), ("float32", "bfloat16"),
                                                          ("float32", "uint8"), ("uint8", "float32")]
                                   for g in ("float32", *NARROW))]


@pytest.fixture(autouse=True)
def quiet_numpy():
    """References meet NaN and overflow on purpose."""
    with np.errstate(all="ignore"):
        yield


# ---- references --------------------------------------------------------------------------------------------------

def exact(v: float) -> Fraction:
    return Fraction(float(v))


def order(bits: int) -> int:
    return -(bits & 0x7FFF) if bits & 0x8000 else int(bits)


def pattern(k: int) -> int:
    return 0x8000 | -k if k < 0 else k


def box_ends(lo: float, hi: float, dtype: str) -> tuple[int, int]:
    """The outermost 16-bit numbers inside [float32(lo), float32(hi)], as positions on the line of all of them."""
    lo, hi = float(np.float32(lo)), float(np.float32(hi))
    table, inf = numbers(dtype), infinity(dtype)
    inside = [k for k in range(-inf, inf + 1) if lo <= table[pattern(k)] <= hi]
    return inside[0], inside[-1]


box_ends = cache(box_ends)


def finish_exact(v, center, eps, lo: float, hi: float, dtype: str) -> np.ndarray:
    """Clamp v to the box, round to nearest, step back into the ball (center, eps) by one number where the result
    left it by exact comparison, and back into the box."""
    table = numbers(dtype)
    k_lo, k_hi = box_ends(lo, hi, dtype)
    v = np.where(v < np.float32(lo), np.float32(lo), np.where(v > np.float32(hi), np.float32(hi), v))
    out = nearest(v, dtype)
    for i, (r, c, e) in enumerate(zip(table[out], center.astype(np.float64), np.broadcast_to(eps, v.shape))):
        if np.isnan(v[i]):
            continue
        k = order(int(out[i]))
        if math.isfinite(r) and math.isfinite(c) and math.isfinite(e):
            distance = exact(r) - exact(c)
            k -= int(distance > exact(e)) - int(distance < -exact(e))
        else:
            k -= int(r - c > e) - int(r - c < -e)
        k = min(max(k, k_lo), k_hi)
        out[i] = pattern(k) if k else out[i] & 0x8000  # a zero keeps its sign, as in float32
    return out


def finish_levels(v, center, eps, lo: float, hi: float) -> np.ndarray:
    """The level nearest to v that is at most floor(255 eps) levels from the center's, and in the box, whose ends mean
    the level they lie within 1e-4 of. A NaN leaves the pixel at the center, or at 0 where that is NaN too."""
    def levels(u):
        return np.floor(u * np.float32(255) + np.float32(0.5)).astype(np.float64)

    center = np.nan_to_num(center, nan=0.0, posinf=INF, neginf=-INF)
    reach = np.floor(np.clip(np.nan_to_num(eps * np.float32(255), nan=0.0, posinf=255), 0, 255))
    at = levels(center)
    k = levels(np.clip(np.where(np.isnan(v), center, v), 0, 1))
    k = np.minimum(np.maximum(k, at - reach), at + reach)
    low, high = (255 * min(max(float(np.float32(end)), 0.0), 1.0) for end in (lo, hi))
    return np.clip(k, math.ceil(low - 1e-4), math.floor(high + 1e-4)).astype(np.uint8)


def finish(v, center, eps, lo, hi, dtype):
    if dtype == "uint8":
        return finish_levels(v, center, eps, lo, hi)
    if dtype in NARROW:
        return finish_exact(v, center, eps, lo, hi, dtype)
    lo, hi = v.dtype.type(lo), v.dtype.type(hi)
    v = np.where(v < lo, lo, v)
    return np.where(v > hi, hi, v)


def per_element(size, wide: bool, inner: int, n: int) -> np.ndarray:
    kind = np.float64 if wide else np.float32
    size = np.asarray(size, kind)
    return np.full(n, size) if size.ndim == 0 else np.repeat(size, inner)


def not_negative(size: np.ndarray) -> np.ndarray:
    return np.where(size > 0, size, size.dtype.type(0))


def sign_step_reference(x, grad, center, step, eps, lo, hi, inner, dtypes):
    x_dtype, grad_dtype, out_dtype = dtypes
    wide = x_dtype == "float64"
    v0, g = compute(x, x_dtype, wide), compute(grad, grad_dtype, wide)
    step, eps = (per_element(s, wide, inner, x.size) for s in (step, eps))
    sign = np.where(np.isnan(g), g.dtype.type(0), np.sign(g))
    v = v0 + step * sign
    if center is None:
        return finish(v, v0, np.abs(step), lo, hi, out_dtype)
    c, eps = compute(center, x_dtype, wide), not_negative(eps)
    low, high = c - eps, c + eps
    v = np.where(np.isnan(v), v, np.where(v > low, v, low))
    v = np.where(np.isnan(v), v, np.where(v < high, v, high))
    return finish(v, c, eps, lo, hi, out_dtype)


def philox_reference(counter, key) -> list[np.ndarray]:
    """Philox-4x32-10 in uint64 arithmetic, on broadcast arrays."""
    mask = np.uint64(0xFFFFFFFF)
    c = [np.asarray(word, np.uint64) & mask for word in counter]
    k = [int(word) & 0xFFFFFFFF for word in key]
    for r in range(10):
        p0, p1 = np.uint64(0xD2511F53) * c[0], np.uint64(0xCD9E8D57) * c[2]
        k0, k1 = (np.uint64((k[0] + r * 0x9E3779B9) & 0xFFFFFFFF), np.uint64((k[1] + r * 0xBB67AE85) & 0xFFFFFFFF))
        c = [(p1 >> np.uint64(32)) ^ c[1] ^ k0, p1 & mask, (p0 >> np.uint64(32)) ^ c[3] ^ k1, p0 & mask]
    return c


def words_reference(key, block, sample) -> np.ndarray:
    """uint64 [..., 4]: the words of `block` of `sample` under key = (seed, offset)."""
    seed, offset = (int(part) % (1 << 64) for part in key)
    block, sample = np.broadcast_arrays(np.asarray(block, np.uint64), np.asarray(sample, np.uint64))
    counter = (block, sample, np.full_like(block, offset & 0xFFFFFFFF), np.full_like(block, offset >> 32))
    return np.stack(philox_reference(counter, (seed, seed >> 32)), -1)


def noise_reference(key, kind: str, samples: np.ndarray, inner: int, eps: np.ndarray) -> np.ndarray:
    """[N, inner] in logical order, float32. Only the quantile function is the kernels' own; it has its own test."""
    e = np.arange(inner)
    per_block = 128 if kind == "rademacher" else 4
    words = words_reference(key, (e // per_block)[None, :], samples.astype(np.uint64)[:, None])
    if kind == "rademacher":
        word = np.take_along_axis(words, np.broadcast_to((e % 128 // 32)[None, :, None], (*words.shape[:2], 1)), 2)
        bit = word[..., 0] >> (e % 32).astype(np.uint64) & np.uint64(1)
        return np.where(bit == 1, eps[:, None], -eps[:, None])
    word = np.take_along_axis(words, np.broadcast_to((e % 4)[None, :, None], (*words.shape[:2], 1)), 2)[..., 0]
    odd = (2 * (word >> np.uint64(8)).astype(np.int64) + 1 - (1 << 24)).astype(np.float32)
    if kind == "uniform":
        return eps[:, None] * (odd / np.float32(1 << 24))
    if kind == "normal":
        return eps[:, None] * kernels.quantile(odd / np.float32(1 << 25))
    within_two_sigma = np.float32(math.erf(math.sqrt(2)))
    z = kernels.quantile(odd * (within_two_sigma / np.float32(1 << 25)))
    return eps[:, None] * np.clip(z / np.float32(2), -1, 1)


def random_step_reference(x, key, eps, kind, index, lo, hi, inner, channels, dtype, out_dtype=None):
    wide = dtype == "float64"
    n = x.size // inner
    eps = not_negative(per_element(eps, wide, 1, n)).astype(np.float32)
    samples = np.arange(n) if index is None else index % (1 << 32)
    noise = noise_reference(key, kind, samples, inner, eps)
    noise = noise.reshape(n, channels, inner // channels).transpose(0, 2, 1).reshape(-1)  # to the memory's order
    v = compute(x, dtype, wide)
    reach = np.full_like(eps, INF) if kind == "normal" else eps
    return finish(v + noise, v, np.repeat(reach, inner), lo, hi, out_dtype or dtype)


def sum_reference(terms: np.ndarray) -> float:
    """One sample's sum in the order that reduce.h fixes: slots in turn, then folded by halves; chunks in order."""
    size = max(16384, -(-terms.size // (64 * 2048)) * 2048)  # at most 64 chunks, of whole rows of 2048 slots
    total = 0.0
    for first in range(0, terms.size, size):
        chunk = terms[first:first + size]
        rows = np.zeros(-(-chunk.size // 2048) * 2048)
        rows[: chunk.size] = chunk
        slots = np.zeros(2048)
        for row in rows.reshape(-1, 2048):
            slots = slots + row
        for width in (8, 32, 8):  # the slots of a lane, the lanes of a warp, the warps
            slots = slots.reshape(-1, width)
            while slots.shape[1] > 1:
                half = slots.shape[1] // 2
                slots = slots[:, :half] + slots[:, half:]
            slots = slots.ravel()
        total += float(slots[0])
    return total


def momentum_step_reference(x, grad, momentum, center, step, decay, eps, lo, hi, inner, dtypes):
    """(momentum, out)."""
    wide = dtypes[0] == "float64"
    kind = np.float64 if wide else np.float32
    g = compute(grad, dtypes[1], wide).reshape(-1, inner)
    g = np.where(np.isnan(g), kind(0), g)
    new = np.empty_like(g)
    for i, row in enumerate(g):
        mean = kind(sum_reference(np.abs(row).astype(np.float64)) / inner)
        pull = row / mean if 0 < mean < INF else np.zeros_like(row)
        new[i] = kind(decay) * momentum.reshape(-1, inner)[i] + pull
    new = new.ravel()
    along = (dtypes[0], str(new.dtype), dtypes[2])
    return new, sign_step_reference(x, new, center, step, eps, lo, hi, inner, along)


def l2_step_reference(x, grad, center, step, eps, lo, hi, inner, dtypes):
    x_dtype, grad_dtype, out_dtype = dtypes
    wide = x_dtype == "float64"
    kind = np.float64 if wide else np.float32
    n = x.size // inner
    v0 = compute(x, x_dtype, wide).reshape(n, inner)
    c0 = v0 if center is None else compute(center, x_dtype, wide).reshape(n, inner)
    steps, sizes = per_element(step, wide, 1, n), not_negative(per_element(eps, wide, 1, n))
    v, reach = np.empty_like(v0), np.empty_like(v0)
    for i in range(n):
        g = np.zeros_like(v0[i]) if grad is None else compute(grad, grad_dtype, wide).reshape(n, inner)[i]
        g = np.where(np.isnan(g), kind(0), g)
        norm = kind(math.sqrt(sum_reference(g.astype(np.float64) ** 2)))
        v[i] = v0[i] + steps[i] * (g / norm if 0 < norm < INF else np.zeros_like(g))
        delta = v[i] - c0[i]
        shrink = kind(1)
        if center is not None:
            moved = v[i].astype(np.float64) - c0[i]
            length = kind(np.sqrt(sum_reference(np.where(np.isnan(moved), 0, moved) ** 2)))
            shrink = sizes[i] / length if length > sizes[i] else kind(1)
        if shrink != 1:
            v[i] = c0[i] + delta * shrink
        reach[i] = np.abs(delta * shrink)
    return finish(v.ravel(), c0.ravel(), reach.ravel(), lo, hi, out_dtype)


# ---- strategies --------------------------------------------------------------------------------------------------

sizes = st.sampled_from([0.0, 8 / 255, 0.3, 1e-3, 1e-9, 1.0, 2.0, -0.1, NAN, INF])
keys = st.tuples(*[st.integers(-(2**63), 2**63 - 1)] * 2)
boxes = st.sampled_from([(0.0, 1.0), (-INF, INF), (-1.0, 1.0), (0.1, 0.9), (-1e-3, 70000.0)])
kinds = st.sampled_from(KINDS)


def draw_size(data, batch, wide: bool, values=sizes):
    """A number, or an array of one per sample."""
    if data.draw(st.booleans()):
        return data.draw(values)
    drawn = data.draw(st.lists(values, min_size=batch.n, max_size=batch.n))
    return np.array(drawn, np.float64 if wide else np.float32)


# ---- the small functions -----------------------------------------------------------------------------------------

@pytest.mark.parametrize("counter, key, words", [
    ([0] * 4, [0] * 2, [0x6627E8D5, 0xE169C58D, 0xBC57AC4C, 0x9B00DBD8]),
    ([0xFFFFFFFF] * 4, [0xFFFFFFFF] * 2, [0x408F276D, 0x41C83B0E, 0xA20BC7C6, 0x6D5451FD]),
    ([0x243F6A88, 0x85A308D3, 0x13198A2E, 0x03707344], [0xA4093822, 0x299F31D0],
     [0xD16CFE09, 0x94FDCCEB, 0x5001E420, 0x24126EA1]),
])
def test_philox_known_answers(counter, key, words):
    """Random123's kat_vectors for philox4x32, 10 rounds."""
    assert kernels.philox(counter, key).tolist() == words
    assert [int(w) for w in philox_reference(counter, key)] == words


@examples
@given(st.lists(st.integers(0, 2**32 - 1), min_size=6, max_size=6))
def test_philox(words):
    expected = [int(w) for w in philox_reference(words[:4], words[4:])]
    assert kernels.philox(words[:4], words[4:]).tolist() == expected


@pytest.mark.parametrize("dtype", NARROW)
def test_all_patterns_to_float(dtype):
    bits = np.arange(65536, dtype=np.uint16)
    same(kernels.to_float32(ref(bits, dtype)), numbers(dtype).astype(np.float32), "float32")
    same(kernels.to_float64(ref(bits, dtype)), numbers(dtype), "float64")
    if dtype == "float16":
        same(kernels.to_float32(ref(bits, dtype)), bits.view(np.float16).astype(np.float32), "float32")
    else:
        same(kernels.to_float32(ref(bits, dtype)), (bits.astype(np.uint32) << 16).view(np.float32), "float32")


@pytest.mark.parametrize("dtype", NARROW)
def test_all_patterns_survive_a_round_trip(dtype):
    bits = np.arange(65536, dtype=np.uint16)
    same(kernels.round_to(kernels.to_float32(ref(bits, dtype)), dtype), bits, dtype)


@pytest.mark.parametrize("dtype", NARROW)
def test_rounding_to_nearest_even(dtype):
    """Every point halfway between two neighbours (those at the overflow threshold too), the floats next to it, and
    a dense sample of all floats."""
    table = numbers(dtype)[: infinity(dtype)]
    step = table[-1] - table[-2]
    middle = ((np.append(table, table[-1] + step)[1:] + table) / 2).astype(np.float32)
    near = np.concatenate([middle, np.nextafter(middle, np.float32(INF)), np.nextafter(middle, np.float32(0))])
    dense = np.arange(0, 1 << 32, 2053, dtype=np.uint64).astype(np.uint32).view(np.float32)
    v = np.concatenate([near, -near, dense, SPECIALS.astype(np.float32)])
    got = kernels.round_to(v, dtype)
    same(got, nearest(v, dtype), dtype)
    if dtype == "float16":
        same(got, v.astype(np.float16).view(np.uint16), dtype)


@examples
@given(batches(3000), st.sampled_from(DTYPES))
def test_conversion_of_any_length_and_base(batch, dtype):
    x = images(batch.rng, batch.size, dtype, batch.leads[0], specials=True)
    same(kernels.to_float32(ref(x, dtype)), compute(x, dtype), "float32")
    same(kernels.to_float64(ref(x, dtype)), compute(x, dtype, wide=True), "float64")


def test_normal_quantile():
    p = np.concatenate([np.linspace(0.0005, 0.9995, 2000), np.logspace(-300, -1, 500), 1 - np.logspace(-16, -1, 300)])
    z = kernels.normal_quantile(p)
    inverse = NormalDist().inv_cdf
    np.testing.assert_allclose(z, [inverse(float(v)) for v in p], rtol=1e-15, atol=0)
    # And independently of that formula: the distribution function takes z back to p. d log P / d log z is z^2 in the
    # tail: that often the error of z (5.2e-16 at most, by mpmath) and of the two roundings in erfc's argument, and
    # erfc's own.
    z, p = z[p < 0.5], p[p < 0.5]
    back = np.array([math.erfc(-v / math.sqrt(2)) / 2 for v in z])
    assert (np.abs(back - p) / p <= (5.2e-16 + 2 * 1.2e-16) * np.maximum(z**2, 1) + 1e-15).all()


def test_float_quantile():
    """PPND7 in float32, over the whole range of the words it is given, dense at both ends and at 0."""
    i = np.unique(np.concatenate([np.arange(1, 4097, 2), (1 << 24) - np.arange(1, 4097, 2),
                                  np.arange(1, 1 << 24, 4098)])).astype(np.int64)
    q = (i / (1 << 25)).astype(np.float32)
    z = kernels.quantile(q)
    far = q > 2**-5
    np.testing.assert_allclose(z[far], [NormalDist().inv_cdf(0.5 + float(v)) for v in q[far]], rtol=1e-6)
    # Nearer to 0 the sum 1/2 + q would lose q's digits: the series of the quantile function there.
    small = q[~far].astype(np.float64)
    series = small * math.sqrt(2 * math.pi) * (1 + math.pi / 3 * small**2 + 7 * math.pi**2 / 30 * small**4)
    np.testing.assert_allclose(z[~far], series, rtol=1e-6)
    assert np.array_equal(kernels.quantile(-q), -z)


def test_float_log():
    x = np.concatenate([np.logspace(-30, 30, 2001), np.linspace(0.4, 2.1, 2001)]).astype(np.float32)
    got, expected = kernels.log_positive(x).astype(np.float64), np.log(x.astype(np.float64))
    assert (np.abs(got - expected) <= 1.2e-7 * np.abs(expected) + 6e-8 * (np.abs(expected) > 0.01)).all()


# ---- the final rounding ------------------------------------------------------------------------------------------

@examples
@given(batches(), st.sampled_from(NARROW), st.sampled_from([8 / 255, 0.3, 0.0, 1e-6, INF]), boxes)
def test_finish(batch, dtype, eps, box):
    center = compute(images(batch.rng, batch.size, dtype, specials=True), dtype)
    v = center + batch.rng.choice([-1, -0.5, 0, 1e-3, 1], batch.size).astype(np.float32) * np.float32(eps)
    same(kernels.finish(v, center, eps, *box, dtype), finish_exact(v, center, np.float32(eps), *box, dtype), dtype)


@pytest.mark.parametrize("dtype", NARROW)
@pytest.mark.parametrize("eps", [8 / 255, 4 / 255, 0.3, 1 / 255, 1e-3, 1e-5])
def test_every_pixel_obeys_the_budget(dtype, eps):
    """All numbers in [0, 1] as x, at both ends of the ball: within float32(eps) exactly, and no number of the
    dtype inside ball and box is nearer to where float32 arithmetic went."""
    eps = np.float32(eps)
    one = int(nearest(np.array([1.0]), dtype)[0])
    table = numbers(dtype)[: one + 1]
    x = table.astype(np.float32)
    for sign in (np.float32(1), np.float32(-1)):
        v = x + sign * eps
        out = kernels.finish(v, x, eps, 0.0, 1.0, dtype)
        got, clipped = numbers(dtype)[out], np.clip(v, 0, 1).astype(np.float64)
        assert out.max() <= one
        for i in range(one + 1):
            assert abs(exact(got[i]) - exact(table[i])) <= exact(eps)
        for step in (-1, 1):
            beside = out.astype(np.int64) + step
            valid = (beside >= 0) & (beside <= one)
            other = table[np.clip(beside, 0, one)]
            nearer = valid & (np.abs(other - clipped) < np.abs(got - clipped))
            for i in np.flatnonzero(nearer):
                assert abs(exact(other[i]) - exact(table[i])) > exact(eps)


# ---- null --------------------------------------------------------------------------------------------------------

@examples
@given(batches(), st.sampled_from(DTYPES))
def test_null(batch, dtype):
    x = images(batch.rng, batch.size, dtype, batch.leads[0], specials=True)
    out = Output(batch.size, dtype, batch.leads[1], batch.leads[2])
    kernels.null(ref(x, dtype), ref(out.array, dtype))
    assert out.result().tobytes() == x.tobytes()


# ---- sign_step ---------------------------------------------------------------------------------------------------

@examples
@given(batches(), st.sampled_from(STEP_DTYPES), boxes, st.booleans(), st.data())
def test_sign_step(batch, dtypes, box, ball, data):
    x_dtype, grad_dtype, out_dtype = dtypes
    wide = x_dtype == "float64"
    x = images(batch.rng, batch.size, x_dtype, batch.leads[0], specials=True)
    grad = gradients(batch.rng, batch.size, grad_dtype, batch.leads[1])
    center = images(batch.rng, batch.size, x_dtype, batch.leads[2], specials=True) if ball else None
    step, eps = draw_size(data, batch, wide), draw_size(data, batch, wide)
    out = Output(batch.size, out_dtype, batch.leads[3], batch.leads[0])
    kernels.sign_step(ref(x, x_dtype), ref(grad, grad_dtype), ref(out.array, out_dtype), step,
                      center=ref(center, x_dtype), eps=eps, lo=box[0], hi=box[1], inner=batch.inner)
    expected = sign_step_reference(x, grad, center, step, eps, *box, batch.inner, dtypes)
    same(out.result(), expected, out_dtype)


@pytest.mark.parametrize("dtype", DTYPES)
def test_every_length_to_300(dtype):
    rng = np.random.default_rng(300)
    dtypes, key = (dtype, "float64" if dtype == "float64" else "float32", dtype), (1, 2)
    for n in range(301):
        x, center = (images(rng, n, dtype, lead=n % lead, specials=True) for lead in (9, 7))
        grad = gradients(rng, n, dtypes[1], lead=n % 5)
        out = Output(n, dtype, n % 8, 3)
        kernels.sign_step(ref(x, dtype), ref(grad, dtypes[1]), ref(out.array, dtype), 0.1, center=ref(center, dtype),
                          eps=0.2)
        same(out.result(), sign_step_reference(x, grad, center, 0.1, 0.2, 0, 1, 1, dtypes), dtype)
        for kind in KINDS:
            out = Output(n, dtype, n % 8, 3)
            kernels.random_step(ref(x, dtype), ref(out.array, dtype), np.array(key), 0.1, kind=kind, inner=max(n, 1))
            same(out.result(), random_step_reference(x, key, 0.1, kind, None, 0, 1, max(n, 1), 1, dtype), dtype)


@examples
@given(batches(), st.sampled_from(STEP_DTYPES), st.sampled_from([8 / 255, 0.3, 16 / 255, 1e-3]), st.booleans())
def test_sign_step_obeys_the_budget(batch, dtypes, eps, ball):
    """Law 1, as it is written, on images in [0, 1]."""
    x_dtype, grad_dtype, out_dtype = dtypes
    x = images(batch.rng, batch.size, x_dtype, spread=0.0)
    grad = gradients(batch.rng, batch.size, grad_dtype)
    start = images(batch.rng, batch.size, x_dtype, spread=0.0) if ball else x
    out = np.empty(batch.size, RAW[out_dtype])
    kernels.sign_step(ref(start, x_dtype), ref(grad, grad_dtype), ref(out, out_dtype), eps,
                      center=ref(x, x_dtype) if ball else None, eps=eps)
    check_budget(values(out, out_dtype), values(x, x_dtype), eps, 0.0, 1.0, out_dtype, x_dtype)


def check_budget(got, center, eps, lo, hi, dtype, center_dtype):
    assert ((got >= lo) & (got <= hi)).all()
    limit = exact(eps) if dtype == "float64" else exact(np.float32(eps))
    slack = {"float32": Fraction(1, 1 << 24), "float64": Fraction(1, 1 << 53)}.get(dtype, 0)
    if dtype == "uint8":
        assert (np.abs(np.rint(255 * got) - np.floor(255 * center + 0.5)) <= np.floor(np.float32(eps) * 255)).all()
        return
    for r, c in zip(got, center):
        if dtype in NARROW and center_dtype != dtype:
            # No 16-bit number may lie in the ball of a float32 center; where one does in ball and box, so does r.
            table = numbers(dtype)
            bits = order(int(nearest(np.array([r]), dtype)[0]))
            if not any(lo <= table[pattern(bits + k)] <= hi and abs(exact(table[pattern(bits + k)]) - exact(c)) <= limit
                       for k in range(-3, 4)):
                continue
        assert abs(exact(r) - exact(c)) <= limit + slack, (r, c, eps)


def test_levels_mean_what_they_say():
    """eps = k / 255 is exactly k levels, and a level survives the way to float32 and back."""
    k = np.arange(256)
    x = np.repeat(k, 256).astype(np.uint8)
    out, grad = np.empty_like(x), np.ones(x.size, np.float32)
    eps = (k / 255).astype(np.float32)
    for start in (x, np.full_like(x, 255)):
        kernels.sign_step(ref(start, "uint8"), ref(grad, "float32"), ref(out, "uint8"), np.tile(eps, 256),
                          center=ref(x, "uint8"), eps=np.tile(eps, 256))
        assert np.array_equal(out, np.minimum(x + np.tile(k, 256), 255))


# ---- momentum_step and l2_step -----------------------------------------------------------------------------------

decays = st.sampled_from([1.0, 0.9, 0.0])


@examples
@given(batches(), st.sampled_from(STEP_DTYPES), boxes, st.booleans(), decays, st.data())
def test_momentum_step(batch, dtypes, box, ball, decay, data):
    x_dtype, grad_dtype, out_dtype = dtypes
    wide = x_dtype == "float64"
    x = images(batch.rng, batch.size, x_dtype, batch.leads[0], specials=True)
    # Infinite gradients switch their whole sample off, so they come in some batches only.
    grad = gradients(batch.rng, batch.size, grad_dtype, batch.leads[1], specials=data.draw(st.booleans()))
    center = images(batch.rng, batch.size, x_dtype, batch.leads[2], specials=True) if ball else None
    momentum = gradients(batch.rng, batch.size, "float64" if wide else "float32", batch.leads[3])
    step, eps = draw_size(data, batch, wide), draw_size(data, batch, wide)
    expected, moved = momentum_step_reference(x, grad, momentum, center, step, decay, eps, *box, batch.inner, dtypes)
    out = Output(batch.size, out_dtype, batch.leads[3], batch.leads[0])
    kernels.momentum_step(ref(x, x_dtype), ref(grad, grad_dtype), ref(momentum, str(momentum.dtype)),
                          ref(out.array, out_dtype), step, decay=decay, center=ref(center, x_dtype), eps=eps,
                          lo=box[0], hi=box[1], inner=batch.inner)
    same(momentum, expected, str(momentum.dtype))
    same(out.result(), moved, out_dtype)


@examples
@given(batches(), st.sampled_from(STEP_DTYPES), boxes, st.booleans(), st.booleans(), st.data())
def test_l2_step(batch, dtypes, box, ball, step_too, data):
    x_dtype, grad_dtype, out_dtype = dtypes
    wide = x_dtype == "float64"
    x = images(batch.rng, batch.size, x_dtype, batch.leads[0], specials=data.draw(st.booleans()))
    grad = gradients(batch.rng, batch.size, grad_dtype, batch.leads[1], specials=data.draw(st.booleans()))
    grad = grad if step_too else None
    center = images(batch.rng, batch.size, x_dtype, batch.leads[2], specials=data.draw(st.booleans())) if ball else None
    step, eps = draw_size(data, batch, wide), draw_size(data, batch, wide)
    out = Output(batch.size, out_dtype, batch.leads[3], batch.leads[0])
    kernels.l2_step(ref(x, x_dtype), ref(grad, grad_dtype), ref(out.array, out_dtype), step,
                    center=ref(center, x_dtype), eps=eps, lo=box[0], hi=box[1], inner=batch.inner)
    same(out.result(), l2_step_reference(x, grad, center, step, eps, *box, batch.inner, dtypes), out_dtype)


@pytest.mark.parametrize("inner", [2047, 2048, 2049, 16384, 16385, 50000, 64 * 16384 + 1])
def test_sums_over_several_chunks(inner):
    rng = np.random.default_rng(inner)
    x, center = images(rng, 2 * inner, "float32"), images(rng, 2 * inner, "float32")
    grad = gradients(rng, 2 * inner, "float32", specials=False)
    dtypes = ("float32",) * 3
    out, momentum = np.empty_like(x), np.zeros_like(x)
    expected = momentum_step_reference(x, grad, momentum, center, 0.1, 1.0, 0.2, 0, 1, inner, dtypes)
    kernels.momentum_step(ref(x, "float32"), ref(grad, "float32"), ref(momentum, "float32"), ref(out, "float32"), 0.1,
                          center=ref(center, "float32"), eps=0.2, inner=inner)
    same(momentum, expected[0], "float32")
    same(out, expected[1], "float32")
    kernels.l2_step(ref(x, "float32"), ref(grad, "float32"), ref(out, "float32"), 5.0, center=ref(center, "float32"),
                    eps=2.0, inner=inner)
    same(out, l2_step_reference(x, grad, center, 5.0, 2.0, 0, 1, inner, dtypes), "float32")


@examples
@given(batches(), st.sampled_from(STEP_DTYPES), st.sampled_from([0.5, 2.0, 0.01]))
def test_l2_step_obeys_the_budget(batch, dtypes, eps):
    """In the L2 norm, on images in [0, 1]: to the rounding of float32's elements; 16-bit elements and levels are
    rounded toward the center, so they add nothing."""
    x_dtype, grad_dtype, out_dtype = dtypes
    if x_dtype == "float32" and out_dtype != x_dtype:
        return  # the nearest 16-bit number or level may be further from a float32 center than any ball
    x, start = (images(batch.rng, batch.size, x_dtype, spread=0.0) for _ in range(2))
    grad = gradients(batch.rng, batch.size, grad_dtype, specials=False)
    out = np.empty(batch.size, RAW[out_dtype])
    kernels.l2_step(ref(start, x_dtype), ref(grad, grad_dtype), ref(out, out_dtype), 1.0, center=ref(x, x_dtype),
                    eps=eps, inner=batch.inner)
    got, center = values(out, out_dtype), values(x, x_dtype)
    assert ((got >= 0) & (got <= 1)).all()
    length = np.linalg.norm((got - center).reshape(batch.n, batch.inner), axis=1)
    assert (length <= eps * (1 + 2**-21) + math.sqrt(batch.inner) * 2**-24).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("ball", [False, True])
def test_sign_step_in_place(dtype, ball):
    rng = np.random.default_rng(3)
    x = images(rng, 3000, dtype, 1)
    grad = gradients(rng, 3000, "float64" if dtype == "float64" else "float32")
    grad_dtype = str(grad.dtype)
    center = images(rng, 3000, dtype) if ball else None
    fresh = np.empty_like(x)
    for out in (fresh, x):
        kernels.sign_step(ref(x, dtype), ref(grad, grad_dtype), ref(out, dtype), 0.1, center=ref(center, dtype),
                          eps=0.2)
    same(x, fresh, dtype)


# ---- random_step -------------------------------------------------------------------------------------------------

@examples
@given(batches(), st.sampled_from([*((t, t) for t in DTYPES), ("uint8", "float32")]), kinds, keys, boxes, st.data())
def test_random_step(batch, dtypes, kind, key, box, data):
    dtype, out_dtype = dtypes
    wide = dtype == "float64"
    channels = data.draw(st.sampled_from([c for c in (1, 2, 3, 4, 5, 7, batch.inner) if batch.inner % c == 0]))
    x = images(batch.rng, batch.size, dtype, batch.leads[0], specials=True)
    eps = draw_size(data, batch, wide)
    indices = st.lists(st.integers(0, 2**40), min_size=batch.n, max_size=batch.n)
    index = data.draw(st.none() | indices.map(lambda v: np.array(v, np.int64)))
    out = Output(batch.size, out_dtype, batch.leads[1], batch.leads[2])
    kernels.random_step(ref(x, dtype), ref(out.array, out_dtype), np.array(key, np.int64), eps, kind=kind,
                        index=index, lo=box[0], hi=box[1], inner=batch.inner, channels=channels)
    expected = random_step_reference(x, key, eps, kind, index, *box, batch.inner, channels, dtype, out_dtype)
    same(out.result(), expected, out_dtype)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("inner, channels", [(4096, 1), (4097, 1), (9001, 1), (12288, 3), (12291, 3), (20000, 5),
                                             (8193 * 2, 2), (2048 * 3, 2048), (2047 * 5, 2047), (1025 * 9, 1025)])
def test_random_step_over_several_tiles(kind, inner, channels):
    rng = np.random.default_rng(inner)
    x = images(rng, 2 * inner, "float32")
    out, key = Output(x.size, "float32", 1, 1), (2**40 + 5, 2**33 + 7)
    kernels.random_step(ref(x, "float32"), ref(out.array, "float32"), np.array(key), 0.1, kind=kind, inner=inner,
                        channels=channels)
    same(out.result(), random_step_reference(x, key, 0.1, kind, None, 0, 1, inner, channels, "float32"), "float32")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("channels", [1, 3, 8])
def test_noise_is_the_same_in_both_layouts(kind, channels):
    samples, spatial = 3, 35 * 33
    x = images(np.random.default_rng(0), samples * channels * spatial, "float32").reshape(samples, channels, spatial)
    results = []
    for layout, memory in ((1, x), (channels, np.ascontiguousarray(x.transpose(0, 2, 1)))):
        out = np.empty_like(memory)
        kernels.random_step(ref(memory, "float32"), ref(out, "float32"), np.array([1, 2]), 0.1, kind=kind,
                            inner=channels * spatial, channels=layout)
        results.append(out)
    same(results[0].ravel(), results[1].transpose(0, 2, 1).ravel(), "float32")


@pytest.mark.parametrize("kind", KINDS)
def test_noise_does_not_depend_on_the_dtype(kind):
    """From 0 with eps 0.5 and no box, what is added shows: the same in every dtype, but for its rounding."""
    noise = {}
    for dtype in (*WIDE, *NARROW):
        x = cast(np.zeros(5000), dtype)
        out = np.empty_like(x)
        kernels.random_step(ref(x, dtype), ref(out, dtype), np.array([9, 9]), 0.5, kind=kind, lo=-INF, hi=INF,
                            inner=2500)
        noise[dtype] = out
    assert np.array_equal(noise["float64"], noise["float32"].astype(np.float64))
    for dtype in NARROW:
        same(noise[dtype], nearest(noise["float32"], dtype), dtype)


@examples
@given(batches(), st.sampled_from(DTYPES), st.sampled_from(KINDS[:3]), st.sampled_from([8 / 255, 0.3, 1e-3]), keys)
def test_random_step_obeys_the_budget(batch, dtype, kind, eps, key):
    x = images(batch.rng, batch.size, dtype, spread=0.0)
    out = np.empty_like(x)
    kernels.random_step(ref(x, dtype), ref(out, dtype), np.array(key), eps, kind=kind, inner=batch.inner)
    eps = float(np.float32(eps))  # noise is made in float32 whatever the dtype
    check_budget(values(out, dtype), values(x, dtype), eps, 0.0, 1.0, dtype, dtype)


def test_random_step_in_place():
    for dtype in DTYPES:
        x = images(np.random.default_rng(4), 7000, dtype, 1)
        fresh = np.empty_like(x)
        for out in (fresh, x):
            kernels.random_step(ref(x, dtype), ref(out, dtype), np.array([3, 4]), 0.1, inner=3500)
        same(x, fresh, dtype)


def test_index_selects_the_noise():
    """A sample's noise follows its index, not its place in the batch."""
    x, index = np.full((5, 400), 0.5, np.float32), np.array([7, 0, 3, 3, 2**32 - 1])
    out = np.empty_like(x)
    kernels.random_step(ref(x, "float32"), ref(out, "float32"), np.array([1, 1]), 0.1, index=index, inner=400)
    assert np.array_equal(out[2], out[3]) and not np.array_equal(out[0], out[1])
    alone = np.empty((8, 400), np.float32)
    kernels.random_step(ref(np.full((8, 400), 0.5, np.float32), "float32"), ref(alone, "float32"), np.array([1, 1]),
                        0.1, inner=400)
    assert np.array_equal(out[:3], alone[[7, 0, 3]])


def test_noise_statistics():
    """A blunt check that the maps from bits to values are what they claim: mean, variance, range."""
    n = 400_000
    x = np.zeros(n, np.float32)
    # Var of a normal with sigma 1/2 cut at two of them: (1 - 4 phi(2) / (2 Phi(2) - 1)) / 4.
    cut = (1 - 4 * NormalDist().pdf(2) / math.erf(math.sqrt(2))) / 4
    for kind, variance in (("rademacher", 1.0), ("uniform", 1 / 3), ("truncated_normal", cut), ("normal", 1.0)):
        out = np.empty_like(x)
        kernels.random_step(ref(x, "float32"), ref(out, "float32"), np.array([11, 0]), 1.0, kind=kind, lo=-INF,
                            hi=INF, inner=n)
        assert abs(out.mean(dtype=np.float64)) < 5 / math.sqrt(n)
        assert abs(out.var(dtype=np.float64) - variance) < 8 / math.sqrt(n)  # the square of a normal has variance 2
        assert (kind == "normal" or np.abs(out).max() <= 1.0) and (out != 0).all()


# ---- ranges and threads ------------------------------------------------------------------------------------------

@examples
@given(batches(), st.sampled_from(DTYPES), st.lists(st.integers(0, 300), max_size=5), st.booleans())
def test_any_split_gives_the_same(batch, dtype, cuts, ball):
    """Pieces cut anywhere, samples and pixels included, are the whole; nothing outside a piece is touched."""
    grad_dtype = "float64" if dtype == "float64" else "bfloat16"
    wide = dtype == "float64"
    x = images(batch.rng, batch.size, dtype, batch.leads[0])
    grad = gradients(batch.rng, batch.size, grad_dtype)
    center = images(batch.rng, batch.size, dtype) if ball else None
    per_sample = batch.rng.uniform(0, 0.2, batch.n).astype(np.float64 if wide else np.float32)
    channels = 3 if batch.inner % 3 == 0 else 1
    key = np.array([5, 6])

    def step(out, r):
        kernels.sign_step(ref(x, dtype), ref(grad, grad_dtype), ref(out, dtype), per_sample,
                          center=ref(center, dtype), eps=per_sample, inner=batch.inner, range=r)

    def momentum(out, r):
        kernels.momentum_step(ref(x, dtype), ref(grad, grad_dtype), ref(velocity[id(out)], str(per_sample.dtype)),
                              ref(out, dtype), per_sample, center=ref(center, dtype), eps=per_sample,
                              inner=batch.inner, range=r)

    def l2(out, r):
        kernels.l2_step(ref(x, dtype), ref(grad, grad_dtype), ref(out, dtype), per_sample, center=ref(center, dtype),
                        eps=per_sample, inner=batch.inner, range=r)

    def noise(out, r):
        kernels.random_step(ref(x, dtype), ref(out, dtype), key, per_sample, inner=batch.inner, channels=channels,
                            range=r)

    def copy(out, r):
        kernels.null(ref(x, dtype), ref(out, dtype), range=r)

    bounds = sorted({0, batch.size, *(c for c in cuts if c < batch.size)})
    for op in (step, momentum, l2, noise, copy):
        whole, pieces = Output(batch.size, dtype), Output(batch.size, dtype)
        velocity = {id(out.array): np.ones(batch.size, per_sample.dtype) for out in (whole, pieces)}
        op(whole.array, kernels.Range())
        for begin, end in zip(bounds, bounds[1:]):
            op(pieces.array, kernels.Range(begin, end))
            assert (pieces.array[end:].view(np.uint8) == 0xFF).all()
        same(pieces.result(), whole.result(), dtype)
        same(*velocity.values(), str(per_sample.dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_threads(dtype):
    """The pieces of torch's parallel_for, at once; ThreadSanitizer watches this one."""
    rng = np.random.default_rng(1)
    inner, n = 3 * 1111, 12
    x = images(rng, n * inner, dtype)
    grad_dtype = "float64" if dtype == "float64" else "float16"
    grad = gradients(rng, n * inner, grad_dtype)
    per_sample = rng.uniform(0, 0.2, n).astype(np.float64 if dtype == "float64" else np.float32)
    for channels in (1, 3):
        results = []
        for threads in (1, 4):
            split = kernels.Range(threads=threads)
            out = np.empty_like(x)
            kernels.random_step(ref(x, dtype), ref(out, dtype), np.array([5, 6]), per_sample, inner=inner,
                                channels=channels, range=split)
            kernels.sign_step(ref(out, dtype), ref(grad, grad_dtype), ref(out, dtype), per_sample,
                              center=ref(x, dtype), eps=per_sample, inner=inner, range=split)
            velocity = np.zeros(out.size, per_sample.dtype)
            kernels.momentum_step(ref(out, dtype), ref(grad, grad_dtype), ref(velocity, str(velocity.dtype)),
                                  ref(out, dtype), per_sample, inner=inner, range=split)
            kernels.l2_step(ref(out, dtype), ref(grad, grad_dtype), ref(out, dtype), per_sample, center=ref(x, dtype),
                            eps=per_sample, inner=inner, range=split)
            copied = np.empty_like(out)
            kernels.null(ref(out, dtype), ref(copied, dtype), range=split)
            results.append(copied)
        same(results[0], results[1], dtype)


# ---- sample_eps and split_key ------------------------------------------------------------------------------------

def sample_eps(key, n: int, dist: str, eps_max: float, sigma: float, index=None) -> np.ndarray:
    out = Output(n, "float32", 1, 1)
    room = out.array
    kernels.sample_eps(room, np.array(key, np.int64), dist, eps_max, sigma, index=index)
    return out.result()


@examples
@given(keys, st.integers(0, 300), st.sampled_from([16 / 255, 8 / 255, 0.3]), st.sampled_from([0.5, 0.1, 20.0]),
       st.booleans())
def test_sample_eps(key, n, eps_max, sigmas, indexed):
    sigma = eps_max * sigmas
    index = np.arange(n)[::-1] * 12345678901 if indexed else None
    samples = np.arange(n) if index is None else index % (1 << 32)
    word = words_reference(key, np.zeros(n), samples)[:, 0] >> np.uint64(8)
    u = (word.astype(np.float64) + 0.5) / (1 << 24)
    assert (sample_eps(key, n, "fixed", eps_max, sigma, index) == np.float32(eps_max)).all()
    assert np.array_equal(sample_eps(key, n, "uniform", eps_max, sigma, index), (u * eps_max).astype(np.float32))
    got = sample_eps(key, n, "truncated_normal", eps_max, sigma, index)
    assert ((got >= 0) & (got <= np.float32(eps_max))).all()
    mass = math.erf(eps_max / (sigma * math.sqrt(2)))
    expected = np.array([NormalDist(0, sigma).inv_cdf(0.5 + 0.5 * v * mass) for v in u], np.float32)
    np.testing.assert_array_max_ulp(got, np.minimum(expected, np.float32(eps_max)), maxulp=1)


def test_sample_eps_distribution():
    """Against the distribution function of |N(0, sigma)| cut at eps_max: Kolmogorov-Smirnov, far in the tail."""
    n, eps_max = 200_000, 16 / 255
    eps = np.sort(sample_eps((3, 1), n, "truncated_normal", eps_max, eps_max / 2)).astype(np.float64)
    scale = math.sqrt(2) * eps_max / 2
    model = np.array([math.erf(v / scale) for v in eps]) / math.erf(eps_max / scale)
    assert np.abs(model - (np.arange(n) + 0.5) / n).max() < 2.5 / math.sqrt(n)


@examples
@given(keys, st.integers(0, 300))
def test_split_key(key, n):
    out = Output(2 * n, "float64", 2, 2)  # any 8-byte numbers: the bits count
    room = out.array.view(np.int64)
    kernels.split_key(np.array(key, np.int64), room)
    seed = int(key[0]) ^ (0x53504C54 << 32)
    words = words_reference((seed, key[1]), np.arange(n), np.zeros(n))
    lower, upper = words[:, 0::2], words[:, 1::2]
    pairs = upper << np.uint64(32) | lower
    expected = np.stack([pairs[:, 0], pairs[:, 1] >> np.uint64(2)], 1).astype(np.uint64).view(np.int64)
    assert np.array_equal(out.result().view(np.int64).reshape(n, 2), expected.reshape(n, 2))
    assert len({tuple(child) for child in expected.tolist()} | {tuple(key)}) == n + 1


# ---- the module itself -------------------------------------------------------------------------------------------

def test_wrong_arguments():
    x = np.zeros(6, np.float32)
    with pytest.raises(ValueError, match="dtype"):
        kernels.Array(x, "int8")
    with pytest.raises(ValueError, match="item size"):
        kernels.Array(x, "float16")
    with pytest.raises(ValueError, match="contiguous"):
        kernels.Array(np.zeros((4, 4), np.float32)[:, ::2], "float32")
    a = kernels.Array(x, "float32")
    with pytest.raises(ValueError, match="range"):
        kernels.null(a, a, range=kernels.Range(0, 7))
    with pytest.raises(ValueError, match="whole samples"):
        kernels.random_step(a, a, np.array([0, 0]), 0.1, inner=4)
    with pytest.raises(ValueError, match="per sample"):
        kernels.sign_step(a, a, a, np.zeros(4, np.float32), inner=2)
    x.flags.writeable = False
    with pytest.raises(ValueError, match="writeable"):
        kernels.null(a, kernels.Array(x, "float32"))
