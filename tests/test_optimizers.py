"""optimizers.py and rmsprop.py: TensorFlow's RMSProp by its definition, parameter groups, warm-up."""
import copy
import math

import pytest
import torch
from torch import nn

from ensadv_fast.train import optimizers
from ensadv_fast.train.config import Config
from ensadv_fast.train.rmsprop import RMSPropTF


def scalar_rmsprop(w, grads, rates, decay, momentum, eps, weight_decay):
    """One weight in Python's floats, as tf.train.RMSPropOptimizer is defined."""
    mean_square, gathered = 1.0, 0.0
    for g, lr in zip(grads, rates, strict=True):
        g += weight_decay * w
        mean_square += (1 - decay) * (g * g - mean_square)
        gathered = momentum * gathered + lr * g / math.sqrt(mean_square + eps)
        w -= gathered
    return w


@pytest.mark.parametrize("options", [{}, {"eps": 1e-3}, {"momentum": 0.0}, {"decay": 0.99, "weight_decay": 0.1}])
def test_rmsprop_is_the_definition(options, device):
    torch.manual_seed(0)
    shapes = [(3,), (2, 2), ()]
    weights = [torch.randn(s, dtype=torch.float64, device=device).requires_grad_() for s in shapes]
    start = [w.detach().flatten().tolist() for w in weights]
    grads = [[torch.randn(s, dtype=torch.float64) for s in shapes] for _ in range(7)]
    rates = [0.045 * 0.9**i for i in range(7)]
    optimizer = RMSPropTF(weights, 0.1, **options)
    for step, lr in zip(grads, rates, strict=True):
        for w, g in zip(weights, step, strict=True):
            w.grad = g.to(device)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    full = {"decay": 0.9, "momentum": 0.9, "eps": 1.0, "weight_decay": 0.0, **options}
    for i, w in enumerate(weights):
        wanted = [scalar_rmsprop(start[i][j], [step[i].flatten()[j].item() for step in grads], rates, **full)
                  for j in range(w.numel())]
        torch.testing.assert_close(w.detach().cpu().flatten(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-12,
                                   atol=1e-14)


def test_it_is_not_torchs_rmsprop():
    """eps = 1 outside or inside the root, and a mean square of 0 or 1 to start from, are other first steps."""
    w = torch.zeros(1, requires_grad=True)
    w.grad = torch.tensor([3.0])
    RMSPropTF([w], 1.0).step()
    assert w.item() == pytest.approx(-3 / math.sqrt(0.9 + 0.1 * 9 + 1), rel=1e-6)


def test_found_inf_leaves_everything_as_it_is():
    def made():
        torch.manual_seed(1)
        w = [torch.randn(4, requires_grad=True), torch.randn(2, 3, requires_grad=True)]
        return w, RMSPropTF(w, 0.1, weight_decay=0.01)

    (one, plain), (two, watched) = made(), made()
    for step in range(6):
        grads = [torch.randn(4), torch.randn(2, 3)]
        if step == 3:
            grads[0][2], grads[1][0, 0] = torch.nan, torch.inf
        for optimizer, weights in ((plain, one), (watched, two)):
            for w, g in zip(weights, grads, strict=True):
                w.grad = g.clone()
        watched.found_inf = torch.tensor(float(step == 3))
        watched.step()
        if step != 3:
            plain.step()
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def test_the_way_of_a_gpu_skips_a_step_without_looking():
    """What is done with found_inf on CUDA, on the CPU: equal up to the rounding of a scalar that is now a tensor."""
    from ensadv_fast.train import rmsprop
    torch.manual_seed(2)
    start = torch.randn(50)
    w, ms, mom = start.clone(), torch.ones(50), torch.zeros(50)
    again = [t.clone() for t in (w, ms, mom)]
    group = {"lr": 0.1, "decay": 0.9, "momentum": 0.9, "eps": 1.0, "weight_decay": 0.01}
    for step in range(5):
        g = torch.randn(50)
        bad = step in (0, 3)
        if not bad:
            rmsprop._update([w], [g], [ms], [mom], group, None)
        rmsprop._update([again[0]], [g / 0 if bad else g], [again[1]], [again[2]], group, torch.tensor(float(bad)))
        for a, b in zip((w, ms, mom), again, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
    assert not torch.equal(w, start)


def test_rmsprop_state_goes_on():
    torch.manual_seed(3)
    grads = torch.randn(6, 5)
    w = torch.zeros(5, requires_grad=True)
    optimizer = RMSPropTF([w], 0.1)
    for i, g in enumerate(grads):
        w.grad = g
        if i == 3:
            saved, at = copy.deepcopy(optimizer.state_dict()), w.detach().clone()
            v = at.requires_grad_()
            other = RMSPropTF([v], 0.7)
            other.load_state_dict(saved)
        if i >= 3:
            v.grad = g
            other.step()
        optimizer.step()
    assert torch.equal(v, w) and len(saved["state"]) == 1


@pytest.mark.parametrize("bad", [{"lr": -1.0}, {"decay": 1.0}, {"momentum": -0.1}, {"eps": -1e-3},
                                 {"weight_decay": float("nan")}])
def test_rmsprop_refuses(bad):
    (name,) = bad
    with pytest.raises(ValueError, match=f"RMSPropTF: {name} must be .*, got"):
        RMSPropTF([torch.zeros(1, requires_grad=True)], **bad)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
def test_weight_decay_can_spare_vectors(optimizer):
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Flatten(), nn.Linear(4, 2))
    made = optimizers.make_optimizer(Config(optimizer=optimizer, weight_decay=0.1, decay_all=False), net)
    decays = {p: g["weight_decay"] for g in made.param_groups for p in g["params"]}
    assert {n for n, p in net.named_parameters() if decays[p] == 0.1} == {"0.weight", "3.weight"}
    assert {n for n, p in net.named_parameters() if decays[p] == 0.0} == {
        "0.bias", "1.weight", "1.bias", "3.bias"}
    (group,) = optimizers.make_optimizer(Config(optimizer=optimizer, weight_decay=0.1), net).param_groups
    assert group["weight_decay"] == 0.1 and len(group["params"]) == 6


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adam", "sgd"])
def test_optimizers_are_fused_on_cuda(optimizer):
    made = optimizers.make_optimizer(Config(optimizer=optimizer), nn.Linear(2, 2).cuda())
    assert made.defaults["fused"]


@pytest.mark.parametrize("schedule", ["constant", "cosine", "cyclic", "decay"])
def test_warm_up(schedule):
    def rates(**options):
        config = Config(schedule=schedule, lr=2.0, epochs=10, **options)
        return [optimizers.learning_rate(config, s, 100, 10) for s in range(100)]

    warm = rates(warmup=2.5)
    assert warm[:25] == pytest.approx([2.0 * (i + 1) / 25 for i in range(25)])
    if schedule == "cosine":  # it runs over what is left
        assert warm[25] == 2.0 and warm[25 + 37] == pytest.approx(1 + math.cos(math.pi * 37 / 75))
    if schedule == "decay":
        assert warm[25:] == rates()[25:]
    if schedule == "constant":
        assert set(warm[24:]) == {2.0}
    with pytest.raises(ValueError, match=r"warmup must be < epochs \(10\), got 10"):
        Config(warmup=10, epochs=10)


def test_the_learning_rate_is_never_scaled():
    for options in ({"batch_size": 4096}, {"accumulate": 8}):
        assert optimizers.learning_rate(Config(lr=0.3, **options), 5, 100, 10) == 0.3
