"""The training driver: from a `Config` to a run folder.

A run trains source networks, then targets by one or more presets and seeds, shows all of them to white-box and
transferred attacks, and leaves everything in one folder. `python -m ensadv_fast train` with no arguments is the main
job: on 4,000 real MNIST digits, a plain, an adversarially trained and an ensemble-adversarially trained network D.
"""
from __future__ import annotations

import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, as_completed
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from .. import models, report
from ..report import examples
from ..system import machine, processes, ranks, signals
from .assessment import assess_all, draw_examples
from .config import Config, open_folder
from .job import Job, Run
from .loop import fit
from .plan import Plan, make_plan, settle
from .results import results_of, text


def run(config: Config, folder: str | Path, *, resume: bool = False, progress: bool = True,
        say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train and evaluate everything that `config` asks for in `folder`; the contents of results.json, or nothing where
    config.evaluate is off.

    resume: go on with the run that is in the folder; its trained networks are kept, interrupted ones continue.
    progress: show bars where stderr is a terminal. say: what is done with the table. With more than one worker,
    processes are spawned: a script that calls this needs the usual `if __name__ == "__main__":`. Under torchrun all
    ranks train one network after the other together, and rank 0 writes the folder, which all of them must see.
    Raises FileNotFoundError, FileExistsError, ValueError (bad options, corrupt files, ranks that differ), OSError, and
    :class:`ensadv_fast.system.signals.Stopped` after SIGTERM or SIGINT, when all that was under way is saved.
    """
    with ranks.opened(machine.device(config.device)), signals.handled():
        begin = time.perf_counter()
        config.check_weights()
        setup = Run.open(config, Path(folder), progress)
        check_ranks(setup)
        check_models(setup)
        plan = make_plan(config, setup.folder)
        open_run(setup, plan, resume)
        workers, threads = divide_cores(setup, plan)
        with processes.pool(workers, threads) as executor:
            seconds: dict[str, Any] = {"train": train_all(executor, setup, plan)}
            trained = time.perf_counter()
            if not config.evaluate:
                return {}
            with signals.at_once():
                matrix = assess_all(executor, setup, plan)
        if matrix is None:  # not rank 0
            return setup.ranks.tell(None)
        end = time.perf_counter()
        seconds |= {"training": trained - begin, "evaluation": end - trained, "total": end - begin, "workers": workers,
                    "threads_per_worker": threads, "ranks": setup.ranks.world}
        results = results_of(matrix, setup.dataset.name, config.eps, source_roles(setup, plan), plan.targets, seconds)
        write_report(setup, plan, results)
        say(text(results))
        return setup.ranks.tell(results)


def check_models(setup: Run) -> None:
    """Raise for a network that cannot be found, before any other is trained."""
    config = setup.config
    for spec in dict.fromkeys((config.model, *config.static, *config.held_out)):
        models.check(spec, setup.dataset.classes, setup.dataset.in_shape)
    if config.init is not None and not Path(config.init.removesuffix("#model")).is_file():
        raise FileNotFoundError(f"model: no checkpoint at {config.init}")


def check_ranks(setup: Run) -> None:
    """ValueError on every rank where one was started with something else: options, versions or data."""
    if setup.ranks.world == 1:
        return
    for k, v in asdict(setup.config).items():
        if k not in ("device", "threads", "loaders"):
            setup.ranks.same(f"--{k.replace('_', '-')}", v)
    setup.ranks.same("the version of torch", machine.versions()["torch"])
    setup.ranks.same(f"the data set {setup.config.data}", setup.dataset.digest()[:12])


def open_run(setup: Run, plan: Plan, resume: bool) -> None:
    """Start the run folder or go on with it: rank 0 makes it ready, then the others read it."""
    if setup.ranks.main:
        open_folder(setup.config, setup.folder, resume, setup.dataset.digest())
        settle(setup.folder, plan.jobs())
    setup.ranks.barrier()
    if not setup.ranks.main:
        open_folder(setup.config, setup.folder, True)


def divide_cores(setup: Run, plan: Plan) -> tuple[int, int]:
    """(processes that train side by side, CPU threads of each). One process is this one, and gets its threads here."""
    config, world = setup.config, setup.ranks.world
    if world > 1:
        workers, neighbours = 1, ranks.neighbours()
    else:
        most = 1 if setup.device.type == "cuda" else min(
            machine.cores(), len(plan.sources) + len(plan.target_jobs()))
        workers = neighbours = config.workers or most
    threads = config.threads or max(1, machine.cores() // neighbours)
    if workers == 1 and setup.device.type == "cpu":
        torch.set_num_threads(threads)
    return workers, threads


def train_all(executor: Executor, setup: Run, plan: Plan) -> dict[str, float]:
    """Train every network that is not trained yet: the sources, and targets as soon as the static sources are
    there, the costly ones first. The seconds of each."""
    def submit(job: Job) -> Future:
        return executor.submit(fit_job, setup.config, setup.folder, setup.progress, job)

    futures = {job.name: submit(job) for job in plan.sources.values() if isinstance(job, Job)}
    for source in list(plan.sources.values())[:len(setup.config.static)]:
        if isinstance(source, Job):
            futures[source.name].result()
    for per_seed in reversed(plan.targets.values()):
        futures |= {job.name: submit(job) for job in per_seed.values()}
    try:
        for future in as_completed(futures.values()):
            future.result()  # raises the first error at once, which ends the other workers
    except signals.Stopped:  # which the others will raise too, once they have saved
        executor.shutdown(cancel_futures=True)
        raise
    return {name: future.result() for name, future in futures.items()}


def fit_job(config: Config, folder: Path, progress: bool, job: Job) -> float:
    """`fit`, in whatever process it is called."""
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        return fit(Run.open(config, folder, progress), job)


def source_roles(setup: Run, plan: Plan) -> dict[str, str]:
    """source -> "held_out" or "static", held-out ones first."""
    static = len(setup.config.static)
    roles = {name: "static" if i < static else "held_out" for i, name in enumerate(plan.sources)}
    return dict(sorted(roles.items(), key=lambda item: item[1]))


def write_report(setup: Run, plan: Plan, results: dict[str, Any]) -> None:
    """results.json, the example images and report.html in the run folder."""
    report.save(setup.folder, results)
    draw_examples(setup, plan).save(setup.folder / examples.FILE)
    report.write(setup.folder)
