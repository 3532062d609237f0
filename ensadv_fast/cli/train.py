"""`ensadv-fast train`: train sources and targets, and evaluate them."""
from __future__ import annotations

import argparse
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

from .. import train
from ..system import machine, signals
from ..system.ranks import opened
from ..train.config import check_options
from ..train.runs import with_run_defaults
from .options import RUNS, add_config_options


def add_command(p: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    p.description = "With no arguments: the main job, on the embedded MNIST digits."
    p.add_argument("--out", metavar="DIR", help=f"the run folder (default: {RUNS}/DATE-TIME)")
    p.add_argument("--resume", nargs="?", const="auto", metavar="auto|PATH", help="go on with the run in --out, in "
                   f"PATH, or (auto) the newest in {RUNS}/; auto starts a new run where there is none")
    add_config_options(p, train.Config)
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command. Raises what `train.run` raises."""
    given = {f.name: getattr(args, f.name) for f in fields(train.Config) if hasattr(args, f.name)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    check_options(given)
    with opened(machine.device(given.get("device", train.Config.device))) as ranks:
        # Rank 0 finds the folder for all: its name depends on the clock, and what is in it changes at once.
        folder, resume, before = ranks.tell(_find_run(args) if ranks.main else None)
        config = train.make_config(**given) if before is None else replace(before, **with_run_defaults(given))
        if ranks.main:
            print(f"run folder: {folder}", file=sys.stderr)
        try:
            train.run(config, folder, resume=resume)
        except signals.Stopped as e:
            if ranks.main:
                print(f"ensadv-fast: {e}; the same command goes on with --resume {folder}", file=sys.stderr)
            return 0
    if ranks.main:
        what = "report.html, results.json, metrics.jsonl and checkpoints" if config.evaluate else "the checkpoints"
        print(f"\n{what} are in {folder}")
    return 0


def _find_run(args: argparse.Namespace) -> tuple[Path, bool, train.Config | None]:
    """The run folder, whether to go on with the run in it, and that run's config (None: there is no run in it)."""
    folder, resume = _find_folder(args.out, args.resume)
    return folder, resume, train.load_config(folder) if resume and (folder / "config.json").exists() else None


def _find_folder(out: str | None, resume: str | None) -> tuple[Path, bool]:
    """The run folder, and whether to go on with the run in it."""
    new = RUNS / time.strftime("%Y%m%d-%H%M%S")
    if resume is None:
        return Path(out) if out else new, False
    if resume != "auto":
        path = Path(resume)
        path = path.parent.parent if path.suffix == ".pt" else path
        if out is not None and Path(out).resolve() != path.resolve():
            raise ValueError(f"train: --resume {resume} and --out {out} name two folders; give one")
        if not (path / "config.json").is_file():
            raise FileNotFoundError(f"train: --resume: no run in {path} (there is no config.json)")
        return path, True
    if out is not None:
        return Path(out), True
    found = [p for p in RUNS.glob("*/config.json") if (p.parent / "models").is_dir()]  # only runs of train have models
    found.sort(key=lambda p: p.stat().st_mtime)
    return (found[-1].parent, True) if found else (new, False)
