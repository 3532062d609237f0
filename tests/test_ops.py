"""The contract of every op, generic over OpCase x device x dtype x memory format (docs/design.md)."""
import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from ensadv_fast import ops
from ensadv_fast.ops.cases import CASES, FLOATS, IMAGES, Inputs
from ensadv_fast.ops.l2_step import reference as l2_step_reference
from ensadv_fast.ops.momentum_step import reference as momentum_step_reference
from ensadv_fast.ops.sign_step import reference as sign_step_reference

IMAGE_CASES = [c for c in CASES if c.image]
NARROW = (torch.float16, torch.bfloat16)
FORMATS = {"contiguous": torch.contiguous_format, "channels_last": torch.channels_last}
SHAPE = (3, 3, 13, 11)

every_case = pytest.mark.parametrize("case", CASES, ids=lambda c: c.name)
every_image_case = pytest.mark.parametrize("case", IMAGE_CASES, ids=lambda c: c.name)
every_image_dtype = pytest.mark.parametrize("dtype", IMAGES, ids=lambda d: str(d).removeprefix("torch."))
every_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=lambda d: str(d).removeprefix("torch."))
every_format = pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)


def assert_same(got, wanted):
    if isinstance(wanted, tuple):
        assert len(got) == len(wanted)
        for g, w in zip(got, wanted):
            assert_same(g, w)
        return
    if wanted is None:
        assert got is None
        return
    assert got.dtype == wanted.dtype and got.shape == wanted.shape
    assert torch.equal(got.isnan(), wanted.isnan())
    assert torch.equal(got.nan_to_num(0.0), wanted.nan_to_num(0.0))


def assert_matches(case, got, wanted):
    """Bit for bit where the case promises it, else within its units in the last place."""
    if isinstance(wanted, tuple):
        assert len(got) == len(wanted)
        for g, w in zip(got, wanted):
            assert_matches(case, g, w)
    elif wanted is None or not wanted.is_floating_point():
        assert_same(got, wanted)
    elif case.ulps is not None:
        assert got.dtype == wanted.dtype and torch.equal(got.isnan(), wanted.isnan())
        eps = torch.finfo(wanted.dtype).eps
        limit = eps + case.ulps * min(eps, torch.finfo(torch.float32).eps)
        assert ((got - wanted).abs() <= limit * wanted.abs().max()).all()
    elif case.exact and not (case.reduces and wanted.dtype == torch.float64):
        assert_same(got, wanted)
    else:
        assert got.dtype == wanted.dtype and torch.equal(got.isnan(), wanted.isnan())
        error = (got - wanted).abs().nan_to_num(0.0)
        limit = 1e-13 if wanted.dtype == torch.float64 else torch.finfo(torch.float32).eps
        assert (error <= limit * wanted.abs().nan_to_num(1.0)).all()


class Recorder(TorchDispatchMode):
    """The calls of our ops, as the dispatcher sees them."""

    def __init__(self):
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.namespace == "ensadv_fast":
            self.calls.append((function, args, kwargs or {}))
        return function(*args, **(kwargs or {}))


@every_case
@every_image_dtype
@every_format
def test_equals_reference(case, dtype, memory_format, device):
    plain = (dtype, memory_format) == (torch.float32, torch.contiguous_format)
    if dtype not in case.dtypes or not (case.sweeps or plain):
        pytest.skip("not an argument of this op")
    args, kw = case.make(Inputs(SHAPE, dtype, device, memory_format))
    got, wanted = case.function(*args, **kw), case.reference(*args, **kw)
    assert_matches(case, got, wanted)
    if case.image:
        assert got.stride() == args[0].stride()


@every_image_case
@given(n=st.integers(0, 4), inner=st.integers(0, 300), dtype=st.sampled_from(FLOATS), offset=st.integers(0, 3),
       seed=st.integers(0, 1000))
def test_any_length_and_alignment(case, n, inner, dtype, offset, seed):
    args, kw = case.make(Inputs((n, inner), dtype, seed=seed))
    store = torch.full((n * inner + 2 * offset + 8,), math.nan, dtype=dtype)
    out = store[offset: offset + n * inner].view(n, inner)
    wanted = case.reference(*args, **kw)
    result = case.function(*args, **kw, out=out)
    assert result is out
    assert_matches(case, out, wanted)
    assert store[:offset].isnan().all() and store[offset + n * inner:].isnan().all()


@every_image_case
@every_dtype
@every_format
def test_in_place_equals_out_of_place(case, dtype, memory_format, device):
    args, kw = case.make(Inputs(SHAPE, dtype, device, memory_format))
    wanted = case.function(*args, **kw)
    x, version = args[0], args[0]._version
    assert case.function(*args, **kw, out=x) is x
    assert_same(x, wanted)
    assert x._version > version  # so that autograd refuses a backward pass through the old value


@every_image_case
@every_format
def test_layouts_that_are_not_flat_memory(case, memory_format, device):
    args, kw = case.make(Inputs((4, 3, 9, 10), torch.float32, device, memory_format))
    x = args[0]
    wanted = case.reference(*args, **kw)
    sliced = torch.zeros(4, 3, 9, 20, device=device)[..., ::2].copy_(x)
    transposed = x.transpose(2, 3).contiguous().transpose(2, 3)
    for variant in (sliced, transposed):
        assert variant.stride() != x.stride()
        assert_same(case.function(variant, *args[1:], **kw), wanted)
        out = torch.full((4, 3, 9, 20), math.nan, device=device)[..., ::2]
        assert_same(case.function(variant, *args[1:], **kw, out=out), wanted)
    expanded = x[:1].expand_as(x)
    assert_same(case.function(expanded, *args[1:], **kw), case.reference(expanded.contiguous(), *args[1:], **kw))


@pytest.mark.parametrize("swap", [False, True])
@every_dtype
def test_gradient_of_another_format_and_dtype(swap, dtype, device):
    x = Inputs(SHAPE, dtype, device).images(1)[0]
    for grad_dtype in FLOATS:
        grad = Inputs(SHAPE, grad_dtype, device).gradient()
        a, b = (x.contiguous(memory_format=torch.channels_last), grad) if swap else (
            x, grad.contiguous(memory_format=torch.channels_last))
        assert_same(ops.sign_step(a, b, 0.1), sign_step_reference(x, grad, 0.1))


def test_a_double_gradient_too_small_for_float_keeps_its_sign():
    grad = torch.tensor([[1e-200, -1e-200, 0.0]], dtype=torch.float64)
    assert ops.sign_step(torch.full((1, 3), 0.5), grad, 0.25).tolist() == [[0.75, 0.25, 0.5]]


@every_dtype
def test_master_iterate_rounds_once_into_16_bits(dtype, device):
    if dtype not in NARROW:
        pytest.skip("16-bit outputs only")
    i = Inputs(SHAPE, dtype, device)
    center = i.images(1)[0]
    x = (center.float() + 0.01).clamp(0, 1)
    out = torch.full_like(center, math.nan)
    ops.sign_step(x, i.gradient(), 0.03, center=center.float(), eps=8 / 255, out=out)
    wanted = sign_step_reference(x, i.gradient(), 0.03, center=center.float(), eps=8 / 255, dtype=dtype)
    assert_same(out, wanted)


specials = st.sampled_from([0.0, -0.0, math.nan, math.inf, -math.inf, 1e-45, -1e-40, 6e-8, 1.0, 0.3, -2.5, 3e38])


@given(x=st.lists(specials, min_size=1, max_size=40), grad=specials, center=specials,
       step=st.sampled_from([0.0, 0.1, -0.1, math.inf]), dtype=st.sampled_from(FLOATS))
def test_sign_step_specials(x, grad, center, step, dtype):
    x = torch.tensor([x], dtype=torch.float64).to(dtype)
    grad, center = torch.full_like(x, grad), torch.full_like(x, center)
    assert_same(ops.sign_step(x, grad, step), sign_step_reference(x, grad, step))
    kw = {"center": center, "eps": 8 / 255, "lo": -1.0, "hi": 2.0}
    assert_same(ops.sign_step(x, grad, step, **kw), sign_step_reference(x, grad, step, **kw))


# Law 1 (docs/design.md), in exact arithmetic: every number below is a dyadic rational that float64 holds exactly.


def excess(result, center, eps):
    """How far beyond float32(eps) the result lies from the center, in float64."""
    return ((result.double() - center.double()).abs() - eps).max().item()


@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(FLOATS), eps=st.floats(0, 0.5),
       step=st.floats(-0.5, 0.5), layout=st.sampled_from(list(FORMATS.values())))
def test_budget_and_box_hold_in_every_dtype(seed, dtype, eps, step, layout):
    i = Inputs((2, 3, 7, 5), dtype, memory_format=layout, seed=seed)
    center, eps32, step32 = i.images(1)[0], torch.tensor(eps).double().item(), abs(torch.tensor(step).double().item())
    slack = 0.0 if dtype in NARROW else 2.0**-24
    x = ops.random_step(center, ops.fresh_key(seed=seed), eps, kind="uniform")
    assert excess(x, center, eps32) <= slack
    assert excess(ops.random_step(center, ops.fresh_key(seed=seed), eps), center, eps32) <= slack
    assert excess(ops.sign_step(center, i.gradient(), step), center, step32) <= slack
    result = ops.sign_step(x, i.gradient(), step, center=center, eps=eps)
    assert excess(result, center, eps32) <= slack
    assert 0 <= result.double().min() and result.double().max() <= 1
    box = torch.tensor([0.3, 0.7], dtype=torch.float64 if dtype == torch.float64 else torch.float32).double()
    boxed = ops.sign_step(x, i.gradient(), step, center=center, eps=eps, lo=0.3, hi=0.7).double()
    assert boxed.min() >= box[0] and boxed.max() <= box[1]  # exactly, though no 16-bit float equals either end


@pytest.mark.parametrize("dtype", NARROW, ids=str)
def test_16_bit_results_use_the_budget(dtype):
    """Rounding toward the center must not throw away more than one spacing of the format."""
    x = torch.linspace(0.1, 0.9, 4096).to(dtype)[None]
    moved = ops.sign_step(x, torch.ones_like(x), 8 / 255).double() - x.double()
    spacing = torch.finfo(dtype).eps / 2
    assert moved.min() > 8 / 255 - spacing and moved.max() <= 8 / 255 + 2**-30


# uint8 images


@pytest.mark.parametrize("k", [1, 2, 3, 5, 7, 8, 9, 16, 32, 64, 128, 255])
def test_uint8_results_use_all_levels_of_the_budget_and_no_more(k):
    x = torch.arange(256, dtype=torch.uint8).view(1, 256)
    for sign in (1, -1):
        grad, out = torch.full((1, 256), float(sign)), torch.empty_like(x)
        wanted = (x.int() + sign * k).clamp(0, 255).to(torch.uint8)
        assert torch.equal(ops.sign_step(x, grad, k / 255, out=out), wanted)
        assert torch.equal(ops.sign_step(x, grad, 1.0, center=x, eps=k / 255, out=out), wanted)
        iterate = x.float() / 255 + 0.4 * sign
        assert torch.equal(ops.sign_step(iterate, grad, 1.0, center=x.float() / 255, eps=k / 255, out=out), wanted)
    moved = ops.random_step(x, ops.fresh_key(seed=k), k / 255, clip=False, out=torch.empty_like(x))
    assert (moved.int() - x.int()).abs().max() <= k


def test_uint8_images_become_float32_in_the_unit_interval():
    x = torch.arange(256, dtype=torch.uint8).view(1, 256)
    for kept in (ops.sign_step(x, torch.zeros(1, 256), 0.1), ops.project(x, x, 0.0), ops.project(x, x, 0.0, norm="l2")):
        assert torch.equal(kept, x.float() / 255)


def test_uint8_between_two_levels_takes_the_nearer_allowed_one():
    x = torch.tensor([[100, 100, 100]], dtype=torch.uint8)
    grad, out = torch.ones(1, 3), torch.empty_like(x)
    assert ops.sign_step(x, grad, 2.4 / 255, out=out).tolist() == [[102] * 3]
    assert ops.sign_step(x, grad, 2.6 / 255, out=out).tolist() == [[102] * 3]  # 103 would exceed the budget
    assert ops.sign_step(x, grad, 9.0, lo=0.0, hi=101.5 / 255, out=out).tolist() == [[101] * 3]


# Reductions


@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0])
def test_momentum_accumulates(dtype, decay, device):
    i = Inputs((3, 3, 40, 41), dtype, device)
    x, grad = i.images(1)[0], i.gradient().nan_to_num()
    wide = torch.float64 if dtype == torch.float64 else torch.float32
    momentum, wanted = torch.zeros_like(x, dtype=wide), torch.zeros_like(x, dtype=torch.float64)
    for scale in (1.0, 3.0, 0.5):
        before = momentum.clone()
        x_adv = ops.momentum_step(x, grad * scale, momentum, 0.01, decay=decay, center=x, eps=0.02)
        g = (grad * scale).double()
        wanted = decay * wanted + g / g.abs().mean((1, 2, 3), keepdim=True)
        assert torch.equal(x_adv, ops.sign_step(x, momentum, 0.01, center=x, eps=0.02))
        assert not torch.equal(before, momentum)
    assert (momentum - wanted).abs().max() <= 4 * torch.finfo(wide).eps * wanted.abs().max()


@pytest.mark.parametrize("value", [0.0, math.inf, -math.inf])
def test_zero_and_infinite_gradients_add_nothing_to_their_sample(value):
    x, grad = torch.full((2, 50), 0.5), torch.ones(2, 50)
    grad[0] = value if value == 0 else 1.0
    grad[0, 7] = value
    momentum = torch.full((2, 50), 2.0)
    ops.momentum_step(x, grad, momentum, 0.1, decay=0.5)
    assert momentum[0].tolist() == [1.0] * 50 and momentum[1].tolist() == [2.0] * 50
    moved = ops.l2_step(x, grad, 0.1)
    assert torch.equal(moved[0], x[0]) and not torch.equal(moved[1], x[1])


def test_gradients_too_small_to_square_still_have_a_direction():
    x, grad = torch.full((1, 4), 0.5), torch.tensor([[3e-30, 4e-30, 0.0, 0.0]])
    assert torch.allclose(ops.l2_step(x, grad, 0.1), torch.tensor([[0.56, 0.58, 0.5, 0.5]]))


@given(seed=st.integers(0, 10**6), dtype=st.sampled_from(FLOATS), inner=st.integers(1, 300), eps=st.floats(0, 2),
       step=st.floats(-2, 2))
def test_l2_ball_holds(seed, dtype, inner, eps, step):
    i = Inputs((3, inner), dtype, seed=seed)
    center, other = i.images(2)
    limit = torch.tensor(eps).double().item() * (1 + 1e-6) + 1e-7
    for result in (ops.l2_step(other, i.gradient(), step, center=center, eps=eps),
                   ops.project(other, center, eps, norm="l2")):
        distance = (result.double() - center.double()).square().sum(1).sqrt()
        assert distance.max() <= limit
        assert 0 <= result.double().min() and result.double().max() <= 1
    length = (ops.l2_step(center, i.gradient(), step, lo=-9, hi=9).double() - center.double()).square().sum(1).sqrt()
    assert length.max() <= abs(step) * (1 + 1e-6) + inner * 1e-7


@every_dtype
def test_a_nan_pixel_does_not_free_the_others_of_the_l2_ball(dtype):
    center, grad = torch.full((2, 50), 0.5, dtype=dtype), torch.ones(2, 50)
    x = center.clone()
    x[0, 7] = math.nan
    for result in (ops.l2_step(x, grad, 3.0, center=center, eps=0.2),
                   ops.project(x + 0.3, center, 0.2, norm="l2")):
        assert result.isnan().nonzero().tolist() == [[0, 7]]
        moved = (result.double() - center.double()).nan_to_num()
        assert 0.19 < moved.norm(dim=1).min() and moved.norm(dim=1).max() <= 0.2 * (1 + 1e-6)


def test_projection_inside_the_ball_is_the_identity():
    x = torch.rand(4, 3, 8, 8)
    for norm in ("linf", "l2"):
        assert torch.equal(ops.project(x, x, 0.0, norm=norm), x)
        assert torch.equal(ops.project(x, x.flip(0), 99.0, norm=norm), x)


@pytest.mark.parametrize("inner", [16384, 16385, 64 * 16384, 64 * 16384 + 1, 3 * 2**20 + 17])
def test_sums_do_not_depend_on_threads_and_scratch_is_large_enough(inner):
    x, grad = torch.rand(2, inner), torch.randn(2, inner)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        momentum = torch.zeros_like(x)
        results.append((ops.momentum_step(x, grad, momentum, 0.1), momentum, ops.l2_step(x, grad, 1.0)))
    torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for other in results[1:] for a, b in zip(results[0], other))
    mean = grad.double().abs().mean(1, keepdim=True)
    assert torch.equal(results[0][1], grad / mean.float())


@given(x=st.lists(specials, min_size=1, max_size=40), grad=st.lists(specials, min_size=1, max_size=40),
       dtype=st.sampled_from([torch.float32, *NARROW]))
def test_reductions_over_specials(x, grad, dtype):
    n = min(len(x), len(grad))
    x, grad = (torch.tensor([v[:n]], dtype=torch.float64).to(dtype) for v in (x, grad))
    got, wanted = torch.zeros_like(x, dtype=torch.float32), torch.zeros_like(x, dtype=torch.float32)
    assert_same(ops.momentum_step(x, grad, got, 0.1), momentum_step_reference(x, grad, wanted, 0.1))
    assert_same(got, wanted)
    assert_same(ops.l2_step(x, grad, 0.1), l2_step_reference(x, grad, 0.1))


# Randomness


@pytest.mark.parametrize("kind", ["rademacher", "uniform"])
@given(n=st.integers(1, 5), c=st.integers(1, 5), h=st.integers(1, 20), w=st.integers(1, 20), seed=st.integers())
def test_noise_does_not_depend_on_format_batch_or_dtype(kind, n, c, h, w, seed):
    key = ops.fresh_key(seed=seed)
    index = torch.randperm(1000, generator=torch.Generator().manual_seed(seed % 2**31))[:n]
    x = torch.zeros(n, c, h, w)
    noise = ops.random_step(x, key, 1.0, kind=kind, index=index, clip=False)
    last = x.contiguous(memory_format=torch.channels_last)
    assert torch.equal(ops.random_step(last, key, 1.0, kind=kind, index=index, clip=False), noise)
    assert torch.equal(ops.random_step(x.double(), key, 1.0, kind=kind, index=index, clip=False).float(), noise)
    for i in range(n):
        one = ops.random_step(x[i:i + 1], key, 1.0, kind=kind, index=index[i:i + 1], clip=False)
        assert torch.equal(one, noise[i:i + 1])


@pytest.mark.parametrize("memory_format", FORMATS.values(), ids=FORMATS)
def test_noise_does_not_depend_on_threads(memory_format):
    x = torch.rand(2, 3, 224, 224).contiguous(memory_format=memory_format)
    key, threads = ops.fresh_key(seed=3), torch.get_num_threads()
    results = []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.random_step(x, key, 0.1))
    torch.set_num_threads(threads)
    assert torch.equal(results[0], results[1]) and torch.equal(results[0], results[2])


def distribution(kind):
    """(distribution function, variance) at eps = 1."""
    phi = torch.special.ndtr
    mass = math.erf(math.sqrt(2))
    # The variance of a standard normal cut at 2 is 1 - 4 phi(2) / mass, phi its density; ours is half as wide.
    cut = 0.25 * (1 - 4 * math.exp(-2) / math.sqrt(2 * math.pi) / mass)
    return {"rademacher": (lambda z: (z >= -1) * 0.5 + (z >= 1) * 0.5, 1.0), "uniform": (lambda z: (z + 1) / 2, 1 / 3),
            "truncated_normal": (lambda z: 0.5 + (phi(2 * z) - 0.5) / mass, cut), "normal": (phi, 1.0)}[kind]


@pytest.mark.parametrize("kind", ["rademacher", "uniform", "truncated_normal", "normal"])
def test_noise_has_its_distribution(kind):
    noise = ops.random_step(torch.zeros(64, 4096), ops.fresh_key(seed=0), 1.0, kind=kind, clip=False).double()
    n = noise.numel()
    cdf, variance = distribution(kind)
    assert abs(noise.mean()) < 5 * math.sqrt(variance / n)
    assert abs(noise.square().mean() - variance) < 10 / math.sqrt(n)
    assert abs((noise[:, 1:] * noise[:, :-1]).mean()) < 5 * variance / math.sqrt(n)
    assert kind == "normal" or noise.abs().max() <= 1
    for z in torch.linspace(-0.95, 0.95, 20, dtype=torch.float64):
        assert abs((noise <= z).double().mean() - cdf(z)) < 5 * 0.5 / math.sqrt(n)
    assert kind != "normal" or 4.2 < noise.abs().max() < 5.5  # the tails are there


def test_sample_eps_is_the_truncated_normal_of_kurakin():
    eps = ops.sample_eps(200_000, ops.fresh_key(seed=1), eps_max=16 / 255).double() / (8 / 255)  # in sigmas
    assert 0 <= eps.min() and eps.max() <= 2
    # |z| given |z| < 2 has mean sqrt(2/pi) (1 - e^-2) / erf(sqrt 2) and P(< 1) = erf(1/sqrt 2) / erf(sqrt 2).
    mass = math.erf(math.sqrt(2))
    assert abs(eps.mean() - math.sqrt(2 / math.pi) * (1 - math.exp(-2)) / mass) < 0.006
    assert abs((eps < 1).double().mean() - math.erf(math.sqrt(0.5)) / mass) < 0.006


def test_sample_eps_by_index_and_fixed_and_uniform():
    key = ops.fresh_key(seed=4)
    every = ops.sample_eps(10, key, eps_max=0.3)
    some = torch.tensor([7, 2])
    assert torch.equal(ops.sample_eps(2, key, eps_max=0.3, index=some), every[some])
    assert ops.sample_eps(3, key, dist="fixed", eps_max=0.25).tolist() == [0.25] * 3
    assert ops.sample_eps(4, key, eps_max=0.0).tolist() == [0.0] * 4
    uniform = ops.sample_eps(100_000, key, dist="uniform", eps_max=1.0)
    assert abs(uniform.mean() - 0.5) < 0.005 and uniform.min() > 0 and uniform.max() < 1


# torch.library and torch.compile


@every_case
def test_opcheck(case, device):
    with Recorder() as seen:
        args, kw = case.make(Inputs((2, 3, 5, 4), torch.float32, device))
        case.function(*args, **kw)
    kernel = {"project-linf": "sign_step", "project-l2": "l2_step", "ensemble_linear-grad": "ensemble_linear_grad",
              "ensemble_linear-grad_reduced": "ensemble_linear_grad"}.get(case.name, case.op)
    assert [str(f) for f, _, _ in seen.calls] == [f"ensadv_fast.{kernel}.default"]
    for function, call_args, call_kw in seen.calls:
        torch.library.opcheck(function, call_args, call_kw)


@every_case
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # from inside torch's own compiler
def test_compiles_whole_and_once(case, device):
    torch._dynamo.reset()
    frames = []

    def backend(graph, inputs):
        frames.append(graph)
        return graph.forward

    compiled = torch.compile(lambda *a, **k: case.function(*a, **k), fullgraph=True, backend=backend, dynamic=False)
    for seed in (0, 1):
        args, kw = case.make(Inputs((2, 3, 8, 8), torch.float32, device, seed=seed))
        assert_same(compiled(*args, **kw), case.function(*args, **kw))
    assert len(frames) == 1


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_survives_functionalisation(device):
    """aot_eager rewrites ops that write into an argument; in-place use inside a graph must survive that."""
    def attack(x, grad):
        x = ops.sign_step(x, grad, 0.1)
        return ops.sign_step(x, grad, -0.02, center=x * 1.0, eps=0.05, out=x) + 1

    torch._dynamo.reset()
    i = Inputs(SHAPE, device=device)
    x, grad = i.images(1)[0], i.gradient()
    wanted = attack(x, grad)
    assert_same(torch.compile(attack, fullgraph=True, backend="aot_eager")(x, grad), wanted)


def test_no_gradient_flows_and_none_is_kept():
    x = torch.rand(2, 3, requires_grad=True)
    y = ops.sign_step(x, torch.randn(2, 3, requires_grad=True), 0.1)
    assert not y.requires_grad and y.grad_fn is None


def test_autograd_notices_a_value_that_was_overwritten():
    w = torch.rand(2, 3, requires_grad=True)
    saved = torch.rand(2, 3)
    product = (w * saved).sum()
    ops.null(torch.zeros(2, 3), out=saved)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()


def test_works_in_inference_mode():
    with torch.inference_mode():
        x = torch.rand(2, 3)
        assert torch.equal(ops.sign_step(x, torch.ones(2, 3), 0.5, out=x), x)


# Bad input: the op, the argument, what came, what is wanted.

X = torch.rand(2, 3, 4, 4)
KEY = torch.tensor([1, 0])
BAD = [
    (lambda: ops.sign_step(X.int(), X, 0.1), TypeError, "sign_step: x must be float32.*got int32"),
    (lambda: ops.sign_step([0.5], X, 0.1), TypeError, "sign_step: x must be a torch.Tensor, got list"),
    (lambda: ops.sign_step(torch.tensor(0.5), torch.tensor(0.5), 0.1), ValueError, r"x must have shape \[N, ...\]"),
    (lambda: ops.sign_step(X, X[:1], 0.1), ValueError, r"grad must have x's shape \(2, 3, 4, 4\), got \(1, 3, 4, 4\)"),
    (lambda: ops.sign_step(X, X.to("meta"), 0.1), ValueError, "grad must be on x's device cpu, got meta"),
    (lambda: ops.sign_step(X, X, "a"), TypeError, "step must be a number, got str"),
    (lambda: ops.sign_step(X, X, math.nan), ValueError, "step must not be NaN"),
    (lambda: ops.sign_step(X, X, True), TypeError, "step must be a number, got bool"),
    (lambda: ops.sign_step(X, X, torch.ones(3)), ValueError,
     r"step must be a number or have shape \[N\] = \[2\], got \(3,\)"),
    (lambda: ops.sign_step(X, X, 0.1, center=X), ValueError, "center and eps go together, got only center"),
    (lambda: ops.sign_step(X, X, 0.1, eps=0.1), ValueError, "center and eps go together, got only eps"),
    (lambda: ops.sign_step(X, X, 0.1, center=X, eps=-0.1), ValueError, "eps must be >= 0, got -0.1"),
    (lambda: ops.sign_step(X, X, 0.1, center=X, eps=math.nan), ValueError, "eps must not be NaN"),
    (lambda: ops.sign_step(X, X, 0.1, center=X, eps=torch.tensor([0.1, -1.0])), ValueError,
     "eps must be >= 0, got -1.0 for sample 1"),
    (lambda: ops.sign_step(X, X, 0.1, center=X, eps=torch.tensor([math.nan, 1.0])), ValueError,
     "eps must be >= 0, got nan for sample 0"),
    (lambda: ops.sign_step(X, X, 0.1, center=X.half(), eps=0.1), TypeError, "center must be float32, got float16"),
    (lambda: ops.sign_step(X, X, 0.1, lo=1, hi=0), ValueError, "lo must not exceed hi, got lo=1.0, hi=0.0"),
    (lambda: ops.sign_step(X.bfloat16(), X, 0.1, lo=0.3, hi=0.3), ValueError,
     r"\[lo, hi\] must hold a bfloat16 value, got \[0.3, 0.3\]"),
    (lambda: ops.sign_step(X, X, 0.1, out=X.double()), TypeError,
     "out must be float32, float16, bfloat16, uint8, got float64"),
    (lambda: ops.sign_step(X, X, 0.1, out=X[:1]), ValueError, "out must have x's shape"),
    (lambda: ops.sign_step(X, X, 0.1, out=X.clone().requires_grad_()), ValueError, "out must not require grad"),
    (lambda: ops.momentum_step(X, X, X.half(), 0.1), TypeError, "momentum must be float32, got float16"),
    (lambda: ops.momentum_step(X, X, X[:1], 0.1), ValueError, "momentum must have x's shape"),
    (lambda: ops.momentum_step(X, X, X.clone(), 0.1, decay=math.inf), ValueError, "decay must be finite, got inf"),
    (lambda: ops.momentum_step(X, X, X.clone().requires_grad_(), 0.1), ValueError, "momentum must not require grad"),
    (lambda: ops.l2_step(X, X, 0.1, center=X), ValueError, "l2_step: center and eps go together"),
    (lambda: ops.l2_step(X, X.byte(), 0.1), TypeError, "grad must be float32.*got uint8"),
    (lambda: ops.project(X, None, None), TypeError, "project: center must be a torch.Tensor, got None"),
    (lambda: ops.project(X, X, -0.1), ValueError, "project: eps must be >= 0, got -0.1"),
    (lambda: ops.project(X, X, 0.1, norm="l1"), ValueError, "norm must be one of linf, l2, got 'l1'"),
    (lambda: ops.sign_step(X.byte(), X, 0.1, out=X.half()), TypeError, "out must be float32, uint8, got float16"),
    (lambda: ops.random_step(X, KEY, -1.0), ValueError, "random_step: eps must be >= 0, got -1.0"),
    (lambda: ops.random_step(X, KEY, 0.1, kind="gauss"), ValueError,
     "kind must be one of rademacher, uniform, truncated_normal, normal, got 'gauss'"),
    (lambda: ops.random_step(X, KEY.int(), 0.1), TypeError, "key must be int64, got int32"),
    (lambda: ops.random_step(X, KEY[:1], 0.1), ValueError, r"key must have shape \[2\]"),
    (lambda: ops.random_step(X, 7, 0.1), TypeError, "key must be a torch.Tensor, got int"),
    (lambda: ops.random_step(X, KEY, 0.1, index=torch.tensor([0])), ValueError, r"index must have shape \[N\] = \[2\]"),
    (lambda: ops.random_step(X, KEY, 0.1, index=torch.tensor([0, -1])), ValueError, r"index must lie in \[0, 2\^32\)"),
    (lambda: ops.random_step(X, KEY, 0.1, index=torch.tensor([0, 2**32])), ValueError,
     r"index must lie in \[0, 2\^32\)"),
    (lambda: ops.sample_eps(-1, KEY, eps_max=0.1), ValueError, "sample_eps: n must be >= 0, got -1"),
    (lambda: ops.sample_eps(2.0, KEY, eps_max=0.1), TypeError, "n must be an int, got float"),
    (lambda: ops.sample_eps(2, KEY, eps_max=-0.1), ValueError, "eps_max must be finite and >= 0, got -0.1"),
    (lambda: ops.sample_eps(2, KEY, eps_max=0.1, sigma=0.0), ValueError, "sigma must be finite and > 0, got 0.0"),
    (lambda: ops.sample_eps(2, KEY, eps_max=0.1, dist="cauchy"), ValueError, "dist must be one of"),
    (lambda: ops.split(KEY, -1), ValueError, "split: n must be >= 0, got -1"),
    (lambda: ops.split("k"), TypeError, "key must be a torch.Tensor, got str"),
    (lambda: ops.fresh_key(seed=1.5), TypeError, "fresh_key: seed must be an int, got float"),
    (lambda: ops.manual_seed("x"), TypeError, "manual_seed: seed must be an int, got str"),
    (lambda: ops.null(X.to_sparse()), ValueError, "null: x must be a dense tensor, got torch.sparse_coo"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:50] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_overlapping_out_is_refused_and_nothing_is_written():
    store = torch.rand(65)
    before = store.clone()
    with pytest.raises(RuntimeError, match="^sign_step: out must not overlap x in memory, got 252 bytes in common"):
        ops.sign_step(store[:64].view(2, 32), torch.ones(2, 32), 0.1, out=store[1:].view(2, 32))
    assert torch.equal(store, before)


def test_raw_ops_protect_memory():
    raw = torch.ops.ensadv_fast
    x, out = torch.rand(2, 3), torch.empty(2, 3)
    with pytest.raises(RuntimeError, match=r"^null: out must have x's shape \(2, 3\) on cpu, got float32 \(2, 2\) on"):
        raw.null(x, torch.empty(2, 2))
    with pytest.raises(RuntimeError, match=r"all contiguous or all channels_last, got strides \(3, 1\), \(1, 2\)"):
        raw.null(x, torch.empty(3, 2).t())
    with pytest.raises(RuntimeError, match=r"eps must be contiguous float32 \(2,\) on cpu, got float32 \(3,\) on cpu"):
        raw.sign_step(x, x, x, None, torch.ones(3), 0.1, 0.0, 0.0, 1.0, out)
    with pytest.raises(RuntimeError, match=r"key must be contiguous int64 \(2,\) on cpu, got int64 \(1,\)"):
        raw.random_step(x, torch.tensor([1]), None, None, 0.1, 0, 0.0, 1.0, out)
