"""`ensadv-fast diagnose`: every measurement on saved models, a table, a verdict, and a folder that a report is made of.

The folder holds config.json (the options), results.json and examples/MODEL/ATTACK-I.png. results.json:

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
       "examples": [{"file", "attack": "clean" or its name, "image": position in the test set, "label",
                     "predicted"}]}}}

Shares are 0..1, losses nats, eps and distances image units; what is not finite is null.
"""
from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from tqdm import tqdm

from .. import attacks, checkpoint, data, models, ops, report
from ..source import Source
from ..train import Config, unique
from . import batches, cone, gradients, masking, perturbations, surface

CONE = 500  # images, as in Tramer et al. 2018; a sample takes 220 forward passes
SURFACES = 4  # images
EXAMPLES = 8  # images
ZOOM = 4  # the second surface reaches this much less far


def add_parser(commands: Any, number: Callable[[str], float], runs: Path) -> None:
    """Add the command. number: reads 0.3 and 8/255; runs: where folders go that are given no name."""
    p = commands.add_parser(
        "diagnose", allow_abbrev=False, help="are saved models robust, or do they only mask their gradients?",
        description="Gradient masking checks, loss surfaces, adversarial cone, label leaking and more, of each model. "
        "SPEC is NAME=CHECKPOINT, e.g. mnist:D=runs/x/models/D_ens-seed0.pt")
    p.add_argument("--model", nargs="+", required=True, metavar="SPEC", help="models to diagnose")
    p.add_argument("--source", nargs="*", default=[], metavar="SPEC",
                   help="held-out networks, for black-box attacks and the second direction of the surfaces")
    p.add_argument("--data", default=Config.data, help="as for train (default: %(default)s)")
    p.add_argument("--eps", type=number, default=Config.eps, help="L-infinity budget (default: %(default)s)")
    p.add_argument("--alpha", type=number, default=Config.alpha, help="random part of R+FGSM, in units of eps "
                   "(default: 1/6)")
    p.add_argument("--steps", type=int, default=20, help="of iterative attacks (default: %(default)s)")
    p.add_argument("--images", type=int, default=1000, help="test images, drawn by the seed (default: %(default)s)")
    p.add_argument("--points", type=int, default=21, help="of a surface, along each direction (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=Config.eval_batch_size, help="(default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of the images and all noise (default: %(default)s)")
    p.add_argument("--device", default=Config.device, help="auto, cpu or cuda (default: %(default)s)")
    p.add_argument("--download", action="store_true", help="let timm and torchvision download pretrained weights")
    p.add_argument("--out", metavar="DIR", help=f"the folder of the results (default: {runs}/diagnose-DATE-TIME)")
    p.set_defaults(run=run, runs=runs)


def run(args: argparse.Namespace) -> int:
    """Diagnose, print, and write the folder; 0. Raises what a wrong option raises, before anything is written."""
    begin = time.perf_counter()
    if args.images < 1:
        raise ValueError(f"diagnose: images: got {args.images}, want at least 1")
    specs = unique(tuple(args.model), {})
    source_specs = unique(tuple(args.source), specs)
    for spec in (*args.model, *args.source):
        if models.parse(spec)[2] is None and not args.download:
            raise ValueError(f"diagnose: {spec} has no weights: want {spec}=CHECKPOINT (or --download)")
    device = torch.device(args.device if args.device != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    dataset = data.load(args.data).to(device)
    folder = Path(args.out) if args.out else args.runs / time.strftime("diagnose-%Y%m%d-%H%M%S")
    if (folder / "config.json").exists():
        raise FileExistsError(f"diagnose: {folder} already holds a run: give another folder")

    def build(spec: str) -> nn.Module:
        return models.build(spec, dataset.classes, dataset.in_shape, args.download).to(device).eval()

    networks = {name: build(spec) for name, spec in specs.items()}
    sources = {name: Source(build(spec)) for name, spec in source_specs.items()}
    order = data.Sampler(len(dataset.test), args.images, data.derive_seed(args.seed, "diagnose"), device)
    index = next(iter(order))
    found: dict[str, dict[str, Any]] = {}
    pictures: dict[str, Tensor] = {}
    with tqdm(total=len(specs) * len(MEASUREMENTS), unit=" measurements", disable=None) as bar:
        for name, network in networks.items():
            found[name] = {"spec": specs[name]}
            key = ops.fresh_key("cpu", data.derive_seed(args.seed, "diagnose", name))
            for measurement, measure in MEASUREMENTS.items():
                bar.set_postfix_str(f"{name}: {measurement}")
                found[name][measurement] = measure(_Subject(network, sources, *dataset.test.batch(index), index, key,
                                                            args))
                bar.update()
            found[name]["examples"], shown = _examples(name, network, *dataset.test.batch(index[:EXAMPLES]),
                                                       index[:EXAMPLES], key, args)
            pictures |= shown
    body = {"command": "diagnose", "dataset": dataset.name, "eps": args.eps, "images": len(index),
            "index": index.tolist(), "sources": source_specs, "models": batches.plain(found),
            "versions": report.versions(), "seconds": time.perf_counter() - begin}
    print(text(body))
    _write(folder, {k: v for k, v in vars(args).items() if k not in ("run", "runs", "command")}, body, pictures)
    print(f"\nresults.json, config.json and examples are in {folder}")
    return 0


# ------------------------------------------------------------------------------------------- the measurements


class _Subject:
    """One model, and what it is looked at with."""

    def __init__(self, network: nn.Module, sources: dict[str, Source], x: Tensor, y: Tensor, index: Tensor, key: Tensor,
                 args: argparse.Namespace):
        self.network, self.sources, self.x, self.y = network, sources, x, y
        self.args, self.alpha = args, args.alpha * args.eps
        self.common = {"key": key, "index": index, "batch_size": args.batch_size}
        self.multi = {"eps": args.eps, "multi": attacks.pgd(args.eps, steps=args.steps, random_start=False)}

    def __call__(self, measure: Callable[..., batches.Result], *, n: int | None = None, **options: Any) -> dict:
        common = {**self.common, "index": self.common["index"][:n]}
        return measure(self.network, self.x[:n], self.y[:n], **common, **options).to_dict()


def _surfaces(on: _Subject) -> list[dict[str, Any]]:
    name, other = next(iter(on.sources.items()), (None, None))
    return [{"other": name, "eps": eps, **on(surface.loss_surface, n=SURFACES, eps=eps, points=on.args.points,
                                             other=other)} for eps in (on.args.eps, on.args.eps / ZOOM)]


def _gradient_norm(on: _Subject) -> dict[str, Any]:
    return gradients.gradient_norm(on.network, on.x, on.y, batch_size=on.args.batch_size).to_dict()


def _cone_dimension(on: _Subject) -> dict[str, Any]:
    orders = [k for k in cone.ORDERS if k <= on.x[0].numel()]
    return on(cone.cone_dimension, n=CONE, eps=on.args.eps, orders=orders)


MEASUREMENTS: dict[str, Callable[[_Subject], Any]] = {
    "masking": lambda on: on(masking.masking_report, eps=on.args.eps, sources=on.sources, steps=on.args.steps,
                             alpha=on.alpha),
    "gradient_norm": _gradient_norm,
    "gradient_alignment": lambda on: on(gradients.gradient_alignment, eps=on.args.eps),
    "approximation_ratio": lambda on: on(perturbations.approximation_ratio, **on.multi),
    "perturbation_cosine": lambda on: on(perturbations.perturbation_cosine, **on.multi),
    "random_start_gap": lambda on: on(perturbations.random_start_gap, eps=on.args.eps, alpha=on.alpha),
    "label_leaking": lambda on: on(perturbations.label_leaking, eps=on.args.eps),
    "cone_dimension": _cone_dimension,
    "surfaces": _surfaces,
}


def _examples(name: str, network: nn.Module, x: Tensor, y: Tensor, index: Tensor, key: Tensor,
              args: argparse.Namespace) -> tuple[list[dict[str, Any]], dict[str, Tensor]]:
    """What results.json says of the example images, and the images, uint8 [H, W(, 3)], by file."""
    tried = {"fgsm": attacks.fgsm(args.eps), "rand_fgsm": attacks.rand_fgsm(args.eps, args.alpha * args.eps),
             "pgd": attacks.pgd(args.eps, steps=args.steps)}
    shown = {"clean": x, **{a: attack(network, x, y, key=key, index=index) for a, attack in tried.items()}}
    described, pictures = [], {}
    for a, images in shown.items():
        with torch.no_grad():
            predicted = network(images).argmax(1).tolist()
        for i, image in enumerate((images * 255).round().byte().cpu()):
            file = f"examples/{name}/{a}-{i}.png"
            pictures[file] = image.permute(1, 2, 0).squeeze(-1)
            described.append({"file": file, "attack": a, "image": int(index[i]), "label": int(y[i]),
                              "predicted": predicted[i]})
    return described, pictures


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
    return "-" if value is None else f"{value:.3g}"


def _write(folder: Path, config: dict[str, Any], results: dict[str, Any], pictures: dict[str, Tensor]) -> None:
    from PIL import Image

    for file, picture in pictures.items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        checkpoint.atomic_write(folder / file, lambda f: Image.fromarray(picture.numpy()).save(f, "PNG"))
    for file, body in (("results.json", results), ("config.json", config)):
        content = (json.dumps(body, indent=None if file == "results.json" else 2, allow_nan=False) + "\n").encode()
        checkpoint.atomic_write(folder / file, lambda f: f.write(content))
