"""Work that runs on a CUDA device beside the current stream."""
from collections.abc import Callable, Iterable
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
        self.stream.wait_stream(torch.cuda.current_stream(self.device))
        with torch.cuda.stream(self.stream):
            return work()

    def hand_over(self, results: Iterable[Tensor]) -> None:
        """What is issued on the current stream from now on finds these results done, and keeps their memory."""
        current = torch.cuda.current_stream(self.device)
        current.wait_stream(self.stream)
        for t in results:
            t.record_stream(current)

    def close(self) -> None:
        """What is issued on the current stream from now on comes after the work."""
        torch.cuda.current_stream(self.device).wait_stream(self.stream)
