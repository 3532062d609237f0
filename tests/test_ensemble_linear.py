"""ensemble_linear beyond the generic tests of ops: accuracy, both ways of computing it, layouts, and bad input."""
import sys

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensadv_fast import ops
from ensadv_fast.ops.ensemble_linear import DTYPES, grad_reference, reference

MODULE = sys.modules["ensadv_fast.ops.ensemble_linear"]  # the package's attribute of that name is the function
SIZES = [(2, 64, 300, 784), (3, 5, 1000, 300), (2, 9, 2048, 300), (2, 17, 33, 2048), (4, 1, 1, 1)]
every_dtype = pytest.mark.parametrize("dtype", DTYPES, ids=lambda d: str(d).removeprefix("torch."))
every_size = pytest.mark.parametrize("size", SIZES, ids=lambda s: "x".join(map(str, s)))


@pytest.fixture(params=["ours", "torch's"])
def way(request, monkeypatch):
    """The products by our kernel, or by torch's."""
    monkeypatch.setattr(MODULE, "OURS_UP_TO", {} if request.param == "ours" else
                        dict.fromkeys(MODULE.CASES, -1))


def operands(members, batch, outputs, inner, dtype, device="cpu", shared=False):
    g = torch.Generator().manual_seed(members * batch + outputs)
    x = torch.randn(*(() if shared else (members,)), batch, inner, generator=g)
    weight = torch.randn(members, outputs, inner, generator=g) / inner**0.5
    bias = torch.randn(members, outputs, generator=g)
    return [t.to(device, dtype) for t in (x, weight, bias)]


def error(got, exact) -> float:
    return (got.double() - exact).norm().item()


@every_dtype
@every_size
@pytest.mark.parametrize("shared", [False, True])
def test_at_most_twice_the_error_of_baddbmm(way, dtype, size, shared, device):
    x, weight, bias = operands(*size, dtype, device, shared)
    exact = torch.baddbmm(bias[:, None].double(), x.double().expand(size[0], -1, -1), weight.double().mT)
    plain = torch.baddbmm(bias[:, None], x.expand(size[0], -1, -1), weight.mT)
    linear, none = ops.ensemble_linear(x, weight, bias)
    assert none is None and error(linear, exact) <= 2 * error(plain, exact)
    y, mask = ops.ensemble_linear(x, weight, bias, act="relu")
    assert error(y, exact.relu()) <= 2 * error(plain.relu(), exact.relu())
    assert torch.equal(y, linear.relu())
    assert torch.equal(mask, reference(y, torch.eye(size[2], dtype=dtype, device=device).expand(size[0], -1, -1), None,
                                       act="relu")[1])  # bits of y > 0


@every_dtype
@every_size
@pytest.mark.parametrize("reduce", [False, True])
def test_at_most_twice_the_gradient_error_of_bmm(way, dtype, size, reduce, device):
    x, weight, bias = operands(*size, dtype, device)
    y, mask = ops.ensemble_linear(x, weight, bias, act="relu")
    grad = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(device, dtype)
    kept = torch.where(y > 0, grad, 0.0)
    exact, plain = kept.double() @ weight.double(), kept @ weight
    if reduce:
        exact, plain = exact.sum(0), plain.sum(0)
    assert error(ops.ensemble_linear_grad(grad, weight, mask, reduce=reduce), exact) <= 2 * error(plain, exact)
    whole = ops.ensemble_linear_grad(kept, weight, None, reduce=reduce)
    assert torch.equal(whole, ops.ensemble_linear_grad(grad, weight, mask, reduce=reduce))


def test_it_is_autograds_gradient(way):
    x, weight, bias = operands(3, 6, 20, 30, torch.float32, shared=True)
    x.requires_grad_()
    y, mask = ops.ensemble_linear(x, weight, bias, act="relu")
    assert not y.requires_grad
    g = torch.randn_like(y)
    plain = torch.baddbmm(bias[:, None], x.expand(3, -1, -1), weight.mT).relu()
    wanted, = torch.autograd.grad(plain, x, g)
    torch.testing.assert_close(ops.ensemble_linear_grad(g, weight, mask, reduce=True), wanted)


@given(members=st.integers(1, 4), batch=st.integers(0, 20), outputs=st.integers(0, 40), inner=st.integers(0, 40),
       dtype=st.sampled_from(DTYPES), ours=st.booleans())
def test_any_size(members, batch, outputs, inner, dtype, ours):
    """Empty ones too: a sum of nothing is the bias."""
    x, weight, bias = operands(members, batch, outputs, max(inner, 1), dtype)
    x, weight = x[..., :inner], weight[..., :inner]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(MODULE, "OURS_UP_TO", {} if ours else dict.fromkeys(MODULE.CASES, -1))
        y, mask = ops.ensemble_linear(x, weight, bias, act="relu")
        back = ops.ensemble_linear_grad(y, weight, mask)
    torch.testing.assert_close(y, reference(x, weight, bias, act="relu")[0])
    torch.testing.assert_close(back, grad_reference(y, weight, mask))
    assert mask.shape == (members, batch, -(-outputs // 8))


def test_operands_need_not_be_contiguous(way):
    x, weight, bias = operands(3, 6, 20, 30, torch.float32)
    wanted = ops.ensemble_linear(x, weight, bias, act="relu")
    turned = [t.mT.contiguous().mT for t in (x, weight, bias)]
    assert all(torch.equal(a, b) for a, b in zip(ops.ensemble_linear(*turned, act="relu"), wanted, strict=True))
    assert torch.equal(ops.ensemble_linear_grad(wanted[0].mT.contiguous().mT, turned[1], wanted[1]),
                       ops.ensemble_linear_grad(wanted[0], weight, wanted[1]))


def test_autocast_does_not_narrow(way):
    x, weight, bias = operands(2, 4, 9, 10, torch.float32)
    wanted, mask = ops.ensemble_linear(x, weight, bias, act="relu")
    back = ops.ensemble_linear_grad(wanted, weight, mask)
    with torch.autocast("cpu", torch.bfloat16):
        y, _ = ops.ensemble_linear(x, weight, bias, act="relu")
        assert y.dtype == torch.float32 and torch.equal(y, wanted)
        assert torch.equal(ops.ensemble_linear_grad(wanted, weight, mask), back)


def test_both_ways_compile(way):
    def both(x, weight, bias):
        y, mask = ops.ensemble_linear(x, weight, bias, act="relu")
        return ops.ensemble_linear_grad(y, weight, mask)

    arguments = operands(2, 4, 9, 10, torch.bfloat16)
    torch._dynamo.reset()
    compiled = torch.compile(both, fullgraph=True, backend="aot_eager")
    assert torch.equal(compiled(*arguments), both(*arguments))


X, W, B = operands(2, 3, 5, 4, torch.float32)
MASK = torch.zeros(2, 3, 1, dtype=torch.uint8)
BAD = [
    (lambda: ops.ensemble_linear(X.double(), W, B), TypeError, "x must be float32, float16, bfloat16, got float64"),
    (lambda: ops.ensemble_linear(X.half(), W, B), TypeError, "weight must be float16, got float32"),
    (lambda: ops.ensemble_linear(X, W, B.half()), TypeError, "bias must be float32, got float16"),
    (lambda: ops.ensemble_linear(X[None], W, B), ValueError, r"x must have shape \[K, B, I\] or \[B, I\], got \(1, 2,"),
    (lambda: ops.ensemble_linear(X, W[0], B), ValueError, r"weight must have shape \[K, O, I\], got \(5, 4\)"),
    (lambda: ops.ensemble_linear(X[:1], W, B), ValueError,
     r"weight must have shape \[K, O, I\] for .* for \(1, 3, 4\)"),
    (lambda: ops.ensemble_linear(X, W, B[0]), ValueError, r"bias must have shape \[K, O\] = \[2, 5\], got \(5,\)"),
    (lambda: ops.ensemble_linear(X, W.to("meta"), B), ValueError, "weight must be on x's device cpu, got meta"),
    (lambda: ops.ensemble_linear(X, W, B, act="gelu"), ValueError, "act must be 'relu' or None, got 'gelu'"),
    (lambda: ops.ensemble_linear(None, W, B), TypeError, "x must be a torch.Tensor, got NoneType"),
    (lambda: ops.ensemble_linear_grad(X, W, None), ValueError, r"weight must have shape \[K, O, I\] = \[2, 4, I\]"),
    (lambda: ops.ensemble_linear_grad(X[0], W, None), ValueError, r"grad must have shape \[K, B, O\], got \(3, 4\)"),
    (lambda: ops.ensemble_linear_grad(X @ W.mT, W, MASK.int()), TypeError, "mask must be uint8, got int32"),
    (lambda: ops.ensemble_linear_grad(X @ W.mT, W, MASK[0]), ValueError, r"mask must have shape .* = \[2, 3, 1\], got"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:50] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_raw_ops_protect_memory():
    raw = torch.ops.ensadv_fast
    y = torch.empty(2, 3, 5)
    with pytest.raises(RuntimeError, match=r"^ensemble_linear: x must be contiguous float32 \(2, 3, 4\) on cpu, got "):
        raw.ensemble_linear(X[:, :2], W, B, y, None)
    with pytest.raises(RuntimeError, match=r"mask must be contiguous uint8 \(2, 3, 1\) on cpu, got uint8 \(1, 3, 1\)"):
        raw.ensemble_linear(X, W, B, y, MASK[:1])
    with pytest.raises(RuntimeError, match=r"out must be contiguous float32 \(3, 4\) on cpu, got float32 \(2, 4\)"):
        raw.ensemble_linear_grad(y, W, MASK, torch.empty(2, 4))
    with pytest.raises(RuntimeError, match="out must not overlap grad in memory, got 116 bytes in common"):
        store = torch.empty(40)
        raw.ensemble_linear_act_grad(store[:30].view(2, 3, 5), MASK, store[1:31].view(2, 3, 5))
