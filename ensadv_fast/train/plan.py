"""Which networks a run trains."""
from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .. import models
from ..models.specs import unique_names
from ..ops.keys import derive_seed
from ..system import files
from .config import Config
from .job import Job
from .logs import METRICS, NONFINITE
from .recipes import PRESETS


@dataclass(frozen=True)
class Plan:
    """The networks of a run.

    sources: by name, each a job or the spec of a network that exists; static ones first, then held-out ones. targets:
    by name and seed.
    """

    sources: dict[str, Job | str]
    targets: dict[str, dict[int, Job]]

    def target_jobs(self) -> list[Job]:
        """All targets, by name and then by seed."""
        return [job for per_seed in self.targets.values() for job in per_seed.values()]

    def jobs(self) -> list[Job]:
        """All networks that are trained, sources first."""
        return [*(s for s in self.sources.values() if isinstance(s, Job)), *self.target_jobs()]


def make_plan(config: Config, folder: Path) -> Plan:
    """The networks that this config asks for; their checkpoints lie in the run folder."""
    static = unique_names(config.static, {})
    held_out = unique_names(config.held_out, static)
    sources: dict[str, Job | str] = {}
    for name, spec in (static | held_out).items():
        # Sources have seeds of their own: a static D is another network than any target D.
        sources[name] = spec if config.has_weights(spec) else Job(
            f"source-{name}", spec, PRESETS["plain"], derive_seed(config.seed, "source", name), config.source_epochs)
    targets: dict[str, dict[int, Job]] = {}
    for recipe in config.recipes().values():
        name = models.short_name(config.model) + recipe.suffix
        specs = tuple(checkpoint_spec(sources[s], folder) for s in static) if recipe.static else ()
        targets[name] = {seed: Job(f"{name}-seed{seed}", config.model, recipe, derive_seed(seed, "target"),
                                   config.epochs, specs, config.init)
                         for seed in range(config.seed, config.seed + config.seeds)}
    return Plan(sources, targets)


def checkpoint_spec(network: Job | str, folder: Path) -> str:
    """The spec of a network with its weights: of a job, with the checkpoint that it leaves in the run folder."""
    return network if isinstance(network, str) else f"{network.spec}={network.path(folder)}"


def settle(folder: Path, jobs: list[Job]) -> None:
    """Bring the run folder into the state that its newest whole checkpoints stand for: they are published, and what
    was written after them is deleted, half-written files and the log lines that will be written again.

    ValueError for a log that is damaged elsewhere than at its end.
    """
    for half in folder.rglob("*.tmp"):
        half.unlink()
    steps = {job.name: state["step"] for job in jobs if (state := job.settle(folder)) is not None}

    def last(record: Mapping[str, Any]) -> int:
        return steps.get(record["job"], 0)

    _filter_lines(folder / METRICS, lambda r: r["step"] <= last(r))
    # What stopped the run stays told. The steps that were skipped are found again.
    _filter_lines(folder / NONFINITE, lambda r: not r["skipped"] or r["by"] <= last(r))


def _filter_lines(path: Path, keep: Callable[[Mapping[str, Any]], bool]) -> None:
    """Keep the lines of a log that `keep` is true of; half a line at its end goes."""
    lines = path.read_bytes().splitlines(keepends=True) if path.exists() else []
    kept = []
    for number, line in enumerate(lines, 1):
        if not line.endswith(b"\n"):
            continue
        try:
            if keep(json.loads(line)):
                kept.append(line)
        except (ValueError, TypeError, KeyError, RecursionError) as e:
            raise ValueError(f"train: line {number} of {path} must be a record of this run, got {line[:60]!r} "
                             f"({type(e).__name__}: {e}): delete it to go on") from e
    if kept != lines:
        files.atomic_write(path, lambda f: f.write(b"".join(kept)))
