"""Whole attacks on whole networks: the peer libraries as installed, the best a careful user gets today, and ours.

    python bench/attack_step.py --networks mnist_a resnet50 --attacks fgsm --out bench/results/attack_step_cpu.json

FGSM, R+FGSM, Step-LL and PGD-10 (without a random start, so that results can be compared). Every contender is verified
before it is timed: the same budget, and as strong as plain float32 autograd on the same network. Rounds interleave the
contenders. A package that is not installed, and an attack that a library does not have, leaves its contender out.

Networks are trained for a few steps first and their running statistics taken from data: a freshly initialised residual
network has dead branches and gives all figures away. `--add` keeps the rows of other networks and attacks in the file.
"""
import argparse
import copy
import importlib.util
import json
import os
import sys
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from networks import NETWORKS, Network, images, settled
from torch import Tensor, nn

import ensadv_fast as ea
from ensadv_fast.bench import timing
from ensadv_fast.bench.quick import to_json
from ensadv_fast.bench.stamp import stamp

ATTACKS = ("fgsm", "rand_fgsm", "step_ll", "pgd")
STEPS = 10
ENOUGH = 0.97  # of plain float32's loss increase: what a contender must reach to be timed
ENOUGH_RANDOM, DRAWS = 0.9, 4  # where random starts differ: of the mean over so many draws

Call = Callable[[], Tensor]


@dataclass(frozen=True)
class Job:
    """What every contender is given: a network in eval mode, one batch, an attack and its size."""

    net: nn.Module
    x: Tensor
    y: Tensor
    attack: str
    eps: float

    @property
    def step(self) -> float:
        """Of PGD: the default of `ensadv_fast.pgd`."""
        return 2.5 * self.eps / STEPS


# ---- contenders: from a job, a call; None where the library does not have the attack -----------------------------

def torchattacks(job: Job) -> Call:
    import torchattacks
    if job.attack == "pgd":
        attack = torchattacks.PGD(job.net, job.eps, job.step, STEPS, random_start=False)
    elif job.attack == "rand_fgsm":  # with its default steps it would be another attack
        attack = torchattacks.RFGSM(job.net, job.eps, job.eps / 2, steps=1)
    else:
        attack = torchattacks.FGSM(job.net, job.eps)
    if job.attack == "step_ll":
        attack.set_mode_targeted_least_likely(quiet=True)
    return lambda: attack(job.x, job.y)


class _Careful(nn.Module):
    """Frozen, channels_last, compiled, under bfloat16 autocast."""

    def __init__(self, net: nn.Module):
        super().__init__()
        self.net = copy.deepcopy(net).requires_grad_(False).to(memory_format=torch.channels_last)
        self.anchor = nn.Parameter(torch.zeros((), device=next(net.parameters()).device))  # tells torchattacks where
        self.compiled = torch.compile(self.net)

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, torch.bfloat16):
            return self.compiled(x).float()


def careful(job: Job) -> Call:
    torch._dynamo.reset()
    x = job.x.contiguous(memory_format=torch.channels_last)
    return torchattacks(replace(job, net=_Careful(job.net).eval(), x=x))


def _least_likely(job: Job) -> Tensor:
    with torch.no_grad():
        return job.net(job.x).argmin(1)


def foolbox(job: Job) -> Call | None:
    import foolbox
    if job.attack == "rand_fgsm":
        return None
    model = foolbox.PyTorchModel(job.net, bounds=(0, 1), device=job.x.device)
    if job.attack == "step_ll":  # its FGSM refuses targets; one step of PGD does not
        attack = foolbox.attacks.LinfPGD(abs_stepsize=job.eps, steps=1, random_start=False)
        criterion = foolbox.criteria.TargetedMisclassification
        return lambda: attack.run(model, job.x, criterion(_least_likely(job)), epsilon=job.eps)
    attack = foolbox.attacks.LinfPGD(abs_stepsize=job.step, steps=STEPS, random_start=False)
    if job.attack == "fgsm":
        attack = foolbox.attacks.FGSM(random_start=False)
    return lambda: attack.run(model, job.x, foolbox.criteria.Misclassification(job.y), epsilon=job.eps)


def cleverhans(job: Job) -> Call | None:
    import numpy as np
    from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
    from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent
    clip = {"clip_min": 0.0, "clip_max": 1.0}
    if job.attack == "rand_fgsm":
        return None
    if job.attack == "pgd":
        # Its sanity checks fail on CUDA tensors.
        return lambda: projected_gradient_descent(job.net, job.x, job.eps, job.step, STEPS, np.inf, **clip, y=job.y,
                                                  rand_init=False, sanity_checks=job.x.is_cpu)
    if job.attack == "step_ll":
        return lambda: fast_gradient_method(job.net, job.x, job.eps, np.inf, **clip, y=_least_likely(job),
                                            targeted=True)
    return lambda: fast_gradient_method(job.net, job.x, job.eps, np.inf, **clip, y=job.y)


def art(job: Job) -> Call | None:
    import numpy as np
    from art.attacks.evasion import FastGradientMethod, ProjectedGradientDescentPyTorch
    from art.estimators.classification import PyTorchClassifier
    if job.attack == "rand_fgsm":
        return None
    given = PyTorchClassifier(job.net, nn.CrossEntropyLoss(), job.x.shape[1:], job.net(job.x[:1]).shape[1],
                              clip_values=(0.0, 1.0), device_type="gpu" if job.x.is_cuda else "cpu")
    x, y, batch = job.x.cpu().numpy(), job.y.cpu().numpy(), {"batch_size": len(job.x)}
    if job.attack == "pgd":
        attack = ProjectedGradientDescentPyTorch(given, eps=job.eps, eps_step=job.step, max_iter=STEPS, verbose=False,
                                                 **batch)
    else:
        attack = FastGradientMethod(given, eps=job.eps, targeted=job.attack == "step_ll", **batch)
    if job.attack == "step_ll":
        return lambda: attack.generate(x, given.predict(x, **batch).argmin(1).astype(np.int64))
    return lambda: attack.generate(x, y)


def ours(**how) -> Callable[[Job], Call]:
    """On a prepared source; without arguments on the network as it is."""
    def make(job: Job) -> Call:
        source = ea.Source(job.net, **how) if how else job.net
        constructor = {"fgsm": ea.fgsm, "rand_fgsm": ea.rand_fgsm, "step_ll": ea.step_ll, "pgd": ea.pgd}[job.attack]
        more = {"step": job.step, "steps": STEPS, "random_start": False} if job.attack == "pgd" else {}
        attack = constructor(job.eps, **more)
        return lambda: attack(source, job.x, job.y)
    return make


@dataclass(frozen=True)
class Contender:
    """needs: the package that must be installed. device: where it differs from the others; None: anywhere."""

    name: str
    make: Callable[[Job], Call | None]
    needs: str = "torch"
    device: str | None = None

    @property
    def installed(self) -> bool:
        return importlib.util.find_spec(self.needs) is not None


CONTENDERS = (
    Contender("torchattacks", torchattacks, "torchattacks"),
    Contender("foolbox", foolbox, "foolbox"),
    Contender("cleverhans", cleverhans, "cleverhans"),
    Contender("art", art, "art"),
    Contender("torchattacks, compiled, bfloat16 autocast, channels_last", careful, "torchattacks"),
    Contender("ours, plain module", ours()),
    Contender("ours, exact source", ours(dtype=torch.float32, fold=False, channels_last=False)),
    Contender("ours, float32 source", ours(dtype=torch.float32)),
    Contender("ours, no graph", ours(dtype="auto", cuda_graph=False), device="cuda"),
    Contender("ours", ours(dtype="auto")),
)


# ---- verification ------------------------------------------------------------------------------------------------

@dataclass(frozen=True)
class Wanted:
    """Plain float32 autograd's results, one or DRAWS, the labels it looked at, and the sign that its loss moves in."""

    net: nn.Module
    x: Tensor
    results: list[Tensor]
    labels: Tensor
    sign: float

    def gain(self, results: list[Tensor]) -> float:
        """How far the loss moved where the attack wants it."""
        with torch.no_grad():
            clean, *moved = (F.cross_entropy(self.net(v).double(), self.labels) for v in (self.x, *results))
        return self.sign * (sum(moved) / len(moved) - clean).item()


def plain(job: Job) -> Wanted:
    """The attack as one writes it down; R+FGSM with starts of its own."""
    labels, sign = (_least_likely(job), -1.0) if job.attack == "step_ll" else (job.y, 1.0)
    steps, step = (STEPS, job.step) if job.attack == "pgd" else (1, job.eps)
    starts, g = [job.x], torch.Generator().manual_seed(2)
    if job.attack == "rand_fgsm":
        step = job.eps / 2
        noise = torch.randn(DRAWS, *job.x.shape, generator=g).sign().to(job.x.device)
        starts = [(job.x + step * n).clamp(0, 1) for n in noise]
    results = []
    for x in starts:
        for _ in range(steps):
            leaf = x.detach().requires_grad_()
            (grad,) = torch.autograd.grad(F.cross_entropy(job.net(leaf), labels, reduction="sum"), leaf)
            x = x + sign * step * grad.sign()
            x = torch.min(torch.max(x, job.x - job.eps), job.x + job.eps).clamp(0, 1)
        results.append(x)
    return Wanted(job.net, job.x, results, labels, sign)


def verify(job: Job, wanted: Wanted, call: Call) -> dict[str, float]:
    """What its results are worth beside plain float32's; AssertionError where they break the budget or are too weak."""
    results = [torch.as_tensor(call(), device=job.x.device).detach().float() for _ in wanted.results]
    for got in results:
        if got.shape != job.x.shape:
            raise AssertionError(f"shape {tuple(got.shape)} instead of {tuple(job.x.shape)}")
        size = (got.double() - job.x.double()).abs().max().item()
        if not size <= job.eps + 2e-7 or not 0 <= got.min().item() <= got.max().item() <= 1:
            raise AssertionError(f"out of the budget: {size} from x, eps {job.eps}, in [{got.min()}, {got.max()}]")
    ratio = wanted.gain(results) / wanted.gain(wanted.results)
    if not ratio >= (ENOUGH_RANDOM if job.attack == "rand_fgsm" else ENOUGH):
        raise AssertionError(f"too weak: {ratio:.3f} of the loss increase of plain float32")
    found = {"loss_increase": ratio}
    if job.attack != "rand_fgsm":
        found["equal_pixels"] = ((results[0] - wanted.results[0]).abs() <= 1e-6).float().mean().item()
    return found


# ---- the run -----------------------------------------------------------------------------------------------------

def row(network: Network, net: nn.Module, attack: str, batch: int, device: str, contenders: list[Contender],
        seconds: float, least: int) -> dict:
    """One network and attack: every contender verified, then all timed in turn."""
    job = Job(net, *images(network, batch, device), attack, network.eps)
    wanted = plain(job)
    calls: dict[str, Call] = {}
    cells: dict[str, dict] = {}
    left_out: dict[str, str] = {}
    for c in contenders:
        call = c.make(job)
        if call is None:
            left_out[c.name] = "does not have this attack"
            continue
        try:
            cells[c.name] = verify(job, wanted, call)
        except AssertionError as error:
            left_out[c.name] = str(error)
            continue
        calls[c.name] = call
        if device == "cuda":
            cells[c.name]["peak_bytes"] = _peak_bytes(call)
    load = os.getloadavg()
    for name, t in timing.time_calls(calls, seconds, device, least).items():
        cells[name].update(ms=t.median, quartiles=t.quartiles, best=t.best)
    return {"network": network.name, "attack": attack, "shape": list(job.x.shape), "eps": job.eps,
            "contenders": cells, "left_out": left_out, "load_before": load, "load_after": os.getloadavg()}


def _peak_bytes(call: Call) -> int:
    """What one call allocates at most beside what is there before: not the memory that graphs keep from when they
    were captured, of which "ours, no graph" tells the size."""
    for _ in range(3):  # a source captures what recurs
        call()
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    call()
    return torch.cuda.max_memory_allocated() - before


def options(about: str, networks: list[str], seconds: float,
            known: Mapping[str, Network] = NETWORKS) -> argparse.ArgumentParser:
    """What the benchmarks of whole steps may be asked."""
    parser = argparse.ArgumentParser(description=about, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--networks", nargs="+", choices=list(known), default=networks)
    parser.add_argument("--batch", type=int, default=None, help="default: the network's own")
    parser.add_argument("--seconds", type=float, default=seconds, help=f"per contender (default: {seconds:g})")
    parser.add_argument("--least", type=int, default=7, help="rounds at least (default: 7)")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch on the CPU (default: its own choice)")
    parser.add_argument("--out", metavar="FILE", help="write the stamped JSON here")
    parser.add_argument("--add", action="store_true", help="keep the other rows that FILE has")
    return parser


def begin(args: argparse.Namespace) -> dict:
    """The stamped results before the first row."""
    warnings.filterwarnings("ignore")  # compilers and peers warn about themselves
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    return {**stamp(), "device": args.device, "threads": torch.get_num_threads(), "rows": []}


def finish(result: dict, args: argparse.Namespace) -> None:
    """Writes the JSON where it is asked for; `--add`: with the rows of the old file that were not measured anew. Each
    row says of which commit it is."""
    result["load_after"] = os.getloadavg()
    if not args.out:
        return
    out = Path(args.out)
    def named(rows: list[dict]) -> dict[tuple, dict]:
        return {(r.get("library"), r["network"], r.get("attack")): r for r in rows}

    rows = named([{**r, "commit": result["commit"]} for r in result["rows"]])
    if args.add and out.exists():
        old = json.loads(out.read_text())
        rows = named([{"commit": old["commit"], **r} for r in old["rows"]]) | rows
    out.parent.mkdir(parents=True, exist_ok=True)
    out.write_text(to_json({**result, "rows": list(rows.values())}))


def _line(r: dict) -> str:
    cells = sorted(r["contenders"].items(), key=lambda item: -item[1]["ms"])
    lines = [f"{r['network']} {r['attack']} {'x'.join(map(str, r['shape']))}"]
    for name, c in cells:
        equal = f", {c['equal_pixels']:.1%} of pixels equal" if "equal_pixels" in c else ""
        lines.append(f"  {c['ms']:9.2f} ms  {name} (loss increase {c['loss_increase']:.3f}{equal})")
    return "\n".join(lines + [f"  left out: {name}: {why}" for name, why in r["left_out"].items()])


def main(argv: list[str]) -> int:
    parser = options(__doc__, list(NETWORKS), 1.0)
    parser.add_argument("--attacks", nargs="+", choices=ATTACKS, default=list(ATTACKS))
    parser.add_argument("--contenders", nargs="+", metavar="PREFIX", default=[""], help="whose names begin so")
    parser.add_argument("--no-compile", action="store_true", help="leave the compiled contender out")
    args = parser.parse_args(argv)
    result = begin(args)
    asked = [c for c in CONTENDERS if c.name.startswith(tuple(args.contenders)) and c.device in (None, args.device)
             and not (args.no_compile and c.make is careful)]
    networks = [NETWORKS[name] for name in args.networks]
    missing = sorted({c.needs for c in asked if not c.installed}
                     | {f"{' or '.join(n.needs)} ({n.name})" for n in networks if not n.installed})
    result["missing"] = missing
    for network in [n for n in networks if n.installed]:
        net = settled(network, args.device)
        batch = args.batch or (network.gpu_batch if args.device == "cuda" else network.batch)
        for attack in args.attacks:
            result["rows"].append(row(network, net, attack, batch, args.device, [c for c in asked if c.installed],
                                      args.seconds, args.least))
            print(_line(result["rows"][-1]), flush=True)
    if missing:
        print("not installed:", ", ".join(missing))
    finish(result, args)
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
