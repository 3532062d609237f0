"""Folds that would not be the model: tensors that others read, modes that forwards switch, and the numerical proof."""
import copy
import warnings

import pytest
import torch
import torch.nn.functional as F
from test_fold import PLAIN, Block, Net, folded, norms, ready, same_values
from torch import nn
from torch.utils.checkpoint import checkpoint

import ensadv_fast as ea


def conv_norm() -> dict[str, nn.Module]:
    return {"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3)}


def normalised_by(norm, x):
    return F.batch_norm(x, norm.running_mean, norm.running_var, norm.weight, norm.bias)


def switched(m, x):
    m.norm.train()
    z = m.norm(m.conv(x))
    m.norm.eval()
    return z


def told(**settings):
    def forward(m, x):
        for name, value in settings.items():
            setattr(m.norm, name, value)
        return m.norm(m.conv(x))
    return forward


def call(module, scale, x):
    return torch.func.functional_call(module, {k: v * scale for k, v in module.named_parameters()}, (x,))


# What a trace sees somebody read or change, and how many normalisations stay.
READ = {
    "attributes": lambda m, x: m.norm(m.conv(x)) + normalised_by(m.norm, x),
    "buffers": lambda m, x: m.norm(m.conv(x)) * m.norm._buffers["running_var"].sum(),
    "buffers-called": lambda m, x: m.norm(m.conv(x)) * dict(m.norm.named_buffers())["running_var"].sum(),
    "state": lambda m, x: m.norm(m.conv(x)) * m.conv.state_dict()["weight"].norm(),
    "all-parameters": lambda m, x: m.norm(m.conv(x)) * sum(p.norm() for p in m.parameters()),
    "get-parameter": lambda m, x: m.norm(m.conv(x)) * m.get_parameter("conv.weight").norm(),
    "functional-call": lambda m, x: m.norm(call(m.conv, 2, x)),
    "functional-call-beside": lambda m, x: m.norm(m.conv(x)) + call(m.conv, 1, x),
    "functional-call-of-the-norm": lambda m, x: call(m.norm, 3, m.conv(x)),
    "switched": switched,
    "mode": told(training=True),
    "numbers": told(eps=0.5),
}


@pytest.mark.parametrize("name", READ)
def test_what_others_read_or_change_is_not_folded(name):
    torch.manual_seed(0)
    net = ready(Net(READ[name], **conv_norm()))
    pristine = copy.deepcopy(net)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Source: fold leaves")
        source = ea.Source(net, **PLAIN)
    assert norms(source.module) == 1
    same_values(source, pristine, (4, 3, 9, 9))


def test_a_counter_of_calls_does_not_keep_the_normalisations():
    def count(m, x):
        m.calls += 1
        return m.norm(m.conv(x))

    net = Net(count, **conv_norm())
    net.calls = 0
    folded(ready(net))


def if_sure(result):
    """A forward that cannot be traced: it decides by values."""
    return lambda m, x: result(m, x) if x.sum() > -1e9 else x


UNTRACED = {
    "norm-read": lambda m, x: m.block(x) + normalised_by(m.block.norm, x),
    "weight-read": lambda m, x: m.block(x) * m.block.conv.weight.norm(),
    "functional-call": lambda m, x: m.block(x) + call(m.block, 1, x),
    "in-a-function": lambda m, x: m.block(x) * (lambda: m.block.conv.bias.sum())(),
}


@pytest.mark.parametrize("name", UNTRACED)
def test_code_that_could_not_be_traced_but_names_tensors_keeps_what_is_below(name):
    torch.manual_seed(0)
    net = ready(Net(if_sure(UNTRACED[name]), block=Block()))
    with pytest.warns(UserWarning, match="Source: fold leaves") as caught:
        source = ea.Source(net, **PLAIN)
        same_values(source, net, (4, 3, 9, 9))
    assert len(caught) == 1 and norms(source.module) == 1


def hidden(m, x):
    return m.block(x) * getattr(m.block.conv, "wei" + "ght").norm()


@pytest.mark.parametrize("compile", [False, True])
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_a_fold_that_is_not_the_model_is_undone_at_the_first_forward_pass(dtype, compile, monkeypatch):
    monkeypatch.setattr(torch, "compile", lambda module: module)
    torch.manual_seed(0)
    net = ready(Net(if_sure(hidden), block=Block()))
    source = ea.Source(net, dtype=dtype, channels_last=False, compile=compile)
    assert norms(source.module) == 0
    x = torch.rand(4, 3, 9, 9, dtype=torch.float64)
    with pytest.warns(UserWarning, match="the folded copy does not compute what the model computes") as caught:
        got = source.logits(x)
    assert len(caught) == 1 and norms(source.module) == 1 and not source.keeps_bits
    with torch.no_grad():
        wanted = net(x)
    assert (got.double() - wanted).abs().max() <= {torch.float64: 1e-12}.get(dtype, 0.1) * wanted.abs().max()
    if dtype != torch.float64:  # a source that is prepared anew remembers
        with torch.no_grad(), warnings.catch_warnings():
            warnings.simplefilter("error")
            source._prepare(source._original, source._wish())
        assert norms(source.module) == 1


def test_the_proof_is_of_the_first_forward_pass_alone_and_draws_nothing():
    seen = []
    torch.manual_seed(0)
    net = ready(Net(lambda m, x: seen.append(type(x)) or m.norm(m.conv(x)), **conv_norm()))
    source = ea.Source(net, **PLAIN)
    generator, x = torch.get_rng_state(), torch.rand(4, 3, 9, 9, dtype=torch.float64)
    torch.set_rng_state(generator)
    source.logits(x)
    first = len(seen)
    source.logits(x)
    assert len(seen) == first + 1 and torch.equal(generator, torch.get_rng_state())


def test_images_of_a_wrong_shape_say_so_and_spoil_nothing():
    torch.manual_seed(0)
    net = ready(Net(lambda m, x: m.norm(m.conv(x)), **conv_norm()))
    source = ea.Source(net, **PLAIN)
    with pytest.raises(RuntimeError, match="channels"):
        source.logits(torch.rand(2, 5, 9, 9, dtype=torch.float64))
    same_values(source, net, (4, 3, 9, 9))
    assert norms(source.module) == 0


def test_models_that_float64_or_two_images_do_not_fit_are_proved_too():
    torch.manual_seed(0)
    fixed = ready(Net(if_sure(lambda m, x: hidden(m, x).view(5, -1)), block=Block()))
    with pytest.warns(UserWarning, match="does not compute"):
        same_values(ea.Source(fixed, **PLAIN), fixed, (5, 3, 9, 9))
    single = Net(if_sure(lambda m, x: hidden(m, x.float())), block=Block())
    ready(single).float()
    with pytest.warns(UserWarning, match="does not compute"):
        ea.Source(single, dtype=torch.float32).logits(torch.rand(4, 3, 9, 9))


def test_models_that_draw_are_folded():
    torch.manual_seed(0)
    net = ready(Net(lambda m, x: m.norm(m.conv(x)) + torch.rand(1), **conv_norm()))
    source = ea.Source(net, **PLAIN)
    source.logits(torch.rand(2, 3, 9, 9, dtype=torch.float64))
    assert norms(source.module) == 0 and source.keeps_bits


def test_hooks_do_not_see_the_proof():
    seen = []
    net = ready(Net(lambda m, x: m.block(x), block=Block()))
    net.block.register_forward_hook(lambda *a: seen.append(a[2].shape))
    ea.Source(net, **PLAIN).logits(torch.rand(4, 3, 9, 9, dtype=torch.float64))
    assert seen == [(4, 3, 9, 9)]


def test_checkpointing_in_a_folded_source():
    torch.manual_seed(0)
    net = ready(Net(lambda m, x: checkpoint(lambda z: F.relu(m.norm(m.conv(z))), x, use_reentrant=False) * 2,
                    **conv_norm()))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        source = ea.Source(net, **PLAIN)
        same_values(source, net, (4, 3, 9, 9))


@pytest.mark.filterwarnings("ignore:None of the inputs have requires_grad")
def test_reentrant_checkpointing_says_what_to_change():
    net = ready(Net(lambda m, x: checkpoint(lambda z: F.relu(m.conv(z)), x, use_reentrant=True) * 2, **conv_norm()))
    for source in (ea.Source(net, **PLAIN), ea.Source(net, live=True, dtype=None)):
        with pytest.raises(RuntimeError, match="Source: model must checkpoint with use_reentrant=False"):
            source.input_grad(torch.rand(4, 3, 9, 9, dtype=torch.float64))
