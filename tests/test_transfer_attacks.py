"""Momentum, Nesterov, DI, TI, SI and variance tuning: equal to their published rules, and to the peers that have them.

float64 to 1e-6, float32 in exact mode at 99.9 % of pixels or more, both given the same random draws.
"""
import importlib.util
import itertools
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from networks import batch, gradient, small_net
from transfer_rules import kernel, resized_and_padded, transfer

import ensadv_fast as ea
from ensadv_fast.attacks import transforms
from ensadv_fast.attacks.gradient import _Run
from ensadv_fast.attacks.request import Keys, Request
from ensadv_fast.ops.random_step import unit_noise

EPS, STEP, STEPS, SIZE = 16 / 255, 1.6 / 255, 6, 20
KEY = ea.fresh_key(seed=5)
START = ea.split(KEY, 3)[0]
EXACT = {"dtype": torch.float32, "fold": False, "channels_last": False}
DTYPES = pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)


def setting(dtype, n=16, channels=3):
    net = small_net(size=SIZE, channels=channels).eval().to(dtype)
    x, y = batch(n=n, size=SIZE, channels=channels)
    return net, x.to(dtype), y


def crafted(attack, net, x, y, **kw):
    source = net if x.dtype == torch.float64 else ea.Source(net, **EXACT)
    return attack(source, x, y, key=KEY, **kw)


def same(ours, wanted):
    if ours.dtype == torch.float64:
        return (ours - wanted).abs().max() <= 1e-6
    return ((ours - wanted).abs() <= 2.0**-24).double().mean() >= 0.999


def unit(key, passes):
    """The draws of input diversity, [passes, 4] in (0, 1): whether, size, top, left."""
    drawn = ea.ops.random_step(torch.zeros(1, 4 * passes), key, 1.0, kind="uniform", clip=False)
    return (drawn.double() / 2 + 0.5).view(passes, 4)


def diversity(key, passes, rate, prob):
    draws = unit(key, passes).tolist()
    small, large = sorted((SIZE, int(SIZE * rate)))

    def apply(image, number):
        whether, size, top, left = draws[number]
        if whether >= prob:
            return image
        size = small + int(size * (large - small))
        top, left = (int(u * (large - size)) for u in (top, left))
        return resized_and_padded(image, size, top, left, large)

    return apply


def neighbours(x, n, steps, beta=1.5):
    """VMI's noise, [steps][n]."""
    radius = torch.tensor(beta * EPS, dtype=torch.float32)
    keys = ea.split(ea.split(START, 4)[2], steps * n)
    ids, inner = torch.arange(len(x)), x[0].numel()
    noise = [(radius * unit_noise("uniform", k, ids, inner)).view_as(x).to(x.dtype) for k in keys]
    return [noise[t * n:(t + 1) * n] for t in range(steps)]


# Equal to the rules.

OWN = ea.split(START, 4)[3]  # the key of a single transform
RULES = {
    "mifgsm": (ea.mifgsm, {}, lambda x: {}),
    "mifgsm-decay": (ea.mifgsm, {"decay": 0.5}, lambda x: {"decay": 0.5}),
    "mifgsm-16": (ea.mifgsm, {"step": 2 / 255}, lambda x: {"step": 2 / 255}),
    "nifgsm": (ea.nifgsm, {}, lambda x: {"lookahead": True}),
    "difgsm": (ea.difgsm, {"rate": 1.3}, lambda x: {"diverse": diversity(OWN, STEPS, 1.3, 0.5)}),
    "difgsm-shrink": (ea.difgsm, {"rate": 0.6, "prob": 0.7, "decay": 0.0},
                      lambda x: {"diverse": diversity(OWN, STEPS, 0.6, 0.7), "decay": 0.0}),
    "tifgsm": (ea.tifgsm, {}, lambda x: {"weights": kernel("gaussian", 15)}),
    "tifgsm-uniform": (ea.tifgsm, {"kernel": "uniform", "size": 7}, lambda x: {"weights": kernel("uniform", 7)}),
    "tifgsm-linear": (ea.tifgsm, {"kernel": "linear", "size": 5}, lambda x: {"weights": kernel("linear", 5)}),
    "sinifgsm": (ea.sinifgsm, {}, lambda x: {"scales": 5, "lookahead": True}),
    "sim": (ea.mifgsm, {"transforms": [ea.si(3)]}, lambda x: {"scales": 3}),
    "vmifgsm": (ea.vmifgsm, {"n": 4}, lambda x: {"noise": neighbours(x, 4, STEPS)}),
    "vmifgsm-beta": (ea.vmifgsm, {"n": 3, "beta": 0.5}, lambda x: {"noise": neighbours(x, 3, STEPS, 0.5)}),
    "vnifgsm": (ea.vnifgsm, {"n": 4}, lambda x: {"noise": neighbours(x, 4, STEPS), "lookahead": True}),
    "vt-ifgsm": (ea.ifgsm, {"step": STEP, "steps": STEPS, "variance": 2},
                 lambda x: {"noise": neighbours(x, 2, STEPS), "decay": None}),
}


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", RULES)
@DTYPES
def test_published_rules(name, dtype, targeted):
    make, ours, rule = RULES[name]
    net, x, y = setting(dtype)
    attack = make(EPS, targeted=targeted, **{"steps": STEPS, **ours})
    wanted = transfer(net, x, y, **{"eps": EPS, "step": EPS / STEPS if name != "vt-ifgsm" else STEP, "steps": STEPS,
                                    "targeted": targeted, **rule(x)})
    assert same(crafted(attack, net, x, y), wanted)


@DTYPES
def test_all_at_once(dtype):
    """VNI-DI-TI-SI, as Wang & He compose them."""
    net, x, y = setting(dtype)
    n, m, steps = 2, 3, 3
    attack = ea.vnifgsm(EPS, steps=steps, n=n, transforms=[ea.si(m), ea.di(1.3), ea.ti(size=7)])
    own = ea.split(START, 6)
    assert torch.equal(own[2], ea.split(START, 4)[2])
    wanted = transfer(net, x, y, EPS, EPS / steps, steps, lookahead=True, scales=m, weights=kernel("gaussian", 7),
                      diverse=diversity(own[4], steps * (1 + n) * m, 1.3, 0.5), noise=neighbours(x, n, steps))
    assert same(crafted(attack, net, x, y), wanted)


@pytest.mark.parametrize("parts", [p for k in range(1, 6) for p in itertools.combinations(
    ("momentum", "variance", "si", "di", "ti"), k)], ids="-".join)
def test_free_combination(parts):
    """Every subset of transforms, on any iterative constructor; nesterov wherever there is momentum."""
    net, x, y = setting(torch.float64, n=4)
    steps, listed = 3, [p for p in parts if p in ("si", "di", "ti")]
    made = {"si": ea.si(2), "di": ea.di(1.3, 0.8), "ti": ea.ti(size=3)}
    momentum, n = (0.9 if "momentum" in parts else None), (2 if "variance" in parts else 0)
    attack = ea.ifgsm(EPS, STEP, steps, transforms=[made[t] for t in listed], momentum=momentum,
                      nesterov=momentum is not None, variance=ea.vt(n) if n else None)
    rule = {"decay": momentum, "lookahead": momentum is not None, "scales": 2 if "si" in parts else 1}
    if "di" in parts:
        passes = steps * (1 + n) * rule["scales"]
        rule["diverse"] = diversity(ea.split(START, 6)[3 + listed.index("di")], passes, 1.3, 0.8)
    if "ti" in parts:
        rule["weights"] = kernel("gaussian", 3)
    if n:
        rule["noise"] = neighbours(x, n, steps)
    assert same(crafted(attack, net, x, y), transfer(net, x, y, EPS, STEP, steps, **rule))


def test_no_pass_is_made_twice_and_none_for_nothing():
    """1 per step; times m; times 1 + n but in the last step; one more for a label that a drawn image cannot give."""
    seen = []

    class Counting(torch.nn.Module):
        def forward(self, x):
            seen.append(x.requires_grad)
            return x.flatten(1)[:, :3] * 1.0

    x, y = torch.rand(2, 1, 20, 20), torch.tensor([0, 1])
    for attack, label, count in ((ea.mifgsm(), None, 10), (ea.nifgsm(), None, 10), (ea.difgsm(), y, 10),
                                 (ea.difgsm(), None, 11), (ea.tifgsm(), None, 10), (ea.sinifgsm(), None, 50),
                                 (ea.vmifgsm(n=3), y, 10 + 9 * 3), (ea.vnifgsm(n=3), None, 10 + 9 * 3),
                                 (ea.sinifgsm(variance=2, steps=4), y, 5 * (4 + 3 * 2)),
                                 (ea.random_sign(), None, 0), (ea.fast_entropy(), None, 1), (ea.pgd_l2(), y, 10)):
        seen.clear()
        attack(Counting(), x, label)
        assert len(seen) == count and sum(seen) == count - (count == 11), attack.name


def test_defaults_are_the_papers():
    for make in (ea.mifgsm, ea.nifgsm, ea.difgsm, ea.tifgsm, ea.sinifgsm, ea.vmifgsm, ea.vnifgsm):
        attack = make()
        assert (attack.eps, attack.steps, attack.step, attack.step_over_eps) == (16 / 255, 10, None, 0.1)
        assert attack.momentum == 1.0 and attack.start is None
        assert attack.nesterov == (make in (ea.nifgsm, ea.sinifgsm, ea.vnifgsm))
    assert ea.difgsm().transforms == (ea.di(rate=1.1, prob=0.5, per_sample=False, mode="bilinear"),)
    assert ea.tifgsm().transforms == (ea.ti(kernel="gaussian", size=15, nsig=3.0),)
    assert ea.sinifgsm().transforms == (ea.si(m=5),)
    assert ea.vmifgsm().variance == ea.vnifgsm().variance == ea.vt(n=20, beta=1.5)
    assert ea.pgd(variance=20).variance == ea.vt() and ea.mifgsm(momentum=0.5).momentum == 0.5
    assert hash(ea.pgd(transforms=[ea.ti()])) == hash(ea.pgd(transforms=(ea.ti(),)))
    assert ea.difgsm(transforms=[ea.ti()]).transforms == (ea.di(), ea.ti())


# Transforms by themselves.


@pytest.mark.parametrize("rate", [1.3, 0.6])
def test_di_is_interpolate_and_pad(rate):
    x, _ = batch(n=3, size=SIZE)
    x = x.double()
    view = ea.di(rate, 0.7).view(x, OWN, None, 40)
    wanted = diversity(OWN, 40, rate, 0.7)
    same = 0
    for number in range(40):
        image, back = view(x, number, 0)
        assert torch.allclose(image, wanted(x, number), atol=1e-12)
        same += torch.equal(image, x)
        g = torch.randn(x.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(number))
        assert torch.allclose((image * g).sum(), (x * back(g)).sum())  # the transposed map
    assert 4 <= same <= 22  # 12 of 40 expected
    if rate < 1:
        shapes = {tuple((view(torch.ones_like(x), i, 0)[0][0, 0] > 0.5).sum(0).unique().tolist()) for i in range(40)}
        assert len(shapes) > 4


def test_di_sizes_follow_the_published_range():
    """low + floor(u * (high - low)), high excluded, and as many places as there are."""
    ones = torch.ones(1, 1, SIZE, SIZE, dtype=torch.float64)
    view = ea.di(0.6, 1.0).view(ones, KEY, None, 3000)
    frames = torch.cat([view(ones, i, 0)[0] for i in range(3000)])[:, 0] > 0
    rows, columns = frames.any(2), frames.any(1)
    sizes = rows.sum(1)
    assert torch.equal(sizes, columns.sum(1)) and set(sizes.tolist()) == set(range(12, 20))
    assert (torch.bincount(sizes)[12:] - 375).abs().max() < 5 * 375**0.5
    tops, lefts = rows.int().argmax(1), columns.int().argmax(1)
    for size in range(12, 20):
        there = sizes == size
        assert set(tops[there].tolist()) == set(lefts[there].tolist()) == set(range(SIZE - size))
    assert (tops != lefts).any()


def test_di_nearest_is_interpolates():
    x, _ = batch(n=2, size=SIZE)
    for number, (_, size, top, left) in enumerate(unit(OWN, 10).tolist()):
        image, _ = ea.di(0.6, 1.0, mode="nearest").view(x, OWN, None, 10)(x, number, 0)
        size = 12 + int(size * 8)
        top, left = (int(u * (SIZE - size)) for u in (top, left))
        small = F.interpolate(x, size=[size, size], mode="nearest")
        assert torch.equal(image, F.pad(small, [left, SIZE - size - left, top, SIZE - size - top]))


def test_di_per_sample_draws_follow_the_index():
    x = torch.rand(6, 3, SIZE, SIZE, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    index = torch.tensor([7, 3, 9, 100, 0, 3])
    x[5] = x[1]
    image, _ = ea.di(0.6, 1.0, per_sample=True).view(x, KEY, index, 4)(x, 2, 0)
    assert torch.equal(image[1], image[5])
    alone, _ = ea.di(0.6, 1.0, per_sample=True).view(x[2:3], KEY, index[2:3], 4)(x[2:3], 2, 0)
    assert torch.allclose(image[2:3], alone, atol=1e-14)
    assert len({tuple((one != 0).any(0).sum(0).tolist()) for one in image[:5]}) > 1
    shared, _ = ea.di(0.6, 1.0).view(x, KEY, index, 4)(x, 2, 0)
    assert torch.equal(shared[1], shared[5])


def test_di_on_images_that_are_not_square():
    x = torch.rand(2, 1, 12, 20, dtype=torch.float64)
    for rate in (0.5, 1.5):
        image, back = ea.di(rate, 1.0).view(x, KEY, None, 1)(x, 0, 0)
        assert image.shape == x.shape == back(image).shape and not torch.equal(image, x)


@pytest.mark.parametrize("name", transforms.KERNELS)
@pytest.mark.parametrize("size", [1, 3, 15, 31])
def test_ti_is_a_depthwise_convolution(name, size):
    grad = torch.randn(2, 3, 12, 20, dtype=torch.float64)
    weights = kernel(name, size) if size > 1 else torch.ones(1, 1, dtype=torch.float64)
    wanted = F.conv2d(grad, weights.expand(3, 1, size, size), padding=size // 2, groups=3)
    assert torch.allclose(ea.ti(name, size).smoother(grad)(grad), wanted, atol=1e-13)
    narrow = ea.ti(name, size).smoother(grad.float())(grad.float())
    assert narrow.dtype == torch.float32 and torch.allclose(narrow, wanted.float(), atol=1e-5)


def test_transforms_keep_their_precision_under_autocast():
    net, x, y = setting(torch.float32)
    attack = ea.vmifgsm(EPS, steps=3, n=2, transforms=[ea.di(1.3), ea.si(2), ea.ti()])
    source = ea.Source(net, **EXACT)
    plain = attack(source, x, y, key=KEY)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(plain, attack(source, x, y, key=KEY))


def test_16_bit_sources_do_not_underflow():
    """Averaged gradients of a network that is sure of itself: p - y is under the least float16."""
    class Sure(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.linspace(-1, 1, 2 * 64).view(2, 64))

        def forward(self, x):
            return x.flatten(1) @ self.weight.T + torch.tensor([30.0, -30.0], dtype=x.dtype)

    net, x = Sure(), torch.rand(4, 1, 8, 8) * 0.5 + 0.25
    y = torch.zeros(4, dtype=torch.int64)
    for attack in (ea.mifgsm(EPS), ea.sinifgsm(EPS), ea.vmifgsm(EPS, n=2)):
        wanted = attack(net.double(), x.double(), y, key=KEY).float()
        for dtype in (torch.float16, torch.bfloat16, torch.float32):
            got = attack(ea.Source(net, dtype=dtype), x, y, key=KEY)
            assert torch.allclose(got, wanted, atol=1e-6)


# Controls, entropy, L2


def test_controls_are_their_equations():
    net, x, y = setting(torch.float64)
    grad, logits = gradient(net, x, y)
    assert torch.allclose(ea.fast_grad_l2(0.5)(net, x, y),
                          (x + 0.5 * grad / grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)).clamp(0, 1), atol=1e-12)
    assert torch.allclose(ea.fast_grad_linf(0.1)(net, x, y),
                          (x + 0.1 * grad / grad.abs().amax((1, 2, 3), keepdim=True)).clamp(0, 1), atol=1e-12)
    target = (y + 1) % 10
    away = gradient(net, x, target)[0]
    assert torch.allclose(ea.fast_grad_linf(0.1, targeted=True)(net, x, target),
                          (x - 0.1 * away / away.abs().amax((1, 2, 3), keepdim=True)).clamp(0, 1), atol=1e-12)
    index = torch.arange(50, 66)
    for attack, kind in ((ea.random_sign(0.1), "rademacher"), (ea.random_normal(0.1), "truncated_normal")):
        noise = torch.tensor(0.1) * unit_noise(kind, START, index, x[0].numel()).view_as(x)
        got = attack(net, x, y, key=KEY, index=index)
        assert torch.allclose(got, (x + noise).clamp(0, 1), atol=1e-12)
        info = attack(net, x, y, key=KEY, index=index, return_info=True)
        z = net(got).detach()
        assert torch.equal(info.x_adv, got) and torch.equal(info.labels, y)
        assert torch.equal(info.success, z.argmax(1) != y)
        assert torch.allclose(info.loss, F.cross_entropy(z, y, reduction="none"))
        alone = attack(net, x, key=KEY, index=index, return_info=True)
        assert torch.equal(alone.labels, logits.argmax(1)) and torch.equal(alone.x_adv, got)
    assert ea.random_normal(0.1)(net, x, y, key=KEY).sub(x).abs().max() > 0.09


def entropy(logits):
    return -(logits.softmax(1) * logits.log_softmax(1)).sum(1)


@DTYPES
def test_fast_entropy(dtype):
    net, x, y = setting(dtype)
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(entropy(net(leaf)).sum(), leaf)
    info = ea.fast_entropy(EPS)(net, x, y, return_info=True)
    assert same(info.x_adv, (x + EPS * grad.sign()).clamp(0, 1))
    assert torch.allclose(info.loss, entropy(net(x)).detach(), rtol=1e-4) and torch.equal(info.labels, y)
    assert (entropy(net(ea.fast_entropy(0.01)(net, x))) > entropy(net(x))).double().mean() > 0.9
    lower = ea.fast_entropy(0.01, targeted=True)(net, x, y)
    assert (entropy(net(lower)) < entropy(net(x))).double().mean() > 0.9
    ensemble = ea.Ensemble([ea.Source(net, **EXACT), ea.Source(small_net(1, size=SIZE), **EXACT)])
    if dtype == torch.float32:
        assert not torch.equal(ea.fast_entropy(EPS)(ensemble, x, y), info.x_adv)


def test_entropy_of_a_sure_network():
    """Where probabilities are 0 in float32, and where p log p is under the least float16, nothing is NaN."""
    class Sure(torch.nn.Module):
        def forward(self, x):
            s = x.flatten(1).sum(1, keepdim=True)
            return torch.cat([s * 0 + gap, -s, -s - 1000], 1)

    x = torch.rand(3, 1, 4, 4)
    for gap, moves in ((20.0, True), (500.0, None)):
        info = ea.fast_entropy(0.1)(ea.Source(Sure(), dtype=torch.float16), x, return_info=True)
        assert info.loss.isfinite().all() and info.x_adv.isfinite().all()
        assert moves is None or torch.equal(info.x_adv, (x - 0.1).clamp(0, 1))


def test_pgd_l2_is_the_plain_loop():
    net, x, y = setting(torch.float64)

    def norms(t):
        return t.flatten(1).norm(dim=1).view(-1, 1, 1, 1)

    def plain(start, eps, step, steps):
        adv = start
        for _ in range(steps):
            grad, _ = gradient(net, adv, y)
            delta = adv + step * grad / norms(grad) - x
            adv = (x + delta * (eps / norms(delta)).clamp(max=1)).clamp(0, 1)
        return adv

    assert torch.allclose(ea.pgd_l2(0.7, random_start=False)(net, x, y), plain(x, 0.7, 0.175, 10), atol=1e-9)
    index = torch.arange(9, 25)
    own = ea.split(START, 3)
    noise = unit_noise("normal", own[0], index, x[0].numel()).view_as(x).double()
    length = ea.ops.sample_eps(16, own[1], dist="uniform", eps_max=1.0, index=index).double() ** (1 / x[0].numel())
    start = (x + 0.7 * length.view(-1, 1, 1, 1) * noise / norms(noise)).clamp(0, 1)
    got = ea.pgd_l2(0.7, step=0.2, steps=4)(net, x, y, key=KEY, index=index)
    assert torch.allclose(got, plain(start, 0.7, 0.2, 4), atol=1e-9)


def test_pgd_l2_starts_uniformly_in_the_ball():
    """In three dimensions, where the volume shows: P(length <= r eps) = r^3, and no direction is preferred."""
    class Flat(torch.nn.Module):
        def forward(self, x):
            return x.flatten(1) * 0.0

    x = torch.full((20000, 1, 1, 3), 0.5)
    y = torch.zeros(20000, dtype=torch.int64)
    with pytest.warns(UserWarning, match="gradient of the loss by x is zero"):
        delta = (ea.pgd_l2(0.3, steps=1)(Flat(), x, y, key=KEY) - x).flatten(1)
    length = delta.norm(dim=1) / 0.3
    assert length.max() <= 1 + 1e-6
    for r in (0.3, 0.5, 0.8):
        assert abs((length <= r).double().mean() - r**3) < 5 * (r**3 * (1 - r**3) / 20000) ** 0.5
    assert (delta / delta.norm(dim=1, keepdim=True)).mean(0).abs().max() < 5 * (1 / 3 / 20000) ** 0.5


def plain_loss(name, z, y, targeted):
    """Of logits [N, C] by the published formulas; kappa 1."""
    if name == "ce":
        return F.cross_entropy(z, y, reduction="none")
    margin = z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)
    top = z.sort(1, descending=True).values
    hinge = ((-margin if targeted else margin) + 1).clamp(min=0)
    return -margin / (top[:, 0] - top[:, 2] + 1e-12) if name == "dlr" else hinge if targeted else -hinge


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("loss", ["ce", "cw", "dlr"])
@pytest.mark.parametrize("make, eps", [(ea.pgd, 0.02), (ea.pgd_l2, 0.5)])
def test_restarts_keep_the_worst_example_by_every_loss(make, eps, loss, targeted):
    """One that meets the aim before any that does not, then the further loss, then the earlier run."""
    net, x, y = setting(torch.float64)
    attack = make(eps, steps=2, loss=loss, targeted=targeted, kappa=1.0)
    result = replace(attack, restarts=4)(net, x, y, key=KEY, return_info=True)
    live = ea.Source(net, live=True, dtype=None, fold=False, channels_last=False)
    request = Request(x, y, None, None, attack._sizes(x, eps))
    runs = torch.stack([_Run(attack, live, request, Keys(k, None, None), None).result().x_adv
                        for k in ea.split(START, 4)])
    logits = torch.stack([net(run).detach() for run in runs])
    losses = torch.stack([plain_loss(loss, z, y, targeted) for z in logits])
    met = (logits.argmax(2) == y) == targeted
    best = ((-losses if targeted else losses) + 1000.0 * met).argmax(0)
    assert torch.equal(result.x_adv, runs[best, torch.arange(16)]) and len(best.unique()) > 1
    assert torch.equal(result.success, met.any(0))
    assert torch.allclose(result.loss, losses[best, torch.arange(16)], atol=1e-12)


@pytest.mark.parametrize("loss", ["cw", "dlr"])
def test_margin_losses_with_momentum_follow_their_gradient(loss):
    net, x, y = setting(torch.float64)

    leaf = x.clone().requires_grad_()
    z = net(leaf)
    margin = z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -torch.inf).amax(1)
    (grad,) = torch.autograd.grad((-margin if loss == "cw" else plain_loss(loss, z, y, False)).sum(), leaf)
    got = ea.mifgsm(0.01, steps=1, loss=loss, kappa=1e3)(net, x, y)
    assert same(got, (x + 0.01 * grad.sign()).clamp(0, 1))


# Everything else the calling convention promises

MANY = {"mifgsm": ea.mifgsm(EPS), "nifgsm": ea.nifgsm(EPS, steps=3), "difgsm": ea.difgsm(EPS, steps=3, rate=1.3),
        "tifgsm": ea.tifgsm(EPS, steps=3), "sinifgsm": ea.sinifgsm(EPS, steps=2),
        "vmifgsm": ea.vmifgsm(EPS, steps=2, n=2), "vnifgsm": ea.vnifgsm(EPS, steps=2, n=2),
        "pgd_l2": ea.pgd_l2(0.5, steps=3), "fast_entropy": ea.fast_entropy(EPS),
        "fast_grad_linf": ea.fast_grad_linf(EPS), "cw_linf": ea.cw_linf(EPS, max_iterations=6, kappa=50.0)}
many = pytest.mark.parametrize("attack", MANY.values(), ids=MANY)


@many
@pytest.mark.parametrize("fuse", ["logits", "probs", "loss"])
def test_ensembles(attack, fuse):
    x, y = batch(n=3, size=SIZE, channels=1)
    nets = [small_net(seed, size=SIZE, channels=1).eval() for seed in range(2)]
    ensemble = ea.Ensemble([ea.Source(net, **EXACT) for net in nets], fuse=fuse)
    both = attack(ensemble, x, y, key=KEY)
    assert both.shape == x.shape and not torch.equal(both, x)
    for net in nets:
        assert not torch.equal(both, attack(ea.Source(net, **EXACT), x, y, key=KEY))
    if fuse == "probs" and attack.loss == "cw":
        return  # the margin of probabilities, which is not that of logits
    twice = ea.Ensemble([ea.Source(nets[0], **EXACT)] * 2, fuse=fuse)
    alone = attack(ea.Source(nets[0], **EXACT), x, y, key=KEY)
    assert (attack(twice, x, y, key=KEY) - alone).abs().gt(1e-4).double().mean() < 0.01


@many
def test_eps_per_sample_is_one_call_per_sample(attack):
    net, x, y = setting(torch.float64, n=3)
    eps = torch.tensor([0.0, 0.03, 0.1], dtype=torch.float64)
    together = attack(net, x, y, key=KEY, eps=eps)
    assert torch.equal(together[0], x[0])
    for i in (1, 2):
        alone = attack(net, x[i:i + 1], y[i:i + 1], key=KEY, eps=float(eps[i]), index=torch.tensor([i]))
        assert (together[i] - alone[0]).abs().gt(1e-6).double().mean() < 1e-3


@many
def test_memory_formats_and_16_bit_sources(attack):
    net, x, y = setting(torch.float32, n=4)
    plain = attack(ea.Source(net, **EXACT), x, y, key=KEY)
    last = x.contiguous(memory_format=torch.channels_last)
    got = attack(ea.Source(net, **EXACT), last, y, key=KEY)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert (got - plain).abs().gt(1e-4).double().mean() < 0.01
    fast = attack(ea.Source(net, dtype=torch.bfloat16), x, y, key=KEY)

    def loss(x):
        return F.cross_entropy(net(x), y).item()

    assert loss(fast) > loss(x) + 0.8 * (loss(plain) - loss(x)) or attack.name == "fast_entropy"


# The peers themselves, given our draws.

torchattacks = pytest.mark.skipif(importlib.util.find_spec("torchattacks") is None,
                                  reason="torchattacks is not installed: nothing is compared with it")


def fed(monkeypatch, draws=None, noise=None):
    """torch's generators as torchattacks calls them, giving our draws: of input diversity, of neighbours."""
    if draws is not None:
        feed = iter([u for one in draws.tolist() for u in (one[1], one[2], one[3], one[0])])
        monkeypatch.setattr(torch, "randint", lambda low, high, size, dtype: torch.tensor(
            [low + int(next(feed) * (high - low))], dtype=dtype))
        monkeypatch.setattr(torch, "rand", lambda n: torch.tensor([next(feed)], dtype=torch.float64))
    if noise is not None:
        noises = itertools.chain(noise)
        monkeypatch.setattr(torch.Tensor, "uniform_", lambda self, low, high: self.copy_(next(noises)))


PEERS = {
    "MIFGSM": (ea.mifgsm, {}, {}), "NIFGSM": (ea.nifgsm, {}, {}), "SINIFGSM": (ea.sinifgsm, {"m": 4}, {"m": 4}),
    "DIFGSM": (ea.difgsm, {"rate": 0.6, "decay": 0.5}, {"resize_rate": 0.6, "decay": 0.5}),
    "DIFGSM-1": (ea.difgsm, {"rate": 0.6, "prob": 1.0}, {"resize_rate": 0.6, "decay": 1.0, "diversity_prob": 1.0}),
    "TIFGSM": (ea.tifgsm, {"transforms": [ea.di(0.6)]}, {"resize_rate": 0.6, "decay": 1.0}),
    "TIFGSM-linear": (ea.tifgsm, {"transforms": [ea.di(0.6)], "kernel": "linear", "size": 7},
                      {"resize_rate": 0.6, "decay": 1.0, "kernel_name": "linear", "len_kernel": 7}),
    "VMIFGSM": (ea.vmifgsm, {"n": 3}, {"N": 3}), "VNIFGSM": (ea.vnifgsm, {"n": 3, "beta": 1.0}, {"N": 3, "beta": 1.0}),
    "PGDL2": (ea.pgd_l2, {"random_start": False, "step": STEP}, {"random_start": False}),
}


@torchattacks
@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("name", PEERS)
@DTYPES
def test_torchattacks(name, dtype, targeted, monkeypatch):
    import torchattacks as peers
    make, ours, theirs = PEERS[name]
    net, x, y = setting(dtype)
    peer = getattr(peers, name.split("-")[0])(net, EPS, STEP, steps=STEPS, **theirs)
    if name.startswith("TIFGSM"):
        peer.stacked_kernel = peer.stacked_kernel.to(dtype)  # float32 alone fits float32 images alone
    if targeted:
        peer.set_mode_targeted_by_label(quiet=True)
    wanted = crafted(make(EPS, steps=STEPS, targeted=targeted, **{"step": STEP, **ours}), net, x, y)
    with monkeypatch.context() as patch:
        key = ea.split(START, 5)[4] if name.startswith("TIFGSM") else OWN
        noise = None
        if "n" in ours:
            noise = sum(neighbours(x, 3, STEPS, ours.get("beta", 1.5)), [])
        fed(patch, unit(key, STEPS) if name[:2] in ("DI", "TI") else None, noise)
        theirs = peer(x, y)
    if dtype == torch.float64 and name.startswith("TIFGSM"):  # their kernel is rounded to float32
        assert ((wanted - theirs).abs() <= 1e-6).double().mean() >= 0.999
    else:
        assert same(wanted, theirs)
