"""The report page of `ensadv-fast evaluate`.

It reads from results.json

    "matrix": what `TransferMatrix.to_dict()` gives
    "models": {target: {"black_box_summary": what `BlackBox.to_dict()` gives, or null}}
    "curves": [what `Curve.to_dict()` gives]
    "sets": [{"source", "attack", "eps"}], the saved sets among the sources

and leaves out what is missing.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from . import figures, layouts, markup
from .layouts import TITLES, Folder
from .markup import Cell, Markup, Number, Section

Cells = dict[tuple[str, str, str], dict[str, Any]]  # (attack, source, target) -> an entry of "cells"


def render(folder: Folder) -> str:
    """The page of an evaluation."""
    r = folder.results
    matrix = r.get("matrix", {})
    cells: Cells = {(c["attack"], c["source"], c["target"]): c for c in matrix.get("cells", [])}
    sections, told, title = [], "", "Errors under attack"
    if cells:
        title = f"Errors under attack: {', '.join(matrix['targets'])}"
        told = _verdict(cells)
        summaries = {t: m["black_box_summary"] for t, m in r.get("models", {}).items() if m.get("black_box_summary")}
        sections = [Section("Errors", [_errors(matrix, cells, summaries)]),
                    Section("White-box and transferred attacks", _matrices(matrix, cells, r.get("sets", [])))]
    sections += _curves(r.get("curves", []), matrix.get("clean", {}))
    sections += layouts.example_sections(folder.samples, r.get("eps"))
    more = [f"{matrix['n']:,} test inputs"] if "n" in matrix else []
    return layouts.document(folder, title, told, sections, more)


def _top1(cell: Mapping[str, Any] | None, quantity: str = "error") -> Mapping[str, Any] | None:
    """A rate of a cell: {"value", "low", "high"...}, or None where it was not measured."""
    return None if cell is None else (cell.get(quantity) or {}).get("top1")


def _highest(cells: Cells, white_box: bool) -> dict[str, Mapping[str, Any]]:
    """Of each target the rate with the highest error, over its white-box or over its transferred attacks."""
    found: dict[str, Mapping[str, Any]] = {}
    for (_, _, target), cell in cells.items():
        rate = _top1(cell)
        if cell["white_box"] == white_box and rate and rate["value"] is not None and (
                target not in found or rate["value"] > found[target]["value"]):
            found[target] = rate
    return found


def _verdict(cells: Cells) -> str:
    told = []
    for white_box, words in ((False, "Highest error under transferred attacks"), (True, "Under white-box attacks")):
        if highest := _highest(cells, white_box):
            told.append(f"{words}: {layouts.rank({t: rate['value'] for t, rate in highest.items()})}.")
    return " ".join(told)


def _errors(matrix: Mapping[str, Any], cells: Cells, black_box: Mapping[str, Any]) -> Markup:
    """Clean and white-box errors of each target, and its errors over all transferred attacks."""
    targets = matrix["targets"]
    rows: list[list[Cell]] = [["clean", *(_top1({"error": matrix["clean"].get(t)}) for t in targets)]]
    for a in matrix["attacks"]:
        row = [_top1(cells.get((a, t, t))) for t in targets]
        if any(row):
            rows.append([f"white-box {TITLES.get(a, a)}", *row])
    if any(t in black_box for t in targets):
        for key, words in (("max", "highest"), ("mean", "mean"), ("worst_case", "worst case per example")):
            rows.append([f"black-box, {words}", *(_summary(black_box.get(t), key) for t in targets)])
    else:
        highest = _highest(cells, white_box=False)
        rows += [["transferred, highest", *(highest.get(t) for t in targets)]] if highest else []
    note = "In % of all test inputs; small print: 95 % intervals (Wilson's); lower is better"
    if black_box:
        note += (". Black-box: over all attacks from networks that are no targets; an input counts in the worst case "
                 "if any of them fools the target")
    return markup.table(["", *targets], [[name, *markup.mark_best(row)] for name, *row in rows], note=note)


def _summary(summary: Mapping[str, Any] | None, key: str) -> Number:
    if summary is None:
        return Number(None)
    low, high = summary.get(f"{key}_interval") or (None, None)
    return Number(summary[key], low=low, high=high)


def _matrices(matrix: Mapping[str, Any], cells: Cells, sets: Sequence[Mapping[str, Any]]) -> list[Markup]:
    note = "Error in % of all test inputs. Framed: white-box, crafted on the target itself."
    saved = [f"{TITLES.get(s['attack'], s['attack'])} on {s['source']}"
             + ("" if s.get("eps") is None else f", {layouts.budget(s['eps'])}") for s in sets]
    note += f" From saved sets, which keep their own eps: {'; '.join(saved)}." if saved else ""
    blocks = [markup.text(note, note=True), markup.flow(*(_heatmap(matrix, cells, a) for a in matrix["attacks"])),
              markup.scale("0 %", "100 % error")]
    measured = {attack for (attack, _, _), cell in cells.items() if _has_transfer_rate(cell)}
    rates = [_heatmap(matrix, cells, a, "transfer_rate") for a in matrix["attacks"] if a in measured]
    if rates:
        blocks.append(markup.folded("Transfer rates", markup.text(
            "In % of the inputs that the source classifies correctly as they are and misclassifies under attack "
            "(Kurakin et al. 2017), not of all inputs.", note=True),
            markup.flow(*rates), markup.scale("0 %", "100 % of what fools the source")))
    if ties := matrix.get("tied_targets"):
        rows = [[TITLES.get(t["attack"], t["attack"]), t["source"], ", ".join(t["targets"])] for t in ties]
        blocks.append(markup.folded("Lowest errors and their ties", markup.table(
            ["attack", "crafted on", "targets that cannot be told from the best at the 5 % level"], rows)))
    return blocks


def _has_transfer_rate(cell: Mapping[str, Any]) -> bool:
    rate = _top1(cell, "transfer_rate")
    return rate is not None and rate.get("value") is not None


def _heatmap(matrix: Mapping[str, Any], cells: Cells, attack: str, quantity: str = "error") -> Markup:
    """Sources x targets of one attack. Targets that are no sources for other targets share the first row."""
    targets = matrix["targets"]
    used = [s for s in dict.fromkeys([*matrix["sources"], *targets])
            if any((attack, s, t) in cells for t in targets if t != s)]
    rows = [(s, [cells.get((attack, s, t)) for t in targets]) for s in used]
    alone = [cells.get((attack, t, t)) if t not in used else None for t in targets]
    if any(alone):
        rows.insert(0, ("the target itself", alone))
    own = [(i, j) for i, (_, row) in enumerate(rows) for j, c in enumerate(row) if c and c["white_box"]]
    return markup.heatmap([name for name, _ in rows], targets, [[_top1(c, quantity) for c in row] for _, row in rows],
                          title=TITLES.get(attack, attack), corner="crafted on", own=own)


def _curves(curves: Sequence[Mapping[str, Any]], clean: Mapping[str, Any]) -> list[Section]:
    """Accuracy against eps, a chart for each target, beginning with its accuracy on clean images (eps 0)."""
    sources = dict.fromkeys(c["source"] for c in curves if not c["white_box"])
    looks = {name: i for i, name in enumerate(dict.fromkeys(map(_curve_name, curves)))}
    charts = []
    for target in dict.fromkeys(c["target"] for c in curves):
        start = _accuracy(_top1({"error": clean.get(target)}))
        series = []
        for c in (c for c in curves if c["target"] == target):
            points = [(0.0, start)] if start and 0 not in c["eps"] else []
            points += zip(c["eps"], c["top1"], strict=True)
            y, low, high = ([rate[k] for _, rate in points] for k in ("value", "low", "high"))
            series.append(figures.Series(_curve_name(c), [eps for eps, _ in points], y, low, high,
                                         looks[_curve_name(c)]))
        charts.append(figures.curves(series, title=target, x_label="eps, image units", y_label="accuracy, %",
                                     y_range=(0.0, 1.0), x_form=".4g"))
    note = "Accuracy in % of all test inputs; bands: 95 % intervals (Wilson's)."
    if sources:
        note += f" White-box, and transferred from {', '.join(sources)}."
    return [Section("Accuracy against eps", [markup.text(note, note=True), markup.grid(*charts)])] if charts else []


def _accuracy(error: Mapping[str, Any] | None) -> dict[str, float] | None:
    """The rate of accuracy of a rate of errors; None where that is not known."""
    if error is None or error["value"] is None:
        return None
    return {"value": 1 - error["value"], "low": 1 - error["high"], "high": 1 - error["low"]}


def _curve_name(curve: Mapping[str, Any]) -> str:
    attack = TITLES.get(curve["attack"], curve["attack"])
    return f"{attack}, white-box" if curve["white_box"] else f"{attack} from {curve['source']}"
