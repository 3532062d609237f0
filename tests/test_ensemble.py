"""Ensembles: labels, losses and gradients of the mixture against plain autograd; members keep their own settings."""
import copy

import pytest
import torch
import torch.nn.functional as F
from networks import batch, small_net
from torch import nn

import ensadv_fast as ea
from ensadv_fast.evaluate import transfer_matrix

EXACT = {"dtype": torch.float32, "fold": False, "channels_last": False}
EXACT64 = {**EXACT, "dtype": torch.float64}
FUSES = ("logits", "probs", "loss")
ATTACKS = {
    "fgsm": ea.fgsm(0.1), "rand_fgsm": ea.rand_fgsm(0.1), "step_ll": ea.step_ll(0.1), "step_rnd": ea.step_rnd(0.1),
    "rand_step_ll": ea.rand_step_ll(0.1), "ifgsm": ea.ifgsm(0.1), "iter_ll": ea.iter_ll(0.1),
    "pgd": ea.pgd(0.1, steps=3), "pgd-restarts": ea.pgd(0.1, steps=2, restarts=2),
    "pgd-cw": ea.pgd(0.1, steps=2, loss="cw"),
}


def nets(n: int = 3) -> list[nn.Module]:
    return [small_net(seed).eval() for seed in range(n)]


def mixed(fuse: str, members: list[torch.Tensor], weights) -> torch.Tensor:
    if fuse == "logits":
        return sum(w * z for w, z in zip(weights, members))
    return sum(w * z.softmax(1) for w, z in zip(weights, members)).log()


def plain(models, x, y, fuse: str, weights) -> tuple[torch.Tensor, ...]:
    """(gradient, loss, logits) of the mixture by autograd, in float64."""
    x = x.double().requires_grad_()
    members = [copy.deepcopy(m).double()(x) for m in models]
    logits = mixed(fuse, members, weights)
    if fuse == "loss":
        loss = sum(w * F.cross_entropy(z, y, reduction="none") for w, z in zip(weights, members))
    elif fuse == "probs":
        loss = F.nll_loss(logits, y, reduction="none")
    else:
        loss = F.cross_entropy(logits, y, reduction="none")
    return *torch.autograd.grad(loss.sum(), x), loss.detach(), logits.detach()


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("rescale", [False, True])
@pytest.mark.parametrize("weights", [None, [0.5, 0.0, 2.0]])
@pytest.mark.parametrize("fuse", FUSES)
def test_gradients_are_those_of_the_mixture(fuse, weights, rescale, sequential):
    models, (x, y) = nets(), batch()
    source = ea.Ensemble([ea.Source(m, **EXACT64) for m in models], fuse=fuse, weights=weights, sequential=sequential)
    grad, loss, logits = plain(models, x, y, fuse, weights or [1 / 3] * 3)
    got = source.input_grad(x.double(), y, rescale=rescale)
    true = got.grad / got.scale.view(-1, 1, 1, 1)
    assert torch.allclose(true, grad, rtol=1e-9, atol=1e-12 * grad.abs().max())
    assert torch.allclose(got.loss, loss, rtol=1e-9) and torch.equal(got.labels, y)
    for found in (got.logits, source.logits(x.double())):
        assert torch.allclose(found, logits, rtol=1e-9)
    assert (torch.frexp(got.scale).mantissa == 0.5).all() and bool((got.scale == 1).all()) != rescale


@pytest.mark.parametrize("sequential", [False, True])
@pytest.mark.parametrize("rule", ["true", "predicted", "least_likely", "random"])
@pytest.mark.parametrize("fuse", FUSES)
def test_one_choice_of_labels_from_the_mixture(fuse, rule, sequential):
    models, (x, _) = nets(), batch()
    source = ea.Ensemble([ea.Source(m, **EXACT) for m in models], fuse=fuse, sequential=sequential)
    got = source.input_grad(x, rule=rule, key=ea.fresh_key(seed=3))
    scores = mixed(fuse, [m(x) for m in models], [1 / 3] * 3)
    if rule == "random":
        assert (got.labels != scores.argmax(1)).all() and len(got.labels.unique()) > 1
    else:
        assert torch.equal(got.labels, scores.argmin(1) if rule == "least_likely" else scores.argmax(1))
    grad = plain(models, x, got.labels, fuse, [1 / 3] * 3)[0]
    true = got.grad.double() / got.scale.view(-1, 1, 1, 1)
    assert torch.allclose(true, grad, rtol=1e-3, atol=1e-5 * grad.abs().max())


@pytest.mark.parametrize("loss", ["cw", "dlr"])
@pytest.mark.parametrize("fuse", FUSES)
def test_sequential_is_the_same_for_every_loss(fuse, loss):
    members, (x, y) = [ea.Source(m, **EXACT64) for m in nets()], batch()
    kw = {"loss": loss, "kappa": 0.5, "targeted": True}
    one, other = (ea.Ensemble(members, fuse=fuse, sequential=s).input_grad(x.double(), y, **kw) for s in (False, True))
    assert torch.allclose(one.grad, other.grad, rtol=1e-9, atol=1e-12) and torch.equal(one.loss, other.loss)


class Normalised(nn.Module):
    def __init__(self, net, mean, std):
        super().__init__()
        self.net = net
        self.register_buffer("mean", torch.tensor(mean).view(1, 3, 1, 1))
        self.register_buffer("std", torch.tensor(std).view(1, 3, 1, 1))

    def forward(self, x):
        return self.net((x - self.mean) / self.std)


def test_members_keep_their_dtype_normalisation_and_format():
    (first, second, third), (x, y) = nets(), batch()
    mean, std = (0.5, 0.4, 0.3), (0.2, 0.3, 0.4)
    source = ea.Ensemble([
        ea.Source(first, **EXACT, mean=mean, std=std), ea.Source(second, dtype=torch.bfloat16, channels_last=True),
        ea.Source(third, dtype=torch.float16, mean=std, std=mean)])
    got = source.input_grad(x, y, rescale=False)
    grad, _, logits = plain([Normalised(first, mean, std), second, Normalised(third, std, mean)], x, y, "logits",
                            [1 / 3] * 3)
    assert got.grad.dtype == got.logits.dtype == torch.float32
    assert (got.logits - logits).abs().max() < 0.05
    assert F.cosine_similarity(got.grad.double().flatten(1), grad.flatten(1)).mean() > 0.98


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("fuse", FUSES)
def test_an_ensemble_of_one_is_that_source(fuse, dtype):
    net, (x, y) = small_net(), batch()
    source = ea.Source(net, dtype=dtype)
    for wanted, got in zip(source.input_grad(x, y), ea.Ensemble([source], fuse=fuse).input_grad(x, y)):
        assert torch.equal(wanted, got)
    weighted = ea.Ensemble([source], fuse=fuse, weights=[1.0]).input_grad(x, y)
    assert F.cosine_similarity(weighted.grad.flatten(1), source.input_grad(x, y).grad.flatten(1)).min() > 0.999
    assert torch.equal(ea.Ensemble([source], fuse=fuse).logits(x), source.logits(x))


def test_confident_members_do_not_underflow_in_float16():
    """The mixture's scale lifts what each member alone would lose."""
    torch.manual_seed(0)
    models = [nn.Sequential(nn.Flatten(), nn.Linear(12, 3)) for _ in range(2)]
    with torch.no_grad():
        for m in models:
            m[1].bias.copy_(torch.tensor([25.0, 0.0, 0.0]))
    x, y = torch.rand(8, 3, 2, 2), torch.zeros(8, dtype=torch.int64)
    for fuse in FUSES:
        for sequential in (False, True):
            source = ea.Ensemble([ea.Source(m, dtype=torch.float16) for m in models], fuse=fuse, sequential=sequential)
            grad = plain(models, x, y, fuse, [0.5, 0.5])[0]
            got = source.input_grad(x, y)
            assert (got.grad.sign() == grad.sign()).double().mean() > 0.95
            assert (source.input_grad(x, y, rescale=False).grad == 0).double().mean() > 0.9


@pytest.mark.parametrize("name", ATTACKS)
def test_every_attack_takes_an_ensemble(name):
    models, (x, y) = nets(2), batch()
    key = ea.fresh_key(seed=1)
    source = ea.Ensemble([ea.Source(m, **EXACT64) for m in models])

    class Mean(nn.Module):
        def __init__(self):
            super().__init__()
            self.members = nn.ModuleList(models)

        def forward(self, x):
            return (self.members[0](x) + self.members[1](x)) / 2

    wanted = ATTACKS[name](Mean().double(), x.double(), y, key=key, return_info=True)
    got = ATTACKS[name](source, x.double(), y, key=key, return_info=True)
    assert torch.allclose(got.x_adv, wanted.x_adv, atol=1e-6, rtol=0) and torch.equal(got.labels, wanted.labels)
    assert torch.equal(got.success, wanted.success)
    assert not torch.equal(got.x_adv, x.double())
    with torch.inference_mode():
        assert torch.equal(ATTACKS[name](source, x.double().clone(), y.clone(), key=key), got.x_adv)


@pytest.mark.parametrize("loss", ["ce", "cw"])
@pytest.mark.parametrize("fuse", FUSES)
def test_restarts_are_judged_by_the_loss_that_was_followed(fuse, loss):
    (x, y) = batch()
    source = ea.Ensemble([ea.Source(m, **EXACT) for m in nets()], fuse=fuse, weights=[0.2, 0.5, 1.0])
    got = ea.pgd(0.05, steps=1, restarts=3, loss=loss)(source, x, y, return_info=True)
    passed = source.input_grad(got.x_adv, y, loss=loss)
    assert torch.allclose(got.loss, passed.loss, rtol=1e-5, atol=1e-6)
    assert torch.equal(got.success, passed.logits.argmax(1) != y)


def test_ensembles_in_training_and_evaluation():
    models, (x, y) = nets(), batch()
    source = ea.Ensemble(models[:2])
    adversary = ea.EnsembleAdversary(models[2], [source], ea.fgsm(0.1), live=False, fraction=1.0)
    assert torch.equal(adversary(x, y).x, ea.fgsm(0.1)(source, x, y))
    matrix = transfer_matrix({"c": models[2]}, {"ab": source}, {"fgsm": ea.fgsm(0.1)}, [(x, y, torch.arange(len(x)))])
    assert matrix.wrong["fgsm", "ab", "c"].shape == (16,)


@pytest.mark.parametrize("fuse", FUSES)
def test_dropout_under_one_key(fuse):
    """Two members in train mode: a function of the key, the same where activations are computed again."""
    models, (x, y) = nets(2), batch()
    members = [ea.Source(m, crafting="train", **EXACT64) for m in models]
    generator = torch.get_rng_state()
    one, same, sequential = (
        ea.Ensemble(members, fuse=fuse, sequential=s)
        .input_grad(x.double(), y, key=ea.fresh_key(seed=1), rule=rule).grad
        for s, rule in ((False, "predicted"), (False, "predicted"), (True, "predicted")))
    other = ea.Ensemble(members, fuse=fuse).input_grad(x.double(), y, key=ea.fresh_key(seed=2), rule="predicted").grad
    assert torch.equal(one, same) and torch.allclose(one, sequential, rtol=1e-9) and not torch.equal(one, other)
    assert torch.equal(generator, torch.get_rng_state())
    assert ea.Ensemble([members[0], models[1]]).crafting == "train" and ea.Ensemble(models).crafting == "eval"


def test_modules_are_left_as_they_were_and_autocast_is_theirs():
    models, (x, y) = [m.train() for m in nets(2)], batch()
    source = ea.Ensemble([models[0], ea.Source(models[1], **EXACT)])
    seen = []
    models[0].register_forward_hook(lambda m, args, out: seen.append((m.training, out.dtype)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        got = source.input_grad(x, y)
    assert seen == [(False, torch.bfloat16)] and got.logits.dtype == torch.float32
    assert all(m.training for m in models[0].modules())
    assert all(p.grad is None for m in models for p in m.parameters())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_gradients_are_summed_in_float32_whatever_the_images_are(dtype):
    models, (x, y) = nets(), batch()
    x = x.to(dtype)
    source = ea.Ensemble([ea.Source(m, **EXACT) for m in models])
    got, wide = source.input_grad(x, y), source.input_grad(x.float(), y)
    assert got.grad.dtype == dtype and torch.equal(got.grad, wide.grad.to(dtype))


def test_sequential_holds_one_member_at_a_time():
    """What the forward passes leave for the backward pass, counted where autograd packs it."""
    models, (x, y) = nets(4), batch()

    def peak(source, **kw):
        held, most = set(), 0

        class Kept:
            def __init__(self, t):
                self.t = t
                held.add(id(self))
                nonlocal most
                most = max(most, len(held))

            def __del__(self):
                held.discard(id(self))

        with torch.autograd.graph.saved_tensors_hooks(Kept, lambda kept: kept.t):
            source.input_grad(x, y, **kw)
        return most

    members = [ea.Source(m, **EXACT) for m in models]
    alone = peak(members[0])
    for fuse in FUSES:
        assert peak(ea.Ensemble(members, fuse=fuse)) > 3 * alone
    assert peak(ea.Ensemble(members, fuse="loss", sequential=True)) <= alone


def test_sequential_costs_a_second_forward_except_for_losses_of_given_labels():
    class Counted(nn.Module):
        def __init__(self, net):
            super().__init__()
            self.net, self.passes = net, 0

        def forward(self, x):
            self.passes += 1
            return self.net(x)

    x, y = batch()
    for fuse, rule, passes in (("loss", "true", 1), ("loss", "predicted", 2), ("logits", "true", 2)):
        models = [Counted(m) for m in nets(2)]
        ea.Ensemble(models, fuse=fuse, sequential=True).input_grad(x, y, rule=rule)
        assert [m.passes for m in models] == [passes] * 2


NETS = nets(2)
BAD = [
    (lambda: ea.Ensemble(ea.Source(NETS[0])), TypeError, "Ensemble: sources must be a sequence of sources, got Source"),
    (lambda: ea.Ensemble(NETS[0]), TypeError, "sources must be a sequence of sources, got Sequential"),
    (lambda: ea.Ensemble([]), ValueError, "sources must be at least one, got none"),
    (lambda: ea.Ensemble([1]), TypeError, "sources must be Source or torch.nn.Module each, got int"),
    (lambda: ea.Ensemble([ea.Ensemble(NETS)]), TypeError, "got Ensemble"),
    (lambda: ea.Ensemble([NETS[0], nn.Linear(1, 1, device="meta")]), ValueError, "on one device, got cpu, meta"),
    (lambda: ea.Ensemble(NETS, fuse="mean"), ValueError, "fuse must be one of logits, probs, loss, got 'mean'"),
    (lambda: ea.Ensemble(NETS, weights=[1.0]), ValueError, r"weights must have shape \[K\] = \[2\], got \(1,\)"),
    (lambda: ea.Ensemble(NETS, weights=[1.0, -1.0]), ValueError, "weights must be >= 0"),
    (lambda: ea.Ensemble(NETS, weights=3), TypeError, "weights must be numbers or a tensor, got int"),
    (lambda: ea.Ensemble(NETS, sequential=1), TypeError, "sequential must be a bool, got int"),
    (lambda: ea.Ensemble([NETS[0], small_net(classes=7)]).logits(batch()[0]), ValueError,
     r"same classes, got \[10, 7\]"),
    (lambda: ea.Ensemble(NETS).input_grad(batch()[0], batch()[1] + 9), ValueError, r"y must lie in \[0, 10\)"),
    (lambda: ea.Ensemble(NETS).input_grad(batch()[0], batch()[1].float()), TypeError,
     "labels must be int64, .*got float32"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:40] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()
