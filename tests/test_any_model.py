"""Attacks on whatever classifiers users bring: any precision, any output, any callable; and what goes wrong silently
is said."""
import dataclasses
import functools
import warnings
from collections import OrderedDict, namedtuple

import pytest
import torch
import torch.nn.functional as F
from networks import batch, gradient, small_net
from torch import nn

import ensadv_fast as ea
from ensadv_fast.evaluate import transfer_matrix

EPS = 8 / 255
FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
EXACT = dict(dtype=torch.float32, fold=False, channels_last=False)


class Returning(nn.Module):
    """A network whose logits come back in another form."""

    def __init__(self, form, net=None):
        super().__init__()
        self.net, self.form = small_net() if net is None else net, form

    def forward(self, x):
        return self.form(self.net(x))


# ---- precision ---------------------------------------------------------------------------------------------------

def plain_step(net, x, y, eps=EPS):
    """FGSM by PyTorch alone on a model in its own dtype; images and the step in float32 or wider."""
    dtype = next(net.parameters()).dtype
    wide = x if x.dtype == torch.float64 else x.float()
    leaf = wide.clone().requires_grad_()
    logits = net.eval()(leaf.to(dtype))
    loss = F.cross_entropy(logits if dtype == torch.float64 else logits.float(), y, reduction="sum")
    grad, = torch.autograd.grad(loss, leaf)
    return (wide + eps * grad.sign()).clamp(0, 1)


@pytest.mark.parametrize("images", FLOATS, ids=str)
@pytest.mark.parametrize("weights", FLOATS, ids=str)
def test_a_plain_module_is_attacked_in_its_own_precision(weights, images):
    net, (x, y) = small_net().eval().to(weights), batch()
    x = x.to(images)
    x_adv = ea.fgsm(EPS)(net, x, y)
    assert x_adv.dtype == images
    same = (x_adv.double() - plain_step(net, x, y).double()).abs() <= 2 * torch.finfo(images).eps
    # 16-bit gradients underflow without our scale, so that plain PyTorch loses some signs.
    assert same.double().mean() > (0.98 if weights in (torch.float16, torch.bfloat16) else 1 - 1e-9)
    assert next(net.parameters()).dtype == weights
    iterated = ea.pgd(EPS, steps=3)(net, x, y)
    assert iterated.dtype == images and ((iterated.double() - x.double()).abs() <= EPS + 2.0**-24).all()
    assert ea.Source(net, live=True, dtype=None).logits(x).dtype == weights


@pytest.mark.parametrize("weights", FLOATS, ids=str)
def test_a_live_source_follows_a_change_of_precision(weights):
    net, (x, y) = small_net(), batch()
    source = ea.Source(net, live=True, dtype=None)
    source.input_grad(x, y)
    net.to(weights)
    assert source.input_grad(x, y).logits.dtype == weights


def test_the_callers_autocast_decides_where_it_is_active():
    net, (x, y) = small_net(), batch()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert ea.Source(net, live=True, dtype=None).input_grad(x, y).logits.dtype == torch.bfloat16
        assert ea.fgsm(EPS)(net, x.double(), y).dtype == torch.float64


@pytest.mark.parametrize("weights", FLOATS, ids=str)
def test_ensembles_matrices_and_adversaries_take_any_precision(weights):
    net, other, (x, y) = small_net().eval().to(weights), small_net(1).eval(), batch()
    assert ea.fgsm(EPS)(ea.Ensemble([net, other]), x, y).dtype == torch.float32
    for images in (x, x.to(weights)):
        found = transfer_matrix({"t": net, "o": other}, {"t": net}, {"fgsm": ea.fgsm(EPS)}, [(images, y)])
        assert found.error("fgsm", "t", "t") >= found.clean_error("t") if hasattr(found, "clean_error") else True
        made = ea.EnsembleAdversary(net, [other], ea.fgsm(EPS), fraction=1.0, select="rotate")
        for source in (0, 1):
            made.step = source
            out = made(images, y)
            assert out.source == source and out.x.dtype == images.dtype and not torch.equal(out.x, images)


def test_a_models_complex_weights_stay_complex():
    class Spectral(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.complex64))
            self.fc = nn.Linear(192, 10)

        def forward(self, x):
            return self.fc(torch.fft.irfft(torch.fft.rfft(x) * self.weight, n=8).flatten(1))

    net, (x, y) = Spectral(), batch()
    assert torch.equal(ea.fgsm(EPS)(net, x, y), plain_step_of(net, x, y))


def plain_step_of(net, x, y):
    grad, _ = gradient(net, x, y)
    return (x + EPS * grad.sign()).clamp(0, 1)


# ---- outputs -----------------------------------------------------------------------------------------------------

Named = namedtuple("Named", "features logits")


@dataclasses.dataclass
class Dataclass:
    loss: object
    logits: torch.Tensor


class ModelOutput(OrderedDict):
    """As Hugging Face's: a dict whose keys are attributes too, and whose integer keys are positions."""

    def __getattr__(self, name):
        return self[name]


def wide(z):
    return z.repeat(1, 3)


FORMS = {
    "tuple": lambda z: (z,), "list": lambda z: [z, None], "two heads": lambda z: (z, z * 0),
    "dict": lambda z: {"features": wide(z), "logits": z}, "dataclass": lambda z: Dataclass(None, z),
    "named tuple": lambda z: Named(wide(z), z), "hugging face": lambda z: ModelOutput(hidden=wide(z), logits=z),
}


@pytest.mark.parametrize("make", [dict(live=True, dtype=None, fold=False, channels_last=False), EXACT],
                         ids=["live", "frozen"])
@pytest.mark.parametrize("form", FORMS.values(), ids=FORMS)
def test_logits_are_found_in_what_the_model_returns(form, make):
    model, (x, y) = Returning(form), batch()
    wanted = plain_step_of(model.net, x, y)
    assert torch.equal(ea.fgsm(EPS)(ea.Source(model, **make), x, y), wanted)
    assert torch.equal(ea.fgsm(EPS)(model, x, y), wanted)
    assert torch.equal(ea.fgsm(EPS)(ea.Ensemble([ea.Source(model, **make)]), x, y), wanted)


OUTPUTS = {
    "key": ("scores", lambda z: {"scores": z, "logits": z * 0}), "position": (1, lambda z: (wide(z), z)),
    "attribute": ("logits", lambda z: Dataclass(None, z)),
    "callable": (lambda out: out[0][:, 0], lambda z: [z[:, None]]),
}


@pytest.mark.parametrize("output, form", OUTPUTS.values(), ids=OUTPUTS)
def test_output_says_which_output_the_logits_are(output, form):
    model, (x, y) = Returning(form), batch()
    for make in (dict(live=True), EXACT):
        source = ea.Source(model, output=output, **make)
        wanted = plain_step_of(model.net, x, y)
        assert torch.equal(ea.fgsm(EPS)(source, x, y), wanted)
        assert torch.equal(ea.fgsm(EPS)(ea.Ensemble([source, source]), x, y), wanted)


REFUSED = {
    "features first": (lambda z: (wide(z), z), {}, r"output must say which.*\[N, 30\] at 0, \[N, 10\] at 1.*output=1"),
    "dict": (lambda z: {"scores": z}, {}, "named 'logits'; got keys 'scores'"),
    "object": (lambda z: slice(z), {}, "named 'logits'; got slice"),
    "empty": (lambda z: (), {}, "named 'logits'; got tuple"),
    "missing key": (lambda z: {"a": z}, dict(output="b"), "output must be a key .* a dict with keys 'a'; got 'b'"),
    "sequence": (lambda z: z[:, None], {}, r"shape \(16, 1, 10\): output= takes"),
    "one logit": (lambda z: z[:, :1], {}, r"shape \(16, 1\): one logit.*Source\(model, binary=True\)"),
    "flat": (lambda z: z[:, 0], {}, r"shape \(16,\): one logit.*Source\(model, binary=True\)"),
    "binary": (lambda z: z, dict(binary=True), r"one logit \[N\] or \[N, 1\].*binary is True; got shape \(16, 10\)"),
}


@pytest.mark.parametrize("form, options, message", REFUSED.values(), ids=REFUSED)
def test_outputs_without_clear_logits_are_refused(form, options, message):
    model, (x, y) = Returning(form), batch()
    for make in (dict(live=True), EXACT):
        source = ea.Source(model, **options, **make)
        with pytest.raises(ValueError, match=message):
            ea.fgsm(EPS)(source, x, y)
        with pytest.raises(ValueError, match=message):
            ea.Ensemble([source, source]).logits(x)


def test_a_squeezed_batch_of_one_says_how_to_restore_it():
    model, (x, y) = Returning(torch.squeeze), batch()
    with pytest.raises(ValueError, match=r"shape \(10,\): the batch's dimension was squeezed away"):
        ea.fgsm(EPS)(model, x[:1], y[:1])
    source = ea.Source(model, live=True, output=lambda out: out.view(-1, 10))
    assert torch.equal(ea.fgsm(EPS)(source, x[:1], y[:1]), plain_step_of(model.net, x[:1], y[:1]))


# ---- callables ---------------------------------------------------------------------------------------------------

def scaled(net, factor, x):
    return factor * net(x)


CALLABLES = {
    "lambda": lambda net: lambda x: net(x), "bound method": lambda net: net.forward, "call": lambda net: net.__call__,
    "partial": lambda net: functools.partial(scaled, net, 1.0),
    "partial of a module": lambda net: functools.partial(net),
}


@pytest.mark.parametrize("make", CALLABLES.values(), ids=CALLABLES)
def test_callables_are_live_sources(make):
    net, (x, y) = small_net().eval(), batch()
    call, wanted = make(net), plain_step_of(net, x, y)
    assert torch.equal(ea.fgsm(EPS)(call, x, y), wanted)
    assert torch.equal(ea.fgsm(EPS)(ea.Source(call, live=True), x, y), wanted)
    assert torch.equal(ea.fgsm(EPS)(ea.Ensemble([call]), x, y), wanted)
    assert not any(m.training for m in net.modules()) and all(p.grad is None for p in net.parameters())
    with pytest.raises(TypeError, match="model must be a torch.nn.Module.*any callable will do for a live source"):
        ea.Source(call)


def test_the_module_of_a_bound_method_is_in_eval_mode_meanwhile():
    net, (x, y) = small_net().train(), batch()
    assert torch.equal(ea.fgsm(EPS)(net.forward, x, y), plain_step_of(net, x, y))
    assert net.training and net[3].training


def test_a_callables_device_is_that_of_the_images():
    source = ea.Source(lambda x: x.flatten(1)[:, :10] * 2, live=True)
    for images in (batch()[0], batch()[0].to("meta"), batch()[0]):
        assert source.logits(images).device == images.device
    both = ea.Ensemble([source, source], weights=[0.5, 0.5])
    assert both.follows and ea.fgsm(EPS)(both, *batch()).shape == (16, 3, 8, 8)


@pytest.mark.parametrize("wrong", ["net", None, nn.ReLU], ids=str)
def test_what_cannot_be_called_is_no_source(wrong):
    with pytest.raises(TypeError, match="source must be a Source or a torch.nn.Module"):
        ea.fgsm(EPS)(wrong, *batch())


# ---- one logit ---------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("flat", [False, True])
@pytest.mark.parametrize("kind", ["live", "exact", "fast", "ensemble"])
def test_one_logit_is_that_of_class_1_against_0(kind, flat):
    one, (x, y) = small_net(classes=1).eval(), batch(classes=2)
    net = Returning(lambda z: z[:, 0], one) if flat else one
    make = {"live": dict(live=True), "exact": EXACT, "fast": dict(dtype=torch.float32), "ensemble": EXACT}[kind]
    source = ea.Source(net, binary=True, **make)
    source = ea.Ensemble([source, ea.Source(net, binary=True, **make)]) if kind == "ensemble" else source
    leaf = x.clone().requires_grad_()
    z = one(leaf).flatten()
    loss = F.binary_cross_entropy_with_logits(z, y.float(), reduction="none")
    grad, = torch.autograd.grad(loss.sum(), leaf)
    got = source.input_grad(x, y, rescale=False)
    assert torch.allclose(got.loss, loss, atol=1e-5) and torch.allclose(got.grad, grad, atol=1e-6)
    assert torch.equal(got.logits.argmax(1), (z > 0).long())
    result = ea.pgd(0.05, steps=5)(source, x, y, return_info=True)
    assert (((one(result.x_adv)[:, 0] > 0) != y).double().mean() >= ((z > 0) != y).double().mean())
    assert not torch.equal(result.x_adv, x)


# ---- probabilities -----------------------------------------------------------------------------------------------

def test_probabilities_are_found_out_once_and_can_be_declared():
    model, (x, y) = Returning(lambda z: (5 * z).softmax(1)), batch()
    source = ea.Source(model, live=True, dtype=None)
    with pytest.warns(UserWarning, match=r'returns probabilities.*weaken.*output="probabilities"'):
        ea.fgsm(EPS)(source, x, y)
    with pytest.warns(UserWarning, match="returns probabilities"):
        ea.fgsm(EPS)(model, x, y)
    ea.fgsm(EPS)(source, x, y)  # warnings are errors here
    ea.fgsm(EPS)(model, x, y)
    logits = Returning(lambda z: 5 * z, model.net)
    for make in (dict(live=True), EXACT, dict(dtype=torch.float32)):
        declared = ea.Source(model, output="probabilities", **make)
        got = ea.fgsm(EPS)(declared, x, y)
        assert (got - plain_step_of(logits, x, y)).abs().gt(1e-6).double().mean() < 1e-3
    with pytest.warns(UserWarning, match="returns probabilities"):
        ea.fgsm(EPS)(ea.Ensemble([ea.Source(model, **EXACT), ea.Source(logits, **EXACT)]), x, y)


def test_a_probability_of_class_1():
    one, (x, y) = small_net(classes=1).eval(), batch(classes=2)
    source = ea.Source(Returning(torch.sigmoid, one), live=True, binary=True, output="probabilities")
    wanted = ea.fgsm(EPS)(ea.Source(one, live=True, binary=True), x, y)
    assert (ea.fgsm(EPS)(source, x, y) - wanted).abs().gt(1e-6).double().mean() < 1e-3


# ---- losses of the caller's own ------------------------------------------------------------------------------------

def bce(logits, y):
    return F.binary_cross_entropy_with_logits(logits, y, reduction="none").mean(1)


@pytest.mark.parametrize("kind", ["live", "exact", "fast", "ensemble", "ensemble of losses"])
def test_a_loss_of_the_callers_own(kind):
    net, (x, _) = small_net().eval(), batch()
    y = (torch.rand(16, 10, generator=torch.Generator().manual_seed(1)) > 0.7).float()
    make = {"live": dict(live=True), "fast": dict(dtype=torch.float32)}.get(kind, EXACT)
    source = ea.Source(net, **make)
    if kind.startswith("ensemble"):
        source = ea.Ensemble([source, ea.Source(net, **make)], fuse="loss" if kind.endswith("losses") else "logits")
    leaf = x.clone().requires_grad_()
    loss = bce(net(leaf), y)
    grad, = torch.autograd.grad(loss.sum(), leaf)
    for sign, targeted in ((1, False), (-1, True)):
        result = ea.fgsm(EPS, loss=bce, targeted=targeted)(source, x, y, return_info=True)
        assert (result.x_adv - (x + sign * EPS * grad.sign()).clamp(0, 1)).abs().gt(1e-6).double().mean() < 1e-3
        assert torch.allclose(result.loss, loss, atol=1e-5) and result.success.dtype == torch.bool
    worst = ea.pgd(0.1, steps=3, restarts=2, loss=bce)(source, x, y, return_info=True)
    assert (bce(net(worst.x_adv), y) > loss).all()
    assert torch.equal(worst.success, ((net(worst.x_adv) > 0) != (y > 0.5)).any(1))


def test_a_loss_may_read_logits_and_targets_of_any_shape():
    net = Returning(lambda z: z.view(-1, 5, 2), small_net().eval())
    x, _ = batch()
    targets = [{"class": i % 2} for i in range(16)]

    def loss(logits, y):
        return torch.stack([F.cross_entropy(z, torch.full((5,), t["class"])) for z, t in zip(logits, y)])

    x_adv = ea.pgd(EPS, steps=2, loss=loss)(ea.Source(net, live=True), x, targets)
    with torch.no_grad():
        assert (loss(net(x_adv), targets) > loss(net(x), targets)).all()
    same = ea.fgsm(EPS, loss=lambda z, y: F.cross_entropy(z, y, reduction="none"))
    y = batch()[1]
    assert torch.equal(same(net.net, x, y), ea.fgsm(EPS)(net.net, x, y))


def test_an_adversary_gives_a_loss_of_the_callers_own_the_targets_as_they_are():
    net, (x, _) = small_net(), batch()
    y = (torch.rand(16, 10, generator=torch.Generator().manual_seed(1)) > 0.7).float()
    attack = ea.fgsm(EPS, loss=bce)
    made = ea.EnsembleAdversary(net, attack=attack, fraction=1.0)(x, y)
    assert torch.equal(made.x, attack(net, x, y)) and torch.equal(made.y, y)


def test_a_loss_that_is_not_per_sample_is_refused():
    net, (x, y) = small_net(), batch()
    with pytest.raises(ValueError, match=r"loss must return one loss per sample, \[N\] = \[16\], got shape \(\)"):
        ea.fgsm(EPS, loss=F.cross_entropy)(net, x, y)


# ---- what is wrong from the first batch on -------------------------------------------------------------------------

LEVELS = {"levels": lambda x: 255 * x, "normalised": lambda x: (x - 0.5) / 0.25, "shifted": lambda x: x - 0.01}


@pytest.mark.parametrize("change", LEVELS.values(), ids=LEVELS)
@pytest.mark.parametrize("kind", ["plain", "frozen", "ensemble", "lambda"])
def test_images_out_of_range_are_an_error(kind, change):
    net, (x, y) = small_net().eval(), batch()
    source = {"plain": net, "frozen": ea.Source(net, **EXACT), "ensemble": ea.Ensemble([net, net]),
              "lambda": lambda x: net(x)}[kind]
    for attack in (ea.fgsm(EPS), ea.random_sign(EPS), ea.cw_linf(EPS, max_iterations=2)):
        with pytest.raises(ValueError, match=rf"{attack.name}: x must lie in \[lo, hi\].*mean="):
            attack(source, change(x), y)
    ea.fgsm(EPS)(source, x, y)
    ea.fgsm(EPS, lo=-3.0, hi=3.0)(source, (x - 0.5) / 0.25, y)


def test_images_are_looked_at_once(monkeypatch):
    net, (x, y) = small_net(), batch()
    source, looks = ea.Source(net, **EXACT), []
    plain = ea.sources.first_look.FirstLook.at_images
    monkeypatch.setattr(ea.sources.first_look.FirstLook, "at_images",
                        lambda self, *a: looks.append(1) or plain(self, *a))
    for _ in range(3):
        ea.fgsm(EPS)(net, x, y)
        ea.fgsm(EPS)(source, x, y)
    assert len(looks) == 2


def test_sizes_beyond_the_range_of_pixels_are_an_error():
    net, (x, y) = small_net(), batch()
    for call in (lambda: ea.fgsm(8), lambda: ea.pgd(8), lambda: ea.cw_linf(8), lambda: ea.fgsm()(net, x, y, eps=8.0),
                 lambda: ea.fgsm()(net, x, y, eps=torch.full((16,), 8.0)), lambda: ea.pgd_l2(128)(net, x, y),
                 lambda: ea.pgd(0.5, lo=0.0, hi=0.25)):
        with pytest.raises(ValueError, match="eps must be <= .*8 / 255, not 8"):
            call()
    ea.fgsm(1.0), ea.pgd(8.0, lo=0.0, hi=255.0)
    ea.pgd_l2(3.0, steps=1)(net, x, y)


class NoGradient(nn.Module):
    def __init__(self, how):
        super().__init__()
        self.net, self.how = small_net(), how

    def forward(self, x):
        if self.how == "no_grad":
            with torch.no_grad():
                return self.net(x)
        if self.how == "integers":
            return (self.net(x) * 100).to(torch.int32)
        # `other` gives logits that need a gradient, but not one by x
        return self.net(x.detach() if self.how == "detached" else torch.rand(x.shape))


@pytest.mark.parametrize("how", ["no_grad", "detached", "random", "integers"])
def test_no_gradient_by_x_is_one_clear_error(how):
    model, (x, y) = NoGradient(how), batch()
    frozen = [ea.Source(model, **EXACT)]
    for source in (model, *frozen, ea.Ensemble([model, small_net()]), ea.Ensemble([model, model], sequential=True)):
        for attack in (ea.fgsm(EPS), ea.fast_entropy(EPS), ea.cw_linf(EPS, max_iterations=2)):
            with pytest.raises(ValueError, match="source must let a gradient reach x"):
                if attack.loss != "entropy" or not isinstance(source, ea.Ensemble):  # that of the mixture reaches x
                    attack(source, x, y)
                else:
                    attack(ea.Ensemble([model]), x, y)
    with pytest.raises(ValueError, match="source must let a gradient reach x"):
        ea.Source(model, dtype=torch.float32).calibrate(x, y)


def test_a_gradient_that_is_zero_everywhere_is_said_once():
    class Rounded(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = small_net()

        def forward(self, x):
            return self.net((x * 8).round() / 8)

    (x, y), model = batch(), Rounded()
    with pytest.warns(UserWarning, match="gradient of the loss by x is zero for every pixel"):
        ea.fgsm(EPS)(model, x, y)
    ea.fgsm(EPS)(model, x, y)
    with pytest.warns(UserWarning, match="gradient of the loss by x is zero for every pixel"):
        ea.fgsm(EPS)(ea.Ensemble([ea.Source(model, **EXACT)]), x, y)


# ---- sizes -------------------------------------------------------------------------------------------------------

def test_sizes_in_any_shape_that_is_one_per_sample():
    net, (x, y) = small_net(), batch()
    sizes = torch.linspace(0.01, 0.1, 16)
    for attack in (ea.fgsm(EPS), ea.pgd_l2(EPS, steps=2), ea.cw_linf(EPS, max_iterations=3)):
        wanted = attack(net, x, y, eps=sizes, key=ea.fresh_key(seed=0))
        assert torch.equal(attack(net, x, y, eps=sizes.view(-1, 1, 1, 1), key=ea.fresh_key(seed=0)), wanted)
    wanted = ea.fgsm(0.03)(net, x, y)
    assert torch.equal(ea.fgsm()(net, x, y, eps=torch.tensor(0.03)), wanted)
    assert torch.equal(ea.fgsm(torch.tensor(0.03))(net, x, y), wanted)
    assert hash(ea.fgsm(torch.tensor(0.03), lo=torch.tensor(0.0)))
    grad = torch.randn_like(x)
    assert torch.equal(ea.ops.sign_step(x, grad, sizes.view(-1, 1, 1, 1)), ea.ops.sign_step(x, grad, sizes))
    for shape in ((16, 1), (1, 16), (3, 1, 1), (1, 3, 1, 1)):
        with pytest.raises(ValueError, match="eps must be a number or have shape"):
            ea.fgsm()(net, x, y, eps=torch.full(shape, 0.03))


def test_bounds_per_channel_say_what_to_do():
    for bound in (torch.zeros(3), torch.zeros(1, 3, 1, 1), (0.0, 0.0, 0.0)):
        with pytest.raises(TypeError, match=r"lo must be a number.*Source\(model, mean=..., std=...\)"):
            ea.fgsm(lo=bound)
    with pytest.raises(TypeError, match="eps must be a number.*given at the call"):
        ea.fgsm(torch.full((16,), 0.03))


# ---- the default device --------------------------------------------------------------------------------------------

ATTACKS = [ea.fgsm(), ea.rand_fgsm(), ea.step_ll(), ea.step_rnd(), ea.pgd(steps=2, restarts=2), ea.pgd_l2(steps=2),
           ea.difgsm(steps=2), ea.difgsm(steps=2, per_sample=True), ea.tifgsm(steps=2), ea.sinifgsm(steps=2),
           ea.vmifgsm(steps=2, n=2), ea.cw_linf(max_iterations=2), ea.fast_entropy(), ea.fast_grad_linf(),
           ea.random_normal()]


@pytest.mark.parametrize("attack", ATTACKS, ids=lambda a: a.name)
def test_no_tensor_is_made_on_the_default_device(attack):
    net, other, (x, y) = small_net(), small_net(1), batch()
    wanted = attack(net, x, y, key=ea.fresh_key("cpu", seed=1))
    with torch.device("meta"):
        got = attack(net, x, y, key=ea.fresh_key("cpu", seed=1))
        assert torch.equal(got, wanted)
        attack(net, x, y, return_info=True)
        for source in (ea.Source(net), ea.Source(net, mean=(0.5,) * 3, **EXACT), ea.Ensemble([net, other]),
                       ea.Ensemble([ea.Source(net), ea.Source(other)], fuse="loss", weights=[1.0, 2.0])):
            assert attack(source, x, y).device.type == "cpu"


def test_adversaries_and_matrices_name_their_device():
    net, other, (x, y) = small_net(), small_net(1), batch()
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        made = ea.EnsembleAdversary(net, [other], ea.rand_fgsm(), fraction=1.0)
        assert made(x, y).x.device.type == "cpu"
        transfer_matrix({"t": net}, {"o": other}, {"pgd": ea.pgd(steps=2)}, [(x, y)])
        assert ea.Source(net).calibrate(x, y).loss_increase > 0.9
