"""Members of an ensemble that run as one stack: which do, and that the ensemble is what it was without."""
import copy
import gc

import pytest
import torch
import torch.nn.functional as F
from networks import batch, small_net
from torch import nn
from torch.nn.utils import parametrizations

import ensadv_fast as ea
from ensadv_fast import data, models
from ensadv_fast.ops.ensemble_linear import grad_reference, reference
from ensadv_fast.ops.losses import Objective
from ensadv_fast.sources import stacking

FUSES = ("logits", "probs", "loss")
every_dtype = pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16],
                                      ids=lambda d: str(d).removeprefix("torch."))


class Written(nn.Module):
    """An MLP as people write it down."""

    def __init__(self, hidden: int = 17):
        super().__init__()
        self.first, self.drop, self.last = nn.Linear(192, hidden), nn.Dropout(0.5), nn.Linear(hidden, 10)

    def forward(self, x):
        x = torch.flatten(x, 1)
        x = self.drop(F.relu(self.first(x)))
        return self.last(x)


def mlp(seed: int, hidden: int = 17, bias: bool = True) -> nn.Module:
    """With everything that a stack may hold, and a normalisation that folds."""
    torch.manual_seed(seed)
    net = nn.Sequential(nn.Flatten(), nn.Dropout(0.2), nn.Linear(192, hidden, bias=bias), nn.BatchNorm1d(hidden),
                        nn.ReLU(), nn.Identity(),
                        nn.Sequential(nn.Linear(hidden, 20, bias=bias), nn.ReLU(inplace=True)), nn.Linear(20, 10))
    with torch.no_grad():
        for _ in range(3):
            net(torch.rand(32, 3, 8, 8))
    return net


def sources(dtype=torch.float32, members: int = 3, **how) -> list[ea.Source]:
    return [ea.Source(mlp(seed), dtype=dtype, **how) for seed in range(members)]


def runs(ensemble: ea.Ensemble) -> list[tuple[int, ...]]:
    """Which members run as one stack, and which alone."""
    return [unit.index for unit in ensemble._units()]


@pytest.fixture
def in_turn(monkeypatch):
    """Makes ensembles whose members run one after the other."""
    def make(*args, **kw):
        with monkeypatch.context() as patch:
            patch.setattr(stacking, "find_chain", lambda model: None)
            made = ea.Ensemble(*args, **kw)
        assert all(len(index) == 1 for index in runs(made))
        return made
    return make


def true(passed) -> torch.Tensor:
    return passed.grad.double() / passed.scale.double().view(-1, 1, 1, 1)


@pytest.mark.parametrize("normalised", ["not", "alike", "each"])
@pytest.mark.parametrize("fuse", FUSES)
def test_a_stack_gives_what_its_members_give_in_turn(fuse, normalised, in_turn):
    (x, y), mean, std = batch(), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    how = {"not": [{}] * 3, "alike": [{"mean": mean, "std": std}] * 3,
           "each": [{}, {"mean": mean, "std": std}, {"mean": std, "std": mean}]}[normalised]
    members = [ea.Source(mlp(seed), dtype=torch.float32, **kw) for seed, kw in enumerate(how)]
    weights = [0.5, 0.2, 0.7]
    one = ea.Ensemble(copy.deepcopy(members), fuse=fuse, weights=weights)
    other = in_turn(members, fuse=fuse, weights=weights)
    assert runs(one) == [(0, 1, 2)]
    close = {"rtol": 1e-5, "atol": 1e-6}
    for rule in ("true", "least_likely"):
        a, b = (e.input_grad(x, y if rule == "true" else None, rule=rule) for e in (one, other))
        assert torch.equal(a.labels, b.labels) and torch.equal(a.scale, b.scale)
        torch.testing.assert_close(true(a), true(b), rtol=1e-4, atol=1e-6 * true(b).abs().max().item())
        torch.testing.assert_close(a.loss, b.loss, **close)
        torch.testing.assert_close(a.logits, b.logits, **close)
    torch.testing.assert_close(one.logits(x), other.logits(x), **close)
    for a, b in zip(*(e.losses_unchecked(x, y, Objective()) for e in (one, other)), strict=True):
        torch.testing.assert_close(a, b, **close)


@pytest.mark.parametrize("shared", [True, False])
def test_in_float64_it_is_the_members_gradient(shared, in_turn, monkeypatch):
    """The op has no float64; its definition has, and with it the stack's arithmetic is exact to 1e-12."""
    monkeypatch.setattr(stacking, "DTYPES", (torch.float64,))
    monkeypatch.setattr(stacking, "ensemble_linear", reference)
    monkeypatch.setattr(stacking, "ensemble_linear_grad", grad_reference)
    (x, y), std = batch(), [(0.2, 0.3, 0.4), (0.2, 0.3, 0.4) if shared else (0.5, 0.6, 0.7)]
    members = [ea.Source(mlp(seed), dtype=torch.float64, std=std[seed]) for seed in range(2)]
    one, other = ea.Ensemble(copy.deepcopy(members)), in_turn(members)
    assert runs(one) == [(0, 1)]
    a, b = (e.input_grad(x.double(), y) for e in (one, other))
    torch.testing.assert_close(a.grad, b.grad, rtol=1e-12, atol=1e-12 * b.grad.abs().max().item())
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-12, atol=1e-12)


@pytest.fixture(scope="module")
def trained() -> list[nn.Module]:
    """Three of network D, trained a little on the embedded digits."""
    train = data.digits().train
    nets = []
    for seed in range(3):
        torch.manual_seed(seed)
        net = models.mnist_d().train()
        optimizer = torch.optim.Adam(net.parameters(), 2e-3)
        for _ in range(2):
            for index in torch.randperm(len(train)).split(100):
                x, y = train.batch(index)
                optimizer.zero_grad()
                F.cross_entropy(net(x), y).backward()
                optimizer.step()
        nets.append(net.eval())
    return nets


@every_dtype
@pytest.mark.parametrize("fuse", FUSES)
def test_it_is_as_strong(trained, dtype, fuse):
    """FGSM's loss increase on the mixture, beside that of exact members."""
    test = data.digits().test
    x, y = test.batch(torch.arange(0, len(test), 3))
    stack = ea.Ensemble([ea.Source(net, dtype=dtype) for net in trained], fuse=fuse)
    exact = ea.Ensemble([ea.Source(net, dtype=torch.float32, fold=False, channels_last=False) for net in trained],
                        fuse=fuse)
    assert runs(stack) == [(0, 1, 2)] and runs(exact) == [(0,), (1,), (2,)]

    def loss(images):
        return exact.losses_unchecked(images, y, Objective())[0].double().mean().item()

    with exact.session(), torch.no_grad():
        clean, wanted, got = loss(x), loss(ea.fgsm(0.1)(exact, x, y)), loss(ea.fgsm(0.1)(stack, x, y))
    assert wanted > clean + 0.5 and (got - clean) / (wanted - clean) >= 0.97


@every_dtype
def test_its_forward_keeps_bits(dtype):
    (x, _), ensemble = batch(), ea.Ensemble(sources(dtype))
    unit, = ensemble._units()
    leaf, kept = x.clone().requires_grad_(), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t), ensemble.session():
        logits = unit.run.logits_unchecked(leaf)
    assert logits.shape == (3, 16, 10) and logits.dtype == dtype
    masks = [t for t in kept if t.dtype == torch.uint8]
    assert [m.shape for m in masks] == [(3, 16, 3), (3, 16, 3)]
    assert all(t.numel() <= 3 for t in kept if t.dtype != torch.uint8)  # std, where the entrance keeps it


def test_weights_are_kept_once():
    """The members' weights are views of the stack; another ensemble of the same members uses the same memory."""
    members, (x, y) = sources(), batch()
    alone = [s.input_grad(x, y).grad for s in members]
    ensemble = ea.Ensemble(members)
    unit, = ensemble._units()
    for i, layer in enumerate(unit.run.layers):
        for k, source in enumerate(members):
            linear = [m for m in source.module.modules() if isinstance(m, nn.Linear)][i]
            assert linear.weight.data_ptr() == layer.weight[k].data_ptr() and not linear.weight.requires_grad
            assert linear.bias.data_ptr() == layer.bias[k].data_ptr()
    for source, wanted in zip(members, alone):
        assert torch.equal(source.input_grad(x, y).grad, wanted)
    again, = ea.Ensemble(members, fuse="loss")._units()
    assert [layer.weight.data_ptr() for layer in again.run.layers] == [
        layer.weight.data_ptr() for layer in unit.run.layers]
    reversed_order, = ea.Ensemble(members[::-1])._units()
    assert torch.equal(reversed_order.run.layers[0].weight[0], unit.run.layers[0].weight[2])
    gc.collect()
    assert torch.equal(ensemble.input_grad(x, y).grad, ea.Ensemble(sources()).input_grad(x, y).grad)


def test_members_without_a_bias(in_turn):
    (x, y) = batch()
    members = [ea.Source(nn.Sequential(nn.Flatten(), nn.Linear(192, 12, bias=False), nn.ReLU(),
                                       nn.Linear(12, 10, bias=False)), dtype=torch.float32) for _ in range(2)]
    one, other = ea.Ensemble(copy.deepcopy(members)), in_turn(members)
    assert runs(one) == [(0, 1)]
    torch.testing.assert_close(true(one.input_grad(x, y)), true(other.input_grad(x, y)), rtol=1e-4, atol=1e-6)


def test_members_that_are_not_alike_run_as_before(in_turn):
    nets = [mlp(0), small_net(), mlp(1), mlp(2, hidden=18), mlp(3), mlp(4, hidden=18)]
    dtypes = [torch.float32, torch.float32, torch.float32, torch.float32, torch.bfloat16, torch.float32]
    members, (x, y) = [ea.Source(n, dtype=d) for n, d in zip(nets, dtypes)], batch()
    one, other = ea.Ensemble(copy.deepcopy(members), fuse="loss"), in_turn(members, fuse="loss")
    assert runs(one) == [(0, 2), (1,), (3, 5), (4,)]
    a, b = one.input_grad(x, y), other.input_grad(x, y)
    torch.testing.assert_close(true(a), true(b), rtol=1e-4, atol=1e-5 * true(b).abs().max().item())
    torch.testing.assert_close(a.logits, b.logits, rtol=1e-5, atol=1e-6)


def changed(change) -> nn.Module:
    net = mlp(1)
    return change(net) or net


class Counting(Written):
    def forward(self, x):
        self.passes = getattr(self, "passes", 0) + 1
        return super().forward(x)


class Noisy(Written):
    def forward(self, x):
        return self.last(F.relu(self.first(torch.flatten(x, 1)))) + torch.rand(())


class Reused(Written):
    def forward(self, x):
        x = F.relu(self.first(torch.flatten(x, 1)))
        return self.last(x + x)


class Linear(nn.Linear):
    pass


def own_forward(net):
    net[2].forward = lambda x: F.linear(x, net[2].weight)


OTHERS = {
    "a hook": lambda: changed(lambda n: n[4].register_forward_hook(lambda *a: None) and None),
    "a hook on the whole": lambda: changed(lambda n: n.register_forward_pre_hook(lambda *a: None) and None),
    "a forward of its own": lambda: changed(own_forward),
    "another activation": lambda: changed(lambda n: n.__setitem__(4, nn.Tanh())),
    "a parametrization": lambda: changed(lambda n: parametrizations.weight_norm(n[2]) and None),
    "a flattening from the start": lambda: changed(lambda n: n.__setitem__(0, nn.Flatten(2))),
    "a rectified image": lambda: nn.Sequential(nn.Flatten(), nn.ReLU(), nn.Linear(192, 10)),
    "no linear layer": lambda: nn.Flatten(),
    "a normalisation of the images": lambda: nn.Sequential(nn.Flatten(), nn.BatchNorm1d(192), nn.Linear(192, 10)),
    "a subclass of linear": lambda: nn.Sequential(nn.Flatten(), Linear(192, 10)),
    "state in the forward": Counting, "randomness in the forward": Noisy, "another value's use": Reused,
    "a convolution": small_net,
}


@pytest.mark.parametrize("why", OTHERS)
@pytest.mark.filterwarnings("ignore:Source. fold leaves")
def test_what_is_not_for_sure_an_mlp_is_not_stacked(why):
    source = ea.Source(OTHERS[why](), dtype=torch.float32)
    assert stacking.find_chain(source.module) is None
    assert runs(ea.Ensemble([source, source])) == [(0,), (1,)]


def test_an_mlp_of_ones_own_class_is_stacked(in_turn):
    torch.manual_seed(0)
    members, (x, y) = [ea.Source(Written(), dtype=torch.float32) for _ in range(2)], batch()
    one, other = ea.Ensemble(copy.deepcopy(members)), in_turn(members)
    assert runs(one) == [(0, 1)]
    torch.testing.assert_close(true(one.input_grad(x, y)), true(other.input_grad(x, y)), rtol=1e-4, atol=1e-6)


HOWS = {"exact": {"fold": False, "channels_last": False}, "train": {"crafting": "train"}, "live": {"live": True},
        "own dtype": {"dtype": None}, "float64": {"dtype": torch.float64}}


@pytest.mark.parametrize("how", HOWS)
def test_sources_that_promise_something_else_are_not_stacked(how):
    kw = {**({} if how == "live" else {"dtype": torch.float32}), **HOWS[how]}
    assert runs(ea.Ensemble([ea.Source(mlp(seed), **kw) for seed in range(2)])) == [(0,), (1,)]


def test_one_at_a_time_is_one_at_a_time():
    members, (x, y) = sources(), batch()
    one, other = ea.Ensemble(members, sequential=True), ea.Ensemble(members)
    assert runs(one) == [(0,), (1,), (2,)] and runs(other) == [(0, 1, 2)]
    torch.testing.assert_close(true(one.input_grad(x, y)), true(other.input_grad(x, y)), rtol=1e-4, atol=1e-6)


def test_a_member_that_calibrate_switches_leaves_the_stack(trained, monkeypatch):
    test = data.digits().test
    x, y = test.batch(torch.arange(100))
    members = [ea.Source(net, dtype=torch.bfloat16) for net in trained]
    ensemble = ea.Ensemble(members)
    assert runs(ensemble) == [(0, 1, 2)]
    monkeypatch.setattr("ensadv_fast.sources.source.ENOUGH", 2.0)  # more than any agreement
    members[1].calibrate(x, y)
    assert members[1].dtype == torch.float32 and runs(ensemble) == [(0, 2), (1,)]
    wanted = ea.Ensemble([ea.Source(net, dtype=d) for net, d in
                          zip(trained, (torch.bfloat16, torch.float32, torch.bfloat16))]).input_grad(x, y)
    got = ensemble.input_grad(x, y)
    assert torch.equal(got.grad, wanted.grad) and torch.equal(got.logits, wanted.logits)
    for k in (0, 2):
        members[k].calibrate(x, y)
    assert runs(ensemble) == [(0, 1, 2)]
    assert torch.equal(ensemble.input_grad(x, y).grad,
                       ea.Ensemble([ea.Source(net, dtype=torch.float32) for net in trained]).input_grad(x, y).grad)


def test_modes_of_torch_around_it():
    members, (x, y) = sources(), batch()
    ensemble = ea.Ensemble(members)
    wanted = ensemble.input_grad(x, y).grad
    others = sources()
    with torch.inference_mode():
        made = ea.Ensemble(others)
        assert torch.equal(made.input_grad(x.clone(), y.clone()).grad, wanted)
    assert torch.equal(made.input_grad(x, y).grad, wanted)
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(ensemble.input_grad(x, y).grad, wanted)
    leaf = x.clone().requires_grad_()
    grad, = torch.autograd.grad(ensemble.logits(leaf).sum(), leaf)
    assert grad.shape == x.shape
    with pytest.raises(RuntimeError, match="fold=False"):
        torch.autograd.grad(ensemble.logits(leaf).sum(), leaf, create_graph=True)


def test_images_that_do_not_fit_are_the_members_to_refuse():
    flat = [ea.Source(nn.Sequential(nn.Linear(6, 10), nn.ReLU(), nn.Linear(10, 10)), dtype=torch.float32)
            for _ in range(2)]
    ensemble = ea.Ensemble(flat)
    assert runs(ensemble) == [(0, 1)] and ensemble.logits(torch.rand(4, 6)).shape == (4, 10)
    with pytest.raises(ValueError, match=r"logits \[N, C\]"):
        ensemble.logits(torch.rand(4, 2, 6))
    with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
        ensemble.logits(torch.rand(4, 7))
    with pytest.raises(ValueError, match=r"y must lie in \[0, 10\)"):
        ensemble.input_grad(torch.rand(4, 6), torch.full((4,), 10))


@pytest.mark.gpu
@every_dtype
def test_on_cuda(dtype):
    x, y = (t.cuda() for t in batch())
    ensemble = ea.Ensemble([ea.Source(mlp(seed).cuda(), dtype=dtype) for seed in range(3)])
    assert runs(ensemble) == [(0, 1, 2)]
    on_cpu = ea.Ensemble(sources(dtype)).input_grad(x.cpu(), y.cpu())
    got = true(ensemble.input_grad(x, y)).cpu()
    least = 0.9999 if dtype == torch.float32 else 0.99
    assert F.cosine_similarity(got.flatten(1), true(on_cpu).flatten(1)).min() > least


def test_a_model_may_be_one_layer():
    torch.manual_seed(0)
    nets, x = [nn.Linear(6, 10) for _ in range(2)], torch.rand(4, 6)
    ensemble = ea.Ensemble([ea.Source(n, dtype=torch.float32) for n in nets])
    assert runs(ensemble) == [(0, 1)]
    torch.testing.assert_close(ensemble.logits(x), (nets[0](x) + nets[1](x)) / 2)
