"""The cost model of bench/scale.py: its limits, its monotony, sums done by hand, and what is counted of real networks.
No time is measured here."""
import importlib.util
import json
import math
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from kept import kept_bytes

from ensadv_fast.train.recipes import PRESETS as RECIPES
from ensadv_fast.train.runs import RUNS

BENCH = Path(__file__).parent.parent / "bench"
OWN = ("networks", "scale_model", "scale_memory", "scale_gloo", "scale")


@pytest.fixture(scope="module")
def bench():
    """The modules of bench/, whose own `networks` is not the one of the tests, by name."""
    kept = {name: sys.modules.get(name) for name in OWN}
    loaded = {}
    try:
        for name in OWN:
            spec = importlib.util.spec_from_file_location(name, BENCH / f"{name}.py")
            loaded[name] = sys.modules[name] = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(loaded[name])
        yield loaded
    finally:
        for name, module in kept.items():
            sys.modules.pop(name, None)
            if module is not None:
                sys.modules[name] = module


def test_the_presets_of_the_model_are_the_runs_of_the_package(bench):
    found = bench["scale_memory"].PRESETS
    runs = {name: run for name, run in RUNS.items() if name in found}
    assert {"imagenet-kurakin", "imagenet-eat-ens3", "imagenet-eat-ens4", "imagenet-resnet50-eat"} <= set(runs)

    def short(spec):  # timm:inception_v3.tf_in1k -> inception_v3
        return spec if spec.startswith("mnist:") else spec.partition(":")[2].partition("+")[0].partition(".")[0]

    for name, run in runs.items():
        preset = found[name]
        assert short(run.model) == preset.model.name and ("+aux" in run.model) == preset.model.aux
        assert [short(s) for s in run.static] == [s.name for s in preset.static]
        assert run.dtype == preset.dtype and run.batch_size % preset.batch == 0
        assert preset.states == {"rmsprop": 2, "adam": 2, "sgd": 1}[run.optimizer]
        assert run.size in (None, preset.model.size)
        assert preset.append == (RECIPES[run.preset].mix == "append")


@pytest.fixture
def model(bench):
    return bench["scale_model"]


@pytest.fixture
def cluster(model):
    return model.Cluster(8, model.Link(1e-6, 1e11), model.Link(1e-5, 1e10))


COSTS = {"train": 3e-3, "live": 2e-3, "static": (1e-3, 4e-3), "update": 5e-3}


# ---- communication ---------------------------------------------------------------------------------------------------

def test_a_ring_by_hand(model):
    # Four ranks: 2 * 3 messages of a quarter each, in each of 5 buckets.
    assert model.ring(4, 8e9, model.Link(0.5, 1e9), 5) == pytest.approx(2 * 3 * (5 * 0.5 + 2.0))
    assert model.ring(1, 8e9, model.Link(0.5, 1e9)) == 0


def test_nodes_share_what_leaves_them(model, cluster):
    nbytes = 30 * 2**20  # two buckets
    by_hand = 14 * (2 * 1e-6 + nbytes / 8 / 1e11) + 6 * (2 * 1e-5 + nbytes / 4 / 1e10)
    assert model.all_reduce(32, nbytes, cluster) == pytest.approx(by_hand)
    assert model.all_reduce(4, nbytes, cluster) == pytest.approx(model.ring(4, nbytes, cluster.inside, 2))
    with pytest.raises(ValueError, match="world must be whole nodes of 8 devices, got 12"):
        model.all_reduce(12, nbytes, cluster)


def test_limits_of_communication(model, cluster):
    free = model.Cluster(8, *[model.Link(0.0, math.inf)] * 2)
    assert model.all_reduce(1, 1e9, cluster) == 0
    assert model.all_reduce(512, 1e9, free) == 0
    assert model.exposed(0.0, 1.0, 4) == 0
    # All but the last bucket hide behind a long backward pass; behind none, nothing does.
    assert model.exposed(1.0, 100.0, 4) == 0.25 and model.exposed(1.0, 0.0, 4) == 1.0
    assert model.exposed(1.0, 0.5, 1) == 1.0  # a single bucket goes out when the backward pass is over


@pytest.mark.parametrize("k", [1, 3, 7])
@pytest.mark.parametrize("communication, backward", [(0.3, 1.0), (1.0, 1.0), (5.0, 1.0)])
def test_exposed_is_what_a_walk_over_the_buckets_gives(model, k, communication, backward):
    end = 0.0
    for bucket in range(k):
        end = max(end, backward * (bucket + 1) / k) + communication / k
    assert model.exposed(communication, backward, k) == pytest.approx(end - backward)


# ---- a step ----------------------------------------------------------------------------------------------------------

def test_a_step_by_hand(model, cluster):
    costs = model.Costs(**COSTS)
    assert model.crafting(costs) == pytest.approx((2 + 1 + 4) / 3 * 1e-3)
    s = model.step(costs, 16, 1, 1e8, cluster)
    assert s.compute == s.seconds == pytest.approx(16 * 3e-3 + 8 * 7 / 3 * 1e-3 + 5e-3)
    assert s.communication == s.exposed == 0 and s.images_per_second == pytest.approx(16 / s.seconds)
    doubled = model.step(costs, 16, 1, 1e8, cluster, fraction=1.0, append=True)
    assert doubled.compute == pytest.approx(32 * 3e-3 + 16 * 7 / 3 * 1e-3 + 5e-3)
    slowed = model.step(costs, 16, 1, 1e8, cluster, slowdown=2.0)
    assert slowed.seconds == pytest.approx(2 * s.seconds)


def test_without_static_sources_all_is_crafted_on_the_live_model(model):
    assert model.crafting(model.Costs(1.0, live=0.5)) == 0.5
    assert model.crafting(model.Costs(1.0, live=None, static=(0.25, 0.75))) == 0.5
    assert model.crafting(model.Costs(1.0)) == 0  # clean training


def test_many_static_sources_hide_the_live_ones_cost(model):
    costs = [model.crafting(model.Costs(1.0, live=2.0, static=(0.5,) * n)) for n in (0, 1, 2, 10, 10_000)]
    assert costs == sorted(costs, reverse=True) and costs[-1] == pytest.approx(0.5, rel=1e-3)


def test_more_devices_are_never_slower_in_all_and_never_faster_each(model, cluster):
    costs = model.Costs(**COSTS)
    steps = [model.step(costs, 16, w, 1e8, cluster) for w in (1, 2, 4, 8, 16, 64, 512)]
    rates = [s.images_per_second for s in steps]
    each = [s.seconds for s in steps]
    assert rates == sorted(rates) and each == sorted(each) and each[0] < each[-1]
    free = replace(cluster, inside=model.Link(0.0, math.inf), between=model.Link(0.0, math.inf))
    assert model.step(costs, 16, 512, 1e8, free).images_per_second == pytest.approx(512 * rates[0])
    for slower in (replace(cluster, overlap=False), replace(cluster, between=model.Link(1e-5, 1e9)),
                   replace(cluster, loader=1.0)):
        assert model.step(costs, 16, 64, 1e8, slower).seconds > model.step(costs, 16, 64, 1e8, cluster).seconds


def test_loaders_bound_the_throughput(model, cluster):
    s = model.step(model.Costs(**COSTS), 16, 64, 1e8, replace(cluster, loader=10.0))
    assert s.images_per_second == pytest.approx(640) and s.data == s.seconds == 1.6


# ---- the fit ---------------------------------------------------------------------------------------------------------

def test_a_fit_finds_the_link_again(model):
    true = model.Fit(model.Link(2e-4, 3e9), 2, 7e-4)
    points = [(w, n, true.seconds(w, n)) for w in (2, 4) for n in (1e3, 1e5, 1e7)]
    found = model.fit(points[:3], 2, points[3])
    assert found.link.latency == pytest.approx(2e-4) and found.link.bandwidth == pytest.approx(3e9)
    assert found.wait == pytest.approx(7e-4)
    assert [found.seconds(w, n) for w, n, _ in points] == pytest.approx([s for *_, s in points])


def test_a_fit_has_no_negative_parts(model):
    assert model.fit([(2, 1e3, 1e-6), (2, 1e6, 2e-3)], 2).link.latency == 0
    assert model.fit([(2, 1e3, 1e-3), (2, 1e6, 2e-3)], 2, (4, 1e3, 1e-9)).wait == 0
    with pytest.raises(ValueError, match="at least two sizes"):
        model.fit([(2, 1e6, 1.0)] * 3, 2)
    with pytest.raises(ValueError, match="there is no bandwidth"):
        model.fit([(2, 1e3, 2e-3), (2, 1e6, 1e-3)], 2)


def test_the_checks_find_a_model_that_is_right(bench):
    """Measurements made up by the model itself are predicted without error."""
    model, scale = bench["scale_model"], bench["scale"]
    true = model.Fit(model.Link(2e-4, 3e9), 2, 7e-4)
    parts = {"forward": 1e-3, "train": 3e-3, "live": 2e-3, "static": 1e-3, "update": 5e-3}
    costs = model.Costs(3e-3, 2e-3, (1e-3, 1e-3), 5e-3)
    measured = []
    for world in (1, 2, 4):
        slowdown = 1.3 * true.share(world) if world > 1 else 1.0
        on = model.Cluster(world, *[true.shared(world)] * 2, overlap=False)
        eat = model.step(costs, scale.CHECKED_BATCH, world, 1e7, on, slowdown=slowdown).seconds
        sizes = [2.0**k for k in range(10, 26, 2)] if world > 1 else []
        measured.append({"world": world, "bytes": sizes, "all_reduce": [true.seconds(world, n) for n in sizes],
                         "clean_apart": 0.1 * slowdown, "eat": eat, "costs": parts})
    found = scale.check_gloo(measured, 10**7, 2)
    assert [r["slowdown"] for r in found["eat"]] == pytest.approx([1, 1.3, 2.6])
    assert found["wait_s"] == pytest.approx(7e-4)
    assert all(e["most"] < 1e-6 for e in found["errors"].values()) and set(found["errors"]) == {"2", "4"}
    assert [r["predicted_s"] for r in found["eat"]] == pytest.approx([r["measured_s"] for r in found["eat"]])
    assert sum(r["fitted"] for r in found["all_reduce"]) == 5


def test_the_sum_over_sources_is_checked_against_measured_steps(bench, tmp_path):
    """Two measured steps tell three others: exactly, where they are what the model says."""
    crafted = {"clean": 0.0, "FGSM-AT": 30.0, "EAT, 1 static alone": 12.0, "EAT, 1 static": 21.0, "EAT, 2 static": 18.0,
               "EAT, 3 static": 16.5}
    rows = [{"network": "x", "shape": [64, 1, 28, 28], "contenders": {k: {"ms": 100 + v} for k, v in crafted.items()}}]
    (tmp_path / "steps.json").write_text(json.dumps({"rows": rows}))
    found = bench["scale"].check_sources(tmp_path / "steps.json")
    assert [r["predicted_ms"] for r in found] == pytest.approx([r["measured_ms"] for r in found])
    assert [(r["network"], r["static"]) for r in found] == [("x", 1), ("x", 2), ("x", 3)]
    assert len(bench["scale"].check_sources()) == 6  # and the file that is there has what it takes


# ---- counted ---------------------------------------------------------------------------------------------------------

def test_gradient_bytes_are_those_of_the_weights(bench):
    memory = bench["scale_memory"]
    for network, parameters in ((memory.MNIST, 3_382_346), (memory.CIFAR, 11_173_962)):
        assert memory.gradient_bytes(network) == 4 * parameters
        assert sum(p.numel() for p in network.make().parameters()) == parameters


@pytest.mark.parametrize("name, aux, parameters", [
    ("inception_v3", False, 23_834_568), ("inception_v3", True, 27_161_264), ("inception_resnet_v2", False, 55_843_464),
    ("resnet50", False, 25_557_032)])
def test_gradient_bytes_of_timms_networks(bench, name, aux, parameters):
    pytest.importorskip("timm")
    memory = bench["scale_memory"]
    assert memory.gradient_bytes(memory.Network(name, 299, aux=aux)) == 4 * parameters


def test_operations_by_hand(bench):
    """MNIST's A: two 5 x 5 convolutions and two products, two operations a multiply-add."""
    def tail(c):
        return 2 * (64 * 24 * 24 * 25 * c + 64 * 20 * 20 * 25 * 64 + 64 * 20 * 20 * 128 + 128 * 10)

    assert bench["scale"].operations(bench["scale_memory"].MNIST) == tail(1)


def test_what_is_kept_grows_with_the_batch_alone(bench):
    memory = bench["scale_memory"]
    each, beside = memory.training_kept(memory.MNIST)
    net = memory.MNIST.make().train()
    assert each > 0 and beside == 0
    assert kept_bytes(net, lambda x: net(x.detach()), memory.MNIST.images(7)) == 7 * each
    # Under autocast the cast weights are counted once, and an image takes about half.
    half, weights = memory.training_kept(memory.MNIST, "bfloat16")
    assert 0.4 * each < half < 0.7 * each and 0 < weights <= memory.gradient_bytes(memory.MNIST) / 2


def test_memory_by_hand(bench):
    memory = bench["scale_memory"]
    preset = memory.Preset("x", memory.MNIST, (memory.MNIST,), 8, 2, ema=True)
    found, weights, image = memory.memory(preset), memory.gradient_bytes(memory.MNIST), 28 * 28 * 4
    assert found["weights"] == found["gradients"] == found["ema"] == weights and found["optimizer"] == 2 * weights
    assert 0.45 * weights < found["static_weights"] < 0.55 * weights  # in bfloat16
    assert found["images"] == 16 * image
    assert found["kept_by_training"] == 8 * found["kept_per_trained_image"] > found["kept_by_crafting"] > 0
    assert found["peak"] == pytest.approx(
        6 * weights + found["static_weights"] + found["images"] + found["kept_by_training"])
    assert memory.memory(preset, distributed=False)["peak"] == found["peak"] - weights
    appended = memory.memory(replace(preset, fraction=1.0, append=True))
    assert appended["kept_by_training"] == 2 * found["kept_by_training"] and appended["images"] == 24 * image
    assert memory.memory(replace(preset, batch=16))["kept_by_training"] == 2 * found["kept_by_training"]
    alone = memory.memory(replace(preset, static=(), ema=False))
    assert alone["static_weights"] == alone["ema"] == 0 and alone["peak"] < found["peak"]


def test_predictions_follow_the_assumptions(bench):
    scale, memory = bench["scale"], bench["scale_memory"]
    assumed = {name: default for name, default, _ in scale.ASSUMED}
    preset = memory.PRESETS["mnist-eat"]
    costs = scale.gpu_costs(preset, assumed)
    row = scale.predicted(preset, costs, assumed)
    rates = [row["steps"][str(w)]["images_per_second"] for w in (1, *scale.WORLDS)]
    assert rates == sorted(rates) and row["steps"]["1"]["communication"] == 0
    assert rates[-1] < 512 * rates[0] and row["over_clean"] > 1
    fast = scale.gpu_costs(preset, {**assumed, "tflops_float32": 50.0, "tflops_bfloat16": 120.0})
    assert [fast.train, fast.live, *fast.static] == pytest.approx([costs.train / 2, costs.live / 2,
                                                                   *(c / 2 for c in costs.static)])
    assert fast.update == costs.update > 0
    # Images that are decoded cannot arrive faster than the loaders are.
    slow = scale.cluster({**assumed, "loader": 0.5, "loaders": 2}, loads=True)
    assert slow.loader == 1.0 and scale.cluster(assumed, loads=False).loader == math.inf


def test_what_is_assumed_is_marked_so(bench):
    scale = bench["scale"]
    text = " ".join(scale.options().format_help().split())
    assert text.count("assumed, not measured:") == len(scale.ASSUMED)
    assert set(vars(scale.options().parse_args([]))) >= {name for name, _, _ in scale.ASSUMED}


def test_processes_measure_what_the_checks_take(bench, tmp_path):
    """Two tiny processes, for the form of what they find. (Run as a script, so that they find bench/ alone.)"""
    script = tmp_path / "run.py"
    script.write_text("import json, sys\nsys.path.insert(0, sys.argv[1])\n"
                      "import scale_gloo\n"
                      "if __name__ == '__main__':\n"
                      "    print(json.dumps(scale_gloo.measure('mnist_a', 2, 1, (2,), (1024, 4096, 16384))))\n")
    done = subprocess.run([sys.executable, script, BENCH], capture_output=True, text=True, check=True)
    (found,) = json.loads(done.stdout.splitlines()[-1])
    assert found["world"] == 2 and len(found["all_reduce"]) == 3 and found["bytes"] == [1024, 4096, 16384]
    assert min(*found["all_reduce"], found["clean_apart"], found["eat"]) > 0


def test_the_report_shows_checks_and_what_was_not_measured(bench, monkeypatch):
    monkeypatch.syspath_prepend(str(BENCH))
    spec = importlib.util.spec_from_file_location("scale_report", BENCH / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    result = report.load("scale.json")
    assert {r["preset"] for r in result["predicted"]} == set(result["memory"]) == set(bench["scale_memory"].PRESETS)
    for r in result["predicted"]:  # the file is of these formulas, networks and assumptions
        preset = bench["scale_memory"].PRESETS[r["preset"]]
        if r["costs_are"] == "assumed" and preset.model.size <= 32:
            found = bench["scale"].predicted(preset, bench["scale"].gpu_costs(preset, result["assumed"]),
                                             result["assumed"])
            assert found["steps"]["512"] == pytest.approx(r["steps"]["512"])
            peak = bench["scale_memory"].memory(preset)["peak"]  # a little of it is torch's own choice
            assert peak == pytest.approx(result["memory"][r["preset"]]["peak"], rel=0.05)
    text = report.scale("scale.json")
    assert "Predicted, not measured." in text and "Assumed of a GPU" in text
    timings = {"network": "mnist_a", "cores": 2, "latency_s": 2e-4, "bandwidth": 3e9, "wait_s": 7e-4,
               "errors": {"2": {"median": 0.125, "most": 0.5}},
               "eat": [{"world": 4, "predicted_s": 0.11, "measured_s": 0.1, "communication_s": 0.01}]}
    words, rows = report.scale_checks({**result, "timings": timings})
    assert "0.20 ms, 3.00 GB/s" in words and "2 processes: median 12%, most 50%" in words and "load average" in words
    assert "| mnist_a, EAT under 4 gloo processes, ms a step | 110.0 | 100.0 | +10.0% |" in rows
    assert "gloo" not in "".join(report.scale_checks({**result, "timings": None}))


def test_costs_of_one_process(bench):
    torch.manual_seed(0)
    found = bench["scale_gloo"].costs("mnist_a", 4, seconds=0.01)
    assert set(found) == {"forward", "train", "update", "live", "static"} and min(found.values()) > 0
