"""Replay: on CUDA a whole attack is captured once per signature in one graph, and replayed on new data and keys.

An attack on a small network is hundreds of launches that take the host longer than the device. A graph holds them all:
key split, random start, every forward pass, logit gradient, backward pass and step. Its kernels read and write where
they did at capture, so whatever may change from call to call is copied into buffers of the graph's own, and results
are copied out. What shapes the work otherwise is the signature: another one is another graph.

Rules followed (torch.cuda.graph, torch's CUDA semantics notes, torch/_inductor/cudagraph_trees.py): the work has run
before it is captured, on the same threads, so that libraries are initialised and cuDNN has chosen; it is captured on a
stream of its own, with cuBLAS workspaces of its own; one memory pool serves all graphs of a source, so that none of
them may run beside another; other threads may go on meanwhile ("thread_local").
"""
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from functools import partial
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from ..ops import checks, memory
from .base import BaseSource
from .capturable import Snapshot, members, rehearse
from .modes import exclusive

KEPT = 16  # graphs of one source; the one that was not used for longest goes first
REMEMBERED = 64  # signatures that came once
ENDINGS = "its results are the same, and cuda_graph=False silences this"


class CudaLane:
    """Where one source's graphs are captured and replayed: a stream for captures, a memory pool, an order of replays.

    `LANES` has one class a device type; what tests put there for the CPU has the same methods.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()  # of the last replay; one that was never recorded counts as reached

    @staticmethod
    def is_capturing() -> bool:
        """Is somebody else capturing what this thread issues? Then the work goes into their graph as it is."""
        return torch.cuda.is_current_stream_capturing()

    def begin(self) -> None:
        """What is issued from now on comes after the last replay, whatever stream that was on."""
        torch.cuda.current_stream(self.device).wait_event(self.done)

    def end(self) -> None:
        """The replay's results have been copied out, as far as issuing goes."""
        self.done.record(torch.cuda.current_stream(self.device))

    def wait(self) -> None:
        """Until the last replay is done, as its memory will go; within a capture nothing can be waited for."""
        if not self.is_capturing():
            self.done.synchronize()

    def capture(self, work: Callable[[], tuple[Tensor, ...]]) -> tuple[Callable[[], None], tuple[Tensor, ...]]:
        """What replays the work, and the results that every replay writes anew. Waits for the device."""
        captured = torch.cuda.CUDAGraph()
        generator = torch.cuda.default_generators[self.stream.device.index]
        before = generator.clone_state()
        # A capture that fails leaves its stream the current one: the outer context takes it back.
        with torch.cuda.stream(self.stream):
            try:
                # cuBLAS keeps a workspace a stream: the graph's shall be of its pool, and nobody else's afterwards.
                torch._C._cuda_clearCublasWorkspaces()
                with torch.cuda.graph(captured, pool=self.pool, stream=self.stream, capture_error_mode="thread_local"):
                    results = work()
            except Exception:
                self._clean_up(generator, before)
                raise
            finally:
                torch._C._cuda_clearCublasWorkspaces()
        return captured.replay, results

    def _clean_up(self, generator: torch.Generator, before: torch.Generator) -> None:
        """Undo what a capture that CUDA broke off leaves behind: an allocator and a generator that believe in it."""
        index = self.stream.device.index
        try:
            torch._C._cuda_endAllocateToPool(index, self.pool)
        except RuntimeError:
            pass  # it was ended properly
        else:
            torch._C._cuda_releasePool(index, self.pool)
        state = generator.get_state()
        try:
            torch.rand(1, device=self.device)
        except RuntimeError:
            generator.graphsafe_set_state(before)
        else:
            generator.set_state(state)


LANES = {"cuda": CudaLane}


def permission(op: str, cuda_graph: bool | str, device: torch.device, crafting: str, live: bool,
               compile: bool) -> bool | str:
    """What a source's `cuda_graph` comes to: False, "auto" or True. ValueError where True is asked and cannot be."""
    why = None
    if device.type not in LANES:
        why = f"its model is on {device}: graphs are CUDA's"
    elif crafting == "train":
        why = "crafting 'train' seeds generators from the host at every call"
    elif compile:
        why = "it is compiled (torch.compile has CUDA graphs of its own, mode='reduce-overhead')"
    if why is None:
        return False if cuda_graph == "auto" and live else cuda_graph
    if cuda_graph is True:
        raise ValueError(f"{op}: cuda_graph must not be True for this source: {why}")
    return False


class Call(Protocol):
    """A checked call of an attack (:class:`ensadv_fast.attacks.request.Request`)."""

    @property
    def x(self) -> Tensor: ...

    @property
    def out(self) -> Tensor | None: ...

    def tensors(self) -> tuple[Tensor | None, ...]: ...

    def on(self, tensors: Sequence[Tensor | None], out: Tensor | None) -> "Call": ...

    def signature(self) -> tuple[Hashable, ...]: ...


class _Captured(NamedTuple):
    """inputs: buffers that a replay reads. results: what it writes, in the graph's memory."""

    inputs: list[Tensor]
    results: tuple[Tensor, ...]
    replay: Callable[[], None]


class Replays:
    """The graphs of one source, at most KEPT, and their rules. A copy of a source starts without any.

    allowed: False: never; "auto": from the second call of a signature on, and never again after a capture that failed;
    True: from the first call on, and a capture that fails is an error.
    """

    def __init__(self, device: torch.device, allowed: bool | str) -> None:
        self.device, self.allowed = device, allowed
        self.graphs: OrderedDict[Hashable, _Captured] = OrderedDict()
        self.seen: OrderedDict[Hashable, None] = OrderedDict()
        self._lane: CudaLane | None = None
        self._snapshot: Snapshot | None = None

    def __reduce__(self) -> tuple[type, tuple[torch.device, bool | str]]:
        return Replays, (self.device, self.allowed)

    def __del__(self) -> None:
        if self.graphs and not sys.is_finalizing():
            self.drop()

    @staticmethod
    def is_capturing(device: torch.device) -> bool:
        """Is what this thread issues to the device being captured?"""
        return device.type in LANES and LANES[device.type].is_capturing()

    def drop(self) -> None:
        """Give all graphs and their memory back; a pool without graphs cannot be used again."""
        if self._lane is not None:
            self._lane.wait()
        self.graphs.clear()
        self._lane = self._snapshot = None

    def find(self, source: BaseSource, signature: Hashable) -> _Captured | None:
        """The graph of this signature, if it was captured and the source has not changed since."""
        if self._snapshot is not None and not self._snapshot.holds(source):
            self.drop()
        captured = self.graphs.get(signature)
        if captured is not None:
            self.graphs.move_to_end(signature)
        return captured

    def due(self, signature: Hashable) -> bool:
        """Is it worth a graph? Counts this call."""
        if self.allowed is True or signature in self.seen:
            self.seen.pop(signature, None)
            return True
        self.seen[signature] = None
        if len(self.seen) > REMEMBERED:
            self.seen.popitem(last=False)
        return False

    def capture(self, source: BaseSource, signature: Hashable, work: Callable[[Call], tuple[Tensor, ...]],
                call: Call) -> _Captured | None:
        """A graph of work(call) on tensors of its own, run once before; None, and a warning, where there cannot be
        one."""
        with torch.inference_mode(False), torch.no_grad():
            static = [None if t is None else torch.empty_like(t, device=self.device).copy_(t, non_blocking=True)
                      for t in call.tensors()]
            own = call.on(static, None if call.out is None else torch.empty_like(call.x, dtype=call.out.dtype))
            try:
                for member in members(source):
                    member.prove(own.x)
                rehearse(source, lambda: work(own))
                if len(self.graphs) == KEPT and self._lane is not None:
                    self._lane.wait()
                    self.graphs.popitem(last=False)
                if self._lane is None:
                    self._lane = LANES[self.device.type](self.device)
                self._lane.begin()  # no replay is under way while memory of the pool is laid out anew
                self._snapshot = self._snapshot or Snapshot(source)
                replay, results = self._lane.capture(lambda: work(own))
            except Exception as e:  # noqa: BLE001 - models fail in any way; without a graph they may well work
                self.drop()
                self._refuse(e)
                return None
        captured = self.graphs[signature] = _Captured([t for t in static if t is not None], results, replay)
        return captured

    def _refuse(self, e: Exception) -> None:
        if self.allowed is True and isinstance(e, (TypeError, ValueError)):
            raise e  # about the caller's arguments
        first = e.__context__ or e  # a capture that ends in an error says so, after the error itself
        why = str(first).partition("\n")[0] or type(first).__name__
        if self.allowed is True:
            raise RuntimeError(f"Source: cuda_graph=True, but the attack cannot be captured: {why}") from e
        self.allowed = False
        warnings.warn(f"Source: the attack cannot be captured in a CUDA graph and runs without: {why}; {ENDINGS}",
                      stacklevel=5)

    def replay(self, captured: _Captured, call: Call, wanted: int) -> list[Tensor]:
        """Copies of the first `wanted` results, the first of them in call.out where given; no synchronisation."""
        assert self._lane is not None  # there is a graph
        out = call.out
        with torch.inference_mode(False), torch.no_grad():
            self._lane.begin()
            for own, t in zip(captured.inputs, (t for t in call.tensors() if t is not None)):
                own.copy_(t, non_blocking=True)
            captured.replay()
            results = [t.clone() for t in captured.results[out is not None:wanted]]
            if out is not None:
                with torch.inference_mode(out.is_inference()):
                    results.insert(0, out.copy_(captured.results[0]))
            self._lane.end()
        return results


def run(source: BaseSource, attack: Hashable, work: Callable[[BaseSource, Any], Any], call: Call, info: bool) -> Any:
    """work(source, call): its whole result with `info`, else the first of it; replayed where possible.

    work: all of an attack on a checked call, its session included; a function of the call, of the attack and of the
        source alone. It returns a NamedTuple of tensors, of which the first is call.out where given.
    """
    replays = source.replays
    if not isinstance(replays, Replays) or not _can_replay(replays, source, call.x):
        result = work(source, call)
        return result if info else result[0]
    # Where out has the dtype that results have anyway, the graph need not write there: its result is copied.
    rounds = call.out is not None and call.out.dtype != memory.result_dtype(call.x)
    signature = (attack, *call.signature(), rounds, *_numerics())
    with exclusive:  # graphs share one memory pool: threads take turns
        captured = replays.find(source, signature)
        if captured is None and replays.due(signature):
            captured = replays.capture(source, signature, partial(work, source),
                                       call if rounds else call.on(call.tensors(), None))
        if captured is not None:
            results = replays.replay(captured, call, len(captured.results) if info else 1)
            return type(captured.results)(*results) if info else results[0]
    result = work(source, call)
    return result if info else result[0]


def _can_replay(replays: Replays, source: BaseSource, x: Tensor) -> bool:
    if not replays.allowed or memory.memory_format(x) is None:
        return False
    device = replays.device
    # Values that are to be looked at, a caller's autocast (whose cache of cast weights outlives the attack), somebody
    # else's capture or trace: there the work runs as it is.
    return not (checks.is_readable(x) or torch.compiler.is_compiling() or LANES[device.type].is_capturing()
                or torch.is_autocast_enabled(device.type) and any(m.dtype is None for m in members(source)))


def _numerics() -> tuple[object, ...]:
    """Global settings that choose kernels."""
    return (torch.backends.cuda.matmul.fp32_precision,
            torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # torch sets it in sys.modules
            torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled())
