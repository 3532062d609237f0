"""ensadv_fast.adversary: which samples are perturbed, on which source, by how much, and the loss for them."""
import itertools
import json

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import ensadv_fast
from ensadv_fast import Source, ops
from ensadv_fast.adversary import Counts, EnsembleAdversary, EpsDistribution, Part, mixed_cross_entropy
from ensadv_fast.adversary.adversary import is_frozen
from ensadv_fast.attacks import fgsm, rand_fgsm, step_ll

M = 10


def net(seed=0, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 5))


@pytest.fixture
def xy():
    g = torch.Generator().manual_seed(1)
    return torch.rand(M, 1, 4, 4, generator=g), torch.randint(0, 5, (M,), generator=g)


def key(seed=0):
    return ops.fresh_key("cpu", seed)


# --------------------------------------------------------------------------------- which samples, replaced or appended


@pytest.mark.parametrize("fraction, k", [(0.5, 5), (0.35, 3), (0.3, 3), (0.7, 7), (1.0, 10), (0.99, 9)])
def test_the_first_k_samples_are_replaced(xy, fraction, k):
    x, y = xy
    model = net()
    batch = EnsembleAdversary(model, attack=fgsm(0.1), fraction=fraction, key=key())(x, y)
    assert batch.x.shape == x.shape and batch.is_adv.dtype == torch.bool
    assert batch.is_adv.tolist() == [True] * k + [False] * (M - k)
    assert torch.equal(batch.x[k:], x[k:]) and torch.equal(batch.y, y) and batch.source == 0
    assert torch.equal(batch.x[:k], fgsm(0.1)(model, x[:k], y[:k]))
    assert (batch.x[:k] != x[:k]).any()
    assert batch.x.data_ptr() != x.data_ptr()


def test_fractions_lose_no_sample_to_rounding():
    adversary = EnsembleAdversary(net(), attack=fgsm(0.1), fraction=0.29, key=key())
    assert 0.29 * 100 < 29  # in float64
    assert adversary(torch.rand(100, 1, 4, 4), torch.zeros(100, dtype=torch.int64)).is_adv.sum() == 29


def test_append_doubles_the_batch(xy):
    x, y = xy
    model = net()
    batch = EnsembleAdversary(model, attack=fgsm(0.1), mix="append", key=key())(x, y)
    assert torch.equal(batch.x[:M], x) and torch.equal(batch.x[M:], fgsm(0.1)(model, x, y))
    assert torch.equal(batch.y, torch.cat([y, y]))
    assert batch.is_adv.tolist() == [False] * M + [True] * M


def test_clean_batches_before_the_start_and_with_fraction_0(xy):
    x, y = xy
    adversary = EnsembleAdversary(net(), attack=fgsm(0.1), start_step=2, key=key())
    for step in range(4):
        batch = adversary(x, y)
        assert bool(batch.is_adv.any()) == (step >= 2) and (batch.source == -1) == (step < 2)
        if step < 2:
            assert torch.equal(batch.x, x) and batch.x.data_ptr() != x.data_ptr()
    for mix in ("replace", "append"):
        batch = EnsembleAdversary(net(), attack=fgsm(0.1), fraction=0, mix=mix, key=key())(x, y)
        assert torch.equal(batch.x, x) and not batch.is_adv.any() and batch.source == -1


def test_soft_labels_and_uint8_images(xy):
    x, y = xy
    model = net()
    soft = F.one_hot(y, 5).float() * 0.9 + 0.02
    hard = EnsembleAdversary(model, attack=fgsm(0.1), mix="append", key=key())(x, y)
    batch = EnsembleAdversary(model, attack=fgsm(0.1), mix="append", key=key())(x, soft)
    assert torch.equal(batch.x, hard.x) and torch.equal(batch.y, torch.cat([soft, soft]))
    bytes_ = (x * 255).byte()
    batch = EnsembleAdversary(model, attack=fgsm(0.1), key=key())(bytes_, y)
    assert batch.x.dtype == torch.float32 and torch.equal(batch.x[5:], bytes_[5:].float() / 255)


def test_channels_last_batches_stay_so():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 5))
    x = torch.rand(M, 3, 4, 4).contiguous(memory_format=torch.channels_last)
    y = torch.zeros(M, dtype=torch.int64)
    for mix in ("replace", "append"):
        batch = EnsembleAdversary(model, attack=fgsm(0.1), mix=mix, key=key())(x, y)
        assert batch.x.is_contiguous(memory_format=torch.channels_last)


# ----------------------------------------------------------------------------------------------------- sources


def test_static_sources_craft_with_their_own_gradients(xy):
    x, y = xy
    live, one, two = net(0), net(1), net(2)
    for position, model in enumerate((one, two, live)):
        adversary = EnsembleAdversary(live, [one, Source(two, dtype=torch.float32, fold=False, channels_last=False)],
                                      fgsm(0.1), select=lambda step, n, p=position: p, key=key())
        batch = adversary(x, y)
        assert batch.source == position
        assert torch.equal(batch.x[:5], fgsm(0.1)(model, x[:5], y[:5]))


def test_a_static_source_is_a_frozen_copy_and_the_live_one_is_not(xy):
    x, y = xy
    live, static = net(0), net(1)
    adversary = EnsembleAdversary(live, [static], fgsm(0.1), select="rotate", key=key())
    first = [adversary(x, y) for _ in range(2)]
    with torch.no_grad():
        for p in (*live.parameters(), *static.parameters()):
            p.mul_(-1)
    second = [adversary(x, y) for _ in range(2)]
    assert [b.source for b in first + second] == [0, 1, 0, 1]
    assert torch.equal(first[0].x, second[0].x) and not torch.equal(first[1].x, second[1].x)


def test_the_live_source_may_have_a_precision_of_its_own(xy):
    x, y = xy
    model = net()
    source = Source(model, live=True, dtype=torch.bfloat16)
    batch = EnsembleAdversary(model, attack=fgsm(0.1), live=source, key=key())(x, y)
    assert torch.equal(batch.x[:5], fgsm(0.1)(source, x[:5], y[:5])) and batch.source == 0


def test_the_draw_is_reproducible_and_uniform(xy):
    def draws(seed, n=3000, **kw):
        adversary = EnsembleAdversary(net(), [net(1), net(2)], fgsm(0.1), key=key(seed), **kw)
        return [adversary.source_at(step) for step in range(n)]

    one = draws(0)
    assert one == draws(0) != draws(1)
    counts = [one.count(i) for i in range(3)]
    assert sum((c - 1000) ** 2 / 1000 for c in counts) < 13.8  # chi squared, 2 degrees of freedom: p = 0.001
    pairs = [sum(a == i and b == j for a, b in itertools.pairwise(one)) for i in range(3) for j in range(3)]
    assert sum((c - 333.2) ** 2 / 333.2 for c in pairs) < 26.1  # no memory of the draw before; 8 degrees: p = 0.001
    weighted = draws(0, select=[0, 3, 1])
    assert weighted.count(0) == 0 and 0.70 < weighted.count(1) / 3000 < 0.80
    assert draws(0, select=[1, 2, 0]).count(2) == 0
    assert draws(0, 7, select="rotate") == [0, 1, 2, 0, 1, 2, 0]
    assert set(draws(0, 100, live=False)) == {0, 1}


def test_the_draw_depends_on_seed_and_step_only(xy):
    """So that ranks with other data, or that have other models, agree without talking."""
    x, y = xy
    one = EnsembleAdversary(net(), [net(1)], fgsm(0.1), key=key(4))
    two = EnsembleAdversary(net(5), [net(6)], rand_fgsm(0.3), fraction=0.2, key=key(4))
    assert [one(x, y).source for _ in range(20)] == [two(x.flip(0)[:7], y[:7]).source for _ in range(20)]


@pytest.mark.parametrize("live", [True, False])
def test_bad_arguments(live):
    model = net()
    for kw, error, message in [
        ({"fraction": 1.5}, ValueError, r"fraction must be in \[0, 1\], got 1.5"),
        ({"fraction": float("nan")}, ValueError, "fraction"),
        ({"mix": "add"}, ValueError, "mix must be one of .*, got 'add'"),
        ({"crafting": "test"}, ValueError, "crafting must be one of .*, got 'test'"),
        ({"start_step": -1}, ValueError, "start_step must be >= 0, got -1"),
        ({"attack": "fgsm"}, TypeError, "attack must be an Attack, got str"),
        ({"eps_dist": "uniform"}, TypeError, "eps_dist must be .*, got str"),
        ({"static": ["mnist:A"]}, TypeError, "static must be .*, got str"),
        ({"select": "best"}, ValueError, "select must be .*, got 'best'"),
        ({"select": [1, -1]}, ValueError, "weights"),
        ({"select": [0.0]}, ValueError, "weights"),
        ({"select": [1, 1, 1]}, ValueError, "weights"),
        ({"key": 3}, TypeError, "key"),
        ({"key": torch.zeros(3, dtype=torch.int64)}, TypeError, "key"),
    ]:
        with pytest.raises(error, match=message):
            EnsembleAdversary(model, **{"live": live, "static": [] if live else [net(1)]} | kw)
    with pytest.raises(TypeError, match="model must be an nn.Module, got Source"):
        EnsembleAdversary(Source(model))
    for wrong in (Source(model), Source(net(2), live=True)):
        with pytest.raises(ValueError, match="not live or not of model"):
            EnsembleAdversary(model, live=wrong)
    with pytest.raises(TypeError, match="live must be .*, got str"):
        EnsembleAdversary(model, live="bfloat16")
    with pytest.raises(ValueError, match="static must hold at least one source where live is False"):
        EnsembleAdversary(model, live=False)


def test_bad_batches(xy):
    x, y = xy
    with pytest.raises(ValueError, match="y must have one label for each of the 10 images, got 9 labels"):
        EnsembleAdversary(net(), attack=fgsm(0.1), key=key())(x, y[:9])
    with pytest.raises(ValueError, match=r"select must return a position in 0\.\.0, got 2"):
        EnsembleAdversary(net(), attack=fgsm(0.1), select=lambda step, n: 2, key=key())(x, y)


# --------------------------------------------------------------------------------------------------------- eps


def test_eps_is_drawn_per_sample(xy):
    x, y = torch.full((M, 1, 4, 4), 0.5), xy[1]
    index = torch.arange(100, 100 + M)
    dist = EpsDistribution(0.2)
    adversary = EnsembleAdversary(net(), attack=fgsm(0.9), fraction=1.0, eps_dist=dist, key=key())
    first, second = adversary(x, y, index), adversary(x, y, index)
    found = (first.x - x).abs().flatten(1).amax(1)
    assert len(found.unique()) == M and found.max() <= 0.2 + 1e-6 and found.max() > 0.05
    assert not torch.equal(found, (second.x - x).abs().flatten(1).amax(1))
    # A sample's eps depends on its index, not on its place in the batch.
    again = EnsembleAdversary(net(), attack=fgsm(0.9), fraction=1.0, eps_dist=dist, key=key())
    flipped = again(x, y.flip(0), index.flip(0))
    assert torch.allclose((flipped.x - x).abs().flatten(1).amax(1), found.flip(0), atol=1e-6)


def test_eps_as_a_number_and_as_a_callable(xy):
    x, y = torch.full((M, 1, 4, 4), 0.5), xy[1]
    for eps_dist, wanted in ((0.25, [0.25] * 5), (lambda n, key: torch.linspace(0.1, 0.3, n), [.1, .15, .2, .25, .3])):
        batch = EnsembleAdversary(net(), attack=fgsm(0.1), eps_dist=eps_dist, key=key())(x, y)
        assert (batch.x - x)[:5].abs().flatten(1).amax(1).tolist() == pytest.approx(wanted, abs=1e-6)


def test_eps_distribution_is_sample_eps():
    k = key(9)
    assert torch.equal(EpsDistribution(0.2, "uniform")(50, k), ops.sample_eps(50, k, dist="uniform", eps_max=0.2))


# -------------------------------------------------------------------------------------------- noise and state


def test_noise_changes_each_step_and_follows_the_seed(xy):
    x, y = xy

    def batches(seed, n=3):
        adversary = EnsembleAdversary(net(), attack=rand_fgsm(0.3, alpha=0.1), fraction=1.0, key=key(seed))
        return [adversary(x, y).x for _ in range(n)]

    one, two, other = batches(0), batches(0), batches(1)
    assert all(torch.equal(a, b) for a, b in zip(one, two, strict=True))
    assert not torch.equal(one[0], one[1]) and not torch.equal(one[0], other[0])


def test_without_a_key_the_packages_own_stream_is_used(xy):
    x, y = xy

    def batch():
        return EnsembleAdversary(net(), attack=rand_fgsm(0.3, alpha=0.1), fraction=1.0)(x, y).x

    ensadv_fast.manual_seed(5)
    one, two = batch(), batch()
    ensadv_fast.manual_seed(5)
    assert torch.equal(batch(), one) and not torch.equal(one, two)


@pytest.mark.parametrize("stop", [0, 1, 4, 1025])
def test_the_state_goes_on_anywhere(xy, stop):
    x, y = xy

    def new(seed):
        return EnsembleAdversary(net(), [net(1)], rand_fgsm(0.3), key=key(seed), eps_dist=EpsDistribution(0.3))

    one, two = new(0), new(77)
    one.step = max(0, stop - 3)
    for _ in range(min(3, stop)):
        one(x, y)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    for _ in range(4):
        a, b = one(x, y), two(x, y)
        assert torch.equal(a.x, b.x) and a.source == b.source


def test_a_state_of_other_sources_is_refused():
    with pytest.raises(ValueError, match="of 2 sources"):
        EnsembleAdversary(net()).load_state_dict(EnsembleAdversary(net(), [net(1)]).state_dict())


def test_torch_generators_are_not_drawn_from(xy):
    x, y = xy
    adversary = EnsembleAdversary(net(), [net(1)], rand_fgsm(0.3), eps_dist=EpsDistribution(0.3), key=key())
    before = torch.get_rng_state()
    for _ in range(4):
        adversary(x, y)
    assert torch.equal(torch.get_rng_state(), before)


def test_stream_crafts_on_the_model_as_it_is_when_asked(xy):
    x, y = xy
    model = net()
    loader = [(x, y), (x, y, torch.arange(M)), (x.flip(0), y.flip(0))]
    by_hand, streamed = (EnsembleAdversary(model, attack=fgsm(0.1), key=key()) for _ in range(2))
    stream = streamed.stream(loader)
    for item in loader:
        assert torch.equal(next(stream).x, by_hand(*item).x)
        with torch.no_grad():
            model[1].weight.neg_()  # a training step
    assert next(stream, None) is None


class Beside:
    """Stands in for the side stream: notes what is begun beside the caller's step, and when it is waited for."""

    def __init__(self, device):
        self.log = Beside.log

    def start(self, work):
        self.log.append("start")
        return work()

    def hand_over(self, results):
        self.log.append(f"hand over {len(results)}")

    def close(self):
        self.log.append("close")


@pytest.fixture
def beside(monkeypatch):
    """Streams as on CUDA, as far as the order of things goes."""
    Beside.log = []
    monkeypatch.setattr("ensadv_fast.adversary.adversary.SideStream", Beside)
    monkeypatch.setattr(EnsembleAdversary, "_overlaps", lambda self, x: any(map(is_frozen, self.sources)))
    return Beside.log


def items_of(xy, n=7):
    x, y = xy
    return [(x.roll(i, 0), y.roll(i), torch.arange(M) + 100 * i)[:2 + i % 2] for i in range(n)]


def new_adversary(model, static, **kw):
    kw = {"attack": rand_fgsm(0.3), "eps_dist": EpsDistribution(0.3), "key": key(), **kw}
    return EnsembleAdversary(model, static, **kw)


def train(model):
    with torch.no_grad():
        model[1].weight.mul_(-0.9)


@pytest.mark.parametrize("kw", [{}, {"select": "rotate"}, {"start_step": 3}, {"mix": "append"}, {"fraction": 0.0},
                                {"live": False}, {"crafting": "train"}], ids=str)
@pytest.mark.parametrize("overlapped", [False, True])
def test_a_stream_gives_what_calls_give(xy, kw, overlapped, request):
    log = request.getfixturevalue("beside") if overlapped else []
    found = []
    for streamed in (False, True):
        model, static = net(0, 0.5), [net(1, 0.5), Source(net(2))]
        adversary = new_adversary(model, static, **kw)
        items = items_of(xy)
        batches = adversary.stream(iter(items)) if streamed else (adversary(*item) for item in items)
        found.append([])
        for batch in batches:
            found[-1].append((batch, adversary.state_dict()))
            train(model)
    plain, streamed = found
    assert len(plain) == len(streamed) == 7
    for (a, state_a), (b, state_b) in zip(plain, streamed, strict=True):
        assert torch.equal(a.x, b.x) and torch.equal(a.y, b.y) and torch.equal(a.is_adv, b.is_adv)
        assert (a.source, state_a) == (b.source, state_b)
    # The first batch cannot be ahead of anything; of the others all that a frozen source crafts.
    ahead = sum(batch.source in (0, 1) for batch, _ in plain[1:])
    assert log == ["start", "hand over 3"] * (ahead if overlapped else 0) + ["close"] * overlapped


def test_a_select_of_ones_own_is_asked_once_a_step(xy, beside):
    asked = []
    adversary = new_adversary(net(), [net(1)], select=lambda step, n: asked.append(step) or step % 2)
    assert [batch.source for batch in adversary.stream(items_of(xy, 5))] == [0, 1, 0, 1, 0]
    assert asked == [0, 1, 2, 3, 4]


def test_an_ensemble_with_a_live_member_is_not_crafted_ahead(xy, beside):
    mixed, frozen = ensadv_fast.Ensemble([net(1), Source(net(2))]), ensadv_fast.Ensemble([Source(net(1))])
    list(new_adversary(net(), [mixed], live=False).stream(items_of(xy, 3)))
    assert "start" not in beside
    list(new_adversary(net(), [frozen], live=False).stream(items_of(xy, 3)))
    assert beside.count("start") == 2


@pytest.mark.parametrize("broken", ["loader", "batch"])
def test_what_fails_ahead_is_raised_in_its_turn(xy, beside, broken):
    def loader():
        yield from items_of(xy, 2)
        if broken == "loader":
            raise RuntimeError("no more")
        yield xy[0], xy[1][:3]

    adversary = new_adversary(net(), [net(1)], live=False)
    stream = adversary.stream(loader())
    assert [next(stream).source for _ in range(2)] == [0, 0]
    with pytest.raises((RuntimeError, ValueError), match="no more|each of the 10 images, got 3 labels"):
        next(stream)
    assert adversary.step == 2 and beside[-1] == "close"


def test_a_stream_that_is_closed_early_waits_and_counts_nothing(xy, beside):
    adversary = new_adversary(net(), [net(1)], live=False)
    stream = adversary.stream(items_of(xy))
    next(stream)
    stream.close()
    assert beside == ["start", "close"] and adversary.step == 1
    by_hand = new_adversary(net(), [net(1)], live=False)
    by_hand.step = 1
    assert torch.equal(adversary(*xy).x, by_hand(*xy).x)


def test_a_state_loaded_meanwhile_counts(xy, beside):
    adversary, other = (new_adversary(net(), [net(1)], live=False) for _ in range(2))
    stream, items = adversary.stream(items_of(xy)), items_of(xy)
    next(stream)
    adversary.load_state_dict({"seed": 5, "step": 9, "sources": 1})
    other.load_state_dict({"seed": 5, "step": 9, "sources": 1})
    assert torch.equal(next(stream).x, other(*items[1]).x)
    assert torch.equal(next(stream).x, other(*items[2]).x)


@pytest.mark.gpu
@pytest.mark.parametrize("crafting", ["eval", "train"])
def test_an_overlapped_stream_gives_what_calls_give_on_cuda(crafting):
    """200 steps with real training steps between, on another stream than the default one too."""
    g = torch.Generator().manual_seed(1)
    items = [(torch.rand(64, 1, 4, 4, generator=g).cuda(), torch.randint(0, 5, (64,), generator=g).cuda(),
              torch.arange(64).cuda()) for _ in range(200)]

    def run(streamed):
        model = net(0).cuda()
        adversary = new_adversary(model, [net(1, 0.5).cuda(), net(2).cuda()], crafting=crafting)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        batches = adversary.stream(items) if streamed else (adversary(*item) for item in items)
        found = []
        for batch in batches:
            loss = mixed_cross_entropy(model(batch.x), batch.y, batch.is_adv)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            found.append(batch.x.clone())
        return found

    plain = run(False)
    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        elsewhere = run(True)
    torch.cuda.current_stream().wait_stream(side)
    for streamed in (run(True), elsewhere):
        assert all(torch.equal(a, b) for a, b in zip(plain, streamed, strict=True))


@pytest.mark.gpu
def test_an_overlapped_stream_does_not_wait_on_the_host():
    x, y = torch.rand(64, 1, 4, 4).cuda(), torch.randint(0, 5, (64,)).cuda()
    adversary = new_adversary(net().cuda(), [net(1).cuda()], live=False)
    stream = adversary.stream([(x, y)] * 10)
    next(stream), next(stream)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(5):
            next(stream)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    stream.close()


# ------------------------------------------------------------------------------------- the caller's model


def snapshot(model):
    return ({n: (m.training, len(m._forward_hooks)) for n, m in model.named_modules()},
            {n: (p.requires_grad, None if p.grad is None else p.grad.clone(), p.detach().clone())
             for n, p in model.named_parameters()},
            {n: b.clone() for n, b in model.named_buffers()})


def same(a, b):
    return str(a) == str(b)


class Boom(nn.Module):
    def forward(self, x):
        raise RuntimeError("boom")


@pytest.mark.parametrize("crafting", ["eval", "train"])
@pytest.mark.parametrize("fail", [False, True])
def test_the_model_is_left_as_it_was(crafting, fail):
    torch.set_printoptions(profile="full")
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(),
                          nn.Linear(12, 5))
    model[1].eval()  # one frozen BatchNorm inside a model in train mode
    model[0].bias.requires_grad_(False)
    x, y = torch.rand(M, 1, 4, 4), torch.zeros(M, dtype=torch.int64)
    F.cross_entropy(model(x), y).backward()
    if fail:
        model.append(Boom())
    before = snapshot(model)
    adversary = EnsembleAdversary(model, attack=step_ll(0.1), crafting=crafting, key=key())
    if fail:
        with pytest.raises(RuntimeError, match="boom"):
            adversary(x, y)
        assert adversary.step == 0
    else:
        adversary(x, y)
    assert same(snapshot(model), before)
    torch.set_printoptions(profile="default")


def test_crafting_train_has_dropout_active(xy):
    x, y = xy
    model = net(dropout=0.5)

    def crafted(crafting, seed):
        return EnsembleAdversary(model, attack=fgsm(0.1), fraction=1.0, crafting=crafting, key=key(seed))(x, y).x

    assert torch.equal(crafted("eval", 0), crafted("eval", 1))
    assert not torch.equal(crafted("train", 0), crafted("train", 1))
    assert torch.equal(crafted("train", 0), crafted("train", 0))


def test_static_modules_follow_crafting_and_sources_keep_their_own(xy):
    static = net(1, dropout=0.5)
    adversary = EnsembleAdversary(net(), [static, Source(static)], crafting="train", key=key())
    assert [s.crafting for s in adversary.static] == ["train", "eval"]


# -------------------------------------------------------------------------------------------------------- loss


def by_hand(logits, y, is_adv, lam, smoothing):
    """Kurakin's formula in float64, one sample after the other."""
    logits = logits.double()
    classes = logits.shape[1]
    soft = y.double() if y.dim() == 2 else F.one_hot(y, classes).double()
    total = weight = 0.0
    for z, t, a in zip(logits, soft, is_adv.tolist(), strict=True):
        t = t * (1 - smoothing) + smoothing / classes
        w = lam if a else 1.0
        total += w * -(t * (z - z.exp().sum().log())).sum().item()
        weight += w
    return total / weight


@pytest.mark.parametrize("lam", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("soft", [False, True])
@pytest.mark.parametrize("k", [0, 4, 9])
def test_mixed_loss_is_kurakins_formula(lam, smoothing, soft, k):
    torch.manual_seed(k)
    logits = torch.randn(9, 6) * 3
    y = torch.randn(9, 6).softmax(1) if soft else torch.randint(0, 6, (9,))
    is_adv = torch.arange(9) < k
    loss = mixed_cross_entropy(logits, y, is_adv, lam, smoothing)
    assert loss.dtype == torch.float32 and loss.dim() == 0
    assert loss.item() == pytest.approx(by_hand(logits, y, is_adv, lam, smoothing), rel=1e-5)


def test_mixed_loss_of_the_doubled_batch_is_half_and_half():
    torch.manual_seed(0)
    logits, y = torch.randn(12, 6), torch.randint(0, 6, (6,)).repeat(2)
    is_adv = torch.arange(12) >= 6
    wanted = 0.5 * (F.cross_entropy(logits[:6], y[:6]) + F.cross_entropy(logits[6:], y[6:]))
    torch.testing.assert_close(mixed_cross_entropy(logits, y, is_adv, lam=1.0), wanted)


def test_mixed_loss_in_half_precision_and_its_gradient():
    logits = torch.randn(8, 6).bfloat16().requires_grad_()
    y, is_adv = torch.randint(0, 6, (8,)), torch.arange(8) < 4
    mixed_cross_entropy(logits, y, is_adv).backward()
    exact = logits.detach().double().softmax(1) - F.one_hot(y, 6)
    weights = torch.where(is_adv, 0.3, 1.0).double()
    torch.testing.assert_close(logits.grad.double(), exact * (weights / weights.sum())[:, None], atol=2e-3, rtol=1e-2)


def test_mixed_loss_without_weight_leaves_the_adversarial_samples_out():
    logits, y = torch.randn(5, 3), torch.tensor([0, 1, 2, 0, 1])
    is_adv = torch.tensor([True, True, False, False, False])
    wanted = torch.nn.functional.cross_entropy(logits[2:], y[2:])
    torch.testing.assert_close(mixed_cross_entropy(logits, y, is_adv, lam=0.0), wanted)
    assert mixed_cross_entropy(logits[:2], y[:2], is_adv[:2], lam=0.0).item() == 0.0


@pytest.mark.parametrize("lam", [0.0, 0.3, 1.0, 2.5])
def test_shares_of_parts_make_their_losses_the_whole_one(lam):
    """Unequal parts, one of adversarial samples alone; without weight all shares are 0, as the loss is."""
    torch.manual_seed(0)
    logits, y, is_adv = torch.randn(9, 4).double(), torch.arange(9) % 4, torch.arange(9) < 5
    for first in (0, 5):  # a mixed batch; without its clean samples
        rows = slice(0, first or 9)
        chosen = [slice(*bounds) for bounds in ((0, 2), (2, 6), (6, 9)) if bounds[0] < rows.stop]
        parts = [(logits[rows][c], y[rows][c], is_adv[rows][c]) for c in chosen]
        counts = [Counts(int((~a).sum()), int(a.sum())) for *_, a in parts]
        whole = Counts.total(counts)
        assert whole == ((4, 5) if not first else (0, 5)) and whole.weight(lam) == whole[0] + lam * whole[1]
        shares = [c.share(whole, lam) for c in counts]
        assert sum(shares) == pytest.approx(1.0 if whole.weight(lam) else 0.0, abs=1e-15)
        summed = sum(s * mixed_cross_entropy(*part, lam) for s, part in zip(shares, parts, strict=True))
        wanted = mixed_cross_entropy(logits[rows], y[rows], is_adv[rows], lam)
        torch.testing.assert_close(summed, wanted, rtol=1e-12, atol=1e-15)


def test_a_part_has_every_nth_of_its_samples():
    part = Part(1, 3, 20)  # 1, 4, 7, 10, 13, 16, 19
    assert part.positions(part.count(20), torch.device("cpu")).tolist() == [1, 4, 7, 10, 13, 16, 19]
    small = part.every(2, 1)  # 4, 10, 16
    assert small.positions(small.count(20), torch.device("cpu")).tolist() == [4, 10, 16] and small.count(10) == 1


def test_mixed_loss_refuses_bad_input():
    logits, y, is_adv = torch.zeros(4, 3), torch.zeros(4, dtype=torch.int64), torch.zeros(4, dtype=torch.bool)
    for bad, message in [((logits[0], y, is_adv), "logits"), ((logits, y[:3], is_adv), "y"),
                         ((logits, y, is_adv[:2]), "is_adv")]:
        with pytest.raises(ValueError, match=message):
            mixed_cross_entropy(*bad)
    for kw in ({"lam": -1.0}, {"lam": float("nan")}, {"label_smoothing": 1.5}):
        with pytest.raises(ValueError, match=next(iter(kw))):
            mixed_cross_entropy(logits, y, is_adv, **kw)


