"""logit_grad's CPU kernel on numpy arrays, without torch: against its definition in float64, on rows of any length
and alignment; samples are independent, bit for bit."""
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from kernels_arrays import INF, NAN, NARROW, WIDE, Output, cast, compute, examples, kernels, ref, values

FLOATS = (*WIDE, *NARROW)
RULES = ("given", "predicted", "least_likely", "random")
LOSSES, FUSES = ("ce", "cw", "dlr"), ("logits", "probs", "loss")
# What else a row of logits may hold: entries that are no number, or none that matters.
SPECIAL_ROWS = np.array([0.0, -0.0, NAN, INF, -INF, 1e-40, -1e-45, 6e-8, 88.0, -103.0])


def softmax(z):
    e = np.exp(z - z.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def log_softmax(z):
    z = z - z.max(-1, keepdims=True)
    return z - np.log(np.exp(z).sum(-1, keepdims=True))


def margin_loss(s, y, kind: str, targeted: bool, kappa: float):
    """(loss, its gradient by the scores s) of one row: cw or dlr."""
    others = np.delete(s, y)
    rival = others.max(initial=-INF)
    ties = (s == rival) & (np.arange(s.size) != y)
    slope = np.where(ties, -1.0 / max(ties.sum(), 1), 0.0)
    slope[y] = 1.0  # of the margin
    margin = s[y] - rival
    if kind == "cw":
        hinge = kappa - margin if targeted else margin + kappa
        loss = max(hinge, 0.0) if targeted else -max(hinge, 0.0)
        return loss, -slope if hinge >= 0 else 0 * slope
    order = np.argsort(-s, kind="stable")
    extent = s[order[0]] - s[order[2]] + 1e-12
    grad = -slope / extent
    grad[order[0]] += margin / extent**2
    grad[order[2]] -= margin / extent**2
    return -margin / extent, grad


def definition(z, y, w, loss: str, fuse: str, targeted: bool, kappa: float):
    """(loss, gradient [members, classes]) of one sample's logits z, in float64."""
    onehot = np.arange(z.shape[1]) == y
    p = softmax(z)
    if fuse == "logits":
        s = (w[:, None] * z).sum(0)
        if loss == "ce":
            return -log_softmax(s)[y], w[:, None] * (softmax(s) - onehot)
        value, g = margin_loss(s, y, loss, targeted, kappa)
        return value, w[:, None] * g
    if fuse == "loss":
        if loss == "ce":
            return -(w * log_softmax(z)[:, y]).sum(), w[:, None] * (p - onehot)
        parts = [margin_loss(row, y, loss, targeted, kappa) for row in z]
        return sum(a * v for a, (v, _) in zip(w, parts)), np.stack([a * g for a, (_, g) in zip(w, parts)])
    mixed = (w[:, None] * p).sum(0)
    if loss == "ce":
        return -np.log(mixed[y]), (w * p[:, y] / mixed[y])[:, None] * (p - onehot)
    value, g = margin_loss(mixed, y, loss, targeted, kappa)
    return value, w[:, None] * p * (g - (p * g).sum(1, keepdims=True))


class Call:
    """Logits [members, batch, classes] with outputs poisoned and misaligned, and the kernel run on them."""

    def __init__(self, rng, dtype, members, batch, classes, lead=0, specials=False):
        v = rng.normal(size=members * batch * classes) * 3
        if specials:
            v = np.where(rng.random(v.size) < 0.3, rng.choice(SPECIAL_ROWS, v.size), v)
        self.dtype, self.kind = dtype, "float64" if dtype == "float64" else "float32"
        self.memory = Output(v.size, dtype, lead)
        self.memory.array[:] = cast(v, dtype)
        self.shape, self.lead = (members, batch, classes), lead
        self.given = rng.integers(0, classes, batch)
        self.weights = rng.uniform(0.2, 1.0, members).astype(self.kind)

    def run(self, ranges=(None,), weights=True, given=True, **options):
        members, batch, classes = self.shape
        outs = {"grad": Output(members * batch * classes, self.dtype, self.lead, 3),
                "labels": Output(batch, "float64", 1, 1),  # any 8-byte numbers: the bits count
                "losses": Output(batch, self.kind, 1, 1), "scales": Output(batch, self.kind, 1, 1)}
        labels = outs["labels"].array.view(np.int64)
        for r in ranges:
            kernels.logit_grad(ref(self.memory.array, self.dtype), ref(outs["grad"].array, self.dtype), labels,
                               ref(outs["losses"].array, self.kind), ref(outs["scales"].array, self.kind),
                               members=members, classes=classes, given=self.given if given else None,
                               weights=ref(self.weights, self.kind) if weights else None,
                               range=r or kernels.Range(), **options)
        results = {name: out.result() for name, out in outs.items()}
        return results | {"labels": results["labels"].view(np.int64)}


@examples
@given(st.data(), st.sampled_from(FLOATS), st.integers(1, 5), st.integers(0, 7), st.integers(0, 9),
       st.sampled_from(LOSSES), st.sampled_from(FUSES), st.booleans(), st.sampled_from([0.0, 0.5]), st.booleans(),
       st.integers(0, 2**32 - 1))
def test_against_the_definition(data, dtype, members, batch, lead, loss, fuse, targeted, kappa, rescale, seed):
    classes = data.draw(st.integers(3 if loss == "dlr" else 2, 300))
    call = Call(np.random.default_rng(seed), dtype, members, batch, classes, lead)
    got = call.run(loss=loss, fuse=fuse, targeted=targeted, kappa=kappa, rescale=rescale)
    z = compute(call.memory.array, dtype, True).reshape(call.shape)
    grads = values(got["grad"], dtype).reshape(call.shape)
    close = {"float32": 2e-5, "float64": 1e-12, "float16": 2e-3, "bfloat16": 1e-2}[dtype]
    close_loss = 1e-12 if dtype == "float64" else 1e-4
    assert np.array_equal(got["labels"], call.given)
    for b in range(batch):
        value, grad = definition(z[:, b], call.given[b], call.weights.astype(np.float64), loss, fuse, targeted, kappa)
        scale = float(got["scales"][b])
        assert np.frexp(scale)[0] == 0.5 and (rescale and loss == "ce" or scale == 1)
        assert abs(got["losses"][b] - value) <= close_loss * max(abs(value), 1)
        assert np.abs(grads[:, b] - scale * grad).max() <= close * max(np.abs(scale * grad).max(), 1e-2)


@examples
@given(st.sampled_from(FLOATS), st.integers(1, 3), st.integers(1, 6), st.integers(1, 300), st.integers(0, 9),
       st.sampled_from(RULES), st.sampled_from(LOSSES), st.sampled_from(FUSES), st.lists(st.integers(0, 6), max_size=3),
       st.booleans(), st.integers(0, 2**32 - 1))
def test_any_split_gives_the_same(dtype, members, batch, classes, lead, rule, loss, fuse, cuts, specials, seed):
    """Ranges of samples cut anywhere are the whole, whatever the logits hold; NaN is where the definition has it."""
    classes = max(classes, 3)
    call = Call(np.random.default_rng(seed), dtype, members, batch, classes, lead, specials)
    options = {"rule": rule, "loss": loss, "fuse": fuse, "weights": bool(seed % 2), "given": rule == "given",
               "key": np.array([5, 6]), "index": np.arange(batch) * 2**33 + seed}
    whole = call.run(**options)
    bounds = sorted({0, batch, *(c for c in cuts if c < batch)})
    pieces = call.run([kernels.Range(*ends) for ends in zip(bounds, bounds[1:])], **options)
    threads = call.run([kernels.Range(threads=4)], **options)
    for name, result in whole.items():
        assert pieces[name].tobytes() == result.tobytes() and threads[name].tobytes() == result.tobytes()
    assert ((whole["labels"] >= 0) & (whole["labels"] < classes)).all()
    if loss == "ce" and (fuse == "loss" or members == 1):
        z = compute(call.memory.array, dtype, True).reshape(call.shape)
        lost = (np.isnan(z).any(2) | np.isposinf(z).any(2) | np.isneginf(z).all(2)).any(0)
        assert np.isnan(whole["losses"][lost]).all()


@pytest.mark.parametrize("dtype", FLOATS)
def test_every_length_to_300(dtype):
    rng = np.random.default_rng(300)
    for classes in range(1, 301):
        call = Call(rng, dtype, 1, 2, classes, classes % 9)
        got, z = call.run(), compute(call.memory.array, dtype, True).reshape(2, classes)
        expected = -log_softmax(z * float(call.weights[0]))[np.arange(2), call.given]
        np.testing.assert_allclose(got["losses"], expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("rule", ["predicted", "least_likely"])
def test_labels_by_rule(dtype, rule):
    """Argmax and argmin, of equal scores the first."""
    call = Call(np.random.default_rng(7), dtype, 1, 50, 37)
    z = compute(call.memory.array, dtype, True).reshape(50, 37)
    got = call.run(rule=rule, weights=False, given=False)["labels"]
    assert np.array_equal(got, (z.argmax(1) if rule == "predicted" else z.argmin(1)))


@pytest.mark.parametrize("members", [2, 3, 5, 9])
@pytest.mark.parametrize("loss", ["cw", "dlr"])
@pytest.mark.parametrize("kind", ["alike", "confident"])
def test_margins_of_mixed_probabilities_lose_no_digits(members, loss, kind):
    """Where probabilities lie close together, or members are sure of one class: differences of rounded probabilities
    would be off by 1e-4 of the loss and of the gradient and more."""
    rng = np.random.default_rng(members)
    for seed in range(30):
        call = Call(rng, "float32", members, 4, [3, 4, 10, 33][seed % 4])
        shape = np.array(call.shape)
        if kind == "alike":
            z = rng.normal(size=shape) * 1e-3
        else:
            z = rng.normal(size=shape)
            z[..., 0] += 9
        call.memory.array[:] = z.ravel().astype(np.float32)
        got = call.run(loss=loss, fuse="probs")
        z = call.memory.array.reshape(shape).astype(np.float64)
        grads = got["grad"].reshape(shape)
        weights = call.weights.astype(np.float64)
        for b in range(4):
            value, grad = definition(z[:, b], call.given[b], weights, loss, "probs", False, 0.0)
            p = softmax(z[:, b])
            # What the differences are sums of, beside what is left of them.
            spread, mixed = (weights * (p.max(1) - p.min(1))).sum(), np.sort((weights[:, None] * p).sum(0))
            lost = max(1.0, spread / (mixed[-1] - mixed[-3])) if loss == "dlr" else 1.0
            size = max(abs(value), 1.0) if loss == "dlr" else spread
            assert abs(got["losses"][b] - value) <= 2e-6 * lost * size
            if loss == "dlr" and abs(abs(value) - 1) < 1e-6:
                continue  # first and third are label and rival: the gradient is nothing but 1e-12's
            assert np.abs(grads[:, b] - grad).max() <= 5e-6 * lost * np.abs(grad).max()
