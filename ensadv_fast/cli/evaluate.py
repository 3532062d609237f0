"""`ensadv-fast evaluate`: saved models under attacks, as a printed table and a run folder.

A run folder (--out DIR) holds config.json (the options), cells.jsonl (verdicts as they came, which --resume goes on
from), matrix.json (`TransferMatrix.load` reads it), examples.npz, report.html and results.json:

    {"command": "evaluate", "dataset", "eps": that of the matrix, the largest asked for, "config": the options,
     "sources": {source: "held_out"}, a source being whatever was crafted on that is no target of the same name,
     "specs": {target or source: its spec, or the folder of its set},
     "sets": [{"source", "attack", "eps", "folder"}],    saved sets, which keep their own eps
     "models": {target: {"spec", "clean": e, "white_box": {attack: e}, "black_box": {attack: {source: e}},
                         "max_black_box": e, "mean_black_box": e, "worst_case_black_box": e,    null without sources
                         "black_box_summary": `BlackBox.to_dict`, with intervals and ties, or null}},
     "matrix": `TransferMatrix.to_dict`: every cell's errors and transfer rates, top-1 and top-5, with intervals
     "curves": [`Curve.to_dict`, ...], accuracy against eps, for each (attack, source, target); [] for one eps
     "examples": "examples.npz", or null where only this file is written,
     "versions", "seconds": {"total"}}

e is an error: the fraction of all test inputs, 0..1. With --out FILE.json only results.json is written, under that
name.

examples.npz has a few test images, one a class, clean and under each attack crafted on the first source, or else on
the first target: "source" (a string), "labels" int64 [n], "pictures/clean" and "pictures/ATTACK" uint8 [n, H, W] or
[n, H, W, 3], "predictions/clean/TARGET" and "predictions/ATTACK/TARGET" int64 [n].
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor
from tqdm import tqdm

from .. import evaluate as evaluation
from .. import ops, report
from ..attacks import BaseAttack
from ..attacks.by_name import ATTACKS, make_attack
from ..data import Dataset
from ..evaluate import AdversarialSet, BlackBox, Curves, Rate, TransferMatrix, example_images
from ..evaluate.transfer import Progress
from ..report import examples
from ..sources.source import Source
from ..system import files
from ..system.machine import versions
from .networks import Saved, add_options
from .options import DEFAULTS, number


def add_command(p: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    p.description = ("White-box errors of each model, and its errors under attacks crafted on each source. SPEC is "
                     "NAME=CHECKPOINT, e.g. mnist:D=runs/x/models/D_ens-seed0.pt")
    add_options(p, "networks to craft transferred attacks on", steps=DEFAULTS.eval_steps)
    p.add_argument("--attack", nargs="+", default=["fgsm", "rand_fgsm", "ifgsm", "pgd"], choices=ATTACKS,
                   metavar="ATTACK", help=f"any of {', '.join(ATTACKS)} (default: fgsm rand_fgsm ifgsm pgd)")
    p.add_argument("--eps", type=number, nargs="+", default=[DEFAULTS.eps], help="L-infinity budget; of several, the "
                   f"largest is the matrix's, all make curves of accuracy (default: {DEFAULTS.eps})")
    p.add_argument("--top5", action="store_true", help="print top-5 errors too")
    p.add_argument("--save-sets", metavar="DIR", help="keep the adversarial images there, one set for each source and "
                   "attack, to be shown to other models later")
    p.add_argument("--set-dtype", default="uint8", choices=("uint8", "float32"), help="of --save-sets (default: "
                   "%(default)s)")
    p.add_argument("--set", nargs="*", default=[], metavar="DIR", help="saved sets, or folders of them: more sources")
    p.add_argument("--out", metavar="DIR|FILE.json", help="a run folder: config.json, results.json, matrix.json and "
                   "examples.npz; or the errors alone as JSON")
    p.add_argument("--resume", action="store_true", help="go on with the run in --out DIR: what it has is not computed "
                   "again, unless an option changed it")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises ValueError, FileNotFoundError, FileExistsError with a message for its user."""
    begin = time.perf_counter()
    eps_values = sorted(set(args.eps))
    if args.save_sets and len(eps_values) > 1:
        raise ValueError(f"evaluate: --save-sets takes one --eps, got {len(eps_values)}")
    given = Saved.open(args)
    dataset = given.dataset
    folder = _folder(args)
    sets = _sets(args.set, {**given.targets, **given.sources})
    targets, sources = given.networks()
    config = {k: v for k, v in vars(args).items() if k != "run"}
    if folder is not None:
        files.write_json(folder / "config.json", config)

    def attack(name: str, eps: float) -> BaseAttack:
        return make_attack(name, eps, alpha=args.alpha, steps=args.steps,
                           step=1 / args.steps if name in ("ifgsm", "iter_ll") else None)

    key = ops.fresh_key("cpu", args.seed)
    crafted = len(args.attack) * (len(sources) + len(targets)) * sum(eps > 0 for eps in eps_values)
    with tqdm(total=len(dataset.test) * (crafted + sum(map(len, sets.values()))), unit=" attacks", unit_scale=True,
              disable=None) as bar:
        curves, matrix = _measured(args, dataset, targets, sources, sets, eps_values, attack, folder, key, bar.update)
    print(text(matrix, targets, args.top5))
    if args.out:
        eps = eps_values[-1]
        body = {"command": "evaluate", "dataset": dataset.name, "eps": eps, "config": config,
                **results(matrix, given.targets, given.sources, sets),
                "curves": [curve.to_dict() for curve in curves.all()] if curves else [],
                "examples": None if folder is None else examples.FILE, "versions": versions(),
                "seconds": {"total": time.perf_counter() - begin}}
        if folder is not None:
            matrix.save(folder / "matrix.json")
            name = next(iter(sources), next(iter(targets)))
            example_images.craft(dataset.test, {a: attack(a, eps) for a in args.attack}, name,
                                 sources.get(name) or Source(targets[name]), targets, key).save(folder / examples.FILE)
        files.write_json(Path(args.out) if folder is None else folder / "results.json", body)
        if folder is not None:
            report.write(folder)
            print(f"\nreport.html, results.json and matrix.json are in {folder}")
    return 0


def _folder(args: argparse.Namespace) -> Path | None:
    """The run folder, made; None where there is none to be."""
    folder = Path(args.out) if args.out and not args.out.endswith(".json") else None
    if folder is None:
        if args.resume:
            raise ValueError("evaluate: --resume needs --out DIR, the folder of the run to go on with")
        return None
    if (folder / "config.json").exists() and not args.resume:
        raise FileExistsError(f"evaluate: {folder} already holds a run: go on with it by --resume, or give another "
                              "folder")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def _sets(folders: list[str], taken: Mapping[str, Any]) -> dict[str, list[AdversarialSet]]:
    """The sets in these folders by source, under names that are not `taken`: a set is of a model that is not here."""
    found: dict[str, list[AdversarialSet]] = {}
    for one in (s for folder in folders for s in evaluation.find_sets(folder)):
        i, name = 2, one.source
        while name in taken or name in found and _model(found[name][0]) != _model(one):
            i, name = i + 1, f"{one.source}_{i}"
        found.setdefault(name, []).append(one)
    return found


def _model(one: AdversarialSet) -> str:
    return one.manifest["source"]["sha256"]


def _measured(args: argparse.Namespace, dataset: Dataset, targets: Mapping[str, Any], sources: Mapping[str, Any],
              sets: Mapping[str, Any], eps_values: Sequence[float], attack: Callable[[str, float], BaseAttack],
              folder: Path | None, key: Tensor, progress: Progress) -> tuple[Curves | None, TransferMatrix]:
    """The curves, where there are several eps, and the matrix at the largest."""
    def batches() -> Iterable[Any]:
        return dataset.test.batches(args.batch_size)

    common: dict[str, Any] = {"key": key, "progress": progress, "folder": folder, "classes": dataset.classes}
    curves = None
    if len(eps_values) > 1:
        makers = {a: (lambda eps, a=a: attack(a, eps)) for a in args.attack}
        curves = evaluation.accuracy_curves(targets, sources, makers, eps_values, batches(), white_box=True, **common)
        matrix = curves.matrices[eps_values[-1]]
    else:
        matrix = evaluation.transfer_matrix(targets, sources, {a: attack(a, eps_values[0]) for a in args.attack},
                                            batches(), white_box=True, save_sets=args.save_sets, data=args.data,
                                            set_dtype=args.set_dtype, **common)
    if sets:
        matrix = matrix.merge(evaluation.transfer_matrix(targets, sets, {}, batches(), **common))
    return curves, matrix


def black_boxes(matrix: TransferMatrix, targets: Mapping[str, Any]) -> dict[str, BlackBox | None]:
    """Each target's summary over all sources that are no targets; None where there is none."""
    held_out = [s for s in matrix.sources if s not in targets]
    return {t: evaluation.black_box(matrix, t, held_out) if held_out else None for t in targets}


def results(matrix: TransferMatrix, targets: Mapping[str, str], sources: Mapping[str, str],
            sets: Mapping[str, list[AdversarialSet]]) -> dict[str, Any]:
    """What results.json (see this module) says about the errors."""
    held_out = [*sources, *sets]
    body: dict[str, Any] = {}
    for t, summary in black_boxes(matrix, targets).items():
        def errors(s: str, t: str = t) -> dict[str, float]:
            return {a: matrix.error(a, s, t) for a in matrix.attacks if (a, s, t) in matrix.wrong}

        from_sources = {s: errors(s) for s in held_out}
        body[t] = {"spec": targets[t], "clean": matrix.clean_error(t), "white_box": errors(t),
                   "black_box": {a: {s: e[a] for s, e in from_sources.items() if a in e} for a in matrix.attacks},
                   "max_black_box": summary and summary.max, "mean_black_box": summary and summary.mean,
                   "worst_case_black_box": summary and summary.worst_case,
                   "black_box_summary": summary and summary.to_dict()}
    return {"sources": {s: "held_out" for s in held_out},
            "specs": {**targets, **sources, **{s: str(found[0].folder) for s, found in sets.items()}},
            "sets": [{"source": s, "attack": one.attack, "eps": one.eps, "folder": str(one.folder)}
                     for s, found in sets.items() for one in found],
            "models": body, "matrix": matrix.to_dict()}


def text(matrix: TransferMatrix, targets: Mapping[str, Any], top5: bool = False) -> str:
    """The tables that are printed."""
    def row(t: str, crafted_on: str, attack: str, rate: Rate, transfer: Rate | None, rate5: Rate) -> list[str]:
        assert rate.value is not None and rate.interval is not None and rate5.value is not None  # there are inputs
        low, high = rate.interval
        of = "-" if transfer is None or transfer.value is None else f"{100 * transfer.value:.2f}"
        return [t, crafted_on, attack, f"{100 * rate.value:.2f}", f"{100 * low:.1f} to {100 * high:.1f}", of,
                *([f"{100 * rate5.value:.2f}"] if top5 else [])]

    rows = [row(t, "-", "clean", matrix.clean_rate(t), None, matrix.clean_rate(t, top=5)) for t in targets]
    rows += [row(t, "itself (white-box)" if s == t else s, a, matrix.error_rate(a, s, t),
                 None if s == t else matrix.transfer_rate(a, s, t), matrix.error_rate(a, s, t, top=5))
             for a, s, t in matrix.wrong]
    head = ["model", "crafted on", "attack", "error %", "95 % interval", "transfer rate %"]
    parts = [report.table(head + ["top-5 error %"] * top5, rows),
             f"Errors are of all {len(matrix)} test inputs, transfer rates of those that fool the source."]
    summaries = {t: b for t, b in black_boxes(matrix, targets).items() if b}
    if summaries:
        lines = []
        for t, b in summaries.items():
            (low, high), others = b.max_interval, len(b.tied) - 1
            lines.append([t, f"{100 * b.max:.2f}", f"{100 * low:.1f} to {100 * high:.1f}", " from ".join(b.pair),
                          str(others), f"{100 * b.mean:.2f}", f"{100 * b.worst_case:.2f}"])
        parts.append(report.table(["model", "black-box max %", "95 % interval", "by", "tied with it", "mean %",
                                   "worst case %"], lines))
    return "\n\n".join(parts)
