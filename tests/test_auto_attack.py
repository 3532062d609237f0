"""AutoAttack through whichever package carries it, end to end on a tiny network."""
import importlib.util
import warnings

import pytest
import torch
from networks import batch, small_net

import ensadv_fast as ea
from ensadv_fast.attacks import auto_attack as adapter

packages = pytest.mark.parametrize("package", [
    pytest.param(name, marks=pytest.mark.skipif(importlib.util.find_spec(name) is None,
                                                reason=f"{name} is not installed: AutoAttack is not run with it"))
    for name in adapter.PACKAGES])
EPS = 0.08  # where nothing is left to the slow parts


def setting(n=6):
    net = small_net().train()
    net(batch()[0]).sum().backward()
    x, _ = batch(n=n)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)
    return net.train(), x, y


def run(attack, *args, **kw):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the packages' own
        return attack(*args, **kw)


@packages
@pytest.mark.parametrize("norm, eps", [("linf", EPS), ("l2", 1.0)])
def test_end_to_end(package, norm, eps):
    net, x, y = setting()
    attack = ea.autoattack(eps, norm=norm, package=package, batch_size=4)
    before = [(p.requires_grad, p.grad.clone()) for p in net.parameters()]
    state, buffers = torch.get_rng_state(), [b.clone() for b in net.buffers()]
    info = run(attack, net, x, y, key=ea.fresh_key(seed=3), return_info=True)
    assert torch.equal(state, torch.get_rng_state()) and net.training and all(m.training for m in net.modules())
    assert all(p.requires_grad == r and torch.equal(p.grad, g) for p, (r, g) in zip(net.parameters(), before))
    assert all(map(torch.equal, net.buffers(), buffers))
    moved = (info.x_adv - x).flatten(1)
    assert (moved.abs().amax(1) if norm == "linf" else moved.norm(dim=1)).max() <= eps + 1e-6
    assert info.x_adv.min() >= 0 and info.x_adv.max() <= 1 and not info.x_adv.requires_grad
    assert info.success.all() and torch.equal(net.eval()(info.x_adv).argmax(1) != y, info.success)
    again = run(attack, net, x, y, key=ea.fresh_key(seed=3))
    assert torch.equal(again, info.x_adv)
    with torch.inference_mode():
        assert torch.equal(again, run(attack, net, x.clone(), y.clone(), key=ea.fresh_key(seed=3)))


@packages
def test_on_folded_sources_ensembles_and_narrow_images(package):
    net, x, y = setting(4)
    attack = ea.autoattack(EPS, package=package)
    folded = ea.Source(net, dtype=torch.float32)
    narrow = run(attack, folded, x.bfloat16(), y)
    assert narrow.dtype == torch.bfloat16 and (narrow.double() - x.bfloat16().double()).abs().max() <= torch.tensor(EPS)
    both = ea.Ensemble([folded, small_net(1)])
    info = run(attack, both, x, return_info=True)
    assert torch.equal(info.labels, both.logits(x).argmax(1)) and info.success.all()
    levels = (x * 255).round().to(torch.uint8)
    out = torch.empty_like(levels)
    assert run(attack, folded, levels, y, out=out) is out
    assert (out.int() - levels.int()).abs().max() <= int(255 * EPS)


def test_without_a_package(monkeypatch):
    net, x, y = setting(2)
    monkeypatch.setattr(adapter, "PACKAGES", ("no_such_package",))
    with pytest.raises(ImportError, match="autoattack: needs one of autoattack .*pip install pyautoattack"):
        ea.autoattack()(net, x, y)


BAD = [
    (lambda: ea.autoattack(norm="l7"), "norm must be one of linf, l2, got 'l7'"),
    (lambda: ea.autoattack(version="best"), "version must be one of standard, plus, rand, got 'best'"),
    (lambda: ea.autoattack(package="foolbox"), "package must be one of None, autoattack, pyautoattack, torchattacks"),
    (lambda: ea.autoattack(targeted=True), "targeted, loss, lo and hi must be AutoAttack's own, got targeted True"),
    (lambda: ea.autoattack(batch_size=0), "batch_size must be >= 1, got 0"),
    (lambda: ea.autoattack()(small_net(), *batch(2), eps=torch.ones(2)), "eps must be one number for the batch"),
    (lambda: ea.autoattack()(small_net(), batch(2)[0].flatten(1)), r"x must have shape \[N, C, H, W\]"),
]


@pytest.mark.parametrize("call, message", BAD, ids=[m[:30] for _, m in BAD])
def test_bad_input(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.mark.parametrize("classes", [2, 3])
def test_too_few_classes_are_refused(monkeypatch, classes):
    """The packages end in an IndexError there."""
    monkeypatch.setattr(adapter, "_package", lambda name: adapter)
    with pytest.raises(ValueError, match=f"source must have at least 4 classes.*got {classes}: take pgd"):
        ea.autoattack()(small_net(classes=classes), *batch(2, classes=classes))
