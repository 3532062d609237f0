"""model_entry: bit for bit the plain expression in every dtype and layout, and its gradient torch's own."""
import itertools
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from networks import batch, small_net

import ensadv_fast as ea
from ensadv_fast import ops
from ensadv_fast.ops.cases import FLOATS, IMAGES
from ensadv_fast.ops.model_entry import reference

LAYOUTS = (torch.contiguous_format, torch.channels_last)
NARROW = (torch.float16, torch.bfloat16)
layouts, booleans = st.sampled_from(LAYOUTS), st.booleans()


def assert_same(got, wanted):
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan()) and torch.equal(got.nan_to_num(), wanted.nan_to_num())


def images(shape, dtype, layout=torch.contiguous_format, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x = torch.rand(shape, generator=g) * 1.4 - 0.2
    x = x if dtype.is_floating_point else (x.clamp(0, 1) * 255).round()
    return x.to(device, dtype).contiguous(memory_format=layout)


def statistics(channels, seed=0):
    g = torch.Generator().manual_seed(seed)
    return torch.rand(channels, generator=g), torch.rand(channels, generator=g) + 0.1


def gradients(function, x, mean, std, grad, delta, **kw):
    leaves = [t.detach().clone(memory_format=torch.preserve_format) if t is not None else None for t in (x, delta)]
    wanted = [t.requires_grad_() for t in leaves if t is not None and t.is_floating_point()]
    result = function(leaves[0], mean, std, delta=leaves[1], **kw)
    return result.detach(), torch.autograd.grad(result, wanted, grad)


@given(n=st.integers(0, 3), c=st.integers(1, 6), h=st.integers(1, 40), w=st.integers(1, 40),
       x_dtype=st.sampled_from(IMAGES), delta_dtype=st.sampled_from([None, *FLOATS]),
       dtype=st.sampled_from([None, *FLOATS]), x_layout=layouts, delta_layout=layouts, grad_layout=layouts,
       channels_last=booleans, clamp=booleans, seed=st.integers(0, 999))
def test_equals_the_plain_expression_and_its_gradient(n, c, h, w, x_dtype, delta_dtype, dtype, x_layout, delta_layout,
                                                      grad_layout, channels_last, clamp, seed):
    shape = (n, c, h, w)
    x, (mean, std) = images(shape, x_dtype, x_layout, seed), statistics(c, seed)
    delta = None if delta_dtype is None else (images(shape, delta_dtype, delta_layout, seed + 1) - 0.5) * 0.3
    kw = dict(dtype=dtype, channels_last=channels_last, clamp=clamp)
    got = ops.model_entry(x, mean, std, delta=delta, **kw)
    assert_same(got, reference(x, mean, std, delta=delta, **kw))
    assert got.is_contiguous(memory_format=LAYOUTS[channels_last]) and not got.requires_grad
    out = torch.full_like(got, math.nan)
    assert ops.model_entry(x, mean, std, delta=delta, clamp=clamp, out=out) is out
    assert_same(out, got)
    if x.is_floating_point() or delta is not None:
        grad = torch.randn(shape, generator=torch.Generator().manual_seed(seed)).to(got.dtype)
        grad = grad.contiguous(memory_format=grad_layout)
        (_, mine), (_, plain) = (gradients(f, x, mean, std, grad, delta, **kw) for f in (ops.model_entry, reference))
        for a, b in zip(mine, plain):
            assert_same(a, b)
            assert a.is_contiguous(memory_format=x_layout) or 0 in shape


@given(mean=st.floats(-2, 2), std=st.floats(0.01, 4), dtype=st.sampled_from(FLOATS), layout=layouts, last=booleans,
       clamp=booleans)
def test_every_byte_under_every_normalisation(mean, std, dtype, layout, last, clamp):
    """Bytes take a short cut that is checked at run time; 0.5 and 0.5 in bfloat16 is where it does not hold."""
    x = torch.arange(3 * 256, dtype=torch.uint8).view(1, 16, 16, 3).permute(0, 3, 1, 2).contiguous(memory_format=layout)
    for mean, std in (([mean, 0.5, 0.485], [std, 0.5, 0.229]), ([0.5] * 3, [0.5] * 3), ([0.4, 0.45, 0.5], [std] * 3)):
        kw = dict(dtype=dtype, channels_last=last, clamp=clamp)
        assert_same(ops.model_entry(x, mean, std, **kw), reference(x, mean, std, **kw))


specials = st.sampled_from([0.0, -0.0, 1.0, 1.0000001, 0.99999994, -1e-45, 1e-40, 0.3, math.nan, math.inf, -math.inf,
                            3e38])


@given(x=st.lists(specials, min_size=1, max_size=20), delta=specials, dtype=st.sampled_from(FLOATS), clamp=booleans,
       std=st.sampled_from([1.0, 0.225, -0.5, 1e-30, 3e38]))
def test_specials(x, delta, dtype, clamp, std):
    """Among them the ends of the clamp, which the gradient passes, and NaN, which it does not."""
    x = torch.tensor(x, dtype=torch.float64).to(dtype).view(1, 1, 1, -1).contiguous()
    delta, grad = torch.full_like(x, delta), torch.linspace(-2, 3, x.numel()).to(dtype).view(x.shape)
    for d in (None, delta):
        (got, mine), (wanted, plain) = (gradients(f, x, [0.1], [std], grad, d, clamp=clamp)
                                        for f in (ops.model_entry, reference))
        assert_same(got, wanted)
        for a, b in zip(mine, plain):
            assert_same(a, b)


@pytest.mark.parametrize("channels", [1, 2, 3, 4, 7, 3000])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("x_dtype", [torch.uint8, torch.float32], ids=str)
def test_any_number_of_channels(channels, layout, x_dtype):
    x, (mean, std) = images((2, channels, 9, 11), x_dtype, layout), statistics(channels)
    for last in (True, False):
        assert_same(ops.model_entry(x, mean, std, dtype=torch.bfloat16, channels_last=last),
                    reference(x, mean, std, dtype=torch.bfloat16, channels_last=last))


def test_threads_change_nothing():
    x, (mean, std) = images((5, 3, 211, 223), torch.uint8), statistics(3)
    threads, wanted = torch.get_num_threads(), reference(x, mean, std, dtype=torch.bfloat16)
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        assert_same(ops.model_entry(x, mean, std, dtype=torch.bfloat16), wanted)
    torch.set_num_threads(threads)


def test_identity_and_defaults():
    x = images((2, 3, 5, 4), torch.float32).clamp(0, 1)
    assert_same(ops.model_entry(x, None, None), x)
    assert_same(ops.model_entry(x, None, None, channels_last=False), x)
    level = images((2, 3, 5, 4), torch.uint8)
    assert_same(ops.model_entry(level, None, None), level.float() / 255)
    assert ops.model_entry(x.half(), (0.1,) * 3, None).dtype == torch.float16


def test_layouts_that_are_not_flat_memory():
    x, (mean, std) = images((3, 3, 8, 9), torch.float32), statistics(3)
    wanted = reference(x, mean, std)
    wide = torch.zeros(3, 3, 8, 18)
    wide[..., ::2] = x
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    out = torch.full((3, 3, 8, 18), math.nan)[..., ::2]
    for variant in (wide[..., ::2], transposed):
        assert_same(ops.model_entry(variant, mean, std, delta=torch.zeros(8, 9, 3, 3).permute(3, 2, 0, 1)), wanted)
        assert_same(ops.model_entry(variant, mean, std, out=out), wanted)
        leaf = variant.detach().requires_grad_()
        grad, = torch.autograd.grad(ops.model_entry(leaf, mean, std).sum(), leaf)
        assert grad.shape == leaf.shape
    expanded = x[:1].expand(3, 3, 8, 9)
    assert_same(ops.model_entry(expanded, mean, std), reference(expanded, mean, std))
    misaligned = torch.cat([torch.zeros(1), x.flatten()])[1:].view(x.shape)
    assert_same(ops.model_entry(misaligned, mean, std), wanted)


# Autograd and torch.compile


def test_only_what_asks_for_a_gradient_gets_one():
    x, delta = images((2, 3, 4, 5), torch.float32), torch.zeros(2, 3, 4, 5, requires_grad=True)
    y = ops.model_entry(x, (0.1,) * 3, (0.5,) * 3, delta=delta)
    y.sum().backward()
    inside = (x >= 0) & (x <= 1)
    assert torch.equal(delta.grad, inside.float() / 0.5) and x.grad is None
    with torch.no_grad():
        assert not ops.model_entry(x, None, None, delta=delta).requires_grad
    with torch.inference_mode():
        assert_same(ops.model_entry(x, None, None), x.clamp(0, 1))


@pytest.mark.parametrize("clamp", [False, True])
def test_derivatives_of_any_order(clamp):
    x, delta = (torch.rand(1, 3, 2, 2, dtype=torch.float64).requires_grad_() for _ in range(2))

    def entry(x, delta):
        return ops.model_entry(x * 0.4 + 0.1, (0.1,) * 3, (0.5,) * 3, delta=delta * delta * 0.4, clamp=clamp)

    assert torch.autograd.gradcheck(entry, (x, delta)) and torch.autograd.gradgradcheck(entry, (x, delta))


def test_a_saved_input_must_not_change():
    x = torch.rand(1, 3, 4, 4).requires_grad_()
    y = x * 1.0
    z = ops.model_entry(y, None, None)
    with torch.no_grad():
        y.zero_()
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        z.sum().backward()


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch's own compiler
@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compiles_with_its_backward_pass(backend, device):
    def entry(x, delta):
        return ops.model_entry(x, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4), delta=delta * 0.5, dtype=torch.bfloat16)

    torch._dynamo.reset()
    x, delta = (images((2, 3, 6, 5), torch.float32, seed=s, device=device).requires_grad_() for s in (1, 2))
    grad = torch.randn(2, 3, 6, 5, device=device).bfloat16()
    wanted = entry(x, delta)
    wanted_grads = torch.autograd.grad(wanted, (x, delta), grad)
    got = torch.compile(entry, fullgraph=True, backend=backend)(x, delta)
    assert_same(got.detach(), wanted.detach())
    for a, b in zip(torch.autograd.grad(got, (x, delta), grad), wanted_grads):
        assert_same(a, b)


# Sources


@pytest.mark.parametrize("channels_last", [False, True])
@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_sources_enter_by_it_and_get_the_same_numbers(dtype, channels_last):
    net, (x, y) = small_net(), batch()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    source = ea.Source(net, dtype=dtype, channels_last=channels_last, mean=mean, std=std)
    seen = []
    source.module.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    x = x * 1.1 - 0.05  # images that left [0, 1] are not cut
    source.logits(x)
    plain = ((x - source.mean) / source.std).to(dtype)
    assert torch.equal(seen[0], plain)
    assert seen[0].is_contiguous(memory_format=LAYOUTS[channels_last])
    one, three = (ea.Source(net, dtype=dtype, mean=m).logits(x) for m in ([0.5], [0.5] * 3))
    assert torch.equal(one, three)
    assert source.input_grad(x, y).grad.shape == x.shape
    assert torch.equal(source.logits((x.clamp(0, 1) * 255).to(torch.uint8)),
                       source.logits((x.clamp(0, 1) * 255).to(torch.uint8).float() / 255))


@pytest.mark.gpu
@pytest.mark.parametrize("x_dtype", IMAGES, ids=str)
@pytest.mark.parametrize("shape", [(2, 1, 28, 28), (3, 3, 32, 32), (2, 3, 13, 11), (2, 4, 16, 16), (1, 5, 7, 9)])
def test_cuda_equals_the_cpu(x_dtype, shape):
    def cuda(t):
        return None if t is None else t.cuda()

    modes = itertools.product((None, *FLOATS), FLOATS, LAYOUTS, LAYOUTS, (True, False))
    for delta_dtype, dtype, x_layout, delta_layout, last in modes:
        x, (mean, std) = images(shape, x_dtype, x_layout), statistics(shape[1])
        delta = None if delta_dtype is None else images(shape, delta_dtype, delta_layout, 1) * 0.1
        kw = dict(dtype=dtype, channels_last=last)
        wanted = ops.model_entry(x, mean, std, delta=delta, **kw)
        assert_same(ops.model_entry(x.cuda(), mean.cuda(), std.cuda(), delta=cuda(delta), **kw).cpu(), wanted)
        if x.is_floating_point() or delta is not None:
            grad = torch.randn(shape).to(dtype).contiguous(memory_format=delta_layout)
            _, wanted = gradients(ops.model_entry, x, mean, std, grad, delta, **kw)
            _, got = gradients(ops.model_entry, x.cuda(), mean.cuda(), std.cuda(), grad.cuda(), cuda(delta), **kw)
            for a, b in zip(got, wanted):
                assert_same(a.cpu(), b)


X = torch.rand(2, 3, 4, 4)
M = (0.5, 0.5, 0.5)
BAD = [
    (lambda: ops.model_entry([1.0], M, M), TypeError, "model_entry: x must be a torch.Tensor, got list"),
    (lambda: ops.model_entry(X.int(), M, M), TypeError, "x must be float32.*uint8, got int32"),
    (lambda: ops.model_entry(X[0], M, M), ValueError, r"x must have shape \[N, C, H, W\], got \(3, 4, 4\)"),
    (lambda: ops.model_entry(X, M[:2], M), ValueError, r"mean must have shape \[C\] = \[3\], got \(2,\)"),
    (lambda: ops.model_entry(X, M, torch.ones(1, 3, 1, 1)), ValueError, r"std must have shape \[C\] = \[3\], got \(1,"),
    (lambda: ops.model_entry(X, M, (0.5, 0.0, 1.0)), ValueError, "std must not be 0, got"),
    (lambda: ops.model_entry(X, ("a", 0, 0), M), TypeError, "mean must be a number, got str"),
    (lambda: ops.model_entry(X, torch.ones(3, device="meta"), M), ValueError, "mean must be on x's device cpu, got"),
    (lambda: ops.model_entry(X, M, M, delta=X[:1]), ValueError, "delta must have x's shape"),
    (lambda: ops.model_entry(X, M, M, delta=X.byte()), TypeError, "delta must be float32.*got uint8"),
    (lambda: ops.model_entry(X, M, M, dtype=torch.int8), ValueError, "dtype must be float32.* or None, got torch.int8"),
    (lambda: ops.model_entry(X, M, M, out=X.byte()), TypeError, "out must be float32.*got uint8"),
    (lambda: ops.model_entry(X, M, M, out=X[:1].clone()), ValueError, "out must have x's shape"),
    (lambda: ops.model_entry(X, M, M, out=X.half(), dtype=torch.float32), ValueError, "dtype must be out's float16"),
    (lambda: ops.model_entry(X.clone().requires_grad_(), M, M, out=X.clone()), ValueError,
     "out must be None where x or delta requires grad, got a tensor"),
    (lambda: ops.model_entry(X, M, M, out=X), RuntimeError, "^model_entry: out must not overlap x in memory"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:50] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_raw_ops_protect_memory():
    entry, back = torch.ops.ensadv_fast.model_entry.default, torch.ops.ensadv_fast.model_entry_grad.default
    s, out = torch.ones(3), torch.empty_like(X)
    entry(X, None, s, s, True, out)
    back(X, X, None, s, True, out)
    last = X.contiguous(memory_format=torch.channels_last)
    for call, message in [
        (lambda: entry(X, None, s[:2], s, True, out), "mean must be"),
        (lambda: entry(X, None, s, s.half(), True, out), "std must be"),
        (lambda: entry(X, None, s.double(), s, True, out), "mean must be"),
        (lambda: entry(X[0], None, s, s, True, out), "shape"),
        (lambda: entry(X, X.byte(), s, s, True, out), "delta must be"),
        (lambda: entry(X, None, s, s, True, X.byte()), "out must be"),
        (lambda: entry(X.transpose(2, 3), None, s, s, True, out), "contiguous or channels_last"),
        (lambda: back(X, None, None, s, True, out), "x must be given where clamp is true, got none"),
        (lambda: back(X, last, None, s, True, out), "x's memory format, got contiguous"),
        (lambda: back(X.byte(), X, None, s, True, out), "grad must be"),
        (lambda: back(X, out, None, s, True, out), "must not overlap"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call()
