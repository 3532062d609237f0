"""Attacks against independent plain-PyTorch implementations, their budgets, and what they leave untouched."""
import copy
import gc
import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from networks import batch, gradient, iterate, small_net
from torch import nn
from torch._subclasses.fake_tensor import DynamicOutputShapeException, FakeTensorMode

import ensadv_fast as ea
from ensadv_fast.attacks.request import Keys, Request
from ensadv_fast.ops.random_step import unit_noise

EPS = 8 / 255
ATTACKS = {
    "fgsm": ea.fgsm(EPS), "rand_fgsm": ea.rand_fgsm(EPS), "rand_fgsm-unclipped": ea.rand_fgsm(EPS, clip_start=False),
    "rand_fgsm-alpha": ea.rand_fgsm(EPS, alpha=0.01), "step_ll": ea.step_ll(EPS), "rand_step_ll": ea.rand_step_ll(EPS),
    "step_rnd": ea.step_rnd(EPS), "ifgsm": ea.ifgsm(EPS), "iter_ll": ea.iter_ll(EPS), "pgd": ea.pgd(EPS),
    "pgd-restarts": ea.pgd(EPS, steps=3, restarts=2), "pgd-cw": ea.pgd(EPS, steps=3, loss="cw", kappa=1.0),
    "pgd-dlr": ea.pgd(EPS, steps=3, loss="dlr"), "fgsm-big-step": ea.pgd(EPS, step=0.2, steps=1, random_start=False),
    "fgsm-2.5": ea.pgd(EPS, steps=1, random_start=False), "pgd_l2": ea.pgd_l2(EPS, steps=3),
    "pgd_l2-restarts": ea.pgd_l2(EPS, steps=2, restarts=2), "pgd_l2-fixed": ea.pgd_l2(EPS, steps=2, random_start=False),
    "pgd_l2-momentum": ea.pgd_l2(EPS, steps=3, momentum=1.0, nesterov=True), "mifgsm": ea.mifgsm(EPS),
    "mifgsm-restarts": ea.mifgsm(EPS, steps=2, start="uniform", restarts=2), "nifgsm": ea.nifgsm(EPS),
    "difgsm": ea.difgsm(EPS, steps=4, rate=1.5), "difgsm-shrink": ea.difgsm(EPS, steps=4, rate=0.5, per_sample=True),
    "tifgsm": ea.tifgsm(EPS, steps=3, size=5), "sinifgsm": ea.sinifgsm(EPS, steps=3, m=3),
    "vmifgsm": ea.vmifgsm(EPS, steps=3, n=2), "vnifgsm": ea.vnifgsm(EPS, steps=3, n=2),
    "everything": ea.pgd(EPS, steps=2, restarts=2, momentum=1.0, nesterov=True, variance=2, rule="least_likely",
                         targeted=True, transforms=[ea.di(1.5), ea.si(2), ea.ti(size=5)]),
    "fast_grad_l2": ea.fast_grad_l2(EPS), "fast_grad_linf": ea.fast_grad_linf(EPS),
    "fast_grad_linf-momentum": ea.mifgsm(EPS, steps=3, direction="max"), "fast_entropy": ea.fast_entropy(EPS),
    "pgd-entropy": ea.pgd(EPS, steps=2, restarts=2, loss="entropy"), "random_sign": ea.random_sign(EPS),
    "random_normal": ea.random_normal(EPS), "cw_linf": ea.cw_linf(EPS, max_iterations=12, check_every=5),
    "cw_linf-kappa": ea.cw_linf(EPS, max_iterations=5, kappa=100.0), "cw_linf-ll": ea.cw_linf(
        EPS, max_iterations=5, rule="least_likely", targeted=True),
}
every_attack = pytest.mark.parametrize("attack", ATTACKS.values(), ids=ATTACKS)
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def key(seed=0):
    return ea.fresh_key(seed=seed)


# Equal to the textbook, bit for bit in float32.


def test_fgsm_is_the_plain_expression(device):
    net, (x, y) = small_net().to(device), batch()
    x, y = x.to(device), y.to(device)
    grad, _ = gradient(net, x, y)
    assert torch.equal(ea.fgsm(EPS)(net, x, y), (x + EPS * grad.sign()).clamp(0, 1))
    exact = ea.Source(net, dtype=torch.float32, fold=False, channels_last=False)
    assert torch.equal(ea.fgsm(EPS)(exact, x, y), (x + EPS * grad.sign()).clamp(0, 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_iterated_attacks_are_the_plain_loop(dtype):
    net, (x, y) = small_net().to(dtype), batch()
    x = x.to(dtype)
    assert torch.equal(ea.ifgsm(EPS)(net, x, y), iterate(net, x, x, y, EPS, 1 / 255, 10))
    assert torch.equal(ea.ifgsm(0.3, step=0.03, steps=10)(net, x, y), iterate(net, x, x, y, 0.3, 0.03, 10))
    assert torch.equal(ea.pgd(EPS, random_start=False)(net, x, y), iterate(net, x, x, y, EPS, 2.5 * EPS / 10, 10))
    _, logits = gradient(net, x, y)
    least = logits.argmin(1)
    assert torch.equal(ea.iter_ll(EPS)(net, x), iterate(net, x, x, least, EPS, 1 / 255, 10, sign=-1))
    assert torch.equal(ea.step_ll(EPS)(net, x, y), iterate(net, x, x, least, EPS, EPS, 1, sign=-1))


@pytest.mark.parametrize("clip", [True, False])
def test_random_start_attacks_are_their_equations(clip):
    net, (x, y) = small_net(), batch()
    start_key = ea.split(key(3), 3)[0]
    index = torch.arange(100, 116)
    signs = unit_noise("rademacher", start_key, index, 3 * 64).view_as(x)
    for alpha in (None, 0.01):
        a = EPS / 2 if alpha is None else alpha
        x1 = x + a * signs
        x1 = x1.clamp(0, 1) if clip else x1
        wanted = iterate(net, x, x1, y, EPS, EPS - a, 1)
        assert torch.equal(ea.rand_fgsm(EPS, alpha, clip)(net, x, y, key=key(3), index=index), wanted)
        least = gradient(net, x, y)[1].argmin(1)  # of the clean image, not of the start
        wanted = iterate(net, x, x1, least, EPS, EPS - a, 1, sign=-1)
        assert torch.equal(ea.rand_step_ll(EPS, alpha, clip)(net, x, y, key=key(3), index=index), wanted)
    uniform = unit_noise("uniform", start_key, index, 3 * 64).view_as(x)
    wanted = iterate(net, x, (x + EPS * uniform).clamp(0, 1), y, EPS, 2.5 * EPS / 4, 4)
    assert torch.equal(ea.pgd(EPS, steps=4)(net, x, y, key=key(3), index=index), wanted)


def test_least_likely_label_of_a_random_start_is_the_clean_images():
    """A model whose least likely class changes under any perturbation."""
    class Fickle(nn.Module):
        def forward(self, x):
            clean = (x == 0.5).flatten(1).all(1, keepdim=True)
            base = torch.where(clean, torch.tensor([[0.0, 1.0, 2.0]]), torch.tensor([[2.0, 1.0, 0.0]]))
            return base + 1e-3 * x.flatten(1).sum(1, keepdim=True)

    x = torch.full((4, 1, 2, 2), 0.5)
    info = ea.rand_step_ll(0.1)(Fickle(), x, key=key(), return_info=True)
    assert info.labels.tolist() == [0] * 4
    assert Fickle()(info.x_adv).argmin(1).tolist() == [2] * 4


def test_label_rules():
    net, (x, y) = small_net().eval(), batch(n=64)
    logits = net(x).detach()

    def labels(attack, y=None, seed=0):
        return attack(net, x, y, key=key(seed), return_info=True).labels

    assert torch.equal(labels(ea.fgsm(EPS), y), y)
    assert torch.equal(labels(ea.fgsm(EPS)), logits.argmax(1))  # nothing leaks
    assert torch.equal(labels(ea.fgsm(EPS, rule="predicted"), y), logits.argmax(1))
    assert torch.equal(labels(ea.step_ll(EPS), y), logits.argmin(1))
    drawn = torch.stack([labels(ea.step_rnd(EPS), y, seed) for seed in range(200)])
    assert not (drawn == y).any()
    counts = torch.stack([(drawn == c).sum(0) for c in range(10)], 1).double()  # 0 at y, else about 200/9
    others = counts[counts > 0]
    assert len(others) == 64 * 9 and ((others - 200 / 9) ** 2 / (200 / 9)).mean() < 1.5
    alone = labels(ea.step_rnd(EPS))
    assert not (alone == logits.argmax(1)).any()


def test_ties_take_the_lowest_index():
    class Flat(nn.Module):
        def forward(self, x):
            return x.flatten(1).sum(1, keepdim=True).expand(-1, 5) * 1.0

    x = torch.rand(3, 1, 2, 2)
    assert ea.step_ll(EPS)(Flat(), x, return_info=True).labels.tolist() == [0, 0, 0]
    assert ea.fgsm(EPS)(Flat(), x, return_info=True).labels.tolist() == [0, 0, 0]


def test_return_info_reports_the_last_forward_pass():
    net, (x, y) = small_net().eval(), batch()
    info = ea.fgsm(EPS)(net, x, y, return_info=True)
    logits = net(x).detach()
    assert torch.equal(info.success, logits.argmax(1) != y)
    assert torch.equal(info.loss, nn.functional.cross_entropy(logits, y, reduction="none"))
    two = ea.ifgsm(EPS, step=0.01, steps=2)(net, x, y, return_info=True)
    middle = ea.ifgsm(EPS, step=0.01, steps=1)(net, x, y)
    assert torch.equal(two.success, net(middle).argmax(1) != y)
    target = (y + 1) % 10
    hit = ea.fgsm(EPS, targeted=True)(net, x, target, return_info=True)
    assert torch.equal(hit.success, logits.argmax(1) == target)


def test_targeted_descends_and_untargeted_ascends():
    net, (x, y) = small_net().eval(), batch()
    target = (y + 1) % 10

    def loss(x, y):
        return nn.functional.cross_entropy(net(x), y, reduction="none").detach()

    assert (loss(ea.ifgsm(EPS)(net, x, y), y) > loss(x, y)).all()
    assert (loss(ea.ifgsm(EPS, targeted=True)(net, x, target), target) < loss(x, target)).all()


def test_margin_losses():
    net, (x, y) = small_net().eval(), batch(n=64)

    def margin(x):
        z = net(x).detach()
        return z.gather(1, y[:, None])[:, 0] - z.scatter(1, y[:, None], -math.inf).amax(1)

    def dlr(x):
        top = net(x).detach().sort(1, descending=True).values
        return -margin(x) / (top[:, 0] - top[:, 2])

    small = dict(eps=0.002, step=0.0005, steps=4)
    assert (margin(ea.ifgsm(**small, loss="cw", kappa=50.0)(net, x, y)) < margin(x)).all()
    assert (dlr(ea.ifgsm(**small, loss="dlr")(net, x, y)) >= dlr(x)).double().mean() > 0.95
    # At kappa 0 the hinge is flat once the example fools: such samples stay where they are.
    fooled = margin(x) < 0
    stay = ea.fgsm(EPS, loss="cw")(net, x, y)
    assert fooled.any() and torch.equal(stay[fooled], x[fooled])
    # Targeted, the label's margin over the others grows.
    assert (margin(ea.ifgsm(**small, loss="cw", kappa=50.0, targeted=True)(net, x, y)) > margin(x)).all()


def test_restarts_keep_the_worst_example():
    net, (x, y) = small_net().eval(), batch(n=64)
    result = ea.pgd(EPS, steps=2, restarts=5)(net, x, y, key=key(5), return_info=True)
    runs = []
    for restart in ea.split(ea.split(key(5), 3)[0], 5):
        start = x + EPS * unit_noise("uniform", restart, torch.arange(64), 192).view_as(x)
        runs.append(iterate(net, x, start.clamp(0, 1), y, EPS, 1.25 * EPS, 2))
    logits = torch.stack([net(run).detach() for run in runs])
    loss = torch.stack([nn.functional.cross_entropy(z, y, reduction="none") for z in logits])
    fooled = logits.argmax(2) != y
    best = (loss.double() + 1000 * fooled).argmax(0)  # one that fools beats any that does not, then the larger loss
    assert torch.equal(result.x_adv, torch.stack(runs)[best, torch.arange(64)])
    assert torch.equal(result.success, fooled.any(0))
    assert torch.equal(result.loss, loss[best, torch.arange(64)])
    assert len(best.unique()) > 1


def test_default_steps_follow_kurakin():
    counted = []

    class Counting(nn.Module):
        def forward(self, x):
            counted.append(1)
            return x.flatten(1)[:, :3] * 1.0

    x = torch.rand(2, 1, 2, 2)
    for eps255, steps in ((16, 20), (8, 10), (4, 5), (2, 2)):
        counted.clear()
        ea.ifgsm(eps255 / 255)(Counting(), x)
        assert len(counted) == steps
        counted.clear()
        ea.ifgsm(1 / 255)(Counting(), x, eps=eps255 / 255)
        assert len(counted) == steps


# Budgets: law 1, for every attack, dtype and format.


@every_attack
@pytest.mark.parametrize("dtype", FLOATS, ids=str)
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@settings(max_examples=2)
@given(seed=st.integers(0, 1000), kind=st.sampled_from(["default", "number", "tensor"]))
def test_budget_and_box(attack, dtype, memory_format, seed, kind):
    net = small_net()
    net = net.double() if dtype == torch.float64 else net
    x, y = batch(n=4, seed=seed)
    x = x.to(dtype).contiguous(memory_format=memory_format)
    eps = {"default": None, "number": 0.06, "tensor": torch.tensor([0.0, 0.01, 0.1, EPS])}[kind]
    before = x.clone()
    source = net if dtype in (torch.float32, torch.float64) else ea.Source(net, dtype=torch.float32)
    x_adv = attack(source, x, y, key=key(seed), eps=eps)
    limit = torch.as_tensor(EPS if eps is None else eps, dtype=torch.float32).double().reshape(-1, *[1] * 3)
    slack = 2.0**-24 if dtype in (torch.float32, torch.float64) else 0.0
    moved = x_adv.double() - x.double()
    assert (moved.abs() - limit).max() <= slack
    if isinstance(attack, ea.Attack) and attack.norm == "l2":
        assert (moved.flatten(1).norm(dim=1) - limit.flatten()).max() <= (1e-6 if slack else 0.0)
    assert x_adv.min() >= 0 and x_adv.max() <= 1
    assert x_adv.dtype == dtype and x_adv.stride() == x.stride() and torch.equal(x, before)
    assert x_adv.data_ptr() != x.data_ptr()
    out = torch.full_like(x, math.nan)
    assert attack(source, x, y, key=key(seed), eps=eps, out=out) is out
    assert torch.equal(out, x_adv)
    assert attack(source, x, y, key=key(seed), eps=eps, out=x) is x and torch.equal(x, x_adv)


@every_attack
def test_uint8_images(attack):
    net, (x, y) = small_net(), batch(n=4)
    x = (x * 255).round().to(torch.uint8)
    wide = x.float() / 255
    x_adv = attack(net, x, y, key=key())
    assert torch.equal(x_adv, attack(net, wide, y, key=key()))
    levels = attack(net, x, y, key=key(), out=torch.empty_like(x))
    assert levels.dtype == torch.uint8 and (levels.int() - x.int()).abs().max() <= 8
    assert ((levels.float() / 255 - x_adv).abs() <= 1.01 / 255).all()


def test_16_bit_iterates_do_not_stall():
    """Ten steps of 0.8/255 move bfloat16 pixels above 0.5 by nothing if each is rounded; ours is rounded once."""
    class Sum(nn.Module):
        def forward(self, x):
            s = x.float().flatten(1).sum(1, keepdim=True)
            return torch.cat([-s, s], 1)

    x = torch.linspace(0.5, 0.9, 64).bfloat16().view(1, 1, 8, 8)
    x_adv = ea.ifgsm(EPS, step=0.8 / 255, steps=10)(Sum(), x, torch.tensor([0]))
    moved = x_adv.double() - x.double()
    assert moved.min() > EPS - 2**-8 and moved.max() <= torch.tensor(EPS).double()


def test_alpha_belongs_to_the_budget():
    with pytest.raises(ValueError, match="alpha must be <= eps = 0.1, of which it is a part, got 0.2"):
        ea.rand_fgsm(0.1, alpha=0.2)
    net, (x, y) = small_net(), batch(n=2)
    with pytest.raises(ValueError, match="alpha must be <= eps = 0.01, of which it is a part, got 0.05"):
        ea.rand_fgsm(0.1, alpha=0.05)(net, x, y, eps=0.01)
    small = ea.rand_fgsm(0.1, alpha=0.05)(net, x, y, eps=torch.tensor([0.01, 0.1]))
    assert (small - x).abs()[0].max() <= 0.01 + 2**-24


# Keys


DRAWING = {n: a for n, a in ATTACKS.items() if a._draws_noise or a.rule == "random"}


def test_attacks_that_draw_are_known():
    assert {n for n in ATTACKS if "rand" in n or "vmi" in n or "vni" in n or "restarts" in n} <= set(DRAWING)
    assert not {"fgsm", "mifgsm", "tifgsm", "sinifgsm", "pgd_l2-fixed", "fast_entropy", "cw_linf"} & set(DRAWING)


@pytest.mark.parametrize("attack", DRAWING.values(), ids=DRAWING)
def test_same_key_same_result_and_split_batches_agree(attack):
    net, (x, y) = small_net().double(), batch()
    x, index = x.double(), torch.arange(500, 516)
    whole = attack(net, x, y, key=key(7), index=index)
    assert torch.equal(whole, attack(net, x, y, key=key(7), index=index))
    assert not torch.equal(whole, attack(net, x, y, key=key(8), index=index))
    parts = [attack(net, x[i:i + 5], y[i:i + 5], key=key(7), index=index[i:i + 5]) for i in range(0, 16, 5)]
    # Another batch size may flip the sign of a gradient that is zero but for rounding: nothing else may differ, but
    # where steps are not signs.
    rounding = 1e-9 if attack.norm == "l2" else 0.0
    assert ((torch.cat(parts) - whole).abs() > rounding).double().mean() < 1e-3


def test_default_keys_come_from_our_stream_and_torchs_generator_is_not_drawn_from():
    net, (x, y) = small_net(), batch()
    attack = ea.rand_fgsm(EPS)
    ea.manual_seed(11)
    state = torch.get_rng_state()
    first, second = attack(net, x, y), attack(net, x, y)
    assert torch.equal(state, torch.get_rng_state())
    assert not torch.equal(first, second)
    ea.manual_seed(11)
    assert torch.equal(first, attack(net, x, y)) and torch.equal(second, attack(net, x, y))
    ea.manual_seed(11)
    ea.fgsm(EPS)(net, x, y)  # draws nothing, and so takes no key
    assert torch.equal(first, attack(net, x, y))


# The model is left exactly as it was.


def snapshot(net):
    return ({k: v.clone() for k, v in net.state_dict().items()},
            [(m.training, getattr(m, "track_running_stats", None)) for m in net.modules()],
            [(p.requires_grad, None if p.grad is None else p.grad.clone()) for p in net.parameters()],
            [(len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks)) for m in net.modules()])


def same(a, b):
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return a == b


def mixed_state_net():
    net = small_net().train()
    net[1].eval()  # a frozen batch normalisation
    net[4].weight.requires_grad_(False)
    net(batch()[0]).sum().backward()
    net[0].register_forward_hook(lambda *a: None)
    return net


@every_attack
@pytest.mark.parametrize("crafting", ["eval", "train"])
def test_model_state_is_untouched(attack, crafting):
    net, (x, y) = mixed_state_net(), batch()
    before = snapshot(net)
    attack(net if crafting == "eval" else ea.Source(net, live=True, dtype=None, crafting="train"), x, y)
    attack(ea.Source(net, crafting=crafting), x, y)
    assert same(before, snapshot(net))


@pytest.mark.parametrize("crafting", ["eval", "train"])
def test_model_state_is_untouched_after_an_exception(crafting):
    net, (x, y) = mixed_state_net(), batch()

    def explode(*args):
        raise KeyError("from the model")

    handle = net[6].register_forward_hook(explode)
    before, generator = snapshot(net), torch.get_rng_state()
    with pytest.raises(KeyError, match="from the model"):
        ea.pgd(EPS)(ea.Source(net, live=True, dtype=None, crafting=crafting), x, y)
    assert same(before, snapshot(net)) and torch.equal(generator, torch.get_rng_state())
    handle.remove()
    ea.pgd(EPS)(net, x, y)


def test_eval_mode_while_crafting():
    net, seen = small_net().train(), []
    net[3].register_forward_hook(lambda m, *a: seen.append(m.training))
    ea.fgsm(EPS)(net, *batch())
    assert seen == [False]


@every_attack
@pytest.mark.parametrize("sizes", ["numbers", "per sample"])
def test_no_value_of_a_tensor_decides_what_is_done(attack, sizes, monkeypatch):
    """On tensors that have no values, as a CUDA graph's capture has none to look at."""
    monkeypatch.setattr("ensadv_fast.ops.checks.is_readable", lambda t: False)  # on a GPU nothing is
    with FakeTensorMode(allow_non_fake_inputs=True):
        net, x = small_net().eval(), torch.empty(4, 3, 8, 8)
        y, start, label = torch.empty(4, dtype=torch.int64), torch.empty(2, dtype=torch.int64), torch.ones(2).long()
        source = ea.Source(net, live=True, dtype=None, fold=False, channels_last=False)
        at = attack._sizes(x, EPS if sizes == "numbers" else torch.empty(4))
        request, keys = Request(x, y, None, None, at), Keys(start, label, None)
        with source.session(), torch.no_grad():
            if not isinstance(attack, ea.CwLinf):
                result = attack._worst_of(source, request, keys)
                assert (result if isinstance(result, torch.Tensor) else result.x_adv).shape == x.shape
            else:
                with pytest.raises(DynamicOutputShapeException):
                    attack._worst_of(source, request, keys)


@every_attack
def test_works_in_no_grad_and_inference_mode(attack):
    net, (x, y) = small_net(), batch()
    plain = attack(net, x, y, key=key())
    with torch.no_grad():
        assert torch.equal(plain, attack(net, x, y, key=key()))
    with torch.inference_mode():
        inside = attack(net, x.clone(), y.clone(), key=key())
        source = ea.Source(net, mean=(0.0,) * 3, std=(1.0,) * 3, dtype=None, fold=False, channels_last=False)
        assert torch.equal(plain, attack(source, x.clone(), y.clone(), key=key()))
    assert torch.equal(plain, inside) and not plain.requires_grad


def test_a_model_made_in_inference_mode_is_refused():
    with torch.inference_mode():
        net = small_net()
    with pytest.raises(ValueError, match=r"model was created in torch.inference_mode \(0.weight"):
        ea.fgsm(EPS)(net, *batch())


def test_no_parameter_gradient_is_computed():
    """The convolution's backward is asked for the input's gradient alone."""
    from torch.utils._python_dispatch import TorchDispatchMode

    masks = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            if "convolution_backward" in str(function):
                masks.append(tuple(args[-1]))
            return function(*args, **(kwargs or {}))

    net, (x, y) = small_net(), batch()
    with Watch():
        ea.fgsm(EPS)(net, x, y)
    assert masks == [(True, False, False)] * 2


def test_empty_batch():
    net = small_net()
    info = ea.pgd(EPS)(net, torch.rand(0, 3, 8, 8), torch.empty(0, dtype=torch.int64), return_info=True)
    assert info.x_adv.shape == (0, 3, 8, 8) and info.success.shape == (0,)


# Bad input

NET = small_net()
X, Y = batch(n=4)
BAD = [
    (lambda: ea.fgsm(-0.1), ValueError, "fgsm: eps must be >= 0, got -0.1"),
    (lambda: ea.fgsm(math.nan), ValueError, "fgsm: eps must not be NaN"),
    (lambda: ea.fgsm("8"), TypeError, "fgsm: eps must be a number, got str"),
    (lambda: ea.fgsm(rule="worst"), ValueError,
     "rule must be one of true, predicted, least_likely, random, got 'worst'"),
    (lambda: ea.fgsm(loss="mse"), ValueError, "loss must be one of ce, cw, dlr, entropy, None, got 'mse'"),
    (lambda: ea.fgsm(lo=1.0, hi=0.0), ValueError, "lo must not exceed hi"),
    (lambda: ea.pgd(steps=0), ValueError, "pgd: steps must be >= 1, got 0"),
    (lambda: ea.pgd(steps=2.5), TypeError, "pgd: steps must be an int, got float"),
    (lambda: ea.pgd(random_start=False, restarts=2), ValueError, "pgd: start must be random where restarts > 1"),
    (lambda: ea.fgsm(loss=None), ValueError, "fgsm: loss None is a random start alone, got start None"),
    (lambda: ea.fast_grad_l2(start="rademacher"), ValueError, "start must be None or 'uniform' in the L2 ball"),
    (lambda: ea.fgsm(direction="down"), ValueError, "direction must be one of sign, l2, max, got 'down'"),
    (lambda: ea.ifgsm(nesterov=True), ValueError, "momentum must be a number where nesterov looks ahead along it"),
    (lambda: ea.nifgsm(nesterov=1), TypeError, "nifgsm: nesterov must be a bool, got int"),
    (lambda: ea.mifgsm(decay=math.inf), ValueError, "mifgsm: momentum must be finite, got inf"),
    (lambda: ea.pgd(variance=2.5), TypeError, r"variance must be vt\(...\) or an int, got float"),
    (lambda: ea.pgd(transforms=ea.di()), TypeError, "transforms must be a sequence, got InputDiversity"),
    (lambda: ea.pgd(transforms=["di"]), TypeError, r"transforms must be di\(...\), si\(...\) or ti\(...\) each, got"),
    (lambda: ea.vt(0), ValueError, "vt: n must be >= 1, got 0"),
    (lambda: ea.vt(2, beta=-1.0), ValueError, "vt: beta must be >= 0, got -1.0"),
    (lambda: ea.si(1.5), TypeError, "si: m must be an int, got float"),
    (lambda: ea.ti(size=4), ValueError, "ti: size must be odd, got 4"),
    (lambda: ea.ti("box"), ValueError, "kernel must be one of gaussian, uniform, linear, got 'box'"),
    (lambda: ea.ti(nsig=0.0), ValueError, "ti: nsig must be > 0, got 0.0"),
    (lambda: ea.di(rate=0.0), ValueError, "di: rate must be > 0, got 0.0"),
    (lambda: ea.di(prob=1.5), ValueError, r"di: prob must lie in \[0, 1\], got 1.5"),
    (lambda: ea.di(mode="cubic"), ValueError, "mode must be one of bilinear, nearest, got 'cubic'"),
    (lambda: ea.di(per_sample=1), TypeError, "per_sample must be a bool, got int"),
    (lambda: ea.difgsm()(NET, X[:, 0], Y), ValueError, r"difgsm: di needs images \[N, C, H, W\], got shape \(4, 8"),
    (lambda: ea.tifgsm()(NET, X.flatten(1), Y), ValueError, r"tifgsm: ti needs images \[N, C, H, W\]"),
    (lambda: ea.difgsm(rate=0.1)(NET, X, Y), ValueError, r"di with rate 0.1 leaves nothing of images \(8, 8\)"),
    (lambda: ea.cw_linf(loss="ce"), ValueError, "cw_linf: loss must be one of cw, got 'ce'"),
    (lambda: ea.cw_linf(max_iterations=0), ValueError, "max_iterations must be >= 1, got 0"),
    (lambda: ea.cw_linf(check_every=1.5), TypeError, "check_every must be an int, got float"),
    (lambda: ea.cw_linf(const_factor=1.0), ValueError, "const_factor must be > 1, got 1.0"),
    (lambda: ea.cw_linf(largest_const=1e-3), ValueError, "largest_const must be > initial_const = 0.001, got"),
    (lambda: ea.cw_linf(abort_early=1), TypeError, "abort_early must be a bool, got int"),
    (lambda: ea.fgsm()("net", X, Y), TypeError, "source must be a Source or a torch.nn.Module, got str"),
    (lambda: ea.fgsm()(NET, X.int(), Y), TypeError, "x must be float32.*got int32"),
    (lambda: ea.fgsm()(NET, X, Y.float()), TypeError, "y must be int64, .*got float32"),
    (lambda: ea.fgsm()(NET, X, Y[:2]), ValueError, r"y must have shape \[N\] = \[4\], got \(2,\)"),
    (lambda: ea.fgsm()(NET, X, Y + 10), ValueError, r"y must lie in \[0, 10\), the model's classes, got"),
    (lambda: ea.fgsm()(NET, X, Y - 10), ValueError, r"y must lie in \[0, 10\)"),
    (lambda: ea.fgsm()(NET, X.to("meta"), Y), ValueError, "x must be on the model's device cpu, got meta"),
    (lambda: ea.fgsm()(NET, X, Y, eps=-1.0), ValueError, "eps must be >= 0, got -1.0"),
    (lambda: ea.fgsm()(NET, X, Y, eps=torch.tensor([1.0, math.nan, 0, 0])), ValueError, "got nan for sample 1"),
    (lambda: ea.fgsm()(NET, X, Y, eps=torch.ones(3)), ValueError, r"shape \[N\] = \[4\], got \(3,\)"),
    (lambda: ea.fgsm(targeted=True)(NET, X), ValueError, "y must be the labels to reach, since targeted is True"),
    (lambda: ea.fgsm()(NET, X, Y, out=X.double()), TypeError, "out must be float32, got float64"),
    (lambda: ea.pgd()(NET, X, Y, key=3), TypeError, "key must be a torch.Tensor, got int"),
    (lambda: ea.pgd()(NET, X, Y, index=torch.zeros(2, dtype=torch.int64)), ValueError, "index must have shape"),
    (lambda: ea.fgsm()(nn.Flatten(2), X, Y), ValueError, r"model must return logits \[N, C\].*got shape \(4, 3, 64\)"),
    (lambda: ea.fgsm(loss="dlr")(nn.Sequential(nn.Flatten(), nn.Linear(192, 2)), X, Y % 2), ValueError,
     "sample_losses: logits must have at least 3 classes for loss dlr, got 2"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:45] for _, _, m in BAD])
def test_bad_input(call, error, message):
    before = copy.deepcopy((NET.state_dict(), X, Y))
    with pytest.raises(error, match=message):
        call()
    assert same(list(before), [NET.state_dict(), X, Y])


@pytest.mark.gpu
def test_a_label_out_of_range_on_the_gpu_spoils_only_its_sample():
    net, (x, y) = small_net().cuda(), batch(n=4)
    x, y = x.cuda(), y.cuda()
    good = ea.fgsm(EPS)(net, x, y)
    y[1] = 99
    info = ea.fgsm(EPS)(net, x, y, return_info=True)
    assert info.loss[1].isnan() and torch.equal(info.x_adv[1], x[1])
    assert torch.equal(info.x_adv[[0, 2, 3]], good[[0, 2, 3]])


@pytest.mark.gpu
@every_attack
def test_nothing_waits_for_the_gpu(attack):
    if not attack.capturable:
        pytest.skip("it says when it waits")
    net, (x, y) = small_net().cuda(), batch(n=4)
    x, y, eps, where = x.cuda(), y.cuda(), torch.full((4,), EPS, device="cuda"), ea.fresh_key("cuda", seed=1)
    wanted = attack(net, x, y, key=where, eps=eps)
    torch.cuda.set_sync_debug_mode("error")
    try:
        again = attack(net, x, y, key=where, eps=eps)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert (again - wanted).abs().gt(1e-5).double().mean() < 1e-2
    alone = attack(net.cpu(), x.cpu(), y.cpu(), key=where.cpu(), eps=eps.cpu())
    assert (again.cpu() - alone).abs().gt(1e-4).double().mean() < 0.05


@pytest.mark.parametrize("attack", [ea.pgd(EPS, steps=2, restarts=2), ea.vnifgsm(EPS, steps=2, variance=2),
                                    ea.cw_linf(EPS, max_iterations=3), ea.random_sign(EPS)], ids=lambda a: a.name)
def test_a_call_leaves_nothing_to_the_garbage_collector(attack):
    """Memory of a batch is free when the call ends: nothing of it is in a cycle of references."""
    net, (x, y) = small_net(), batch()
    source = ea.Source(net, dtype=torch.float32)
    attack(source, x, y, return_info=True)
    gc.collect()
    gc.disable()
    try:
        attack(source, x, y, return_info=True)
        gc.set_debug(gc.DEBUG_SAVEALL)
        gc.collect()
        left = [o for o in gc.garbage if isinstance(o, torch.Tensor) or "ensadv_fast" in type(o).__module__]
    finally:
        gc.set_debug(0)
        gc.garbage.clear()
        gc.enable()
    assert left == []
