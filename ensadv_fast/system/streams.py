"""Work that runs on a CUDA device beside the current stream."""
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SideStream:
    """One stream beside the device's current one, and the way of results from there to here. Nothing waits on the host.

    What `start` is given, and the arguments of its work, must live until `hand_over` or `close`: memory of the current
    stream that is freed earlier could be written anew while the work still reads it.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, work: Callable[[], T]) -> T:
        """Issue the work; it begins when all that was issued on the current stream before is done."""
        self.follow()
        return self.issue(work)

    def follow(self) -> None:
        """What is issued here from now on begins when all that was issued on the current stream before is done."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def issue(self, work: Callable[[], T]) -> T:
        with torch.cuda.stream(self.stream):
            return work()

    def hand_over(self, results: Iterable[Tensor]) -> None:
        """What is issued on the current stream from now on finds these results done, and keeps their memory."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        # In a capture a recorded block is held to its end; the graph's own memory has no other users to fear, and this
        # stream comes back to it only after it has waited for the current one.
        if not torch.cuda.is_current_stream_capturing():
            for t in results:
                t.record_stream(current)

    def close(self) -> None:
        """What is issued on the current stream from now on comes after the work."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class SideStreams:
    """Streams for independent works: as many beside the current one as are needed. Graphs have streams of their own,
    as a replay must share no library's workspace with what runs beside it. A copy starts without any."""

    def __init__(self, device: torch.device):
        self.device = device
        self._streams: dict[bool, list[SideStream]] = {False: [], True: []}

    def __reduce__(self) -> tuple[type, tuple[torch.device]]:
        return SideStreams, (self.device,)

    def together(self, works: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The results of all works, issued in their order: the first on the current stream, each other beside it. What
        is issued on the current stream from now on comes after all of them, also where one raises."""
        streams = self._streams[torch.cuda.is_current_stream_capturing()]
        while len(streams) < len(works) - 1:
            streams.append(SideStream(self.device))
        beside = streams[:len(works) - 1]
        results: list[Tensor] = []
        for stream in beside:
            stream.follow()
        try:
            results.append(works[0]())
            results += (stream.issue(work) for stream, work in zip(beside, works[1:]))
        finally:
            for stream, result in itertools.zip_longest(beside, results[1:]):
                stream.hand_over(() if result is None else (result,))
        return results
