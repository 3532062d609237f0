"""The report page of `ensadv-fast diagnose`.

It reads from results.json

    "models": {name: {"masking", "gradient_norm", "gradient_alignment", "approximation_ratio", "perturbation_cosine",
                      "random_start_gap", "label_leaking", "cone_dimension": the fields of what `diagnose` measures,
                      "surfaces": [...], "examples": a file of the run folder}}

and leaves out what is missing.
"""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

from . import examples, figures, layouts, markup
from .layouts import Folder
from .markup import Cell, Markup, Number, Section

# Of each measurement: the words, the path in a model's results, and the form.
MEASUREMENTS = (
    ("mean L2 norm of the gradient", ("gradient_norm", "mean_l2"), ".3g"),
    ("gradient alignment: cosine at x and at x + noise", ("gradient_alignment", "mean"), ".3f"),
    ("loss after one step / after many", ("approximation_ratio", "ratio"), ".3f"),
    ("cosine of one step and of many", ("perturbation_cosine", "mean"), ".3f"),
    ("R+FGSM minus FGSM, percentage points", ("random_start_gap", "gap"), ".1%"),
    ("accuracy under FGSM minus clean, percentage points", ("label_leaking", "advantage"), ".1%"),
)


def render(folder: Folder) -> str:
    """The page of a diagnosis."""
    r = folder.results
    models: Mapping[str, Mapping[str, Any]] = r.get("models", {})
    masking = {name: m["masking"] for name, m in models.items() if m.get("masking")}
    sections = []
    if masking:
        sections.append(Section("Verdicts", [markup.checklist(_verdict_item(name, m) for name, m in masking.items())]))
        sections.append(Section("Checks", _checks(masking)))
        sections.append(Section("Errors", [_errors(masking), *_growing(masking)]))
    sections += [*_measurements(models), *_cones(models), *_surfaces(models), *_examples(folder, models)]
    title = f"Robust, or masked gradients? {', '.join(models)}" if models else "Diagnosis"
    more = [f"{r['images']:,} test images"] if "images" in r else []
    return layouts.document(folder, title, _verdict(masking), sections, more)


# ------------------------------------------------------------------------------------------------- checks


# Whether gradients are masked -> state, word, and how the page's first lines begin.
OUTCOMES = {True: ("bad", "masked", "Masked gradients"), None: ("open", "undecided: more --images", "Undecided"),
            False: ("good", "not masked", "No sign of masked gradients")}
NOT_ROBUST = 0.5  # error under attack that is this much above the clean one, for certain: nothing good to say


def _is_masked(masking: Mapping[str, Any]) -> bool | None:
    """None where the report leaves it open, or a check does: reports of version 0.1 say False then."""
    decided = all(c["status"] in ("passed", "suspicious") for c in masking["checks"])
    return masking["masked"] if masking["masked"] or decided else None


def _verdict(masking: Mapping[str, Mapping[str, Any]]) -> str:
    """All verdicts in a few sentences: the error found of each model, and which models mask their gradients."""
    told = []
    for masked, words in ((False, "Error under all attacks tried together"), (True, "Where gradients are masked, the "
                          "error is at least")):
        if errors := {name: m["worst_case"]["value"] for name, m in masking.items() if bool(m["masked"]) is masked}:
            told.append(f"{words}: {layouts.rank(errors)}.")
    groups = {words: [name for name, m in masking.items() if _is_masked(m) is outcome]
              for outcome, (_, _, words) in OUTCOMES.items()}
    return " ".join([*told, *(f"{words}: {', '.join(names)}." for words, names in groups.items() if names)])


def _verdict_item(name: str, masking: Mapping[str, Any]) -> dict[str, str]:
    state, word, _ = OUTCOMES[_is_masked(masking)]
    if state == "good" and masking["worst_case"]["low"] - masking["errors"]["clean"]["high"] > NOT_ROBUST:
        state, word = "bad", "not robust"
    clean, worst = (markup.show(v["value"]) for v in (masking["errors"]["clean"], masking["worst_case"]))
    claim = f"{name}: {clean} % error on clean images, {'at least ' if masking['masked'] else ''}{worst} % under attack"
    return {"state": state, "word": word, "claim": claim, "evidence": masking["verdict"]}


def _checks(masking: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """One model's checks in words. Of several models: a table, what is suspicious in words, and all checks folded."""
    items = {name: [_check(c) for c in m["checks"]] for name, m in masking.items()}
    if len(items) == 1:
        return [markup.checklist(one) for one in items.values()]
    found = {(name, item["claim"]): markup.outcome(item["state"]) for name, one in items.items() for item in one}
    rows = [[check, *(found.get((name, check)) for name in items)] for check in dict.fromkeys(c for _, c in found)]
    bad = [{**item, "claim": f"{name}, {item['claim']}"} for name, one in items.items() for item in one
           if item["state"] == "bad"]
    return [markup.table(["", *items], rows), *([markup.checklist(bad)] if bad else []),
            *(markup.folded(f"Checks of {name} in words", markup.checklist(one)) for name, one in items.items())]


def _check(check: Mapping[str, Any]) -> dict[str, str]:
    state = {"passed": "good", "suspicious": "bad"}.get(check["status"], "open")
    return {"state": state, "claim": check["name"], "evidence": check["sentence"]}


def _errors(masking: Mapping[str, Mapping[str, Any]]) -> Markup:
    rows: dict[str, list[Cell]] = {}
    for attack in dict.fromkeys(a for m in masking.values() for a in m["errors"]):
        rows[attack] = [m["errors"].get(attack) for m in masking.values()]
    rows["any of these"] = [m["worst_case"] for m in masking.values()]
    masked = [bool(m["masked"]) for m in masking.values()]
    body = []
    for name, row in rows.items():  # the errors found of a masked model are too low to be compared
        marked = iter(markup.mark_best([cell for cell, m in zip(row, masked, strict=True) if not m]))
        body.append([name, *(cell if m else next(marked) for cell, m in zip(row, masked, strict=True))])
    note = "Error in % of the test images that were looked at; small print: 95 % intervals (Wilson's); lower is better"
    if any(masked):
        note += ". Where gradients are masked, attacks find too little, and nothing is marked as best"
    return markup.table(["", *masking], body, note=note)


def _growing(masking: Mapping[str, Mapping[str, Any]]) -> list[Markup]:
    """PGD's error against multiples of eps, from the check that it does not fall."""
    series = []
    for look, (name, m) in enumerate(masking.items()):
        numbers = [c["numbers"].get("error", {}) for c in m["checks"] if c["name"] == "growing eps"]
        if numbers and numbers[0]:
            points = sorted((float(k), v) for k, v in numbers[0].items())
            series.append(_with_band(name, points, look))
    return [markup.grid(figures.curves(series, title="Error under PGD as eps grows", x_label="times eps",
                                       y_label="error, %", y_range=(0.0, 1.0)))] if series else []


def _with_band(name: str, points: list[tuple[float, Mapping[str, float]]], look: int) -> figures.Series:
    y, low, high = ([v[k] for _, v in points] for k in ("value", "low", "high"))
    return figures.Series(name, [x for x, _ in points], y, low, high, look)


# ------------------------------------------------------------------------------------------- measurements


def _measurements(models: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    rows = []
    for words, (measurement, field), form in MEASUREMENTS:
        found = [markup.as_number((m.get(measurement) or {}).get(field)) for m in models.values()]
        if any(n.value is not None for n in found):
            rows.append([words, *(replace(n, form=form) for n in found)])
    leaked = [(m.get("label_leaking") or {}).get("leaked", {}) for m in models.values()]
    for rule in dict.fromkeys(rule for counts in leaked for rule in counts):
        rows.append([f"labels leaked, beside {rule.replace('_', ' ')} labels",
                     *(Number(counts.get(rule), form="d") for counts in leaked)])
    return [Section("Measurements", [markup.table(["", *models], rows)])] if rows else []


def _cones(models: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    series = []
    for look, (name, m) in enumerate(models.items()):
        if found := (m.get("cone_dimension") or {}).get("at_least"):
            series.append(_with_band(name, sorted((float(k), v) for k, v in found.items()), look))
    note = ("Of the images that are classified correctly: the share around which at least k orthogonal directions, all "
            "along the gradient, lead to errors (Tramèr et al. 2018).")
    if not series:
        return []
    chart = figures.curves(series, title="Directions that fool", x_label="k", y_label="images, %", y_range=(0.0, 1.0))
    return [Section("Adversarial cone", [markup.text(note, note=True), markup.grid(chart)])]


# ----------------------------------------------------------------------------------- surfaces and examples


def _surfaces(models: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Of each model the surfaces around the first image; those around the others are folded."""
    blocks = []
    for name, m in models.items():
        if by_image := _by_image(name, m.get("surfaces") or []):
            first, *others = by_image
            blocks += first
            if others:
                blocks.append(markup.folded(f"{name} around other images ({len(others)})",
                                            *(block for one in others for block in one)))
    note = ("Cross-entropy around a test image, along the sign of its gradient and an orthogonal direction (figure 1 "
            "of Tramèr et al. 2018). Sharp curvature close to the middle hides errors from single steps.")
    return [Section("Loss around images", [markup.text(note, note=True), *blocks])] if blocks else []


def _by_image(name: str, surfaces: list[Mapping[str, Any]]) -> list[list[Markup]]:
    """The surfaces of each image. loss[i][j] is at along[i], across[j]; in the figure along goes to the right."""
    found: dict[int, list[Markup]] = {}
    for s in surfaces:
        second = f"gradient of {s['other']}" if s.get("other") else "a random direction"
        for i, (loss, label) in enumerate(zip(s["loss"], s["labels"], strict=True)):
            found.setdefault(i, []).append(figures.surface(
                list(zip(*loss, strict=True)), s["along"], s["across"], x_label="along its gradient",
                y_label=second, z_label="loss",
                title=f"{name}: image {i + 1}, class {label}, within {layouts.budget(s['eps'])}"))
    return list(found.values())


def _examples(folder: Folder, models: Mapping[str, Mapping[str, Any]]) -> list[Section]:
    """Each model under its own attacks; the first is shown at once, the others are folded."""
    blocks: list[Markup] = []
    for name, m in models.items():
        found = examples.load(folder.path / m["examples"]) if m.get("examples") else None
        for section in layouts.example_sections(found, folder.results.get("eps")):
            blocks += [markup.folded(f"On {name}", *section.blocks)] if blocks else section.blocks
    return [Section("Examples", blocks)] if blocks else []
