"""logit_grad: as accurate as plain PyTorch, the same labels, and sane at every edge."""
import itertools
import math

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given
from hypothesis import strategies as st
from networks import batch, small_net

import ensadv_fast as ea
from ensadv_fast import ops
from ensadv_fast.ops.cases import FLOATS
from ensadv_fast.ops.logit_grad import FUSES, reference
from ensadv_fast.ops.losses import LOSSES, RULES, choose_labels, power_of_two_scale, sample_losses

NARROW = (torch.float16, torch.bfloat16)
KEY = ops.fresh_key(seed=5)
names = dict(ids=lambda d: str(d).removeprefix("torch."))


def random_logits(*shape, spread=4.0, dtype=torch.float32, seed=0):
    return (torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * spread).to(dtype)


def plain(logits, labels, loss, **kw):
    """(loss, gradient) by plain PyTorch in the logits' own precision."""
    z = logits.detach().clone().requires_grad_()
    value = sample_losses(z, labels, loss, **kw)
    return value.detach(), torch.autograd.grad(value.sum(), z)[0]


# Accuracy: at most twice plain PyTorch's error against float64, plus one spacing for its last rounding


def not_worse(got, plain, truth, dtype):
    ours, theirs = (got.double() - truth).abs().max(), (plain.double() - truth).abs().max()
    slack = torch.finfo(dtype).eps * truth.abs().max()
    assert ours <= 2 * theirs + slack, f"{ours:.3g} against {theirs:.3g}"


@pytest.mark.parametrize("dtype", FLOATS[:3], **names)
@pytest.mark.parametrize("loss", LOSSES)
@given(classes=st.sampled_from([3, 10, 33, 1000]), spread=st.sampled_from([0.01, 1.0, 8.0, 40.0]),
       seed=st.integers(0, 99))
def test_error_is_at_most_twice_plain_pytorchs(loss, dtype, classes, spread, seed):
    z = random_logits(9, classes, spread=spread, dtype=dtype, seed=seed)
    y = torch.arange(9) * 7 % classes
    got = ops.logit_grad(z, y, loss=loss, rescale=False)
    top = z.topk(min(4, classes)).values
    if loss == "dlr" and (top[:, 1:] == top[:, :-1]).any():
        return  # which of tied logits is the third largest is unspecified
    values, grads = plain(z, y, loss)
    true_values, true_grads = plain(z.double(), y, loss)
    not_worse(got.loss, values, true_values, torch.float32)
    not_worse(got.grad, grads, true_grads, dtype)


@pytest.mark.parametrize("fuse", FUSES)
@given(classes=st.sampled_from([3, 10, 257]), spread=st.sampled_from([0.1, 2.0, 10.0]), seed=st.integers(0, 99))
def test_fused_error_is_at_most_twice_plain_pytorchs(fuse, classes, spread, seed):
    z, w = random_logits(3, 40, classes, spread=spread, seed=seed), torch.tensor([0.5, 0.2, 0.3])
    y = torch.arange(40) * 7 % classes

    def fused(z):
        z, v = z.clone().requires_grad_(), w.to(z).view(-1, 1, 1)
        if fuse == "logits":
            value = F.cross_entropy((v * z).sum(0), y, reduction="none")
        elif fuse == "probs":
            value = F.nll_loss((v * z.softmax(2)).sum(0).log(), y, reduction="none")
        else:
            value = sum(v[k, 0] * F.cross_entropy(z[k], y, reduction="none") for k in range(3))
        return value.detach(), torch.autograd.grad(value.sum(), z)[0]

    got = ops.logit_grad(z, y, fuse=fuse, weights=w, rescale=False)
    (values, grads), (true_values, true_grads) = fused(z), fused(z.double())
    not_worse(got.loss, values, true_values, torch.float32)
    not_worse(got.grad, grads, true_grads, torch.float32)


def test_confident_predictions_keep_the_label_s_half_of_the_gradient():
    """Plain float32 loses p - 1 to cancellation once the label is sure; nothing is lost here."""
    z = torch.tensor([[30.0, 0.0, 1.0], [90.0, 0.0, 0.0]])
    got = ops.logit_grad(z, torch.zeros(2, dtype=torch.int64), rescale=False)
    truth = z.double().softmax(1)[:, 1:].sum(1)
    assert plain(z, torch.zeros(2, dtype=torch.int64), "ce")[1][:, 0].tolist() == [0, 0]
    assert torch.allclose(got.grad[:, 0].double(), -truth, rtol=1e-6)
    assert torch.allclose(got.loss.double(), torch.log1p(truth), rtol=1e-6)


@pytest.mark.parametrize("classes", [1, 2, 5, 31, 32, 33, 1000, 30011])
@pytest.mark.parametrize("dtype", FLOATS, **names)
def test_any_number_of_classes(classes, dtype):
    z, y = random_logits(3, classes, dtype=dtype), torch.tensor([0, classes // 2, classes - 1])
    got, wanted = ops.logit_grad(z, y), reference(z, y)
    assert got.grad.dtype == dtype and got.loss.dtype == got.scale.dtype == wanted.loss.dtype
    limit = 4 * torch.finfo(dtype).eps * wanted.grad.double().abs().max()
    limit += 8 * torch.finfo(torch.float64).eps * wanted.scale.max()  # the reference's own: 1 - p in float64, scaled
    assert (got.grad.double() - wanted.grad.double()).abs().max() <= limit
    assert torch.allclose(got.loss, wanted.loss, rtol=1e-6, atol=1e-7)
    if classes == 1:
        assert got.loss.tolist() == [0] * 3 and got.grad.tolist() == [[0]] * 3


def test_rows_do_not_depend_on_their_batch_or_on_threads():
    z, y = random_logits(3, 97, 1000), torch.arange(97)
    threads, results = torch.get_num_threads(), []
    for count in (1, 2, 3):
        torch.set_num_threads(count)
        results.append(ops.logit_grad(z, y, fuse="probs", rule="random", key=KEY))
    torch.set_num_threads(threads)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other))
    index = torch.tensor([40, 7])
    some = ops.logit_grad(z[:, index], y[index], fuse="probs", rule="random", key=KEY, index=index)
    assert torch.equal(some.grad, results[0].grad[:, index])
    assert all(torch.equal(a, b[index]) for a, b in zip(some[1:], results[0][1:]))


# Labels


specials = st.sampled_from([0.0, -0.0, 1.0, 1.0, -1.0, 3.5, math.nan, math.inf, -math.inf, 1e-40, -1e-40, 6e4, -6e4])


@given(rows=st.lists(st.lists(specials, min_size=7, max_size=7), min_size=1, max_size=6), rule=st.sampled_from(RULES),
       given_labels=st.booleans(), dtype=st.sampled_from(FLOATS), loss=st.sampled_from(LOSSES))
def test_labels_are_torchs_and_nothing_crashes(rows, rule, given_labels, dtype, loss):
    z = torch.tensor(rows, dtype=torch.float64).to(dtype)
    y = torch.arange(len(z)) % 7 if given_labels else None
    got = ops.logit_grad(z, y, rule=rule, key=KEY, loss=loss)
    assert torch.equal(got.labels, choose_labels(z, y, rule, KEY))
    if loss == "ce":
        p = z.double().softmax(1)
        assert torch.equal(got.grad.isnan().any(1), p.isnan().any(1))
        assert torch.equal(got.loss.isnan(), sample_losses(z, got.labels).isnan())
        assert (got.scale[p.isnan().any(1)] == 1).all()


@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("rule", RULES)
def test_labels_of_an_ensemble(fuse, rule):
    z, w = random_logits(4, 50, 20, spread=2.0), torch.tensor([0.1, 0.2, 0.3, 0.4])
    y = torch.arange(50) % 20
    mixed = (w.view(-1, 1, 1) * (z if fuse == "logits" else z.softmax(2))).sum(0)
    for labels in (y, None):
        got = ops.logit_grad(z, labels, fuse=fuse, weights=w.tolist(), rule=rule, key=KEY)
        assert torch.equal(got.labels, choose_labels(mixed, labels, rule, KEY))


def test_random_labels_are_uniform_over_the_other_classes():
    y = torch.arange(20000) % 4
    labels = ops.logit_grad(torch.zeros(20000, 4), y, rule="random", key=KEY).labels
    counts = torch.bincount((labels - y) % 4, minlength=4)
    assert counts[0] == 0 and (counts[1:] - 20000 / 3).abs().max() < 5 * math.sqrt(20000 * 2 / 9)


def test_the_package_s_own_stream_where_no_key_is_given():
    z = torch.zeros(64, 10)
    ops.manual_seed(3)
    one, two = (ops.logit_grad(z, rule="random").labels for _ in range(2))
    ops.manual_seed(3)
    assert torch.equal(one, ops.logit_grad(z, rule="random").labels) and not torch.equal(one, two)


# Margins


@pytest.mark.parametrize("targeted", [False, True])
def test_cw_at_its_kink_and_where_others_tie(targeted):
    z = torch.tensor([[3.0, 1.0, 1.0, 1.0], [1.0, 1.0, 0.0, 1.0], [0.0, 2.0, 2.0, -1.0], [5.0, 4.0, 0.0, 0.0]])
    y = torch.zeros(4, dtype=torch.int64)
    for kappa in (-2.0, -1.0, 0.0, 2.0):
        values, grads = plain(z, y, "cw", targeted=targeted, kappa=kappa)
        got = ops.logit_grad(z, y, loss="cw", targeted=targeted, kappa=kappa)
        assert torch.equal(got.loss, values) and torch.equal(got.grad, grads) and (got.scale == 1).all()


@pytest.mark.parametrize("targeted", [False, True])
@pytest.mark.parametrize("fuse", FUSES)
@pytest.mark.parametrize("loss", LOSSES)
def test_ensemble_losses_against_autograd(loss, fuse, targeted):
    z, y = random_logits(3, 40, 11, dtype=torch.float64, spread=2.0), torch.arange(40) % 11
    kw = dict(loss=loss, fuse=fuse, targeted=targeted, kappa=0.3, rescale=False)
    for weights in (None, [0.2, 0.0, 1.5]):  # used as given
        got, wanted = ops.logit_grad(z, y, weights=weights, **kw), reference(z, y, weights=weights, **kw)
        assert torch.allclose(got.loss, wanted.loss, rtol=1e-11, atol=1e-13)
        assert torch.allclose(got.grad, wanted.grad, rtol=1e-9, atol=1e-12)


def test_one_member_is_the_plain_op():
    z, y = random_logits(6, 10), torch.arange(6)
    alone = ops.logit_grad(z, y)
    for fuse in FUSES:
        one = ops.logit_grad(z[None], y, fuse=fuse)
        assert torch.equal(one.grad[0], alone.grad) and torch.equal(one.scale, alone.scale)
        assert torch.allclose(one.loss, alone.loss, rtol=1e-6)


def test_mixed_probabilities_do_not_underflow():
    """Where every member rules the label out, P is 0 in float32, and its logarithm must not be."""
    z = torch.tensor([[[0.0, -200.0]], [[0.0, -300.0]]])
    got = ops.logit_grad(z, torch.tensor([1]), fuse="probs", rescale=False)
    assert torch.allclose(got.loss, torch.tensor([200 + math.log(2)]))
    assert torch.allclose(got.grad, torch.tensor([[[1.0, -1.0]], [[0.0, 0.0]]]))


# Scale


@pytest.mark.parametrize("fuse", [None, *FUSES])
@pytest.mark.parametrize("dtype", FLOATS, **names)
def test_scale_is_the_power_of_two_that_lifts_the_largest_to_one(dtype, fuse):
    z = random_logits(*([] if fuse is None else [2]), 400, 5, spread=15.0, dtype=dtype)
    y = torch.arange(400) % 5
    got, wanted = ops.logit_grad(z, y, fuse=fuse), reference(z, y, fuse=fuse)
    true = ops.logit_grad(z.double(), y, fuse=fuse, rescale=False)
    assert (torch.frexp(got.scale).mantissa == 0.5).all()
    # One rounding beside a power of two may differ, and the weight of a member that is sure is one: 1/2.
    assert (got.scale != wanted.scale).double().mean() <= 0.02
    assert torch.allclose(got.grad.double() / got.scale.double()[:, None], true.grad, rtol=0.01, atol=1e-7)
    members = got.grad.double() if fuse is None else got.grad.double().sum(0)
    if fuse != "probs":  # there the responsibilities, not the weights, multiply the members' gradients
        off = members.scatter(1, y[:, None], 0.0).amax(1)
        assert ((off >= 0.98) & (off < 2.02))[got.scale < 2.0**100].all()


def test_scale_edges():
    z = torch.tensor([[200.0, 0.0], [100.0, 0.0], [80.0, 0.0], [0.0, 0.0], [math.nan, 0.0], [math.inf, 0.0]])
    got = ops.logit_grad(z, torch.zeros(6, dtype=torch.int64)).scale
    assert got.tolist() == [1, 2.0**100, 2.0**100, 2, 1, 1]
    assert torch.equal(got[2:], power_of_two_scale(z, torch.zeros(6, dtype=torch.int64), "ce")[2:])
    assert (ops.logit_grad(z, rescale=False).scale == 1).all()


def test_float16_does_not_underflow():
    z, y = random_logits(200, 10, spread=12.0, dtype=torch.float16), torch.arange(200) % 10
    y = z.argmax(1)
    assert (ops.logit_grad(z, y, rescale=False).grad == 0).double().mean() > 0.2
    got = ops.logit_grad(z, y)
    assert got.grad.isfinite().all() and (got.grad.abs().amax(1) >= 1).all()
    assert (got.grad.gather(1, y[:, None]) < 0).all()


# Shapes, layouts, labels that could not be looked at


@pytest.mark.parametrize("fuse", [None, *FUSES])
def test_no_rows(fuse):
    z = torch.zeros(*([] if fuse is None else [2]), 0, 4)
    got = ops.logit_grad(z, torch.zeros(0, dtype=torch.int64), fuse=fuse)
    assert got.grad.shape == z.shape and [len(t) for t in got[1:]] == [0, 0, 0] and got.labels.dtype == torch.int64


def test_layouts():
    z, y = random_logits(3, 8, 20), torch.arange(8)
    wanted = ops.logit_grad(z, y, fuse="loss")
    for variant in (z.transpose(1, 2).contiguous().transpose(1, 2), torch.stack([z, z], -1)[..., 0],
                    z.flip(0).contiguous().flip(0)):
        assert all(torch.equal(a, b) for a, b in zip(ops.logit_grad(variant, y, fuse="loss"), wanted))
    expanded = ops.logit_grad(z[:1].expand(3, 8, 20), y, fuse="loss", weights=[1.0, 2.0, 4.0])
    assert torch.equal(expanded.grad[2], ops.logit_grad(z[0], y).grad * 4)
    store = torch.cat([torch.zeros(1), z.flatten()])  # misaligned
    assert torch.equal(ops.logit_grad(store[1:].view(3, 8, 20), y, fuse="loss").grad, wanted.grad)
    assert not ops.logit_grad(z[0].requires_grad_(), y).grad.requires_grad


@pytest.mark.gpu  # on the CPU it is an error; test_kernels_logits.py has the CPU kernel's answer
@pytest.mark.parametrize("loss", LOSSES)
@pytest.mark.parametrize("fuse", [None, *FUSES])
def test_a_label_out_of_range_gives_nan_and_no_gradient(loss, fuse):
    z = random_logits(*([] if fuse is None else [2]), 4, 6).cuda()
    y = torch.tensor([-1, 6, 2**40, 2], device="cuda")
    got = ops.logit_grad(z, y, fuse=fuse, loss=loss, kappa=50.0)
    assert got.loss.isnan().tolist() == [True] * 3 + [False] and torch.equal(got.labels, y)
    assert (got.grad[..., :3, :] == 0).all() and (got.grad[..., 3, :] != 0).any()


@pytest.mark.gpu
@pytest.mark.parametrize("dtype", FLOATS, **names)
@pytest.mark.parametrize("classes", [1, 3, 10, 1000, 1001, 4096, 30000, 70000])
def test_cuda_agrees_with_the_cpu(dtype, classes):
    for fuse, loss, rule in itertools.product((None, *FUSES), LOSSES, RULES):
        if loss == "dlr" and classes < 3 or rule == "random" and classes < 2:
            continue
        z = random_logits(*([] if fuse is None else [4]), 5, classes, dtype=dtype)
        y, kw = torch.arange(5) * 11 % classes, dict(rule=rule, loss=loss, fuse=fuse, kappa=0.5)
        cpu = ops.logit_grad(z, y, key=KEY, **kw)
        gpu = ops.LogitGrad(*(t.cpu() for t in ops.logit_grad(z.cuda(), y.cuda(), key=KEY.cuda(), **kw)))
        assert torch.equal(cpu.labels, gpu.labels)
        assert torch.allclose(cpu.loss, gpu.loss, rtol=1e-5, atol=1e-6)
        same = cpu.scale == gpu.scale
        assert same.double().mean() >= 0.8
        limit = (torch.finfo(dtype).eps + 1e-6) * cpu.grad.double().abs().amax()
        assert ((cpu.grad.double() - gpu.grad.double()).abs() <= limit)[..., same, :].all()


# Fast sources start their backward pass here; exact ones keep plain PyTorch's


def test_which_sources_use_it():
    net = small_net()
    for kw in ({"fold": False}, {"channels_last": False}, {}):
        assert ea.Source(net, dtype=torch.float32, **kw).fused
    for kw in ({"dtype": torch.float32, "fold": False, "channels_last": False}, {"live": True},
               {"dtype": torch.float64}):
        assert not ea.Source(net, **kw).fused


@pytest.mark.parametrize("dtype", (torch.float32, *NARROW), **names)
@pytest.mark.parametrize("loss", LOSSES)
def test_sources_use_it(dtype, loss):
    net, (x, y) = small_net(), batch()
    source = ea.Source(net, dtype=dtype)
    got = source.input_grad(x, y, loss=loss, kappa=1.0)
    leaf = x.clone().requires_grad_()
    logits = source.logits(leaf)
    value = sample_losses(logits, y, loss, kappa=1.0)
    grad, = torch.autograd.grad(value, leaf, got.scale)
    assert torch.equal(got.logits, logits.detach()) and torch.equal(got.labels, y)
    assert torch.allclose(got.loss, value.detach(), rtol=1e-5)
    # The median: where 16-bit logits tie, dlr's third largest is unspecified.
    assert F.cosine_similarity(got.grad.flatten(1), grad.flatten(1)).median() > 0.9999


Z, Y = torch.zeros(2, 5), torch.tensor([0, 4])
Z3 = torch.zeros(3, 2, 5)
BAD = [
    (lambda: ops.logit_grad([1.0]), TypeError, "logit_grad: logits must be a torch.Tensor, got list"),
    (lambda: ops.logit_grad(Z.int()), TypeError, "logits must be float32.*got int32"),
    (lambda: ops.logit_grad(Z[0]), ValueError, r"logits must have shape \[B, C\] or \[K, B, C\], got \(5,\)"),
    (lambda: ops.logit_grad(Z3), ValueError, r"fuse must be one of logits, probs, loss for .*got None"),
    (lambda: ops.logit_grad(Z, fuse="loss"), ValueError, r"None for \[B, C\], got 'loss' for shape \(2, 5\)"),
    (lambda: ops.logit_grad(Z3, fuse="mean"), ValueError, "fuse must be one of logits, probs, loss, got 'mean'"),
    (lambda: ops.logit_grad(Z[:, :0]), ValueError, "at least one member and one class"),
    (lambda: ops.logit_grad(Z, rule="worst"), ValueError, "rule must be one of true, predicted.*got 'worst'"),
    (lambda: ops.logit_grad(Z, loss="mse"), ValueError, "loss must be one of ce, cw, dlr, got 'mse'"),
    (lambda: ops.logit_grad(Z[:, :2], loss="dlr"), ValueError,
     "logits must have at least 3 classes for loss dlr, got 2"),
    (lambda: ops.logit_grad(Z[:, :1], rule="random"), ValueError,
     "logits must have at least 2 classes for rule random, got 1"),
    (lambda: ops.logit_grad(Z, Y.int()), TypeError, "labels must be int64, got int32"),
    (lambda: ops.logit_grad(Z, Y[:1]), ValueError, r"labels must have shape \[B\] = \[2\], got \(1,\)"),
    (lambda: ops.logit_grad(Z, Y + 1), ValueError, r"labels must lie in \[0, 5\), got \[1, 5\]"),
    (lambda: ops.logit_grad(Z, Y - 1), ValueError, r"labels must lie in \[0, 5\), got \[-1, 3\]"),
    (lambda: ops.logit_grad(Z, Y.to("meta")), ValueError, "labels must be on logits' device cpu, got meta"),
    (lambda: ops.logit_grad(Z, kappa="a"), TypeError, "kappa must be a number, got str"),
    (lambda: ops.logit_grad(Z, weights=[1.0]), ValueError, r"weights must be None for logits \[B, C\], got list"),
    (lambda: ops.logit_grad(Z3, fuse="loss", weights=[1, 2]), ValueError, r"weights must have shape \[K\] = \[3\]"),
    (lambda: ops.logit_grad(Z3, fuse="loss", weights=[1, -2, 3]), ValueError, "weights must be >= 0.*got"),
    (lambda: ops.logit_grad(Z3, fuse="loss", weights=[0, 0, 0]), ValueError, "not all 0"),
    (lambda: ops.logit_grad(Z3, fuse="loss", weights=["a", 1, 2]), TypeError, "weights must be a number, got str"),
    (lambda: ops.logit_grad(Z, rule="random", key=KEY[:1]), ValueError, r"key must have shape \[2\]"),
    (lambda: ops.logit_grad(Z, index=Y[:1]), ValueError, r"index must have shape \[N\] = \[2\]"),
]


@pytest.mark.parametrize("call, error, message", BAD, ids=[m[:50] for _, _, m in BAD])
def test_bad_input(call, error, message):
    with pytest.raises(error, match=message):
        call()


def test_the_raw_op_protects_memory():
    raw = torch.ops.ensadv_fast.logit_grad.default
    z, y, v = torch.zeros(1, 2, 5), torch.zeros(2, dtype=torch.int64), torch.zeros(2)

    def call(logits=z, given=None, weights=None, key=None, rule=0, loss=0, grad=z.clone(), labels=y, value=v,
             scale=v.clone()):
        raw(logits, given, weights, key, None, rule, loss, 0, False, 0.0, True, grad, labels, value, scale)

    call()
    for wrong, message in [
        (dict(logits=z[0, 0]), "contiguous .batch, classes. or .members, batch, classes."),
        (dict(logits=z[0]), "grad must have x's"), (dict(given=y + 5), r"given must lie in \[0, 5\), got 5"),
        (dict(given=y - 1), r"given must lie in \[0, 5\), got -1"),
        (dict(weights=torch.tensor([-1.0])), "weights must be >= 0, .*got -1"),
        (dict(weights=torch.zeros(1)), "weights must be >= 0, finite and not all 0, got 0"),
        (dict(grad=torch.zeros(1, 2, 4)), "grad must have x's"),
        (dict(grad=z), "must not overlap"), (dict(grad=z.double()), "grad must be float32, got float64"),
        (dict(given=y[:1]), "given must be"), (dict(labels=y.int()), "labels must be"),
        (dict(value=v[:1]), "loss must be"), (dict(scale=v.double()), "scale must be"),
        (dict(weights=v), "weights must be"), (dict(rule=3), "key must be given"),
        (dict(rule=4), "rule must be 0 to 3, got 4"), (dict(loss=3), "loss_kind must be 0 to 2, got 3"),
        (dict(logits=z[..., :2].contiguous(), grad=torch.zeros(1, 2, 2), loss=2),
         "at least 3 classes for loss dlr, got 2"),
    ]:
        with pytest.raises(RuntimeError, match=message):
            call(**wrong)
