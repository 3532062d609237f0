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
import itertools
import random
import sys
import warnings
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from .graph import hooked
from .ops import _checks as check
from .ops import _reference as ref

if TYPE_CHECKING:
    from .protocol import BaseSource

KEPT = 16  # graphs of one source; the one that was not used for longest goes first
REMEMBERED = 64  # signatures that came once
ENDINGS = "its results are the same, and cuda_graph=False silences this"


class Uncapturable(Exception):
    """Work that a graph cannot hold; the message says why."""


class CudaLane:
    """Where one source's graphs are captured and replayed: a stream for captures, a memory pool, an order of replays.

    `LANES` has one class a device type; what tests put there for the CPU has the same methods.
    """

    def __init__(self, device: torch.device):
        self.device = device
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()
        self.done = torch.cuda.Event()  # of the last replay; one that was never recorded counts as reached

    @staticmethod
    def taken() -> bool:
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
        if not self.taken():
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

    def drop(self) -> None:
        """Give all graphs and their memory back; a pool without graphs cannot be used again."""
        if self._lane is not None:
            self._lane.wait()
        self.graphs.clear()
        self._lane = self._snapshot = None

    def find(self, source: "BaseSource", signature: Hashable) -> _Captured | None:
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

    def capture(self, source: "BaseSource", signature: Hashable, work: Callable[..., tuple[Tensor, ...]],
                given: tuple[Tensor | None, ...], out: Tensor | None) -> _Captured | None:
        """A graph of work(*given, out), run once before; None, and a warning, where there cannot be one."""
        with torch.inference_mode(False), torch.no_grad():
            static = [None if t is None else torch.empty_like(t, device=self.device).copy_(t, non_blocking=True)
                      for t in given]
            own = None if out is None or static[0] is None else torch.empty_like(static[0], dtype=out.dtype)
            try:
                rehearse(source, lambda: work(*static, own))
                if len(self.graphs) == KEPT and self._lane is not None:
                    self._lane.wait()
                    self.graphs.popitem(last=False)
                if self._lane is None:
                    self._lane = LANES[self.device.type](self.device)
                self._lane.begin()  # no replay is under way while memory of the pool is laid out anew
                self._snapshot = self._snapshot or Snapshot(source)
                replay, results = self._lane.capture(lambda: work(*static, own))
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

    def replay(self, captured: _Captured, given: tuple[Tensor | None, ...], out: Tensor | None,
               wanted: int) -> list[Tensor]:
        """Copies of the first `wanted` results, the first of them in `out` where given; no synchronisation."""
        assert self._lane is not None  # there is a graph
        with torch.inference_mode(False), torch.no_grad():
            self._lane.begin()
            for own, t in zip(captured.inputs, (t for t in given if t is not None)):
                own.copy_(t, non_blocking=True)
            captured.replay()
            results = [t.clone() for t in captured.results[out is not None:wanted]]
            if out is not None:
                with torch.inference_mode(out.is_inference()):
                    results.insert(0, out.copy_(captured.results[0]))
            self._lane.end()
        return results


def run(source: "BaseSource", attack: Hashable, work: Callable[..., Any], x: Tensor, y: Tensor | None,
        sizes: Any, key: Tensor | None, index: Tensor | None, out: Tensor | None, info: bool) -> Any:
    """work(x, y, sizes, key, index, out): its whole result with `info`, else the first of it; replayed where possible.

    work: all of an attack on checked arguments, its session included; a function of these arguments, of the attack and
        of the source alone. It returns a NamedTuple of tensors and writes the first to `out` where given.
    sizes: a NamedTuple of numbers and tensors [N].
    """
    replays = source.replays
    if not _may(replays, source, x):
        result = work(x, y, sizes, key, index, out)
        return result if info else result[0]
    at = [i for i, v in enumerate(sizes) if isinstance(v, Tensor)]
    given = (x, y, key, index, *(sizes[i] for i in at))
    other = None if out is None or out.dtype == ref.result_dtype(x) else out  # the graph itself rounds to its dtype
    signature = (attack, x.shape, x.stride(), x.dtype, *(t is None for t in given[1:4]), other is None,
                 *(None if i in at else v for i, v in enumerate(sizes)), *_numerics())

    def whole(x: Tensor, y: Tensor | None, key: Tensor | None, index: Tensor | None, *more: Any) -> Any:
        *per_sample, out = more
        put = dict(zip(at, per_sample))
        return work(x, y, type(sizes)._make(put.get(i, v) for i, v in enumerate(sizes)), key, index, out)

    assert replays is not None
    captured = replays.find(source, signature)
    if captured is None and replays.due(signature):
        captured = replays.capture(source, signature, whole, given, other)
    if captured is None:
        result = work(x, y, sizes, key, index, out)
        return result if info else result[0]
    results = replays.replay(captured, given, out, len(captured.results) if info else 1)
    return type(captured.results)(*results) if info else results[0]


def _may(replays: Replays | None, source: "BaseSource", x: Tensor) -> bool:
    if replays is None or not replays.allowed or check.memory_format(x) is None:
        return False
    device = replays.device
    # Values that are to be looked at, a caller's autocast (whose cache of cast weights outlives the attack), somebody
    # else's capture or trace: there the work runs as it is.
    return not (check.readable(x) or torch.compiler.is_compiling() or LANES[device.type].taken()
                or torch.is_autocast_enabled(device.type) and any(m.dtype is None for m in members(source)))


def members(source: "BaseSource") -> tuple[Any, ...]:
    """The sources that a source is made of."""
    return getattr(source, "sources", (source,))


def _owners(source: "BaseSource") -> tuple[Any, ...]:
    return (source, *getattr(source, "sources", ()))


def _numerics() -> tuple[object, ...]:
    """Global settings that choose kernels."""
    return (torch.backends.cuda.matmul.fp32_precision, torch.backends.cudnn.conv.fp32_precision,  # type: ignore[attr-defined]  # set in sys.modules
           
            torch.backends.cudnn.enabled, torch.backends.cudnn.benchmark, torch.backends.cudnn.deterministic,
            torch.are_deterministic_algorithms_enabled())


# ---- what a graph relies on --------------------------------------------------------------------------------------

def _modules(source: "BaseSource") -> list[nn.Module]:
    return [m for member in members(source) for m in member.module.modules()]


class Snapshot:
    """What a source's graphs have read: its settings, its modules, and where their tensors lie. It keeps all of it
    alive, but not the source."""

    def __init__(self, source: "BaseSource") -> None:
        dicts: Iterator[dict[str, Any]] = (d for m in _modules(source) for d in (m._parameters, m._buffers, m._modules))
        self.dicts = [d for d in dicts if d]
        self.held = [v for d in self.dicts for v in d.values()]
        self.tensors = [v for v in self.held if isinstance(v, Tensor)]
        self.ids, self.at = self._ids(), self._at()
        self.settings = [{k: v for k, v in vars(s).items() if k not in ("_active", "replays")}
                         for s in _owners(source)]

    # Maps of built-in functions: this is asked at every replay, and some networks have a thousand of these.
    def _ids(self) -> list[int]:
        return list(map(id, itertools.chain.from_iterable(map(dict.values, self.dicts))))

    def _at(self) -> list[int]:
        return list(map(Tensor.data_ptr, self.tensors))

    def holds(self, source: "BaseSource") -> bool:
        """Is all of it still so?"""
        for owner, settings in zip(_owners(source), self.settings):
            now = vars(owner)
            for k, v in settings.items():
                if now[k] is not v:
                    return False
        return self._ids() == self.ids and self._at() == self.at


class _Watch(TorchDispatchMode):
    """Notes what reads values of the device on the host, or copies from one to the other."""

    READS = (torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape)
    COPIES = (torch.ops.aten._to_copy.default, torch.ops.aten.copy_.default)

    def __init__(self, device: torch.device) -> None:
        super().__init__()
        self.device = device
        self.why: str | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if any(tag in func.tags for tag in self.READS):
            if any(isinstance(a, Tensor) and a.device == self.device for a in args):
                self.why = self.why or f"the host waits for a value from the device ({func})"
        elif func in self.COPIES and len({t.device for t in (*args[:2], result) if isinstance(t, Tensor)}) > 1:
            self.why = self.why or f"a tensor is copied between the host and the device ({func})"
        return result


def rehearse(source: "BaseSource", work: Callable[[], object]) -> None:
    """Run the work and raise :class:`Uncapturable` where a replay would do something else than the next run.

    A graph holds kernels. A model that decides by values, draws random numbers, or counts its calls, does so in Python
    or on the host; hooks are Python too. (What reads the device in other ways breaks the capture itself.)
    """
    modules = _modules(source)
    for member in members(source):
        for name, m in member.module.named_modules():
            if isinstance(m, torch.jit.ScriptModule):
                raise Uncapturable(f"{name or 'the model'} is a script module, whose state cannot be watched")
            if hooked(m):
                raise Uncapturable(f"{name or 'the model'} has hooks, which a replay would not call")
    before, drawn = [dict(vars(m)) for m in modules], _generators(source.device)
    with _Watch(source.device) as watch:
        work()
    if watch.why is not None:
        raise Uncapturable(watch.why)
    if not all(a == b for a, b in zip(drawn, _generators(source.device))):
        raise Uncapturable("the model draws random numbers")
    for m, old in zip(modules, before):
        now = vars(m)
        for name in old.keys() | now.keys():
            if not _same(old.get(name), now.get(name)):
                raise Uncapturable(f"{type(m).__name__}.{name} changes as the model is called")


def _same(a: object, b: object) -> bool:
    """Is it the same object, or a number, text or tuple of the same value?"""
    if a is b or type(a) is not type(b):
        return a is b
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return isinstance(a, (bool, int, float, str)) and a == b


def _generators(device: torch.device) -> list[Any]:
    """The states of the generators that models draw from, comparable."""
    state = np.random.get_state(legacy=True)
    assert isinstance(state, tuple)
    _, words, *rest = state
    states = [torch.get_rng_state()] + ([torch.cuda.get_rng_state(device)] if device.type == "cuda" else [])
    return [random.getstate(), np.asarray(words).tobytes(), rest, *(s.numpy().tobytes() for s in states)]
