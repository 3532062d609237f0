"""calibrate: a trained network's fast gradients against exact ones on real images, and the switch to float32."""
import math

import pytest
import torch
import torch.nn.functional as F
from networks import small_net
from torch import nn

import ensadv_fast as ea
from ensadv_fast import data, models

EXACT = {"dtype": torch.float32, "fold": False, "channels_last": False}
NARROW = [torch.bfloat16, torch.float16]
EPS = 0.1


def conv_net() -> nn.Module:
    def block(i, o, stride):
        return [nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o), nn.ReLU()]

    return nn.Sequential(*block(1, 16, 2), *block(16, 32, 2), *block(32, 32, 1), nn.Flatten(), nn.Linear(32 * 49, 10))


def fit(net: nn.Module, seed: int, epochs: int) -> nn.Module:
    digits, g = data.digits().train, torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(net.train().parameters(), 2e-3)
    for _ in range(epochs):
        for index in torch.randperm(len(digits), generator=g).split(100):
            x, y = digits.batch(index)
            loss = F.cross_entropy(net(x), y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    return net.eval()


@pytest.fixture(scope="session")
def trained() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {"conv": fit(conv_net(), 0, 3), "other": fit(conv_net(), 1, 3), "D": fit(models.mnist_d(), 0, 3)}


@pytest.fixture(scope="session")
def images() -> tuple[torch.Tensor, torch.Tensor]:
    test = data.digits().test
    return test.batch(torch.arange(len(test)))


def error(net: nn.Module, x, y) -> float:
    with torch.no_grad():
        return (net(x).argmax(1) != y).double().mean().item()


@pytest.mark.parametrize("name", ["conv", "D"])
@pytest.mark.parametrize("dtype", ["auto", *NARROW])
def test_fast_sources_are_as_strong(trained, images, name, dtype):
    """FGSM's loss increase within 3 %, its error within half a percentage point, white-box and transferred."""
    net, (x, y) = trained[name], images
    assert error(net, x, y) < 0.1
    source = ea.Source(net, dtype=dtype)
    before = source.dtype
    found = source.calibrate(x, y, eps=EPS)
    assert source.dtype == before and found.loss_increase >= 0.97 and abs(found.error) <= 0.005
    assert 0.5 < found.signs <= 1 and found.signs - 0.05 < found.weighted_signs <= 1
    exact, fast = (ea.fgsm(EPS)(s, x, y) for s in (ea.Source(net, **EXACT), source))
    assert error(net, exact, y) > 0.5
    assert abs(error(trained["other"], fast, y) - error(trained["other"], exact, y)) <= 0.005


def test_the_figures_are_what_they_say(trained, images):
    net, (x, y) = trained["conv"], (images[0][::5], images[1][::5])
    source = ea.Source(net, dtype=torch.bfloat16)
    found = source.calibrate(x, y, eps=EPS)
    exact = ea.Source(net, **EXACT).input_grad(x, y, rescale=False).grad.double()
    equal = (source.input_grad(x, y).grad.sign() == exact.sign()).double()
    assert found.signs == pytest.approx(equal.mean().item(), abs=1e-6)
    assert found.weighted_signs == pytest.approx(((equal * exact.abs()).sum() / exact.abs().sum()).item(), rel=1e-4)
    x_fast, x_exact = (ea.fgsm(EPS)(s, x, y) for s in (source, ea.Source(net, **EXACT)))
    with torch.no_grad():
        clean, fast, true = (F.cross_entropy(net(v), y).item() for v in (x, x_fast, x_exact))
    assert found.loss_increase == pytest.approx((fast - clean) / (true - clean), rel=1e-3)
    assert found.error == pytest.approx(error(net, x_fast, y) - error(net, x_exact, y), abs=1e-9)


def test_an_exact_source_agrees_with_itself(trained, images):
    found = ea.Source(trained["conv"], **EXACT).calibrate(images[0][:100], images[1][:100], eps=EPS)
    assert found == ea.Agreement(1.0, 1.0, 1.0, 0.0)


def test_predictions_stand_in_for_labels(trained, images):
    x = images[0][:100]
    source = ea.Source(trained["conv"], dtype=torch.bfloat16)
    with torch.no_grad():
        y = trained["conv"](x).argmax(1)
    assert source.calibrate(x, eps=EPS) == source.calibrate(x, y, eps=EPS)


class Fragile(nn.Module):
    """What 16 bits cannot carry: a small difference between large numbers."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = net

    def forward(self, x):
        return self.net((x + 300) - 300)


@pytest.mark.parametrize("fold", [False, True])
def test_a_weak_dtype_is_switched_to_float32_from_the_weights_as_they_came(trained, images, fold):
    net, (x, y) = Fragile(trained["conv"]), (images[0][:200], images[1][:200])
    source = ea.Source(net, dtype=torch.bfloat16, fold=fold)
    exact = ea.Source(net, dtype=torch.float32, fold=fold, channels_last=source.channels_last)
    saved = {k: v.clone() for k, v in net.state_dict().items()}
    with torch.no_grad():
        for p in net.parameters():  # the caller's model changes later
            p.zero_()
    try:
        found = source.calibrate(x, y, eps=EPS)
    finally:
        net.load_state_dict(saved)
    assert found.loss_increase < 0.97 and source.dtype == torch.float32
    assert torch.equal(source.input_grad(x, y).grad, exact.input_grad(x, y).grad)
    assert source.calibrate(x, y, eps=EPS).loss_increase == pytest.approx(1, abs=1e-3)


@pytest.mark.filterwarnings("ignore:attack. the gradient of the loss by x is zero")  # it is so made
def test_nothing_to_compare_with_is_nan_and_switches_nothing(images):
    torch.manual_seed(0)
    flat = nn.Sequential(nn.Flatten(), nn.Linear(784, 10))
    nn.init.zeros_(flat[1].weight)
    source = ea.Source(flat, dtype=torch.bfloat16)
    with pytest.warns(UserWarning, match="gradient of the loss by x is zero for every pixel"):
        found = source.calibrate(*(t[:70] for t in images))
    assert math.isnan(found.loss_increase) and found[:2] == (1.0, 1.0) and source.dtype == torch.bfloat16


def test_normalisation_and_train_mode(trained, images):
    x, y = images[0][:70], images[1][:70]
    found = ea.Source(trained["conv"], dtype=torch.bfloat16, mean=[0.5], std=[0.5]).calibrate(x, y, eps=EPS)
    assert found.loss_increase > 0.9
    torch.manual_seed(0)
    dropout = ea.Source(trained["D"], dtype=torch.bfloat16, crafting="train")
    assert dropout.calibrate(x, y, eps=EPS).loss_increase > 0.9


def test_only_sources_that_need_it_keep_the_original():
    net = small_net()
    assert ea.Source(net, **EXACT)._original is None and ea.Source(net, live=True)._original is None
    kept = ea.Source(net)._original
    own = {t.data_ptr() for t in net.state_dict().values()}
    assert own.isdisjoint(t.data_ptr() for t in kept.state_dict().values())
    assert all(torch.equal(a, b) for a, b in zip(net.state_dict().values(), kept.state_dict().values()))


X = torch.rand(2, 3, 8, 8)
BAD = [
    (lambda: ea.Source(small_net(), live=True).calibrate(X), ValueError, "source must not be live"),
    (lambda: ea.Source(small_net()).calibrate(X[0]), ValueError, r"x must have shape \[N, C, H, W\], N >= 1, got"),
    (lambda: ea.Source(small_net()).calibrate(X[:0]), ValueError, "N >= 1"),
    (lambda: ea.Source(small_net()).calibrate([1]), TypeError, "calibrate: x must be a torch.Tensor, got list"),
    (lambda: ea.Source(small_net()).calibrate(X, torch.zeros(3).long()), ValueError,
     r"y must have shape \[N\] = \[2\]"),
    (lambda: ea.Source(small_net()).calibrate(X, eps=0), ValueError, "eps must be > 0, got 0"),
    (lambda: ea.Source(small_net()).calibrate(X, eps="a"), TypeError, "eps must be a number, got str"),
    (lambda: ea.Source(small_net(), fold=1), TypeError, "Source: fold must be a bool, got int"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
