"""Saved models by SPEC, as `ensadv-fast evaluate` and `ensadv-fast diagnose` take them: options, names, networks."""
from __future__ import annotations

import argparse
from dataclasses import dataclass

import torch
from torch import nn

from .. import data, models
from ..models import unique_names
from ..ops import checks
from ..sources.source import Source
from ..system import machine
from .options import DEFAULTS, number


def add_options(p: argparse.ArgumentParser, purpose: str, steps: int) -> None:
    """Add the options that both commands have. purpose: what the sources are for; steps: the default of --steps."""
    p.add_argument("--model", nargs="+", required=True, metavar="SPEC", help="the models that are looked at")
    p.add_argument("--source", nargs="*", default=[], metavar="SPEC", help=purpose)
    p.add_argument("--data", default=DEFAULTS.data, help="as for train (default: %(default)s)")
    p.add_argument("--alpha", type=number, default=DEFAULTS.alpha, help="random part of R+FGSM, in units of eps "
                   "(default: 1/6)")
    p.add_argument("--steps", type=int, default=steps, help="of iterative attacks (default: %(default)s)")
    p.add_argument("--batch-size", type=int, default=DEFAULTS.eval_batch_size, help="(default: %(default)s)")
    p.add_argument("--seed", type=int, default=0, help="of all that is drawn (default: %(default)s)")
    p.add_argument("--device", default=DEFAULTS.device, help="auto, cpu or cuda (default: %(default)s)")
    p.add_argument("--download", action="store_true", help="let timm and torchvision download pretrained weights")


@dataclass(frozen=True)
class Saved:
    """The networks and the data of a command. targets, sources: name -> spec; those whose short names are the same are
    named after their files (`unique_names`)."""

    targets: dict[str, str]
    sources: dict[str, str]
    dataset: data.Dataset
    device: torch.device
    download: bool

    @staticmethod
    def open(args: argparse.Namespace) -> Saved:
        """Check the options and load the data, no network yet. ValueError for a spec without weights."""
        for name in ("steps", "batch_size"):
            checks.integer(args.command, name, getattr(args, name), 1)
        for spec in (*args.model, *args.source):
            if models.parse(spec)[2] is None and not args.download:
                raise ValueError(f"{args.command}: {spec} has no weights: give {spec}=CHECKPOINT (or --download)")
        targets = unique_names(tuple(args.model), {}, by_file=True)
        sources = unique_names(tuple(args.source), targets, by_file=True)
        device = machine.device(args.device)
        return Saved(targets, sources, data.load(args.data).to(device), device, args.download)

    def networks(self) -> tuple[dict[str, nn.Module], dict[str, Source]]:
        """(the targets, in eval mode; the sources), by name."""
        return ({name: self._build(spec) for name, spec in self.targets.items()},
                {name: self._make_source(spec) for name, spec in self.sources.items()})

    def _build(self, spec: str) -> nn.Module:
        network = models.build(spec, self.dataset.classes, self.dataset.in_shape, self.download)
        return network.to(self.device).eval()

    def _make_source(self, spec: str) -> Source:
        network, mean, std = models.parts(self._build(spec))
        return Source(network, mean=mean, std=std)
