"""The long benchmark: every op case x size x dtype x memory format x contender, verified, then timed.

    pytest bench/test_ops.py -k "sign_step and imagenet and float32 and not compile"

One group per case, size, dtype and format, named by these four words; -k selects by them, and by the contenders'
names: copy, torch.add, eager, torch.compile, ours, and the peer libraries' own code (peers.py). extra_info has GB/s of
an ideal kernel's bytes, and their share of what the copy reaches in the same run. On a GPU "calls" are calls as users
make them, and "graph" is the replay of a CUDA graph over buffers that exceed the L2 cache five times.
"""
from collections.abc import Callable
from functools import lru_cache

import pytest
import torch
from peers import PEERS, peers_of

from ensadv_fast.bench.contenders import binders, copy_arguments, first, rate, streamed_bytes, verify
from ensadv_fast.bench.quick import settings
from ensadv_fast.bench.timing import cache_bytes, capture, sets_to_rotate, time_calls

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
METHODS = ["calls", "graph"] if DEVICE == "cuda" else ["calls"]
SETTINGS = {setting.name: setting for setting in settings(DEVICE)}
PEER = {(peer.case, peer.name): peer for peer in PEERS}


class Group:
    """What the contenders of one setting share: arguments, size, and the rate of their copy."""

    def __init__(self, name: str):
        self.setting = SETTINGS[name]
        self.args, self.kw = self.setting.arguments()
        self.wanted = self.setting.case.reference(*self.args, **self.kw)
        torch._dynamo.reset()  # else the compiler soon declines to specialise once more
        self.binders = binders(self.setting.case)
        self.moved = streamed_bytes(self.setting, self.args, self.kw, self.wanted)
        self.copy_bytes = 2 * first(self.wanted).numel() * first(self.wanted).element_size()
        self._copy_ms: dict[str, float] = {}

    def calls(self, contender: str, method: str) -> tuple[Callable[[], object], int]:
        """A verified function and how many calls of the contender it makes."""
        peer = PEER.get((self.setting.case.name, contender))
        if peer:
            self._verify_peer(peer)
            bind = peer.bind
        else:
            bind = self.binders[contender]
            verify(self.setting, self.args, self.kw, {contender: bind(self.args, self.kw)}, self.wanted)
        if method == "calls":
            return bind(self.args, self.kw), 1
        n = sets_to_rotate(self.moved or self.copy_bytes, cache_bytes())
        graph = capture([bind(*copy_arguments(self.args, self.kw)) for _ in range(n)])
        if isinstance(graph, str):
            pytest.skip(f"{contender} cannot be captured: {graph}")
        return graph.replay, n

    def _verify_peer(self, peer) -> None:
        if peer.verified:
            args, kw = peer.start(self.args, self.kw)
            verify(self.setting, args, kw, {peer.name: peer.bind(self.args, self.kw)})

    def copy_ms(self, method: str) -> float:
        """Of the copy in this run, also where -k leaves it out."""
        if method not in self._copy_ms:
            call, n = self.calls("copy", method)
            self._copy_ms[method] = time_calls({"copy": call}, 0.05, DEVICE)["copy"].median / n
        return self._copy_ms[method]


group_of = lru_cache(maxsize=1)(Group)  # one group's buffers at a time


@lru_cache
def own_contenders(case: str) -> list[str]:
    return list(binders(next(s.case for s in SETTINGS.values() if s.case.name == case)))


PAIRS = [(name, contender) for name, setting in SETTINGS.items()
         for contender in [*own_contenders(setting.case.name), *(peer.name for peer in peers_of(setting))]]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(("name", "contender"), PAIRS, ids=["-".join(pair) for pair in PAIRS])
def test_op(benchmark, name, contender, method):
    peer = PEER.get((SETTINGS[name].case.name, contender))
    if peer and not peer.installed:
        pytest.skip(f"{peer.package} is not installed")
    group = group_of(name)
    call, n = group.calls(contender, method)

    def synchronised():
        call()
        torch.cuda.synchronize()

    benchmark.group = f"{name} {method}"
    benchmark(call if DEVICE == "cpu" else synchronised)
    if benchmark.stats is None:  # --benchmark-disable: verified, not timed
        return
    ms = benchmark.stats.stats.median * 1e3 / n
    if DEVICE == "cuda":  # without the host's wait for the device
        ms = time_calls({contender: call}, 0.05, DEVICE)[contender].median / n
    benchmark.extra_info.update(case=group.setting.case.name, size=group.setting.size, dtype=group.setting.dtype,
                                format=group.setting.format, contender=contender, method=method, calls=n, ms=ms)
    if not peer or peer.verified:
        benchmark.extra_info.update(rate(contender, ms, group.moved, group.copy_bytes, group.copy_ms(method)))
