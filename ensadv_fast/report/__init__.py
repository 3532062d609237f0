"""What a run reports: results.json, the tables that it prints, and the page report.html."""
from __future__ import annotations

from pathlib import Path
from typing import Any

from ..system.files import atomic_write, write_json
from . import diagnose_page, evaluate_page, layouts, train_page


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with columns of even width, so that it reads well on a terminal too."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in [head, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


PAGES = {"train": train_page.render, "evaluate": evaluate_page.render, "diagnose": diagnose_page.render}


def save(folder: Path, results: dict[str, Any]) -> None:
    """Write results.json into the run folder."""
    write_json(folder / "results.json", results)


def write(folder: str | Path) -> Path:
    """Make report.html from the files of a run folder, and return its path.

    results.json's "command" (train where it has none) decides which page it is. The same files give the same page to
    the byte. FileNotFoundError without results.json; ValueError for damaged files and other commands.
    """
    folder = Path(folder)
    files = layouts.Folder.read(folder)
    command = files.results.get("command", "train")
    if command not in PAGES:
        raise ValueError(f"report: command must be one of {', '.join(PAGES)}, got {command!r}")
    text = PAGES[command](files)
    path = folder / "report.html"
    atomic_write(path, lambda f: f.write(text.encode()))
    return path
