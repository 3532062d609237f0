"""Which networks a run trains."""
from __future__ import annotations

import json
from pathlib import Path

from .. import models
from ..models.specs import unique_names
from ..ops.keys import derive_seed
from ..system import files
from .config import Config
from .job import Job
from .recipes import PRESETS


def plan(config: Config, folder: Path) -> tuple[dict[str, Job | str], dict[str, dict[int, Job]]]:
    """The sources by name, each a job or the spec of a network that exists, and the targets by name and seed."""
    static = unique_names(config.static, {})
    held_out = unique_names(config.held_out, static)
    sources: dict[str, Job | str] = {}
    for name, spec in (static | held_out).items():
        # Sources have seeds of their own: also a static D is another network than any target D.
        sources[name] = spec if config.has_weights(spec) else Job(
            f"source-{name}", spec, PRESETS["plain"], derive_seed(config.seed, "source", name), config.source_epochs)
    targets: dict[str, dict[int, Job]] = {}
    for recipe in config.recipes().values():
        name = models.short_name(config.model) + recipe.suffix
        specs = tuple(trained(sources[s], folder) for s in static) if recipe.static else ()
        targets[name] = {seed: Job(f"{name}-seed{seed}", config.model, recipe, derive_seed(seed, "target"),
                                   config.epochs, specs, config.init)
                         for seed in range(config.seed, config.seed + config.seeds)}
    return sources, targets


def trained(network: Job | str, folder: Path) -> str:
    """The spec of a network with the checkpoint that its job leaves."""
    return network if isinstance(network, str) else f"{network.spec}={network.path(folder)}"


def forget_unsaved(folder: Path, jobs: list[Job]) -> None:
    """Drop what an interrupted run wrote after its last checkpoints: half-written files, and metrics that will
    come again."""
    for half in folder.rglob("*.tmp"):
        half.unlink()
    steps = {job.name: state["step"] for job in jobs if (state := job.newest(folder)) is not None}
    path = folder / "metrics.jsonl"
    lines = path.read_text().splitlines(keepends=True) if path.exists() else []
    kept = [line for line in lines if line.endswith("\n") and (r := json.loads(line))["step"] <= steps.get(r["job"], 0)]
    files.atomic_write(path, lambda f: f.write("".join(kept).encode()))
