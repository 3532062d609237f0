"""ensemble_linear against what users write, at the shapes of ensembles' classifiers: verified, then timed.

    python bench/ensemble_linear.py --out bench/results/ensemble_linear_cpu.json

For every shape and dtype: "users" (baddbmm with bias, ReLU; bmm after autograd's ReLU gradient), the op, and its
kernel alone, "ours", where the op takes torch's product by its table (OURS_UP_TO in ops/ensemble_linear.py). With
--ways torch's product with one pass of ours too, from which that table is made. Errors are ratios to users' own,
against float64, on up to CHECKED samples; more than 2 fails, where there are outputs enough to tell. Rounds interleave
the contenders until the ratios are known to 3 percent, or for --seconds each.

The file is written after every row, and a run goes on where the last one of the same commit stopped (--again: measures
what it has too). Rows of other commits are measured anew where they are asked for, and stay otherwise.
"""
import argparse
import itertools
import json
import statistics
import sys
from dataclasses import astuple
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor

from ensadv_fast.bench.contenders import DTYPES, copy_arguments
from ensadv_fast.bench.quick import to_json
from ensadv_fast.bench.stamp import stamp
from ensadv_fast.bench.timing import cache_bytes, sets_to_rotate, time_ratios, time_replay
from ensadv_fast.ops import ensemble_linear, ensemble_linear_grad

MODULE = sys.modules["ensadv_fast.ops.ensemble_linear"]
TABLE = MODULE.OURS_UP_TO
WAYS = {"ours": {}, "torch's": dict.fromkeys(MODULE.CASES, -1)}
MEMBERS, BATCHES, WIDTHS = (2, 4, 8), (64, 256), (300, 784, 1000, 2048)
CHECKED = 32
ENOUGH = 1000  # outputs: the error of a few is chance
KEY = ("direction", "dtype", "members", "batch", "outputs", "inputs")


def users(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.mT).relu()


def users_grad(grad: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(torch.ops.aten.threshold_backward(grad, y, 0), weight)


def contenders(direction: str, args: tuple[Tensor, ...], ways: bool = True) -> dict:
    """Zero-argument functions that give the result; "ours", or both ways, beside the op where it is the other."""
    if direction == "forward":
        found = {"users": lambda: users(*args)}

        def function():
            return ensemble_linear(*args, act="relu")[0]
    else:
        grad, weight, y, mask = args
        found = {"users": lambda: users_grad(grad, weight, y)}

        def function():
            return ensemble_linear_grad(grad, weight, mask)

    def by(table):
        def call():
            MODULE.OURS_UP_TO = table
            return function()
        return call
    taken = way(direction, args)
    others = [name for name in WAYS if name != taken and (ways or name == "ours")]
    return found | {"op": by(TABLE)} | {name: by(WAYS[name]) for name in others}


def way(direction: str, args: tuple[Tensor, ...]) -> str:
    """Which one the op takes."""
    MODULE.OURS_UP_TO = TABLE
    return "ours" if MODULE.ours_is_faster(args[0], direction, args[1], args[0].shape[1]) else "torch's"


@lru_cache(maxsize=1)
def numbers(members: int, batch: int, outputs: int, inputs: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(members, batch, inputs, generator=g)
    weight = torch.randn(members, outputs, inputs, generator=g) / inputs**0.5
    return x, weight, torch.randn(members, outputs, generator=g)


def arguments(direction: str, dtype: torch.dtype, device: str, *sizes: int) -> tuple[Tensor, ...]:
    x, weight, bias = (t.to(device, dtype) for t in numbers(*sizes))
    if direction == "forward":
        return x, weight, bias
    y, mask = ensemble_linear(x, weight, bias, act="relu")
    return y.roll(1, 0), weight, y, mask


def errors(direction: str, args: tuple[Tensor, ...], calls: dict) -> dict[str, float]:
    """Of samples that are spread over the batch, member after member."""
    batch = args[0].shape[1]
    some = torch.arange(0, batch, -(-batch // CHECKED), device=args[0].device)
    results = {name: call()[:, some] for name, call in calls.items()}
    squares = dict.fromkeys(calls, 0.0)
    for k in range(len(args[0])):
        first, weight, *more = (t[k:k + 1] for t in args[:3])
        if direction == "forward":
            exact = users(first[:, some].double(), weight.double(), more[0].double())
        else:
            exact = users_grad(first[:, some].double(), weight.double(), more[0][:, some].double())
        for name, result in results.items():
            squares[name] += (result[k:k + 1].double() - exact).square().sum().item()
    return {name: (s / squares["users"]) ** 0.5 if s else 0.0 for name, s in squares.items()}


def measure(row: dict, device: str, seconds: float, ways: bool) -> dict:
    direction, dtype, *sizes = row.values()
    args = arguments(direction, DTYPES[dtype], device, *sizes)
    calls = contenders(direction, args, ways)
    found = errors(direction, args, calls)
    outputs = sizes[0] * min(sizes[1], CHECKED) * sizes[2 if direction == "forward" else 3]
    if max(found.values()) > 2 and outputs >= ENOUGH:
        raise SystemExit(f"{row}: errors are {found} times those of users' own")
    timings, ratios = time_ratios(calls, "users", seconds, device)
    row = {**row, "way": way(direction, args), "errors": found, "ms": medians(timings),
           "ratio": {name: astuple(r) for name, r in ratios.items()}}
    if device == "cuda":
        sets = sets_to_rotate(sum(t.nbytes for t in args), cache_bytes())
        many = [contenders(direction, copy_arguments(args, {})[0], ways) for _ in range(sets)]
        replayed, missing = time_replay({name: [one[name] for one in many] for name in calls}, seconds)
        row |= {"graph": medians(replayed), "graph_missing": missing}
    return row


def key_of(row: dict) -> tuple:
    return tuple(row[k] for k in KEY)


def medians(timings: dict) -> dict[str, float]:
    return {name: t.median for name, t in timings.items()}


def summary(rows: list[dict]) -> str:
    """users' time over each contender's: median, worst and best."""
    lines = []
    for how, direction, dtype in itertools.product(("ms", "graph"), ("forward", "gradient"), DTYPES):
        some = [r for r in rows if r["direction"] == direction and r["dtype"] == dtype and how in r]
        for name in ("op", *WAYS):
            over = sorted(r[how]["users"] / r[how][name] if how == "graph" else r["ratio"][name][0]
                          for r in some if name in r[how])
            if over:
                lines.append(f"{how} {direction} {dtype} {name}: median {statistics.median(over):.2f}, worst "
                             f"{over[0]:.2f}, best {over[-1]:.2f} times users'; {len(over)} shapes, "
                             f"{sum(v < 0.95 for v in over)} below 0.95")
    return "\n".join(lines)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--directions", nargs="+", choices=["forward", "gradient"], default=["forward", "gradient"])
    parser.add_argument("--dtypes", nargs="+", choices=["float32", "bfloat16", "float16"],
                        default=["float32", "bfloat16", "float16"])
    parser.add_argument("--members", nargs="+", type=int, default=MEMBERS)
    parser.add_argument("--batches", nargs="+", type=int, default=BATCHES)
    parser.add_argument("--widths", nargs="+", type=int, default=WIDTHS, help="inputs and outputs")
    parser.add_argument("--seconds", type=float, default=0.4, help="per contender at most (default: 0.4)")
    parser.add_argument("--ways", action="store_true", help="time both ways that the op can take")
    parser.add_argument("--again", action="store_true", help="measure also what --out has of this commit")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    result = {**stamp(), "device": args.device, "threads": torch.get_num_threads()}
    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    done = {key_of(row) for row in rows if row.get("commit") == result["commit"] and not args.again}
    shapes = itertools.product(args.members, args.batches, args.widths, args.widths, args.dtypes, args.directions)
    for *shape, dtype, direction in shapes:  # of one shape one after another: all from the same numbers
        values = (direction, dtype, *shape)
        if values in done:
            continue
        row = measure(dict(zip(KEY, values, strict=True)), args.device, args.seconds, args.ways)
        rows = [old for old in rows if key_of(old) != values] + [{**row, "commit": result["commit"]}]
        print(json.dumps(row), flush=True)
        if args.out:
            args.out.write_text(to_json({**result, "load_after": stamp()["load_before"], "rows": rows}))
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
