"""models.py: the MNIST networks, networks by name, and files of weights."""
import sys
import types

import pytest
import torch
from torch import nn

from ensadv_fast import models

# Weights and biases counted by hand from the released code (A to D) and the paper's table (C_tanh).
SIZES = {
    "A": 64 * 25 + 64 + 64 * 64 * 25 + 64 + 64 * 20 * 20 * 128 + 128 + 1290,
    "B": 64 * 64 + 64 + 64 * 128 * 36 + 128 + 128 * 128 * 25 + 128 + 1290,
    "C": 128 * 9 + 128 + 128 * 64 * 9 + 64 + 64 * 24 * 24 * 128 + 128 + 1290,
    "C_tanh": 128 * 9 + 128 + 128 * 64 * 9 + 64 + 64 * 5 * 5 * 128 + 128 + 1290,
    "D": 784 * 300 + 300 + 3 * (300 * 300 + 300) + 3010,
}


@pytest.mark.parametrize("name", SIZES)
def test_mnist_networks_have_the_published_sizes(name):
    model = models.build(f"mnist:{name}")
    assert sum(p.numel() for p in model.parameters()) == SIZES[name]
    assert model(torch.rand(2, 1, 28, 28)).shape == (2, 10)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("name", SIZES)
def test_mnist_networks_take_other_shapes_and_classes(name):
    assert models.build(f"mnist:{name}", 7, (3, 32, 32))(torch.rand(2, 3, 32, 32)).shape == (2, 7)


def test_dropout_is_where_the_released_code_has_it():
    def rates(name):
        return [m.p for m in models.build(f"mnist:{name}").modules() if isinstance(m, nn.Dropout)]

    assert rates("A") == [0.25, 0.5] and rates("C") == [0.25, 0.5]
    assert rates("B") == [0.2, 0.5] and isinstance(models.build("mnist:B")[0], nn.Dropout)
    assert rates("C_tanh") == [] and rates("D") == [0.5] * 4


def test_network_d_starts_he_normal():
    first = models.build("mnist:D")[1]
    assert first.weight.std().item() == pytest.approx((2 / 784) ** 0.5, rel=0.02)
    assert not first.bias.any()
    assert first.weight.abs().max() > 3 * first.weight.std()  # a normal has such tails, a uniform has none


def test_building_draws_only_the_initial_weights():
    torch.manual_seed(3)
    one = models.build("mnist:A").state_dict()
    torch.manual_seed(3)
    two = models.build("mnist:A").state_dict()
    assert all(torch.equal(one[k], two[k]) for k in one)


@pytest.mark.parametrize("wrapped", [lambda s: s, lambda s: {"model": s, "step": 3}, lambda s: {"state_dict": s},
                                     lambda s: {f"module.{k}": v for k, v in s.items()}])
def test_weights_load_from_the_usual_files(tmp_path, wrapped):
    model = models.build("mnist:D")
    torch.save(wrapped(model.state_dict()), tmp_path / "d=1.pt")
    again = models.build(f"mnist:D={tmp_path / 'd=1.pt'}")
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), again.state_dict().values(), strict=True))


def test_files_that_are_no_weights_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="nowhere.pt"):
        models.build(f"mnist:D={tmp_path / 'nowhere.pt'}")
    bad = tmp_path / "bad.pt"
    torch.save(models.build("mnist:D").state_dict(), bad)
    bad.write_bytes(bad.read_bytes()[:5000])
    with pytest.raises(ValueError, match="bad.pt is corrupt"):
        models.build(f"mnist:D={bad}")
    torch.save(models.build("mnist:C_tanh").state_dict(), bad)
    with pytest.raises(ValueError, match="bad.pt do not fit"):
        models.build(f"mnist:D={bad}")
    torch.save([1, 2], bad)
    with pytest.raises(ValueError, match="no state_dict"):
        models.build(f"mnist:D={bad}")


def test_weights_are_loaded_without_running_code(tmp_path):
    torch.save(nn.Linear(2, 2), tmp_path / "pickled_module.pt")
    with pytest.raises(ValueError, match="pickled_module.pt"):
        models.build(f"mnist:D={tmp_path / 'pickled_module.pt'}")


@pytest.mark.parametrize("spec", ["A", "mnist:", ":A", "mnist:A=", ""])
def test_malformed_names(spec):
    with pytest.raises(ValueError, match="spec must be mnist:NAME"):
        models.build(spec)


def test_unknown_names():
    with pytest.raises(ValueError, match="A, B, C, C_tanh, D, got 'mnist:E'"):
        models.build("mnist:E")
    with pytest.raises(ValueError, match="cannot be found"):
        models.build("no.such.module:net")
    with pytest.raises(TypeError, match="spec must be a string such as 'mnist:A', got NoneType"):
        models.build(None)


def test_a_callable_by_name(monkeypatch):
    module = types.ModuleType("somebodys_nets")
    module.net, module.no_net = lambda: nn.Linear(3, 2), lambda: "hello"
    monkeypatch.setitem(sys.modules, "somebodys_nets", module)
    assert isinstance(models.build("somebodys_nets:net"), nn.Linear)
    with pytest.raises(TypeError, match=r"somebodys_nets:no_net\(\) must return an nn.Module, got str"):
        models.build("somebodys_nets:no_net")


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_an_absent_library_is_named(monkeypatch, family):
    monkeypatch.setitem(sys.modules, family, None)
    with pytest.raises(ImportError, match=f"pip install {family}"):
        models.build(f"{family}:resnet18")


@pytest.mark.parametrize("family", ["timm", "torchvision"])
def test_library_networks_by_name(family):
    pytest.importorskip(family, exc_type=Exception)
    model = models.build(f"{family}:resnet18", num_classes=10).eval()
    assert model(torch.rand(1, 3, 64, 64)).shape == (1, 10)
    with pytest.raises(ValueError, match="no network named"):
        models.build(f"{family}:no_such_net")
