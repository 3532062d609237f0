"""Independent work in several processes of few threads each: small networks gain little from a second thread."""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Callable, Iterator
from concurrent.futures import Executor, Future, ProcessPoolExecutor
from contextlib import contextmanager
from multiprocessing.connection import wait
from typing import Any

import torch
from tqdm import tqdm

from . import signals

bar_position: int | None = None  # the line of this process's progress bar; None: the only process


class _InProcess(Executor):
    """An executor without processes: it runs what is submitted at once, in this one."""

    def submit(self, fn: Callable[..., Any], /, *args: Any, **kwargs: Any) -> Future:
        future: Future = Future()
        future.set_result(fn(*args, **kwargs))
        return future


def follow_parent() -> None:
    """Let this process end with its parent, also where the parent is killed, and ignore Ctrl-C and SIGTERM.

    These signals may reach the whole process group; the parent answers them. A worker left behind would write the same
    checkpoints as the resumed run.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    parent = multiprocessing.parent_process()
    assert parent is not None
    threading.Thread(target=lambda: (wait([parent.sentinel]), os._exit(1)), daemon=True).start()


def _start(threads: int, lock: Any, counter: Any, asked: Any) -> None:
    """What each worker does first."""
    global bar_position
    follow_parent()
    signals.asked = asked  # shared with the parent, which answers signals
    torch.set_num_threads(threads)
    tqdm.set_lock(lock)
    with counter.get_lock():
        bar_position = counter.value
        counter.value += 1


@contextmanager
def pool(workers: int, threads: int) -> Iterator[Executor]:
    """An executor of `workers` processes with `threads` torch threads each; one worker is this process itself.

    An exception in the `with` block kills the workers. Processes are spawned, so what is submitted must be importable,
    and a script needs the usual `if __name__ == "__main__":`.
    """
    if workers == 1:
        yield _InProcess()
        return
    context = multiprocessing.get_context("spawn")
    signals.asked, before = context.RawValue("i", signals.asked.value), signals.asked
    others = set(multiprocessing.active_children())
    executor = ProcessPoolExecutor(workers, mp_context=context, initializer=_start,
                                   initargs=(threads, context.RLock(), context.Value("i", 0), signals.asked))
    try:
        yield executor
    except BaseException:
        for process in set(multiprocessing.active_children()) - others:
            process.kill()
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        before.value, signals.asked = signals.asked.value, before
