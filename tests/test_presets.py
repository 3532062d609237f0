"""train/runs.py: whole runs by name, what they hold, and what overrides them."""
from dataclasses import asdict, replace
from pathlib import Path

import pytest
import torch
from torch import nn

from ensadv_fast import cli, models, train
from ensadv_fast.train import runs
from ensadv_fast.train.config import Config
from ensadv_fast.train.job import make_source
from ensadv_fast.train.runs import RUNS, make_config

IMAGENET = [name for name in RUNS if name.startswith("imagenet")]
SMALL = [name for name in RUNS if name not in IMAGENET]


def test_the_runs_are_those_of_the_papers():
    for name in ("imagenet-eat-ens3", "imagenet-eat-ens4"):
        c = RUNS[name]
        (recipe,) = c.recipes().values()
        assert (c.batch_size, c.epochs, recipe.attack, recipe.lam, recipe.fraction, recipe.eps_dist, recipe.select) == (
            800, 280, "step_ll", 0.3, 0.5, "truncated_normal", "uniform")
        assert len(c.static) == int(name[-1]) - 1 and recipe.static and recipe.start(450_000) == 0
    c = RUNS["imagenet-kurakin"]
    (recipe,) = c.recipes().values()
    assert (c.batch_size, c.epochs, c.static, recipe.lam, recipe.fraction, recipe.eps_dist, recipe.start(150_000)) == (
        1600, 187, (), 0.3, 0.5, "truncated_normal", 10_000)
    for name in ("imagenet-eat-ens3", "imagenet-eat-ens4", "imagenet-kurakin"):
        c = RUNS[name]
        assert (c.optimizer, c.lr, c.schedule, c.label_smoothing, c.aux, c.size, c.eps) == (
            "rmsprop", 0.045, "decay", 0.1, 0.4, 299, 16 / 255)
        assert c.batch_size * 50 and models.parse(c.model)[1] == "inception_v3+aux"
    c = RUNS["imagenet-resnet50-eat"]
    assert (c.optimizer, c.schedule, c.dtype, c.channels_last, c.size, c.model) == (
        "sgd", "cosine", "bfloat16", True, 224, "timm:resnet50")
    assert RUNS["mnist-eat"].recipes().keys() == {"tramer"} and RUNS["mnist-eat"].held_out == ("mnist:B",)


@pytest.mark.parametrize("name", RUNS)
def test_a_run_by_its_name_is_that_config(name):
    config = make_config(preset=name, source_epochs=3)
    assert config == replace(RUNS[name], source_epochs=3)
    assert config.preset in train.PRESETS  # the name of its recipe: the config says all that is done


def test_options_override_a_runs():
    config = make_config(preset="imagenet-eat-ens3", eps=16 / 256, static=("timm:a=a.pt",), lam=1.0, download=True)
    assert config == replace(RUNS["imagenet-eat-ens3"], eps=0.0625, static=("timm:a=a.pt",), lam=1.0, download=True)
    assert make_config(preset="tramer", epochs=3) == Config(preset="tramer", epochs=3)
    assert make_config() == Config()
    with pytest.raises(ValueError, match="preset must be main or one or more of .*, got 'cifar10-eat'"):
        make_config(preset="cifar10-eat,plain")
    with pytest.raises(ValueError, match=r"train\.make_config"):
        Config(preset="cifar10-eat")


@pytest.mark.parametrize("name, missing", [
    ("imagenet-eat-ens3", "timm:inception_v3.tf_in1k, timm:resnetv2_50.a1h_in1k"),
    ("imagenet-resnet50-eat", "timm:resnet18, timm:resnet34")])
def test_no_source_is_trained_unasked(name, missing, tmp_path, monkeypatch):
    with pytest.raises(ValueError, match=f"no weights for {missing}, .*=FILE.*--download.*--source-epochs N"):
        make_config(preset=name)
    assert make_config(preset=name, download=True).download
    first = missing.split(", ")[0]
    with pytest.raises(ValueError, match=r"no weights for mnist:D, .*--static timm:x=x.pt mnist:D=FILE;"):
        make_config(preset=name, static=("timm:x=x.pt", "mnist:D"), download=True)
    assert make_config(preset=name, static=(f"{first}=a.pt",)).static == (f"{first}=a.pt",)
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--preset", name]) == 1 and not any(tmp_path.iterdir())  # before anything is written


def test_a_run_from_the_command_line(tmp_path, folder, monkeypatch):
    """Its folder holds every option; the same command goes on with it."""
    ran = []
    monkeypatch.setattr(train, "run", lambda config, folder, **_: ran.append(config) or train.open_folder(
        config, folder, resume=True))
    words = ["train", "--preset", "mnist-eat", "--data", f"mnist:{folder}", "--eps", "16/256", "--no-compile", "--out",
             str(tmp_path / "run")]
    assert cli.main(words) == 0 and cli.main([*words, "--resume"]) == 0
    wanted = replace(RUNS["mnist-eat"], data=f"mnist:{folder}", eps=0.0625)
    assert ran == [wanted, wanted] == [train.load_config(tmp_path / "run")] * 2


def test_targets_start_from_given_weights(tmp_path, folder):
    net = models.build("mnist:D")
    torch.save(net.state_dict(), tmp_path / "d.pt")
    config = Config(data=f"mnist:{folder}", model="mnist:D", preset="plain", static=(), held_out=("mnist:D",),
                    init=str(tmp_path / "d.pt"), lr=1e-12, epochs=1, source_epochs=1, seeds=1, workers=1, device="cpu",
                    eval_steps=1)
    train.run(config, tmp_path / "run", progress=False, say=lambda text: None)
    trained, source = (torch.load(tmp_path / "run" / "models" / f"{name}.pt", weights_only=True)["model"]["1.weight"]
                       for name in ("D-seed0", "source-D"))
    torch.testing.assert_close(trained, net[1].weight.detach(), atol=1e-9, rtol=0)
    assert not torch.allclose(source, net[1].weight.detach())  # sources are other networks
    with pytest.raises(ValueError, match="must be without weights .* --init d.pt"):
        Config(model="mnist:D=d.pt")


def test_the_average_is_what_is_evaluated(tmp_path, folder):
    config = Config(data=f"mnist:{folder}", model="mnist:D", preset="plain", static=(), held_out=(), ema=0.9,
                    epochs=2, seeds=1, workers=1, device="cpu", eval_steps=1, batch_size=16)
    results = train.run(config, tmp_path, progress=False, say=lambda text: None)
    from ensadv_fast import data
    path, test = tmp_path / "models" / "D-seed0.pt", data.load(config.data).test
    x, y = test.batch(torch.arange(len(test)))
    average = models.build(f"mnist:D={path}").eval()
    wanted = (average(x).argmax(1) != y).float().mean().item()
    assert results["models"]["D"]["clean"] == pytest.approx(wanted)
    own = models.build(f"mnist:D={path}#model").state_dict()
    assert not torch.equal(own["1.weight"], average.state_dict()["1.weight"])


class WithAux(nn.Module):
    """Network D with an auxiliary head, as timm's Inception v3 has one in eval mode too."""

    def __init__(self):
        super().__init__()
        self.net, self.aux = models.build("mnist:D"), nn.Sequential(nn.Flatten(), nn.Linear(784, 10))

    def forward(self, x):
        return self.net(x), self.aux(x)


def test_a_network_with_auxiliary_logits_goes_through_a_whole_run(tmp_path, folder):
    config = Config(data=f"mnist:{folder}", model="test_presets:WithAux", preset="eat", static=("mnist:D",),
                    held_out=(), crafting_loss="training", label_smoothing=0.1, epochs=1, source_epochs=1, seeds=1,
                    workers=1, device="cpu", eval_steps=1, batch_size=16)
    results = train.run(config, tmp_path, progress=False, say=lambda text: None)
    assert 0 <= results["models"]["WithAux_eat"]["clean"] <= 1 and (tmp_path / "report.html").exists()


# ---------------------------------------------------------------------------------------- networks of libraries


def test_normalised_networks_are_sources_of_images(tmp_path):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(4 * 36, 5)).eval()
    model = models.Normalized(net, (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).eval()
    x = torch.rand(6, 3, 8, 8)
    mean, std = torch.tensor([0.5, 0.4, 0.3]).view(3, 1, 1), torch.tensor([0.2, 0.3, 0.4]).view(3, 1, 1)
    torch.testing.assert_close(model(x), net((x - mean) / std))
    assert model.state_dict().keys() == net.state_dict().keys()
    source = make_source(Config(source_dtype="float32"), model)
    assert source.mean is not None and type(source.module) is not models.Normalized  # its entrance does it
    torch.testing.assert_close(source.logits(x), model(x), rtol=1e-4, atol=1e-5)
    torch.save(model.state_dict(), tmp_path / "n.pt")
    again = models.Normalized(nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(),
                                            nn.Linear(4 * 36, 5)), (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)).eval()
    models.load_weights(again, tmp_path / "n.pt")
    assert torch.equal(again(x), model(x))


@pytest.mark.parametrize("name", ["resnet8", "convnet"])
def test_cifar_networks_by_name(name):
    assert models.build(f"cifar:{name}", 7, (1, 32, 32)).eval()(torch.rand(2, 1, 32, 32)).shape == (2, 7)
    with pytest.raises(ValueError, match="spec must be cifar: and one of resnet8"):
        models.build("cifar:vgg")


def test_timm_networks_take_images():
    timm = pytest.importorskip("timm")
    model = models.build("timm:resnet18", 10).eval()
    cfg = timm.create_model("resnet18").pretrained_cfg
    assert model.mean.flatten().tolist() == pytest.approx(cfg["mean"])
    assert model.std.flatten().tolist() == pytest.approx(cfg["std"])
    assert not isinstance(models.build("timm:resnet18", 10, (1, 28, 28)), models.Normalized)
    assert models.short_name("timm:inception_v3+aux") == "inception_v3"
    logits, aux = models.build("timm:inception_v3+aux", 7).train()(torch.rand(2, 3, 299, 299))
    assert logits.shape == aux.shape == (2, 7)
    with pytest.raises(ValueError, match="no network named"):
        models.build("timm:no_such_net.tf_in1k")


@pytest.mark.parametrize("name", IMAGENET)
def test_every_network_of_the_imagenet_runs_exists(name):
    timm = pytest.importorskip("timm")
    for spec in (RUNS[name].model, *RUNS[name].static):
        timm_name = models.parse(spec)[1].removesuffix(models.AUX)
        assert timm.is_model(timm_name)
        if "." in timm_name:
            assert timm_name in timm.list_pretrained()


@pytest.mark.parametrize("name", SMALL)
def test_every_network_of_the_small_runs_exists(name):
    for spec in (RUNS[name].model, *RUNS[name].static, *RUNS[name].held_out):
        models.build(spec)


def test_the_documents_list_every_run():
    text = (Path(__file__).parent.parent / "docs" / "training.md").read_text()
    assert [name for name in RUNS if f"| `{name}` |" not in text] == []
    assert not [k for k in ("static", "held_out") if not isinstance(asdict(RUNS["mnist-eat"])[k], tuple)]
    assert runs.with_run_defaults({"seed": 3}) == {"seed": 3}
