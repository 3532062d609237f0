"""The one loop that trains a network."""
from __future__ import annotations

import sys
import time
from contextlib import ExitStack

from ..system import ranks, signals
from . import logs
from .job import Job, Run
from .trainer import Training


def fit(run: Run, job: Job) -> float:
    """Train one network, or go on where its checkpoint stops; the seconds it took. Its checkpoint is the result.

    A job depends on its seed, the config and the static sources alone: not on the jobs before or beside it, and (on
    the CPU, bit for bit) not on whether it was interrupted. A signal ends it by :class:`signals.Stopped` after a
    step, with a checkpoint of that step.
    """
    config, here = run.config, run.ranks
    t = Training(run, job)
    t.resume()
    before, start = t.seconds, time.perf_counter()
    save_every, images = config.save_every or t.per_epoch, job.epochs * len(run.dataset.train)
    vote = ranks.Vote(here)
    t.model.train()
    with ExitStack() as stack:
        stack.enter_context(t.stream)
        bar = stack.enter_context(run.bar(total=images, initial=t.images, unit=" images", desc=job.name))
        log = stack.enter_context(logs.Log(run.folder, job.name, tensorboard=config.tensorboard, step=t.step)
                                  ) if here.main else None
        while t.step < t.total:
            batches = iter(t.stream)
            while True:
                with t.meter.span("data"):
                    item = next(batches, None)
                if item is None:
                    break
                lr, source = t.advance(*item)
                bar.update(t.stream.global_size)
                stop = vote(t.step, signals.asked.value)
                watch = t.watch()
                look = t.monitor is not None and t.step % t.per_epoch == 0
                if t.step % config.log_every == 0 or t.step == t.total or look:
                    record = t.line()
                    if log is not None:
                        log({"step": t.step, "epoch": (t.step - 1) // t.per_epoch, "lr": lr, "source": source, **record,
                             "monitor": watch})
                        bar.set_postfix_str(logs.progress(record, images - t.images), refresh=False)
                if t.step % save_every == 0 or t.step == t.total or stop:
                    t.seconds = before + time.perf_counter() - start
                    t.save()
                if stop and t.step < t.total:
                    raise signals.Stopped.by(stop, f"step {t.step} of {t.total} of {job.name} is saved")
        vote.close()
    here.barrier()  # the result is on the disk
    t.seconds = before + time.perf_counter() - start
    if bar.disable and run.progress:  # no terminal: a line for each network instead of the bar
        print(f"{job.name}: {t.step} steps, {t.seconds:.0f} s", file=sys.stderr, flush=True)
    return t.seconds
