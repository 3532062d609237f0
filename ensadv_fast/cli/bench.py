"""`ensadv-fast bench`: measure this machine."""
import argparse
import json
import sys
from pathlib import Path

import torch

from ..bench import quick
from ..bench.contenders import DTYPES, GPU_SIZES


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    parser.description, parser.formatter_class = quick.__doc__, argparse.RawDescriptionHelpFormatter
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--sizes", nargs="+", choices=list(GPU_SIZES), default=None)
    parser.add_argument("--dtypes", nargs="+", choices=list(DTYPES), default=None)
    parser.add_argument("--cases", nargs="+", metavar="PREFIX", help="only cases whose names begin so")
    parser.add_argument("--seconds", type=float, default=0.1, help="per contender (default: 0.1)")
    parser.add_argument("--threads", type=int, default=None, help="of PyTorch on the CPU (default: its own choice)")
    parser.add_argument("--compile", nargs="*", choices=list(DTYPES), default=["float32"], metavar="DTYPE",
                        help="dtypes in which torch.compile competes (default: float32; none: leave it out)")
    parser.add_argument("--out", metavar="FILE", help="write the stamped JSON here")
    parser.add_argument("--compare", metavar="OLD.json", help="exit 1 if ours became slower than in OLD.json")
    parser.add_argument("--limit", type=float, default=1.25, help="ratio that counts as slower (default: 1.25)")
    parser.set_defaults(run=run, wrong_usage=parser.error)


def run(args: argparse.Namespace) -> int:
    """The command; 1 where a contender is wrong or one of ours became slower."""
    old = json.loads(Path(args.compare).read_text()) if args.compare else None
    if args.threads is not None:
        torch.set_num_threads(args.threads)
    grid = quick.settings(args.device, args.sizes, args.dtypes, args.cases)
    if not grid:
        args.wrong_usage("nothing to measure: no case has these sizes and dtypes")
    result = quick.run(grid, args.seconds, args.compile)
    if args.out:
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
        Path(args.out).write_text(quick.to_json(result))
    slower = quick.regressions(old, result, args.limit) if old else []
    problems = [*(f"wrong: {line}" for line in result["wrong"]), *(f"slower: {line}" for line in slower)]
    print(*problems, sep="\n", end="\n" if problems else "", file=sys.stderr)
    return 1 if problems else 0
