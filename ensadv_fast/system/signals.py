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


class _State:
    """Whether a signal came, where no process shares it."""

    value = 0


_nothing_to_save = False

# `asked.value` is the number of the signal that came, 0 before. While there are workers, `asked` is a number in memory
# that they and their parent share, written without a lock: read it through this module.
asked: Any = _State()


@contextmanager
def at_once() -> Iterator[None]:
    """Within it a signal raises Stopped at once, also one that came before: nothing under way must be saved."""
    global _nothing_to_save
    _nothing_to_save = True
    try:
        if asked.value:
            raise Stopped.by(asked.value, "all networks are trained")
        yield
    finally:
        _nothing_to_save = False


@contextmanager
def handled() -> Iterator[None]:
    """Within it SIGTERM and the first SIGINT only set `asked`; a second SIGINT raises KeyboardInterrupt.

    It does nothing in other threads than the main one, which alone may have handlers.
    """
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
