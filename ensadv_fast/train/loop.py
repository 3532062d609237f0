"""The one loop that trains a network."""
from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import ExitStack

from torch import Tensor

from ..system import ranks, signals
from . import logs
from .job import Job, Run
from .trainer import Training


def fit(setup: Run, job: Job) -> float:
    """Train one network, or go on where its checkpoint stops; the seconds it took. Its checkpoint is the result.

    The result depends on the job's seed, the config and the static sources only: not on the jobs before or beside it,
    and (on the CPU, bit for bit) not on whether it was interrupted. A signal ends it by
    :class:`ensadv_fast.system.signals.Stopped` after a step, with a checkpoint of that step.
    """
    config, t = setup.config, Training(setup, job)
    t.resume()
    before, start = t.seconds, time.perf_counter()
    save_every, images = config.save_every or t.per_epoch, job.epochs * len(setup.dataset.train)
    vote = ranks.Vote(setup.ranks)
    t.model.train()
    with ExitStack() as stack:
        stack.enter_context(t.stream)
        bar = stack.enter_context(setup.bar(total=images, initial=t.images, unit=" images", desc=job.name))
        log = stack.enter_context(t.open_log()) if setup.ranks.main else None
        while t.step < t.total:
            for batch in _epoch(t):
                lr, source = t.advance(*batch)
                bar.update(t.stream.global_size)
                stop = vote(t.step, signals.asked.value)
                watch = t.watch()
                if t.step % config.log_every == 0 or t.step == t.total or t.is_monitored_step:
                    record = {"step": t.step, "epoch": (t.step - 1) // t.per_epoch, "lr": lr, "source": source,
                              **t.line(), "monitor": watch}
                    if log is not None:
                        log(record)
                        bar.set_postfix_str(logs.progress(record, images - t.images), refresh=False)
                if t.step % save_every == 0 or t.step == t.total or stop:
                    t.seconds = before + time.perf_counter() - start
                    t.save()
                if stop and t.step < t.total:
                    raise signals.Stopped.by(stop, f"step {t.step} of {t.total} of {job.name} is saved")
        vote.close()
    setup.ranks.barrier()  # the result is on the disk
    t.seconds = before + time.perf_counter() - start
    if bar.disable and setup.progress:  # no terminal: a line for each network instead of the bar
        print(f"{job.name}: {t.step} steps, {t.seconds:.0f} s", file=sys.stderr, flush=True)
    return t.seconds


def _epoch(t: Training) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """The batches (x, y, index) that are left of an epoch; the time that they are waited for counts as "data"."""
    batches = iter(t.stream)
    while True:
        with t.meter.span("data"):
            batch = next(batches, None)
        if batch is None:
            return
        yield batch
