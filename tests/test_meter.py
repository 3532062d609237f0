"""The meter of the training loop: plain means, one host sync and one all-reduce a line, time that adds up."""
import datetime
import json
import os
import time
from collections import Counter

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from ensadv_fast.train import meter
from ensadv_fast.train.meter import Meter

# What makes the host wait for a device: reading values, or shapes that depend on values.
WAITING_CALLS = {"tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__", "__index__", "__array__"}
WAITING_OPS = {"_local_scalar_dense", "nonzero", "masked_select", "is_nonzero", "equal", "unique2"}


class _Calls(TorchFunctionMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_function__(self, func, types, args=(), kwargs=None):
        name = getattr(func, "__name__", "")
        if name in WAITING_CALLS:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class _Ops(TorchDispatchMode):
    def __init__(self):
        super().__init__()
        self.seen = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        indexed = name in ("index", "index_put_") and any(t is not None and t.dtype == torch.bool for t in args[1])
        if name in WAITING_OPS or indexed:
            self.seen[name] += 1
        return func(*args, **(kwargs or {}))


class FakeClock:
    """Time that passes when it is told to; marks not yet passed where `behind` says so."""

    def __init__(self):
        self.time, self.behind, self.forgotten = 0.0, 0.0, 0

    def now(self):
        return self.time

    def seconds(self, start, end):
        return end - start

    def has_passed(self, mark):
        return mark <= self.time - self.behind

    def forget(self, mark):
        self.forgotten += 1


def step(seed: int, device="cpu", n: int = 12, adv: int = 5, soft: bool = False, dtype=torch.float32):
    g = torch.Generator().manual_seed(seed)
    logits = torch.randn(n, 7, generator=g).to(device, dtype)
    y = torch.randint(0, 7, (n,), generator=g).to(device)
    if soft:
        y = 0.8 * F.one_hot(y, 7) + 0.2 / 7
    is_adv = (torch.arange(n) < adv).to(device)
    return F.cross_entropy(logits.float(), y), logits, y, is_adv


def plain(steps) -> dict:
    """The same means by boolean indexing."""
    kept = {"clean": ([], []), "adv": ([], [])}
    for _, logits, y, is_adv in steps:
        for part, mask in (("clean", ~is_adv), ("adv", is_adv)):
            some, labels = logits[mask].float(), y[mask]
            kept[part][0].append(F.cross_entropy(some, labels, reduction="none"))
            kept[part][1].append(some.argmax(1) == (labels if labels.dim() == 1 else labels.argmax(1)))
    found = {"loss": torch.stack([s[0] for s in steps]).mean().item()}
    for part, (losses, right) in kept.items():
        some = torch.cat(losses)
        found[f"{part}_loss"] = some.double().mean().item() if len(some) else None
        found[f"{part}_accuracy"] = torch.cat(right).double().mean().item() if len(some) else None
    return found


def assert_means(line: dict, steps) -> None:
    for key, value in plain(steps).items():
        assert line[key] == (value if value is None else pytest.approx(value, rel=1e-6)), key
    assert line["finite"] is True


@pytest.mark.parametrize("soft", [False, True])
def test_values_are_those_of_the_plain_computation(device, soft):
    m = Meter(device)
    for first in (0, 10, 20):  # every line begins anew
        steps = [step(first + i, device, n=6 + i, adv=2 + i, soft=soft) for i in range(3)]
        for s in steps:
            m.add(*s)
        assert_means(m.line(), steps)


@pytest.mark.parametrize("adv, missing", [(0, "adv"), (12, "clean")])
def test_a_part_without_samples_has_no_means(adv, missing):
    m, steps = Meter("cpu"), [step(0, adv=adv)]
    m.add(*steps[0])
    line = m.line()
    assert_means(line, steps)
    assert line[f"{missing}_loss"] is None and line[f"{missing}_accuracy"] is None and line["finite"]


def test_sixteen_bit_logits_are_measured_in_float32():
    m, steps = Meter("cpu"), [step(0, dtype=torch.bfloat16)]
    with torch.autocast("cpu", dtype=torch.bfloat16):
        m.add(*steps[0])
    assert_means(m.line(), steps)


def test_one_host_sync_a_line_and_none_between(monkeypatch):
    m = Meter("cpu")
    work = [step(i) for i in range(6)]
    with _Calls() as calls, _Ops() as ops:
        for s in work[:3]:
            with m.span("attack"), m.span("data"):
                pass
            m.add(*s)
        assert not calls.seen and not ops.seen
        m.line()
        assert calls.seen == {"tolist": 1} and not ops.seen
        for s in work[3:]:
            m.add(*s)
        assert calls.seen == {"tolist": 1} and not ops.seen
        m.line(lambda t: t)
        assert calls.seen == {"tolist": 2} and not ops.seen
        # That these modes see what they are for:
        assert bool(work[0][0] > 0) and work[0][1][work[0][3]].shape == (5, 7)
        assert calls.seen["__bool__"] == 1 and ops.seen["index"] == 1


@pytest.mark.gpu
def test_nothing_waits_on_the_host_between_lines():
    m = Meter("cuda")
    work = [step(i, "cuda") for i in range(12)]
    for s in work[:4]:  # kernels are loaded, the first line is drawn
        m.add(*s)
    m.line()
    torch.cuda.synchronize()
    for steps in (work[4:8], work[8:]):
        torch.cuda.set_sync_debug_mode("error")
        try:
            for s in steps:
                with m.span("data"):
                    pass
                with m.span("train"):
                    m.add(*s)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        line = m.line()
        assert_means(line, steps)
        assert 0 < line["share_train"] < 1 and line["peak_memory"] > 0


@pytest.mark.gpu
def test_events_tell_the_devices_time():
    """The device sleeps in "attack"; the host is done with it at once."""
    m = Meter("cuda")
    m.add(*step(0, "cuda"))  # kernels are loaded
    m.line()
    for _ in range(3):
        with m.span("attack"):
            torch.cuda._sleep(50_000_000)
        with m.span("train"):
            torch.cuda._sleep(10_000_000)
        m.add(*step(0, "cuda"), images=5)
    line = m.line()
    assert 0.5 < line["share_attack"] < 1 and line["share_attack"] > 2 * line["share_train"] > 0
    assert line["images_per_second"] > 0


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_no_number_is_said_without_another_sync(bad):
    m = Meter("cpu")
    loss, logits, y, is_adv = step(0)
    logits[0] = bad  # an adversarial sample
    m.add(loss * bad, logits, y, is_adv)
    m.add(*step(1))
    with _Calls() as calls, _Ops() as ops:
        line = m.line()
    assert calls.seen == {"tolist": 1} and not ops.seen
    assert line["finite"] is False and line["loss"] is None and line["adv_loss"] is None
    assert line["clean_loss"] > 0 and line["clean_accuracy"] is not None
    assert json.loads(json.dumps(line, allow_nan=False)) == line
    m.add(*step(2))
    assert m.line()["finite"] is True  # the next line is free of it


def test_shares_of_time_add_up():
    clock = FakeClock()
    m = Meter("cpu", clock=clock)
    for _ in range(2):
        for name, seconds in (("data", 1.0), ("attack", 2.0), ("train", 4.0)):
            with m.span(name):
                clock.time += seconds
            clock.time += 0.25  # outside of all
        m.add(*step(0, n=12), images=8)
    line = m.line()
    assert [line[f"share_{name}"] for name in meter.SPANS] == pytest.approx([2 / 15.5, 4 / 15.5, 8 / 15.5])
    assert line["images_per_second"] == pytest.approx(16 / 15.5)
    with m.span("train"):
        clock.time += 3.0
    clock.time += 1.0
    line = m.line()
    assert [line[f"share_{name}"] for name in meter.SPANS] == [0, 0, 0.75]
    assert line["images_per_second"] == 0 and line["clean_loss"] is None and line["peak_memory"] is None


def test_a_span_within_a_span_interrupts_it():
    """As where crafting asks the loader for the next batch; also where that raises."""
    clock = FakeClock()
    m = Meter("cpu", clock=clock)
    with pytest.raises(KeyError):
        with m.span("attack"):
            clock.time += 1
            with m.span("data"):
                clock.time += 2
            clock.time += 4
            with m.span("data"):
                clock.time += 8
                raise KeyError
    clock.time += 1
    line = m.line()
    assert [line[f"share_{name}"] for name in meter.SPANS] == [10 / 16, 5 / 16, 0]


def test_a_line_within_a_span_divides_it():
    clock = FakeClock()
    m = Meter("cpu", clock=clock)
    with m.span("train"):
        clock.time += 1
        assert m.line()["share_train"] == 1
        clock.time += 3
    clock.time += 1
    assert m.line()["share_train"] == 0.75


def test_marks_that_the_device_has_not_passed_are_not_waited_for():
    """And many marks do not pile up where no line is asked for."""
    clock = FakeClock()
    m = Meter("cpu", clock=clock)
    for _ in range(3 * meter._MANY_MARKS):
        with m.span("train"):
            clock.time += 1
    assert clock.forgotten > 5 * meter._MANY_MARKS and len(m._timeline._marks) <= meter._MANY_MARKS
    m.line()
    clock.behind = 1.5
    for name in ("data", "attack", "train"):
        with m.span(name):
            clock.time += 1
    early = m.line()
    clock.behind = 0
    late = m.line()
    assert [early[f"share_{name}"] for name in meter.SPANS] == [1, 0, 0]
    assert [late[f"share_{name}"] for name in meter.SPANS] == [0, 0.5, 0.5]
    assert m.line()["images_per_second"] is None  # no time has passed


def test_real_time_is_measured():
    m = Meter("cpu")
    with m.span("data"):
        time.sleep(0.02)
    m.add(*step(0))
    line = m.line()
    assert 0 < line["share_data"] < 1 and 0 < line["images_per_second"] < 12 / 0.02


def test_wrong_arguments_are_named():
    with pytest.raises(ValueError, match="Meter: world must be >= 1, got 0"):
        Meter("cpu", world=0)
    m = Meter("cpu", world=2)
    with pytest.raises(ValueError, match="Meter.span: name must be one of data, attack, train, got 'eval'"):
        m.span("eval")
    with pytest.raises(ValueError, match="Meter.line: reduce must be the sum over 2 ranks, got None"):
        m.line()
    loss, logits, y, is_adv = step(0)
    for bad in ((logits[:, 0], logits, y, is_adv), (loss, logits[0], y, is_adv), (loss, logits, y[:3], is_adv),
                (loss, logits, y, is_adv[:3])):
        with pytest.raises(ValueError, match="Meter.add: loss, logits, y and is_adv must have .*, got"):
            m.add(*bad)
    assert m.line(lambda t: t)["loss"] is None  # nothing of them was counted


@pytest.mark.parametrize("left, rate, want", [(100, 50.0, 2.0), (0, 5.0, 0.0), (-3, 5.0, 0.0), (7, None, None),
                                              (7, 0.0, None)])
def test_eta(left, rate, want):
    assert meter.eta(left, rate) == want


WORLD = 2


def rank_work(rank: int) -> list[tuple[Tensor, ...]]:
    return [step(10 * rank + i, n=8, adv=3 * rank) for i in range(2)]


def worker(rank: int, folder: str) -> None:
    torch.set_num_threads(1)
    os.environ.update(MASTER_ADDR="127.0.0.1", GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", store=dist.FileStore(f"{folder}/store", WORLD), rank=rank, world_size=WORLD,
                            timeout=datetime.timedelta(seconds=20))
    reduced = []

    def reduce(t):
        reduced.append(t.shape)
        dist.all_reduce(t)
        return t

    clock = FakeClock()
    m = Meter("cpu", world=WORLD, clock=clock)
    for line in range(2):
        for s in rank_work(rank):
            m.add(*s)
        clock.time += 4
        found = m.line(reduce, skipped=3 + rank)
        assert len(reduced) == line + 1
        assert_means(found, [s for r in range(WORLD) for s in rank_work(r)])
        assert found["images_per_second"] == 2 * 2 * 8 / 4
        assert found["skipped"] == 3 + 4
    os._exit(0)  # all asserted: torch's own teardown of a process with gloo threads aborts now and then


def test_ranks_share_one_all_reduce_a_line(tmp_path):
    mp.start_processes(worker, args=(str(tmp_path),), nprocs=WORLD, start_method="spawn")
