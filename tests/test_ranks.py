"""Training on several ranks: at a given global batch the result does not depend on how many there are."""
import os
from dataclasses import replace

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from networks import double_net
from torch import nn

from ensadv_fast import Source
from ensadv_fast.adversary import Counts, EnsembleAdversary, EpsDistribution, Part
from ensadv_fast.attacks import fgsm
from ensadv_fast.system import ranks
from ensadv_fast.train import sync_norm
from ensadv_fast.train.config import Config
from ensadv_fast.train.driver import check_ranks
from ensadv_fast.train.job import Job, Run
from ensadv_fast.train.loop import fit
from ensadv_fast.train.recipes import PRESETS, Recipe

BATCH, STEPS = 18, 6  # five batches of 18 of the 96 samples, and one of 6: neither is four ranks' equal shares
STATIC = Recipe("_x", "fgsm", static=True)
CASES = {
    "plain": (PRESETS["plain"], {}),
    "tramer": (replace(PRESETS["tramer"], select="rotate"), {}),
    "kurakin": (replace(PRESETS["kurakin"], delay=1 / 5, static=True), {"optimizer": "sgd", "lr": 0.05}),
    "weights": (replace(STATIC, attack="pgd", steps=2, fraction=0.3, eps_dist="uniform", select=(0.4, 0.6), lam=2.0),
                {}),
    "callable": (replace(STATIC, attack="rand_fgsm", fraction=0.9, select=lambda step, n: (step // 2) % n), {}),
    "accumulate": (replace(STATIC, fraction=0.7, lam=0.3), {"accumulate": 3}),
    "whole": (replace(STATIC, fraction=0.7, lam=0.3), {}),
    "ema": (replace(PRESETS["fast-at"], crafting="eval"), {"ema": 0.9, "clip": 0.5, "label_smoothing": 0.1}),
}


def config_of(folder, **more):
    return Config(data=f"mnist:{folder}", device="cpu", batch_size=BATCH, monitor=0, log_every=4, **more)


def exact(config, model, crafting="eval", loss="plain"):
    """float64 gradients of static sources too: a float32 one's signs near 0 depend on the batch that it comes in."""
    return Source(model, dtype=None, fold=False, channels_last=False, crafting=crafting)


def trained(name, folder, out, model="networks:double_net", **more):
    from ensadv_fast.train import trainer as module

    recipe, options = CASES[name]
    (out / "models").mkdir(parents=True, exist_ok=True)
    job = Job(name, model, recipe, 5, 1, (f"networks:double_net={out / 'static.pt'}",) if recipe.static else ())
    module.make_source, before = exact, module.make_source
    try:
        fit(Run.open(config_of(folder, **options, **more), out, False), job)
    finally:
        module.make_source = before
    state = torch.load(job.path(out), weights_only=True)
    assert state["step"] == STEPS
    return {k: v for part in ("model", "ema") if state[part] for k, v in state[part].get("model", state[part]).items()}


def normed(folder, out, **more):
    # Not Adam: a bias before a normalisation has gradients of rounding errors alone, which it would blow up.
    return trained("whole", folder, out, "networks:double_norm_net", optimizer="sgd", lr=0.05, **more)


def worker(rank, world, folder, out, store):
    torch.set_num_threads(1)
    os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank), GLOO_SOCKET_IFNAME="lo")
    dist.init_process_group("gloo", store=dist.FileStore(store, world), rank=rank, world_size=world)
    with ranks.opened(torch.device("cpu")) as here:
        results = {name: trained(name, folder, out) for name in CASES}
        if world == 2:
            counted = Counted(sync_norm)
            results["sync"] = normed(folder, out / "sync", sync_bn=True)
            assert counted.calls > 0
            results["local"] = normed(folder, out / "local")
            crafting_is_silent(counted)
        here.barrier()
        checks(here)
        differing(here, folder, out)
        if here.main:
            torch.save(results, out / "results.pt")
        here.barrier()
    dist.destroy_process_group()
    os._exit(0)  # torch's own teardown of a process with gloo threads aborts now and then


class Counted:
    """torch.distributed as a module sees it, its all-reduces counted."""

    def __init__(self, module):
        self.calls, self.module = 0, module.dist
        module.dist = self

    def __getattr__(self, name):
        self.calls += name == "all_reduce"
        return getattr(self.module, name)


def crafting_is_silent(counted):
    model = sync_norm.convert(double_net(norm=True)).train()
    before = counted.calls
    for crafting in ("eval", "train"):
        adversary = EnsembleAdversary(model, attack=fgsm(0.1), crafting=crafting, fraction=1.0)
        adversary(torch.rand(4, 1, 28, 28), torch.arange(4))
    assert counted.calls == before
    model(torch.rand(4, 1, 28, 28))
    assert counted.calls == before + 1


def differing(here, folder, out):
    """Ranks that were started with other options or data find out."""
    run = Run.open(config_of(folder), out, False)
    check_ranks(run)
    with pytest.raises(ValueError, match="--lr differs between processes: rank 1 has 0.5, rank 0 has 0.001"):
        check_ranks(replace(run, config=replace(run.config, lr=0.5 if here.rank == 1 else 0.001)))
    labels = run.dataset.test.labels.clone()
    labels[3] += here.rank == 1
    with pytest.raises(ValueError, match="the data set mnist:.* differs between processes"):
        check_ranks(replace(run, dataset=replace(run.dataset, test=replace(run.dataset.test, labels=labels))))


def checks(here):
    """What the ranks say to each other."""
    world, r = here.world, here.rank
    assert here.sum(torch.tensor([1.0, r])).tolist() == [world, world * (world - 1) / 2]
    assert here.agree(r == world - 1) and not here.agree(False)
    assert here.gather(r * 10) == ([10 * i for i in range(world)] if r == 0 else None)
    assert here.tell(f"from {r}") == "from 0"
    tensors = [torch.full((3,), float(r)), torch.full((2, 2), r), torch.full((), float(r + 1))]
    here.copy(tensors)
    assert tensors[0].sum() == 0 and tensors[1].sum() == 0 and tensors[2] == 1
    here.same("this", 1)
    with pytest.raises(ValueError, match="this differs between processes: rank 1 has 1, rank 0 has 0"):
        here.same("this", r)
    vote = ranks.Vote(here)
    answers = [vote(step, 15 * (r == 1 and step >= 6)) for step in range(1, 17)]
    assert answers == [0] * 11 + [15, 0, 0, 0, 15]  # asked at step 6: sent with step 8, read with step 12
    assert vote.close() == 15


@pytest.fixture(scope="module")
def results(folder, tmp_path_factory):
    """Weights after six steps, by number of ranks and case."""
    found = {}
    for world in (1, 2, 4):
        out = tmp_path_factory.mktemp(f"ranks{world}")
        for part in ("", "sync", "local"):
            (out / part).mkdir(exist_ok=True)
            torch.manual_seed(3)
            torch.save(double_net().state_dict(), out / part / "static.pt")
        if world > 1:
            mp.start_processes(worker, (world, folder, out, str(out / "store")), world, start_method="spawn")
            found[world] = torch.load(out / "results.pt", weights_only=True)
        else:
            found[1] = {name: trained(name, folder, out) for name in CASES}
            found[1]["sync"] = normed(folder, out / "sync")
    return found


def farthest(a, b):
    assert a.keys() == b.keys()
    return max((a[k] - b[k]).abs().max().item() for k in a)


@pytest.mark.parametrize("world", [2, 4])
@pytest.mark.parametrize("name", CASES)
def test_the_result_does_not_depend_on_the_number_of_ranks(results, name, world):
    assert all(v.dtype == torch.float64 for v in results[1][name].values())
    assert farthest(results[1][name], results[world][name]) < 1e-12


def test_micro_batches_are_one_batch(results):
    assert farthest(results[1]["accumulate"], results[1]["whole"]) < 1e-12
    assert farthest(results[1]["whole"], results[1]["plain"]) > 1e-4


def test_sync_bn_is_the_batch_normalisation_of_the_whole_batch(results):
    one, two = results[1]["sync"], results[2]["sync"]
    assert "layers.1.running_var" in one and one["layers.1.num_batches_tracked"] == STEPS
    assert farthest(one, two) < 1e-12
    assert farthest(one, results[2]["local"]) > 1e-4  # each rank by its own batch is something else


def test_sync_bn_refuses_layers_that_do_more():
    class Norm(nn.BatchNorm2d):
        pass

    with pytest.raises(TypeError, match="1 must be a plain batch normalisation for --sync-bn, got a Norm"):
        sync_norm.convert(nn.Sequential(nn.Conv2d(1, 2, 3), Norm(2)))


# ------------------------------------------------------------------------------------- parts of a global batch


@pytest.mark.parametrize("mix", ["replace", "append"])
@pytest.mark.parametrize("world", [2, 3, 5])
@pytest.mark.parametrize("indexed", [True, False])
def test_parts_are_together_the_batch_of_one_process(mix, world, indexed):
    g = torch.Generator().manual_seed(0)
    x, y = torch.rand(13, 1, 28, 28, generator=g), torch.randint(0, 10, (13,), generator=g)
    index = torch.randperm(100, generator=g)[:13] if indexed else None
    net, static = double_net(), exact(None, double_net())
    key = torch.tensor([7, 0])

    def adversary():
        def eps(n, key):
            return EpsDistribution(0.1, "uniform")(n, key)

        return EnsembleAdversary(net, [static], fgsm(0.1), fraction=0.6, mix=mix, key=key,
                                 eps_dist=EpsDistribution(0.2) if indexed else eps)

    whole, parts = adversary(), [adversary() for _ in range(world)]
    for _ in range(4):
        one = whole(x, y, index)
        made = [a(x[r::world], y[r::world], None if index is None else index[r::world], Part(r, world, 13))
                for r, a in enumerate(parts)]
        assert {b.source for b in made} == {one.source}
        clean, adv = one.x[~one.is_adv], one.x[one.is_adv]
        for r, b in enumerate(made):
            assert b.counts == ((~b.is_adv).sum(), b.is_adv.sum()) and b.all_counts == one.counts
            rows = [x_adv for x_adv in adv[r::world]]
            assert all(torch.equal(a, b) for a, b in zip(b.x[b.is_adv], rows, strict=True))
            if mix == "append":
                assert torch.equal(b.x[~b.is_adv], clean[r::world])
        assert Counts.total(b.counts for b in made) == one.counts
        assert sum(b.counts.share(b.all_counts, 0.3) for b in made) == pytest.approx(1.0, abs=1e-15)
        micro = adversary()
        micro.step = whole.step - 1
        small = micro.micro(world, x, y, index)
        assert all(torch.equal(a.x, b.x) and torch.equal(a.is_adv, b.is_adv) for a, b in zip(small, made, strict=True))
        assert micro.step == whole.step


# --------------------------------------------------------------------------------------------- bad environments


@pytest.mark.parametrize("environment, message", [
    ({"RANK": "2", "WORLD_SIZE": "2", "LOCAL_RANK": "0"}, "RANK must be >= 0 and less than WORLD_SIZE=2, got 2"),
    ({"RANK": "0", "WORLD_SIZE": "two", "LOCAL_RANK": "0"},
     "WORLD_SIZE must be the number that torchrun sets, got 'two'"),
    ({"RANK": "0", "WORLD_SIZE": "2"}, "LOCAL_RANK must be the number that torchrun sets, got None")])
def test_an_environment_that_makes_no_sense_is_named(monkeypatch, environment, message):
    monkeypatch.delenv("LOCAL_RANK", raising=False)
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    with pytest.raises(ValueError, match=message), ranks.opened(torch.device("cpu")):
        pass


def test_one_process_is_one_rank():
    with ranks.opened(torch.device("cpu")) as here:
        assert here is ranks.current_ranks() and here.main and here.world == 1
        assert here.agree(True) and not here.agree(False) and here.gather(3) == [3] and here.tell(4) == 4
        t = torch.ones(2)
        assert here.sum(t) is t and t.tolist() == [1, 1]
        vote = ranks.Vote(here)
        assert vote(1, 15) == 15 and not vote(2, 0) and not vote.close()
