"""The picture of a run: adversarial images with what the models take them for, and the errors as bars."""
from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure, SubFigure

TITLES = {"clean": "clean", "fgsm": "FGSM", "rand_fgsm": "R+FGSM", "ifgsm": "I-FGSM", "pgd": "PGD"}


@dataclass(frozen=True)
class Samples:
    """A few test images as the figure shows them: pictures[row] is uint8 [n, H, W(, 3)], predictions[row][model]
    int64 [n], and the true labels int64 [n]. `source` crafted them (None: there was none)."""

    source: str | None
    labels: np.ndarray
    pictures: dict[str, np.ndarray]
    predictions: dict[str, dict[str, np.ndarray]]


def draw(path: Path, results: dict[str, Any], samples: Samples) -> None:
    """Write the PNG. results: the contents of results.json; samples: the images of `report.sample`."""
    figure = Figure(figsize=(11, 2.2 + 1.25 * len(samples.pictures) + 3.4), layout="constrained")
    FigureCanvasAgg(figure)  # no global state, no display, whatever backend the program uses
    grid, bars = figure.subfigures(2, 1, height_ratios=[1.25 * len(samples.pictures) + 0.6, 3.4])
    _grid(grid, samples)
    _bars(bars, results)
    figure.savefig(path, dpi=110)


def _grid(figure: SubFigure, samples: Samples) -> None:
    rows, n = list(samples.pictures), len(samples.labels)
    axes = figure.subplots(len(rows), n, squeeze=False)
    names = ", ".join(next(iter(samples.predictions.values())))
    made = f", adversarial ones crafted on {samples.source}" if samples.source else ""
    figure.suptitle(f"Test images{made}. Below each: what {names} take it for (red: wrong)", fontsize=10)
    for r, row in enumerate(rows):
        for i in range(n):
            ax = axes[r, i]
            ax.imshow(samples.pictures[row][i], cmap="gray", vmin=0, vmax=255)
            ax.set_xticks([])
            ax.set_yticks([])
            guesses = [p[i] for p in samples.predictions[row].values()]
            for j, guess in enumerate(guesses):
                ax.text((j + 0.5) / len(guesses), -0.04, str(guess), transform=ax.transAxes, ha="center", va="top",
                        fontsize=8, color="black" if guess == samples.labels[i] else "red")
        axes[r, 0].set_ylabel(TITLES.get(row, row), fontsize=9)


def _bars(figure: SubFigure, results: dict[str, Any]) -> None:
    ax = figure.subplots()
    models = results["models"]
    some = next(iter(models.values()))
    held_out = ", ".join(s for s, role in results["sources"].items() if role == "held_out")
    groups = [("clean", lambda m: m["clean"])]
    groups += [(f"white-box\n{TITLES.get(a, a)}", lambda m, a=a: m["white_box"][a]) for a in some["white_box"]]
    if some["max_black_box"] is not None:
        groups += [(f"from {held_out}\n{word}", lambda m, k=k: m[k]) for word, k in
                   (("maximum", "max_black_box"), ("mean", "mean_black_box"), ("worst case", "worst_case_black_box"))]
    at, width = np.arange(len(groups)), 0.8 / len(models)
    for i, (name, m) in enumerate(models.items()):
        error = [100 * get(m["std"]) if get(m["std"]) is not None else 0.0 for _, get in groups]
        drawn = ax.bar(at + (i - (len(models) - 1) / 2) * width, [100 * get(m) for _, get in groups], width,
                       yerr=error if any(error) else None, capsize=2, label=name)
        ax.bar_label(drawn, fmt="%.0f", fontsize=7, padding=1)
    ax.set_xticks(at, [title for title, _ in groups], fontsize=8)
    ax.set_ylabel("error, %")
    ax.set_ylim(0, 112)
    ax.legend(fontsize=8)
    ax.set_title(f"{results['dataset']}, eps {results['eps']:.3g}", fontsize=10)
    ax.spines[["top", "right"]].set_visible(False)
