"""What stands on the report page of a run: from the files of its folder to the blocks of `page` and `figures`.

One function for each kind of results.json (its "kind"; without one, train). All of them take whatever else a
results.json offers in "sections", so that a kind needs no function of its own here to show something:

    "title", "verdict": text; "facts": a list of texts
    "sections": [{"title": text, "blocks": [{"block": a name in BLOCKS, ...the arguments of that function...}]}]

What is missing is left out; an unknown block or argument raises ValueError, which names it.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import figures, page
from . import samples as example_images
from .page import Markup, Number, Section

TITLES = {"clean": "clean", "fgsm": "FGSM", "rand_fgsm": "R+FGSM", "step_ll": "Step-LL", "rand_step_ll": "R+Step-LL",
          "step_rnd": "Step-Rnd", "ifgsm": "I-FGSM", "iter_ll": "Iter-LL", "pgd": "PGD"}
SUMMARY = {"max_black_box": "highest", "mean_black_box": "mean", "worst_case_black_box": "worst case per example"}
HIGH = "100 % error"


@dataclass(frozen=True)
class Folder:
    """The files of a run; what is not there is empty."""

    results: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: example_images.Samples | None

    @staticmethod
    def read(path: Path) -> Folder:
        """FileNotFoundError without results.json, ValueError for a damaged file."""
        if not (path / "results.json").is_file():
            raise FileNotFoundError(f"report: no results in {path} (there is no {path / 'results.json'})")
        metrics = path / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        try:
            config = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
            results = json.loads((path / "results.json").read_text())
            return Folder(results, config, [json.loads(line) for line in lines], example_images.load(path))
        except json.JSONDecodeError as e:
            raise ValueError(f"report: a file of the run in {path} is corrupt ({e})") from e


# ------------------------------------------------------------------------------------------ sections as data


def _grid(blocks: Sequence[Mapping[str, Any]]) -> Markup:
    return page.grid(*map(block, blocks))


def _flow(blocks: Sequence[Mapping[str, Any]]) -> Markup:
    return page.flow(*map(block, blocks))


def _folded(title: str, blocks: Sequence[Mapping[str, Any]]) -> Markup:
    return page.folded(title, *map(block, blocks))


def _text(paragraphs: Sequence[str], note: bool = False) -> Markup:
    return page.text(*paragraphs, note=note)


BLOCKS: dict[str, Callable[..., Markup]] = {
    "text": _text, "table": page.table, "heatmap": page.heatmap, "scale": page.scale, "checklist": page.checklist,
    "key_values": page.key_values, "curves": figures.curves, "surface": figures.surface, "grid": _grid,
    "flow": _flow, "folded": _folded}


def block(data: Mapping[str, Any]) -> Markup:
    """One block from plain data: {"block": name, **arguments}."""
    arguments = dict(data)
    name = arguments.pop("block", None)
    if name not in BLOCKS:
        raise ValueError(f"report: block: got {name!r}, want one of {', '.join(BLOCKS)}")
    try:
        return BLOCKS[name](**arguments)
    except TypeError as e:
        raise ValueError(f"report: block {name}: {e}") from e


def given_sections(results: Mapping[str, Any]) -> list[Section]:
    """The sections that results.json brings itself."""
    return [Section(s["title"], [block(b) for b in s.get("blocks", [])]) for s in results.get("sections", [])]


# ---------------------------------------------------------------------------------------- shared by all kinds


def how_it_ran(folder: Folder) -> Section:
    """The configuration, the versions and the seconds, each behind a heading that opens."""
    parts = [("Configuration", folder.config), ("Versions", folder.results.get("versions")),
             ("Seconds", folder.results.get("seconds"))]
    return Section("How it was run", [page.key_values(title, values) for title, values in parts if values])


def budget(eps: float) -> str:
    """eps as it is usually written: in 255ths where it is a whole number of them."""
    n = eps * 255
    return f"eps {round(n)}/255" if abs(n - round(n)) < 1e-6 and round(n) < 64 else f"eps {eps:.4g}"


def facts(folder: Folder) -> list[str]:
    """Data set, budget, seeds, time."""
    r = folder.results
    found = [f"data {r['dataset']}"] if "dataset" in r else []
    found += [budget(r["eps"])] if isinstance(r.get("eps"), (int, float)) else []
    total = r["seconds"].get("total") if isinstance(r.get("seconds"), dict) else None
    found += [f"{total:.0f} s"] if total is not None else []
    return [*found, *r.get("facts", [])]


def examples(samples: example_images.Samples | None, eps: float | None) -> list[Section]:
    """Images as they were, as they were attacked, and the difference."""
    if samples is None:
        return []
    clean = samples.pictures["clean"]
    rows = [page.ImageRow("clean", clean, _captions(samples, "clean"))]
    reach = 255 * eps if eps else 255
    for name in [r for r in samples.pictures if r != "clean"]:
        title, pictures = TITLES.get(name, name), samples.pictures[name]
        difference = (pictures.astype(np.int16) - clean) * (127 / reach)
        rows += [page.ImageRow(title, pictures, _captions(samples, name)),
                 page.ImageRow(f"{title}, difference", (128 + difference).round().clip(0, 255).astype(np.uint8),
                               label=f"difference ×\u00a0{127 / reach:.3g}")]
    models = list(samples.predictions["clean"])
    made = f"The attacks were crafted on {samples.source}. " if samples.source else ""
    note = (f"{made}Below each image: the class that {', '.join(models)} (in this order) take it for; wrong ones are "
            "underlined and red. Differences are around mid-grey, so that the whole budget reaches from black to "
            "white.")
    return [Section("Examples", [page.images([f"class {y}" for y in samples.labels], rows, note=note)])]


def _captions(samples: example_images.Samples, row: str) -> list[Markup]:
    return [page.join([page.tag("span", guess[i], title=model, class_=None if guess[i] == label else "wrong")
                       for model, guess in samples.predictions[row].items()], " ")
            for i, label in enumerate(samples.labels)]


# -------------------------------------------------------------------------------------------------- train


def train(folder: Folder) -> str:
    """The page of a training run."""
    r = folder.results
    models = r["models"]
    seeds = len(next(iter(models.values()))["per_seed"])
    claims = [{"state": "good" if c.holds else "bad", "word": "holds" if c.holds else "does not hold",
               "claim": c.text, "evidence": c.numbers} for c in claims_of(r)]
    sections = [Section("Errors", [_errors(r, seeds)])]
    if claims:
        sections.append(Section("Claims of the papers", [page.checklist(claims)]))
    sections.append(Section("White-box and transferred attacks", [
        page.text("Error in % of all test inputs. Framed: white-box, crafted on the model itself.", note=True),
        page.flow(*(_matrix(r, a) for a in _attacks(r))), page.scale("0 %", HIGH)]))
    sections += [*_training(folder), *examples(folder.samples, r["eps"]), *given_sections(r), how_it_ran(folder)]
    told = [*facts(folder), f"{seeds} seed{'s' if seeds > 1 else ''}"]
    return page.document(r.get("title", f"Errors under attack: {', '.join(models)}"), r.get("verdict", verdict(r)),
                         told, sections, _foot(r))


def _foot(results: Mapping[str, Any]) -> str:
    ours = results.get("versions", {})
    return f"ensadv_fast {ours['ensadv_fast']}, torch {ours['torch']}" if {"ensadv_fast", "torch"} <= set(ours) else ""


def _attacks(results: Mapping[str, Any]) -> list[str]:
    return list(next(iter(results["models"].values()))["white_box"])


def verdict(results: Mapping[str, Any]) -> str:
    """The run in one or two sentences: black-box errors, from the lowest on, and the highest white-box ones."""
    models = results["models"]

    def ranked(error: Callable[[Mapping[str, Any]], float]) -> str:
        pairs = sorted(((error(m), name) for name, m in models.items()))
        return ", ".join(f"{name} {page.show(e)} %" for e, name in pairs)

    told = []
    if all(m["max_black_box"] is not None for m in models.values()):
        told.append(f"Highest error under attacks from held-out networks: {ranked(lambda m: m['max_black_box'])}.")
    told.append(f"Under white-box attacks: {ranked(lambda m: max(m['white_box'].values()))}.")
    return " ".join(told)


@dataclass(frozen=True)
class Claim:
    """A claim of Tramer et al. (ICLR 2018), whether it held here, and the numbers."""

    text: str
    holds: bool
    numbers: str


def claims_of(results: Mapping[str, Any]) -> list[Claim]:
    """The claims that these models allow to check."""
    by_suffix = {name.rpartition("_")[2]: m for name, m in results["models"].items() if "_" in name}
    adv, ens = by_suffix.get("adv"), by_suffix.get("ens")
    found = []
    if adv and ens and adv["max_black_box"] is not None:
        a, e = adv["max_black_box"], ens["max_black_box"]
        found.append(Claim("Ensemble training lowers the held-out black-box error of adversarial training", a > e,
                           f"maximum {100 * a:.1f} % -> {100 * e:.1f} %"))
    if adv and {"fgsm", "rand_fgsm"} <= adv["white_box"].keys():
        f, r = adv["white_box"]["fgsm"], adv["white_box"]["rand_fgsm"]
        found.append(Claim("A random start finds more errors on the adversarially trained model than FGSM alone",
                           r > f, f"FGSM {100 * f:.1f} %, R+FGSM {100 * r:.1f} %"))
    return found


def _errors(results: Mapping[str, Any], seeds: int) -> Markup:
    models = results["models"]
    held_out = [s for s, role in results["sources"].items() if role == "held_out"]
    rows = [("clean", lambda m: m["clean"])]
    rows += [(f"white-box {TITLES.get(a, a)}", lambda m, a=a: m["white_box"][a]) for a in _attacks(results)]
    if held_out:
        rows += [(f"black-box, {words}", lambda m, k=k: m[k]) for k, words in SUMMARY.items()]
    body = [[name, *page.mark_best([Number(get(m), get(m["std"])) for m in models.values()])] for name, get in rows]
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so no spread is known"
    note = f"In % of all test inputs, {over}; lower is better"
    if held_out:
        note += (f". Black-box: over all attacks from the held-out {', '.join(held_out)}; an input counts in the worst "
                 "case if any of them fools the model")
    return page.table(["", *models], body, note=note)


def _matrix(results: Mapping[str, Any], attack: str) -> Markup:
    """One attack: each model's white-box errors, then sources x models."""
    models = results["models"]
    rows = [("the model itself", lambda m: m["white_box"][attack])]
    rows += [(f"{s} ({role.replace('_', '-')})", lambda m, s=s: m["black_box"][attack][s])
             for s, role in results["sources"].items()]
    values = [[Number(get(m), get(m["std"])) for m in models.values()] for _, get in rows]
    return page.heatmap([name for name, _ in rows], list(models), values, title=TITLES.get(attack, attack),
                        corner="crafted on", own=[(0, j) for j in range(len(models))])


# The key in metrics.jsonl, the title, the quantity, its form, and the range that is shown.
PANELS = (("clean_loss", "Loss on clean samples", "cross-entropy", ".3f", None),
          ("adv_loss", "Loss on adversarial samples", "cross-entropy", ".3f", None),
          ("clean_accuracy", "Accuracy on clean samples", "accuracy, %", ".1%", (0.0, 1.0)),
          ("adv_accuracy", "Accuracy on adversarial samples", "accuracy, %", ".1%", (0.0, 1.0)))


def _training(folder: Folder) -> list[Section]:
    """Curves of the targets, over seeds; those of sources behind a heading."""
    by_job: dict[str, list[dict[str, Any]]] = {}
    for record in folder.metrics:
        by_job.setdefault(record["job"], []).append(record)
    targets = {name: [by_job[job] for seed in m["per_seed"] if (job := f"{name}-seed{seed}") in by_job]
               for name, m in folder.results["models"].items()}
    sources = {job.removeprefix("source-"): [records] for job, records in sorted(by_job.items())
               if job.startswith("source-")}
    seeds = max(map(len, targets.values()), default=0)
    note = ("Of the samples of one training batch every few steps"
            + (f"; lines are means over {seeds} seeds, bands reach from the lowest to the highest." if seeds > 1
               else "."))
    panels = {kind: [chart for panel in PANELS if (chart := _panel(jobs, *panel))]
              for kind, jobs in (("targets", targets), ("sources", sources))}
    blocks = [page.text(note, note=True), page.grid(*panels["targets"])] if panels["targets"] else []
    if panels["sources"]:
        blocks.append(page.folded("Sources", page.grid(*panels["sources"])))
    return [Section("Training", blocks)] if blocks else []


def _panel(jobs: Mapping[str, list[list[dict[str, Any]]]], key: str, title: str, y_label: str,
           form: str, y_range: tuple[float, float] | None) -> Markup | None:
    """One quantity of metrics.jsonl against the step; None where no job has it."""
    series = []
    for look, (name, runs) in enumerate(jobs.items()):
        at: dict[int, list[float]] = {}
        for record in (r for run in runs for r in run):
            if record.get(key) is not None:
                at.setdefault(record["step"], []).append(record[key])
        if at:
            steps = sorted(at)
            band = {"low": [min(at[s]) for s in steps], "high": [max(at[s]) for s in steps]} if len(runs) > 1 else {}
            series.append(figures.Series(name, steps, [float(np.mean(at[s])) for s in steps], look=look,
                                         **band))
    if not series:
        return None
    return figures.curves(series, title=title, x_label="step", y_label=y_label, form=form, y_range=y_range)


# ------------------------------------------------------------------------------------- evaluate and diagnose


def general(folder: Folder) -> str:
    """The page of any other run: its own sections, example images, and how it was run."""
    r = folder.results
    sections = [*given_sections(r), *examples(folder.samples, r.get("eps")), how_it_ran(folder)]
    return page.document(r.get("title", "Results"), r.get("verdict", ""), facts(folder), sections, _foot(r))


KINDS: dict[str, Callable[[Folder], str]] = {"train": train, "evaluate": general, "diagnose": general}
