"""The frozen pass: PyTorch's own values and gradients, and next to nothing kept for the backward pass."""
import copy
import math

import pytest
import torch
import torch.nn.functional as F
from kept import kept_bytes
from networks import batch, gradient, small_net
from torch import nn

import ensadv_fast as ea
from ensadv_fast.sources.frozen.frozen_pass import FrozenPass
from ensadv_fast.sources.frozen.relus import ReluPlan

SHAPE = (2, 4, 9, 10)


def both(forward, x, last: bool, grad=None):
    """(output, gradient by x) outside and inside the frozen pass."""
    for inside in (False, True):
        leaf = (x.contiguous(memory_format=torch.channels_last) if last else x.clone()).requires_grad_()
        h = leaf * 1  # not a leaf, which nothing may change in place
        if inside:
            with FrozenPass():
                y = forward(h)
        else:
            y = forward(h)
        g = torch.randn(y.shape, generator=torch.Generator().manual_seed(1)).to(y) if grad is None else grad(y)
        yield y.detach().clone(), torch.autograd.grad(y, leaf, g)[0]


def frozen(module: nn.Module) -> nn.Module:
    return module.eval().requires_grad_(False)


torch.manual_seed(0)
LAYERS = {
    "conv": frozen(nn.Conv2d(4, 6, 3, stride=2, padding=1)),
    "conv-no-bias": frozen(nn.Conv2d(4, 6, (3, 1), padding=(1, 0), bias=False)),
    "conv-1x1": frozen(nn.Conv2d(4, 6, 1)),
    "conv-grouped": frozen(nn.Conv2d(4, 8, 3, groups=2, dilation=2)),
    "conv-depthwise": frozen(nn.Conv2d(4, 4, 3, groups=4, padding="same")),
    "conv-same": frozen(nn.Conv2d(4, 4, 3, padding="same", dilation=2)),
    "conv-uneven": frozen(nn.Conv2d(4, 4, 4, padding="same")),
    "conv-valid": frozen(nn.Conv2d(4, 4, 3, padding="valid")),
    "conv-circular": frozen(nn.Conv2d(4, 4, 3, padding=1, padding_mode="circular")),
    "transposed": frozen(nn.ConvTranspose2d(4, 6, 3, stride=2, output_padding=1, groups=2, dilation=2)),
    "conv1d": frozen(nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 6, 3))),
    "conv3d": frozen(nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, (1, 3, 3), padding=(0, 1, 1)))),
    "unbatched": lambda x, conv=frozen(nn.Conv2d(4, 6, 3)): conv.to(x.dtype)(x[0]),
    "functional": lambda x, w=torch.randn(5, 4, 3, 3): F.conv2d(input=x, weight=w.to(x), stride=[2]),
    "relu": nn.ReLU(),
    "relu-in-place": nn.ReLU(inplace=True),
    "relu-functions": lambda x: F.relu(x - 0.1) + torch.relu(x + 0.1) + (-x).relu(),
    "relu-methods": lambda x: torch.relu_(x - 0.1) + (x * 2).relu_() + F.relu(input=x, inplace=False),
    "relu-of-a-view": lambda x: (z := x * 1, z[:, 1].relu_(), z)[2],
    "relu-of-a-slice": lambda x: F.relu(x[:, 1:3]),
    "relu-transposed": lambda x: F.relu(x.transpose(2, 3)) * 3,
    "relu-of-rows": lambda x: F.relu(x.flatten(1)),
    "relu6": nn.ReLU6(),
    "relu6-in-place": nn.ReLU6(inplace=True),
    "relu6-functions": lambda x: F.relu6(x * 20) + F.relu6(-x * 20, inplace=True),
    "hardtanh": nn.Hardtanh(-0.25, 0.125),
    "hardtanh-uneven": nn.Hardtanh(-0.2, 0.3),
    "hardtanh-uneven-in-place": nn.Hardtanh(-0.2, 0.3, inplace=True),
    "hardtanh-functions": lambda x: F.hardtanh(x * 3) + F.hardtanh_(x * 2, -1, 0.5) + F.hardtanh(x, -1, 1),
    "leaky": nn.LeakyReLU(0.2),
    "leaky-in-place": nn.LeakyReLU(inplace=True),
    "leaky-functions": lambda x: F.leaky_relu(x) + F.leaky_relu_(x * 2, 0.3) + F.leaky_relu(x, negative_slope=-0.5),
    "leaky-of-a-view": lambda x: (z := x * 1, F.leaky_relu_(z[:, 1]), z)[2],
    "leaky-transposed": lambda x: F.leaky_relu(x.transpose(2, 3)) * 3,
    "relu-of-a-line": lambda x: F.relu(x.flatten()),
    "max": nn.MaxPool2d(2),
    "max-overlapping": nn.MaxPool2d(3, 2, 1),
    "max-dilated": nn.MaxPool2d((2, 3), (2, 1), (1, 1), dilation=(3, 2)),
    "max-ceil": nn.MaxPool2d(3, 2, ceil_mode=True),
    "max-wide": lambda x: F.max_pool2d(F.pad(x, (0, 300)), (2, 5), 1),
    "max-huge": lambda x: F.max_pool2d(F.pad(x, (0, 40000)), 2, 1),
    "max-indices": lambda x: F.max_pool2d(x, 2, return_indices=True)[0],
    "max-unbatched": lambda x: F.max_pool2d(x[0], kernel_size=[2]),
    "max-ties": lambda x: F.max_pool2d(x.clamp(0.4, 0.6), 3, 1),
    "avg": nn.AvgPool2d(3, 2, 1),
    "avg-others": lambda x: F.avg_pool2d(x, [2], ceil_mode=True, count_include_pad=False, divisor_override=3),
    "adaptive": nn.AdaptiveAvgPool2d(3),
}


@pytest.mark.filterwarnings("ignore:Using padding='same' with even kernel lengths")
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels_last"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", LAYERS)
def test_layers_give_pytorchs_values_and_gradients(name, dtype, last):
    layer = LAYERS[name].to(dtype) if isinstance(LAYERS[name], nn.Module) else LAYERS[name]
    x = torch.rand(SHAPE, generator=torch.Generator().manual_seed(0)).sub(0.5).to(dtype)
    (y, dx), (frozen_y, frozen_dx) = both(layer, x, last)
    assert torch.equal(frozen_y, y) and frozen_y.stride() == y.stride()
    assert torch.equal(frozen_dx, dx) and dx.abs().max() > 0


@pytest.mark.parametrize("affine", [False, True])
@pytest.mark.parametrize("x_dtype, norm_dtype", [(torch.float64,) * 2, (torch.float32,) * 2,
                                                 (torch.bfloat16, torch.float32)])
def test_normalisation_by_constant_statistics(x_dtype, norm_dtype, affine):
    norm = nn.BatchNorm2d(4, affine=affine)
    norm(torch.rand(SHAPE) * 3 - 1)
    norm = frozen(norm).to(norm_dtype)
    x = torch.rand(SHAPE).to(x_dtype)
    (y, dx), (frozen_y, frozen_dx) = both(norm, x, True)
    assert torch.equal(frozen_y, y)
    assert (frozen_dx - dx).abs().max() <= 2 * torch.finfo(x_dtype).eps * dx.abs().max()


@pytest.mark.parametrize("slope", [0.0, 0.25])
def test_a_leaky_relu_of_nan_and_infinities(slope):
    x = torch.tensor([math.nan, math.inf, -math.inf, 0.0, -0.0, 2.0, -2.0, 1e-45] * 9).view(8, 9)
    (y, dx), (frozen_y, frozen_dx) = both(lambda h: F.leaky_relu(h, slope), x, False)
    assert torch.equal(frozen_dx, dx) and torch.equal(frozen_y.view(torch.int32), y.view(torch.int32))


def test_a_clipped_nan_stops_the_gradient():
    x = torch.tensor([[math.nan, -1.0, 1.0, 0.5, math.inf]])
    _, (y, dx) = both(lambda h: F.hardtanh(h), x, False, torch.ones_like)
    assert y[0, 0].isnan() and y[0, 1:].tolist() == [-1, 1, 0.5, 1] and dx.tolist() == [[0, 0, 0, 1, 0]]


def test_gradients_in_another_memory_format():
    for name in ("relu", "max-overlapping", "conv", "avg"):
        for last, format in ((True, torch.contiguous_format), (False, torch.channels_last)):
            def grad(y, format=format):
                return torch.rand(y.shape, generator=torch.Generator().manual_seed(2)).contiguous(memory_format=format)

            layer = LAYERS[name].float() if isinstance(LAYERS[name], nn.Module) else LAYERS[name]
            (_, dx), (_, frozen_dx) = both(layer, torch.rand(SHAPE) - 0.5, last, grad)
            assert torch.equal(dx, frozen_dx)


# ---- networks ----------------------------------------------------------------------------------------------------

class Block(nn.Module):
    def __init__(self, i: int, o: int, stride: int, inplace: bool):
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(i, o, 3, stride, 1, bias=False), nn.BatchNorm2d(o)
        self.conv2, self.norm2 = nn.Conv2d(o, o, 3, 1, 1, bias=False), nn.BatchNorm2d(o)
        self.down = nn.Sequential(nn.Conv2d(i, o, 1, stride, bias=False), nn.BatchNorm2d(o)) if stride > 1 else None
        self.act, self.inplace = nn.ReLU(inplace), inplace

    def forward(self, x):
        shortcut = x if self.down is None else self.down(x)
        x = self.norm2(self.conv2(self.act(self.norm1(self.conv1(x)))))  # one activation, called twice
        if self.inplace:
            x += shortcut
        else:
            x = x + shortcut
        return self.act(x)


def residual_net(inplace: bool = True) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(inplace),
                        nn.MaxPool2d(3, 2, 1), Block(16, 16, 1, inplace), Block(16, 32, 2, inplace),
                        Block(32, 32, 1, inplace), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10))
    net(torch.rand(8, 3, 32, 32))
    return net.eval()


class Concat(nn.Module):
    """A convolution whose result has two users, a layer that is called twice, and branches that are joined."""

    def __init__(self):
        super().__init__()
        self.conv, self.again, self.fc = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 4, 1), nn.Linear(12, 10)

    def forward(self, x):
        z = self.conv(x)
        a, b = F.relu(z), torch.sigmoid(z)
        return self.fc(torch.cat([a, b, self.again(F.relu_(self.again(a * b)))], 1).mean((2, 3)))


class Gate(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv2d(3, 8, 3), nn.Linear(8, 10)

    def forward(self, x):
        x = F.gelu(self.conv(x))
        return self.fc((x * x.mean((2, 3), keepdim=True).sigmoid() if x.sum() > -1e9 else x).amax((2, 3)))


NETS = {"small": lambda: small_net(size=32), "residual": residual_net,
        "residual-out-of-place": lambda: residual_net(False), "concat": Concat, "untraceable": Gate}


@pytest.mark.parametrize("name", NETS)
def test_networks_give_the_plain_modules_gradients(name):
    torch.manual_seed(0)
    net, (x, y) = NETS[name]().eval(), batch(8, size=32)
    logits, grad = [], []
    for dtype in (torch.float32, torch.float64):
        grad += [(g := gradient(net.to(dtype), x.to(dtype), y))[0]]
        logits += [g[1]]
    got = ea.Source(net, dtype=torch.float64, channels_last=False).input_grad(x.double(), y, rescale=False)
    assert (got.logits - logits[1]).abs().max() <= 1e-9 * logits[1].abs().max()
    assert (got.grad - grad[1]).abs().max() <= 1e-9 * grad[1].abs().max()
    got = ea.Source(net.float(), dtype=torch.float32).input_grad(x, y, rescale=False)
    assert (got.logits - logits[1]).norm() <= 2 * (logits[0] - logits[1]).norm() + 1e-7
    assert (got.grad - grad[1]).norm() <= 2 * (grad[0] - grad[1]).norm() + 1e-7 * grad[1].norm()


def test_hooks_see_what_they_would_see():
    net, (x, y) = small_net(size=32).eval(), batch(4, size=32)
    seen = {0: [], 2: [], 6: []}
    for i, values in seen.items():
        net[i].register_forward_hook(lambda m, args, out, values=values: values.append(out.detach().clone()))
    gradient(net, x, y)
    ea.Source(net, dtype=torch.float32, channels_last=False).input_grad(x, y)
    assert all(len(v) >= 2 and torch.allclose(v[0], v[-1], atol=1e-5) for v in seen.values())


def test_what_needs_gradients_elsewhere_is_left_alone():
    conv, norm, x = nn.Conv2d(4, 4, 3), nn.BatchNorm2d(4), torch.rand(SHAPE, requires_grad=True)
    with FrozenPass():
        norm(conv(x)).sum().backward()
        with pytest.raises(RuntimeError, match="leaf Variable that requires grad"):
            F.relu(x, inplace=True)
    assert conv.weight.grad is not None and norm.weight.grad is not None and norm.num_batches_tracked == 1


def test_in_place_changes_of_what_others_kept_are_noticed():
    x = torch.rand(SHAPE, requires_grad=True)
    with FrozenPass():
        z = (x * 1).sigmoid()
        y = F.relu(z, inplace=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.sum().backward()


@pytest.mark.parametrize("layer", [nn.ReLU(), frozen(nn.Conv2d(4, 4, 3)), nn.MaxPool2d(2), nn.AvgPool2d(2),
                                   frozen(nn.BatchNorm2d(4))], ids=lambda m: type(m).__name__)
def test_a_second_differentiation_is_refused(layer):
    x = torch.rand(SHAPE, requires_grad=True)
    with FrozenPass():
        y = layer(x * 1)
    with pytest.raises(RuntimeError, match="fold=False"):
        torch.autograd.grad(y.sum(), x, create_graph=True)


# ---- ReLUs in place and with the sum before ----------------------------------------------------------------------

class Two(nn.Module):
    """Two convolutions and a ReLU, put together by a function."""

    def __init__(self, run, **parts):
        super().__init__()
        self.a, self.b, self.relu, self.norm = nn.Conv2d(3, 6, 1), nn.Conv2d(3, 6, 1), nn.ReLU(), nn.BatchNorm2d(6)
        for name, part in parts.items():
            setattr(self, name, part)
        self.run = run

    def forward(self, x):
        return self.run(self, x).flatten(1)[:, :10]


class OwnConv(nn.Conv2d):
    def forward(self, x):
        return super().forward(x) + super().forward(-x) * 2


def in_place_sum(m, x):
    z = m.norm(m.a(x))
    z += m.b(x)
    return m.relu(z)


def shared_sum(m, x):
    z = m.a(x)
    z += m.b(x)
    return m.relu(z) + z


def kept_result(m, x):
    z = m.a(x)
    y = m.relu(z + m.b(x))
    return torch.cat([y, z], 1)


def written_result(m, x):
    z = m.a(x)
    w = z.sigmoid()
    z += m.b(x)
    return torch.cat([m.relu(z), w], 1)


# name: (net, what is proved about its sums, does the ReLU module work in place)
BOTH, FRESH, NONE = ReluPlan(True, True), ReluPlan(True, False), ReluPlan(False, False)
JOINS = {
    "in-place": (Two(in_place_sum), BOTH, False),
    "out-of-place": (Two(lambda m, x: F.relu(m.a(x) + m.b(x))), BOTH, False),
    "method": (Two(lambda m, x: m.a(x).add(m.b(x)).relu()), BOTH, False),
    "method-in-place": (Two(lambda m, x: m.a(x).add_(m.b(x)).relu_()), BOTH, False),
    "two-at-once": (Two(lambda m, x: (lambda s, t: F.relu(s) * F.relu(t))(m.a(x) + m.b(x), m.a(x) + m.a(x))), BOTH,
                    False),
    "sizes": (Two(lambda m, x: F.relu(m.a(x) + m.b(x).mean((2, 3), keepdim=True))), BOTH, False),
    "operand-kept": (Two(kept_result), FRESH, False),
    "layer": (Two(lambda m, x: m.relu(m.norm(m.a(x)))), BOTH, True),
    "layer-twice": (Two(lambda m, x: m.relu(m.a(x)) * m.relu(m.b(x))), BOTH, True),
    "layer-shared": (Two(lambda m, x: m.relu(z := m.a(x)) * z), BOTH, False),
    "layer-or-not": (Two(lambda m, x: m.relu(m.a(x)) * m.relu(m.b(x) * 2)), BOTH, False),
    "sum-shared": (Two(shared_sum), NONE, False),
    "sum-over-kept": (Two(written_result), FRESH, False),
    "scaled": (Two(lambda m, x: F.relu(torch.add(m.a(x), m.b(x), alpha=2))), NONE, False),
    "no-relu": (Two(lambda m, x: F.relu(m.a(x) + m.b(x)) + m.a(x)), NONE, False),
    "own-layer": (Two(lambda m, x: F.relu(m.a(x) + m.b(x)), a=OwnConv(3, 6, 1)), NONE, False),
    "own-relu": (Two(lambda m, x: m.relu(m.a(x) + m.b(x)), relu=type("Own", (nn.ReLU,), {})()), BOTH, False),
    "encoder": (Two(lambda m, x: F.relu(m.a(x) + m.b(x)).flatten(2).mT.add(m.c(x.flatten(2).mT.repeat(1, 1, 2))).relu(),
                    c=nn.TransformerEncoderLayer(6, 2, 6)), NONE, False),
}


@pytest.mark.parametrize("name", JOINS)
def test_which_sums_are_fused(name):
    torch.manual_seed(0)
    net, plan, inplace = JOINS[name]
    net = copy.deepcopy(net).eval()
    (x, y), source = batch(), ea.Source(net, dtype=torch.float64, channels_last=False)
    assert (source._relu_plan, source.module.relu.inplace) == (plan, inplace)
    assert not net.relu.inplace
    grad, logits = gradient(net.double(), x.double(), y)
    got = source.input_grad(x.double(), y, rescale=False)
    assert (got.logits - logits).abs().max() <= 1e-9 and (got.grad - grad).abs().max() <= 1e-9 * grad.abs().max()


@pytest.mark.parametrize("inplace", [False, True])
def test_joined_sums_are_one_function(inplace):
    source = ea.Source(residual_net(inplace), dtype=torch.float32)
    logits = source.logits(batch(2, size=32)[0].requires_grad_())
    names, todo = [], {logits.grad_fn}
    seen = set()
    while todo:
        node = todo.pop()
        seen.add(node)
        names.append(node.name())
        todo |= {n for n, _ in node.next_functions if n is not None} - seen
    assert names.count("ReluBackward") == 7 and "AddBackward0" not in names


def test_a_hook_on_a_relu_sees_the_sum():
    net = Two(in_place_sum).eval()
    seen = []
    net.relu.register_forward_pre_hook(lambda m, args: seen.append(args[0].min().item()))
    source = ea.Source(net, dtype=torch.float32)
    source.input_grad(*batch())
    assert source._relu_plan == NONE and seen[-1] < 0


# ---- memory ------------------------------------------------------------------------------------------------------

def kept(net: nn.Module, x: torch.Tensor, **kw) -> tuple[int, int]:
    """What the plain module's forward keeps, and what a source's does."""
    source = ea.Source(net, **kw)
    return kept_bytes(net, net, x), kept_bytes(source.module, source.logits, x)


def test_the_count_of_what_is_kept():
    net, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.ReLU()), torch.rand(1, 3, 10, 10)
    assert kept_bytes(net, net, x) == 4 * 4 * 64  # the inner result; x and the outer result are the caller's

    class Hides(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            ctx.hidden = [lambda t=x * 2: t]
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            return grad

    assert kept_bytes(net, Hides.apply, x) == 4 * 300


@pytest.mark.parametrize("inplace", [False, True])
def test_a_relu_network_keeps_less_than_a_fifteenth(inplace):
    net, x = residual_net(inplace), torch.rand(4, 3, 64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        plain, ours = kept(net, x, dtype=dtype)
        assert 0 < ours <= plain / 15
    bits = 4 * (16 * 32 * 32 + 4 * 16 * 16 * 16 // 2 + 3 * 32 * 8 * 8) // 8
    indices = 4 * 16 * 16 * 16
    assert kept(net, x, dtype=torch.float32)[1] <= 2 * (bits + indices)


@pytest.mark.parametrize("act", [nn.ReLU6, lambda: nn.Hardtanh(-0.5, 2.0), lambda: nn.LeakyReLU(0.1)],
                         ids=["relu6", "hardtanh", "leaky"])
def test_clipped_and_leaky_networks_too(act):
    def block(i, o, groups=1):
        return nn.Conv2d(i, o, 3, padding=1, groups=groups, bias=False), nn.BatchNorm2d(o), act()

    net = nn.Sequential(*block(3, 16), *block(16, 16, 16), *block(16, 32), nn.AvgPool2d(2), *block(32, 32, 32),
                        nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(32, 10)).eval()
    x = torch.rand(4, 3, 32, 32)
    for dtype in (torch.float32, torch.bfloat16):
        plain, ours = kept(net, x, dtype=dtype)
        assert 0 < ours <= plain / 15


@pytest.mark.parametrize("name, share", [("resnet50", 50), ("resnet18", 30), ("vgg11_bn", 25), ("densenet121", 40),
                                         ("mobilenetv2_100", 15)])
def test_timm_networks_keep_little(name, share):
    timm = pytest.importorskip("timm")
    plain, ours = kept(timm.create_model(name).eval(), torch.rand(1, 3, 224, 224), dtype=torch.bfloat16)
    assert ours <= plain / share


def test_without_permission_nothing_changes():
    net, (x, _) = residual_net(), batch(4, size=32)
    for kw in ({"fold": False}, {"crafting": "train"}, {"live": True}):
        source = ea.Source(net, **kw, **({"dtype": None} if "live" in kw else {"dtype": torch.float32}))
        leaf = x.clone().requires_grad_()
        assert torch.autograd.grad(source.logits(leaf).sum(), leaf, create_graph=True)[0].requires_grad
