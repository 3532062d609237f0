"""The numbers of results.json, and the tables that a run prints."""
from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from ..evaluate import TransferMatrix, black_box
from ..report import layouts, table, train_page
from ..system.machine import versions
from .claims import claims_of


def _over_seeds(trees: list[Any], f: Callable[[list[float]], float | None]) -> Any:
    """Apply `f` to each leaf of equally nested dicts; a leaf that is None stays None."""
    if isinstance(trees[0], dict):
        return {k: _over_seeds([t[k] for t in trees], f) for k in trees[0]}
    return None if trees[0] is None else f(trees)


def _std(values: list[float]) -> float | None:
    """Sample standard deviation; one seed has none."""
    return float(np.std(values, ddof=1)) if len(values) > 1 else None


def results_of(matrix: TransferMatrix, dataset: str, eps: float, roles: dict[str, str],
               targets: Mapping[str, Iterable[int]], seconds: dict[str, Any]) -> dict[str, Any]:
    """The contents of results.json: means over seeds, their sample standard deviation under "std" and the seeds'
    own numbers under "per_seed"; the papers' claims that can be checked under "claims"; the number of test inputs under
    "images". roles: source -> "static" or "held_out". Errors are fractions of all test inputs; max, mean and worst_case
    are over held-out sources, and None where there are none. seconds: what took how long, as `train.run` measures
    it."""
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
    return {"command": "train", "dataset": dataset, "eps": eps, "images": len(matrix), "sources": roles,
            "models": models, "claims": claims_of(matrix, targets, held_out),
            "versions": versions(), "seconds": seconds}


# ------------------------------------------------------------------------------------------------- tables


def _percent(value: float | None, std: float | None) -> str:
    """An error and its standard deviation in %; "-" where there is none."""
    if value is None:
        return "-"
    return f"{100 * value:.1f}" + ("" if std is None else f" ± {100 * std:.1f}")


def text(results: dict[str, Any]) -> str:
    """The tables and the findings, as they are printed."""
    models, roles = results["models"], results["sources"]
    some = next(iter(models.values()))
    attacks = list(some["white_box"])
    seeds = len(some["per_seed"])
    held_out = [s for s, role in roles.items() if role == "held_out"]
    white = table(
        ["model", "clean", *(f"white-box {layouts.TITLES.get(a, a)}" for a in attacks),
         "black-box max", "mean", "worst case"],
        [[name, _percent(m["clean"], m["std"]["clean"]),
          *(_percent(m["white_box"][a], m["std"]["white_box"][a]) for a in attacks),
          *(_percent(m[k], m["std"][k]) for k in train_page.SUMMARY)] for name, m in models.items()])
    black = table(
        ["crafted on", "attack", *models],
        [[f"{s} ({role.replace('_', '-')})", layouts.TITLES.get(a, a),
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
    lines = [f"- {c.text}: {'does NOT hold here' if c.holds is False else c.verdict} ({c.numbers})"
             for c in train_page.claims_of(results)]
    plain, *others = results["models"].items()
    for name, m in others:
        if name.endswith("_ens"):
            lines.append("- Clean error of plain and of ensemble adversarial training: "
                         f"{100 * plain[1]['clean']:.1f} % and {100 * m['clean']:.1f} %")
    return ["\n".join(lines)] if lines else []
