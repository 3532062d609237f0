"""The report page of `ensadv-fast train`."""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from . import figures, layouts, markup
from .layouts import TITLES, Folder
from .markup import Markup, Number, Section

SUMMARY = {"max_black_box": "highest", "mean_black_box": "mean", "worst_case_black_box": "worst case per example"}


def render(folder: Folder) -> str:
    """The page of a training run, from results.json, metrics.jsonl, config.json and examples.npz."""
    r = folder.results
    models = r["models"]
    seeds = len(next(iter(models.values()))["per_seed"])
    claims = [{"state": STATES[c.holds], "word": c.verdict, "claim": c.text, "evidence": c.numbers}
              for c in claims_of(r)]
    sections = [Section("Errors", [_errors(r, seeds)])]
    if claims:
        sections.append(Section("Claims of the papers", [markup.checklist(claims)]))
    sections.append(Section("White-box and transferred attacks", [
        markup.text("Error in % of all test inputs. Framed: white-box, crafted on the model itself.", note=True),
        markup.flow(*(_matrix(r, a) for a in _attacks(r))), markup.scale("0 %", "100 % error")]))
    sections += [*_training(folder), *layouts.example_sections(folder.samples, r["eps"])]
    return layouts.document(folder, f"Errors under attack: {', '.join(models)}", verdict(r), sections,
                            [f"{seeds} seed{'s' if seeds > 1 else ''}"])


def _attacks(results: Mapping[str, Any]) -> list[str]:
    return list(next(iter(results["models"].values()))["white_box"])


def verdict(results: Mapping[str, Any]) -> str:
    """The run in two sentences: each model's highest error, black-box and white-box."""
    models, told = results["models"], []
    if all(m["max_black_box"] is not None for m in models.values()):
        told.append("Highest error under attacks from held-out networks: "
                    f"{layouts.rank({name: m['max_black_box'] for name, m in models.items()})}.")
    white = {name: max(m["white_box"].values()) for name, m in models.items()}
    return " ".join([*told, f"Under white-box attacks: {layouts.rank(white)}."])


VERDICTS = {True: "holds", False: "does not hold", None: "not decidable at this size"}
STATES = {True: "good", False: "bad", None: "open"}


@dataclass(frozen=True)
class Claim:
    """A claim of Tramer et al. (ICLR 2018), whether it held in this run (None: the intervals leave it open), and the
    numbers."""

    text: str
    holds: bool | None
    numbers: str

    @property
    def verdict(self) -> str:
        return VERDICTS[self.holds]


def claims_of(results: Mapping[str, Any]) -> list[Claim]:
    """The claims of a run. Runs of version 0.1 say neither claims nor intervals: of theirs nothing is decided."""
    if "claims" in results:
        return [Claim(**claim) for claim in results["claims"]]
    by_suffix = {name.rpartition("_")[2]: m for name, m in results["models"].items() if "_" in name}
    adv, ens = by_suffix.get("adv"), by_suffix.get("ens")
    found = []
    if adv and ens and adv["max_black_box"] is not None:
        a, e = adv["max_black_box"], ens["max_black_box"]
        found.append(Claim("Ensemble training lowers the held-out black-box error of adversarial training", None,
                           f"maximum {100 * a:.1f} % → {100 * e:.1f} %; this run kept no intervals"))
    if adv and {"fgsm", "rand_fgsm"} <= adv["white_box"].keys():
        f, r = adv["white_box"]["fgsm"], adv["white_box"]["rand_fgsm"]
        found.append(Claim("A random start finds more errors on the adversarially trained model than FGSM alone", None,
                           f"FGSM {100 * f:.1f} %, R+FGSM {100 * r:.1f} %; this run kept no intervals"))
    return found


def _spread(model: Mapping[str, Any], path: Sequence[str]) -> Number:
    """The number under this path in a model's results, with its standard deviation."""
    value: Any
    spread: Any
    value, spread = model, model["std"]
    for name in path:
        value, spread = value[name], spread[name]
    return Number(value, spread)


def _errors(results: Mapping[str, Any], seeds: int) -> Markup:
    models = results["models"]
    held_out = [s for s, role in results["sources"].items() if role == "held_out"]
    rows = [("clean", ["clean"]), *((f"white-box {TITLES.get(a, a)}", ["white_box", a]) for a in _attacks(results))]
    if held_out:
        rows += [(f"black-box, {words}", [k]) for k, words in SUMMARY.items()]
    body = [[name, *markup.mark_best([_spread(m, path) for m in models.values()])] for name, path in rows]
    over = f"mean ± standard deviation over {seeds} seeds" if seeds > 1 else "one seed, so no spread is known"
    note = f"In % of all test inputs, {over}; lower is better"
    if held_out:
        note += (f". Black-box: over all attacks from the held-out {', '.join(held_out)}; an input counts in the worst "
                 "case if any of them fools the model")
    return markup.table(["", *models], body, note=note)


def _matrix(results: Mapping[str, Any], attack: str) -> Markup:
    """One attack: each model's white-box errors, then sources x models."""
    models = results["models"]
    rows = [("the model itself", ["white_box", attack])]
    rows += [(f"{s} ({role.replace('_', '-')})", ["black_box", attack, s]) for s, role in results["sources"].items()]
    values = [[_spread(m, path) for m in models.values()] for _, path in rows]
    return markup.heatmap([name for name, _ in rows], list(models), values, title=TITLES.get(attack, attack),
                          corner="crafted on", own=[(0, j) for j in range(len(models))])


# Of each chart: the key in metrics.jsonl, the title, the quantity, its form, and the range that is shown (None: all).
PANELS = (("clean_loss", "Loss on clean samples", "cross-entropy", ".3f", None),
          ("adv_loss", "Loss on adversarial samples", "cross-entropy", ".3f", None),
          ("clean_accuracy", "Accuracy on clean samples", "accuracy, %", ".1%", (0.0, 1.0)),
          ("adv_accuracy", "Accuracy on adversarial samples", "accuracy, %", ".1%", (0.0, 1.0)),
          ("monitor.fgsm_accuracy", "Accuracy under FGSM, images that are watched", "accuracy, %", ".1%", (0.0, 1.0)),
          ("monitor.pgd_accuracy", "Accuracy under PGD, images that are watched", "accuracy, %", ".1%", (0.0, 1.0)),
          ("monitor.alignment", "Gradient alignment, images that are watched", "cosine", ".3f", None))
# The same for time and memory, which `train.Meter` measures.
SPEED = (("images_per_second", "Throughput", "images a second", ".4g", None),
         ("share_train", "Time in training steps", "share of time, %", ".1%", (0.0, 1.0)),
         ("share_attack", "Time in crafting", "share of time, %", ".1%", (0.0, 1.0)),
         ("share_data", "Time in waiting for data", "share of time, %", ".1%", (0.0, 1.0)),
         ("peak_gb", "Peak memory so far", "GB", ".3g", None))
SKIPPED = "skipped"  # the key for the number of images of the epoch that could not be read so far


def _records(folder: Folder) -> dict[str, list[dict[str, Any]]]:
    """The lines of metrics.jsonl by job, with the keys of PANELS and SPEED that a line holds in another form."""
    by_job: dict[str, list[dict[str, Any]]] = {}
    for record in folder.metrics:
        more = {f"monitor.{k}": v for k, v in (record.get("monitor") or {}).items()}
        if record.get("peak_memory") is not None:
            more["peak_gb"] = record["peak_memory"] / 1e9
        by_job.setdefault(record["job"], []).append(record | more)
    return by_job


def _training(folder: Folder) -> list[Section]:
    """Curves of the targets, over seeds; curves of the sources folded; then time and memory."""
    by_job = _records(folder)
    targets = {name: [by_job[job] for seed in m["per_seed"] if (job := f"{name}-seed{seed}") in by_job]
               for name, m in folder.results["models"].items()}
    sources = {job.removeprefix("source-"): [records] for job, records in sorted(by_job.items())
               if job.startswith("source-")}
    seeds = max(map(len, targets.values()), default=0)
    note = ("A point is the mean over all training steps since the point before, and over their samples"
            + (f"; lines are means over {seeds} seeds, bands reach from the lowest to the highest." if seeds > 1
               else "."))
    panels = {kind: _panels(jobs, PANELS) for kind, jobs in (("targets", targets), ("sources", sources))}
    blocks = [markup.text(note, note=True), markup.grid(*panels["targets"])] if panels["targets"] else []
    overfit = [{"state": "bad", "word": "overfits", "claim": f"{job.replace('-seed', ', seed ')} at step {r['step']}",
                "evidence": "It withstands one step and no longer many: catastrophic overfitting."}
               for job, records in by_job.items() for r in records if r.get("monitor.overfitting")]
    blocks[:0] = [markup.checklist(overfit)] if overfit else []
    if panels["sources"]:
        blocks.append(markup.folded("Sources", markup.grid(*panels["sources"])))
    sections = [Section("Training", blocks)] if blocks else []
    everyone = targets | {f"{name} (source)": records for name, records in sources.items()}
    return [*sections, *_speed(by_job, everyone)]


def _speed(by_job: Mapping[str, list[dict[str, Any]]], jobs: Mapping[str, list[list[dict[str, Any]]]]) -> list[Section]:
    """Throughput, time and memory of all networks, and what could not be read."""
    missing = [{"state": "bad", "word": "skipped", "claim": f"{job}: up to {n:,} images of an epoch",
                "evidence": "They could not be read."}
               for job, records in by_job.items() if (n := max(r.get(SKIPPED) or 0 for r in records))]
    blocks = [markup.checklist(missing)] if missing else []
    if panels := _panels(jobs, SPEED):
        blocks += [markup.text("From one log line to the next. What is left of the time went to checkpoints, "
                               "evaluation and the rest of the loop.", note=True), markup.grid(*panels)]
    return [Section("Speed", blocks)] if blocks else []


def _panels(jobs: Mapping[str, list[list[dict[str, Any]]]], wanted: tuple[tuple[Any, ...], ...]) -> list[Markup]:
    """Charts of the quantities that any of these jobs has."""
    return [chart for panel in wanted if (chart := _panel(jobs, *panel))]


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
