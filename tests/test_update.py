"""One optimizer step, by any number of micro-batches, in any precision, and none where it is not finite."""
import copy
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from ensadv_fast import models
from ensadv_fast.adversary import AdversarialBatch, Counts, mixed_cross_entropy
from ensadv_fast.train.config import Config
from ensadv_fast.train.nonfinite import NonFinite
from ensadv_fast.train.step import Update, labels, prepare

CPU = torch.device("cpu")
LAM = 0.3


class Net(nn.Module):
    """A small network in float64, which takes images of any float dtype."""

    def __init__(self, norm=False):
        super().__init__()
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 4, 3), *([nn.BatchNorm2d(4)] if norm else []), nn.Tanh(), nn.Flatten(),
                  nn.Linear(4 * 16, 5)]
        self.layers = nn.Sequential(*layers).double()

    def forward(self, x):
        return self.layers(x.double())


class Two(nn.Module):
    """Logits, and auxiliary ones, as Inception has them."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b = nn.Linear(36, 5), nn.Linear(36, 5)

    def forward(self, x):
        return self.a(x.flatten(1)), self.b(x.flatten(1))


def batch(n=12, adversarial=6, seed=0, device="cpu"):
    g = torch.Generator().manual_seed(seed)
    x, y = torch.rand(n, 1, 6, 6, generator=g), torch.randint(5, (n,), generator=g)
    return made(x.to(device), y.to(device), (torch.arange(n) < adversarial).to(device))


def made(x, y, is_adv):
    """A global batch by itself."""
    counts = Counts(int((~is_adv).sum()), int(is_adv.sum()))
    return AdversarialBatch(x, y, is_adv, 0, counts, counts)


def part(b, chosen):
    return replace(made(b.x[chosen], b.y[chosen], b.is_adv[chosen]), all_counts=b.counts)


def weights(model):
    return {k: v.clone() for k, v in model.state_dict().items()}


def assert_same(one, two, **tolerance):
    assert one.keys() == two.keys()
    for k in one:
        torch.testing.assert_close(one[k], two[k], **(tolerance or {"rtol": 0, "atol": 0}))


# --------------------------------------------------------------------------------------------- the step itself


def test_a_step_is_the_plain_one():
    model = models.build("mnist:C_tanh")
    plain = copy.deepcopy(model)
    update, optimizer = Update(Config(), model, LAM, CPU), torch.optim.Adam(plain.parameters(), lr=0.01)
    for seed in range(3):
        b = made(torch.rand(8, 1, 28, 28), torch.arange(8), torch.arange(8) < 4)
        update.clear()
        loss, logits = update(b, 0.01)
        optimizer.zero_grad()
        out = plain(b.x)
        wanted = mixed_cross_entropy(out, b.y, b.is_adv, LAM)
        wanted.backward()
        optimizer.step()
        assert torch.equal(loss, wanted.detach()) and torch.equal(logits, out.detach())
        assert not loss.requires_grad and not logits.requires_grad
    assert_same(weights(model), weights(plain))


@pytest.mark.parametrize("parts", [2, 3, 5])
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
def test_micro_batches_give_the_big_batches_step(parts, optimizer):
    """Samples a::A in micro-batch a, 12 samples in 5 parts too: of unequal sizes and shares of adversarial ones."""
    config = Config(optimizer=optimizer, clip=0.5, label_smoothing=0.1, accumulate=parts)
    big, small = (Update(config, Net(), LAM, CPU) for _ in range(2))
    for step in range(5):
        b = batch(adversarial=7, seed=step)
        micro = [part(b, slice(a, None, parts)) for a in range(parts)]
        for update, given in ((big, b), (small, micro)):
            update.clear()
            loss, logits = update(given, 0.05)
            y, is_adv = labels(given)
            torch.testing.assert_close(mixed_cross_entropy(logits, y, is_adv, LAM, 0.1), loss, rtol=1e-12, atol=1e-13)
    assert_same(weights(big.model), weights(small.model), rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("ranks", [2, 3])
def test_the_mean_of_scaled_losses_over_unequal_ranks_is_the_global_loss(ranks):
    b = batch(n=13, adversarial=5)
    shards = [part(b, slice(r, None, ranks)) for r in range(ranks)]
    whole = Update(Config(), Net(), LAM, CPU)
    whole.clear()
    loss, _ = whole(b, 0.0)
    wanted = [p.grad for p in whole.model.parameters()]

    def weight(shard):
        k = int(shard.is_adv.sum())
        return len(shard.y) - k + LAM * k

    total, losses, grads = sum(map(weight, shards)), [], []
    for shard in shards:
        update = Update(Config(), Net(), LAM, CPU)
        update.clear()
        losses.append(update(shard, 0.0, scale=ranks * weight(shard) / total)[0])
        grads.append([p.grad for p in update.model.parameters()])
    torch.testing.assert_close(sum(losses) / ranks, loss, rtol=1e-12, atol=1e-13)
    for per_rank, one in zip(zip(*grads, strict=True), wanted, strict=True):
        torch.testing.assert_close(sum(per_rank) / ranks, one, rtol=1e-12, atol=1e-13)


def test_ranks_and_micro_batches_together():
    b = batch(n=16, adversarial=8)
    whole, ranked = (Update(Config(), Net(), LAM, CPU) for _ in range(2))
    whole.clear()
    loss, _ = whole(b, 0.0)
    losses, grads = [], []
    for r in range(2):
        shard = part(b, slice(r, None, 2))
        ranked.clear()
        losses.append(ranked([part(shard, slice(a, None, 4)) for a in range(4)], 0.0, scale=1.0)[0])
        grads.append([p.grad.clone() for p in ranked.model.parameters()])
    torch.testing.assert_close(sum(losses) / 2, loss, rtol=1e-12, atol=1e-13)
    for p, one, two in zip(whole.model.parameters(), *grads, strict=True):
        torch.testing.assert_close((one + two) / 2, p.grad, rtol=1e-12, atol=1e-13)


@pytest.mark.parametrize("parts", [1, 3])
def test_a_batch_without_weight_moves_nothing(parts):
    """lam 0 and no clean sample: the loss is 0, and so is every gradient."""
    update = Update(Config(optimizer="sgd"), Net(), 0.0, CPU)
    b, before = batch(adversarial=12), weights(update.model)
    update.clear()
    loss, logits = update([part(b, slice(a, None, parts)) for a in range(parts)], 0.1)
    assert loss.item() == 0.0 and len(logits) == 12 and update.nonfinite() is None
    assert_same(weights(update.model), before)


def test_auxiliary_logits_have_their_weight_in_the_loss():
    b = batch()
    for aux in (0.0, 0.4):
        update = Update(Config(aux=aux, label_smoothing=0.1), Two(), LAM, CPU)
        with torch.no_grad():
            a, c = Two()(b.x)
            wanted = mixed_cross_entropy(a, b.y, b.is_adv, LAM, 0.1) + aux * mixed_cross_entropy(
                c, b.y, b.is_adv, LAM, 0.1)
        update.clear()
        loss, logits = update(b, 0.0)
        torch.testing.assert_close(loss, wanted)
        assert torch.equal(logits, a) and (update.model.b.weight.grad.norm() > 0) == (aux > 0)


def test_clipping():
    def norm(clip):
        update = Update(Config(clip=clip, optimizer="sgd"), Net(), LAM, CPU)
        update.clear()
        update(batch(), 0.0)
        return torch.stack([p.grad.norm() for p in update.model.parameters()]).norm().item()

    free = norm(0.0)
    assert norm(free / 3) == pytest.approx(free / 3, rel=1e-5) and norm(3 * free) == free


# ------------------------------------------------------------------------------------------------- precisions


def mlp():
    torch.manual_seed(1)
    return nn.Sequential(nn.Flatten(), nn.Linear(36, 32), nn.ReLU(), nn.Linear(32, 5))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_16_bits_train_about_as_float32_does(dtype):
    b = batch(64)
    b.x[torch.arange(64), 0, 0, b.y] += 2.0
    losses = {}
    for name in ("float32", dtype):
        update = Update(Config(dtype=name), mlp(), 1.0, CPU)
        for _ in range(40):
            update.clear()
            loss, logits = update(b, 1e-2)
        losses[name] = loss.item()
        assert logits.dtype == getattr(torch, name)
        assert all(p.dtype == torch.float32 for p in update.model.parameters()) and update.nonfinite() is None
    assert losses[dtype] == pytest.approx(losses["float32"], rel=0.1, abs=0.02) and losses[dtype] < 0.5


def test_loss_scaling_skips_overflows_and_goes_on():
    update = Update(Config(dtype="float16"), mlp(), LAM, CPU)
    update.scaler = torch.amp.GradScaler("cpu", init_scale=2.0**40)  # gradients in float16 overflow
    b, before, moved = batch(), weights(update.model), []
    for _ in range(40):
        update.clear()
        update(b, 1e-3)
        moved.append(any(not torch.equal(v, before[k]) for k, v in update.model.state_dict().items()))
    assert not moved[0] and moved[-1] and update.scaler.get_scale() < 2.0**40
    assert all(v.isfinite().all() for v in update.model.state_dict().values())
    assert update.nonfinite() is None  # overflows at a large scale are part of it
    saved = copy.deepcopy(update.state_dict())
    other = Update(Config(dtype="float16"), copy.deepcopy(update.model), LAM, CPU)
    other.load_state_dict(saved)
    assert other.scaler.get_scale() == update.scaler.get_scale() and other.steps == 40
    while update.scaler.get_scale() > 1:
        assert update.nonfinite() is None
        update.clear()
        update(poisoned(b, 1), 1e-3)
    update.clear()
    update(poisoned(b, 1), 1e-3)
    found = update.nonfinite()  # no smaller scale will help
    assert (found.count, found.step) == (1, update.steps - 1)


def test_channels_last_gives_the_same_step():
    one, two = (Update(Config(channels_last=flag, optimizer="sgd"), Net(norm=True), LAM, CPU)
                for flag in (False, True))
    assert two.model.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    assert prepare(two.config, two.model) is two.model
    for update in (one, two):
        for seed in range(3):
            update.clear()
            update(batch(seed=seed), 0.01)
    assert_same(weights(one.model), weights(two.model), rtol=1e-9, atol=1e-12)


@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # Inductor's own imports
def test_a_compiled_forward_is_the_trainings_alone():
    one, two = (Update(Config(compile=flag), Net(), LAM, CPU) for flag in (False, True))
    for update in (one, two):
        for seed in range(2):
            update.clear()
            update(batch(seed=seed), 0.01)
    assert_same(weights(one.model), weights(two.model), rtol=1e-9, atol=1e-11)
    assert type(two.model) is Net and two._forward is not two.model  # the attack sees the network itself


# ------------------------------------------------------------------------------------------ steps not finite


def poisoned(b, *samples):
    x = b.x.clone()
    x[list(samples)] = torch.nan
    return replace(b, x=x)


@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("nan", ["stop", "skip"])
def test_a_step_that_is_not_finite_changes_nothing(optimizer, nan, device):
    config = Config(optimizer=optimizer, nan=nan, ema=0.9)
    one, two = (Update(config, Net(norm=True).to(device), LAM, torch.device(device)) for _ in range(2))
    for step in range(6):
        index = torch.arange(12, device=device) + 100 * step
        b = batch(seed=step, device=device)
        for update, given in ((one, b), (two, poisoned(b, 3) if step in (2, 4) else b)):
            if update is one and step in (2, 4):
                continue
            update.clear()
            update(given, 0.01, index=index)
    trained = {k: v for k, v in weights(one.model).items() if nan == "skip" or "running" not in k}
    assert_same({k: v for k, v in trained.items() if "tracked" not in k},
                {k: v for k, v in weights(two.model).items() if k in trained and "tracked" not in k},
                **({} if device == "cpu" else {"rtol": 1e-9, "atol": 1e-12}))
    found = two.nonfinite()
    assert (found.count, found.step, found.index) == (2, 2, list(range(200, 212)))
    assert two.nonfinite() is None and one.nonfinite() is None  # each look starts anew
    update = two
    update.clear()
    update(poisoned(b, 0), 0.01)
    assert update.nonfinite() == NonFinite(1, 6, [])  # no indices were given


def test_infinite_gradients_of_a_finite_loss_count_too():
    model = nn.Sequential(nn.Flatten(), nn.Linear(36, 5))
    model[1].weight.register_hook(lambda g: g.index_fill(0, torch.tensor([1]), torch.inf))
    update = Update(Config(), model, LAM, CPU)
    before = weights(model)
    update.clear()
    loss, _ = update(batch(), 0.01)
    assert loss.isfinite() and update.nonfinite().count == 1
    assert_same(before, weights(model))


def test_smaller_batches_and_micro_batches_have_their_indices():
    update = Update(Config(), Net(), LAM, CPU)
    for n, bad in ((12, False), (7, True)):
        b = batch(n)
        update.clear()
        micro = [part(poisoned(b, 2) if bad else b, slice(a, None, 2)) for a in range(2)]
        update(micro, 0.01, index=torch.arange(n) + 50)
    assert update.nonfinite() == NonFinite(1, 1, list(range(50, 57)))


@pytest.mark.gpu
@pytest.mark.parametrize("optimizer", ["adam", "sgd", "rmsprop"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float16"])
def test_a_step_never_waits_for_the_device(optimizer, dtype):
    model = nn.Sequential(nn.Conv2d(1, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 5)).cuda()
    config = Config(optimizer=optimizer, dtype=dtype, nan="skip", ema=0.9, clip=1.0, channels_last=True)
    update, b = Update(config, model, LAM, torch.device("cuda")), batch(device="cuda")
    index = torch.arange(12, device="cuda")
    for _ in range(3):
        update.clear()
        update(b, 0.01, index=index)  # what is made once
    torch.cuda.set_sync_debug_mode("error")
    try:
        for given in (b, poisoned_on_gpu := replace(b, x=b.x / 0), b):
            update.clear()
            update(given, 0.01, index=index)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert dtype == "float16" or update.nonfinite().count == 1
    assert poisoned_on_gpu.x.isinf().any()
    assert all(v.isfinite().all() for v in model.state_dict().values())


# ------------------------------------------------------------------------------------------------- its state


@pytest.mark.parametrize("change", [{"optimizer": "rmsprop", "ema": 0.9}, {"dtype": "float16"}, {"decay_all": False}])
def test_a_resumed_update_goes_on(change):
    config = Config(**change)

    def step(update, seed):
        update.clear()
        update(batch(seed=seed), 1e-3)

    unbroken = Update(config, mlp(), LAM, CPU)
    for seed in range(6):
        step(unbroken, seed)
        if seed == 2:
            saved = copy.deepcopy((unbroken.model.state_dict(), unbroken.state_dict()))
    resumed = Update(config, mlp(), LAM, CPU)
    resumed.model.load_state_dict(saved[0])
    resumed.load_state_dict(saved[1])
    for seed in range(3, 6):
        step(resumed, seed)
    assert_same(weights(unbroken.model), weights(resumed.model))
    if unbroken.ema:
        assert_same(unbroken.ema.average, resumed.ema.average)
        assert not torch.equal(unbroken.ema.average["1.weight"], unbroken.model[1].weight)


def test_float64_logits_have_a_float64_loss():
    logits = torch.randn(6, 4, dtype=torch.float64)
    y, is_adv = torch.arange(6) % 4, torch.arange(6) < 2
    loss = mixed_cross_entropy(logits, y, is_adv, 1.0)
    assert loss.dtype == torch.float64
    torch.testing.assert_close(loss, F.cross_entropy(logits, y), rtol=1e-14, atol=0)
