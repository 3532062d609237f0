"""models.py: the MNIST networks, networks by name, and files of weights."""
import pickle
import sys
import types

import pytest
import torch
from torch import nn

from ensadv_fast import models
from ensadv_fast.models import weights
from ensadv_fast.train import checkpoints

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


class Evil:
    def __reduce__(self):
        return eval, ("__import__('pathlib').Path('pwned').touch()",)


@pytest.mark.parametrize("hostile", [
    Evil(), {"model": Evil()}, {"ema": Evil()}, {"a": Evil()}, {Evil(): 1}, {1: torch.ones(2)}, {(1, 2): torch.ones(2)},
    {"model": {1: torch.ones(2)}}, {None: torch.ones(2)}, {"a": None}, {"a": [torch.ones(2)]}, {"a": torch.ones(2)}, {},
    None, 3, "text", torch.ones(3)])
def test_hostile_files_of_weights_run_no_code_and_are_named(tmp_path, monkeypatch, hostile):
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "hostile.pt"
    torch.save(hostile, path)
    with pytest.raises(ValueError, match=f"model: .*{path}"):
        models.build(f"mnist:D={path}")
    with pytest.raises(ValueError, match=f"checkpoint: {path} is corrupt or no checkpoint"):
        checkpoints.load(path)
    path.write_bytes(pickle.dumps(hostile))
    with pytest.raises(ValueError, match=f"model: {path} is corrupt"):
        models.build(f"mnist:D={path}")
    assert not (tmp_path / "pwned").exists()


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_weights_that_are_not_finite_are_refused(tmp_path, value):
    state = models.build("mnist:D").state_dict()
    name = next(iter(state))
    state[name].view(-1)[3] = value
    torch.save(state, path := tmp_path / "d.pt")
    with pytest.raises(ValueError, match=f"the weights in {path} must be finite, got NaN or infinity in {name}"):
        models.build(f"mnist:D={path}")


def test_infinite_masks_are_taken():
    class Masked(nn.Linear):
        def __init__(self):
            super().__init__(2, 2)
            self.register_buffer("mask", torch.full((2,), -torch.inf))

    weights.fit_weights(Masked(), Masked().state_dict(), "here")


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod.", "_orig_mod.module.", "net.",
                                    "backbone."])
def test_a_wrappers_prefix_is_dropped(tmp_path, prefix):
    model = models.build("mnist:D")
    torch.save({prefix + k: v for k, v in model.state_dict().items()}, path := tmp_path / "d.pt")
    again = models.build(f"mnist:D={path}").state_dict()
    assert all(torch.equal(v, again[k]) for k, v in model.state_dict().items())


def test_a_misfit_is_told_in_a_few_lines(tmp_path):
    torch.save({**models.build("mnist:A").state_dict(), "x": torch.ones(1)}, path := tmp_path / "a.pt")
    with pytest.raises(ValueError, match=f"the weights in {path} do not fit") as e:
        models.build(f"mnist:D={path}")
    assert len(str(e.value).splitlines()) <= 4 and max(map(len, str(e.value).splitlines()[1:])) < 200
    assert "missing: " in str(e.value) and "unknown to it: " in str(e.value)
    with pytest.raises(ValueError, match=r"1 have another shape: weight must be \[3, 2\], got \[4, 2\]$"):
        weights.fit_weights(nn.Linear(2, 3), {"weight": torch.ones(4, 2), "bias": torch.ones(3)}, "here")


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
