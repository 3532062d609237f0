"""Replayed attacks: what is captured when, that replays see new data and nobody's results change, and who gives up.

On the CPU a stand-in for a CUDA graph runs the work again on the very tensors it was captured on, and writes into the
very results; both are poisoned in between, so whatever by-passed the buffers shows. The `gpu` tests use real graphs.
"""
import copy
import pickle
import random
import weakref
from unittest.mock import MagicMock

import numpy as np
import pytest
import torch
from networks import batch, small_net
from torch import nn

import ensadv_fast as ea
from ensadv_fast.ops import checks as check
from ensadv_fast.sources import cuda_graphs
from ensadv_fast.sources.frozen import packing
from ensadv_fast.system import streams as overlap

EXACT = {"dtype": torch.float32, "fold": False, "channels_last": False}
ATTACKS = {
    "fgsm": ea.fgsm(), "rand_fgsm": ea.rand_fgsm(), "step_ll": ea.step_ll(), "rand_step_ll": ea.rand_step_ll(),
    "step_rnd": ea.step_rnd(), "ifgsm": ea.ifgsm(), "iter_ll": ea.iter_ll(), "pgd": ea.pgd(steps=3),
    "pgd_restarts": ea.pgd(steps=2, restarts=3), "pgd_cw": ea.pgd(steps=2, loss="cw"),
    "pgd_l2": ea.pgd_l2(1.0, steps=2),
    "mifgsm": ea.mifgsm(steps=3), "difgsm": ea.difgsm(steps=2), "tifgsm": ea.tifgsm(steps=2),
    "sinifgsm": ea.sinifgsm(steps=2), "vnifgsm": ea.vnifgsm(steps=2, variance=2), "fast_grad_linf": ea.fast_grad_linf(),
    "fast_grad_l2": ea.fast_grad_l2(1.0), "fast_entropy": ea.fast_entropy(),
}


def poison(t: torch.Tensor) -> None:
    t.fill_(float("nan") if t.is_floating_point() else 0)


class AgainLane:
    """`replay.CudaLane` for the CPU."""

    def __init__(self, device):
        self.captures = self.replays = self.waits = 0
        self.under_way = False

    @staticmethod
    def is_capturing():
        return False

    def begin(self):
        assert not self.under_way
        self.under_way = True

    def end(self):
        assert self.under_way
        self.under_way = False

    def wait(self):
        self.waits += 1

    def capture(self, work):
        self.captures += 1
        self.under_way = False
        results = work()
        for t in results:
            poison(t)

        def again():
            self.replays += 1
            for t, new in zip(results, work()):
                t.copy_(new)
        return again, results


@pytest.fixture
def again(monkeypatch):
    """Sources on the CPU are captured, by AgainLane, and values are not looked at, as on a GPU."""
    monkeypatch.setitem(cuda_graphs.LANES, "cpu", AgainLane)
    monkeypatch.setattr(check, "is_readable", lambda t: False)
    for dtype in (torch.float32, torch.bfloat16):
        packing.works(dtype)  # looks at values, once a process


@pytest.fixture
def deterministic(monkeypatch):
    """Algorithms that give the same bits whenever they run; graphs change nothing about which are chosen."""
    monkeypatch.setattr(torch.backends.cudnn, "deterministic", True)


def calls(n: int, device="cpu", size: int = 8, count: int = 12):
    """n batches with keys and indices of their own."""
    for i in range(n):
        x, y = batch(count, size=size, seed=i)
        index = torch.randint(0, 10_000, (count,), generator=torch.Generator().manual_seed(i))
        yield x.to(device), y.to(device), ea.fresh_key(device, seed=i), index.to(device)


def pair(net=None, how=None, ensemble=False, device="cpu", **kw):
    """Two sources of the same network: one that is captured at the first call, one that never is."""
    net = (small_net() if net is None else net).to(device)
    made = []
    for cuda_graph in (True, False):
        first = ea.Source(net, cuda_graph=cuda_graph, **(EXACT if how is None else how), **kw)
        second = ea.Source(small_net(1).to(device), cuda_graph=cuda_graph)
        made.append(ea.Ensemble([first, second], fuse=ensemble) if ensemble else first)
    return made


def same(got, wanted):
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype and a.stride() == b.stride() and torch.equal(a, b)


def check_replays(attack, ours, plain, rounds, device="cpu", **kw):
    """Replays equal eager calls; nothing that was returned before changes afterwards."""
    kept = []
    for i, (x, y, key, index) in enumerate(calls(rounds, device)):
        more = dict(kw)
        if more.pop("per_sample", False):
            more["eps"] = torch.linspace(0, 0.1, len(x), device=device) * (i + 1) / rounds
        x = x.contiguous(memory_format=more.pop("memory_format", torch.contiguous_format))
        x = (x * 255).round().to(torch.uint8) if more.pop("levels", False) else x.to(more.pop("dtype", x.dtype))
        y = y if more.pop("labels", True) else None
        index = index if more.pop("indexed", True) else None
        out = more.pop("out", None)
        outs = [None if out is None else torch.empty_like(x, dtype=out) for _ in range(2)]
        got = attack(ours, x, y, key=key, index=index, out=outs[0], return_info=True, **more)
        wanted = attack(plain, x, y, key=key, index=index, out=outs[1], return_info=True, **more)
        assert out is None or got.x_adv is outs[0]
        same(got, wanted)
        kept.append((got, wanted))
    for got, wanted in kept:
        same(got, wanted)
    assert len(ours.replays.graphs) == 1


FORMS = {
    "plain": {}, "prediction": {"labels": False}, "number": {"eps": 0.02}, "per_sample": {"per_sample": True},
    "no_index": {"indexed": False}, "levels": {"levels": True}, "levels_out": {"levels": True, "out": torch.uint8},
    "half": {"dtype": torch.float16}, "out": {"out": torch.float32},
    "channels_last": {"memory_format": torch.channels_last}, "double": {"dtype": torch.float64},
}


@pytest.mark.parametrize("name", ATTACKS)
def test_replay_is_eager(again, name):
    check_replays(ATTACKS[name], *pair(), 4)


@pytest.mark.parametrize("form", FORMS)
def test_every_input_is_new_data(again, form):
    check_replays(ea.pgd(steps=2, rule="random", targeted=True), *pair(), 3, **FORMS[form])


@pytest.mark.parametrize("fuse", ("logits", "probs", "loss"))
def test_ensembles(again, fuse):
    check_replays(ea.rand_step_ll(), *pair(ensemble=fuse), 3)


def test_fast_sources(again):
    check_replays(ea.pgd(steps=3), *pair(how={"dtype": torch.bfloat16}), 3)


def test_the_call_returns_x_adv_alone(again):
    ours, plain = pair()
    for x, y, key, _ in calls(3):
        x_adv = ea.pgd(steps=2)(ours, x, y, key=key)
        assert type(x_adv) is torch.Tensor and torch.equal(x_adv, ea.pgd(steps=2)(plain, x, y, key=key))


def test_auto_captures_what_recurs(again):
    source = ea.Source(small_net(), **EXACT)
    x, y = batch()
    for n in range(4):
        ea.fgsm()(source, x, y)
        assert len(source.replays.graphs) == (n > 0)
        assert (source.replays._lane.replays if n else 0) == n
    for k in range(2):
        ea.fgsm()(source, x[:5], y[:5])
        assert len(source.replays.graphs) == 1 + k


def test_true_captures_at_once_and_false_never(again):
    ours, plain = pair()
    x, y = batch()
    for source in (ours, plain):
        for _ in range(3):
            ea.fgsm()(source, x, y)
    assert len(ours.replays.graphs) == 1 and ours.replays._lane.replays == 3
    assert not plain.replays.graphs


def test_the_signature_is_what_shapes_the_work(again, monkeypatch):
    source, _ = pair()
    x, y = batch()
    variants = [
        lambda: ea.fgsm()(source, x, y), lambda: ea.fgsm()(source, x, y, eps=0.1),
        lambda: ea.fgsm()(source, x, y, eps=torch.full((16,), 0.1)), lambda: ea.fgsm()(source, x),
        lambda: ea.fgsm()(source, x[:4], y[:4]), lambda: ea.fgsm()(source, x.half(), y),
        lambda: ea.fgsm()(source, x.contiguous(memory_format=torch.channels_last), y),
        lambda: ea.fgsm(loss="cw")(source, x, y), lambda: ea.step_ll()(source, x, y),
        lambda: ea.fgsm()(source, (x * 255).to(torch.uint8), y),
        lambda: ea.fgsm()(source, (x * 255).to(torch.uint8), y, out=torch.empty_like(x, dtype=torch.uint8)),
        lambda: ea.fgsm()(source, x, y, index=torch.arange(16)),
    ]
    for n, variant in enumerate(variants):
        for _ in range(2):
            variant()
            assert len(source.replays.graphs) == n + 1
    ea.fgsm()(source, x.clone(), y.clone(), out=torch.empty_like(x))  # the same work, results elsewhere
    assert len(source.replays.graphs) == len(variants)
    with monkeypatch.context() as m:
        m.setattr(torch.backends.cudnn, "benchmark", not torch.backends.cudnn.benchmark)
        ea.fgsm()(source, x, y)
    assert len(source.replays.graphs) == len(variants) + 1


def test_the_least_recently_used_graph_goes_first(again, monkeypatch):
    monkeypatch.setattr(cuda_graphs, "KEPT", 2)
    source, _ = pair()
    x, y = batch()
    for n in (3, 4, 3, 5):
        ea.fgsm()(source, x[:n], y[:n])
    assert [s[1][0] for s in source.replays.graphs] == [3, 5]
    assert source.replays._lane.waits == 1  # memory that a replay may be reading is waited for
    monkeypatch.setattr(cuda_graphs, "REMEMBERED", 2)
    source = ea.Source(small_net(), **EXACT)
    for n in (3, 4, 5, 3):
        ea.fgsm()(source, x[:n], y[:n])
    assert not source.replays.graphs and len(source.replays.seen) == 2


def changes():
    def in_place(source):
        source.module[0].weight.mul_(-1)

    def exchanged(source):
        source.module[0].weight.data = -source.module[0].weight

    def new_parameter(source):
        source.module[0].weight = nn.Parameter(-source.module[0].weight, requires_grad=False)

    def new_layer(source):
        layer = copy.deepcopy(source.module[0])
        layer.weight.neg_()
        source.module[0] = layer

    def appended(source):
        source.module.append(nn.Linear(10, 10, bias=False).requires_grad_(False))

    def new_module(source):
        source.module = copy.deepcopy(source.module)
        source.module[0].weight.neg_()

    def normalised(source):
        source.mean = torch.full((1, 3, 1, 1), 0.5)

    return {f.__name__: (f, kept) for f, kept in (
        (in_place, True), (exchanged, False), (new_parameter, False), (new_layer, False), (appended, False),
        (new_module, False), (normalised, False))}


@pytest.mark.parametrize("name", changes())
@pytest.mark.parametrize("ensemble", (False, "logits"))
def test_a_source_that_changes_is_captured_anew(again, name, ensemble):
    change, kept = changes()[name]
    ours, _ = pair(ensemble=ensemble)
    x, y = batch()
    before = ea.fgsm()(ours, x, y)
    lane = weakref.ref(ours.replays._lane)
    with torch.no_grad():
        change(ours.sources[0] if ensemble else ours)
    after = ea.fgsm()(ours, x, y)
    ours.replays.allowed = False
    assert torch.equal(after, ea.fgsm()(ours, x, y)) and not torch.equal(after, before)
    assert (lane() is not None) == kept


def test_calibrate_drops_graphs(again, monkeypatch):
    source = ea.Source(small_net(), dtype=torch.bfloat16)
    x, y = batch(64)
    for _ in range(3):
        ea.fgsm()(source, x, y)
    assert source.replays.graphs
    monkeypatch.setattr("ensadv_fast.sources.source.ENOUGH", 1e9)
    source.calibrate(x, y)
    assert source.dtype == torch.float32
    plain = ea.Source(small_net(), dtype=torch.float32, cuda_graph=False)
    for _ in range(3):
        assert torch.equal(ea.fgsm()(source, x, y), ea.fgsm()(plain, x, y))
    assert len(source.replays.graphs) == 1


class Views(nn.Module):
    """Takes contiguous activations only."""

    def __init__(self):
        super().__init__()
        self.conv, self.head = nn.Conv2d(3, 4, 3, padding=1), nn.Linear(4 * 64, 10)

    def forward(self, x):
        return self.head(self.conv(x).view(len(x), -1))


def test_the_fall_back_from_channels_last(again):
    torch.manual_seed(0)
    net = Views()
    ours, plain = (ea.Source(net, dtype=torch.float32, cuda_graph=g) for g in (True, False))
    x, y = batch()
    for _ in range(3):
        assert torch.equal(ea.fgsm()(ours, x, y), ea.fgsm()(plain, x, y))
    assert not ours.channels_last and len(ours.replays.graphs) == 1


def test_live_sources_follow_their_weights(again):
    net = small_net()
    source = ea.Source(net, live=True, fold=False, channels_last=False, dtype=None, cuda_graph=True)
    x, y = batch()
    optimizer = torch.optim.SGD(net.parameters(), 1.0)
    for _ in range(4):
        net.train()
        x_adv = ea.pgd(steps=2)(source, x, y, key=ea.fresh_key(seed=0))
        assert net.training and torch.equal(x_adv, ea.pgd(steps=2)(net, x, y, key=ea.fresh_key(seed=0)))
        nn.functional.cross_entropy(net(x), y).backward()
        optimizer.step()
    assert source.replays._lane.captures == 1
    assert not ea.Source(net, live=True).replays.allowed
    assert ea.Source(net, live=True, cuda_graph="auto").replays.allowed is False


def test_graphs_of_one_source_do_not_disturb_each_other(again, deterministic, device):
    """They share a memory pool and come in any order."""
    ours, plain = pair(device=device)
    attacks, kept = (ea.pgd(steps=3), ea.step_rnd(), ea.rand_fgsm()), []
    for i, (x, y, key, index) in enumerate(calls(90 if device == "cuda" else 20, device)):
        attack, n = attacks[i % 3], (12, 5, 1)[i // 3 % 3]
        kept.append([attack(s, x[:n], y[:n], key=key, index=index[:n], return_info=True) for s in (ours, plain)])
    for got, wanted in kept:
        same(got, wanted)
    assert len(ours.replays.graphs) == 9


# ---- models that cannot be captured ------------------------------------------------------------------------------

class Odd(nn.Module):
    """A small network that does something besides."""

    def __init__(self, what):
        super().__init__()
        self.net, self.what, self.count = small_net(), what, 0

    def forward(self, x):
        return self.net(x) * self.what(self, x)


def counts(m, x):
    m.count += 1
    return 1


def caches(m, x):
    m.last = x.detach() * 1
    return 1


ODD = {
    "item": (lambda m, x: 1 if x.detach().sum().item() > 0 else 2, "the host waits for a value"),
    "branch": (lambda m, x: 2 if (x > 2).any() else 1, "the host waits for a value"),
    "nonzero": (lambda m, x: 1 + 0 * x.detach().nonzero().sum(), "the host waits for a value"),
    "torch random": (lambda m, x: 1 + 0 * torch.rand(()), "draws random numbers"),
    "python random": (lambda m, x: 1 + 0 * random.random(), "draws random numbers"),
    "numpy random": (lambda m, x: 1 + 0 * np.random.rand(), "draws random numbers"),
    "counter": (counts, "Odd.count changes as the model is called"),
    "cache": (caches, "Odd.last changes as the model is called"),
}


@pytest.mark.parametrize("name", ODD)
def test_what_cannot_be_captured_is_said_once_and_done_without(again, name):
    what, why = ODD[name]
    source = ea.Source(Odd(what), **EXACT)
    x, y = batch()
    ea.fgsm()(source, x, y)
    with pytest.warns(UserWarning, match=f"cannot be captured.*{why}") as caught:
        x_adv = ea.fgsm()(source, x, y)
    assert len(caught) == 1 and caught[0].filename == __file__
    assert torch.equal(x_adv, ea.fgsm()(ea.Source(small_net(), **EXACT), x, y))
    for n in (16, 16, 4, 4):  # without a warning: they are errors here
        ea.fgsm()(source, x[:n], y[:n])
    assert not source.replays.graphs
    strict = ea.Source(Odd(what), cuda_graph=True, **EXACT)
    with pytest.raises(RuntimeError, match=f"cuda_graph=True, but the attack cannot be captured: .*{why}"):
        ea.fgsm()(strict, x, y)


def test_hooks_are_not_forgotten(again):
    net, seen = small_net(), []
    net[0].register_forward_hook(lambda *args: seen.append(1))
    source = ea.Source(net, **EXACT)
    x, y = batch()
    ea.fgsm()(source, x, y)
    with pytest.warns(UserWarning, match="0 has hooks, which a replay would not call"):
        ea.fgsm()(source, x, y)
    ea.fgsm()(source, x, y)
    assert len(seen) == 3


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated")
def test_script_modules_run_eagerly(again):
    source, (x, y) = ea.Source(torch.jit.script(small_net().eval()), **EXACT), batch()
    ea.fgsm()(source, x, y)
    with pytest.warns(UserWarning, match="the model is a script module, whose state cannot be watched"):
        ea.fgsm()(source, x, y)


def test_what_stays_the_same_as_a_model_is_called(again):
    def notes(m, x):
        m.shape, m.name = [tuple(x.shape[1:]), 0.5], "".join(["a", "b"])
        return 1

    ours, plain = (ea.Source(Odd(notes), cuda_graph=g, **EXACT) for g in ("auto", False))
    for x, y, key, _ in calls(3):
        assert torch.equal(ea.pgd(steps=2)(ours, x, y, key=key), ea.pgd(steps=2)(plain, x, y, key=key))
    assert len(ours.replays.graphs) == 1


def test_a_capture_that_fails(again, monkeypatch):
    def fails(self, work):
        try:
            raise RuntimeError("operation not permitted when stream is capturing\nmore about it")
        except RuntimeError:
            raise RuntimeError("operation failed due to a previous error during capture")

    ours, plain = ea.Source(small_net(), **EXACT), pair()[1]
    x, y = batch()
    good = ea.fgsm()(ours, x, y), ea.fgsm()(ours, x, y)  # captured
    monkeypatch.setattr(AgainLane, "capture", fails)
    ea.fgsm()(ours, x[:3], y[:3])
    with pytest.warns(UserWarning, match="runs without: operation not permitted when stream is capturing; its"):
        x_adv = ea.fgsm()(ours, x[:3], y[:3])
    assert torch.equal(x_adv, ea.fgsm()(plain, x[:3], y[:3])) and torch.equal(*good)
    assert not ours.replays.graphs and ours.replays._lane is None
    strict, _ = pair()
    with pytest.raises(RuntimeError, match="cannot be captured: operation not permitted when stream is capturing$"):
        ea.fgsm()(strict, x, y)


def test_errors_about_arguments_stay_what_they_are(again):
    strict, _ = pair()
    x, y = batch()
    with pytest.raises(ValueError, match="rand_fgsm: alpha must be <= eps = 0.01, of which it is a part, got 0.02"):
        ea.rand_fgsm(alpha=0.02)(strict, x, y, eps=0.01)
    with pytest.raises(ValueError, match="logits must have at least 3 classes for loss dlr"):
        ea.fgsm(loss="dlr")(ea.Source(small_net(classes=2), cuda_graph=True, dtype=torch.bfloat16), x, y.clamp(max=1))


@pytest.mark.filterwarnings("ignore:.*torch.jit.script:DeprecationWarning")  # torch.compile's imports
@pytest.mark.parametrize(("kw", "why"), [({"crafting": "train"}, "'train' seeds"), ({"compile": True}, "compiled")])
def test_sources_that_are_never_captured(again, kw, why):
    with pytest.raises(ValueError, match=f"Source: cuda_graph must not be True for this source: .*{why}"):
        ea.Source(small_net(), cuda_graph=True, **kw)
    source = ea.Source(small_net(), **kw)
    assert source.replays.allowed is False
    assert ea.Ensemble([source, small_net()]).replays.allowed is False


def test_the_cpu_has_no_graphs():
    with pytest.raises(ValueError, match="must not be True for this source: its model is on cpu: graphs are CUDA's"):
        ea.Source(small_net(), cuda_graph=True)
    source = ea.Source(small_net())
    for _ in range(3):
        ea.fgsm()(source, *batch())
    assert not source.replays.graphs


def test_ensembles_are_captured_where_all_members_are(again):
    def allowed(*wishes):
        return ea.Ensemble([ea.Source(small_net(), cuda_graph=w) for w in wishes]).replays.allowed

    assert allowed(True, True) is True and allowed("auto", True) == allowed("auto", "auto") == "auto"
    assert allowed(True, False) is allowed("auto", False) is False
    assert ea.Ensemble([ea.Source(small_net()), small_net()]).replays.allowed is False  # a plain module is live


# ---- where calls come from ---------------------------------------------------------------------------------------

def test_calls_that_are_left_alone(again, monkeypatch):
    source = ea.Source(small_net(), cuda_graph=True, dtype=None, fold=False, channels_last=False)
    x, y = batch()
    with torch.autocast("cpu", torch.bfloat16):  # the source computes in the caller's precision
        ea.fgsm()(source, x, y)
    ea.fgsm()(source, torch.cat([x, x], 3)[..., ::2], y)  # not dense
    with monkeypatch.context() as m:
        m.setattr(AgainLane, "is_capturing", staticmethod(lambda: True))
        ea.fgsm()(source, x, y)
    with monkeypatch.context() as m:
        m.setattr(check, "is_readable", lambda t: True)  # ENSADV_CHECK=1
        ea.fgsm()(source, x, y)
    assert not source.replays.graphs
    own = ea.Source(small_net(), cuda_graph=True, **EXACT)
    with torch.autocast("cpu", torch.bfloat16):  # its precision is its own
        ea.fgsm()(own, x, y)
    assert len(own.replays.graphs) == 1


@pytest.mark.parametrize("out", (False, True))
def test_inference_mode(again, out):
    ours, plain = pair()
    for x, y, key, _ in calls(3):
        with torch.inference_mode():
            x, y = x.clone(), y.clone()
            into = torch.empty_like(x) if out else None
            x_adv = ea.pgd(steps=2)(ours, x, y, key=key, out=into)
        assert x_adv.is_inference() == out
        assert torch.equal(x_adv, ea.pgd(steps=2)(plain, x, y, key=key))
    into = torch.zeros_like(torch.empty(x.shape))
    version = into._version
    ea.pgd(steps=2)(ours, x, y, key=key, out=into)
    assert into._version > version  # autograd notices who saved the old value


def test_out_may_be_x(again):
    ours, plain = pair()
    for x, y, key, _ in calls(3):
        wanted = ea.pgd(steps=2)(plain, x, y, key=key)
        assert torch.equal(ea.pgd(steps=2)(ours, x, y, key=key, out=x), wanted) and torch.equal(x, wanted)


def test_copies_and_the_end(again):
    ours, plain = pair()
    x, y = batch()
    wanted = ea.fgsm()(ours, x, y)
    for other in (copy.deepcopy(ours), pickle.loads(pickle.dumps(ours))):
        assert not other.replays.graphs and other.replays.allowed is True
        assert torch.equal(ea.fgsm()(other, x, y), wanted)
    module, replays = weakref.ref(ours.module), weakref.ref(ours.replays)
    ours.replays.graphs[next(iter(ours.replays.graphs))] = None  # AgainLane's, unlike CUDA's, holds the source
    del ours
    assert module() is None and replays() is None  # at once: no cycle keeps a device's memory


@pytest.mark.parametrize("n", (64, 5))
def test_adversarial_batches(again, n):
    def batches(cuda_graph):
        adversary = ea.EnsembleAdversary(small_net(5), [ea.Source(small_net(i), cuda_graph=cuda_graph) for i in (1, 2)],
                                         ea.rand_fgsm(), key=ea.fresh_key(seed=3),
                                         eps_dist=ea.EpsDistribution(16 / 255))
        stream = adversary.stream([batch(n, seed=i) for i in range(9)])
        return [b.x for b in stream], adversary

    got, adversary = batches("auto")
    wanted, _ = batches(False)
    assert all(map(torch.equal, got, wanted)) and sum(len(s.replays.graphs) for s in adversary.static) == 2


@pytest.fixture
def cuda(monkeypatch):
    """What CudaLane asks of torch, each call noted in order; nothing of it is CUDA."""
    calls = MagicMock()
    calls.is_current_stream_capturing.return_value = False
    for name in ("Stream", "Event", "CUDAGraph", "graph", "stream", "current_stream", "graph_pool_handle",
                 "is_current_stream_capturing"):
        monkeypatch.setattr(torch.cuda, name, getattr(calls, name))
    calls.Stream.return_value.device.index = 0
    calls.graph_pool_handle.return_value = (0, 7)
    calls.graph.return_value.__exit__.return_value = calls.stream.return_value.__exit__.return_value = False
    monkeypatch.setattr(torch.cuda, "default_generators", [calls.generator])
    monkeypatch.setattr(torch, "rand", calls.rand)
    for name in ("_cuda_endAllocateToPool", "_cuda_releasePool", "_cuda_clearCublasWorkspaces"):
        monkeypatch.setattr(torch._C, name, getattr(calls, name), raising=False)
    return calls


def test_the_lane_captures_by_torchs_rules(cuda):
    lane = cuda_graphs.CudaLane(torch.device("cuda", 0))
    again, results = lane.capture(lambda: (cuda.work(),))
    assert again is cuda.CUDAGraph.return_value.replay and results == (cuda.work.return_value,)
    cuda.graph.assert_called_once_with(cuda.CUDAGraph.return_value, pool=(0, 7), stream=lane.stream,
                                       capture_error_mode="thread_local")
    order = [c[0] for c in cuda.mock_calls]
    cleared = [i for i, name in enumerate(order) if name == "_cuda_clearCublasWorkspaces"]
    assert cleared[0] < order.index("graph().__enter__") < order.index("work") < order.index("graph().__exit__")
    assert order.index("graph().__exit__") < cleared[1] < order.index("stream().__exit__")
    assert not cuda._cuda_endAllocateToPool.called and not cuda._cuda_releasePool.called
    lane.begin(), lane.end(), lane.wait()
    cuda.current_stream.return_value.wait_event.assert_called_once_with(lane.done)
    lane.done.record.assert_called_once_with(cuda.current_stream.return_value)
    lane.done.synchronize.assert_called_once_with()


@pytest.mark.parametrize("broken", (False, True))
def test_the_lane_cleans_up(cuda, broken):
    """Where CUDA broke the capture off, the allocator and the generator must be told; else they have been."""
    if broken:
        cuda.rand.side_effect = RuntimeError("Offset increment outside graph capture encountered unexpectedly.")
    else:
        cuda._cuda_endAllocateToPool.side_effect = RuntimeError("not currently recording to mempool_id")
    lane = cuda_graphs.CudaLane(torch.device("cuda", 0))
    with pytest.raises(ZeroDivisionError):
        lane.capture(lambda: 1 / 0)
    cuda._cuda_endAllocateToPool.assert_called_once_with(0, (0, 7))
    assert cuda._cuda_releasePool.called == broken and cuda.stream.return_value.__exit__.called
    assert cuda.generator.graphsafe_set_state.called == broken and cuda.generator.set_state.called != broken


# ---- streams -----------------------------------------------------------------------------------------------------

def test_works_side_by_side(monkeypatch):
    """Forks before anything is issued, joins after all of it, also where a work raises; a capture has other streams."""
    log, capturing = [], False

    class Stream:
        def __init__(self, device):
            self.n = len(log)
            log.append("new")

        follow = lambda self: log.append("fork")  # noqa: E731
        issue = lambda self, work: work()  # noqa: E731
        hand_over = lambda self, results: log.append(("join", *results))  # noqa: E731

    monkeypatch.setattr(overlap, "SideStream", Stream)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: capturing)
    sides = overlap.SideStreams(torch.device("cuda"))

    def work(name):
        def run():
            log.append(name)
            return name
        return run

    assert sides.together([work("a"), work("b"), work("c")]) == ["a", "b", "c"]
    assert log == ["new", "new", "fork", "fork", "a", "b", "c", ("join", "b"), ("join", "c")]
    log.clear()
    assert sides.together([work("a")]) == ["a"] and log == ["a"]
    log.clear()
    with pytest.raises(ZeroDivisionError):
        sides.together([work("a"), lambda: 1 / 0, work("c")])
    assert log == ["fork", "fork", "a", ("join",), ("join",)]
    log.clear()
    capturing = True
    sides.together([work("a"), work("b")])
    assert log == ["new", "fork", "a", "b", ("join", "b")]
    assert not any(copy.deepcopy(sides)._streams.values())


# ---- on a GPU ----------------------------------------------------------------------------------------------------

@pytest.mark.gpu
@pytest.mark.parametrize("how", (EXACT, {"dtype": torch.bfloat16}), ids=("exact", "bfloat16"))
@pytest.mark.parametrize("name", ATTACKS)
def test_a_hundred_replays(deterministic, name, how):
    check_replays(ATTACKS[name], *pair(how=how, device="cuda"), 100, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("form", FORMS)
def test_a_hundred_replays_in_every_form(deterministic, form):
    check_replays(ea.pgd(steps=2, rule="random", targeted=True), *pair(device="cuda"), 100, "cuda", **FORMS[form])


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", ("logits", "probs", "loss"))
def test_a_hundred_replays_of_ensembles(deterministic, fuse):
    check_replays(ea.rand_step_ll(), *pair(ensemble=fuse, device="cuda"), 100, "cuda")


@pytest.mark.gpu
@pytest.mark.parametrize("fuse", ("logits", "probs", "loss"))
def test_members_on_side_streams_compute_what_they_do_in_turn(deterministic, fuse):
    _, ensemble = pair(ensemble=fuse, device="cuda")
    for x, y, key, index in calls(50, "cuda", count=64):
        together = ea.pgd(steps=3)(ensemble, x, y, key=key, index=index, return_info=True)
        sides, ensemble._sides = ensemble._sides, None
        same(together, ea.pgd(steps=3)(ensemble, x, y, key=key, index=index, return_info=True))
        ensemble._sides = sides


@pytest.mark.gpu
@pytest.mark.parametrize("ensemble", (False, "logits"))
def test_replays_on_several_streams_do_not_meet(deterministic, ensemble):
    """Captured on one side stream, replayed on two others at once: buffers are shared, so order is all."""
    ours, plain = pair(ensemble=ensemble, device="cuda")
    attack = ea.pgd(steps=5)
    streams, given, got = [torch.cuda.Stream() for _ in range(3)], list(calls(60, "cuda", count=256)), []
    torch.cuda.synchronize()
    for i, (x, y, key, index) in enumerate(given):
        with torch.cuda.stream(streams[i % 2 if i else 2]):
            fresh = x.clone()  # on this stream, and gone when the call is made
            got.append(attack(ours, fresh, y, key=key, index=index))
            del fresh
    torch.cuda.synchronize()
    assert len(ours.replays.graphs) == 1
    for x_adv, (x, y, key, index) in zip(got, given):
        assert torch.equal(x_adv, attack(plain, x, y, key=key, index=index))


@pytest.mark.gpu
@pytest.mark.parametrize("ensemble", (False, "logits"))
@pytest.mark.parametrize("key_device", ("cpu", "cuda"))
def test_a_replay_does_not_wait_on_the_host(ensemble, key_device):
    ours, _ = pair(ensemble=ensemble, device="cuda")
    given = list(calls(5, "cuda"))
    outs = [torch.empty_like(x) for x, *_ in given]

    def call(x, y, key, index, out):
        return ea.pgd(steps=2)(ours, x, y, key=key, index=index, out=out, return_info=True,
                               eps=torch.full_like(y, 0.1, dtype=torch.float32))

    given = [(x, y, key.to(key_device), index) for x, y, key, index in given]
    call(*given[0], outs[0])
    torch.cuda.set_sync_debug_mode("error")
    try:
        for arguments, out in zip(given, outs):
            call(*arguments, out)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert len(ours.replays.graphs) == 1


@pytest.mark.gpu
def test_streams_of_batches_with_graphs(deterministic):
    def batches(cuda_graph):
        model = small_net(5).cuda()
        static = [ea.Source(small_net(i).cuda(), cuda_graph=cuda_graph, **EXACT) for i in (1, 2)]
        adversary = ea.EnsembleAdversary(model, static, ea.rand_fgsm(), key=ea.fresh_key(seed=3),
                                         eps_dist=ea.EpsDistribution(16 / 255))
        optimizer = torch.optim.SGD(model.parameters(), 0.1)
        found = []
        for b in adversary.stream([[t.cuda() for t in batch(64, seed=i)] for i in range(60)]):
            loss = ea.mixed_cross_entropy(model(b.x), b.y, b.is_adv)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(b.x.clone())
        return found, static

    got, static = batches("auto")
    wanted, _ = batches(False)
    assert all(map(torch.equal, got, wanted)) and all(len(s.replays.graphs) == 1 for s in static)


def masked(m, x):
    """Waits for the device inside an operator, where only the capture notices."""
    y = x.detach().clone()
    y[:, :, y[0, 0] > 0.5] = y[:1, :1, :1, 0]
    return 1 + 0 * y.sum()


@pytest.mark.gpu
@pytest.mark.parametrize("what", (masked, ODD["item"][0], ODD["nonzero"][0],
                                  lambda m, x: 1 + 0 * torch.rand_like(x).sum(),
                                  lambda m, x: torch.ones(1).to(x.device)),
                         ids=("masked", "item", "nonzero", "draws", "copies"))
def test_a_capture_that_fails_leaves_the_device_usable(what):
    x, y = (t.cuda() for t in batch())
    source, plain = ea.Source(Odd(what).cuda(), **EXACT), ea.Source(small_net().cuda(), cuda_graph=False, **EXACT)
    before = torch.cuda.current_stream()
    ea.fgsm()(source, x, y)
    with pytest.warns(UserWarning, match="cannot be captured"):
        x_adv = ea.fgsm()(source, x, y)
    assert torch.equal(x_adv, ea.fgsm()(source, x, y)) and torch.cuda.current_stream() == before
    assert (x_adv == ea.fgsm()(plain, x, y)).float().mean() > 0.99
    torch.rand(4, device="cuda"), torch.cuda.get_rng_state()  # the generator does not believe in a capture
    held = torch.empty(1 << 20, device="cuda")
    side = torch.cuda.Stream()
    held.record_stream(side)
    allocated = torch.cuda.memory_allocated()
    del held
    torch.cuda.synchronize()
    torch.empty(1 << 10, device="cuda")  # the allocator looks at its events again
    assert torch.cuda.memory_allocated() < allocated
    ours, plain = pair(device="cuda")
    check_replays(ea.pgd(steps=2), ours, plain, 3, "cuda")


@pytest.mark.gpu
def test_within_somebody_elses_capture(deterministic):
    ours, plain = pair(device="cuda")
    x, y, key, index = next(calls(1, "cuda"))
    call = lambda: ea.pgd(steps=2)(ours, x, y, key=key, index=index)  # noqa: E731
    call()
    captured = torch.cuda.CUDAGraph()
    with torch.cuda.graph(captured):
        x_adv = call()
    for new, _, _, _ in calls(3, "cuda"):
        x.copy_(new)
        captured.replay()
        assert torch.equal(x_adv, ea.pgd(steps=2)(plain, x, y, key=key, index=index))


@pytest.mark.gpu
def test_a_source_takes_its_graphs_memory_with_it():
    x, y = (t.cuda() for t in batch(256, size=32))
    net = small_net(size=32).cuda()
    ea.pgd(steps=2)(ea.Source(net, cuda_graph=True), x, y)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated(), torch.cuda.memory_reserved()
    for _ in range(5):
        source = ea.Source(net, cuda_graph=True)
        ea.pgd(steps=2)(source, x, y)
        assert torch.cuda.memory_reserved() > before[1]
        del source
    torch.cuda.empty_cache()
    assert torch.cuda.memory_allocated() <= before[0] and torch.cuda.memory_reserved() <= before[1]
