"""ensemble_linear against what users write, at the shapes of ensembles' classifiers: verified, then timed.

    python bench/ensemble_linear.py --out bench/results/ensemble_linear_cpu.json

For every shape and dtype, four contenders: "users" (baddbmm with bias, ReLU; bmm after autograd's ReLU gradient), the
op, and the op's two ways alone: "ours", its kernel, and "torch's", torch's product with one pass of ours. Errors are
ratios to users' own, against float64; more than 2 fails, where there are outputs enough to tell. Rows in which the op
was the slower are measured again, AGAIN times as long. The op's table (OURS_UP_TO in ops/ensemble_linear.py) comes from
here. Rows that --out has already and that are not measured again stay. All takes some four minutes on two cores.
"""
import argparse
import itertools
import json
import statistics
import sys
from pathlib import Path

import torch
from torch import Tensor

from ensadv_fast.bench import dumped, stamp
from ensadv_fast.contenders import DTYPES, copied
from ensadv_fast.ops import ensemble_linear, ensemble_linear_grad
from ensadv_fast.timing import cache_bytes, sets_to_rotate, time_calls, time_replay

MODULE = sys.modules["ensadv_fast.ops.ensemble_linear"]
TABLE = MODULE.OURS_UP_TO
WAYS = {"op": TABLE, "ours": {}, "torch's": dict.fromkeys(MODULE.CASES, -1)}
MEMBERS, BATCHES, WIDTHS = (2, 4, 8), (64, 256), (300, 784, 1000, 2048)
AGAIN = 8
ENOUGH = 1000  # outputs: the error of a few is chance
KEY = ("direction", "dtype", "members", "batch", "outputs", "inputs")


def users(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    return torch.baddbmm(bias[:, None], x, weight.mT).relu()


def users_grad(grad: Tensor, weight: Tensor, y: Tensor) -> Tensor:
    return torch.bmm(torch.ops.aten.threshold_backward(grad, y, 0), weight)


def contenders(direction: str, args: tuple[Tensor, ...]) -> dict:
    """Zero-argument functions that give the result."""
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
    return found | {name: by(table) for name, table in WAYS.items()}


def arguments(direction: str, dtype: torch.dtype, device: str, members: int, batch: int, outputs: int,
              inputs: int) -> tuple[Tensor, ...]:
    g = torch.Generator().manual_seed(0)
    x = torch.randn(members, batch, inputs, generator=g)
    weight = torch.randn(members, outputs, inputs, generator=g) / inputs**0.5
    bias = torch.randn(members, outputs, generator=g)
    x, weight, bias = (t.to(device, dtype) for t in (x, weight, bias))
    if direction == "forward":
        return x, weight, bias
    y, mask = ensemble_linear(x, weight, bias, act="relu")
    return y.roll(1, 0), weight, y, mask


def errors(direction: str, args: tuple[Tensor, ...], calls: dict) -> dict[str, float]:
    wide = [t.double() if t.is_floating_point() else t for t in args]
    exact = users(*wide) if direction == "forward" else users_grad(*wide[:3])
    found = {name: (call().double() - exact).norm().item() for name, call in calls.items()}
    return {name: e / found["users"] if e else 0.0 for name, e in found.items()}


def measure(row: dict, device: str, seconds: float) -> dict:
    direction, dtype, *sizes = row.values()
    args = arguments(direction, DTYPES[dtype], device, *sizes)
    calls = contenders(direction, args)
    ratios = errors(direction, args, calls)
    if max(ratios.values()) > 2 and sizes[0] * sizes[1] * sizes[2 if direction == "forward" else 3] >= ENOUGH:
        raise SystemExit(f"{row}: errors are {ratios} times those of users' own")
    row = {**row, "errors": ratios, "ms": medians(time_calls(calls, seconds, device))}
    if device == "cuda":
        sets = sets_to_rotate(sum(t.nbytes for t in args), cache_bytes())
        many = [contenders(direction, copied(args, {})[0]) for _ in range(sets)]
        timings, missing = time_replay({name: [one[name] for one in many] for name in calls}, seconds)
        row |= {"graph": medians(timings), "graph_missing": missing}
    return row


def key_of(row: dict) -> tuple:
    return tuple(row[k] for k in KEY)


def medians(timings: dict) -> dict[str, float]:
    return {name: t.median for name, t in timings.items()}


def summary(rows: list[dict]) -> str:
    """users' time over each contender's: median and worst."""
    lines = []
    for how, direction, dtype in itertools.product(("ms", "graph"), ("forward", "gradient"), DTYPES):
        some = [r[how] for r in rows if r["direction"] == direction and r["dtype"] == dtype and how in r]
        for name in WAYS if some else ():
            over = sorted(ms["users"] / ms[name] for ms in some if name in ms)
            if over:
                lines.append(f"{how} {direction} {dtype} {name}: median {statistics.median(over):.2f}, "
                             f"worst {over[0]:.2f}, best {over[-1]:.2f} times users'; {len(over)} shapes")
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
    parser.add_argument("--seconds", type=float, default=0.02, help="per contender (default: 0.02)")
    parser.add_argument("--out", type=Path, metavar="FILE")
    args = parser.parse_args()
    result = {**stamp(), "device": args.device, "threads": torch.get_num_threads()}
    rows = json.loads(args.out.read_text())["rows"] if args.out and args.out.exists() else []
    asked = list(itertools.product(args.directions, args.dtypes, args.members, args.batches, args.widths, args.widths))

    def add(values: tuple, seconds: float) -> None:
        nonlocal rows
        row = measure(dict(zip(KEY, values, strict=True)), args.device, seconds)
        rows = [old for old in rows if key_of(old) != values] + [row]
        print(json.dumps(row), flush=True)
        if args.out:  # after every row: what an interrupted run measured counts
            args.out.write_text(dumped({**result, "load_after": stamp()["load_before"], "rows": rows}))

    for values in asked:
        add(values, args.seconds)
    for values in [key_of(r) for r in rows if r["ms"]["users"] < r["ms"]["op"] and key_of(r) in asked]:
        add(values, AGAIN * args.seconds)
    print(summary(rows))
    return 0


if __name__ == "__main__":
    sys.exit(main())
