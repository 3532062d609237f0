"""`ensadv-fast diagnose`: every measurement on saved models, as printed tables with a verdict and a run folder.

The run folder holds config.json (the options), examples/MODEL.npz (as of `ensadv-fast evaluate`, a model's own
attacks on it alone), report.html and results.json:

    {"command": "diagnose", "dataset", "eps", "images": how many, "index": [their positions in the test set],
     "sources": {name: spec}, "versions", "seconds",
     "models": {name: {"spec",
       "masking": the fields of MaskingReport: "checks": [{"name", "status", "numbers", "sentence"}], "verdict",
                  "masked", "errors": {attack: {"value", "low", "high", "n"}}, "strongest", "worst_case", "eps", "n",
       "gradient_norm", "gradient_alignment", "approximation_ratio", "perturbation_cosine", "random_start_gap",
       "label_leaking", "cone_dimension": the fields of what the function of that name returns (the cone on the first
                  CONE images at most),
       "surfaces": [{"other": the source whose gradient the second direction follows or null, "eps", "along", "across",
                     "loss": [image][i][j], "predicted": likewise, "labels"}], the second one closer to the images,
       "examples": "examples/MODEL.npz"}}}

Shares are 0..1, losses nats, eps and distances image units; what is not finite is null.
"""
from __future__ import annotations

import argparse
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import attacks, data, ops, report
from ..attacks.by_name import make_attack
from ..diagnose import batches, cone, gradients, masking, perturbations, surface
from ..evaluate import example_images
from ..evaluate.loader import Classes
from ..ops import checks, keys
from ..report.examples import Samples
from ..sources.source import Source, as_source
from ..system import files
from ..system.machine import versions
from .networks import Saved, add_options
from .options import DEFAULTS, RUNS, number

CONE = 500  # images of cone_dimension, as in Tramer et al. 2018; an image takes 220 forward passes
SURFACES = 4  # images whose loss surfaces are drawn
EXAMPLES = ("fgsm", "rand_fgsm", "pgd")  # attacks that the example images are shown under
ZOOM = 4  # the second surface reaches to eps / ZOOM


def add_command(p: argparse.ArgumentParser) -> None:
    """Add the options of the command."""
    p.description = ("Gradient masking checks, loss surfaces, adversarial cone, label leaking and more, of each model. "
                     "SPEC is NAME=CHECKPOINT, e.g. mnist:D=runs/x/models/D_ens-seed0.pt")
    add_options(p, "held-out networks, for black-box attacks and the second direction of the surfaces",
                steps=20)
    p.add_argument("--eps", type=number, default=DEFAULTS.eps, help="L-infinity budget (default: %(default)s)")
    p.add_argument("--images", type=int, default=1000, help="test images, drawn by the seed (default: %(default)s)")
    p.add_argument("--points", type=int, default=21, help="of a surface, along each direction (default: %(default)s)")
    p.add_argument("--out", metavar="DIR", help=f"the run folder (default: {RUNS}/diagnose-DATE-TIME)")
    p.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    """Diagnose, print, and write the folder; 0. Raises what a wrong option raises, before anything is measured."""
    begin = time.perf_counter()
    for name, least in (("images", 1), ("points", 2)):
        checks.integer("diagnose", name, getattr(args, name), least)
    given = Saved.open(args)
    folder = Path(args.out) if args.out else RUNS / time.strftime("diagnose-%Y%m%d-%H%M%S")
    if (folder / "config.json").exists():
        raise FileExistsError(f"diagnose: {folder} already holds a run: give another folder")
    networks, sources = given.networks()
    test = given.dataset.test
    index = next(iter(data.Sampler(len(test), args.images, keys.derive_seed(args.seed, "diagnose"), given.device)))
    x, y = test.batch(index)
    _compare_classes({**networks, **sources}, given.dataset.classes, x[:1])
    shown = {name: make_attack(name, args.eps, alpha=args.alpha, steps=args.steps) for name in EXAMPLES}
    found: dict[str, dict[str, Any]] = {}
    examples: dict[str, Samples] = {}
    with tqdm(total=len(networks) * len(MEASUREMENTS), unit=" measurements", disable=None) as bar:
        for name, network in networks.items():
            key = ops.fresh_key("cpu", keys.derive_seed(args.seed, "diagnose", name))
            measured = _measure(_Subject(network, sources, x, y, index, key, args), name, bar)
            found[name] = {"spec": given.targets[name], **measured, "examples": f"examples/{name}.npz"}
            examples[name] = example_images.craft(test, shown, name, network, {name: network}, key)
    body = {"command": "diagnose", "dataset": given.dataset.name, "eps": args.eps, "images": len(index),
            "index": index.tolist(), "sources": given.sources, "models": batches.plain(found),
            "versions": versions(), "seconds": time.perf_counter() - begin}
    print(text(body))
    _write_folder(folder, body, examples, {k: v for k, v in vars(args).items() if k != "run"})
    return 0


def _compare_classes(models: dict[str, nn.Module | Source], number: int, x: Tensor) -> None:
    """ValueError where a model has another number of logits than the data has classes."""
    classes = Classes("diagnose", number, None)
    with torch.no_grad():
        for name, model in models.items():
            classes.check(name, as_source(model).logits(x.clone()).shape[1])


def _measure(subject: _Subject, name: str, bar: tqdm) -> dict[str, Any]:
    """Every measurement of one model."""
    found = {}
    for measurement, measure in MEASUREMENTS.items():
        bar.set_postfix_str(f"{name}: {measurement}")
        found[measurement] = measure(subject)
        bar.update()
    return found


def _write_folder(folder: Path, body: dict[str, Any], examples: dict[str, Samples], config: dict[str, Any]) -> None:
    """All files of the run folder, and a line that names them."""
    for name, samples in examples.items():
        path = folder / body["models"][name]["examples"]
        path.parent.mkdir(parents=True, exist_ok=True)
        samples.save(path)
    files.write_json(folder / "results.json", body, indent=None)
    files.write_json(folder / "config.json", config)
    report.write(folder)
    print(f"\nreport.html, results.json and config.json are in {folder}")


# ------------------------------------------------------------------------------------------- the measurements


class _Subject:
    """One model, and what it is looked at with: images x with labels y and their positions, sources, options."""

    def __init__(self, network: nn.Module, sources: dict[str, Source], x: Tensor, y: Tensor, index: Tensor, key: Tensor,
                 args: argparse.Namespace):
        self.network, self.sources, self.x, self.y = network, sources, x, y
        self.args, self.alpha = args, args.alpha * args.eps
        self.common = {"key": key, "index": index, "batch_size": args.batch_size}
        self.multi = {"eps": args.eps, "multi": attacks.pgd(args.eps, steps=args.steps, random_start=False)}

    def __call__(self, measure: Callable[..., batches.Result], *, n: int | None = None, **options: Any) -> dict:
        """What `measure` says of the model on the first n images (None: on all)."""
        common = {**self.common, "index": self.common["index"][:n]}
        return measure(self.network, self.x[:n], self.y[:n], **common, **options).to_dict()


def _surfaces(subject: _Subject) -> list[dict[str, Any]]:
    args, (name, other) = subject.args, next(iter(subject.sources.items()), (None, None))
    return [{"other": name, "eps": eps, **subject(surface.loss_surface, n=SURFACES, eps=eps, points=args.points,
                                                  other=other)} for eps in (args.eps, args.eps / ZOOM)]


def _gradient_norm(subject: _Subject) -> dict[str, Any]:
    return gradients.gradient_norm(subject.network, subject.x, subject.y, batch_size=subject.args.batch_size).to_dict()


def _cone_dimension(subject: _Subject) -> dict[str, Any]:
    orders = [k for k in cone.ORDERS if k <= subject.x[0].numel()]
    return subject(cone.cone_dimension, n=CONE, eps=subject.args.eps, orders=orders)


MEASUREMENTS: dict[str, Callable[[_Subject], Any]] = {
    "masking": lambda s: s(masking.masking_report, eps=s.args.eps, sources=s.sources, steps=s.args.steps,
                           alpha=s.alpha),
    "gradient_norm": _gradient_norm,
    "gradient_alignment": lambda s: s(gradients.gradient_alignment, eps=s.args.eps),
    "approximation_ratio": lambda s: s(perturbations.approximation_ratio, **s.multi),
    "perturbation_cosine": lambda s: s(perturbations.perturbation_cosine, **s.multi),
    "random_start_gap": lambda s: s(perturbations.random_start_gap, eps=s.args.eps, alpha=s.alpha),
    "label_leaking": lambda s: s(perturbations.label_leaking, eps=s.args.eps),
    "cone_dimension": _cone_dimension,
    "surfaces": _surfaces,
}


# ------------------------------------------------------------------------------------------------ the output


def text(results: dict[str, Any]) -> str:
    """The tables and verdicts, as they are printed."""
    parts = [f"{results['images']} test images of {results['dataset']}, eps {results['eps']:.4g}."]
    for name, m in results["models"].items():
        cone_at = ", ".join(f"{k}: {100 * v['value']:.1f} %" for k, v in m["cone_dimension"]["at_least"].items()
                            if v["value"] is not None)
        rows = [["gradient norm, L2", _number(m["gradient_norm"]["mean_l2"])],
                ["gradient alignment", _number(m["gradient_alignment"]["mean"])],
                ["loss(FGSM) / loss(PGD), mean", _number(m["approximation_ratio"]["ratio"])],
                ["cosine of FGSM and PGD", _number(m["perturbation_cosine"]["mean"])],
                ["R+FGSM - FGSM, points", _number(100 * m["random_start_gap"]["gap"]["value"])],
                ["leaked labels", ", ".join(f"{k}: {v}" for k, v in m["label_leaking"]["leaked"].items())],
                ["adversarial cone, share of at least k", cone_at or "-"]]
        parts += [f"# {name}", report.table(["measurement", name], rows),
                  report.table(["check", "result"], [[c["name"], c["status"]] for c in m["masking"]["checks"]]),
                  "\n".join(f"- {c['sentence']}" for c in m["masking"]["checks"] if c["status"] != masking.PASSED),
                  f"{name}: {m['masking']['verdict']}"]
    return "\n\n".join(p for p in parts if p)


def _number(value: float | None) -> str:
    """Three digits; "-" for what is not finite."""
    return "-" if value is None else f"{value:.3g}"
