"""Scale on paper: EAT on 8, 64 and 512 GPUs by a cost model, and what a GPU's memory must hold.

    python bench/scale.py               # everything, under five minutes on an idle machine; bench/results/scale.json
    python bench/scale.py --no-timings  # what does not depend on the machine: counts and predictions

The formulas stand in bench/scale_model.py and bench/scale_memory.py. Gradient bytes, operations and what autograd keeps
are counted on the real networks (timm). What a GPU and its links do was not measured but is assumed, by options; with
--costs FILE (JSON: preset -> {"train", "live", "static": [...], "update"} in seconds) the costs of images are those
of the file instead. The model's communication and its step are checked against 1, 2 and 4 gloo processes on this CPU,
its sum over sources against bench/results/train_step_cpu.json, its memory against the allocator's record of a step.
"""
from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
from dataclasses import asdict, replace
from pathlib import Path

import scale_gloo
import scale_memory
import scale_model
import torch
from scale_memory import PRESETS, Network, Preset
from scale_model import Cluster, Costs, Link
from torch.utils.flop_counter import FlopCounterMode

from ensadv_fast.bench.stamp import stamp
from ensadv_fast.system import machine

RESULTS = Path(__file__).parent / "results"
WORLDS = (8, 64, 512)
CHECKED, CHECKED_BATCH = "mnist_a", 32
# (option, default, what it is). The defaults are round numbers of the order of today's accelerators and of ResNet-50 in
# training on them.
ASSUMED = (
    ("tflops_float32", 25.0, "sustained in convolutional training in float32 (TF32), 10^12 operations a second"),
    ("tflops_bfloat16", 60.0, "the same in bfloat16, also of static sources"),
    ("memory_tb", 2.0, "memory bandwidth that an optimizer reaches, 10^12 bytes a second"),
    ("per_node", 8, "GPUs of a node"),
    ("inside_gb", 200.0, "bandwidth of the ring in a node, 10^9 bytes a second"),
    ("inside_us", 5.0, "latency of a message in a node, microseconds"),
    ("between_gb", 40.0, "bandwidth of a node to others, 10^9 bytes a second"),
    ("between_us", 15.0, "latency of a message between nodes, microseconds"),
    ("loader", 100.0, "images a second of one loader process"),
    ("loaders", 12, "loader processes of a GPU"),
)


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default, words in ASSUMED:
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default,
                            help=f"assumed, not measured: {words} ({default:g})")
    parser.add_argument("--costs", type=Path, help="measured seconds of images, by preset")
    parser.add_argument("--no-timings", action="store_true", help="measure nothing; keep no timings")
    parser.add_argument("--out", type=Path, default=RESULTS / "scale.json")
    return parser


# ---- counted ---------------------------------------------------------------------------------------------------------

def operations(network: Network, train: bool = False) -> float:
    """Floating-point operations (two a multiply-add) of a forward pass of one image: convolutions and products."""
    net, x = network.make("meta").train(train), network.images(2, "meta")
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        net(x)
    return counter.get_total_flops() / 2


def gpu_costs(preset: Preset, assumed: dict[str, float]) -> Costs:
    """By operations over assumed rates: training does three forward passes' worth, crafting two; the optimizer reads
    and writes weights, gradients, its buffers and the EMA."""
    rate = {dtype: 1e12 * assumed[f"tflops_{dtype}"] for dtype in ("float32", "bfloat16")}
    forward = operations(preset.model, train=True)
    passes = 3 + 2 * preset.states + 3 * preset.ema
    return Costs(train=3 * forward / rate[preset.dtype],
                 live=2 * operations(preset.model) / rate[preset.dtype],
                 static=tuple(2 * operations(s) / rate["bfloat16"] for s in preset.static),
                 update=passes * scale_memory.gradient_bytes(preset.model) / (1e12 * assumed["memory_tb"]))


def cluster(assumed: dict[str, float], loads: bool) -> Cluster:
    """loads: whether images are decoded by loader processes; small data sets lie in the GPU's memory."""
    inside = Link(assumed["inside_us"] / 1e6, 1e9 * assumed["inside_gb"])
    between = Link(assumed["between_us"] / 1e6, 1e9 * assumed["between_gb"])
    return Cluster(int(assumed["per_node"]), inside, between,
                   loader=assumed["loader"] * assumed["loaders"] if loads else math.inf)


def predicted(preset: Preset, costs: Costs, assumed: dict[str, float]) -> dict:
    """A preset's steps on 1, 8, 64 and 512 GPUs, each with the preset's batch, beside clean training."""
    nbytes, on = scale_memory.gradient_bytes(preset.model), cluster(assumed, loads=preset.model.size > 32)
    steps = {w: scale_model.step(costs, preset.batch, w, nbytes, on, fraction=preset.fraction, append=preset.append)
             for w in (1, *WORLDS)}
    clean = scale_model.step(replace(costs, live=None, static=()), preset.batch, 1, nbytes, on)
    return {"preset": preset.name, "batch": preset.batch, "gradient_bytes": nbytes, "costs": asdict(costs),
            "over_clean": steps[1].compute / clean.compute, "steps": {str(w): asdict(s) for w, s in steps.items()}}


# ---- checked ---------------------------------------------------------------------------------------------------------

def check_sources(file: Path = RESULTS / "train_step_cpu.json") -> list[dict]:
    """From a clean step, FGSM-AT and one static source alone, as measured, the model says what one to three static
    sources beside the live model take; the file has that measured too."""
    rows = []
    for r in json.loads(file.read_text())["rows"]:
        ms = {name: c["ms"] for name, c in r["contenders"].items()}
        clean, batch = ms["clean"], r["shape"][0]
        crafted = batch / 2
        live, static = ((ms[name] - clean) / crafted for name in ("FGSM-AT", "EAT, 1 static alone"))
        for n in (1, 2, 3):
            costs = Costs(clean / batch, live, (static,) * n)
            guess = scale_model.step(costs, batch, 1, 0.0, Cluster(1, Link(0, 1), Link(0, 1))).seconds
            rows.append({"network": r["network"], "static": n, "predicted_ms": guess, "measured_ms":
                         ms[f"EAT, {n} static"]})
    return rows


def check_memory() -> list[dict]:
    """A clean float32 step with momentum, from the making of network and optimizer on: estimated, and the most that the
    CPU's allocator had given out at once."""
    import train_step
    rows = []
    for name, model in (("mnist_a", scale_memory.MNIST), ("cifar_resnet18", scale_memory.CIFAR)):
        network = train_step.NETWORKS[name]
        plain = Preset(name, model, (), network.train_batch, 1, fraction=0.0)
        parts = scale_memory.memory(plain, distributed=False)

        def whole(network=network) -> train_step.Trainer:
            trainer = train_step.Trainer(network, "clean", network.train_batch, "cpu")
            trainer.round()
            trainer.round()
            return trainer

        estimated = parts["peak"] - parts["images"] / 2  # a clean step has its images once
        rows.append({"network": network.name, "batch": plain.batch, "estimated_bytes": estimated,
                     "measured_bytes": train_step.peak_bytes(whole, "cpu")})
    return rows


def check_gloo(measured: list[dict], nbytes: int, cores: int) -> dict:
    """Two parameters are fitted to every other size of the all-reduces of two processes, and where more processes run
    than there are cores a third one to the smallest of theirs. The errors are those of everything else."""
    points = [(m["world"], n, s) for m in measured for n, s in zip(m["bytes"], m["all_reduce"])]
    used = [p for p in points if p[0] == 2][::2]
    crowded = next((p for p in points if p[0] > cores), None)
    fitted = scale_model.fit(used, cores, crowded)
    rows = [{"world": w, "bytes": n, "measured_s": s, "predicted_s": fitted.seconds(w, n),
             "fitted": (w, n, s) in [*used, crowded]} for w, n, s in points]
    errors = {}
    for world in sorted({w for w, _, _ in points}):
        off = [abs(r["predicted_s"] / r["measured_s"] - 1) for r in rows if r["world"] == world and not r["fitted"]]
        errors[str(world)] = {"median": statistics.median(off), "most": max(off)}
    by_world = {m["world"]: m for m in measured}
    part = by_world[1]["costs"]
    costs = Costs(part["train"], part["live"], (part["static"],) * scale_gloo.STATIC, part["update"])
    steps = []
    for world, m in by_world.items():
        link = fitted.shared(world)
        # How these processes slow each other down on their cores: measured where they do not communicate.
        apart = m["clean_apart"] / by_world[1]["clean_apart"]
        guess = scale_model.step(costs, CHECKED_BATCH, world, nbytes, Cluster(world, link, link, overlap=False),
                                 slowdown=apart)
        steps.append({"world": world, "measured_s": m["eat"], "predicted_s": guess.seconds,
                      "communication_s": guess.communication, "slowdown": apart})
    return {"latency_s": fitted.link.latency, "bandwidth": fitted.link.bandwidth, "wait_s": fitted.wait, "cores": cores,
            "all_reduce": rows, "errors": errors, "eat": steps}


def main(argv: list[str] | None = None) -> int:
    args = options().parse_args(argv)
    torch.set_num_threads(1)  # what is counted needs no more, and timings are those of one thread a process
    assumed = {name: getattr(args, name) for name, _, _ in ASSUMED}
    given = json.loads(args.costs.read_text()) if args.costs else {}
    result = {**stamp(), "assumed": assumed, "predicted": [], "memory": {}}
    for name, preset in PRESETS.items():
        costs = Costs(**{**given[name], "static": tuple(given[name]["static"])}) if name in given else gpu_costs(
            preset, assumed)
        row = {**predicted(preset, costs, assumed), "costs_are": "measured" if name in given else "assumed"}
        result["predicted"].append(row)
        result["memory"][name] = scale_memory.memory(preset)
        rates = ", ".join(f"{w} GPUs {row['steps'][str(w)]['images_per_second']:,.0f}" for w in WORLDS)
        print(f"{name}: images/s on {rates}; {result['memory'][name]['peak'] / 1e9:.2f} GB", flush=True)
    result |= {"sources_check": check_sources(), "memory_check": check_memory(), "timings": None}
    if not args.no_timings:
        measured = scale_gloo.measure(CHECKED, CHECKED_BATCH)
        nbytes = scale_memory.gradient_bytes(scale_memory.MNIST)
        result["timings"] = {"network": CHECKED, "batch": CHECKED_BATCH, "measured": measured,
                             **check_gloo(measured, nbytes, machine.cores())}
        print(json.dumps({k: result["timings"][k] for k in ("errors", "eat")}, indent=1))
    args.out.write_text(json.dumps({**result, "load_after": os.getloadavg()}, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
