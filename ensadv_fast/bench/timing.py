"""How contenders are timed: side by side in interleaved rounds, on the CPU, by CUDA events, and by graph replay.

Whatever disturbs one contender then disturbs all, so ratios within one run hold better than the times themselves.
"""
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch

Call = Callable[[], object]
MOST_SETS = 1024  # of buffers: where one has a few bytes, more would only measure how large a graph may become


@dataclass(frozen=True)
class Timing:
    """Milliseconds of one call of one contender."""

    median: float
    quartiles: tuple[float, float]
    best: float


Samples = dict[str, list[float]]  # ms of every round


def rounds(measure: dict[str, Callable[[], float]], seconds: float, least: int = 7) -> dict[str, Timing]:
    """Measures every contender in turn, for `seconds` each on average and at least `least` times. measure: gives ms."""
    return timings(_take_samples(measure, seconds, least, lambda _: False))


def timings(samples: Samples) -> dict[str, Timing]:
    """Medians, quartiles and minima."""
    quartiles = {name: statistics.quantiles(s, n=4) for name, s in samples.items()}
    return {name: Timing(statistics.median(s), (quartiles[name][0], quartiles[name][2]), min(s))
            for name, s in samples.items()}


def _take_samples(measure: dict[str, Callable[[], float]], seconds: float, least: int,
                  are_enough: Callable[[Samples], bool]) -> Samples:
    """Every contender in turn, at least `least` times, until `seconds` each on average are over or `are_enough`."""
    samples: Samples = {name: [] for name in measure}
    deadline, least = time.perf_counter() + seconds * len(measure), max(2, least)
    while samples:
        for name, f in measure.items():
            samples[name].append(f())
        if min(map(len, samples.values())) >= least and (time.perf_counter() >= deadline or are_enough(samples)):
            break
    return samples


@dataclass(frozen=True)
class Ratio:
    """How many times as fast as the yardstick a contender is: the median over rounds, and an interval that holds the
    true one in 19 of 20 cases, whatever the distribution (order statistics, by the sign test)."""

    median: float
    low: float
    high: float


def ratio_to(yardstick: list[float], times: list[float]) -> Ratio:
    """The ratio of times that were measured in the same rounds, each pair beside each other."""
    over = sorted(y / t for y, t in zip(yardstick, times, strict=True))
    out = max(0, int(len(over) / 2 - 0.98 * len(over) ** 0.5))  # how many are left out at either end
    return Ratio(statistics.median(over), over[out], over[-1 - out])


def _repeat(span: Callable[[Call, int], float], f: Call, ms: float) -> Callable[[], float]:
    """A measurement of one call's ms: of so many calls at once that they take about `ms`, as clocks are coarse."""
    span(f, 1)  # the first call may load, compile and allocate
    once = span(f, 1)
    if once < ms:
        span(f, 2)
        once = span(f, 3)
    n = max(1, round(ms / max(1e-4, once)))
    return lambda: span(f, n)


def _cpu_span(f: Call, n: int) -> float:
    start = time.perf_counter()
    for _ in range(n):
        f()
    return (time.perf_counter() - start) / n * 1e3


def _cuda_span(f: Call, n: int) -> float:
    begin, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    begin.record()
    for _ in range(n):
        f()
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / n


def _measures(calls: dict[str, Call], device: str) -> dict[str, Callable[[], float]]:
    span, ms = (_cuda_span, 2.0) if device == "cuda" else (_cpu_span, 0.2)
    return {name: _repeat(span, f, ms) for name, f in calls.items()}


def time_calls(calls: dict[str, Call], seconds: float, device: str, least: int = 7) -> dict[str, Timing]:
    """Times of calls as a user makes them. On a GPU they run back to back between two events: where the host cannot
    launch fast enough, the launches are what is timed."""
    return rounds(_measures(calls, device), seconds, least)


def time_ratios(calls: dict[str, Call], yardstick: str, seconds: float, device: str, least: int = 7,
                within: float = 1.03) -> tuple[dict[str, Timing], dict[str, Ratio]]:
    """The same, and every other contender's ratio to the yardstick. It ends early where the ends of every ratio's
    interval are within a factor of `within`."""
    def ratios(samples: Samples) -> dict[str, Ratio]:
        return {name: ratio_to(samples[yardstick], s) for name, s in samples.items() if name != yardstick}

    def are_enough(samples: Samples) -> bool:
        return all(r.high <= within * r.low for r in ratios(samples).values())

    samples = _take_samples(_measures(calls, device), seconds, least, are_enough)
    return timings(samples), ratios(samples)


def sets_to_rotate(bytes_of_one: int, cache_bytes: int) -> int:
    """How many sets of buffers take five times the cache together: then no call finds its data in the cache."""
    return min(MOST_SETS, max(1, -(-5 * cache_bytes // max(1, bytes_of_one))))


def cache_bytes() -> int:
    """Size of the GPU's L2 cache."""
    return torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size


def synchronises(call: Call) -> str | None:
    """The error of a call that waits for the device, or None. To be asked before a capture: a call that breaks one
    leaves torch's generators unusable."""
    mode = torch.cuda.get_sync_debug_mode()
    torch.cuda.set_sync_debug_mode("error")
    try:
        call()
    except RuntimeError as error:
        return str(error).splitlines()[0]
    finally:
        torch.cuda.set_sync_debug_mode(mode)
    return None


def capture(calls: list[Call]) -> torch.cuda.CUDAGraph | str:
    """One CUDA graph that makes all the calls in order; or why they cannot be captured."""
    calls[0]()  # the first call of a process may wait, for memory or a library; only later ones count
    why = synchronises(calls[0])
    if why is not None:
        return why
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):  # warm up where the capture will run
        for call in calls[:3]:
            call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for call in calls:
            call()
    return graph


def _per_call(measure: Callable[[], float], calls: int) -> float:
    return measure() / calls


def time_replay(calls: dict[str, list[Call]], seconds: float) -> tuple[dict[str, Timing], dict[str, str]]:
    """Milliseconds of one call where a graph of one call per set of buffers is replayed; and by name, why a contender
    is missing.

    Neither launches nor hits in the L2 cache count: what is left is the kernels.
    """
    graphs = {name: capture(fs) for name, fs in calls.items()}
    missing = {name: graph for name, graph in graphs.items() if isinstance(graph, str)}
    measure: dict[str, Callable[[], float]] = {}
    for name, graph in graphs.items():
        if not isinstance(graph, str):
            n = len(calls[name])
            once = _repeat(_cuda_span, graph.replay, 2.0)
            measure[name] = partial(_per_call, once, n)
    return rounds(measure, seconds), missing
