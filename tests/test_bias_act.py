"""bias_act, act_grad: bit for bit the plain expression, its mask in the order of memory, and torch's own gradient."""
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st

from ensadv_fast import ops
from ensadv_fast.ops.act_grad import reference as grad_reference
from ensadv_fast.ops.bias_act import reference
from ensadv_fast.ops.cases import FLOATS

NARROW = (torch.float16, torch.bfloat16)
LAST = {4: torch.channels_last, 5: torch.channels_last_3d}
booleans = st.booleans()
# Also a bound that 16 bits do not hold, ends where specials are, and none at all.
ACTS = [{}, {"act": None}, {"act": "hardtanh", "lo": 0.0, "hi": 6.0}, {"act": "hardtanh"},
        {"act": "hardtanh", "lo": -0.7, "hi": 0.1}, {"act": "hardtanh", "lo": -math.inf, "hi": math.inf},
        {"act": "hardtanh", "lo": 0.5, "hi": 0.5}, {"act": "leaky_relu"}, {"act": "leaky_relu", "slope": 0.0},
        {"act": "leaky_relu", "slope": 2}]
specials = [0.0, -0.0, 1e-45, -1e-45, 6e-8, -6e-8, 65504.0, 3e38, math.nan, math.inf, -math.inf]


def same(got, wanted):
    """Also the signs of zeros."""
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())
    assert torch.equal(got.signbit() | got.isnan(), wanted.signbit() | wanted.isnan())


def values(shape, dtype, seed, last=False):
    g = torch.Generator().manual_seed(seed)
    v = torch.randn(shape, generator=g)
    chosen = torch.tensor(specials)[torch.randint(len(specials), shape, generator=g)]
    v = torch.where(torch.rand(shape, generator=g) < 0.2, chosen, v).to(dtype)
    return v.contiguous(memory_format=LAST[v.dim()]) if last and v.dim() in LAST else v


@given(shape=st.one_of(st.lists(st.integers(0, 9), min_size=2, max_size=5),
                       st.tuples(st.integers(1, 3), st.integers(1, 70), st.integers(1, 9), st.integers(1, 9))),
       dtype=st.sampled_from(FLOATS), last=booleans, residual=st.sampled_from([None, False, True]),
       bias=st.sampled_from([None, "own", "wide"]), act=st.sampled_from(ACTS),
       into=st.sampled_from([None, "x", "residual", "new", "other format"]), seed=st.integers(0, 999))
def test_equals_the_plain_expression(shape, dtype, last, residual, bias, act, into, seed):
    x = values(shape, dtype, seed, last)
    r = None if residual is None else values(shape, dtype, seed + 1, residual)
    b = None if bias is None else values(shape[1:2], torch.float32 if bias == "wide" else dtype, seed + 2)
    wanted, bits = reference(x, b, r, **act)
    out = {None: None, "x": x, "residual": r, "new": torch.full_like(x, math.nan),
           "other format": values(shape, dtype, seed, not last)}[into]
    y, mask = ops.bias_act(x, b, r, **act, out=out)
    same(y, wanted)
    assert (y is out) if out is not None else y.stride() == x.stride()
    assert (mask is None) if bits is None else torch.equal(mask, bits)


@given(shape=st.lists(st.integers(0, 9), min_size=2, max_size=5), dtype=st.sampled_from(FLOATS), last=booleans,
       grad_last=booleans, in_place=booleans, seed=st.integers(0, 999))
def test_act_grad_lets_through_what_was_positive(shape, dtype, last, grad_last, in_place, seed):
    y, mask = ops.bias_act(values(shape, dtype, seed, last), None)
    grad = values(shape, dtype, seed + 1, grad_last)
    wanted = torch.where(y > 0, grad, torch.zeros_like(grad))
    last = last and len(shape) in LAST
    same(grad_reference(grad, mask, channels_last=last), wanted)
    got = ops.act_grad(grad, mask, channels_last=last, out=grad if in_place else None)
    same(got, wanted)
    assert got is grad if in_place else got.is_contiguous(memory_format=LAST[y.dim()] if last else
                                                          torch.contiguous_format)


@given(shape=st.lists(st.integers(0, 9), min_size=2, max_size=5), dtype=st.sampled_from(FLOATS), last=booleans,
       slope=st.sampled_from([0.0, 0.01, 1.5]), in_place=booleans, seed=st.integers(0, 999))
def test_act_grad_by_a_slope(shape, dtype, last, slope, in_place, seed):
    y, mask = ops.bias_act(values(shape, dtype, seed, last), None, act="leaky_relu", slope=slope)
    grad = values(shape, dtype, seed + 1, last)
    wanted = torch.where(y > 0, grad, (grad.double() if dtype == torch.float64 else grad.float()).mul(slope).to(dtype))
    same(grad_reference(grad, mask, slope=slope), wanted)
    got = ops.act_grad(grad, mask, slope=slope, out=grad if in_place else None)
    same(got, wanted)


PLAIN = {"relu": torch.relu, "relu6": F.relu6, "hardtanh": F.hardtanh,
         "bounds": lambda x: F.hardtanh(x, -0.25, 2.5), "leaky": F.leaky_relu, "steep": lambda x: F.leaky_relu(x, 3.0)}
HOW = {"relu": {}, "relu6": {"act": "hardtanh", "lo": 0.0, "hi": 6.0}, "hardtanh": {"act": "hardtanh"},
       "bounds": {"act": "hardtanh", "lo": -0.25, "hi": 2.5}, "leaky": {"act": "leaky_relu"},
       "steep": {"act": "leaky_relu", "slope": 3.0}}


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("name", PLAIN)
def test_every_act_is_torchs(name, dtype, device):
    """Its values, NaN, infinities and the bounds themselves among them; its gradients, but where x is NaN."""
    ends = [-1.0, 1.0, 6.0, -0.25, 2.5, 0.2, *specials]
    g = torch.Generator().manual_seed(0)
    x = torch.cat([torch.tensor(ends).repeat(9), torch.randn(300, generator=g) * 4]).to(dtype)[None].to(device)
    grad = values(tuple(x.shape), dtype, 1).nan_to_num(0.5, 1.0, 2.0).to(device)
    leaf = x.clone().requires_grad_()
    plain = PLAIN[name](leaf)
    wanted, = torch.autograd.grad(plain, leaf, grad)
    y, mask = ops.bias_act(x, None, **HOW[name])
    same(y, plain.detach())
    got, number = ops.act_grad(grad, mask, slope=HOW[name].get("slope", 0.01 if "leaky" in name else None)), ~x.isnan()
    assert torch.equal(got[number], wanted[number])
    if HOW[name].get("act") == "leaky_relu":
        assert torch.equal(got, wanted)
    else:
        assert not got[~number].any()


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_the_pair_is_autograd_of_the_epilogue(dtype, last, device):
    x, r, grad = (values((3, 5, 7, 6), dtype, seed, last).nan_to_num().to(device) for seed in range(3))
    bias = values((5,), torch.float32, 3).nan_to_num().to(device)
    leaves = [t.clone().requires_grad_() for t in (x, r)]
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    plain = (leaves[0].to(wide) + bias.to(wide).view(-1, 1, 1) + leaves[1].to(wide)).relu().to(dtype)
    wanted = torch.autograd.grad(plain, leaves, grad)
    y, mask = ops.bias_act(x, bias, r)
    same(y, plain.detach())
    positive = y > 0  # where y is 0 by rounding alone, autograd lets the gradient through
    for g in wanted:
        same(ops.act_grad(grad, mask), torch.where(positive, g, torch.zeros_like(g)))


def test_zeros_and_nan_are_those_of_relu():
    for dtype in FLOATS:
        x = torch.tensor([specials * 7], dtype=torch.float64).to(dtype)
        same(ops.bias_act(x, None)[0], torch.relu(x))
        same(ops.bias_act(x, None, act=None)[0], x)
        y, mask = ops.bias_act(x.clone(), torch.zeros(x.shape[1]), x)
        assert torch.equal(mask, reference(y, None)[1])
        kept = ops.act_grad(torch.full_like(x, math.nan), torch.zeros_like(mask))
        assert torch.equal(kept, torch.zeros_like(x)) and not kept.signbit().any()


def test_a_result_that_rounds_to_zero_is_not_positive():
    y, mask = ops.bias_act(torch.zeros(1, 3, dtype=torch.float16), torch.tensor([1e-9, 1.0, -1.0]))
    assert y.tolist() == [[0.0, 1.0, 0.0]] and mask.tolist() == [0b010]


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_the_sum_is_rounded_once(dtype):
    """In 16-bit steps 256 + 1/2 + 1/2 would stay 256 in bfloat16, and likewise 2048 in float16."""
    large = 256.0 if dtype == torch.bfloat16 else 2048.0
    y, _ = ops.bias_act(torch.full((1, 1), large, dtype=dtype), torch.ones(1), torch.ones(1, 1, dtype=dtype))
    assert y.item() == large + 2


def test_memory_that_is_neither_contiguous_nor_channels_last():
    x = values((4, 3, 6, 10), torch.float32, 0)[..., ::2]
    y, mask = ops.bias_act(x, torch.ones(3))
    assert y.is_contiguous()
    wanted, bits = reference(x.contiguous(), torch.ones(3))
    same(y, wanted)
    assert torch.equal(mask, bits)
    assert ops.bias_act(x, torch.ones(3), out=x)[0] is x
    same(x.contiguous(), wanted)
    expanded = torch.ones(4, 3, 1, 1).expand(4, 3, 6, 5)
    same(ops.act_grad(expanded, mask), (wanted > 0).float())


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("last", [False, True])
def test_results_do_not_depend_on_threads(dtype, last):
    x, bias = values((4, 70, 37, 41), dtype, 0, last), values((70,), torch.float32, 1)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        y, mask = ops.bias_act(x, bias)
        results.append((y, mask, ops.act_grad(y, mask)))
    torch.set_num_threads(threads)
    for y, mask, grad in results[1:]:
        same(y, results[0][0])
        same(grad, results[0][2])
        assert torch.equal(mask, results[0][1])
    same(results[0][0], reference(x, bias)[0])
    assert torch.equal(results[0][1], reference(x, bias)[1])


def test_a_given_mask_is_written_and_autograd_notices():
    x, mask = torch.randn(2, 4, 3, 3), torch.full((9,), 255, dtype=torch.uint8)
    version = mask._version
    assert ops.bias_act(x, None, mask=mask)[1] is mask and mask._version > version
    version = x._version
    ops.bias_act(x.contiguous(memory_format=torch.channels_last), None, out=x, mask=mask)
    assert torch.equal(mask, reference(x.contiguous(memory_format=torch.channels_last), None)[1])
    assert x._version > version


X, M = torch.rand(2, 3, 4, 4), torch.zeros(12, dtype=torch.uint8)
BAD = [
    (lambda: ops.bias_act(X.int(), None), TypeError, "bias_act: x must be float32.*got int32"),
    (lambda: ops.bias_act(X[0, 0, 0], None), ValueError, r"x must have shape \[N, C, ...\], got \(4,\)"),
    (lambda: ops.bias_act(X, torch.ones(4)), ValueError, r"bias must have shape \[C\] = \[3\], got \(4,\)"),
    (lambda: ops.bias_act(X, 1.0), TypeError, "bias must be a torch.Tensor, got float"),
    (lambda: ops.bias_act(X, torch.ones(3).half()), TypeError, "bias must be float32, got float16"),
    (lambda: ops.bias_act(X, torch.ones(3, device="meta")), ValueError, "bias must be on x's device cpu, got meta"),
    (lambda: ops.bias_act(X, None, X[:1]), ValueError,
     r"residual must have x's shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
    (lambda: ops.bias_act(X, None, X.half()), TypeError, "residual must be float32, got float16"),
    (lambda: ops.bias_act(X, None, act="gelu"), ValueError,
     "act must be one of relu, hardtanh, leaky_relu, None, got 'gelu'"),
    (lambda: ops.bias_act(X, None, act="hardtanh", lo=1.0, hi=0.0), ValueError, "lo must not exceed hi"),
    (lambda: ops.bias_act(X, None, act="hardtanh", lo="0"), TypeError, "lo must be a number, got str"),
    (lambda: ops.bias_act(X, None, act="leaky_relu", slope=-0.1), ValueError, "slope must be >= 0, got -0.1"),
    (lambda: ops.bias_act(X, None, act="leaky_relu", slope=math.inf), ValueError, "slope must be finite, got inf"),
    (lambda: ops.act_grad(X, M, slope=-1.0), ValueError, "act_grad: slope must be >= 0, got -1.0"),
    (lambda: ops.act_grad(X, M, slope=True), TypeError, "act_grad: slope must be a number, got bool"),
    (lambda: ops.bias_act(X, None, out=X.half()), TypeError, "out must be float32, got float16"),
    (lambda: ops.bias_act(X, None, out=X.clone().requires_grad_()), ValueError, "out must not require grad"),
    (lambda: ops.bias_act(X, None, mask=M[1:]), ValueError, r"mask must be contiguous, of shape \[12\].*got \(11,\)"),
    (lambda: ops.bias_act(X, None, mask=M.int()), TypeError, "mask must be uint8, got int32"),
    (lambda: ops.bias_act(X, None, act=None, mask=M), ValueError, "mask must be None where act is None, got a tensor"),
    (lambda: ops.act_grad(X.byte(), M), TypeError, "act_grad: grad must be float32.*got uint8"),
    (lambda: ops.act_grad(X, None), TypeError, "mask must be a torch.Tensor, got None"),
    (lambda: ops.act_grad(X, M[:-1]), ValueError,
     r"mask must be .* \[12\]: a bit for each of grad's 96 elements, got \(11,\)"),
    (lambda: ops.act_grad(X, M, channels_last=1), TypeError, "channels_last must be True, False or None, got int"),
    (lambda: ops.act_grad(X[0], M[:6], channels_last=True), ValueError,
     "channels_last must be False or None unless grad has 4 or 5"),
    (lambda: ops.act_grad(X, M, out=X[:1]), ValueError, "out must have grad's shape"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:50] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_raw_ops_protect_memory():
    raw = torch.ops.ensadv_fast
    x = torch.rand(2, 3)
    with pytest.raises(RuntimeError, match="^bias_act: mask must be contiguous uint8 of 1 elements on cpu, got uint8"):
        raw.bias_act(x, None, None, x, M)
    with pytest.raises(RuntimeError, match="^act_grad: mask must be contiguous uint8 of 1 elements on cpu, got uint8"):
        raw.act_grad(x, M, x)
    with pytest.raises(RuntimeError, match=r"bias must be contiguous float32 \(3,\) on cpu, got float32 \(2,\) on cpu"):
        raw.bias_act(x, torch.ones(2), None, x, None)
    with pytest.raises(RuntimeError, match="^bias_act: act must be 0 to 2, got 3"):
        raw.bias_act(x, None, None, x, None, 3)
    store = torch.rand(7)
    with pytest.raises(RuntimeError, match="out must not overlap residual in memory, got 20 bytes in common"):
        raw.bias_act(x, None, store[:6].view(2, 3), store[1:].view(2, 3), None)
    with pytest.raises(RuntimeError, match="mask must not overlap out in memory, got 1 bytes in common"):
        raw.bias_act(x, None, None, x, x.view(torch.uint8).view(-1)[:1])
