"""The commands: options, exit codes, messages, and the commands from end to end on a little data."""
import json
import os
import subprocess
import sys

import numpy as np
import pytest
import torch
from html_reader import read

from ensadv_fast import Source, cli, data, diagnose, models, ops, train
from ensadv_fast.attacks import fgsm
from ensadv_fast.cli.options import DEFAULTS, GROUPS
from ensadv_fast.evaluate import TransferMatrix
from ensadv_fast.ops import keys
from ensadv_fast.report import examples as samples
from ensadv_fast.train import Config, checkpoints


@pytest.fixture
def asked(monkeypatch):
    """What the driver is asked to do, without doing it."""
    calls = []
    monkeypatch.setattr(train, "run", lambda config, folder, **kw: calls.append((config, folder, kw)))
    return calls


def test_no_arguments_means_the_main_job(asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train"]) == 0
    config, folder_, kw = asked[0]
    assert config == Config() and folder_.parent.name == "runs" and kw == {"resume": False}
    assert config.data == "digits" and list(config.recipes()) == ["plain", "fgsm-at", "tramer"] and config.eps == 0.3


def test_every_field_of_the_config_is_an_option(asked, tmp_path):
    assert cli.main(["train", "--out", str(tmp_path / "r"), "--preset", "kurakin", "--data", "cifar10:x", "--model",
                     "timm:resnet18", "--static", "mnist:A", "mnist:B=b.pt", "--held-out", "--eps", "8/255",
                     "--epochs", "3", "--lam", "0.5", "--eps-dist", "uniform", "--download", "--dtype", "bfloat16",
                     "--label-smoothing", "1e-1", "--no-download"]) == 0
    config, folder_, _ = asked[0]
    assert config == Config(preset="kurakin", data="cifar10:x", model="timm:resnet18",
                            static=("mnist:A", "mnist:B=b.pt"), held_out=(), eps=8 / 255, epochs=3, lam=0.5,
                            eps_dist="uniform", dtype="bfloat16", label_smoothing=0.1)
    assert folder_ == tmp_path / "r"


def test_resume_finds_its_folder(asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", "--resume"]) == 0 and asked[-1][2] == {"resume": False}  # there is none: a new run
    for age, name in ((2, "old"), (1, "new")):
        train.open_folder(Config(epochs=7), tmp_path / "runs" / name, False)
        path = tmp_path / "runs" / name / "config.json"
        os.utime(path, (path.stat().st_mtime - age,) * 2)
    (tmp_path / "runs" / "newer").mkdir()
    (tmp_path / "runs" / "newer" / "config.json").write_text("{}")  # an evaluation's, which has no models
    assert cli.main(["train", "--resume", "auto"]) == 0
    config, folder_, kw = asked[-1]
    assert folder_.name == "new" and kw == {"resume": True} and config.epochs == 7
    assert cli.main(["train", "--resume", "runs/old", "--threads", "1"]) == 0
    assert asked[-1][1].name == "old" and asked[-1][0].threads == 1
    assert cli.main(["train", "--resume", "runs/old/models/D-seed0.pt"]) == 0 and asked[-1][1].name == "old"


@pytest.mark.parametrize("argv, message", [
    (["train", "--epochs", "0"], "epochs must be an integer >= 1, got 0"),
    (["train", "--data", "mnist:/no/such/folder"], "/no/such/folder"),
    (["train", "--data", "imagenet"], "spec must be digits"),
    (["train", "--resume", "nowhere"], "no run in nowhere"),
    (["train", "--resume", "nowhere", "--out", "other"], "name two folders"),
    (["train", "--preset", "magic"], "(a whole run comes from train.make_config), got 'magic'"),
    (["evaluate", "--model", "mnist:D"], "mnist:D has no weights"),
    (["evaluate", "--model", "mnist:D=none.pt"], "none.pt"),
    (["diagnose", "--model", "mnist:D"], "mnist:D has no weights"),
    (["diagnose", "--model", "mnist:D=none.pt"], "none.pt"),
    (["diagnose", "--model", "mnist:D=none.pt", "--points", "1"], "diagnose: points must be >= 2, got 1"),
    (["diagnose", "--model", "mnist:D=none.pt", "--batch-size", "0"], "diagnose: batch_size must be >= 1, got 0"),
    (["evaluate", "--model", "mnist:D=none.pt", "--device", "gpu"], "auto, cpu, cuda or cuda:N, got 'gpu'"),
    (["evaluate", "--model", "mnist:D=none.pt", "--steps", "0"], "evaluate: steps must be >= 1, got 0"),
    (["diagnose", "--model", "mnist:D=none.pt", "--images", "0"], "diagnose: images must be >= 1, got 0"),
])
def test_errors_are_one_clear_line(capsys, monkeypatch, tmp_path, argv, message):
    monkeypatch.chdir(tmp_path)
    assert cli.main(argv) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").rglob("*.pt"))


@pytest.mark.parametrize("argv", [[], ["prove"], ["train", "--epoch", "3"], ["train", "--eps", "a/b"],
                                  ["train", "--eps", "1/0"], ["evaluate"], ["diagnose"],
                                  ["diagnose", "--model", "mnist:D=x.pt", "--eps", "much"]])
def test_wrong_usage(capsys, argv):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2 and "usage" in capsys.readouterr().err


def test_the_defaults_that_commands_share_are_the_configs():
    config = Config()
    assert DEFAULTS._asdict() == {name: getattr(config, name) for name in DEFAULTS._fields}


def loaded_by(module: str) -> set[str]:
    """The modules of the package that a fresh interpreter has after importing this one."""
    code = f"import sys, {module}; print(*(m for m in sys.modules if m.startswith('ensadv_fast')))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return {name.removeprefix("ensadv_fast").removeprefix(".") for name in done.stdout.split()}


def in_folders(modules: set[str], *folders: str) -> set[str]:
    return {m for m in modules if m.split(".")[0] in folders}


@pytest.mark.parametrize("module", ["cli.evaluate", "cli.diagnose", "evaluate", "diagnose"])
def test_what_looks_at_saved_models_loads_no_training(module):
    loaded = loaded_by(f"ensadv_fast.{module}")
    assert module in loaded and in_folders(loaded, "train", "bench") == set()


def test_the_package_itself_loads_little():
    """Neither training, reports, commands, benchmarks and drop-in backends nor networks and readers of data sets."""
    loaded = loaded_by("ensadv_fast")
    assert {"attacks.gradient", "evaluate.run", "adversary.adversary"} <= loaded
    assert in_folders(loaded, "train", "report", "cli", "bench", "compat", "models", "data") == set()


def test_a_command_loads_no_other():
    code = "import sys; from ensadv_fast import cli; cli.make_parser('info'); print(*sys.modules)"
    loaded = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.split()
    assert {m for m in loaded if m.startswith("ensadv_fast.cli.")} == {"ensadv_fast.cli.info"}
    assert not [m for m in loaded if m.startswith("ensadv_fast.train")]


def test_help_shows_each_option_with_its_default(capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(["train", "--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert e.value.code == 0
    assert "--held-out" in text and "(default: mnist:A)" in text and "(default: mnist:B mnist:D)" in text
    for option in ("--preset", "--data", "--model", "--static", "--epochs", "--batch-size", "--seed", "--out",
                   "--resume", "--device", "--dtype"):
        assert option in text


def saved_networks(path):
    """Two networks, "target" and "source", whose checkpoints are NAME.pt in that folder."""
    torch.manual_seed(0)
    nets = {name: models.build("mnist:D").eval() for name in ("target", "source")}
    for name, net in nets.items():
        torch.save(net.state_dict(), path / f"{name}.pt")
    return nets


def test_evaluate_measures_saved_networks(folder, tmp_path, capsys):  # noqa: F811
    nets = saved_networks(tmp_path)
    out = tmp_path / "errors.json"
    assert cli.main(["evaluate", "--data", f"mnist:{folder}", "--model", f"mnist:D={tmp_path / 'target.pt'}",
                     "--source", f"mnist:D={tmp_path / 'source.pt'}", "--attack", "fgsm", "rand_fgsm", "--device",
                     "cpu", "--eps", "0.1", "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "itself (white-box)" in said and "| source " in said
    errors = json.loads(out.read_text())["models"]["D"]
    test = data.load(f"mnist:{folder}").test
    x, y = test.batch(torch.arange(len(test)))
    wrong = (nets["target"](fgsm(0.1)(nets["target"], x, y)).argmax(1) != y).float().mean().item()
    assert errors["white_box"]["fgsm"] == pytest.approx(wrong)
    assert errors["clean"] == pytest.approx((nets["target"](x).argmax(1) != y).float().mean().item())
    assert set(errors["black_box"]["rand_fgsm"]) == {"source"}


def test_diagnose_measures_saved_networks(folder, tmp_path, capsys):  # noqa: F811
    nets = saved_networks(tmp_path)
    out = tmp_path / "diagnosis"
    argv = ["diagnose", "--data", f"mnist:{folder}", "--model", f"mnist:D={tmp_path / 'target.pt'}", "--source",
            f"mnist:D={tmp_path / 'source.pt'}", "--device", "cpu", "--eps", "1/10", "--images", "12", "--steps", "3",
            "--points", "3", "--seed", "4", "--out", str(out)]
    assert cli.main(argv) == 0
    said = capsys.readouterr().out
    results = json.loads((out / "results.json").read_text())
    assert json.loads((out / "config.json").read_text())["steps"] == 3
    assert results["command"] == "diagnose" and results["images"] == 12 and results["eps"] == 0.1
    assert results["sources"] == {"source": f"mnist:D={tmp_path / 'source.pt'}"}
    found = results["models"]["D"]
    assert found["masking"]["verdict"] in said and all(c["name"] in said for c in found["masking"]["checks"])

    test = data.load(f"mnist:{folder}").test
    index = torch.tensor(results["index"])
    assert len(set(results["index"])) == 12
    x, y = test.batch(index)
    key = ops.fresh_key("cpu", keys.derive_seed(4, "diagnose", "D"))
    norm = diagnose.gradient_norm(nets["target"], x, y)
    assert found["gradient_norm"]["mean_l2"] == pytest.approx(norm.mean_l2)
    cone = diagnose.cone_dimension(nets["target"], x, y, eps=0.1, orders=(1, 4, 16, 36, 64, 100), key=key, index=index)
    assert found["cone_dimension"]["dimension"] == cone.dimension.tolist()
    wide, near = found["surfaces"]
    surface = diagnose.loss_surface(nets["target"], x[:4], y[:4], eps=0.1, points=3, key=key, index=index[:4],
                                    other=Source(nets["source"]))
    assert torch.allclose(torch.tensor(wide["loss"]), surface.loss) and wide["other"] == "source"
    assert near["eps"] == 0.025 and near["along"] == pytest.approx([-0.025, 0, 0.025])

    assert found["examples"] == "examples/D.npz"
    shown = samples.load(out / found["examples"])
    assert shown.source == "D" and list(shown.pictures) == ["clean", "fgsm", "rand_fgsm", "pgd"]
    at = torch.stack([(test.labels == label).nonzero()[0, 0] for label in shown.labels.tolist()])
    clean = test.images[at, 0].numpy()
    for row, pictures in shown.pictures.items():
        moved = np.abs(pictures.astype(int) - clean).max()
        assert pictures.shape == (10, 28, 28) and (moved in (25, 26) if row != "clean" else moved == 0)
    x_adv = fgsm(0.1)(nets["target"], *test.batch(at))
    assert shown.predictions["fgsm"]["D"].tolist() == nets["target"](x_adv).argmax(1).tolist()
    assert found["masking"]["verdict"] in read((out / "report.html").read_text()).text
    assert cli.main(argv) == 1 and "already holds a run" in capsys.readouterr().err


def test_resume_looks_for_runs_of_train_alone(asked, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "runs" / "diagnose-1").mkdir(parents=True)
    (tmp_path / "runs" / "diagnose-1" / "config.json").write_text("{}")
    assert cli.main(["train", "--resume"]) == 0 and asked[-1][2] == {"resume": False}


@pytest.fixture(scope="module")
def weights(tmp_path_factory):
    """SPECs of two saved networks."""
    path = tmp_path_factory.mktemp("weights")
    saved_networks(path)
    return f"mnist:D={path / 'target.pt'}", f"mnist:D={path / 'source.pt'}"


def evaluated(folder, weights, out, *more, source=True):  # noqa: F811
    """results.json of a run folder, and of the command with these options."""
    argv = ["evaluate", "--data", f"mnist:{folder}", "--model", weights[0], *(["--source", weights[1]] * source),
            "--attack", "fgsm", "pgd", "--steps", "2", "--device", "cpu", "--out", str(out), *more]
    assert cli.main(argv) == 0
    return json.loads((out / "results.json").read_text())


def test_evaluate_writes_a_run_folder_and_goes_on_with_it(folder, weights, tmp_path, capsys, monkeypatch):  # noqa: F811
    out = tmp_path / "run"
    found = evaluated(folder, weights, out, "--eps", "0.1", "0", "0.05", "--top5")
    said = capsys.readouterr().out
    assert "top-5 error %" in said and "worst case %" in said
    assert {p.name for p in out.iterdir()} == {"config.json", "results.json", "cells.jsonl", "matrix.json",
                                               "examples.npz", "report.html"}
    assert json.loads((out / "config.json").read_text())["eps"] == [0.1, 0, 0.05]
    errors, matrix = found["models"]["D"], TransferMatrix.load(out / "matrix.json")
    assert found["eps"] == 0.1 and found["sources"] == {"source": "held_out"} and found["matrix"]["n"] == 40
    assert errors["max_black_box"] == max(matrix.error(a, "source", "D") for a in ("fgsm", "pgd"))
    assert errors["black_box_summary"]["pair"][1] == "source"
    assert errors["white_box"]["pgd"] == matrix.error("pgd", "D", "D")
    assert len(found["curves"]) == 4
    for curve in found["curves"]:
        assert curve["eps"] == [0, 0.05, 0.1] and curve["top1"][0]["value"] == pytest.approx(1 - errors["clean"])
        assert curve["top1"][2]["value"] == pytest.approx(1 - matrix.error(curve["attack"], curve["source"], "D"))
    with np.load(out / "examples.npz") as examples:
        assert str(examples["source"]) == "source" and len(examples["labels"]) == 10
        for row in ("clean", "fgsm", "pgd"):
            assert examples[f"pictures/{row}"].shape == (10, 28, 28) and examples[f"pictures/{row}"].dtype == np.uint8
            assert examples[f"predictions/{row}/D"].shape == (10,)
        assert np.abs(examples["pictures/pgd"].astype(int) - examples["pictures/clean"]).max() in (25, 26)

    assert cli.main(["evaluate", "--model", weights[0], "--out", str(out)]) == 1
    assert "already holds a run" in capsys.readouterr().err
    kind, calls = type(fgsm()), []
    craft = kind.__call__
    monkeypatch.setattr(kind, "__call__", lambda self, *a, **kw: calls.append(self.name) or craft(self, *a, **kw))
    again = evaluated(folder, weights, out, "--eps", "0.1", "0", "0.05", "--resume")
    assert calls == ["fgsm", "pgd"]  # of the examples
    assert {**again, "seconds": 0, "config": 0} == {**found, "seconds": 0, "config": 0}


def test_evaluate_saves_sets_and_takes_them_for_sources(folder, weights, tmp_path, capsys):  # noqa: F811
    sets = tmp_path / "sets"
    first = evaluated(folder, weights, tmp_path / "one", "--eps", "0.1", "--save-sets", str(sets))
    later = evaluated(folder, weights, tmp_path / "two", "--eps", "0.1", "--set", str(sets / "source-fgsm"),
                      str(sets / "source-pgd"), source=False)
    assert later["sources"] == {"source": "held_out"} and [s["eps"] for s in later["sets"]] == [0.1, 0.1]
    assert later["models"]["D"]["black_box"] == first["models"]["D"]["black_box"]
    own = evaluated(folder, weights, tmp_path / "three", "--set", str(sets / "D-fgsm"), source=False)
    assert list(own["sources"]) == ["D_2"]  # a set of the name of a target is not taken for white-box
    capsys.readouterr()
    for argv, message in ((["--save-sets", "x", "--eps", "0.1", "0.2"], "one --eps"), (["--resume"], "needs --out DIR"),
                          (["--resume", "--out", "x.json"], "needs --out DIR"),
                          (["--set", str(tmp_path)], "no finished adversarial set")):
        assert cli.main(["evaluate", "--data", f"mnist:{folder}", "--model", weights[0], *argv]) == 1
        assert message in capsys.readouterr().err


def test_the_module_is_the_command(folder, tmp_path):  # noqa: F811
    run = subprocess.run([sys.executable, "-W", "error", "-m", "ensadv_fast", "train", "--data", f"mnist:{folder}",
                          "--preset", "plain", "--static", "--held-out", "--epochs", "1", "--seeds", "1", "--threads",
                          "1", "--device", "cpu", "--out", str(tmp_path / "run")],
                         capture_output=True, text=True, timeout=120)
    assert run.returncode == 0, run.stderr
    assert "Errors in %" in run.stdout and str(tmp_path / "run") in run.stdout
    assert checkpoints.load(tmp_path / "run" / "models" / "D-seed0.pt")["step"] == 2


# ----------------------------------------------------------------------------------------- what users write wrong


@pytest.mark.parametrize("argv, message", [
    (["train", "--epoch", "3"], "unrecognized arguments: --epoch 3 (did you mean --epochs"),
    (["train", "--batchsize=3"], "unrecognized arguments: --batchsize=3 (did you mean --batch-size"),
    (["diagnose", "--modle", "mnist:D=x", "--model", "mnist:D=x"], "(did you mean --model"),
    (["trian"], "invalid choice: 'trian'")])
def test_a_misspelt_option_is_told_its_neighbour(argv, message, capsys):
    with pytest.raises(SystemExit) as e:
        cli.main(argv)
    assert e.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("argv, message", [
    (["train", "--model", "mnist:F"], "got 'mnist:F'"),
    (["train", "--model", "cifar:resnet19"], "got 'cifar:resnet19' (did you mean resnet18"),
    (["train", "--model", "minst:D"], "'minst:D' cannot be found (No module named 'minst'); networks by name are "
     "mnist:, cifar:, timm: and torchvision: (did you mean mnist?)"),
    (["train", "--held-out", "mnist:A=nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["train", "--init", "nowhere.pt"], "no checkpoint at nowhere.pt"),
    (["train", "--preset", "tramerr"], "got 'tramerr' (did you mean tramer?)")])
def test_what_cannot_be_found_is_said_before_anything_is_trained(argv, message, folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("ensadv_fast.train.driver.train_all", None)
    assert cli.main([*argv, "--data", f"mnist:{folder}", "--out", "run"]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not (tmp_path / "run").exists()


@pytest.mark.parametrize("device", ["cuda:99", "meta", "mps", "gpu", ""])
def test_a_device_that_is_not_here(device, capsys, tmp_path):
    for argv in (["train", "--out", str(tmp_path / "r")], ["evaluate", "--model", "mnist:D=x.pt"],
                 ["diagnose", "--model", "mnist:D=x.pt"]):
        assert cli.main([*argv, "--device", device]) == 1
        assert "device" in (err := capsys.readouterr().err) and f"got {device!r}" in err and "Traceback" not in err


def test_cuda_where_there_is_none(capsys, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert cli.main(["evaluate", "--model", "mnist:D=x.pt", "--device", "cuda"]) == 1
    assert "must be that of a device of this machine, where torch finds 0 GPUs, got 'cuda'" in capsys.readouterr().err


@pytest.mark.parametrize("option", ["--batch-size", "--steps"])
@pytest.mark.parametrize("command", ["evaluate", "diagnose"])
def test_none_of_what_must_be_some(command, option, capsys):
    assert cli.main([command, "--model", "mnist:D=x.pt", option, "0"]) == 1
    err = capsys.readouterr().err
    assert f"{command}: {option[2:].replace('-', '_')} must be" in err and "got 0" in err


def test_a_module_in_the_working_directory(tmp_path):
    """With the console script too, whose own folder stands where `python -m` has the working directory."""
    (tmp_path / "lite_network.py").write_text("from ensadv_fast.models import mnist_d as lite\n")
    code = ("import sys; sys.path[0] = '/nowhere'; from ensadv_fast import cli, models; "
            "assert cli.main(['info']) == 0; models.check('lite_network:lite')")
    script = tmp_path / "bin" / "script.py"
    script.parent.mkdir()
    script.write_text(code)
    ended = subprocess.run([sys.executable, str(script)], cwd=tmp_path, capture_output=True, text=True)
    assert ended.returncode == 0, ended.stderr


def test_watch_and_monitor_are_one(asked, tmp_path):
    for flag in ("--watch", "--monitor"):
        assert cli.main(["train", "--out", str(tmp_path / flag), flag, "7"]) == 0
        assert asked[-1][0].monitor == 7


@pytest.mark.parametrize("argv, resumes", [(["train"], True), (["diagnose", "--model", "x"], False),
                                           (["evaluate", "--model", "x"], False),
                                           (["evaluate", "--model", "x", "--out", "d"], True)])
def test_ctrl_c_speaks_of_resume_where_there_is_one(argv, resumes, monkeypatch, capsys):
    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "make_parser", interrupted)
    assert cli.main(argv) == 130
    assert ("--resume" in capsys.readouterr().err) == resumes


def test_options_are_in_groups():
    (commands,) = (a for a in cli.make_parser("train")._actions if isinstance(a.choices, dict))
    text = commands.choices["train"].format_help()
    for title in GROUPS.values():
        assert f"\n{title}:\n" in text


@pytest.mark.parametrize("command", ["evaluate", "diagnose"])
def test_a_network_of_other_classes_than_the_datas_is_refused(command, tmp_path, monkeypatch, capsys):
    (tmp_path / "many_classes.py").write_text(
        "from torch import nn\n\ndef net():\n    return nn.Sequential(nn.Flatten(), nn.Linear(784, 1000))\n")
    monkeypatch.syspath_prepend(tmp_path)
    import many_classes

    torch.save({"model": many_classes.net().state_dict()}, tmp_path / "net.pt")
    argv = [command, "--model", f"many_classes:net={tmp_path / 'net.pt'}", "--data", "digits", "--device", "cpu",
            "--out", str(tmp_path / "out")]
    assert cli.main(argv) == 1
    said = capsys.readouterr().err
    assert "must give a logit for each of the 10 classes of the data, got 1000" in said
