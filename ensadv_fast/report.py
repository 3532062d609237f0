"""What a run reports: results.json, the tables it prints, and report.md with its figure."""
from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import nn

from . import checkpoint, figures
from .attacks import Attack
from .data import Split
from .evaluate import TransferMatrix, black_box
from .source import Source
from .versions import versions

SUMMARY = ("max_black_box", "mean_black_box", "worst_case_black_box")


def sample(test: Split, attacks: Mapping[str, Attack], name: str | None, source: Source | None,
           targets: Mapping[str, nn.Module], key: torch.Tensor) -> figures.Samples:
    """The first test image of each class, clean and under each attack crafted on `source`."""
    classes = torch.unique(test.labels)[:10]
    index = torch.stack([(test.labels == c).nonzero()[0, 0] for c in classes])
    x, y = test.batch(index)
    rows = {"clean": x}
    if source is not None:
        rows |= {a: attack(source, x, y, key=key.to(x.device), index=index) for a, attack in attacks.items()}
    with torch.no_grad():
        predictions = {row: {t: model(images).argmax(1).cpu().numpy() for t, model in targets.items()}
                       for row, images in rows.items()}
    pictures = {row: (images * 255).round().byte().permute(0, 2, 3, 1).squeeze(-1).cpu().numpy()
                for row, images in rows.items()}
    return figures.Samples(name, y.cpu().numpy(), pictures, predictions)


def _over_seeds(trees: list[Any], f: Callable[[list[float]], float | None]) -> Any:
    """Apply `f` to each leaf of equally nested dicts; a leaf that is None stays None."""
    if isinstance(trees[0], dict):
        return {k: _over_seeds([t[k] for t in trees], f) for k in trees[0]}
    return None if trees[0] is None else f(trees)


def _std(values: list[float]) -> float | None:
    """Sample standard deviation; one seed has none."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def results(matrix: TransferMatrix, dataset: str, eps: float, roles: dict[str, str],
            targets: Mapping[str, Iterable[int]], seconds: dict[str, Any]) -> dict[str, Any]:
    """The contents of results.json: means over seeds, their sample standard deviation under "std" and the seeds'
    own numbers under "per_seed". roles: source -> "static" or "held_out". Errors are fractions of all test inputs;
    max, mean and worst_case are over held-out sources, and None where there are none."""
    held_out = [s for s, role in roles.items() if role == "held_out"]
    models = {}
    for name, seeds in targets.items():
        per_seed = {}
        for seed in seeds:
            t = f"{name}-seed{seed}"
            summary = black_box(matrix, t, held_out) if held_out else None
            per_seed[str(seed)] = {
                "clean": matrix.clean_error(t),
                "white_box": {a: matrix.error(a, t, t) for a in matrix.attacks},
                "black_box": {a: {s: matrix.error(a, s, t) for s in roles} for a in matrix.attacks},
                "max_black_box": summary and summary.max,
                "mean_black_box": summary and summary.mean,
                "worst_case_black_box": summary and summary.worst_case}
        trees = list(per_seed.values())
        models[name] = {**_over_seeds(trees, lambda v: float(np.mean(v))), "std": _over_seeds(trees, _std),
                        "per_seed": per_seed}
    return {"dataset": dataset, "eps": eps, "sources": roles, "models": models, "versions": versions(),
            "seconds": seconds}


# ------------------------------------------------------------------------------------------------- tables


def _percent(value: float | None, std: float | None) -> str:
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def table(head: list[str], rows: list[list[str]]) -> str:
    """A Markdown table with columns of even width, so that it reads well on a terminal too."""
    widths = [max(len(r[i]) for r in [head, *rows]) for i in range(len(head))]
    lines = ["| " + " | ".join(c.ljust(w) for c, w in zip(r, widths, strict=True)) + " |" for r in [head, *rows]]
    return "\n".join([lines[0], "|" + "|".join("-" * (w + 2) for w in widths) + "|", *lines[1:]])


def text(results: dict[str, Any]) -> str:
    """The tables and the findings, as they are printed and written to report.md."""
    models, roles = results["models"], results["sources"]
    some = next(iter(models.values()))
    attacks = list(some["white_box"])
    seeds = len(some["per_seed"])
    held_out = [s for s, role in roles.items() if role == "held_out"]
    white = table(
        ["model", "clean", *(f"white-box {figures.TITLES.get(a, a)}" for a in attacks),
         "black-box max", "mean", "worst case"],
        [[name, _percent(m["clean"], m["std"]["clean"]),
          *(_percent(m["white_box"][a], m["std"]["white_box"][a]) for a in attacks),
          *(_percent(m[k], m["std"][k]) for k in SUMMARY)] for name, m in models.items()])
    black = table(
        ["crafted on", "attack", *models],
        [[f"{s} ({role.replace('_', '-')})", figures.TITLES.get(a, a),
          *(_percent(m["black_box"][a][s], m["std"]["black_box"][a][s]) for m in models.values())]
         for s, role in roles.items() for a in attacks])
    parts = [f"Errors in % of all test inputs, {results['dataset']}, eps {results['eps']:.4g}, mean"
             f"{' ± standard deviation' if seeds > 1 else ''} over {seeds} seed{'s' if seeds > 1 else ''}.",
             white]
    if roles:
        parts += ["Black-box max, mean and worst case (per example) are over the attacks from held-out "
                  f"{', '.join(held_out)}. Transferred attacks one by one:" if held_out else
                  "Transferred attacks one by one:", black]
    parts += findings(results)
    seconds = results["seconds"]
    parts.append(f"{seconds['total']:.0f} s with {seconds['workers']} worker(s) of {seconds['threads_per_worker']} "
                 f"thread(s): training {seconds['training']:.0f}, evaluation {seconds['evaluation']:.0f}. "
                 "Each network: " + ", ".join(f"{name} {s:.0f}" for name, s in seconds["train"].items()) + ".")
    return "\n\n".join(parts)


def findings(results: dict[str, Any]) -> list[str]:
    """The claims of Tramer et al. that these models allow to check, each with the numbers and whether it held."""
    by_suffix = {name.rpartition("_")[2]: m for name, m in results["models"].items() if "_" in name}
    plain = next(iter(results["models"].values()))
    adv, ens = by_suffix.get("adv"), by_suffix.get("ens")
    lines = []

    def line(claim: str, low: float, high: float, what: str) -> None:
        verdict = "holds" if high > low else "does NOT hold here"
        lines.append(f"- {claim}: {verdict} ({what})")

    if adv and ens and adv["max_black_box"] is not None:
        a, e = adv["max_black_box"], ens["max_black_box"]
        line("Ensemble training lowers the held-out black-box error of adversarial training", e, a,
             f"maximum {100 * a:.1f} % -> {100 * e:.1f} %")
    if adv and {"fgsm", "rand_fgsm"} <= adv["white_box"].keys():
        f, r = adv["white_box"]["fgsm"], adv["white_box"]["rand_fgsm"]
        line("A random start finds more errors on the adversarially trained model than FGSM alone", f, r,
             f"FGSM {100 * f:.1f} %, R+FGSM {100 * r:.1f} %")
    if ens and plain is not ens:
        lines.append(f"- Clean error of plain and of ensemble adversarial training: {100 * plain['clean']:.1f} % and "
                     f"{100 * ens['clean']:.1f} %")
    return ["\n".join(lines)] if lines else []


def write(folder: Path, results: dict[str, Any], samples: figures.Samples) -> None:
    """results.json, report.png and report.md in the run folder."""
    body = json.dumps(results, indent=2, allow_nan=False) + "\n"
    checkpoint.atomic_write(folder / "results.json", lambda f: f.write(body.encode()))
    figures.draw(folder / "report.png", results, samples)
    page = f"# Errors under attack\n\n{text(results)}\n\n![adversarial images and errors](report.png)\n"
    checkpoint.atomic_write(folder / "report.md", lambda f: f.write(page.encode()))
