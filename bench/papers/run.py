"""`python bench/papers/run.py a b ...`: makes tables of the two papers, from the cache where it has their parts.

Each writes bench/results/papers_TABLE.json; then `python bench/report.py` writes the documents. A run that is killed
goes on where it stopped.
"""
from __future__ import annotations

import argparse
import importlib
import sys
import time
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.append(str(ROOT / "bench"))

from ensadv_fast.bench.stamp import stamp  # noqa: E402
from papers.common import Lab, Missing, write  # noqa: E402

TABLES = {module[0]: module for module in (
    "a_ensemble_training", "b_random_start", "c_label_leaking", "d_ablations", "e_transfer", "f_cifar", "g_photographs",
    "h_capacity")}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("tables", nargs="+", choices=[*TABLES, "all"], metavar="TABLE",
                        help=f"{', '.join(TABLES)} or all")
    parser.add_argument("--preset", choices=("small", "full"), default="small", help="small: 2 cores; full: a GPU")
    parser.add_argument("--seeds", type=int, help="networks of each kind, in place of the preset's")
    parser.add_argument("--cache", type=Path, default=ROOT / ".cache" / "papers")
    parser.add_argument("--out", type=Path, default=ROOT / "bench" / "results")
    parser.add_argument("--device", default="auto")
    args = parser.parse_args(argv)
    if args.seeds is not None and args.seeds < 1:
        parser.error(f"--seeds must be >= 1, got {args.seeds}")
    begin, missing = time.perf_counter(), 0

    def say(text: str) -> None:
        print(f"{time.perf_counter() - begin:6.0f} s  {text}", file=sys.stderr, flush=True)

    for name in TABLES if "all" in args.tables else args.tables:
        table = importlib.import_module(f"papers.{TABLES[name]}")
        sizes = table.SIZES[args.preset]
        if args.seeds is not None:
            sizes = replace(sizes, seeds=args.seeds)
        lab, before = Lab(args.cache, args.device, say), stamp()
        try:
            result = table.run(lab, sizes)
        except Missing as e:
            missing += 1
            print(f"papers: SKIPPED table {name}: {e}", file=sys.stderr, flush=True)
            continue
        path = args.out / f"papers_{name}.json"
        write(path, name, args.preset, sizes, result, lab, before)
        for c in result.claims:
            print(f"({name}) {c['claim']}: {c['verdict'].upper()}")
        say(f"{path}; its parts took {sum(lab.seconds.values()):.0f} s")
    return 1 if missing else 0


if __name__ == "__main__":
    sys.exit(main())
