"""ensadv_fast.diagnose: measurements on models whose answer is known in closed form, and the verdict on real ones."""
import json
import math
import warnings

import pytest
import torch
import torch.nn.functional as F
from networks import batch, gradient, small_net
from torch import nn

import ensadv_fast as ea
from ensadv_fast import data, diagnose
from ensadv_fast.diagnose import hadamard, masking
from ensadv_fast.diagnose.cone import cone_directions
from ensadv_fast.diagnose.statistics import average, difference, proportion
from ensadv_fast.diagnose.surface import orthogonal_signs

KEY = ea.fresh_key(seed=7)


class Linear(nn.Module):
    """Two classes, logits (w . x + b, 0): class 0 has the margin w . x + b, its loss the direction -w everywhere."""

    def __init__(self, w, b=0.0):
        super().__init__()
        self.w, self.b = w, b

    def forward(self, x):
        z = x.flatten(1) @ self.w.flatten() + self.b
        return torch.stack([z, torch.zeros_like(z)], 1)


class OnePixel(nn.Module):
    """Two classes, logits (0, z(pixel))."""

    def __init__(self, z):
        super().__init__()
        self.z = z

    def forward(self, x):
        z = self.z(x.flatten(1)[:, 0])
        return torch.stack([torch.zeros_like(z), z], 1)


def spiked(s):
    """Class 1 beats 0 left of about 0.45, but a spike at 0.505 turns the gradient at 0.5 to the right."""
    return -20 * (s - 0.5) - 1 + 40 * torch.relu(0.01 - (s - 0.505).abs())


def linear(n=6, shape=(3, 4, 5), dtype=torch.float64, seed=0):
    """A linear model, images well inside the box, and labels of class 0 that it gets right with margins 0.1 to 0.6."""
    g = torch.Generator().manual_seed(seed)
    w = torch.randn(shape, generator=g, dtype=dtype)
    x = 0.5 + 0.1 * (torch.rand(n, *shape, generator=g, dtype=dtype) - 0.5)
    along = w / (w * w).sum()
    wanted = torch.linspace(0.1, 0.6, n, dtype=dtype)
    x = x + (wanted - (x.flatten(1) @ w.flatten())).view(-1, 1, 1, 1) * along
    return Linear(w), x, torch.zeros(n, dtype=torch.int64)


MEASUREMENTS = [diagnose.loss_surface, diagnose.approximation_ratio, diagnose.perturbation_cosine,
                diagnose.gradient_norm, diagnose.gradient_alignment, diagnose.cone_dimension, diagnose.label_leaking,
                diagnose.random_start_gap, diagnose.masking_report]
SMALL = {"loss_surface": {"points": 3}, "cone_dimension": {"orders": (1, 4, 16)},
         "masking_report": {"steps": 2, "noises": 2}}


def call(measure, model, *args, **kw):
    key = {} if measure is diagnose.gradient_norm else {"key": KEY}
    return measure(model, *args, **{**SMALL.get(measure.__name__, {}), **key, **kw})


# ---------------------------------------------------------------------------------------------- every measurement


@pytest.mark.parametrize("measure", MEASUREMENTS, ids=lambda m: m.__name__)
def test_the_model_is_left_as_it_was(measure):
    net, (x, y) = small_net(), batch(6)
    net[1].eval()
    net[0].weight.grad = torch.ones_like(net[0].weight)
    net[4].weight.requires_grad_(False)
    flags = [m.training for m in net.modules()]
    state = {k: v.clone() for k, v in net.state_dict().items()}
    rng = torch.get_rng_state()
    call(measure, net, x, y)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in net.modules()] == flags and not net[4].weight.requires_grad
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert torch.equal(net[0].weight.grad, torch.ones_like(net[0].weight))
    assert all(p.grad is None for p in list(net.parameters())[1:])


@pytest.mark.parametrize("measure", MEASUREMENTS, ids=lambda m: m.__name__)
def test_results_are_strict_json_and_do_not_depend_on_the_batches(measure):
    net, (x, y) = small_net().double(), batch(10)
    x, index = x.double(), torch.arange(10) * 3
    whole = call(measure, net, x, y, index=index).to_dict()
    assert json.loads(json.dumps(whole, allow_nan=False)) == whole
    loader = [(x[i], y[i], index[i]) for i in torch.arange(10).split(3)]
    for other in (call(measure, net, x, y, index=index, batch_size=4), call(measure, net, iter(loader)),
                  call(measure, ea.Source(net, dtype=torch.float64, fold=False), x, y, index=index)):
        assert_close(other.to_dict(), whole)


@pytest.mark.parametrize("measure", MEASUREMENTS, ids=lambda m: m.__name__)
def test_every_kind_of_model_in_every_mode(measure, device):
    """Several at once, 16-bit images, inference mode, a loader that lives elsewhere."""
    nets = [small_net(seed).to(device) for seed in (0, 1)]
    x, y = batch(4)
    with torch.inference_mode():
        found = call(measure, ea.Ensemble(nets), [(x.half(), y)])
    plain = call(measure, ea.Ensemble(nets), x.half().float().to(device), y.to(device))
    assert_close(found.to_dict(), plain.to_dict())
    assert all(not v.is_cuda for v in vars(found).values() if isinstance(v, torch.Tensor))


def assert_close(a, b):
    if isinstance(b, dict):
        assert a.keys() == b.keys()
        for k in b:
            assert_close(a[k], b[k])
    elif isinstance(b, list):
        assert len(a) == len(b)
        for one, two in zip(a, b):
            assert_close(one, two)
    elif isinstance(b, float):
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9)
    else:
        assert a == b


@pytest.mark.parametrize("measure", MEASUREMENTS, ids=lambda m: m.__name__)
def test_errors_name_the_argument(measure):
    net, (x, y) = small_net(), batch(4)
    name = measure.__name__
    for args, kw, kind, message in [
        ((net, x), {}, TypeError, f"{name}: y must be a torch.Tensor, got NoneType"),
        ((net, x, y[:3]), {}, ValueError, f"{name}: y must have shape"),
        ((net, x.long(), y), {}, TypeError, f"{name}: x must be float32"),
        ((net, 5), {}, TypeError, f"{name}: x must be a tensor or an iterable"),
        ((net, [(x, y)], y), {}, ValueError, f"{name}: y and index must be in the loader's batches"),
        ((net, [x]), {}, ValueError, f"{name}: x must give batches"),
        ((net, []), {}, ValueError, f"{name}: x must give at least one image, got none"),
        ((net, x[:0], y[:0]), {}, ValueError, f"{name}: x must give at least one image, got none"),
        (("net", x, y), {}, TypeError, "source must be"),
        ((net, x, y), {"batch_size": 0}, ValueError, f"{name}: batch_size"),
        ((net, x, y), {"index": torch.arange(3)}, ValueError, f"{name}: index must have shape"),
    ] + ([] if name == "gradient_norm" else [
        ((net, x, y), {"eps": 0}, ValueError, f"{name}: eps must be > 0, got 0"),
        ((net, x, y), {"eps": "1"}, TypeError, f"{name}: eps must be a number"),
        ((net, x, y), {"key": 3}, TypeError, f"{name}: key must be a torch.Tensor"),
    ]):
        with pytest.raises(kind, match=message):
            call(measure, *args, **kw)


@pytest.mark.parametrize("measure, kw, message", [
    (diagnose.loss_surface, {"points": 1}, "points must be >= 2"),
    (diagnose.loss_surface, {"points": 3.0}, "points must be an int"),
    (diagnose.loss_surface, {"clip": 1}, "clip must be a bool"),
    (diagnose.cone_dimension, {"orders": (8,)}, "orders must be some of 1, 4, 16"),
    (diagnose.cone_dimension, {"orders": ()}, "orders must be some of"),
    (diagnose.gradient_alignment, {"draws": 0}, "draws must be >= 1"),
    (diagnose.approximation_ratio, {"single": "fgsm"}, "single must be an Attack"),
    (diagnose.perturbation_cosine, {"multi": 3}, "multi must be an Attack"),
    (diagnose.label_leaking, {"attack": ea.step_ll(0.1)}, "attack must be untargeted with rule 'true'"),
    (diagnose.label_leaking, {"rules": ("true",)}, "rules must be some of predicted"),
    (diagnose.masking_report, {"noises": 0}, "noises must be >= 1"),
    (diagnose.masking_report, {"steps": True}, "steps must be an int"),
])
def test_errors_of_single_measurements(measure, kw, message):
    with pytest.raises((TypeError, ValueError), match=message):
        measure(small_net(), *batch(4), **kw)


def test_random_draws_are_those_of_the_key():
    net, (x, y) = small_net(), batch(12)
    one, two, other = (diagnose.gradient_alignment(net, x, y, key=ea.fresh_key(seed=s)).cosine for s in (0, 0, 1))
    assert torch.equal(one, two) and not torch.equal(one, other)


# ------------------------------------------------------------------------------------------------- intervals


def test_wilson_intervals_are_those_of_the_tables():
    def of(hits, n):
        found = proportion(torch.arange(n) < hits)
        return found.value, round(found.low, 4), round(found.high, 4), found.n

    assert of(0, 10) == (0.0, 0.0, 0.2775, 10) and of(10, 10) == (1.0, 0.7225, 1.0, 10)
    assert of(5, 10) == (0.5, 0.2366, 0.7634, 10) and of(1, 29) == (1 / 29, 0.0061, 0.1718, 29)
    assert math.isnan(proportion(torch.zeros(0, dtype=torch.bool)).value)


def test_paired_differences():
    a, b = torch.tensor([True] * 30 + [False] * 70), torch.tensor([True] * 10 + [False] * 90)
    found = difference(a, b)
    half = 1.959964 * math.sqrt(20 + 1 - 20**2 / 102) / 102
    assert found.value == pytest.approx(0.2)
    assert (found.low, found.high) == pytest.approx((20 / 102 - half, 20 / 102 + half), rel=1e-6)
    back = difference(b, a)
    assert (back.value, back.low, back.high) == pytest.approx((-0.2, -found.high, -found.low))
    assert difference(a, a).low < 0 < difference(a, a).high and difference(a, b, comparisons=3).low < found.low


def test_averages_leave_out_what_is_not_finite():
    found = average(torch.tensor([1.0, 2.0, 3.0, math.nan, math.inf]))
    assert found.value == 2.0 and found.n == 3 and found.high - 2.0 == pytest.approx(1.959964 / math.sqrt(3))
    assert math.isinf(average(torch.ones(1)).high)


# ------------------------------------------------------------------------------------------- the loss surface


def test_the_surface_of_a_linear_model_is_the_known_one():
    net, x, y = linear()
    found = diagnose.loss_surface(net, x, y, eps=0.05, points=5, key=KEY)
    assert found.loss.shape == (6, 5, 5) and torch.equal(found.along, torch.linspace(-0.05, 0.05, 5))
    margin = -torch.log(torch.expm1(found.loss.double()))  # loss = log(1 + exp(-margin))
    clean = (x.flatten(1) @ net.w.flatten()).view(-1, 1)
    # Along the gradient's sign the margin falls by |w|_1 a unit, whatever the other direction.
    middle = clean - found.along.double() * net.w.abs().sum()
    assert torch.allclose(margin[:, :, 2], middle, atol=1e-5)
    slope = margin[:, :, 1:] - margin[:, :, :-1]  # a plane: one slope across, per image
    assert torch.allclose(slope, slope[:, :1, :1].expand_as(slope), atol=1e-5)
    assert torch.equal(found.predicted == 0, margin > 0) and torch.equal(found.labels, y)


def test_the_surface_across_equal_weights_is_flat():
    """Where all |w| are equal the orthogonal direction is orthogonal to w itself."""
    w = torch.ones(1, 4, 4, dtype=torch.float64).view(-1)
    w[::3] = -1
    net, x = Linear(w), torch.full((2, 1, 4, 4), 0.5, dtype=torch.float64)
    found = diagnose.loss_surface(net, x, torch.zeros(2, dtype=torch.int64), eps=0.1, points=4, key=KEY)
    assert torch.allclose(found.loss, found.loss[:, :, :1].expand_as(found.loss), atol=1e-6)
    assert (found.loss[:, 1:] > found.loss[:, :-1]).all()


def test_clipping_the_surface_keeps_it_in_the_box():
    net, x, y = linear()
    free, clipped = (diagnose.loss_surface(net, x, y, eps=2.0, points=3, key=KEY, clip=c).loss for c in (False, True))
    assert torch.equal(free[:, 1, 1], clipped[:, 1, 1]) and not torch.allclose(free, clipped)


@pytest.mark.parametrize("d", [1, 2, 7, 64, 65])
def test_orthogonal_signs(d):
    g = torch.randn(50, d, generator=torch.Generator().manual_seed(d)).sign()
    g[:10, d // 2:] = 0
    v, weight = (torch.randn(50, d, generator=torch.Generator().manual_seed(d + k)) for k in (1, 2))
    h = orthogonal_signs(g, v, weight)
    assert torch.equal((g * h).sum(1), torch.zeros(50)) and set(h.unique().tolist()) <= {-1.0, 0.0, 1.0}
    zeros = (h == 0).sum(1)
    assert torch.equal(zeros, (g != 0).sum(1) % 2)  # one where the signs of g are odd in number, else none
    for n in range(50):  # what was changed is what weighs least among those that were too many
        changed = h[n] != v[n].sign()
        side = g[n] * v[n].sign() * torch.sign((g[n] * v[n].sign()).sum()) > 0
        assert changed.sum() == 0 or weight[n].abs()[changed].max() <= weight[n].abs()[side & ~changed].min(
            ) if (side & ~changed).any() else True
        assert not (changed & ~side).any()


def test_the_second_direction_follows_the_other_model():
    net, x, y = linear()
    other, _, _ = linear(seed=3)
    with_other = diagnose.loss_surface(net, x, y, eps=0.05, points=3, other=other, key=KEY)
    again = diagnose.loss_surface(net, x, y, eps=0.05, points=3, other=other, key=ea.fresh_key(seed=8))
    assert torch.equal(with_other.loss, again.loss)  # nothing random is left
    h = orthogonal_signs(-net.w.sign()[None], -other.w[None], other.w[None])
    step = torch.log(torch.expm1(with_other.loss[:, 1, 2].double())) - torch.log(
        torch.expm1(with_other.loss[:, 1, 1].double()))
    assert torch.allclose(step, (-0.05 * (h * net.w).sum()).expand(6), atol=1e-5)
    assert ((h * -other.w.sign()).sum() / h.numel()) > 0.5


# ------------------------------------------------------------------------------ one step and many, and gradients


def test_one_step_reaches_the_maximum_of_a_linear_model():
    net, x, y = linear()
    ratio = diagnose.approximation_ratio(net, x, y, eps=0.05)
    assert ratio.ratio == pytest.approx(1, abs=1e-6) and ratio.ratio_of_means == pytest.approx(1, abs=1e-6)
    assert ratio.increase_ratio == pytest.approx(1, abs=1e-6) and ratio.undefined == 0
    margin = x.flatten(1) @ net.w.flatten()
    assert torch.allclose(ratio.clean, F.softplus(-margin)) and torch.allclose(
        ratio.single, F.softplus(0.05 * net.w.abs().sum() - margin), atol=1e-6)
    cosine = diagnose.perturbation_cosine(net, x, y, eps=0.05)
    assert cosine.mean == pytest.approx(1, abs=1e-6) and cosine.undefined == 0
    assert diagnose.gradient_alignment(net, x, y, eps=0.05, draws=3).mean == pytest.approx(1, abs=1e-9)


def test_the_ratio_is_the_mean_of_the_samples_ratios():
    x, y = torch.full((4, 1, 1, 1), 0.5), torch.zeros(4, dtype=torch.int64)
    x[2:] = 0.4
    net = OnePixel(spiked)
    found = diagnose.approximation_ratio(net, x, y, eps=0.1, multi=ea.pgd(0.1, steps=5, step=0.1, random_start=False))
    single, multi = (F.softplus(spiked(torch.tensor(v))).item() for v in (0.6, 0.5))  # 0.6 and back: the spike again
    assert found.single[0].item() == pytest.approx(single, rel=1e-4)
    assert found.ratio == pytest.approx(torch.stack([found.single / found.multi]).mean().item())
    assert found.ratio_of_means == pytest.approx((found.single.mean() / found.multi.mean()).item())
    assert multi > single


def test_losses_of_zero_are_left_out_of_the_ratio():
    with pytest.warns(UserWarning, match="gradient of the loss by x is zero"):
        found = diagnose.approximation_ratio(Linear(torch.full((4,), 1e4)), torch.full((3, 1, 2, 2), 0.5),
                                             torch.zeros(3, dtype=torch.int64), eps=0.1)
    assert math.isnan(found.ratio) and found.undefined == 1 and found.to_dict()["ratio"] is None
    assert math.isnan(found.increase_ratio)


def test_gradient_norms_are_those_of_plain_pytorch():
    net, (x, y) = small_net(), batch(9)
    found = diagnose.gradient_norm(net, x, y)
    grad = gradient(net, x, y)[0].flatten(1).double()
    assert torch.allclose(found.l2, grad.norm(dim=1)) and torch.allclose(found.l1, grad.abs().sum(1))
    assert found.mean_l2 == pytest.approx(grad.norm(dim=1).mean().item()) and found.elements == x[0].numel()
    assert found.zero_samples == found.nonfinite_elements == 0


def test_zero_and_nonfinite_gradients_are_counted():
    class Odd(nn.Module):
        def forward(self, x):
            s = x.flatten(1)
            z = torch.where(s[:, 0] > 0.5, 0 * s[:, 0], s[:, 0] + torch.sqrt(s[:, 1] - 0.25))
            return torch.stack([z, 0 * z, 0 * z], 1)

    x = torch.tensor([[0.9, 0.5, 0.1, 0.1], [0.1, 0.5, 0.1, 0.1], [0.1, 0.25, 0.1, 0.1]]).view(3, 1, 2, 2)
    found = diagnose.gradient_norm(Odd(), x, torch.zeros(3, dtype=torch.int64))
    assert found.nonfinite.tolist() == [0, 0, 1] and found.nonfinite_elements == pytest.approx(1 / 12)
    assert found.zero.tolist() == [4, 2, 2] and found.zero_samples == pytest.approx(1 / 3) and found.l2[0] == 0
    align = diagnose.gradient_alignment(Odd(), x, torch.zeros(3, dtype=torch.int64), eps=1e-3)
    assert align.cosine.isnan().tolist() == [True, False, True] and align.undefined == pytest.approx(2 / 3)


def test_alignment_is_the_cosine_with_the_gradient_of_noisy_images():
    net, (x, y) = small_net(), batch(5)
    found = diagnose.gradient_alignment(net, x, y, eps=0.3, key=KEY)
    noise = ea.ops.random_step(torch.zeros_like(x), ea.split(KEY, 1)[0], 0.3, kind="uniform", clip=False)
    a, b = (gradient(net, v, y)[0].flatten(1) for v in (x, x + noise))
    assert torch.allclose(found.cosine.float(), F.cosine_similarity(a, b), atol=1e-5)
    assert found.mean == pytest.approx(found.cosine.mean().item())


# ------------------------------------------------------------------------------------------ the random start


def test_a_random_start_steps_over_the_spike():
    x, y = torch.full((300, 1, 1, 1), 0.5), torch.zeros(300, dtype=torch.int64)
    found = diagnose.random_start_gap(OnePixel(spiked), x, y, eps=0.1, key=KEY)
    assert found.plain.value == 0 and found.gap.value == found.random.value
    assert found.gap.low < 0.5 < found.gap.high  # those that start on the left: half of them
    assert found.random_wrong.float().mean() == found.random.value
    none = diagnose.random_start_gap(*linear(), eps=0.05)
    assert none.gap.value <= 0


# -------------------------------------------------------------------------------------------- label leaking


def leaking(s):
    """The logit of class 1: it grows with the pixel around 0.5, and falls beyond 0.58."""
    return 1 + (s - 0.5) - 100 * torch.relu(s - 0.58)


@pytest.mark.filterwarnings("ignore:attack. the model returns probabilities")  # it is so made
def test_labels_leak_where_the_true_label_tells_the_model_the_class():
    """At 0.5 the model says 1. With the true label 0, FGSM goes to 0.6, where it says 0; without it, to 0.4."""
    x, y = torch.full((10, 1, 1, 1), 0.5), torch.tensor([0] * 4 + [1] * 6)
    found = diagnose.label_leaking(OnePixel(leaking), x, y, eps=0.1)
    assert found.is_leaked["predicted"].tolist() == [True] * 4 + [False] * 6
    assert found.leaked["predicted"] == 4 and found.share["predicted"].value == 0.4
    assert found.clean_accuracy == pytest.approx(0.6) and found.adversarial_accuracy == pytest.approx(1.0)
    assert found.advantage.value == pytest.approx(0.4) and found.label_free_accuracy["predicted"] == pytest.approx(0.6)
    net, x, y = linear()
    assert diagnose.label_leaking(net, x, y, eps=0.05, rules=("predicted", "random"), key=KEY).leaked == {
        "predicted": 0, "random": 0}


# ------------------------------------------------------------------------------------------ the adversarial cone


@pytest.mark.parametrize("k", hadamard.ORDERS)
def test_regular_hadamard_matrices(k):
    h = diagnose.regular_hadamard(k).long()
    assert h.shape == (k, k) and h.abs().eq(1).all()
    assert torch.equal(h @ h.T, k * torch.eye(k, dtype=torch.int64))
    root = math.isqrt(k)
    assert root * root == k and h.sum(0).eq(root).all() and h.sum(1).eq(root).all()


def test_other_orders_are_refused():
    with pytest.raises(ValueError, match="order must be one of 1, 4, 16, 36, 64, 100, got 8"):
        diagnose.regular_hadamard(8)


@pytest.mark.parametrize("k", hadamard.ORDERS)
@pytest.mark.parametrize("d", [100, 333])
def test_directions_are_orthogonal_of_size_eps_and_aligned(k, d):
    g = torch.Generator().manual_seed(d)
    grad = torch.randn(7, d, generator=g, dtype=torch.float64) ** 3
    grad[0, ::2] = 0
    eps = 0.25
    r = torch.stack(list(cone_directions(grad, k, eps, KEY))).transpose(0, 1)  # [N, k, d]
    used = d // k * k
    assert torch.equal(r @ r.mT, (eps**2 * used * torch.eye(k, dtype=torch.float64)).expand(7, k, k))
    assert torch.equal(r.abs().sum(2), torch.full((7, k), eps * used, dtype=torch.float64))  # 0 or eps everywhere
    assert torch.equal(r.abs().amax(2), torch.full((7, k), eps, dtype=torch.float64))
    kept = grad.abs().sort(dim=1, descending=True).values[:, :used].sum(1)  # the smallest are left over
    products = (r @ grad[:, :, None]).squeeze(2)
    assert torch.allclose(products.mean(1), eps * kept / math.sqrt(k))
    even = grad.sign() + (grad == 0)
    r = torch.stack(list(cone_directions(even, k, eps, KEY))).transpose(0, 1)
    assert torch.allclose((r @ even[:, :, None]).squeeze(2),
                          torch.full((7, k), eps * used / math.sqrt(k), dtype=torch.float64))


@pytest.mark.parametrize("k", [4, 36])
def test_each_direction_is_as_aligned_in_expectation(k):
    """E[grad . r_i] = eps |grad|_1 / sqrt(k) over the assignment of pixels, for every i."""
    n, d, eps = 3000, 144, 0.5
    grad = torch.randn(d, generator=torch.Generator().manual_seed(0), dtype=torch.float64).expand(n, d)
    products = torch.stack([(r * grad).sum(1) for r in cone_directions(grad, k, eps, KEY, torch.arange(n))])
    error = products.std(1) / math.sqrt(n)
    assert ((products.mean(1) - eps * grad[0].abs().sum() / math.sqrt(k)).abs() < 4.5 * error).all()


def test_directions_follow_the_index_not_the_batch():
    grad = torch.randn(6, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([5, 3, 8, 1, 0, 2])
    whole = list(cone_directions(grad, 16, 0.1, KEY, index))
    part = list(cone_directions(grad[2:4], 16, 0.1, KEY, index[2:4]))
    assert all(torch.equal(a[2:4], b) for a, b in zip(whole, part))
    with pytest.raises(ValueError, match="order must be at most the 36 elements of an image, got 64"):
        next(cone_directions(grad[:, :1], 64, 0.1, KEY))


def test_the_cone_of_a_linear_model_follows_from_its_margin():
    """With equal |w| each of k directions lowers the margin by eps |w|_1 / sqrt(k): so many fool as that exceeds it."""
    d, eps = 14400, 0.1  # divisible by every order
    w = torch.full((d,), 0.01, dtype=torch.float64)
    w[1::2] = -0.01
    reach = torch.tensor([eps / math.sqrt(k) for k in hadamard.ORDERS], dtype=torch.float64)
    a = torch.cat([0.999 * reach, 1.001 * reach[:1], -reach[:1]])  # margin a |w|_1 at 0.5 + a sign(w)
    x = (0.5 + a[:, None] * w.sign()).view(-1, 1, 120, 120)
    found = diagnose.cone_dimension(Linear(w), x, torch.zeros(len(a), dtype=torch.int64), eps=eps, key=KEY,
                                    orders=hadamard.ORDERS)
    assert found.dimension.tolist() == [*hadamard.ORDERS, 0, -1]
    assert found.correct == 7
    for i, k in enumerate(hadamard.ORDERS):
        assert found.fooling[k].tolist() == [0] * i + [k] * (6 - i) + [0, -1]
        assert found.at_least[k].value == pytest.approx((6 - i) / 7)


def test_the_cone_may_leave_the_box_or_not():
    w = torch.ones(16, dtype=torch.float64)
    x = torch.full((1, 1, 4, 4), 0.02, dtype=torch.float64)  # 0.02 above the box, margin 0.16
    net, y = Linear(w, -0.16), torch.zeros(1, dtype=torch.int64)
    for clip, dimension in ((False, 4), (True, 0)):
        found = diagnose.cone_dimension(net, x, y, eps=0.1, orders=(4,), clip=clip, key=KEY)
        assert found.dimension.item() == dimension


# ---------------------------------------------------------------------------------------------- the checklist


class Wrapped(nn.Module):
    def __init__(self, net, before=lambda x: x, after=lambda z: z):
        super().__init__()
        self.net, self.before, self.after = net, before, after

    def forward(self, x):
        return self.after(self.net(self.before(x)))


def fit(net, dataset, n, epochs, attack=None):
    """Adam on the first images of each class, on adversarial ones too where there is an attack."""
    optimizer = torch.optim.Adam(net.parameters(), 2e-3)
    order = torch.randperm(len(dataset.train), generator=torch.Generator().manual_seed(0))[:n]
    for _ in range(epochs):
        for index in order.split(64):
            x, y = dataset.train.batch(index)
            if attack is not None:
                x, y = torch.cat([x, attack(net, x, y)]), torch.cat([y, y])
            optimizer.zero_grad()
            F.cross_entropy(net(x), y).backward()
            optimizer.step()
    return net


def perceptron(seed, hidden):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(784, hidden), nn.ReLU(), nn.Linear(hidden, 10))


@pytest.fixture(scope="module")
def digits():
    """A plain network, another one, and 200 test digits."""
    dataset = data.digits()
    x, y = dataset.test.batch(torch.arange(0, 1000, 5))
    return fit(perceptron(0, 64), dataset, 4000, 4), fit(perceptron(1, 100), dataset, 4000, 4), x, y, dataset


def report(net, digits, **kw):
    return diagnose.masking_report(net, digits[2], digits[3], sources={"other": digits[1]}, key=KEY,
                                   **{"eps": 0.1, "noises": 20, **kw})


def test_a_plain_network_does_not_mask(digits):
    found = report(digits[0], digits)
    assert found.masked is False and "No sign of masked gradients" in found.verdict
    assert {c.name: c.status for c in found.checks if c.status != masking.PASSED} == {}
    assert "The model is not robust" in found.verdict and found.n == 200
    assert set(masking.HARD) <= {c.name for c in found.checks}
    # The errors are those of the attacks, one by one.
    net, _, x, y, _ = digits
    for name, attack in (("clean", lambda *_: x), ("FGSM", ea.fgsm(0.1)),
                         ("PGD", ea.pgd(0.1, steps=20, random_start=False))):
        assert found.errors[name].value == pytest.approx((net(attack(net, x, y)).argmax(1) != y).float().mean().item())
    transferred = ea.fgsm(0.1)(digits[1], x, y)
    assert found.errors["FGSM from other"].value == pytest.approx(
        (net(transferred).argmax(1) != y).float().mean().item())
    assert found.errors[found.strongest].value == max(e.value for e in found.errors.values()) <= found.worst_case.value


@pytest.mark.filterwarnings("ignore:attack. the gradient of the loss by x is zero")  # of the quantised model
@pytest.mark.parametrize("model", [
    pytest.param(lambda net: Wrapped(net, after=lambda z: z * 1e4), id="saturated"),
    pytest.param(lambda net: Wrapped(net, before=lambda x: (x * 8).round() / 8), id="quantised"),
])
def test_masked_gradients_are_found(digits, model):
    found = report(model(digits[0]), digits)
    suspicious = {c.name for c in found.checks if c.status == masking.SUSPICIOUS}
    assert {"zero gradients", "unbounded eps", "random search", "black box against white box, PGD"} <= suspicious
    assert found.masked is True and "masks its gradients" in found.verdict and "also with many steps" in found.verdict
    assert found.strongest.endswith("from other")
    sentences = {c.name: c.sentence for c in found.checks}
    assert "which should be 100 %" in sentences["unbounded eps"]
    assert "Transferred PGD finds more errors" in sentences["black box against white box, PGD"]


def test_single_step_training_masks_single_steps(digits):
    torch.manual_seed(1)
    net = nn.Sequential(nn.Conv2d(1, 8, 5, stride=2), nn.ReLU(), nn.Conv2d(8, 16, 5, stride=2), nn.ReLU(),
                        nn.Flatten(), nn.Linear(256, 10))
    fit(net, digits[4], 2000, 12, ea.fgsm(0.3))
    found = report(net, digits, eps=0.3)
    assert found["random start"].status == masking.SUSPICIOUS
    assert found.masked is True and "from single steps" in found.verdict and "random start" in found.verdict
    assert found.errors["PGD"].low > found.errors["FGSM"].high
    assert all(found[name].status != masking.SUSPICIOUS for name in masking.HARD)


def test_few_samples_and_no_sources_decide_little(digits):
    net, _, x, y, _ = digits
    found = diagnose.masking_report(net, x[:4], y[:4], eps=0.1, key=KEY, noises=5)
    assert found["black box against white box, PGD"].status == masking.UNDECIDED
    assert "No held-out source" in found["black box against white box, FGSM"].sentence
    assert found["single step against many"].status == masking.UNDECIDED and found["unbounded eps"].status == "passed"
    assert found.masked is None and "4 images are too few" in found.verdict


def test_an_open_check_leaves_it_open_and_says_what_is_missing(digits):
    net, _, x, y, _ = digits
    found = diagnose.masking_report(net, x, y, eps=0.1, key=KEY, noises=20)  # no held-out source
    open_ = [c.name for c in found.checks if c.status == masking.UNDECIDED]
    assert open_ == ["black box against white box, FGSM", "black box against white box, PGD"] and found.masked is None
    assert "It takes a held-out network (--source) for black box against white box, FGSM; black" in found.verdict
    some = diagnose.masking_report(net, x[:40], y[:40], eps=0.1, sources={"other": digits[1]}, key=KEY, noises=20)
    assert some.masked is None and "Undecided whether" in some.verdict and "more images (--images) for" in some.verdict
    for verdict in (found.verdict, some.verdict, report(net, digits).verdict):
        assert verdict.startswith(("The model", "Nothing tried here makes it much worse"))  # robustness first


def test_a_model_that_gives_nan_is_called_that(digits):
    found = report(Wrapped(digits[0], after=lambda z: z * math.nan), digits)
    assert "On 200 of 200 images the model's output is NaN" in found.verdict and found.masked is not False


def test_one_step_that_beats_many_is_suspicious():
    """Right of 0.55 the class flips, but small steps are caught by a dip at 0.51."""
    def z(s):
        return torch.where(s < 0.51, s - 0.5, torch.where(s < 0.58, 0.51 - s, s - 0.58)) - 0.011 + 0.02 * (s > 0.58)

    x, y = torch.full((60, 1, 1, 1), 0.5), torch.zeros(60, dtype=torch.int64)
    found = diagnose.masking_report(OnePixel(z), x, y, eps=0.1, key=KEY)
    check = found["single step against many"]
    assert check.status == masking.SUSPICIOUS and "One step finds more errors than many" in check.sentence
    assert check.numbers["weaker"].value == 1 and check.numbers["stronger"].value == 0 and found.masked is True


# ------------------------------------------------------------------------------------------------- the monitor


class Turning(nn.Module):
    """Robust in a ball of 0.1 until `overfit` is set; then only against one step."""

    def __init__(self):
        super().__init__()
        self.overfit = False
        self.inner = OnePixel(lambda s: spiked(s) if self.overfit else -1 - 5 * (s - 0.5))

    def forward(self, x):
        return self.inner(x)


def test_the_monitor_warns_once_when_a_model_overfits_catastrophically():
    net = Turning()
    x, y = torch.full((40, 1, 1, 1), 0.5), torch.zeros(40, dtype=torch.int64)
    watch = diagnose.OverfittingMonitor(net, x, y, eps=0.1, key=KEY, every=2)
    assert watch(1) is None
    good = watch(2)
    assert (good.step, good.fgsm_accuracy, good.pgd_accuracy, good.overfitting) == (2, 1, 1, False)
    assert good.alignment == pytest.approx(1) and json.dumps(good.to_dict(), allow_nan=False)
    saved = watch.state_dict()
    net.overfit = True
    with pytest.warns(diagnose.CatastrophicOverfitting, match="at step 9: accuracy under PGD is .* and was 100 %"):
        bad = watch.look(9)
    assert bad.overfitting and bad.fgsm_accuracy == 1 and bad.pgd_accuracy <= 0.5 and bad.alignment < 0.7
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert watch.look(10).overfitting  # said once
    again = diagnose.OverfittingMonitor(net, x, y, eps=0.1, key=KEY)
    assert not again.look(1).overfitting  # it was never seen robust
    again.load_state_dict(saved)
    with pytest.warns(diagnose.CatastrophicOverfitting):
        assert again.look(11).overfitting


def test_the_monitor_leaves_training_alone():
    net, (x, y) = small_net(), batch(8)
    flags, rng = [m.training for m in net.modules()], torch.get_rng_state()
    state = {k: v.clone() for k, v in net.state_dict().items()}
    one, two = (diagnose.OverfittingMonitor(net, x, y, key=KEY).look(0) for _ in range(2))
    assert one == two
    assert torch.equal(torch.get_rng_state(), rng) and [m.training for m in net.modules()] == flags
    assert all(torch.equal(v, state[k]) for k, v in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


@pytest.mark.parametrize("kw, message", [
    ({"model": 3}, "model must be a torch.nn.Module"), ({"x": torch.rand(0, 3, 8, 8), "y": torch.zeros(0).long()},
                                                        "x must hold at least one image"),
    ({"y": torch.zeros(3).long()}, "y must have shape"), ({"eps": -1}, "eps must be > 0"), ({"steps": 0}, "steps must"),
    ({"every": 0.5}, "every must be an int"), ({"key": torch.zeros(3).long()}, "key must have shape"),
])
def test_errors_of_the_monitor(kw, message):
    x, y = batch(4)
    kw = {"model": small_net(), "x": x, "y": y, **kw}
    with pytest.raises((TypeError, ValueError), match=f"OverfittingMonitor: {message}"):
        diagnose.OverfittingMonitor(kw.pop("model"), kw.pop("x"), kw.pop("y"), **kw)

