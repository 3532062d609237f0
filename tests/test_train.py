"""ensadv_fast.train: runs that go on after kill -9, and what a run leaves behind."""
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, replace

import numpy as np
import pytest
import torch
from html_reader import read
from torch import nn

from ensadv_fast import report, train
from ensadv_fast.attacks.by_name import make_attack
from ensadv_fast.evaluate import TransferMatrix
from ensadv_fast.models import specs as specs_module
from ensadv_fast.system import files
from ensadv_fast.train import PRESETS, Config, checkpoints, make_config, optimizers
from ensadv_fast.train import results as results_module


@pytest.fixture
def small(folder):
    return Config(data=f"mnist:{folder}", static=("mnist:D",), held_out=("mnist:C_tanh",), epochs=2, source_epochs=1,
                  batch_size=16, seeds=2, eval_steps=2, eval_batch_size=40, workers=1, threads=1, log_every=4,
                  device="cpu")


def weights(run, name):
    return torch.load(run / "models" / f"{name}.pt", weights_only=True)["model"]


def assert_same_weights(a, b):
    names = sorted(p.stem for p in (a / "models").glob("*.pt"))
    assert names == sorted(p.stem for p in (b / "models").glob("*.pt")) and names
    for name in names:
        one, two = weights(a, name), weights(b, name)
        assert all(torch.equal(one[k], two[k]) for k in one), name


def start(config, run, *more):
    """The same run in a process of its own."""
    options = []
    for k, v in asdict(config).items():
        if v is not None and not isinstance(v, bool):
            options += ["--" + k.replace("_", "-"), *(map(str, v) if isinstance(v, tuple) else [str(v)])]
    return subprocess.Popen([sys.executable, "-W", "error", "-m", "ensadv_fast", "train", "--out", str(run), *options,
                             *more], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


# --------------------------------------------------------------------------------------- a run from end to end


@pytest.fixture(scope="module")
def done(folder, tmp_path_factory):
    """One finished run that several tests look at."""
    said = []
    run = tmp_path_factory.mktemp("done") / "run"
    config = Config(data=f"mnist:{folder}", static=("mnist:D",), held_out=("mnist:C_tanh",), epochs=2,
                    source_epochs=1, batch_size=16, seeds=2, eval_steps=2, eval_batch_size=40, workers=1,
                    threads=1, log_every=4, device="cpu")
    results = train.run(config, run, progress=False, say=said.append)
    return config, run, results, "\n".join(said)


def test_a_run_writes_results_in_the_promised_form(done):
    _, run, returned, _ = done
    results = json.loads((run / "results.json").read_text())
    assert results == json.loads(json.dumps(returned))
    assert results["dataset"] == "mnist" and results["eps"] == 0.3
    assert results["sources"] == {"C_tanh": "held_out", "D": "static"}
    assert list(results["models"]) == ["D", "D_adv", "D_ens"]
    for m in results["models"].values():
        assert set(m["white_box"]) == set(m["black_box"]) == {"fgsm", "rand_fgsm", "ifgsm", "pgd"}
        assert all(set(by_source) == {"C_tanh", "D"} for by_source in m["black_box"].values())
        held_out = [by_source["C_tanh"] for by_source in m["black_box"].values()]
        assert m["mean_black_box"] == pytest.approx(np.mean(held_out))
        assert max(held_out) <= m["max_black_box"] + 1e-9 <= m["worst_case_black_box"] + 2e-9 <= 1 + 3e-9
        seeds = m["per_seed"]
        assert list(seeds) == ["0", "1"]
        for key in ("clean", "max_black_box", "mean_black_box", "worst_case_black_box"):
            values = [s[key] for s in seeds.values()]
            assert m[key] == pytest.approx(np.mean(values)) and m["std"][key] == pytest.approx(np.std(values, ddof=1))
        assert m["std"]["white_box"].keys() == m["white_box"].keys()
    assert results["versions"]["torch"] == torch.__version__
    assert set(results["seconds"]["train"]) == {"source-C_tanh", "source-D", *(
        f"{n}-seed{s}" for n in ("D", "D_adv", "D_ens") for s in (0, 1))}


def test_the_errors_are_those_of_the_saved_networks(done):
    config, run, results, _ = done
    from ensadv_fast import data, models
    test = data.load(config.data).test
    x, y = test.batch(torch.arange(len(test)))
    for name in ("D", "D_ens"):
        for seed in ("0", "1"):
            model = models.build(f"mnist:D={run / 'models' / f'{name}-seed{seed}.pt'}").eval()
            m = results["models"][name]["per_seed"][seed]
            assert m["clean"] == pytest.approx((model(x).argmax(1) != y).float().mean().item())
            x_adv = make_attack("fgsm", 0.3)(model, x, y)
            assert m["white_box"]["fgsm"] == pytest.approx((model(x_adv).argmax(1) != y).float().mean().item())


def test_what_is_printed_and_the_report(done):
    _, run, results, said = done
    page = read((run / "report.html").read_text()).text
    for word in ("D_adv", "D_ens", "R+FGSM", "held-out", "C_tanh", "Ensemble training lowers"):
        assert word in said
    for text in (said, page):
        assert f"{100 * results['models']['D_ens']['max_black_box']:.1f}" in text
    for part in ("Errors", "White-box and transferred attacks", "Training", "Examples", "How it was run"):
        assert part in page
    assert report.write(run).read_text() == (run / "report.html").read_text()


def test_metrics_and_config(done):
    config, run, *_ = done
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    steps = [r["step"] for r in lines if r["job"] == "D_ens-seed1"]
    assert steps == [4, 6, 8, 12]  # every fourth, and each epoch's end, where the monitor looks
    watched = [r for r in lines if r["monitor"]]
    assert {r["job"] for r in watched} == {f"D_{kind}-seed{s}" for kind in ("adv", "ens") for s in (0, 1)}
    assert all(r["step"] == r["monitor"]["step"] in (6, 12) for r in watched)
    assert all(0 <= r["monitor"][f"{a}_accuracy"] <= 1 for r in watched for a in ("fgsm", "pgd"))
    assert all(r["adv_loss"] is None and r["source"] == -1 for r in lines if r["job"] == "D-seed0")
    assert all(r["adv_loss"] > 0 and r["images_per_second"] > 0 for r in lines if r["job"] == "D_adv-seed0")
    assert {r["source"] for r in lines if r["job"].startswith("D_ens")} == {0, 1}
    assert train.load_config(run) == config


def test_the_monitor_changes_no_weight(small, tmp_path):
    config = replace(small, preset="fgsm-at", held_out=(), seeds=1)
    for name, images in (("watched", 64), ("alone", 0)):
        train.run(replace(config, monitor=images), tmp_path / name, progress=False, say=lambda text: None)
    assert_same_weights(tmp_path / "watched", tmp_path / "alone")
    lines = [json.loads(line) for line in (tmp_path / "alone" / "metrics.jsonl").read_text().splitlines()]
    assert lines and all(r["monitor"] is None for r in lines)
    state = checkpoints.load(tmp_path / "watched" / "models" / "D_adv-seed0.pt")
    assert state["monitor"]["calls"] == 2
    with pytest.raises(ValueError, match="monitor must be .*, got -1"):
        replace(config, monitor=-1)


def test_sources_are_other_networks_than_targets(done):
    _, run, *_ = done
    nets = [weights(run, name)["1.weight"] for name in ("source-D", "D-seed0", "D_adv-seed0", "D_ens-seed0", "D-seed1")]
    assert all(not torch.equal(a, b) for i, a in enumerate(nets) for b in nets[:i])


def test_no_temporary_files_are_left(done):
    assert not list(done[1].rglob("*.tmp"))


def test_one_seed_one_result(done, tmp_path):
    config, run, results, _ = done
    again = train.run(config, tmp_path / "again", progress=False, say=lambda text: None)
    assert_same_weights(run, tmp_path / "again")
    assert again["models"] == results["models"]
    one_job = replace(config, preset="tramer", seed=1, seeds=1)
    train.run(one_job, tmp_path / "alone", progress=False, say=lambda text: None)
    # Sources follow the first seed, so this D_ens saw others; with theirs, it is the one of the longer run.
    sources = tuple(f"mnist:D={run / 'models' / 'source-D.pt'}" for _ in range(1))
    train.run(replace(one_job, static=sources, held_out=()), tmp_path / "given", progress=False, say=lambda text: None)
    given, longer = weights(tmp_path / "given", "D_ens-seed1"), weights(run, "D_ens-seed1")
    assert all(torch.equal(given[k], longer[k]) for k in given)
    other = weights(tmp_path / "alone", "D_ens-seed1")
    assert not all(torch.equal(other[k], longer[k]) for k in other)


# -------------------------------------------------------------------------------------- kill -9 and resume


def test_kill_9_and_resume_equal_an_unbroken_run(small, tmp_path):
    config = replace(small, epochs=15, seeds=1, preset="tramer", save_every=2, log_every=1)
    train.run(config, tmp_path / "unbroken", progress=False, say=lambda text: None)
    config = replace(config, workers=2)  # and two processes give what one does
    broken = tmp_path / "broken"
    path = broken / "models" / "D_ens-seed0.pt"
    for _ in range(2):  # killed twice, the second time while going on
        process = start(config, broken, "--resume")
        before = checkpoints.load(path)["step"] if path.exists() else 0
        deadline = time.time() + 60
        while not path.exists() or checkpoints.load(path)["step"] <= before:
            assert process.poll() is None and time.time() < deadline, process.stderr.read()
            time.sleep(0.005)
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()
        assert 0 < checkpoints.load(path)["step"] < 90
    out, err = (process := start(config, broken, "--resume", str(broken))).communicate(timeout=120)
    assert process.returncode == 0, err
    assert_same_weights(tmp_path / "unbroken", broken)
    one, two = (json.loads((tmp_path / d / "results.json").read_text())["models"] for d in ("unbroken", "broken"))
    assert one == two
    assert one["D_ens"]["clean"] < 0.3  # chance is 0.9: it did learn

    def lines(run):
        text = (run / "metrics.jsonl").read_text().splitlines()
        records = [{k: v for k, v in json.loads(t).items() if k != "images_per_second" and "share" not in k}
                   for t in text]
        return sorted(records, key=lambda r: (r["job"], r["step"]))

    assert lines(tmp_path / "unbroken") == lines(broken)  # none lost, none twice


@pytest.mark.parametrize("preset", ["kurakin", "fast-at", "pgd-at", "fgsm-at"])
@pytest.mark.parametrize("stop", [3, 6, 8])
def test_every_preset_goes_on_where_it_stopped(small, tmp_path, monkeypatch, preset, stop):
    """Steps 6 and 12 end an epoch; the run is stopped by an exception instead of a signal, which is faster."""
    config = replace(small, preset=preset, seeds=1, static=(), held_out=(), save_every=1)
    train.run(config, tmp_path / "unbroken", progress=False, say=lambda text: None)
    save = checkpoints.save

    def save_and_stop(path, state):
        save(path, state)
        if state["step"] == stop:
            raise KeyboardInterrupt

    monkeypatch.setattr(checkpoints, "save", save_and_stop)
    with pytest.raises(KeyboardInterrupt):
        train.run(config, tmp_path / "broken", progress=False, say=lambda text: None)
    monkeypatch.setattr(checkpoints, "save", save)
    train.run(config, tmp_path / "broken", resume=True, progress=False, say=lambda text: None)
    assert_same_weights(tmp_path / "unbroken", tmp_path / "broken")


def test_a_finished_run_is_only_evaluated_again(done, monkeypatch):
    config, run, results, _ = done
    monkeypatch.setattr(checkpoints, "save", lambda *a: pytest.fail("nothing is left to train"))
    again = train.run(config, run, resume=True, progress=False, say=lambda text: None)
    assert again["models"] == results["models"]


def test_an_existing_run_is_not_overwritten(done):
    config, run, *_ = done
    with pytest.raises(FileExistsError, match="already holds a run"):
        train.run(config, run, progress=False)
    with pytest.raises(ValueError, match="epochs = 2, now 3"):
        train.run(replace(config, epochs=3), run, resume=True, progress=False)


# --------------------------------------------------------------------------------------------- checkpoints


def state():
    return {"step": 3, "model": {"w": torch.arange(6.0).view(2, 3), "n": torch.tensor(4)},
            "rng": [torch.get_rng_state()], "lr": 0.1, "none": None, "half": torch.ones(3).bfloat16()}


def test_checkpoints_come_back_as_they_were(tmp_path):
    path = tmp_path / "c.pt"
    checkpoints.save(path, state())
    back = checkpoints.load(path)
    assert files.digest(back) == files.digest(state())
    assert torch.equal(back["model"]["w"], state()["model"]["w"])
    assert [p.name for p in tmp_path.iterdir()] == ["c.pt"]


def test_the_digest_sees_every_difference():
    first = files.digest(state())
    for change in ({"step": 4}, {"lr": 0.2}, {"none": 0}, {"half": torch.ones(3).half()},
                   {"model": {"w": torch.arange(6.0).view(3, 2), "n": torch.tensor(4)}}):
        assert files.digest({**state(), **change}) != first
    swapped = state()
    swapped["model"]["w"][0, 0] = -0.0
    assert files.digest(swapped) != first


@pytest.mark.parametrize("damage", [lambda b: b[:len(b) // 2], lambda b: b"", lambda b: b"hello" * 100])
def test_truncated_checkpoints_are_named(tmp_path, damage):
    path = tmp_path / "broken.pt"
    checkpoints.save(path, state())
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ValueError, match="broken.pt is corrupt"):
        checkpoints.load(path)


def test_one_flipped_bit_is_found(tmp_path):
    path = tmp_path / "flipped.pt"
    checkpoints.save(path, {"w": torch.arange(1000.0)})
    raw = bytearray(path.read_bytes())
    at = raw.find(torch.arange(1000.0).numpy().tobytes()[:64]) + 41
    raw[at] ^= 4
    path.write_bytes(raw)
    with pytest.raises(ValueError, match="flipped.pt is corrupt"):
        checkpoints.load(path)
    torch.save({"w": torch.arange(5.0), "sha256": "0" * 64}, path)  # whole, but not what was written
    with pytest.raises(ValueError, match="do not match their SHA-256"):
        checkpoints.load(path)


def test_other_files_are_no_checkpoints(tmp_path):
    with pytest.raises(FileNotFoundError, match="none.pt"):
        checkpoints.load(tmp_path / "none.pt")
    torch.save({"w": torch.zeros(2)}, tmp_path / "weights.pt")
    with pytest.raises(ValueError, match="no checkpoint of ensadv-fast"):
        checkpoints.load(tmp_path / "weights.pt")
    torch.save(nn.Linear(1, 1), tmp_path / "module.pt")  # would run code if it were unpickled
    with pytest.raises(ValueError, match="module.pt"):
        checkpoints.load(tmp_path / "module.pt")


def test_a_failed_write_leaves_the_old_file(tmp_path):
    path = tmp_path / "c.pt"
    checkpoints.save(path, {"step": 1})

    def fail(f):
        f.write(b"half")
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        files.atomic_write(path, fail)
    assert checkpoints.load(path)["step"] == 1


def test_a_corrupt_checkpoint_stops_a_resumed_run(small, tmp_path):
    config = replace(small, preset="plain", seeds=1, static=(), held_out=(), epochs=1)
    train.run(config, tmp_path, progress=False, say=lambda text: None)
    path = tmp_path / "models" / "D-seed0.pt"
    path.write_bytes(path.read_bytes()[:-1000])
    with pytest.raises(ValueError, match="D-seed0.pt is corrupt"):
        train.run(config, tmp_path, resume=True, progress=False)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ValueError, match="config.json is corrupt"):
        train.load_config(tmp_path)


# --------------------------------------------------------------------------------------- config and presets


@pytest.mark.parametrize("change, message", [
    ({"preset": "best"}, "preset must be main or .*, got 'best'"), ({"epochs": 0}, "epochs must be .*, got 0"),
    ({"eps": 0.0}, "eps must be .*, got 0.0"), ({"eps": float("nan")}, "eps must be .*, got nan"),
    ({"optimizer": "lion"}, "optimizer must be one of .*, got 'lion'"), ({"schedule": "warm"}, "schedule"),
    ({"dtype": "float64"}, "dtype"), ({"static": ()}, "static must name a source or more for preset tramer"),
    ({"model": "D"}, "spec must be mnist:NAME"), ({"attack": "cw"}, "attack must be one of .*, got 'cw'"),
    ({"eps_dist": "normal"}, "eps_dist"),
])
def test_bad_options(change, message):
    with pytest.raises(ValueError, match=message):
        Config(**change)


def test_training_on_nothing_is_an_error_of_options():
    for preset in ("pgd-at", "plain,fast-at", "cifar10-at"):
        with pytest.raises(ValueError, match=r"lam must be > 0 where .*fraction 1\.0, mix replace\), got 0"):
            make_config(preset=preset, lam=0.0)
    with pytest.raises(ValueError, match=r"preset kurakin: fraction 1\.0"):
        Config(preset="kurakin", lam=0.0, fraction=1.0)
    for change in ({"fraction": 0.9}, {"mix": "append"}, {"lam": 0.1}):  # clean samples count, or adversarial ones do
        Config(**{"preset": "pgd-at", "lam": 0.0, **change})
    Config(preset="plain", lam=0.0, fraction=1.0)


def test_the_presets_are_the_published_recipes():
    r = PRESETS["kurakin"]
    assert (r.attack, r.fraction, r.mix, r.lam, r.eps_dist, r.static) == (
        "step_ll", 0.5, "replace", 0.3, "truncated_normal", False)
    assert r.delay == pytest.approx(10_000 / 150_000)
    for name in ("fgsm-at", "tramer"):
        r = PRESETS[name]
        assert (r.attack, r.rule, r.mix, r.lam, r.crafting, r.static) == (
            "fgsm", "predicted", "append", 1.0, "train", name == "tramer")
    assert PRESETS["fast-at"].step == 1.25 and PRESETS["fast-at"].steps == 1 and PRESETS["fast-at"].fraction == 1
    assert PRESETS["plain"].attack is None
    overridden = Config(preset="plain,kurakin", lam=0.7, steps=3).recipes()
    assert overridden["kurakin"].lam == 0.7 and overridden["plain"] == PRESETS["plain"]


def test_fast_at_takes_one_step_of_1_25_eps_from_a_uniform_start():
    x = torch.full((50, 1, 4, 4), 0.5)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Flatten(), nn.Linear(16, 3))
    r = PRESETS["fast-at"]
    attack = make_attack(r.attack, 0.2, step=r.step, steps=r.steps)
    moved = (attack(model, x, torch.zeros(50, dtype=torch.int64)) - x).abs()
    assert moved.max() <= 0.2 + 2**-24
    # A start u in (-0.2, 0.2) moved by +0.25 and cut at 0.2 stays below it only where u < -0.05: 3 of 8.
    assert (moved < 0.1999).float().mean().item() == pytest.approx(0.375, abs=0.06)
    small_eps = torch.full((50,), 0.1)
    assert (attack(model, x, torch.zeros(50, dtype=torch.int64), eps=small_eps) - x).abs().max() <= 0.1 + 2**-24


def test_attack_names():
    with pytest.raises(ValueError, match="got 'deepfool'"):
        make_attack("deepfool", 0.1)
    for name in train.ATTACKS:
        assert make_attack(name, 0.1, alpha=0.5, steps=2).eps == 0.1


def test_learning_rates():
    def curve(schedule):
        return [optimizers.learning_rate(Config(schedule=schedule, lr=2.0), s, 100, 10) for s in range(100)]

    assert set(curve("constant")) == {2.0}
    assert curve("cosine")[0] == 2.0 and curve("cosine")[50] == pytest.approx(1.0)
    assert max(curve("cyclic")) == curve("cyclic")[40] == pytest.approx(2.0) and curve("cyclic")[0] == 0.0
    assert curve("decay")[19] == 2.0 and curve("decay")[20] == pytest.approx(1.88)
    assert curve("decay")[40] == pytest.approx(2 * 0.94**2)


@pytest.mark.parametrize("optimizer, kind", [("adam", "Adam"), ("sgd", "SGD"), ("rmsprop", "RMSPropTF")])
def test_optimizers(optimizer, kind):
    made = optimizers.make_optimizer(Config(optimizer=optimizer, lr=0.5, weight_decay=0.1), nn.Linear(2, 2))
    assert type(made).__name__ == kind and made.defaults["lr"] == 0.5 and made.defaults["weight_decay"] == 0.1


@pytest.mark.parametrize("change", [{"dtype": "bfloat16"}, {"optimizer": "sgd", "schedule": "cyclic", "lr": 0.1},
                                    {"mix": "replace", "attack": "step_ll", "lam": 0.3, "rule": "least_likely",
                                     "eps_dist": "uniform", "select": "rotate"}])
def test_variants_run(small, tmp_path, change):
    config = replace(small, preset="tramer", seeds=1, held_out=(), epochs=1, **change)
    results = train.run(config, tmp_path, progress=False, say=lambda text: None)
    m = results["models"]["D_ens"]
    assert m["max_black_box"] is None and m["std"]["clean"] is None and 0 <= m["clean"] <= 1
    assert "max_black_box\": null" in (tmp_path / "results.json").read_text()


def test_names_of_sources():
    names = specs_module.unique_names(("mnist:D", "mnist:D=a.pt", "mnist:B", "timm:B"), {"D": None})
    assert names == {"D_2": "mnist:D", "D_3": "mnist:D=a.pt", "B": "mnist:B", "B_2": "timm:B"}
    specs = ("mnist:D=x/D_ens-seed0.pt", "mnist:D=D_adv.pt", "mnist:B=b.pt", "mnist:D=y/D_adv.pt")
    assert list(specs_module.unique_names(specs, {}, by_file=True)) == ["D_ens-seed0", "D_adv", "B", "D_adv_2"]
    assert list(specs_module.unique_names(specs[2:3], {"B": None}, by_file=True)) == ["b"]


# --------------------------------------------------------------------------------------------------- report


def test_findings_follow_the_numbers():
    def results(adv, ens, fgsm, rand):
        wrong = {}
        for name, held_out in (("D", 1.0), ("D_adv", adv), ("D_ens", ens)):
            for attack, own in (("fgsm", fgsm), ("rand_fgsm", rand)):
                wrong[attack, "A", f"{name}-seed0"] = np.arange(200) < 200 * held_out
                wrong[attack, f"{name}-seed0", f"{name}-seed0"] = np.arange(200) < 200 * own
        clean = {f"{n}-seed0": np.arange(200) < 20 for n in ("D", "D_adv", "D_ens")}
        return results_module.results_of(TransferMatrix(wrong, clean), "digits", 0.3, {"A": "held_out"},
                                         {n: [0] for n in ("D", "D_adv", "D_ens")},
                                         {"train": {}, "training": 1.0, "evaluation": 1.0, "total": 2.0, "workers": 1,
                                          "threads_per_worker": 1})

    text = results_module.text(results(0.5, 0.3, 0.4, 0.6))
    assert "does NOT hold" not in text and "50.0 % → 30.0 %" in text and "FGSM 40.0 %, R+FGSM 60.0 %" in text
    text = results_module.text(results(0.3, 0.5, 0.6, 0.4))
    assert text.count("does NOT hold here") == 2


def test_tables_are_aligned():
    lines = report.table(["a", "bbb"], [["cccc", "d"], ["e", "f"]]).splitlines()
    assert lines == ["| a    | bbb |", "|------|-----|", "| cccc | d   |", "| e    | f   |"]
