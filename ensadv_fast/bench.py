"""`ensadv-fast bench`: every op beside what one would write without it, verified, then timed, in one run.

Contenders of each case: the eager expression as users write it, the same under torch.compile, and ours, allocating
and with `out=`; beside them the machine's own copy. Rounds interleave the contenders, so that whatever disturbs one
disturbs all; medians and quartiles are reported. bench/ holds the long form of the same.
"""
import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from . import info
from .testing import CASES, Inputs, OpCase

SIZES = {"mnist": (64, 1, 28, 28), "cifar": (128, 3, 32, 32), "imagenet": (64, 3, 224, 224)}
GPU_SIZES = {**SIZES, "imagenet": (256, 3, 224, 224), "roofline": (2048, 3, 224, 224)}
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def _clip_sign(x, grad, step, lo=0.0, hi=1.0):
    return torch.clamp(x + step * grad.sign(), lo, hi)


def _torchattacks_step(x, grad, step, *, center, eps, lo=0.0, hi=1.0):
    """The seven kernels of torchattacks' PGD."""
    x = x + step * grad.sign()
    delta = torch.clamp(x - center, min=-eps, max=eps)
    return torch.clamp(center + delta, min=lo, max=hi)


def _torchattacks_momentum(x, grad, momentum, step, *, decay, center, eps):
    """torchattacks' MIFGSM: twelve kernels."""
    grad = grad / torch.mean(torch.abs(grad), dim=(1, 2, 3), keepdim=True)
    grad = grad + momentum * decay
    return _torchattacks_step(x, grad, step, center=center, eps=eps)


def _l2_direction(x, grad, step):
    norm = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    return torch.clamp(x + step * (grad / norm), 0, 1)


def _l2_step(x, grad, step, *, center, eps):
    norm = grad.flatten(1).norm(dim=1).view(-1, 1, 1, 1)
    delta = x + step * (grad / norm) - center
    length = delta.flatten(1).norm(dim=1)
    delta = delta * torch.minimum(torch.ones_like(length), eps / length).view(-1, 1, 1, 1)
    return torch.clamp(center + delta, 0, 1)


# What a user writes in place of each case: the arguments of the case, minus keys.
EAGER: dict[str, Callable[..., Tensor]] = {
    "null-copy": lambda x: x.clone(),
    "sign_step-free": _clip_sign,
    "sign_step-ball": _torchattacks_step,
    "random_step-rademacher": lambda x, key, eps, kind: torch.clamp(x + eps * torch.randn_like(x).sign(), 0, 1),
    "random_step-uniform": lambda x, key, eps, kind, clip: x + torch.empty_like(x).uniform_(-eps, eps),
    "random_step-normal": lambda x, key, eps, kind: torch.clamp(x + eps * torch.randn_like(x), 0, 1),
    "random_step-truncated_normal": lambda x, key, eps, kind: torch.clamp(
        x + torch.nn.init.trunc_normal_(torch.empty_like(x, dtype=torch.float32), 0.0, eps / 2, -eps, eps), 0, 1),
    "momentum_step-ball": _torchattacks_momentum,
    "l2_step-free": _l2_direction,
    "l2_step-ball": _l2_step,
    "project-linf": lambda x, center, eps, norm, lo: torch.clamp(
        center + torch.clamp(x - center, -eps.view(-1, 1, 1, 1), eps.view(-1, 1, 1, 1)), lo, 1),
}
RANDOM = ("random_step-",)


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one contender."""

    median: float
    quartiles: tuple[float, float]
    best: float


def finite_arguments(case: OpCase, inputs: Inputs):
    """The case's arguments without the NaN that its gradient carries for the tests."""
    args, kw = case.make(inputs)
    return tuple(a.nan_to_num(0.0) if isinstance(a, Tensor) and a.is_floating_point() else a for a in args), kw


def contenders(case: OpCase, args, kw, compiled: bool = True) -> dict[str, Callable[[], Tensor]]:
    """Zero-argument functions by name. `out=` is written where the case takes it."""
    found: dict[str, Callable[[], Tensor]] = {"ours": lambda: case.function(*args, **kw)}
    if case.image:
        out = torch.empty_like(args[0])
        found["ours out="] = lambda: case.function(*args, **kw, out=out)
    if case.name in EAGER:
        eager = EAGER[case.name]
        found["eager"] = lambda: eager(*args, **kw)
        if compiled:
            torch._dynamo.reset()
            whole = torch.compile(eager, dynamic=False)
            found["torch.compile"] = lambda: whole(*args, **kw)
    return found


def verify(case: OpCase, args, kw, functions: dict[str, Callable[[], Tensor]]) -> None:
    """Ours equals the reference; the others compute the same thing. A contender that does not is an error."""
    wanted = case.reference(*args, **kw)
    tolerance = {torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 3e-3}[args[0].dtype]
    for name, function in functions.items():
        got = function()
        if not name.startswith("ours") and case.name.startswith(RANDOM):
            ours, theirs = ((r.float() - args[0].float()).std().item() for r in (wanted, got))
            if abs(theirs - ours) > 0.05 * ours + 1e-3:
                raise AssertionError(f"{case.name}: {name} adds noise of another size: {theirs} instead of {ours}")
            continue
        worst = (got.float() - wanted.float()).abs().max().item()
        limit = 0.0 if name.startswith("ours") and case.exact else tolerance
        if not worst <= limit:
            raise AssertionError(f"{case.name}: {name} differs from the reference by {worst}, allowed {limit}")


def time_cpu(functions: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, Timing]:
    """Interleaved rounds; calls are batched until one measurement takes at least 0.2 ms."""
    repeats = {}
    for name, f in functions.items():
        f()
        start = time.perf_counter()
        f()
        repeats[name] = max(1, round(2e-4 / max(1e-7, time.perf_counter() - start)))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < deadline or min(map(len, samples.values())) < 7:
        for name, f in functions.items():
            start = time.perf_counter()
            for _ in range(repeats[name]):
                f()
            samples[name].append((time.perf_counter() - start) / repeats[name] * 1e3)
    return {name: _timing(s) for name, s in samples.items()}


def time_cuda(functions: dict[str, Callable[[], Tensor]], seconds: float) -> dict[str, Timing]:
    """Interleaved rounds between CUDA events; one measurement spans enough calls for 2 ms."""
    def span(f: Callable[[], Tensor], n: int) -> float:
        begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
        begin.record()
        for _ in range(n):
            f()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end) / n

    repeats = {}
    for name, f in functions.items():
        span(f, 3)
        repeats[name] = max(1, round(2.0 / max(1e-3, span(f, 10))))
    samples: dict[str, list[float]] = {name: [] for name in functions}
    deadline = time.perf_counter() + seconds * len(functions)
    while time.perf_counter() < deadline or min(map(len, samples.values())) < 7:
        for name, f in functions.items():
            samples[name].append(span(f, repeats[name]))
    return {name: _timing(s) for name, s in samples.items()}


def _timing(samples: list[float]) -> Timing:
    q = statistics.quantiles(samples, n=4)
    return Timing(statistics.median(samples), (q[0], q[2]), min(samples))


def stamp() -> dict:
    """Where and from what a result comes."""
    root = Path(__file__).parent.parent
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=root,
                         capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() if git.returncode == 0 else "unknown",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "build": info.build(), "runtime": info.runtime(),
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "load_before": os.getloadavg(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def run(device: str = "cpu", sizes: list[str] | None = None, dtypes: list[str] | None = None,
        cases: list[str] | None = None, seconds: float = 0.3, compiled: bool = True,
        channels_last: bool = True) -> dict:
    """Measure and return the stamped results."""
    known = GPU_SIZES if device == "cuda" else SIZES
    result = {**stamp(), "device": device, "rows": []}
    for size in sizes or list(known):
        for dtype_name in dtypes or list(DTYPES):
            dtype = DTYPES[dtype_name]
            for case in CASES:
                if cases and not any(case.name.startswith(c) for c in cases) or not case.image:
                    continue
                formats = ["contiguous"] + ["channels_last"] * (
                    channels_last and known[size][1] > 1 and dtype == torch.float32)
                for fmt in formats:
                    row = _row(case, size, known[size], dtype, dtype_name, fmt, device, seconds, compiled)
                    result["rows"].append(row)
                    print(_line(row), flush=True)
    result["load_after"] = os.getloadavg()
    return result


def _row(case: OpCase, size: str, shape, dtype, dtype_name: str, fmt: str, device: str, seconds: float,
         compiled: bool) -> dict:
    inputs = Inputs(shape, dtype, device, getattr(torch, f"{fmt}_format" if fmt == "contiguous" else fmt))
    args, kw = finite_arguments(case, inputs)
    functions = contenders(case, args, kw, compiled)
    verify(case, args, kw, functions)
    x, copy = args[0], torch.empty_like(args[0])
    functions["copy"] = lambda: copy.copy_(x)
    timings = (time_cuda if device == "cuda" else time_cpu)(functions, seconds)
    size_bytes = x.numel() * x.element_size()
    copy_rate = 2 * size_bytes / timings["copy"].median
    rows = {}
    for name, t in timings.items():
        streams = 2 if name == "copy" else case.streams
        rate = streams * size_bytes / t.median
        rows[name] = {"ms": t.median, "quartiles": t.quartiles, "best": t.best, "gb_per_s": rate / 1e6,
                      "of_copy": rate / copy_rate}
    return {"case": case.name, "size": size, "shape": list(shape), "dtype": dtype_name, "format": fmt,
            "streams": case.streams, "contenders": rows}


def _line(row: dict) -> str:
    cells = [f"{name} {c['ms']:.4g} ms ({c['of_copy']:.0%} of copy)" for name, c in row["contenders"].items()
             if name != "copy"]
    return f"{row['case']} {row['size']} {row['dtype']} {row['format']}: " + ", ".join(cells)


def regressions(old: dict, new: dict, limit: float) -> list[str]:
    """Rows of `new` whose time, in units of the copy of its own run, exceeds that of `old` by more than `limit`."""
    def ratios(result: dict) -> dict:
        return {(r["case"], r["size"], r["dtype"], r["format"], name): c["ms"] / r["contenders"]["copy"]["ms"]
                for r in result["rows"] for name, c in r["contenders"].items() if name.startswith("ours")}

    before, after = ratios(old), ratios(new)
    return [f"{' '.join(k)}: {after[k] / before[k]:.2f} times the old time, copies counted out"
            for k in before.keys() & after.keys() if after[k] > limit * before[k]]


def main(argv: list[str]) -> int:
    parser = argparse.ArgumentParser(prog="ensadv-fast bench", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(GPU_SIZES), default=None)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=["float32", "bfloat16"])
    parser.add_argument("--cases", nargs="+", metavar="PREFIX", help="only cases whose names begin so")
    parser.add_argument("--seconds", type=float, default=0.1, help="per contender (default: 0.1)")
    parser.add_argument("--no-compile", action="store_true", help="leave torch.compile out")
    parser.add_argument("--out", metavar="FILE", help="write the stamped JSON here")
    parser.add_argument("--compare", metavar="OLD.json", help="exit 1 if ours became slower than in OLD.json")
    parser.add_argument("--limit", type=float, default=1.25, help="ratio that counts as slower (default: 1.25)")
    args = parser.parse_args(argv)
    old = json.loads(Path(args.compare).read_text()) if args.compare else None
    result = run(args.device, args.sizes, args.dtypes, args.cases, args.seconds, not args.no_compile)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(json.dumps(result, indent=1))
    slower = regressions(old, result, args.limit) if old else []
    for line in slower:
        print(f"slower: {line}", file=sys.stderr)
    return 1 if slower else 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
