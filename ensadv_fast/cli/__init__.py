"""The command line: `ensadv-fast train | evaluate | diagnose | bench | info`, also `python -m ensadv_fast ...`."""
from __future__ import annotations

import argparse
import importlib
import os
import sys
from collections.abc import Sequence
from typing import Any

from ..data import CorruptImages
from ..models import did_you_mean

COMMANDS = {
    "train": "train sources and targets, and evaluate them",
    "evaluate": "errors of saved models under attacks",
    "diagnose": "are saved models robust, or do they only mask their gradients?",
    "bench": "time the ops beside what one would write without them",
    "info": "what was built and what is found here",
}


class _Parser(argparse.ArgumentParser):
    """A parser whose errors name the option or the command that was probably meant."""

    known: tuple[str, ...] = ()  # the options of the command

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, unknown = self.parse_known_args(args, namespace)
        if unknown:
            asked = next((u for u in unknown if u.startswith("-")), "").partition("=")[0]
            self.error(f"unrecognized arguments: {' '.join(unknown)}{did_you_mean(asked, self.known)}")
        return found


def make_parser(command: str | None) -> argparse.ArgumentParser:
    """The parser of all commands, with the options of this one only: the code of the others is not loaded."""
    parser = _Parser(prog="ensadv-fast", allow_abbrev=False, description="Fast adversarial examples "
                                     "and ensemble adversarial training.")
    commands = parser.add_subparsers(dest="command", required=True, metavar=" | ".join(COMMANDS))
    for name, text in COMMANDS.items():
        options = commands.add_parser(name, allow_abbrev=False, help=text)
        if name == command:
            importlib.import_module(f".{name}", __name__).add_command(options)
            parser.known = tuple(options._option_string_actions)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; the exit status: 0, 1 for an error with a message, 2 for wrong usage, 130 for Ctrl-C."""
    argv = list(sys.argv[1:] if argv is None else argv)
    if not {"", os.getcwd()} & set(sys.path):
        sys.path.append(os.getcwd())  # as with `python -m`: a module of the user's own, behind all that is installed
    try:
        args = make_parser(argv[0] if argv else None).parse_args(argv)
        return args.run(args)
    except (ValueError, TypeError, OSError, ImportError, FloatingPointError, CorruptImages) as e:
        print(f"ensadv-fast: error: {e}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        goes_on = {"train": "; --resume goes on from the last checkpoint",
                   "evaluate": "; --resume goes on from what --out DIR has" * ("--out" in argv)}
        print(f"\nensadv-fast: interrupted{goes_on.get(argv[0], '')}", file=sys.stderr)
        return 130
