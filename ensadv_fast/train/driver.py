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

from .. import report
from ..report import examples
from ..system import files, machine, processes, ranks, signals
from .assess import assess_all, draw_examples
from .config import Config, open_folder
from .job import Job, Run
from .loop import fit
from .plan import forget_unsaved, plan
from .results import results_of, text


def run(config: Config, folder: str | Path, *, resume: bool = False, progress: bool = True,
        say: Callable[[str], object] = print) -> dict[str, Any]:
    """Train and evaluate everything that `config` asks for in `folder`; the contents of results.json, or nothing where
    config.evaluate is off.

    resume: go on with the run that is in the folder; its trained networks are kept, interrupted ones continue.
    progress: show bars where stderr is a terminal. say: where the table goes. With more than one worker, processes
    are spawned: a script that calls this needs the usual `if __name__ == "__main__":`. Under torchrun all ranks train
    one network after the other together, and rank 0 writes the folder, which all of them must see.
    Raises FileNotFoundError, FileExistsError, ValueError (bad options, corrupt files, ranks that differ), OSError, and
    :class:`signals.Stopped` after SIGTERM or SIGINT, when all that was under way is saved.
    """
    with ranks.opened(machine.device(config.device)), signals.handled():
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
    n = config.workers or (1 if shared.device.type == "cuda" else min(machine.cores(), len(sources) + len(everyone)))
    n = 1 if here.world > 1 else n
    threads = config.threads or max(1, machine.cores() // (ranks.neighbours() if here.world > 1 else n))
    if n == 1 and shared.device.type == "cpu":
        torch.set_num_threads(threads)
    with processes.pool(n, threads) as executor:
        seconds = train_all(executor, shared, sources, targets)
        middle = time.perf_counter()
        if not config.evaluate:
            return {}
        with signals.at_once():
            matrix = assess_all(executor, shared, sources, targets)
    if matrix is None:
        return here.tell(None)
    roles = {name: "static" if i < len(config.static) else "held_out" for i, name in enumerate(sources)}
    roles = dict(sorted(roles.items(), key=lambda item: item[1]))  # held-out ones first
    now = time.perf_counter()
    results = results_of(matrix, shared.dataset.name, config.eps, roles, targets, {
        "train": seconds, "training": middle - begin, "evaluation": now - middle, "total": now - begin,
        "workers": n, "threads_per_worker": threads, "ranks": here.world})
    report.save(folder, results)
    draw_examples(shared, sources, targets).save(folder / examples.FILE)
    report.write(folder)
    say(text(results))
    return here.tell(results)


def check_ranks(run: Run) -> None:
    """ValueError on every rank where one was started with something else: options, versions or data."""
    if run.ranks.world > 1:
        for k, v in asdict(run.config).items():
            if k not in ("device", "threads", "loaders"):
                run.ranks.same(f"--{k.replace('_', '-')}", v)
        run.ranks.same("the version of torch", machine.versions()["torch"])
        train, test = run.dataset.train, run.dataset.test
        run.ranks.same(f"the data set {run.config.data}", files.digest(
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
    except signals.Stopped:  # which the others will raise too, once they have saved
        executor.shutdown(cancel_futures=True)
        raise
    return {name: future.result() for name, future in futures.items()}


def fit_job(config: Config, folder: Path, progress: bool, job: Job) -> float:
    """`fit`, in whatever process it is called."""
    with torch.backends.cudnn.flags(benchmark=False, deterministic=True):
        return fit(Run.open(config, folder, progress), job)
