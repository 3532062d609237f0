"""What the options of several commands share: how numbers are read, and defaults."""
from __future__ import annotations

import argparse
import types
import typing
from dataclasses import fields
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

RUNS = Path("runs")  # where run folders go that --out does not name


class Defaults(NamedTuple):
    """The defaults that evaluate and diagnose share with train: those of `train.Config`, written again here, because
    these commands load nothing of `train`."""

    data: str = "digits"
    eps: float = 0.3
    alpha: float = 1 / 6
    eval_steps: int = 10
    eval_batch_size: int = 250
    device: str = "auto"


DEFAULTS = Defaults()


# The group that begins with an option of train.
GROUPS = {"preset": "what is trained", "epochs": "training", "attack": "adversarial training (default: the preset's)",
          "eval_steps": "evaluation and seeds", "dtype": "precision and memory", "device": "the run"}
ALIASES = {"monitor": ("--watch",)}  # torchrun takes --monitor for its own


def number(text: str) -> float:
    """A float, or a fraction such as 8/255."""
    try:
        return float(Fraction(text.replace(" ", ""))) if "/" in text else float(text)
    except (ValueError, ZeroDivisionError):
        raise argparse.ArgumentTypeError(f"must be a number such as 0.3 or 8/255, got {text!r}") from None


def add_config_options(parser: argparse.ArgumentParser, config: type) -> None:
    """Add one option for each field of the config; only those that are given end up in the namespace."""
    kinds = typing.get_type_hints(config)
    target: Any = parser
    for f in fields(config):
        if f.name in GROUPS:
            target = parser.add_argument_group(GROUPS[f.name])
        kind, text = kinds[f.name], f.metadata["help"]
        flags = [*ALIASES.get(f.name, ()), "--" + f.name.replace("_", "-")]
        optional = isinstance(kind, types.UnionType)
        if optional:
            kind = next(k for k in typing.get_args(kind) if k is not type(None))
        shown = " ".join(f.default) if isinstance(f.default, tuple) else f.default
        text = text.replace("%", "%%") + ("" if optional else f" (default: {shown})")
        options: dict[str, Any] = {"help": text, "default": argparse.SUPPRESS, "dest": f.name}
        if kind is bool:
            target.add_argument(*flags, action=argparse.BooleanOptionalAction, **options)
        elif typing.get_origin(kind) is tuple:
            target.add_argument(*flags, nargs="*", metavar="SPEC", **options)
        else:
            target.add_argument(*flags, type=number if kind is float else kind, metavar=f.name.upper(), **options)
