"""Results as Markdown: verdicts in short for docs/results.md, claims and numbers for docs/papers.md."""
from __future__ import annotations

from collections import Counter

from .claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED

VERDICTS = (REPRODUCED, NOT_REPRODUCED, UNDECIDED)


def _table(header: list[str], rows: list[list[str]], left: int = 1) -> str:
    lines = ["| " + " | ".join(header) + " |", "|" + " --- |" * left + " ---: |" * (len(header) - left)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def _head(result: dict) -> str:
    return (f"({result['table']}) {result['title']}, preset {result['preset']}, on {result['machine']['cpu']}"
            f"{', ' + result['device'] if result['device'] != 'cpu' else ''}; its parts took "
            f"{result['seconds'] / 60:.0f} min on {result['threads']} thread{'s' if result['threads'] > 1 else ''}, "
            f"load average {result['load_before'][0]:.1f}; commit {result['commit']}.")


def cell(c: dict | str) -> str:
    if isinstance(c, str):
        return c
    text = f"{c['value']:.1f} ({c['low']:.1f} to {c['high']:.1f})"
    return text + (f"; paper {c['paper']:.1f} [{c['mark']}]" if "paper" in c else "")


def claims(result: dict) -> str:
    """The claims with their verdicts and the numbers that decided, under the sizes of all numbers."""
    sizes = "; ".join(dict.fromkeys(row["size"] for block in result["blocks"] for row in block["rows"]))
    verdicts = ", ".join(f"{n} {v}" for v, n in Counter(c["verdict"] for c in result["claims"]).items())
    head = f"{_head(result)} Sizes (training images x epochs, networks, test images): {sizes}. Claims: {verdicts}."
    return head + "\n\n" + _table(["the paper's claim", "where", "verdict", "our numbers, %"], [
        [c["claim"], f"{c['source']} [{c['mark']}]", f"**{c['verdict']}**",
         "; ".join(f["because"] for f in c["findings"])] for c in result["claims"]], left=4)


def verdicts(results: list[dict]) -> str:
    """How many claims of each table came out how."""
    counts = [Counter(c["verdict"] for c in r["claims"]) for r in results]
    rows = [[f"({r['table']}) {r['title']}", *(str(n[v]) for v in VERDICTS)]
            for r, n in zip(results, counts, strict=True)]
    rows.append(["all", *(str(sum(n[v] for n in counts)) for v in VERDICTS)])
    return _table(["experiment", *VERDICTS], rows)


def numbers(result: dict) -> str:
    """All numbers with their sizes, intervals and the paper's."""
    blocks = [f"{b['title']}:\n\n" + _table(
        ["", "training, networks, test images", *b["header"]],
        [[r["label"], r["size"], *map(cell, r["cells"])] for r in b["rows"]], left=2) for b in result["blocks"]]
    return "\n\n".join([f"{_head(result)} {result['about']}", *blocks])
