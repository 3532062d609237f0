"""SIGTERM and the first SIGINT end a run after the step in flight, with a checkpoint."""
from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any


class Stopped(Exception):
    """A signal asked the run to end. Whatever was under way is saved."""

    @classmethod
    def by(cls, number: int, saved: str) -> Stopped:
        return cls(f"stopped by {signal.Signals(number).name}; {saved}")


class _Here:
    value = 0


_nothing_to_save = False

# The signal's number once it came. A worker shares its parent's: a byte of shared memory, written without a lock.
asked: Any = _Here()


@contextmanager
def at_once() -> Iterator[None]:
    """Within it nothing is under way that must be saved: a signal that came or comes raises Stopped at once."""
    global _nothing_to_save
    _nothing_to_save = True
    try:
        if asked.value:
            raise Stopped.by(asked.value, "all networks are trained")
        yield
    finally:
        _nothing_to_save = False


@contextmanager
def signals() -> Iterator[None]:
    """Within it SIGTERM and the first SIGINT only set `asked`; a second SIGINT raises KeyboardInterrupt. In other
    threads than the main one, which cannot have handlers, it does nothing."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def answer(number: int, frame: object) -> None:
        if asked.value and number == signal.SIGINT:
            raise KeyboardInterrupt
        asked.value = number
        if _nothing_to_save:
            raise Stopped.by(number, "all networks are trained")

    before = {number: signal.signal(number, answer) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        asked.value = 0
        for number, handler in before.items():
            signal.signal(number, handler)
