"""What the report pages of all commands share: the files of a run, and sections made from plain data.

A page has, from the top: a verdict in a line or two, the numbers, pictures, and how it was run. `train_page`,
`evaluate_page` and `diagnose_page` fill it from what their command writes to results.json. Any results.json may hold
besides

    "title", "verdict": text; "facts": a list of short texts
    "sections": [{"title": text, "blocks": [{"block": a name in BLOCKS, ...the arguments of that function...}]}]

The page shows these sections after its own. What is missing is left out. An unknown block or argument raises
ValueError, which names it.
"""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from . import examples, figures, markup
from .examples import Samples
from .markup import Markup, Section

TITLES = {"clean": "clean", "fgsm": "FGSM", "rand_fgsm": "R+FGSM", "step_ll": "Step-LL", "rand_step_ll": "R+Step-LL",
          "step_rnd": "Step-Rnd", "ifgsm": "I-FGSM", "iter_ll": "Iter-LL", "pgd": "PGD"}


@dataclass(frozen=True)
class Folder:
    """The files of a run: results.json, config.json, the lines of metrics.jsonl, examples.npz. A file that is not there
    is empty, or None."""

    path: Path
    results: dict[str, Any]
    config: dict[str, Any]
    metrics: list[dict[str, Any]]
    samples: Samples | None

    @staticmethod
    def read(path: Path) -> Folder:
        """The files in `path`. FileNotFoundError without results.json, ValueError for a damaged file."""
        if not (path / "results.json").is_file():
            raise FileNotFoundError(f"report: no results in {path} (there is no {path / 'results.json'})")
        metrics = path / "metrics.jsonl"
        lines = metrics.read_text().splitlines() if metrics.is_file() else []
        try:
            config = json.loads((path / "config.json").read_text()) if (path / "config.json").is_file() else {}
            results = json.loads((path / "results.json").read_text())
            return Folder(path, results, config, [json.loads(line) for line in lines],
                          examples.load(path / examples.FILE))
        except json.JSONDecodeError as e:
            raise ValueError(f"report: a file of the run in {path} is corrupt ({e})") from e


# ------------------------------------------------------------------------------------------ sections as data


def _grid(blocks: Sequence[Mapping[str, Any]]) -> Markup:
    return markup.grid(*map(block, blocks))


def _flow(blocks: Sequence[Mapping[str, Any]]) -> Markup:
    return markup.flow(*map(block, blocks))


def _folded(title: str, blocks: Sequence[Mapping[str, Any]]) -> Markup:
    return markup.folded(title, *map(block, blocks))


def _text(paragraphs: Sequence[str], note: bool = False) -> Markup:
    return markup.text(*paragraphs, note=note)


BLOCKS: dict[str, Callable[..., Markup]] = {
    "text": _text, "table": markup.table, "heatmap": markup.heatmap, "scale": markup.scale,
    "checklist": markup.checklist, "key_values": markup.key_values, "curves": figures.curves,
    "surface": figures.surface, "grid": _grid, "flow": _flow, "folded": _folded}


def block(data: Mapping[str, Any]) -> Markup:
    """One block from plain data: {"block": a name in BLOCKS, **arguments}. ValueError for others."""
    arguments = dict(data)
    name = arguments.pop("block", None)
    if name not in BLOCKS:
        raise ValueError(f"report: block must be one of {', '.join(BLOCKS)}, got {name!r}")
    try:
        return BLOCKS[name](**arguments)
    except TypeError as e:
        raise ValueError(f"report: block {name}: {e}") from e


def read_sections(results: Mapping[str, Any]) -> list[Section]:
    """The sections that results.json itself holds."""
    return [Section(s["title"], [block(b) for b in s.get("blocks", [])]) for s in results.get("sections", [])]


# ---------------------------------------------------------------------------------------- shared by all kinds


def how_it_ran(folder: Folder) -> Section:
    """The configuration, the versions and the seconds, each folded behind its heading."""
    parts = [("Configuration", folder.config), ("Versions", folder.results.get("versions")),
             ("Seconds", folder.results.get("seconds"))]
    return Section("How it was run", [markup.key_values(title, values) for title, values in parts
                                      if isinstance(values, dict) and values])


def budget(eps: float) -> str:
    """eps in words, in 255ths where it is a whole number of them below 64."""
    n = eps * 255
    return f"eps {round(n)}/255" if abs(n - round(n)) < 1e-6 and round(n) < 64 else f"eps {eps:.4g}"


def facts(folder: Folder) -> list[str]:
    """Data set, budget, seeds, time."""
    r = folder.results
    found = [f"data {r['dataset']}"] if "dataset" in r else []
    found += [budget(r["eps"])] if isinstance(r.get("eps"), (int, float)) else []
    seconds = r.get("seconds")
    total = seconds.get("total") if isinstance(seconds, dict) else seconds
    found += [f"{total:.0f} s"] if total is not None else []
    return [*found, *r.get("facts", [])]


def example_sections(samples: Samples | None, eps: float | None) -> list[Section]:
    """Images as they were, as they were attacked, and the difference, in units of eps; no section without samples."""
    if samples is None:
        return []
    clean = samples.pictures["clean"]
    rows = [markup.ImageRow("clean", clean, _captions(samples, "clean"))]
    reach = 255 * eps if eps else 255
    for name in [r for r in samples.pictures if r != "clean"]:
        title, pictures = TITLES.get(name, name), samples.pictures[name]
        difference = (pictures.astype(np.int16) - clean) * (127 / reach)
        rows += [markup.ImageRow(title, pictures, _captions(samples, name)),
                 markup.ImageRow(f"{title}, difference", (128 + difference).round().clip(0, 255).astype(np.uint8),
                                 label=f"difference ×\u00a0{127 / reach:.3g}")]
    models = list(samples.predictions["clean"])
    made = f"The attacks were crafted on {samples.source}. " if samples.source else ""
    takers = f"{', '.join(models)} " + ("(in this order) take" if len(models) > 1 else "takes")
    note = (f"{made}Below each image: the class that {takers} it for; wrong ones are underlined and red. "
            "Differences are around mid-grey, so that the whole budget reaches from black to white.")
    return [Section("Examples", [markup.images([f"class {y}" for y in samples.labels], rows, note=note)])]


def _captions(samples: Samples, row: str) -> list[Markup]:
    return [markup.join([markup.tag("span", guess[i], title=model, class_=None if guess[i] == label else "wrong")
                         for model, guess in samples.predictions[row].items()], " ")
            for i, label in enumerate(samples.labels)]


def document(folder: Folder, title: str, verdict: str, sections: Sequence[Section], more: Sequence[str] = ()) -> str:
    """The page: `sections`, those that results.json holds, and how it was run. more: facts beside the usual ones."""
    r = folder.results
    versions = r.get("versions") or {}
    foot = ", ".join(f"{name} {versions[name]}" for name in ("ensadv_fast", "torch") if name in versions)
    return markup.document(r.get("title", title), r.get("verdict", verdict), [*facts(folder), *more],
                           [*sections, *read_sections(r), how_it_ran(folder)], foot)


def rank(errors: Mapping[str, float]) -> str:
    """Models with their errors in words, the lowest first, for a verdict."""
    return ", ".join(f"{name} {markup.show(e)}\u00a0%" for name, e in sorted(errors.items(), key=lambda item: item[1]))
