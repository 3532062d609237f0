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
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor, nn
from tqdm import tqdm

from .. import ops, report
from ..attacks import BaseAttack
from ..attacks.by_name import ATTACKS, make_attack
from ..data import Dataset
from ..evaluate import (
    AdversarialSet,
    BlackBox,
    Curves,
    Rate,
    TransferMatrix,
    accuracy_curves,
    black_box,
    example_images,
    find_sets,
    transfer_matrix,
)
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
    if args.save_sets and len(set(args.eps)) > 1:
        raise ValueError(f"evaluate: --save-sets takes one --eps, got {len(set(args.eps))}")
    given = Saved.open(args)
    folder = _open_folder(args)
    sets = _name_sets(args.set, {**given.targets, **given.sources})
    targets, sources = given.networks()
    config = {k: v for k, v in vars(args).items() if k != "run"}
    if folder is not None:
        files.write_json(folder / "config.json", config)
    evaluation = _Evaluation(args, given.dataset, targets, sources, sets, folder, ops.fresh_key("cpu", args.seed))
    with tqdm(total=evaluation.attacked_images(), unit=" attacks", unit_scale=True, disable=None) as bar:
        curves, matrix = evaluation.measure(bar.update)
    print(text(matrix, targets, args.top5))
    if args.out:
        body = {"command": "evaluate", "dataset": given.dataset.name, "eps": evaluation.eps[-1], "config": config,
                **results(matrix, given.targets, given.sources, sets),
                "curves": [curve.to_dict() for curve in curves.all()] if curves else [],
                "examples": None if folder is None else examples.FILE, "versions": versions(),
                "seconds": {"total": time.perf_counter() - begin}}
        if folder is None:
            files.write_json(Path(args.out), body)
        else:
            evaluation.write_report(folder, matrix, body)
    return 0


def _open_folder(args: argparse.Namespace) -> Path | None:
    """The run folder, made; None where --out asks for none."""
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


def _name_sets(folders: list[str], taken: Mapping[str, Any]) -> dict[str, list[AdversarialSet]]:
    """The sets in these folders by source, under names that are not `taken`: a set's source is none of the networks
    that are given here, even where it has the name of one."""
    found: dict[str, list[AdversarialSet]] = {}
    for one in (s for folder in folders for s in find_sets(folder)):
        i, name = 2, one.source
        while name in taken or name in found and _source_digest(found[name][0]) != _source_digest(one):
            i, name = i + 1, f"{one.source}_{i}"
        found.setdefault(name, []).append(one)
    return found


def _source_digest(one: AdversarialSet) -> str:
    return one.manifest["source"]["sha256"]


@dataclass(frozen=True)
class _Evaluation:
    """What is shown to what: networks and sets by name, and all that the attacks depend on."""

    args: argparse.Namespace
    dataset: Dataset
    targets: Mapping[str, nn.Module]
    sources: Mapping[str, Source]
    sets: Mapping[str, list[AdversarialSet]]
    folder: Path | None
    key: Tensor

    @property
    def eps(self) -> list[float]:
        """The budgets, ascending; the last is the matrix's."""
        return sorted(set(self.args.eps))

    def attacked_images(self) -> int:
        """How many adversarial images are shown or crafted in all."""
        networks = len(self.sources) + len(self.targets)
        crafted = len(self.args.attack) * networks * sum(eps > 0 for eps in self.eps)
        return len(self.dataset.test) * (crafted + sum(map(len, self.sets.values())))

    def make_attack(self, name: str, eps: float) -> BaseAttack:
        """The attack of this name with the options of the command."""
        steps = self.args.steps
        return make_attack(name, eps, alpha=self.args.alpha, steps=steps,
                           step=1 / steps if name in ("ifgsm", "iter_ll") else None)

    def measure(self, progress: Progress) -> tuple[Curves | None, TransferMatrix]:
        """The curves, where there are several eps, and the matrix at the largest."""
        args, largest = self.args, self.eps[-1]
        common: dict[str, Any] = {"key": self.key, "progress": progress, "folder": self.folder,
                                  "classes": self.dataset.classes}
        curves = None
        if len(self.eps) > 1:
            makers = {name: partial(self.make_attack, name) for name in args.attack}
            curves = accuracy_curves(self.targets, self.sources, makers, self.eps, self._batches(), white_box=True,
                                     **common)
            matrix = curves.matrices[largest]
        else:
            attacks = {name: self.make_attack(name, largest) for name in args.attack}
            matrix = transfer_matrix(self.targets, self.sources, attacks, self._batches(), white_box=True,
                                     save_sets=args.save_sets, data=args.data, set_dtype=args.set_dtype, **common)
        if self.sets:
            matrix = matrix.merge(transfer_matrix(self.targets, self.sets, {}, self._batches(), **common))
        return curves, matrix

    def _batches(self) -> Any:
        return self.dataset.test.batches(self.args.batch_size)

    def write_report(self, folder: Path, matrix: TransferMatrix, body: dict[str, Any]) -> None:
        """The files of the run folder besides config.json, and a line that names them."""
        matrix.save(folder / "matrix.json")
        name = next(iter(self.sources), next(iter(self.targets)))
        source = self.sources.get(name) or Source(self.targets[name])
        attacks = {a: self.make_attack(a, self.eps[-1]) for a in self.args.attack}
        example_images.craft(self.dataset.test, attacks, name, source, self.targets, self.key).save(
            folder / examples.FILE)
        files.write_json(folder / "results.json", body)
        report.write(folder)
        print(f"\nreport.html, results.json and matrix.json are in {folder}")


def black_boxes(matrix: TransferMatrix, targets: Mapping[str, Any]) -> dict[str, BlackBox | None]:
    """Each target's summary over all sources that are no targets; None where there is none."""
    held_out = [s for s in matrix.sources if s not in targets]
    return {t: black_box(matrix, t, held_out) if held_out else None for t in targets}


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
