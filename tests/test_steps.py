"""The benchmarks of whole attacks and training steps verify before they time. No time is asserted."""
import importlib.util
import json
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from networks import small_net

BENCH = Path(__file__).parent.parent / "bench"


def load(name: str):
    """A module of bench/, whose own `networks` is not the one of the tests."""
    spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def bench():
    kept = {name: sys.modules.get(name) for name in ("networks", "attack_step", "train_step")}
    try:
        sys.modules["networks"] = networks = load("networks")
        sys.modules["attack_step"] = attack = load("attack_step")
        sys.modules["train_step"] = train = load("train_step")
        yield networks, attack, train
    finally:
        for name, module in kept.items():
            sys.modules.pop(name)
            if module is not None:
                sys.modules[name] = module


@pytest.fixture
def small(bench, tmp_path, monkeypatch):
    networks = bench[0]
    monkeypatch.setattr(networks, "BUILD", tmp_path / "networks")
    network = networks.Network("small", small_net, (3, 8, 8), 10, 8 / 255, 6, 6, 6)
    monkeypatch.setitem(networks.NETWORKS, "small", network)
    return network


# ---- whole attacks -----------------------------------------------------------------------------------------------

@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("attack", ["fgsm", "rand_fgsm", "step_ll", "pgd"])
def test_contenders_are_as_strong_as_plain_float32(bench, small, attack):
    _, attack_step, _ = bench
    installed = [c for c in attack_step.CONTENDERS if c.installed and c.make is not attack_step.careful]
    net = bench[0].settled(small)
    row = attack_step.row(small, net, attack, 64, "cpu", installed, 0.0, 2)
    assert set(row["contenders"]) | set(row["left_out"]) == {c.name for c in installed}
    assert {"ours", "ours, exact source", "ours, plain module"} <= set(row["contenders"])
    assert set(row["left_out"].values()) <= {"does not have this attack"}
    assert all(c["ms"] > 0 for c in row["contenders"].values())
    if attack != "rand_fgsm":
        assert row["contenders"]["ours, exact source"]["equal_pixels"] == 1.0
    assert not net.training and all(p.requires_grad for p in net.parameters())


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda job, good: good + 0.01, "out of the budget"), (lambda job, good: job.x, "too weak"),
    (lambda job, good: good[:3], "shape"), (lambda job, good: good * float("nan"), "out of the budget"),
    (lambda job, good: (2 * job.x - good).clamp(0, 1), "too weak: -")])  # the other way
def test_a_wrong_attack_is_not_timed(bench, small, wrong, message):
    _, attack_step, _ = bench
    job = attack_step.Job(bench[0].settled(small), *bench[0].images(small, 6), "fgsm", small.eps)
    wanted = attack_step.plain(job)
    (good,) = wanted.results
    assert attack_step.verify(job, wanted, lambda: good) == {"loss_increase": 1.0, "equal_pixels": 1.0}
    with pytest.raises(AssertionError, match=message):
        attack_step.verify(job, wanted, lambda: wrong(job, good))
    cheat = attack_step.Contender("cheat", lambda job: lambda: wrong(job, good))
    row = attack_step.row(small, job.net, "fgsm", 6, "cpu", [cheat], 0.0, 2)
    assert row["contenders"] == {} and message in row["left_out"]["cheat"]


def test_attack_rows_are_stamped_added_and_missing_packages_named(bench, small, tmp_path, monkeypatch, capsys):
    _, attack_step, _ = bench
    names = ("torchattacks", "ours", "ours, exact source", "ours, no graph")
    known = [c for c in attack_step.CONTENDERS if c.name in names]
    monkeypatch.setattr(attack_step, "CONTENDERS", [replace(known[0], needs="no_such_package"), *known[1:]])
    out = tmp_path / "results" / "attack_step.json"
    command = ["--device", "cpu", "--networks", "small", "--seconds", "0", "--least", "2", "--out", str(out)]
    assert attack_step.main([*command, "--attacks", "fgsm"]) == 0
    first = json.loads(out.read_text())
    assert attack_step.main([*command, "--attacks", "step_ll", "--batch", "4", "--add"]) == 0
    result = json.loads(out.read_text())
    assert {"commit", "time", "build", "runtime", "machine", "load_before", "load_after"} <= result.keys()
    assert [r["attack"] for r in result["rows"]] == ["fgsm", "step_ll"] and result["rows"][0] == first["rows"][0]
    assert [r["shape"][0] for r in result["rows"]] == [6, 4]
    assert all(set(r["contenders"]) == {"ours", "ours, exact source"} for r in result["rows"])  # no graphs on the CPU
    assert result["missing"] == ["no_such_package"]
    assert "not installed: no_such_package" in capsys.readouterr().out


def test_a_peer_is_called_with_the_papers_sizes(bench):
    assert bench[1].Job(None, None, None, "pgd", 0.1).step * bench[1].STEPS == pytest.approx(0.25)


# ---- training steps ----------------------------------------------------------------------------------------------

def test_training_steps_are_verified_and_stamped(bench, small, tmp_path):
    *_, train_step = bench
    out = tmp_path / "train_step.json"
    assert train_step.main(["--device", "cpu", "--networks", "small", "--seconds", "0", "--least", "2", "--out",
                            str(out)]) == 0
    (row,) = json.loads(out.read_text())["rows"]
    assert list(row["contenders"]) == list(train_step.CONTENDERS)
    assert all(c["ms"] > 0 and c["peak_bytes"] > c["step_bytes"] > 0 for c in row["contenders"].values())


def test_every_source_has_its_turn(bench, small):
    *_, train_step = bench
    turns = [train_step.Trainer(small, name, 6, "cpu").turns for name in train_step.CONTENDERS]
    assert turns == [1, 1, 2, 3, 4, 1, 1, 2]


def test_a_wrong_training_step_is_an_error(bench, small):
    *_, train_step = bench
    trainer = train_step.Trainer(small, "EAT, 1 static", 6, "cpu")
    with pytest.raises(AssertionError, match="perturbations of sizes"):
        train_step.verify(trainer, 0.5)
    trainer = train_step.Trainer(small, "EAT, 1 static", 6, "cpu")
    trainer.adversary.select = lambda step, n: 0
    with pytest.raises(AssertionError, match="turn 1: source 0"):
        train_step.verify(trainer, small.eps)
    trainer = train_step.Trainer(small, "clean", 6, "cpu")
    trainer.optimizer.param_groups[0]["lr"] = 0.0
    with pytest.raises(AssertionError, match="left the weights"):
        train_step.verify(trainer, small.eps)


def test_peak_memory_counts_what_is_alive_at_once(bench):
    *_, train_step = bench

    def call():
        a = torch.empty(1000, dtype=torch.uint8)
        del a
        b, c = (torch.empty(700, dtype=torch.uint8) for _ in range(2))
        return b.numel() + c.numel()

    train_step.peak_bytes(call, "cpu")  # the first record of a process has the profiler's own
    assert 1400 <= train_step.peak_bytes(call, "cpu") <= 2000
