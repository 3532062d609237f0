"""Work that runs on a CUDA device beside the current stream."""
import itertools
from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T")


class SideStream:
    """One stream beside the device's current one, and the way of its results to the current one. The host never waits.

    The function that `start` is given and the tensors that it reads must live until `hand_over` or `close`. Memory of
    the current stream that is freed earlier could be written anew while the work still reads it.
    """

    def __init__(self, device: torch.device):
        self.device, self.stream = device, torch.cuda.Stream(device)

    def start(self, work: Callable[[], T]) -> T:
        """Issue the work; it begins once everything issued before on the current stream is done."""
        self.follow()
        return self.issue(work)

    def follow(self) -> None:
        """Let later work of this stream begin once everything issued so far on the current stream is done."""
        self.stream.wait_stream(torch.cuda.current_stream(self.device))

    def issue(self, work: Callable[[], T]) -> T:
        """Issue the work on this stream, after what was issued on it before."""
        with torch.cuda.stream(self.stream):
            return work()

    def hand_over(self, results: Iterable[Tensor]) -> None:
        """Let later work of the current stream find these results done, and keep their memory as long as it needs."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        # While a CUDA graph is captured, record_stream would hold memory to the capture's end. It is not needed: nobody
        # else uses the graph's memory, and this stream reuses it only after it has waited for the current one.
        if not torch.cuda.is_current_stream_capturing():
            for t in results:
                t.record_stream(current)

    def close(self) -> None:
        """Let later work of the current stream begin once the work of this one is done."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)


class SideStreams:
    """Streams for independent works: as many beside the current one as are needed. A copy starts without any.

    Captured works have streams of their own: a replayed graph must not share a library's workspace (cuBLAS, cuDNN) with
    what runs beside it.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self._streams: dict[bool, list[SideStream]] = {False: [], True: []}

    def __reduce__(self) -> tuple[type, tuple[torch.device]]:
        return SideStreams, (self.device,)

    def together(self, works: Sequence[Callable[[], Tensor]]) -> list[Tensor]:
        """The results of all works, issued in their order: the first on the current stream, each other beside it.

        Later work of the current stream begins after all of them, also where one raises.
        """
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
