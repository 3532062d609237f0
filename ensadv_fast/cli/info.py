"""`ensadv-fast info`: how the extension was built, and what it finds on this machine."""
import argparse
import importlib.metadata

from ..bench.stamp import build, runtime


def add_command(parser: argparse.ArgumentParser) -> None:
    """Add the command, which has no options."""
    parser.description = __doc__
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """The command; 0."""
    sections = {"ensadv_fast": {"version": importlib.metadata.version("ensadv-fast")}, "build": build(),
                "run time": runtime()}
    for title, entries in sections.items():
        print(title)
        for name, value in entries.items():
            print(f"  {name:22} {value}")
    return 0

