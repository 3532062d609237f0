"""What a log line of training says: losses, accuracies, images a second, where the time goes.

Sums are kept on the device and read once per log line: between two lines the host never waits for the device.
"""
from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SPANS = ("data", "attack", "train")
# What the device tensor holds: sums over clean samples, the same over adversarial ones, then those of whole steps.
_CLEAN, _ADV, _LOSS, _STEPS, _IMAGES, _SIZE = 0, 3, 6, 7, 8, 9
_MANY_MARKS = 4096


class HostClock:
    """Moments of the host: on the CPU, where a call returns when its work is done."""

    def now(self) -> float:
        return time.perf_counter()

    def seconds(self, start: float, end: float) -> float:
        return end - start

    def has_passed(self, mark: float) -> bool:
        return True

    def forget(self, mark: float) -> None:
        pass


class CudaClock:
    """Moments of the device's current stream, as events. Time in which the device is busy counts for its work, whatever
    the host does meanwhile; time in which the device waits counts for what the host does then."""

    def __init__(self, device: torch.device):
        self.device = device
        self._free: list[torch.cuda.Event] = []

    def now(self) -> torch.cuda.Event:
        event = self._free.pop() if self._free else torch.cuda.Event(enable_timing=True)
        event.record(torch.cuda.current_stream(self.device))
        return event

    def seconds(self, start: torch.cuda.Event, end: torch.cuda.Event) -> float:
        return float(start.elapsed_time(end)) / 1e3

    def has_passed(self, mark: torch.cuda.Event) -> bool:
        return bool(mark.query())

    def forget(self, mark: torch.cuda.Event) -> None:
        self._free.append(mark)


class Timeline:
    """How much time each span takes. A span within another interrupts it: no moment counts twice."""

    def __init__(self, clock: HostClock | CudaClock):
        self.clock = clock
        self._open: list[str | None] = [None]
        self._spent: dict[str | None, float] = {}
        self._marks: deque[tuple[str | None, Any]] = deque()  # (the span that begins, its first moment)
        self._mark(None)

    def _mark(self, name: str | None) -> None:
        self._marks.append((name, self.clock.now()))
        if len(self._marks) > _MANY_MARKS:
            self._fold()

    def _fold(self) -> None:
        """Add up the time between marks that the device has passed; nothing is waited for."""
        while len(self._marks) > 1 and self.clock.has_passed(self._marks[1][1]):
            name, start = self._marks.popleft()
            self._spent[name] = self._spent.get(name, 0.0) + self.clock.seconds(start, self._marks[0][1])
            self.clock.forget(start)

    @contextmanager
    def span(self, name: str) -> Iterator[None]:
        """A context: the time within belongs to `name`."""
        self._open.append(name)
        self._mark(name)
        try:
            yield
        finally:
            self._open.pop()
            self._mark(self._open[-1])

    def cut(self) -> None:
        """End here the stretch of time that `spent` reports."""
        self._mark(self._open[-1])

    def spent(self) -> dict[str | None, float]:
        """Seconds by span (None: outside of all) since the last call, up to the last `cut`. To be called once the
        device has passed the cut: time that it has not passed counts the next time."""
        spent, self._spent = self.known(), {}
        return spent

    def known(self) -> dict[str | None, float]:
        """What `spent` would give now, without an end to the stretch of time."""
        self._fold()
        return dict(self._spent)

    def go_on(self, spent: dict[str | None, float]) -> None:
        """Begin anew, after this much time."""
        self.spent()
        self._spent = dict(spent)


class Meter:
    """Means over the steps since the last log line, on one device of one rank.

    device: where logits are. world: the number of ranks; with more than one, `line` must be given `reduce`.

        with meter.span("train"):
            ...
        meter.add(loss, logits, batch.y, batch.is_adv, images=len(x))
        if step % log_every == 0:
            record = meter.line(reduce)  # on every rank
    """

    def __init__(self, device: torch.device | str, *, world: int = 1,
                 clock: HostClock | CudaClock | None = None) -> None:
        if world < 1:
            raise ValueError(f"Meter: world must be >= 1, got {world}")
        self.device, self.world = torch.device(device), world
        if clock is None:
            clock = CudaClock(self.device) if self.device.type == "cuda" else HostClock()
        self._sums = torch.zeros(_SIZE, dtype=torch.float64, device=self.device)
        self._steps = self._images = 0
        self._timeline = Timeline(clock)

    def span(self, name: str) -> Any:
        """A context: the time within counts as "data", "attack" or "train". On CUDA it is that of the stream which is
        current when the span begins and ends. A span within another interrupts it."""
        if name not in SPANS:
            raise ValueError(f"Meter.span: name must be one of {', '.join(SPANS)}, got {name!r}")
        return self._timeline.span(name)

    @torch.no_grad()
    def add(self, loss: Tensor, logits: Tensor, y: Tensor, is_adv: Tensor, images: int | None = None) -> None:
        """Count one step, or one part of it. No host sync.

        loss: the scalar that is trained on. logits: [N, classes], any float dtype (computed in float32). y: int64 [N]
        or soft labels [N, classes], whose argmax is the class. is_adv: bool [N]. images: how many of the data set's
        images the step took; None: N, which for a doubled batch is twice as many.
        Raises ValueError for shapes that do not fit.
        """
        n = logits.shape[0]
        if logits.dim() != 2 or y.shape[:1] != (n,) or y.dim() > 2 or is_adv.shape != (n,) or loss.numel() != 1:
            raise ValueError("Meter.add: loss, logits, y and is_adv must have shapes [], [N, classes], [N] or "
                             f"[N, classes], and [N], got {tuple(loss.shape)}, {tuple(logits.shape)}, "
                             f"{tuple(y.shape)} and {tuple(is_adv.shape)}")
        hard = y.dim() == 1
        losses = F.cross_entropy(logits.float(), y if hard else y.float(), reduction="none")
        right = logits.argmax(1) == (y if hard else y.argmax(1))
        values = torch.stack([losses, right.float(), torch.ones_like(losses)])
        others = torch.stack([is_adv, ~is_adv])
        # Filled, not multiplied by 0: a NaN among the adversarial samples must not reach the sums of the clean ones.
        sums = values.masked_fill(others[:, None], 0.0).sum(2, dtype=torch.float64)
        self._sums[_CLEAN:_LOSS].add_(sums.view(-1))
        self._sums[_LOSS].add_(loss.detach().reshape(()))
        self._steps += 1
        self._images += n if images is None else images

    def state_dict(self) -> dict[str, Any]:
        """What was counted since the last line, on this rank: {"sums": float64 [9] on the CPU, "seconds": by span}. It
        waits for the device."""
        self._timeline.cut()
        self._fill()
        return {"sums": self._sums.cpu().clone(), "seconds": self._timeline.known()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on from what `state_dict` gave, so that the next line covers those steps too. With many ranks one of them
        takes :meth:`total` of all states, and the others nothing."""
        self._sums.copy_(state["sums"])
        self._steps, self._images = (int(state["sums"][i]) for i in (_STEPS, _IMAGES))
        self._timeline.go_on(state["seconds"])

    @staticmethod
    def total(states: list[dict[str, Any]]) -> dict[str, Any]:
        """The state that stands for those of all ranks: their sums, and the time of the first."""
        return {"sums": torch.stack([s["sums"] for s in states]).sum(0), "seconds": states[0]["seconds"]}

    def _fill(self) -> None:
        """Let the tensor hold all that was counted."""
        self._sums[_STEPS].fill_(self._steps)
        self._sums[_IMAGES].fill_(self._images)

    def line(self, reduce: Callable[[Tensor], Tensor] | None = None, **counts: int) -> dict[str, Any]:
        """What happened since the last line, ready for strict JSON; the next line begins here. One host sync.

        reduce: takes a float64 tensor and returns its sum over all ranks (one all-reduce; in place is fine). Every rank
        calls `line` then; means and images a second are those of all ranks, shares of time and memory this rank's.
        counts: further numbers of this rank, whose sums over all ranks the line has under their names.

        loss, clean_loss, clean_accuracy, adv_loss, adv_accuracy: means; None where there were no such samples, or where
        the mean is not a number or infinite. finite: whether all of these are finite. images_per_second.
        share_data, share_attack, share_train: of the time since the last line. peak_memory: bytes, the most that
        PyTorch has had allocated on the CUDA device so far; None on the CPU.
        """
        if self.world > 1 and reduce is None:
            raise ValueError(f"Meter.line: reduce must be the sum over {self.world} ranks, got None")
        self._timeline.cut()
        self._fill()
        sums = torch.cat([self._sums, *(self._sums.new_full((1,), n) for n in counts.values())])
        values = (sums if reduce is None else reduce(sums)).tolist()
        spent = self._timeline.spent()
        self._sums.zero_()
        self._steps = self._images = 0
        seconds = sum(spent.values())
        record = {"loss": _mean(values[_LOSS], values[_STEPS])}
        for part, at in (("clean", _CLEAN), ("adv", _ADV)):
            loss, right, n = values[at:at + 3]
            record |= {f"{part}_loss": _mean(loss, n), f"{part}_accuracy": _mean(right, n)}
        return {**record, "finite": all(map(math.isfinite, values)),
                "images_per_second": _mean(values[_IMAGES], seconds),
                **{f"share_{name}": _mean(spent.get(name, 0.0), seconds) for name in SPANS},
                "peak_memory": torch.cuda.max_memory_allocated(self.device) if self.device.type == "cuda" else None,
                **{name: int(n) for name, n in zip(counts, values[_SIZE:])}}


def _mean(total: float, n: float) -> float | None:
    return total / n if n > 0 and math.isfinite(total) else None


def eta(left: float, per_second: float | None) -> float | None:
    """Seconds until `left` images are done at this rate; None where there is no rate."""
    return max(left, 0) / per_second if per_second else None
