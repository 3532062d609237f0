"""Weights in oneDNN's order: PyTorch's own bits, made once, and PyTorch's own path wherever the ops are missing."""
import copy
import pickle

import pytest
import torch
from networks import batch
from torch import nn

import ensadv_fast as ea
from ensadv_fast.sources.frozen import packing
from ensadv_fast.sources.frozen.frozen_pass import FrozenPass
from ensadv_fast.sources.frozen.packing import Packs

LAYERS = {
    "3x3": dict(kernel_size=3, padding=1), "1x1": dict(kernel_size=1), "strided": dict(kernel_size=3, stride=2),
    "uneven": dict(kernel_size=(5, 1), stride=(2, 3), padding=(2, 0)), "no-bias": dict(kernel_size=3, bias=False),
    "dilated": dict(kernel_size=3, dilation=2, padding="same"), "padded": dict(kernel_size=2, stride=2, padding=1),
}


@pytest.fixture(autouse=True)
def needs_onednn():
    if not packing.works(torch.float32):
        pytest.skip("this PyTorch has no packed convolutions")


def layer(name: str, dtype=torch.float32) -> nn.Conv2d:
    torch.manual_seed(0)
    conv = nn.Conv2d(16, 24, **LAYERS[name]).requires_grad_(False)
    return conv.to(dtype, memory_format=torch.channels_last)


def images(n=16, size=(11, 14), dtype=torch.float32) -> torch.Tensor:
    return torch.randn(n, 16, *size, generator=torch.Generator().manual_seed(1)).to(dtype).contiguous(
        memory_format=torch.channels_last)


def passed(forward, x, packs):
    leaf = x.clone().requires_grad_()
    with FrozenPass(packs=packs):
        y = forward(leaf * 1)
    grad, = torch.autograd.grad(y, leaf, torch.randn(y.shape, generator=torch.Generator().manual_seed(2)).to(y))
    return y.detach(), grad


def same(got, wanted):
    assert all(torch.equal(a, b) and a.stride() == b.stride() for a, b in zip(got, wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", LAYERS)
def test_values_and_gradients_to_the_bit(name, dtype):
    if not packing.works(dtype):
        pytest.skip(f"no packed convolutions in {dtype} on this processor")
    conv, packs = layer(name, dtype), Packs()
    for x in (images(dtype=dtype), images(3, dtype=dtype), images(size=(20, 9), dtype=dtype)):
        same(passed(conv, x, packs), passed(conv, x, None))
    assert packs._made[id(conv.weight)][2] is not None


def test_they_are_made_once_and_anew_where_something_changed():
    conv, packs, x = layer("3x3"), Packs(), images()
    first = packs.of(x, conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1)
    assert packs.of(x * 2, conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1) is first
    conv.weight.mul_(2)
    assert packs.of(x, conv.weight, conv.bias, (1, 1), (1, 1), (1, 1), 1) is not first
    same(passed(conv, x, packs), passed(conv, x, None))
    conv.weight = nn.Parameter(-conv.weight, requires_grad=False)
    same(passed(conv, x, packs), passed(conv, x, None))
    assert len(packs._made) == 2


@pytest.mark.parametrize("why", ["contiguous", "grouped", "float64", "few channels", "computed", "empty"])
def test_what_is_left_to_pytorch(why):
    conv, x, packs = layer("3x3"), images(), Packs()
    if why == "contiguous":
        x = x.contiguous()
    if why == "grouped":
        conv = nn.Conv2d(16, 16, 3, groups=4).requires_grad_(False)
    if why == "float64":
        conv, x = conv.double(), x.double()
    if why == "few channels":
        conv, x = nn.Conv2d(3, 8, 3).requires_grad_(False), x[:, :3].contiguous(memory_format=torch.channels_last)
    if why == "empty":
        x = x[:0]
    forward = (lambda h: torch.conv2d(h, conv.weight * 1, conv.bias)) if why == "computed" else conv
    same(passed(forward, x, packs), passed(forward, x, None))
    assert all(made[2] is None for made in packs._made.values())


@pytest.mark.parametrize("missing", ["op", "refusal"])
def test_without_the_private_ops_everything_is_as_ever(monkeypatch, missing):
    def refuse(*args):
        raise RuntimeError("not on this processor") if missing == "refusal" else AttributeError("no such op")

    conv, x, packs = layer("3x3"), images(), Packs()
    wanted = passed(conv, x, None)
    packing.works.cache_clear()
    monkeypatch.setattr(packing.Packed, "forward", refuse)
    try:
        assert not packing.works(torch.float32)
        same(passed(conv, x, packs), wanted)
        assert packs._made[id(conv.weight)][2] is None
    finally:
        packing.works.cache_clear()


def test_sources_use_them_and_can_be_copied():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.ReLU(), nn.Conv2d(16, 16, 3), nn.ReLU(),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(16, 10)).eval()
    source, (x, y) = ea.Source(net, dtype=torch.float32), batch(16, size=16)
    got = source.input_grad(x, y)
    assert [made[2] is not None for made in source._packs._made.values()] == [False, True]
    plain = ea.Source(net, dtype=torch.float32)
    plain._packs = None
    assert torch.equal(plain.input_grad(x, y).grad, got.grad)
    for other in (copy.deepcopy(source), pickle.loads(pickle.dumps(source))):
        assert not other._packs._made and torch.equal(other.input_grad(x, y).grad, got.grad)
