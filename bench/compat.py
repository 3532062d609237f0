"""The drop-in backends beside the libraries they mirror: the library's own attack, and ours exact and fast.

    python bench/compat.py --out bench/results/compat_cpu.json

A case is a function of a library module, theirs or ours: each backend has its library's interface, and takes one
keyword more, the precision. FGSM and PGD-10 (without a random start), as a program calls them, with all that the
library does in such a call; on ResNet-50 FGSM alone, and on a network of a few units one image, which is the cost of a
call.

All are verified before they are timed: theirs against plain float32 autograd, ours against theirs: the same budget;
exact results equal to theirs, pixel by pixel; fast ones as strong. A library that is not installed, and a backend that
cannot be imported, are named in the JSON. Bytes are the most that one FGSM call allocates at once, beside what is there
before it (on the CPU by the profiler's record, which does not see numpy's arrays).
"""
import importlib
import os
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
from attack_step import STEPS, Call, Job, Wanted, begin, finish, options, plain, verify
from networks import NETWORKS, Network, images, settled
from torch import nn
from train_step import peak_bytes

from ensadv_fast.bench import timing

EQUAL = {"fgsm": 1.0, "pgd": 0.999}  # share of pixels in which exact results must equal the library's
OURS = {"ours, exact": {"precision": "exact"}, "ours, fast": {"precision": "fast"}}


def tiny_mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 16), nn.ReLU(), nn.Linear(16, 10))


# Batches for a CPU of two cores, on which the whole run takes some minutes.
SIZES = {n.name: n for n in (
    Network("tiny_mlp", tiny_mlp, (1, 4, 4), 10, 0.3, 1, 1, 16), replace(NETWORKS["mnist_a"], batch=32),
    replace(NETWORKS["cifar_resnet18"], batch=16), replace(NETWORKS["resnet50"], batch=2))}
ATTACKS = {"tiny_mlp": ("fgsm",), "mnist_a": ("fgsm", "pgd"), "cifar_resnet18": ("fgsm", "pgd"), "resnet50": ("fgsm",)}


# ---- cases: from a library module, theirs or ours, and a job, a call ---------------------------------------------

def torchattacks(lib: Any, job: Job, **more: str) -> Call:
    if job.attack == "fgsm":
        attack = lib.FGSM(job.net, job.eps, **more)
    else:
        attack = lib.PGD(job.net, job.eps, job.step, STEPS, random_start=False, **more)
    return lambda: attack(job.x, job.y)


def foolbox(lib: Any, job: Job, **more: str) -> Call:
    model = lib.PyTorchModel(job.net, bounds=(0, 1), device=job.x.device)
    if job.attack == "fgsm":
        attack = lib.attacks.FGSM(**more)
    else:
        attack = lib.attacks.LinfPGD(abs_stepsize=job.step, steps=STEPS, random_start=False, **more)
    return lambda: attack(model, job.x, job.y, epsilons=job.eps)[1]


def cleverhans(lib: Any, job: Job, **more: str) -> Call:
    norm, clip = float("inf"), {"clip_min": 0.0, "clip_max": 1.0, "y": job.y}
    if job.attack == "fgsm":
        return lambda: lib.fast_gradient_method(job.net, job.x, job.eps, norm, **clip, **more)
    # The library's sanity checks fail on CUDA tensors.
    return lambda: lib.projected_gradient_descent(job.net, job.x, job.eps, job.step, STEPS, norm, **clip,
                                                  rand_init=False, sanity_checks=job.x.is_cpu, **more)


def art(lib: Any, job: Job, **more: str) -> Call:
    from art.estimators.classification import PyTorchClassifier
    classes = job.net(job.x[:1]).shape[1]
    given = PyTorchClassifier(job.net, nn.CrossEntropyLoss(), tuple(job.x.shape[1:]), classes, clip_values=(0.0, 1.0),
                              device_type="gpu" if job.x.is_cuda else "cpu")
    x, y = job.x.cpu().numpy(), job.y.cpu().numpy()
    if job.attack == "fgsm":
        attack = lib.FastGradientMethod(given, eps=job.eps, batch_size=len(x), **more)
    else:
        attack = lib.ProjectedGradientDescentPyTorch(given, eps=job.eps, eps_step=job.step, max_iter=STEPS,
                                                     batch_size=len(x), verbose=False, **more)
    return lambda: attack.generate(x, y)


def _cleverhans() -> Any:
    """Its two functions, which lie in modules of their own."""
    names = "fast_gradient_method", "projected_gradient_descent"
    return SimpleNamespace(**{n: getattr(importlib.import_module(f"cleverhans.torch.attacks.{n}"), n) for n in names})


@dataclass(frozen=True)
class Library:
    """case: a call from a library module. theirs: imports the library; ours: the backend's module."""

    name: str
    case: Callable[..., Call]
    theirs: Callable[[], Any]
    ours: str


def _library(case: Callable[..., Call], theirs: Callable[[], Any]) -> Library:
    return Library(case.__name__, case, theirs, f"ensadv_fast.compat.{case.__name__}")


LIBRARIES = {lib.name: lib for lib in (
    _library(torchattacks, lambda: importlib.import_module("torchattacks")),
    _library(foolbox, lambda: importlib.import_module("foolbox")), _library(cleverhans, _cleverhans),
    _library(art, lambda: importlib.import_module("art.attacks.evasion")))}


def imported(load: Callable[[], Any]) -> tuple[Any, str | None]:
    """(the module, None), or (None, why there is none)."""
    try:
        return load(), None
    except ImportError as error:
        return None, f"{type(error).__name__}: {error}"


# ---- verification ------------------------------------------------------------------------------------------------

def checked(job: Job, wanted: Wanted, theirs: Wanted | None, name: str, call: Call) -> dict[str, float]:
    """What a contender's results are worth: theirs beside plain float32's, ours beside theirs. AssertionError."""
    found = verify(job, wanted if theirs is None else theirs, call)
    equal, least = found["equal_pixels"], EQUAL[job.attack]
    if theirs is not None and name == "ours, exact" and not equal >= least:
        raise AssertionError(f"{equal:.4%} of pixels equal the library's, wanted {least:.1%}")
    return found


# ---- the run -----------------------------------------------------------------------------------------------------

def row(library: Library, theirs: Any, network: Network, net: nn.Module, attack: str, batch: int, device: str,
        seconds: float, least: int) -> dict:
    """One library, network and attack: theirs and ours verified, then timed in turn."""
    job = Job(net, *images(network, batch, device), attack, network.eps)
    ours, why = imported(lambda: importlib.import_module(library.ours))
    calls: dict[str, Call] = {}
    cells: dict[str, dict] = {}
    left_out = {} if ours else {name: f"{library.ours} cannot be imported: {why}" for name in OURS}
    plainly, reached = plain(job), None
    modules: dict[str, tuple[ModuleType, dict[str, str]]] = {"theirs": (theirs, {})}
    modules |= {name: (ours, more) for name, more in OURS.items() if ours}
    for name, (module, more) in modules.items():
        call = library.case(module, job, **more)
        try:
            cells[name] = checked(job, plainly, reached, name, call)
        except AssertionError as error:
            left_out[name] = str(error)
            continue
        if name == "theirs":
            result = torch.as_tensor(call(), device=device).detach().float()
            reached = replace(plainly, results=[result])
        calls[name] = call
        if attack == "fgsm":
            cells[name]["bytes"] = peak_bytes(call, device)
    load = os.getloadavg()
    for name, t in timing.time_calls(calls, seconds, device, least).items():
        cells[name].update(ms=t.median, quartiles=t.quartiles, best=t.best)
    return {"library": library.name, "network": network.name, "attack": attack, "shape": list(job.x.shape),
            "eps": job.eps, "contenders": cells, "left_out": left_out, "load_before": load,
            "load_after": os.getloadavg()}


def _line(r: dict) -> str:
    lines = [f"{r['library']} {r['attack']}, {r['network']}, {'x'.join(map(str, r['shape']))}"]
    for name, c in r["contenders"].items():
        memory = f", {c['bytes'] / 2**20:.2f} MiB" if "bytes" in c else ""
        lines.append(f"  {c['ms']:9.3f} ms{memory}  {name} (loss increase {c['loss_increase']:.3f}, "
                     f"{c['equal_pixels']:.2%} of pixels equal)")
    return "\n".join(lines + [f"  LEFT OUT: {name}: {why}" for name, why in r["left_out"].items()])


def main(argv: list[str]) -> int:
    parser = options(__doc__, list(SIZES), 0.5, SIZES)
    parser.add_argument("--libraries", nargs="+", choices=list(LIBRARIES), default=list(LIBRARIES))
    parser.set_defaults(least=5)
    args = parser.parse_args(argv)
    result = begin(args)
    missing = []
    networks = [SIZES[name] for name in args.networks]
    missing += [f"{n.name}: needs {' or '.join(n.needs)}" for n in networks if not n.installed]
    for name in args.libraries:
        theirs, why = imported(LIBRARIES[name].theirs)
        if theirs is None:
            missing.append(f"{name}: {why}")
            continue
        for network in [n for n in networks if n.installed]:
            net = settled(network, args.device)
            batch = args.batch or (network.gpu_batch if args.device == "cuda" else network.batch)
            for attack in ATTACKS[network.name]:
                result["rows"].append(row(LIBRARIES[name], theirs, network, net, attack, batch, args.device,
                                          args.seconds, args.least))
                print(_line(result["rows"][-1]), flush=True)
    result["missing"] = missing
    for line in missing:
        print("MISSING:", line)
    finish(result, args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
