"""The command line: `ensadv-fast train | evaluate | diagnose | bench | info`, also `python -m ensadv_fast ...`."""
from __future__ import annotations

import argparse
import sys
import time
import types
import typing
from collections.abc import Callable, Sequence
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any

from .data import CorruptImages

RUNS = Path("runs")


def number(text: str) -> float:
    """A float, or a fraction such as 8/255."""
    try:
        return float(Fraction(text.replace(" ", ""))) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"got {text!r}, want a number such as 0.3 or 8/255") from None


def _add_options(parser: argparse.ArgumentParser, config: type) -> None:
    """One option for each field of the config; only those that are given end up in the namespace."""
    kinds = typing.get_type_hints(config)
    for f in fields(config):
        flag, kind, text = "--" + f.name.replace("_", "-"), kinds[f.name], f.metadata["help"]
        optional = isinstance(kind, types.UnionType)
        if optional:
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        shown = " ".join(f.default) if isinstance(f.default, tuple) else f.default
        text = text.replace("%", "%%") + ("" if optional else f" (default: {shown})")
        options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS}
        if kind is bool:
            parser.add_argument(flag, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(kind) is tuple:
            parser.add_argument(flag, nargs="*", metavar="SPEC", **options)
        else:
            parser.add_argument(flag, type=number if kind is float else kind, metavar=f.name.upper(), **options)


def _resumed_folder(out: str | None, resume: str | None) -> tuple[Path, bool]:
    """The run folder and whether to go on with what is in it."""
    if resume is None:
        return Path(out) if out else RUNS / time.strftime("%Y%m%d-%H%M%S"), False
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
    return (found[-1].parent, True) if found else (RUNS / time.strftime("%Y%m%d-%H%M%S"), False)


def train(args: argparse.Namespace) -> int:
    from dataclasses import replace

    from . import models, presets, ranks, stopping
    from . import train as driver

    given = {f.name: getattr(args, f.name) for f in fields(driver.Config) if hasattr(args, f.name)}
    given = {k: tuple(v) if isinstance(v, list) else v for k, v in given.items()}
    with ranks.opened(models.device(given.get("device", driver.Config.device))) as here:
        # Rank 0 finds the folder for all: names depend on the clock, and what is there changes at once.
        folder, resume, before = here.tell(_found(args, driver.load_config) if here.main else None)
        config = presets.configured(**given) if before is None else replace(before, **presets.expanded(given))
        if here.main:
            print(f"run folder: {folder}", file=sys.stderr)
        try:
            driver.run(config, folder, resume=resume)
        except stopping.Stopped as e:
            if here.main:
                print(f"ensadv-fast: {e}; the same command goes on with --resume {folder}", file=sys.stderr)
            return 0
    if here.main:
        what = "report.html, results.json, metrics.jsonl and checkpoints" if config.evaluate else "the checkpoints"
        print(f"\n{what} are in {folder}")
    return 0


def _found(args: argparse.Namespace, load: Callable[[Path], Any]) -> tuple[Path, bool, Any]:
    """The run folder, whether to go on with what is in it, and the config of the run that is there."""
    folder, resume = _resumed_folder(args.out, args.resume)
    return folder, resume, load(folder) if resume and (folder / "config.json").exists() else None


def _parser() -> argparse.ArgumentParser:
    from . import evaluate_command
    from .diagnose import command as diagnose
    from .train import Config

    parser = argparse.ArgumentParser(prog="ensadv-fast", allow_abbrev=False, description="Fast adversarial examples "
                                     "and ensemble adversarial training.")
    commands = parser.add_subparsers(dest="command", required=True,
                                       metavar="train | evaluate | diagnose | bench | info")

    p = commands.add_parser("train", allow_abbrev=False, help="train sources and targets, and evaluate them",
                            description="With no arguments: the main job, on the embedded MNIST digits.")
    p.add_argument("--out", metavar="DIR", help=f"the run folder (default: {RUNS}/DATE-TIME)")
    p.add_argument("--resume", nargs="?", const="auto", metavar="auto|PATH", help="go on with the run in --out, in "
                   f"PATH, or (auto) the newest in {RUNS}/; auto starts a new run where there is none")
    _add_options(p, Config)
    p.set_defaults(run=train)

    evaluate_command.add_parser(commands, number)
    diagnose.add_parser(commands, number, RUNS)
    commands.add_parser("bench", help="time the ops beside what one would write without them", add_help=False)
    commands.add_parser("info", help="what was built and what is found here", add_help=False)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error with a message, 2 for wrong usage, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    try:
        if argv[:1] == ["info"]:
            from . import info

            return info.main(argv[1:])
        if argv[:1] == ["bench"]:
            from . import bench

            return bench.main(argv[1:])
        args = _parser().parse_args(argv)
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, CorruptImages) as e:
        print(f"ensadv-fast: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("\nensadv-fast: interrupted; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
