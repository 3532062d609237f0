"""The training driver: from a `Config` to a run folder.

A run trains source networks, then targets by one or more presets and seeds, shows all of them to white-box and
transferred attacks, and leaves everything in one folder. `python -m ensadv_fast train` with no arguments is the main
job: on 4,000 real MNIST digits, a plain, an adversarially trained and an ensemble-adversarially trained network D.
"""
from __future__ import annotations

import functools
import json
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from . import attacks, checkpoint, evaluate, models, ops, ranks, report, samples, stopping, versions, workers
from .config import Config, load_config, open_folder
from .data import derive_seed
from .fit import fit
from .job import Job, Run, make_source
from .recipes import ATTACKS, MAIN, PRESETS, Recipe, make_attack

__all__ = ["ATTACKS", "Config", "Job", "MAIN", "PRESETS", "Recipe", "Run", "fit", "load_config", "make_attack",
           "open_folder", "run"]


def unique(specs: tuple[str, ...], taken: dict[str, Any], by_file: bool = False) -> dict[str, str]:
    """Short names for specs that differ from each other and from `taken`: D, D_2. by_file: those that would share one
    take their checkpoint's: D_adv-seed0."""
    names: dict[str, str] = {}
    short = [models.short_name(spec) for spec in specs]
    for spec, base in zip(specs, short, strict=True):
        file = models.parse(spec)[2]
        if by_file and file is not None and (short.count(base) > 1 or base in taken):
            base = Path(file).stem
        i, name = 2, base
        while name in names or name in taken:
            name, i = f"{base}_{i}", i + 1
        names[name] = spec
    return names


def plan(config: Config, folder: Path) -> tuple[dict[str, Job | str], dict[str, dict[int, Job]]]:
    """The sources by name, each a job or the spec of a network that exists, and the targets by name and seed."""
    static = unique(config.static, {})
    held_out = unique(config.held_out, static)
    sources: dict[str, Job | str] = {}
    for name, spec in (static | held_out).items():
        # Sources have seeds of their own: also a static D is another network than any target D.
        sources[name] = spec if config.exists(spec) else Job(f"source-{name}", spec, PRESETS["plain"],
                                                derive_seed(config.seed, "source", name), config.source_epochs)
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
    checkpoint.atomic_write(path, lambda f: f.write("".join(kept).encode()))


def run(config: Config, folder: str | Path, *, resume: bool = False, progress: bool = True,
        say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train and evaluate everything that `config` asks for in `folder`; the contents of results.json, or nothing where
    config.evaluate is off.

    resume: go on with the run that is in the folder; its trained networks are kept, interrupted ones continue.
    progress: show bars where stderr is a terminal. say: where the table goes. With more than one worker, processes
    are spawned: a script that calls this needs the usual `if __name__ == "__main__":`. Under torchrun all ranks train
    one network after the other together, and rank 0 writes the folder, which all of them must see.
    Raises FileNotFoundError, FileExistsError, ValueError (bad options, corrupt files, ranks that differ), OSError, and
    :class:`stopping.Stopped` after SIGTERM or SIGINT, when all that was under way is saved.
    """
    with ranks.opened(models.device(config.device)), stopping.signals():
        return _run(config, Path(folder), resume, progress, say)


def _run(config: Config, folder: Path, resume: bool, progress: bool, say: Callable[[str], object]) -> dict[str, Any]:
    begin = time.perf_counter()
    config.check_weights()
    shared = Run.open(config, folder, progress)
    here = shared.ranks
    check_ranks(shared)
    sources, targets = plan(config, folder)
    everyone = [job for per_seed in targets.values() for job in per_seed.values()]
    if here.main:
        open_folder(config, folder, resume)
        forget_unsaved(folder, [*(s for s in sources.values() if isinstance(s, Job)), *everyone])
    here.barrier()
    if not here.main:
        open_folder(config, folder, True)
    n = config.workers or (1 if shared.device.type == "cuda" else min(workers.cores(), len(sources) + len(everyone)))
    n = 1 if here.world > 1 else n
    threads = config.threads or max(1, workers.cores() // (ranks.neighbours() if here.world > 1 else n))
    if n == 1 and shared.device.type == "cpu":
        torch.set_num_threads(threads)
    with workers.pool(n, threads) as executor:
        seconds = train_all(executor, shared, sources, targets)
        middle = time.perf_counter()
        if not config.evaluate:
            return {}
        with stopping.at_once():
            matrix = assess_all(executor, shared, sources, targets)
    if matrix is None:
        return here.tell(None)
    roles = {name: "static" if i < len(config.static) else "held_out" for i, name in enumerate(sources)}
    roles = dict(sorted(roles.items(), key=lambda item: item[1]))  # held-out ones first
    now = time.perf_counter()
    results = report.results(matrix, shared.dataset.name, config.eps, roles, targets, {
        "train": seconds, "training": middle - begin, "evaluation": now - middle, "total": now - begin,
        "workers": n, "threads_per_worker": threads, "ranks": here.world})
    report.save(folder, results)
    _samples(shared, sources, targets).save(folder / samples.FILE)
    report.write(folder)
    say(report.text(results))
    return here.tell(results)


def check_ranks(run: Run) -> None:
    """ValueError on every rank where one was started with something else: options, versions or data."""
    if run.ranks.world > 1:
        for k, v in asdict(run.config).items():
            if k not in ("device", "threads", "loaders"):
                run.ranks.same(f"--{k.replace('_', '-')}", v)
        run.ranks.same("the version of torch", versions.versions()["torch"])
        train, test = run.dataset.train, run.dataset.test
        run.ranks.same(f"the data set {run.config.data}", checkpoint.digest(
            [[s.labels, getattr(s, "images", None)] for s in (train, test)])[:12])


def train_all(executor: Executor, run: Run, sources: dict[str, Job | str],
              targets: dict[str, dict[int, Job]]) -> dict[str, float]:
    """Train every network that is not trained yet: the sources, and targets as soon as the static sources are
    there, the costly ones first. The seconds of each."""
    def submit(job: Job) -> Future:
        return executor.submit(fit_job, run.config, run.folder, run.progress, job)

    futures = {job.name: submit(job) for job in sources.values() if isinstance(job, Job)}
    for name in list(sources)[:len(run.config.static)]:
        if isinstance(job := sources[name], Job):
            futures[job.name].result()
    for per_seed in reversed(targets.values()):
        futures |= {job.name: submit(job) for job in per_seed.values()}
    try:
        for future in as_completed(futures.values()):
            future.result()  # raises the first error at once, which ends the other workers
    except stopping.Stopped:  # which the others will raise too, once they have saved
        executor.shutdown(cancel_futures=True)
        raise
    return {name: future.result() for name, future in futures.items()}


def fit_job(config: Config, folder: Path, progress: bool, job: Job) -> float:
    """`fit`, in whatever process it is called."""
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        return fit(Run.open(config, folder, progress), job)


def evaluation_attacks(config: Config) -> dict[str, attacks.BaseAttack]:
    """FGSM, R+FGSM, I-FGSM (steps of eps/steps, as in the released MNIST code) and PGD."""
    return {"fgsm": make_attack("fgsm", config.eps),
            "rand_fgsm": make_attack("rand_fgsm", config.eps, alpha=config.alpha),
            "ifgsm": make_attack("ifgsm", config.eps, step=1 / config.eval_steps, steps=config.eval_steps),
            "pgd": make_attack("pgd", config.eps, steps=config.eval_steps)}


def assess_all(executor: Executor, run: Run, sources: dict[str, Job | str],
               targets: dict[str, dict[int, Job]]) -> evaluate.TransferMatrix | None:
    """Every source's examples shown to every target, and every target's own to itself, shared out over ranks; None on
    all but rank 0."""
    specs = {job.name: trained(job, run.folder) for per_seed in targets.values() for job in per_seed.values()}
    todo = [({name: trained(network, run.folder)}, specs) for name, network in reversed(sources.items())]
    todo += [({name: spec}, {name: spec}) for name, spec in specs.items()]
    todo = todo[run.ranks.rank::run.ranks.world]
    futures = [executor.submit(assess, run.config, run.folder, run.progress, *names) for names in todo]
    matrix = evaluate.TransferMatrix()
    for future in tqdm(as_completed(futures), total=len(futures), desc="evaluation",
                       disable=None if run.progress else True):
        matrix = matrix.merge(future.result())
    parts = run.ranks.gather(matrix)
    return None if parts is None else functools.reduce(evaluate.TransferMatrix.merge, parts)


def assess(config: Config, folder: Path, progress: bool, sources: dict[str, str],
           targets: dict[str, str]) -> evaluate.TransferMatrix:
    """The attacks of the evaluation, from these sources on these targets, both given as name -> spec. A target is
    attacked as it is, another network as a `Source`."""
    run = Run.open(config, folder, progress)
    networks = {name: run.build(spec).eval() for name, spec in targets.items()}
    crafting = {name: networks[name] if name in networks else make_source(config, run.build(spec, config.download))
                for name, spec in sources.items()}
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        return evaluate.transfer_matrix(networks, crafting, evaluation_attacks(config),
                                        run.dataset.test.batches(config.eval_batch_size), key=_evaluation_key(config))


def _evaluation_key(config: Config) -> Tensor:
    return ops.fresh_key("cpu", derive_seed(config.seed, "evaluation"))


def _samples(run: Run, sources: dict[str, Job | str], targets: dict[str, dict[int, Job]]) -> samples.Samples:
    """A few test images, attacked on the last source (a held-out one if there is any), for the report."""
    name = next(reversed(sources), None)
    source = None if name is None else make_source(run.config, run.build(trained(sources[name], run.folder),
                                                                         run.config.download))
    first = {t: run.build(trained(next(iter(per_seed.values())), run.folder)).eval()
             for t, per_seed in targets.items()}
    return samples.craft(run.dataset.test, evaluation_attacks(run.config), name, source, first,
                         _evaluation_key(run.config))
