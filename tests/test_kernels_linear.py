"""ensemble_linear's CPU kernels on numpy arrays, without torch: against the definition in float64, whatever the sizes,
alignment and the ranges they run on."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels_arrays import INF, NAN, NARROW, Output, cast, compute, examples, kernels, place, ref, values

DTYPES = ("float32", *NARROW)
ROUNDING = {"float32": 2.0**-24, "float16": 2.0**-11, "bfloat16": 2.0**-8}


def packed(bits: np.ndarray) -> np.ndarray:
    return np.packbits(bits, axis=-1, bitorder="little")


class Product:
    """Operands of act(a[z] @ b[z] + bias[z]) at any address, what it should be, and the kernel run on them."""

    def __init__(self, rng, dtype, members, batch, cols, inner, lead=0, *, shared=False, inner_first=False,
                 reduce=False, keep=False, bias=False, act=False, tiles=True):
        self.dtype, self.flags = dtype, {"shared": shared, "inner_first": inner_first, "reduce": reduce, "tiles": tiles}
        self.sizes = {"members": members, "batch": batch, "cols": cols, "inner": inner}
        self.lead, self.act = lead, act
        self.a = self.operand(rng, (1 if shared else members, batch, inner))
        self.b = self.operand(rng, (members, inner, cols) if inner_first else (members, cols, inner))
        self.bias = self.operand(rng, (members, cols)) if bias else None
        self.keep = rng.integers(0, 256, (members, batch, -(-inner // 8)), dtype=np.uint8) if keep else None

    def operand(self, rng, shape):
        return place(cast(rng.normal(size=int(np.prod(shape))), self.dtype), self.lead).reshape(shape)

    def wanted(self):
        """(result, the same with every term's magnitude: what an error is measured by), float64."""
        a, b = (values(t.ravel(), self.dtype).reshape(t.shape) for t in (self.a, self.b))
        a = np.broadcast_to(a, (self.sizes["members"], *a.shape[1:]))
        if self.keep is not None:
            bits = np.unpackbits(self.keep, axis=-1, bitorder="little")[..., :self.sizes["inner"]]
            a = np.where(bits, a, 0.0)
        b = b if self.flags["inner_first"] else b.swapaxes(1, 2)
        out, size = a @ b, np.abs(a) @ np.abs(b)
        if self.flags["reduce"]:
            out, size = out.sum(0, keepdims=True), size.sum(0, keepdims=True)
        if self.bias is not None:
            bias = values(self.bias.ravel(), self.dtype).reshape(self.bias.shape)[:, None]
            out, size = out + bias, size + np.abs(bias)
        return (np.maximum(out, 0) if self.act else out), size

    def memory(self):
        s = self.sizes
        rows = (1 if self.flags["reduce"] else s["members"]) * s["batch"]
        mask = np.full((rows, -(-s["cols"] // 8)), 0xFF, np.uint8) if self.act else None
        return Output(rows * s["cols"], self.dtype, self.lead, 3), mask

    def run(self, ranges=(None,)):
        out, mask = self.memory()
        for r in ranges:
            kernels.ensemble_linear(ref(self.a, self.dtype), ref(self.b, self.dtype), ref(out.array, self.dtype),
                                    bias=ref(self.bias, self.dtype), mask=mask, keep=self.keep,
                                    range=r or kernels.Range(), **self.sizes, **self.flags)
        return out.result(), mask

    def check(self, out, mask):
        wanted, size = self.wanted()
        got = values(out, self.dtype).reshape(wanted.shape)
        # A sum of n terms in float32, then one rounding.
        terms = self.sizes["inner"] * (self.sizes["members"] if self.flags["reduce"] else 1)
        assert (np.abs(got - wanted) <= terms * 2.0**-24 * size + ROUNDING[self.dtype] * np.abs(wanted)).all()
        if self.act:
            assert np.array_equal(mask, packed(got > 0).reshape(mask.shape))


def products(data, dtype, most: int = 300, **kw):
    """Any flags that go together."""
    flag = st.booleans()
    backward = data.draw(flag)
    flags = ({"inner_first": True, "keep": data.draw(flag), "reduce": data.draw(flag)} if backward else
             {"shared": data.draw(flag), "bias": data.draw(flag), "act": data.draw(flag)})
    flags["tiles"] = data.draw(flag)  # the processor's, where it has them
    sizes = [data.draw(st.integers(1, top)) for top in (4, 19, 90, most)]
    return Product(np.random.default_rng(data.draw(st.integers(0, 2**32 - 1))), dtype, *sizes,
                   data.draw(st.integers(0, 9)), **flags, **kw)


@examples
@given(st.data(), st.sampled_from(DTYPES))
def test_against_the_definition(data, dtype):
    product = products(data, dtype)
    product.check(*product.run())


@examples
@given(st.data(), st.sampled_from(DTYPES), st.lists(st.integers(0, 12), max_size=3))
def test_any_split_gives_the_same(data, dtype, cuts):
    product = products(data, dtype)
    blocks = -(-product.sizes["cols"] // kernels.LINEAR_BLOCK)
    blocks *= 1 if product.flags["reduce"] else product.sizes["members"]
    ends = sorted({0, blocks, *(c for c in cuts if c < blocks)})
    whole, mask = product.run()
    cut, cut_mask = product.run([kernels.Range(a, b) for a, b in zip(ends, ends[1:])])
    assert np.array_equal(whole, cut) and np.array_equal(mask, cut_mask)
    threaded, threaded_mask = product.run([kernels.Range(threads=3)])
    assert np.array_equal(whole, threaded) and np.array_equal(mask, threaded_mask)


@examples
@given(st.sampled_from(DTYPES), st.integers(1, 3), st.integers(1, 5), st.sampled_from([1, 7, 8, 65, 1024, 1025, 2100]),
       st.booleans(), st.booleans(), st.integers(0, 9), st.integers(0, 2**32 - 1))
def test_bias_and_activation_alone(dtype, members, batch, cols, bias, act, lead, seed):
    """Bit for bit the plain expression in float32, and the mask of what was rounded."""
    rng = np.random.default_rng(seed)
    special = rng.choice([0.0, -0.0, NAN, INF, -INF, 1e-45, 6e-8, -3e-8, 65520.0], members * batch * cols)
    v = np.where(rng.random(special.size) < 0.2, special, rng.normal(size=special.size))
    out = Output(v.size, dtype, lead, 3)
    out.array[:] = cast(v, dtype)
    b = cast(rng.normal(size=members * cols), dtype) if bias else None
    mask = np.full((members * batch, -(-cols // 8)), 0xFF, np.uint8) if act else None
    wide = compute(out.array, dtype).reshape(members, batch, cols)
    if bias:
        wide = wide + compute(b, dtype).reshape(members, 1, cols)
    if act:
        wide = np.where(wide < 0, np.float32(0), wide)
    kernels.ensemble_linear_act(ref(out.array, dtype), members=members, cols=cols, bias=ref(b, dtype), mask=mask,
                                range=kernels.Range(threads=2))
    got = values(out.result(), dtype)
    assert np.array_equal(got, values(cast(wide.ravel(), dtype), dtype), equal_nan=True)
    if act:
        assert np.array_equal(mask, packed(got.reshape(-1, cols) > 0))


@examples
@given(st.sampled_from(DTYPES), st.integers(1, 5), st.sampled_from([1, 7, 8, 65, 1024, 1025]), st.integers(0, 9),
       st.integers(0, 2**32 - 1))
def test_the_gradient_of_the_activation_alone(dtype, rows, cols, lead, seed):
    rng = np.random.default_rng(seed)
    grad = place(cast(np.where(rng.random(rows * cols) < 0.1, NAN, rng.normal(size=rows * cols)), dtype), lead)
    keep = rng.integers(0, 256, (rows, -(-cols // 8)), dtype=np.uint8)
    out = Output(grad.size, dtype, lead, 3)
    kernels.ensemble_linear_act(ref(out.array, dtype), members=1, cols=cols, a=ref(grad, dtype), keep=keep)
    bits = np.unpackbits(keep, axis=-1, bitorder="little")[:, :cols].ravel()
    wanted = np.where(bits, values(grad, dtype), 0.0)
    assert np.array_equal(values(out.result(), dtype), wanted, equal_nan=True)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_nan_passes_the_activation_and_only_where_it_is_kept(dtype):
    rng = np.random.default_rng(0)
    nan = cast(np.array([NAN]), dtype)[0]
    forward = Product(rng, dtype, 2, 3, 20, 9, act=True)
    forward.a[1, 2, 4] = nan
    out, mask = forward.run()
    out = values(out, dtype).reshape(2, 3, 20)
    assert np.isnan(out[1, 2]).all() and np.isfinite(out[0]).all() and np.isfinite(out[1, :2]).all()
    assert not mask.reshape(2, 3, 3)[1, 2].any()
    backward = Product(rng, dtype, 1, 2, 20, 16, inner_first=True, keep=True)
    backward.a[0, 0, 3] = nan
    backward.keep[0, 0, 0] = 0b11110111
    assert np.isfinite(values(backward.run()[0], dtype)).all()
    backward.keep[0, 0, 0] = 0b00001000
    assert np.isnan(values(backward.run()[0], dtype).reshape(2, 20)[0]).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("flags", [{"act": True, "bias": True}, {"shared": True}, {"inner_first": True, "keep": True},
                                   {"inner_first": True, "reduce": True}], ids=lambda f: "-".join(f))
def test_more_rows_than_are_multiplied_at_once(dtype, flags):
    product = Product(np.random.default_rng(0), dtype, 2, 1100, 150, 70, **flags)
    product.check(*product.run([kernels.Range(threads=2)]))


@pytest.mark.parametrize("inner_first", [False, True])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_all_digits_count(dtype, inner_first):
    """One number of each row, by 1: nothing is lost where numbers are taken apart, up to the ends of their range."""
    product = Product(np.random.default_rng(0), dtype, 1, 40, 40, 40, inner_first=inner_first)
    rng, top = np.random.default_rng(1), {"float32": 3.3e38, "float16": 65504.0}[dtype]
    wanted = rng.normal(size=(40, 40)) * 10.0 ** rng.integers(-4, 5, (40, 40))
    wanted[0, :2], wanted[1, :2] = [top, -top], [2.0**-24, -3 * 2.0**-24]
    one, many = cast(np.eye(40), dtype).reshape(1, 40, 40), cast(wanted, dtype).reshape(1, 40, 40)
    for product.a, product.b, transposed in ((many, one, False), (one, many, not inner_first)):
        out, expected = values(product.run()[0], dtype).reshape(40, 40), values(many[0], dtype).reshape(40, 40)
        assert np.array_equal(out, expected.T if transposed else expected)


@pytest.mark.parametrize("where", ["a", "b"])
@pytest.mark.parametrize("dtype", DTYPES)
def test_infinite_numbers(dtype, where):
    """What an infinite number meets is infinite, or NaN where it meets 0 or its opposite; the rest is as ever."""
    product = Product(np.random.default_rng(0), dtype, 1, 5, 40, 50, act=True)
    target = getattr(product, where)
    target[0, 2, 7] = cast(np.array([INF]), dtype)[0]
    got = values(product.run()[0], dtype).reshape(5, 40)
    with np.errstate(invalid="ignore"):
        wanted = product.wanted()[0][0]
    assert np.array_equal(np.isinf(got), np.isinf(wanted)) and np.isinf(got).any() and not np.isnan(got).any()
    finite = np.isfinite(wanted)
    assert np.allclose(got[finite], wanted[finite], rtol=2 * ROUNDING[dtype], atol=1e-4)
