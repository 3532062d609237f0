"""Batches of image files, decoded by other processes before they are asked for."""
from __future__ import annotations

import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data import Dataset as TorchDataset

from ..system import processes
from .folder import FolderSplit
from .sampler import Sampler


class Task(NamedTuple):
    """This rank's part of one global batch."""

    epoch: int
    start: int
    stop: int
    ids: list[int]


class Loaded(NamedTuple):
    """A task's images that could be decoded, uint8 [B, 3, H, W], and for each of the others the reason why not."""

    task: Task
    images: Tensor
    corrupt: dict[int, str]


class _Decoder(TorchDataset):
    """What a DataLoader's workers hold: they turn tasks into images."""

    def __init__(self, split: FolderSplit) -> None:
        self.split = split

    def __getitem__(self, task: Task) -> Loaded:
        return Loaded(task, *self.split.pixels(task.ids))


class _Plan:
    """The tasks from (epoch, position) `begin` on, to the end of that epoch; endless: of all later epochs too."""

    def __init__(self, sampler: Sampler, endless: bool) -> None:
        self.sampler, self.endless, self.begin = sampler, endless, (0, 0)

    def __iter__(self) -> Iterator[Task]:
        epoch, position = self.begin
        while True:
            order = self.sampler.order(epoch)
            for start, stop in self.sampler.spans(position):
                yield Task(epoch, start, stop, self.sampler.share(order, start, stop).tolist())
            if not self.endless:
                return
            epoch, position = epoch + 1, 0


def _leave(item: Any) -> Any:
    return item


def _start(worker: int) -> None:
    """What each worker does first."""
    if hasattr(signal, "sigwaitinfo"):  # Linux
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})  # also in threads that start from here on
        threading.Thread(target=_heed_parent, daemon=True).start()
    processes.follow_parent()


def _heed_parent() -> None:
    """End this process at a SIGTERM from the parent, and from nobody else.

    A scheduler signals all processes of a job. The parent then saves its work, and still needs batches for that.
    """
    parent = multiprocessing.parent_process()
    assert parent is not None  # a worker has one
    while signal.sigwaitinfo({signal.SIGTERM}).si_pid != parent.pid:
        pass
    os._exit(1)


class Loader:
    """The batches of a folder split in a sampler's order, decoded by `workers` processes (0: by this one), each up to
    `prefetch` batches ahead.

    Processes come from a fork server, or are spawned: a script that uses them needs the usual
    `if __name__ == "__main__":`. They live until `close`, and end with this process whatever ends it.
    """

    def __init__(self, split: FolderSplit, sampler: Sampler, *, workers: int, prefetch: int, pinned: bool,
                 endless: bool) -> None:
        options: dict[str, Any] = {}
        if workers:
            options = {"num_workers": workers, "prefetch_factor": prefetch, "persistent_workers": True,
                       "multiprocessing_context": _context(), "worker_init_fn": _start}
        # A DataLoader without a generator of its own would draw its workers' seeds from torch's.
        self._plan = _Plan(sampler, endless)
        self._loader = DataLoader(_Decoder(split.to("cpu")), batch_size=None, sampler=self._plan,
                                  collate_fn=_leave, pin_memory=pinned, generator=torch.Generator(), **options)
        self._items: Iterator[Loaded] | None = None

    def take(self, task: tuple[int, int, int]) -> Loaded:
        """The batch (epoch, start, stop). It is the one after that taken last, or any other; then what was decoded
        ahead is dropped. Raises RuntimeError where a process died, after the others were ended."""
        try:
            item = None if self._items is None else next(self._items, None)
            if item is None or item.task[:3] != task:
                self._plan.begin = task[:2]
                self._items = iter(self._loader)  # the same processes
                item = next(self._items)
            return item
        except (RuntimeError, OSError, EOFError) as e:
            self.close()
            # A process that dies while it sends a batch breaks the connection: OSError or EOFError.
            if isinstance(e, RuntimeError) and "DataLoader worker" not in str(e):
                raise
            raise RuntimeError("data: a process that decodes images died; was it killed for lack of memory, or is "
                               "/dev/shm too small? Fewer workers, or a smaller prefetch, need less. "
                               f"({type(e).__name__}: {e})") from e

    def close(self) -> None:
        """End the processes and wait for them. A later :meth:`take` starts new ones."""
        items, self._items = self._items, None
        self._loader._iterator = None
        if (shut_down := getattr(items, "_shutdown_workers", None)) is not None:
            shut_down()  # now, not when the last reference is gone
        for process in getattr(items, "_workers", ()):
            if process.is_alive():  # still, after the DataLoader has waited for it
                process.kill()
                process.join()


def _context() -> multiprocessing.context.BaseContext:
    """A fork server that has imported what workers need: its children start at once, and no thread or lock of this
    process is forked with them."""
    if "forkserver" not in multiprocessing.get_all_start_methods():
        return multiprocessing.get_context("spawn")
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["__main__", __name__])
    return context
