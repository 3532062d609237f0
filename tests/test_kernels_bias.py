"""bias_act's and act_grad's CPU kernels on numpy arrays, without torch: bit for bit the plain expression, in every
dtype, order of channels and alignment, however the work is shared out."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels_arrays import (
    DTYPES,
    SPECIALS,
    Output,
    batches,
    cast,
    compute,
    examples,
    gradients,
    kernels,
    place,
    ref,
    same,
    values,
)

FLOATS = tuple(d for d in DTYPES if d != "uint8")
BLOCK = 64  # elements: the unit of ranges


def packed(positive: np.ndarray) -> np.ndarray:
    """Bit e % 8 of byte e / 8."""
    return np.packbits(positive, bitorder="little")


ACTS = [{}, {"act": "hardtanh", "low": 0.0, "high": 6.0}, {"act": "hardtanh", "low": -0.7, "high": 0.1},
        {"act": "leaky_relu", "slope": 0.01}, {"act": "leaky_relu", "slope": 0.0}]


def bias_reference(x, bias, residual, stride, relu, dtype, act="relu", low=0.0, high=0.0, slope=1.0):
    """The result, and its mask."""
    wide = dtype == "float64"
    with np.errstate(all="ignore"):
        v = compute(x, dtype, wide)
        if bias is not None:
            v = v + bias[np.arange(x.size) // stride % bias.size]
        if residual is not None:
            v = v + compute(residual, dtype, wide)
        low, high = (values(cast(np.array([b], v.dtype), dtype), dtype).astype(v.dtype) for b in (low, high))
        if relu and act == "relu":
            v = np.where(v < 0, v.dtype.type(0), v)
        elif relu and act == "hardtanh":
            v = np.where(v < low, low, np.where(v > high, high, v))
        elif relu:
            v = np.where(v > 0, v, v * v.dtype.type(slope))
        y = cast(v, dtype)
        worth = values(y, dtype)
        return y, packed((low < worth) & (worth < high) if act == "hardtanh" else worth > 0)


def bits_output(numel: int, lead: int = 0) -> Output:
    return Output(-(-numel // 8), "uint8", lead, 3)


def cut(numel: int, cuts) -> list:
    """Ranges of blocks that cover all elements."""
    blocks = -(-numel // BLOCK)
    bounds = sorted({0, blocks, *(c for c in cuts if c < blocks)})
    return [kernels.Range(*ends) for ends in zip(bounds, bounds[1:])]


def biases(rng, channels: int, dtype: str, lead: int = 0) -> np.ndarray:
    kind = np.float64 if dtype == "float64" else np.float32
    v = np.where(rng.random(channels) < 0.1, rng.choice(SPECIALS, channels), rng.normal(size=channels))
    return place(v.astype(kind), lead)


def run_bias_act(x, bias, residual, dtype, channels, stride, relu, ranges, leads=(0, 0), **act):
    """(result, mask or None)."""
    out, bits = Output(x.size, dtype, leads[0], 5), bits_output(x.size, leads[1])
    for r in ranges:
        kernels.bias_act(ref(x, dtype), ref(bias, str(getattr(bias, "dtype", None))), ref(residual, dtype),
                         ref(out.array, dtype), ref(bits.array, "uint8") if relu else None, channels=channels,
                         channel_stride=stride, range=r, **act)
    return out.result(), bits.result() if relu else None


@examples
@given(batches(), st.data(), st.sampled_from(FLOATS), st.lists(st.integers(0, 4), max_size=3))
def test_bias_act(batch, data, dtype, cuts):
    channels = data.draw(st.sampled_from([c for c in range(1, batch.inner + 1) if batch.inner % c == 0]))
    stride = data.draw(st.sampled_from([1, batch.inner // channels]))
    has_bias, has_residual, relu = (data.draw(st.booleans()) for _ in range(3))
    act = data.draw(st.sampled_from(ACTS))
    x = gradients(batch.rng, batch.size, dtype, batch.leads[0])
    bias = biases(batch.rng, channels, dtype, batch.leads[1]) if has_bias else None
    residual = gradients(batch.rng, batch.size, dtype, batch.leads[2]) if has_residual else None
    y, mask = bias_reference(x, bias, residual, stride, relu, dtype, **act)
    for ranges in ([kernels.Range()], cut(batch.size, cuts)):
        got, bits = run_bias_act(x, bias, residual, dtype, channels, stride, relu, ranges, batch.leads[2:], **act)
        same(got, y, dtype)
        assert not relu or bits.tobytes() == mask.tobytes()


@examples
@given(batches(), st.sampled_from(FLOATS), st.lists(st.integers(0, 4), max_size=3), st.sampled_from([0.0, 0.01, 3.0]))
def test_act_grad_by_a_slope(batch, dtype, cuts, slope):
    grad = gradients(batch.rng, batch.size, dtype, batch.leads[0])
    kept = batch.rng.random(batch.size) < 0.5
    mask, v = place(packed(kept), batch.leads[1]), compute(grad, dtype, dtype == "float64")
    with np.errstate(all="ignore"):
        wanted = cast(np.where(kept, v, v * v.dtype.type(slope)), dtype)
    for ranges in ([kernels.Range()], cut(batch.size, cuts)):
        out = Output(batch.size, dtype, batch.leads[2], 3)
        for r in ranges:
            kernels.act_grad(ref(grad, dtype), ref(mask, "uint8"), ref(out.array, dtype), slope=slope, range=r)
        same(out.result(), wanted, dtype)


@examples
@given(batches(), st.sampled_from(FLOATS), st.lists(st.integers(0, 4), max_size=3))
def test_act_grad(batch, dtype, cuts):
    grad = gradients(batch.rng, batch.size, dtype, batch.leads[0])
    kept = batch.rng.random(batch.size) < 0.5
    mask = place(packed(kept), batch.leads[1])
    wanted = np.where(kept, grad, grad.dtype.type(0))
    for ranges in ([kernels.Range()], cut(batch.size, cuts)):
        out = Output(batch.size, dtype, batch.leads[2], 3)
        for r in ranges:
            kernels.act_grad(ref(grad, dtype), ref(mask, "uint8"), ref(out.array, dtype), range=r)
        assert out.result().tobytes() == wanted.tobytes()  # bits, so NaN too


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_length_to_300(dtype):
    """At every alignment, in place, and back."""
    rng = np.random.default_rng(300)
    for n in range(1, 301):
        x = gradients(rng, n, dtype, n % 17)
        y, mask = bias_reference(x, None, None, 1, True, dtype)
        bits = bits_output(n, n % 7)
        kernels.bias_act(ref(x, dtype), None, None, ref(x, dtype), ref(bits.array, "uint8"), channels=n)
        same(x, y, dtype)
        assert bits.result().tobytes() == mask.tobytes()
        grad = gradients(rng, n, dtype, n % 13)
        wanted = np.where(values(y, dtype) > 0, grad, grad.dtype.type(0))
        kernels.act_grad(ref(grad, dtype), ref(bits.array, "uint8"), ref(grad, dtype))
        assert grad.tobytes() == wanted.tobytes()


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("channels", "stride"), [
    (3, 1), (64, 1), (100, 1), (1024, 1), (2500, 1), (3, 3000), (7, 49), (2, 1024), (1, 5000), (500, 2)])
def test_channels_across_strips(dtype, channels, stride):
    """Channel counts and planes beside and beyond the loops' own tiles; into the residual's memory."""
    rng = np.random.default_rng(channels)
    n = channels * stride * (-(-9000 // (channels * stride)))
    x, residual = gradients(rng, n, dtype, 1), gradients(rng, n, dtype, 2)
    bias = biases(rng, channels, dtype)
    y, mask = bias_reference(x, bias, residual, stride, True, dtype)
    bits = bits_output(n)
    kernels.bias_act(ref(x, dtype), ref(bias, str(bias.dtype)), ref(residual, dtype), ref(residual, dtype),
                     ref(bits.array, "uint8"), channels=channels, channel_stride=stride)
    same(residual, y, dtype)
    assert bits.result().tobytes() == mask.tobytes()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_every_16_bit_number(dtype):
    """-0 stays and NaN passes as in relu; the mask is that of the rounded result, subnormals included."""
    x = np.arange(65536, dtype=np.uint16)
    y, mask = bias_reference(x, None, None, 1, True, dtype)
    assert y[0x8000] == 0x8000 and y[0x8001] == 0 and y[1] == 1 and mask[0] == 0b11111110
    got, bits = run_bias_act(x, None, None, dtype, 1, 1, True, [kernels.Range()])
    same(got, y, dtype)
    assert bits.tobytes() == mask.tobytes()
    tiny = np.array([1e-9, 1e-39], np.float32)  # a sum that rounds to 0 in float16 is not positive
    got, bits = run_bias_act(np.zeros(2, np.uint16), tiny, None, "float16", 2, 1, True, [kernels.Range()])
    assert got.tolist() == [0, 0] and bits.tolist() == [0]


@pytest.mark.parametrize("dtype", FLOATS)
def test_threads(dtype):
    """The pieces of torch's parallel_for, at once; ThreadSanitizer watches this one."""
    rng = np.random.default_rng(2)
    x, residual = (gradients(rng, 3 * 5 * 1111, dtype) for _ in range(2))
    bias, results = biases(rng, 5, dtype), []
    for threads in (1, 2, 4):
        out, bits, back = Output(x.size, dtype), bits_output(x.size), Output(x.size, dtype)
        kernels.bias_act(ref(x, dtype), ref(bias, str(bias.dtype)), ref(residual, dtype), ref(out.array, dtype),
                         ref(bits.array, "uint8"), channels=5, channel_stride=1111,
                         range=kernels.Range(threads=threads))
        kernels.act_grad(ref(out.array, dtype), ref(bits.array, "uint8"), ref(back.array, dtype),
                         range=kernels.Range(threads=threads))
        results.append(b"".join(part.result().tobytes() for part in (out, bits, back)))
    assert results[0] == results[1] == results[2]
