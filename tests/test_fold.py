"""Folding: the folded copy computes what the plain module does, in float64; what must not be folded is left alone."""
import copy

import pytest
import torch
import torch.nn.functional as F
from networks import gradient, small_net
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrizations

import ensadv_fast as ea
from ensadv_fast.sources.frozen import tracing

PLAIN = {"dtype": torch.float64, "channels_last": False}


def norms(module: nn.Module) -> int:
    return sum(isinstance(m, _BatchNorm) for m in module.modules())


def ready(net: nn.Module, seed: int = 0) -> nn.Module:
    """float64, eval mode, normalisations with moved statistics and weights of their own."""
    g = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for m in net.modules():
            if isinstance(m, _BatchNorm):
                for t, low in ((m.running_mean, -0.5), (m.running_var, 0.5), (m.weight, 0.5), (m.bias, -0.5)):
                    if t is not None:
                        t.copy_(torch.rand(t.shape, generator=g) + low)
    return net.double().eval()


def folded(net: nn.Module, shape=(4, 3, 9, 9), left: int = 0, **kw) -> ea.Source:
    """A folded source of the net, that keeps `left` normalisations and gives the plain module's values."""
    before = copy.deepcopy(net.state_dict())
    source = ea.Source(net, **PLAIN, **kw)
    assert norms(source.module) == left
    same_values(source, net, shape)
    assert all(torch.equal(a, b) for a, b in zip(before.values(), net.state_dict().values()))
    return source


def same_values(source: ea.Source, net: nn.Module, shape) -> None:
    x = torch.rand(shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    y = torch.arange(shape[0]) % 3
    got, (grad, logits) = source.input_grad(x, y, rescale=False), gradient(net, x, y)
    assert (got.logits - logits).abs().max() <= 1e-9 * logits.abs().max()
    assert (got.grad - grad).abs().max() <= 1e-9 * grad.abs().max() and grad.abs().max() > 0


class Net(nn.Module):
    """Its parts by name, and a forward whose result becomes five logits."""

    def __init__(self, forward, **parts):
        super().__init__()
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = forward

    def forward(self, x):
        z = self.run(self, x).flatten(1)
        return torch.stack([z[:, ::step].mean(1) for step in (1, 2, 3)] + [z[:, 0], z.square().mean(1)], 1)


# ---- what is folded ----------------------------------------------------------------------------------------------

LAYERS = {
    "plain": nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6)),
    "no-bias": nn.Sequential(nn.Conv2d(3, 6, 3, stride=2, bias=False), nn.BatchNorm2d(6)),
    "padded": nn.Sequential(nn.Conv2d(3, 6, 3, padding=1, padding_mode="reflect"), nn.BatchNorm2d(6)),
    "grouped": nn.Sequential(nn.Conv2d(3, 6, 3, padding=2, dilation=2, groups=3), nn.BatchNorm2d(6)),
    "not-affine": nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6, affine=False, eps=0.1)),
    "sync": nn.Sequential(nn.Conv2d(3, 6, 3), nn.SyncBatchNorm(6)),
    "transposed": nn.Sequential(nn.ConvTranspose2d(3, 6, 3, stride=2, output_padding=1), nn.BatchNorm2d(6)),
    "transposed-grouped": nn.Sequential(nn.Conv2d(3, 6, 1), nn.ConvTranspose2d(6, 8, 3, groups=2, bias=False),
                                        nn.BatchNorm2d(8)),
    "through-dropout": nn.Sequential(nn.Conv2d(3, 6, 3), nn.Dropout2d(0.5), nn.Identity(), nn.BatchNorm2d(6)),
    "in-place-relu": nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), nn.ReLU(inplace=True)),
    "conv1d": nn.Sequential(nn.Flatten(2), nn.Conv1d(3, 6, 3), nn.BatchNorm1d(6)),
    "conv3d": nn.Sequential(nn.Unflatten(1, (3, 1)), nn.Conv3d(3, 6, (1, 3, 3)), nn.BatchNorm3d(6)),
    "linear": nn.Sequential(nn.Flatten(), nn.Linear(243, 8), nn.ReLU(), nn.Dropout(), nn.Linear(8, 6),
                            nn.BatchNorm1d(6)),
}


@pytest.mark.parametrize("name", LAYERS)
def test_folded_layers(name):
    torch.manual_seed(0)
    folded(ready(Net(lambda m, x: m.layers(x), layers=copy.deepcopy(LAYERS[name]))))


@pytest.mark.parametrize("flat", [lambda x: x.flatten(1), lambda x: torch.flatten(x, start_dim=1),
                                  lambda x: x.view(x.size(0), -1), lambda x: F.relu(x.reshape(x.shape[0], -1))])
def test_linear_layers_after_whatever_makes_a_matrix(flat):
    torch.manual_seed(0)
    folded(ready(Net(lambda m, x: m.norm(m.fc(flat(x))), fc=nn.Linear(243, 6), norm=nn.BatchNorm1d(6))))


def test_residual_blocks_and_names():
    class Block(nn.Module):
        def __init__(self, c):
            super().__init__()
            self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1, bias=False), nn.BatchNorm2d(c)

        def forward(self, x, scale: float = 1.0):
            return F.relu(x + scale * self.norm(self.conv(x)))

    torch.manual_seed(0)
    net = ready(nn.Sequential(nn.Conv2d(3, 6, 3), nn.BatchNorm2d(6), Block(6), Block(6), nn.Flatten()))
    source = folded(net)
    assert type(source.module[2].norm) is nn.Identity and source.module[2].conv.bias is not None
    folded(Net(lambda m, x: m.blocks[2](m.blocks[1](m.blocks[0](x)), scale=0.5), blocks=net[:3]))


def test_folding_rounds_once_from_float64():
    net = small_net().eval()
    s = (net[1].weight.double() / (net[1].running_var.double() + net[1].eps).sqrt()).view(-1, 1, 1, 1)
    for dtype in (torch.bfloat16, torch.float32):
        source = ea.Source(net, dtype=dtype)
        assert norms(source.module) == 0
        assert torch.equal(source.module[0].weight, (net[0].weight.double() * s).to(dtype))
        assert not any(p.requires_grad for p in source.module.parameters())
    assert ea.Source(net, dtype=None).module[0].weight.dtype == torch.float32


def test_channels_last_and_normalisation():
    torch.manual_seed(0)
    net = ready(Net(lambda m, x: m.layers(x), layers=copy.deepcopy(LAYERS["plain"])))
    source = ea.Source(net, dtype=torch.float64, channels_last=True, mean=(0.5, 0.4, 0.3), std=(0.2, 0.3, 0.1))
    assert norms(source.module) == 0 and source.module.layers[0].weight.is_contiguous(memory_format=torch.channels_last)
    mean, std = (torch.tensor(v, dtype=torch.float32).double().view(1, 3, 1, 1)
                 for v in ((0.5, 0.4, 0.3), (0.2, 0.3, 0.1)))
    net.run = lambda m, x: m.layers((x - mean) / std)
    same_values(source, net, (2, 3, 9, 9))


def test_a_forward_that_keeps_things_keeps_no_traces():
    """Tracing runs the forward once; that run leaves nothing in attributes and generators."""
    def forward(m, x):
        m.kept.append(x)
        return m.norm(m.conv(x)) + 0 * torch.rand(1)

    torch.manual_seed(0)
    net = ready(Net(forward, conv=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6)))
    net.kept, generator = [], torch.get_rng_state()
    source = ea.Source(net, **PLAIN)
    assert torch.equal(generator, torch.get_rng_state())
    assert norms(source.module) == 0 and net.kept == source.module.kept == []


def test_nothing_random_is_frozen():
    torch.manual_seed(0)
    net = ready(Net(lambda m, x: m.norm(m.conv(x)) + torch.rand(1), conv=nn.Conv2d(3, 6, 3), norm=nn.BatchNorm2d(6)))
    source, x = ea.Source(net, **PLAIN), torch.rand(1, 3, 9, 9, dtype=torch.float64)
    assert not torch.equal(source.logits(x), source.logits(x))


# ---- what is not -------------------------------------------------------------------------------------------------

def conv_norm(**kw):
    return {"conv": nn.Conv2d(3, 3, 3, padding=1), "norm": nn.BatchNorm2d(3), **kw}


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x).abs()


class OwnNorm(nn.BatchNorm2d):
    def forward(self, x):
        return super().forward(x) * 2


LEFT = {
    "norm-alone": Net(lambda m, x: m.norm(x), norm=nn.BatchNorm2d(3)),
    "norm-first": Net(lambda m, x: m.conv(m.norm(x)), **conv_norm()),
    "relu-between": Net(lambda m, x: m.norm(F.relu(m.conv(x))), **conv_norm()),
    "conv-twice": Net(lambda m, x: m.conv(m.norm(m.conv(x))), **conv_norm()),
    "norm-twice": Net(lambda m, x: m.norm(m.norm(m.conv(x))), **conv_norm()),
    "pair-twice": Net(lambda m, x: m.norm(m.conv(m.norm(m.conv(x)))), **conv_norm()),
    "other-user": Net(lambda m, x: m.norm(z := m.conv(x)) * z, **conv_norm()),
    "method-user": Net(lambda m, x: m.norm(z := m.conv(x)) + z.mean(), **conv_norm()),
    "weight-read": Net(lambda m, x: m.norm(m.conv(x)) * m.conv.weight.norm(), **conv_norm()),
    "weight-called": Net(lambda m, x: m.norm(m.conv(x)) + F.conv2d(x, m.conv.weight, padding=1), **conv_norm()),
    "norm-read": Net(lambda m, x: m.norm(m.conv(x)) * m.norm.running_var.sum(), **conv_norm()),
    "own-conv": Net(lambda m, x: m.norm(m.conv(x)), **conv_norm(conv=OwnConv(3, 3, 3))),
    "own-norm": Net(lambda m, x: m.norm(m.conv(x)), **conv_norm(norm=OwnNorm(3))),
    "parametrised": Net(lambda m, x: m.norm(m.conv(x)),
                        **conv_norm(conv=parametrizations.weight_norm(nn.Conv2d(3, 3, 3)))),
    "no-statistics": Net(lambda m, x: m.norm(m.conv(x)),
                         **conv_norm(norm=nn.BatchNorm2d(3, track_running_stats=False))),
    "linear-of-rows": Net(lambda m, x: m.norm(m.fc(x.flatten(2))), fc=nn.Linear(81, 3), norm=nn.BatchNorm1d(3)),
}


@pytest.mark.parametrize("name", LEFT)
def test_left_alone(name):
    torch.manual_seed(0)
    folded(ready(copy.deepcopy(LEFT[name])), left=norms(LEFT[name]))


def test_an_overridden_forward_of_an_instance():
    net = ready(Net(lambda m, x: m.norm(m.conv(x)), **conv_norm()))
    net.norm.forward = lambda x, norm=net.norm: nn.BatchNorm2d.forward(norm, x) * 3
    folded(net, left=1)


def test_one_module_under_two_names():
    net = ready(Net(lambda m, x: m.norm(m.conv(x)), **conv_norm()))
    net.again = net.norm
    folded(net, left=1)


def test_modules_with_hooks_keep_what_the_hooks_see():
    seen = []
    net = ready(Net(lambda m, x: m.norm(m.conv(x)), **conv_norm()))
    net.conv.register_forward_hook(lambda m, args, out: seen.append(out.detach()))
    source = folded(net, left=1)
    before = len(seen)
    source.logits(torch.zeros(1, 3, 9, 9, dtype=torch.float64))
    assert torch.equal(seen[before], net.conv(torch.zeros(1, 3, 9, 9, dtype=torch.float64)))


def test_old_style_normalisation_of_weights_is_a_hook():
    net = ready(Net(lambda m, x: m.norm(m.conv(x)), **conv_norm()))
    nn.utils.spectral_norm(net.conv)
    folded(net.eval(), left=1)


def test_train_crafting_live_sources_and_no_permission():
    net = small_net()
    assert norms(ea.Source(net, crafting="train").module) == norms(ea.Source(net, fold=False).module) == 2
    ea.Source(net, live=True, dtype=None).logits(torch.rand(2, 3, 8, 8))
    assert norms(net) == 2


def test_weights_that_the_dtype_cannot_hold():
    net = ready(Net(lambda m, x: m.norm(m.conv(x)), **conv_norm()))
    with torch.no_grad():
        net.norm.running_var.fill_(1e-12)
        net.norm.weight.fill_(1e4)
    assert norms(ea.Source(net, dtype=torch.float16).module) == 1
    assert norms(ea.Source(net, dtype=torch.bfloat16).module) == 0


# ---- what cannot be traced ---------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, c: int = 3):
        super().__init__()
        self.conv, self.norm = nn.Conv2d(c, c, 3, padding=1), nn.BatchNorm2d(c)

    def forward(self, x):
        return self.norm(self.conv(x))


def early(m, x):
    """A network that stops early where it is sure: control flow that depends on values."""
    z = m.block(x)
    return z if z.mean() > 100 else m.norm(m.conv(z))


def one_warning(net: nn.Module, match: str) -> ea.Source:
    with pytest.warns(UserWarning, match=match) as caught:
        source = ea.Source(net, **PLAIN)
    assert len(caught) == 1 and caught[0].filename == __file__
    same_values(source, net, (4, 3, 9, 9))
    return source


def test_control_flow_falls_back_to_the_parts_and_says_so_once():
    torch.manual_seed(0)
    source = one_warning(ready(Net(early, block=Block(), **conv_norm())),
                         r"the model itself \(TraceError: .*control flow")
    assert norms(source.module) == 1 and type(source.module.block.norm) is nn.Identity


def test_a_part_with_control_flow_costs_only_itself():
    class Early(Block):
        def forward(self, x):
            return early(self, x)

    torch.manual_seed(0)
    early_block = Early()
    early_block.block = Block()
    source = one_warning(ready(Net(lambda m, x: m.norm(m.conv(m.inner(x))), inner=early_block, **conv_norm())),
                         r"in inner \(TraceError")
    assert type(source.module.norm) is type(source.module.inner.block.norm) is nn.Identity
    assert norms(source.module) == 1


def test_containers_of_what_cannot_be_traced_are_left_alone():
    """Their owner may call what is in them one by one, and use the results in between."""
    def tapped(m, x):
        taps = []
        for layer in m.layers:
            x = layer(x)
            taps.append(x)
        return sum(taps) if x.sum() > -1e9 else x

    torch.manual_seed(0)
    net = ready(Net(tapped, layers=nn.Sequential(nn.Conv2d(3, 3, 3, padding=1), nn.BatchNorm2d(3), Block())))
    source = one_warning(net, "the model itself")
    assert norms(source.module) == 1 and type(source.module.layers[2].norm) is nn.Identity


def test_parts_whose_course_others_could_change_are_left_alone():
    class Switch(Block):
        def forward(self, x, fold=None):
            z = self.conv(x)
            return self.norm(z) if fold is None else z

    torch.manual_seed(0)
    net = ready(Net(lambda m, x: m.block(x, 1) + m.block(x) if x.sum() > 0 else x, block=Switch()))
    assert norms(one_warning(net, "block").module) == 1


@pytest.mark.parametrize("looks", [
    lambda m, x: m.norm(m.conv(x)) if isinstance(m.norm, nn.BatchNorm2d) else x,
    lambda m, x: m.norm(m.conv(x)) * m.norm.num_features,
])
def test_a_forward_that_looks_at_its_normalisations_keeps_them(looks):
    torch.manual_seed(0)
    net = ready(Net(looks, **conv_norm()))
    assert norms(one_warning(net, "its forward looks at its normalisations").module) == 1


def test_hooks_on_a_part_leave_its_inside_to_folding():
    seen = []
    torch.manual_seed(0)
    net = ready(Net(lambda m, x: m.block(x), block=Block()))
    net.block.register_forward_hook(lambda *a: seen.append(a[2].shape))
    folded(net)
    assert set(seen) == {(4, 3, 9, 9)}


def test_nothing_is_said_where_nothing_could_be_folded():
    net = Net(lambda m, x: m.conv(x) if x.sum() > 0 else x, conv=nn.Conv2d(3, 3, 3)).double().eval()
    folded(net)


def test_opaque_calls_erase_what_they_began():
    traced = tracing.trace(Net(lambda m, x: m.inner(x), inner=Net(early, block=Block(), **conv_norm())).eval())
    assert [n.target for n in traced.graph.nodes if n.op == "call_module"] == ["inner"]
    assert list(traced.opaque) == ["inner"]
    traced.graph.lint()


# ---- timm --------------------------------------------------------------------------------------------------------

# name: (options, pixels, normalisations left)
TIMM = {
    "vit_tiny_patch16_224": ({"img_size": 64}, 64, 0),
    "resnet18": ({"zero_init_last": False}, 64, 0),
    "resnet50": ({"zero_init_last": False}, 64, 0),
    "inception_v3": ({"aux_logits": True}, 299, 0),
    "inception_resnet_v2": ({}, 96, 0),
    "mobilenetv2_100": ({}, 64, 0),
    "mobilenetv3_small_100": ({}, 64, 0),
    "efficientnet_b0": ({}, 64, 0),
    "tf_efficientnet_b0": ({}, 64, 0),
    "densenet121": ({}, 64, 62),  # before the convolutions
    "vgg11_bn": ({}, 64, 0),
    "convnext_atto": ({}, 64, 0),
    "regnety_002": ({}, 64, 0),
    "repvgg_a0": ({}, 64, 17),  # of the branches without a convolution
}


class FirstOutput(nn.Module):
    """Inception's auxiliary head makes a tuple."""

    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, x):
        z = self.net(x)
        return z[0] if isinstance(z, tuple) else z


@pytest.mark.parametrize("name", TIMM)
def test_timm(name):
    timm = pytest.importorskip("timm")
    options, size, left = TIMM[name]
    torch.manual_seed(0)
    net = ready(timm.create_model(name, num_classes=10, **options))
    x = torch.rand(1 if size > 200 else 2, 3, size, size, dtype=torch.float64)
    y = torch.arange(len(x))
    source = ea.Source(net, **PLAIN)
    got, (grad, logits) = source.input_grad(x, y, rescale=False), gradient(FirstOutput(net), x, y)
    assert norms(source.module) == left
    assert (got.logits - logits).abs().max() <= 1e-9 * logits.abs().max()
    assert (got.grad - grad).abs().max() <= 1e-9 * grad.abs().max()
