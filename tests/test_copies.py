"""Models as they come: kept tensors, complex ones, three dimensions, scripts, exports, wrappers, several threads."""
import io
import threading
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
import torch.nn.functional as F
from networks import batch, gradient, small_net
from torch import nn
from torch.nn.utils import prune

import ensadv_fast as ea

EXACT = {"dtype": torch.float32, "fold": False, "channels_last": False}
LIVE = {"live": True, "dtype": None, "fold": False, "channels_last": False}
scripts = pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated", "ignore:.*LeafSpec")


class Net(nn.Module):
    """It keeps its feature map, in itself and in a list in a dict."""

    def __init__(self, keeps: bool = True):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)
        self.keeps = keeps

    def forward(self, x):
        z = self.norm(self.conv(x))
        if self.keeps:
            self.map, self.maps = z, {"all": [z]}
        return self.fc(z.flatten(1))


def agrees(net: nn.Module, x: torch.Tensor | None = None, plain: nn.Module | None = None, **options) -> None:
    """A fast source, an exact one and a live one give the values of plain PyTorch on `plain`, by default the net."""
    x = batch()[0] if x is None else x
    y = torch.arange(len(x)) % 3
    grad, logits = gradient(net if plain is None else plain, x, y)
    for kind in ({"dtype": torch.float32}, EXACT, LIVE):
        got = ea.Source(net, **kind, **options).input_grad(x, y, rescale=False)
        assert (got.logits - logits).abs().max() <= 2e-6 * logits.abs().max().clamp(min=1)
        assert (got.grad - grad).abs().max() <= 2e-5 * grad.abs().max() and grad.abs().max() > 0


def used(net: nn.Module) -> nn.Module:
    """In eval mode, after a forward pass that left tensors with a history behind."""
    net.eval()(batch()[0])
    return net


def test_kept_activations_are_copied_without_their_history():
    torch.manual_seed(0)
    net = used(Net())
    agrees(net)
    source = ea.Source(net)
    assert net.map.requires_grad and not source._original.map.requires_grad
    assert source._original.map is source._original.maps["all"][0] is not net.map


@pytest.mark.filterwarnings("ignore:.*weight_norm.*is deprecated")
@pytest.mark.parametrize("change", [nn.utils.weight_norm, nn.utils.parametrizations.weight_norm,
                                    lambda m: prune.l1_unstructured(m, "weight", 0.5), nn.utils.spectral_norm])
def test_layers_whose_weights_are_computed(change):
    torch.manual_seed(0)
    net = Net(keeps=False)
    change(net.conv)
    agrees(used(net))


def test_what_cannot_be_copied_is_named():
    net = nn.Sequential(Net(), nn.Identity())
    net[0].feed = (i for i in range(3))
    with pytest.raises(TypeError, match=r"its attribute 0.feed \(generator\) cannot be .*live=True"):
        ea.Source(net)
    ea.Source(net, live=True)


class Spectral(nn.Module):
    """Complex weights in the frequency domain."""

    def __init__(self):
        super().__init__()
        self.weight, self.fc = nn.Parameter(torch.randn(3, 8, 5, dtype=torch.complex64)), nn.Linear(192, 5)

    def forward(self, x):
        return self.fc(torch.fft.irfft2(torch.fft.rfft2(x) * self.weight, s=(8, 8)).flatten(1))


def test_complex_parameters_keep_their_imaginary_part():
    torch.manual_seed(0)
    net = Spectral()
    agrees(net)
    assert ea.Source(net).dtype == torch.float32
    x, y = batch()
    found = ea.Source(net, dtype=torch.float32).calibrate(x, y % 5)
    assert found.signs > 0.999 and found.loss_increase == pytest.approx(1, abs=1e-3)


def test_calibrate_compares_with_the_model_as_it_came():
    """Where a cast makes another function of the model, the exact source does not share the mistake."""
    torch.manual_seed(0)
    net, (x, y) = Spectral(), batch()
    source = ea.Source(net, dtype=torch.float32)
    with torch.no_grad():
        source.module.weight.copy_(source.module.weight.real.to(torch.complex64))
    assert source.calibrate(x, y % 5).signs < 0.99


class Video(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv3d(3, 2, 3), nn.BatchNorm3d(2), nn.Linear(72, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).flatten(1))


class Mixed(nn.Module):
    """Frames in two dimensions, then time in three."""

    def __init__(self):
        super().__init__()
        self.one, self.two, self.fc = nn.Conv2d(3, 4, 3), nn.Conv3d(1, 2, 3), nn.Linear(64, 5)

    def forward(self, x):
        return self.fc(self.two(self.one(x).unsqueeze(1)).flatten(1))


class Mixture(nn.Module):
    """A kernel for each image, mixed from several [K, O, I, h, w] (CondConv)."""

    def __init__(self):
        super().__init__()
        self.kernels, self.route = nn.Parameter(torch.randn(2, 4, 3, 3, 3)), nn.Linear(3, 2)
        self.fc = nn.Linear(144, 5)

    def forward(self, x):
        n = x.shape[0]
        mixed = (self.route(x.mean((2, 3))).softmax(1) @ self.kernels.flatten(1)).view(n * 4, 3, 3, 3)
        z = F.conv2d(x.reshape(1, n * 3, *x.shape[2:]), mixed, groups=n)
        return self.fc(z.view(n, -1))


class Normalised(nn.Module):
    """The plain way: along dimension 1."""

    def __init__(self, net, mean, std):
        super().__init__()
        self.net, self.mean, self.std = net, torch.tensor(mean), torch.tensor(std)

    def forward(self, x):
        shape = (1, -1, *[1] * (x.dim() - 2))
        return self.net((x - self.mean.view(shape)) / self.std.view(shape))


class Series(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.fc = nn.Conv1d(3, 4, 3), nn.Linear(4, 5)

    def forward(self, x):
        return self.fc(self.conv(x).square().mean(-1))


SHAPES = {"video": (Video, (4, 3, 3, 8, 8)), "video-longer": (Video, (4, 3, 5, 8, 8)),
          "series": (Series, (4, 3, 3)), "series-longer": (Series, (4, 3, 9)),
          "rows": (lambda: nn.Linear(3, 5), (4, 3))}


@pytest.mark.parametrize("name", SHAPES)
def test_normalisation_is_along_dimension_1(name):
    torch.manual_seed(0)
    make, shape = SHAPES[name]
    net = make().eval()
    with torch.no_grad():
        x = torch.rand(shape)
        if isinstance(net, Video):
            net.fc = nn.Linear(net.norm(net.conv(x)).flatten(1).shape[1], 5)
    mean, std = [0.5, 0.4, 0.3], [0.2, 0.3, 0.1]
    agrees(net, x, Normalised(net, mean, std), mean=mean, std=std)
    agrees(net, x, Normalised(net, [0.5], [0.2]), mean=[0.5], std=[0.2])


@pytest.mark.parametrize("make", [Mixed, Mixture])
def test_weights_of_five_dimensions(make):
    torch.manual_seed(0)
    agrees(make().eval())
    assert ea.Source(make()).channels_last


class Script(nn.Module):
    def __init__(self):
        super().__init__()
        self.conv, self.norm, self.fc = nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.Linear(144, 5)

    def forward(self, x):
        return self.fc(self.norm(self.conv(x)).flatten(1))


def scripted() -> nn.Module:
    torch.manual_seed(0)
    return torch.jit.script(Script().eval())


def loaded() -> nn.Module:
    file = io.BytesIO()
    torch.jit.save(torch.jit.freeze(scripted()), file)
    file.seek(0)
    return torch.jit.load(file)


SCRIPTS = {"scripted": scripted, "frozen": lambda: torch.jit.freeze(scripted()), "loaded": loaded,
           "traced": lambda: torch.jit.trace(Script().eval(), batch()[0]),
           "inside": lambda: nn.Sequential(nn.Identity(), torch.jit.freeze(scripted()))}


@scripts
@pytest.mark.parametrize("name", SCRIPTS)
def test_scripts_live_and_frozen(name):
    torch.manual_seed(0)
    plain = Script().eval()
    torch.manual_seed(0)
    agrees(SCRIPTS[name](), plain=plain)
    x, y = batch()
    assert torch.isfinite(ea.pgd(0.1, steps=2)(SCRIPTS[name](), x, y % 5)).all()


@scripts
def test_exported_and_symbolically_traced_models():
    torch.manual_seed(0)
    x = batch()[0]
    plain = Script().eval()
    agrees(torch.export.export(plain, (x,)).module(), plain=plain)
    agrees(torch.fx.symbolic_trace(Script().eval()))


def test_layers_that_are_no_submodules():
    torch.manual_seed(0)
    net = Net(keeps=False).eval()
    norm = net.norm
    del net.norm
    object.__setattr__(net, "norm", norm)
    agrees(net)


@pytest.mark.parametrize("options", [{}, LIVE])
def test_lazy_modules_before_their_first_forward_pass(options):
    net = nn.Sequential(nn.LazyConv2d(4, 3), nn.Flatten(), nn.LazyLinear(5))
    with pytest.raises(ValueError, match="LazyConv2d before its first forward pass: call the model once"):
        ea.Source(net, **options)
    net(batch()[0])
    agrees(net)


# ---- threads -----------------------------------------------------------------------------------------------------

def in_threads(work, n: int = 8) -> list:
    """work(i) in four threads at once, i < n."""
    start = threading.Barrier(4)

    def begin(i):
        if i < 4:
            start.wait(30)
        return work(i)

    with ThreadPoolExecutor(4) as pool:
        return list(pool.map(begin, range(n)))


@pytest.mark.parametrize("kind", ["folded", "exact", "live", "live-training", "dropout", "live-dropout", "ensemble"])
def test_threads_give_what_one_thread_gives(kind):
    net = small_net().train(kind == "live-training")
    options = {"folded": {"dtype": torch.float32}, "exact": EXACT, "dropout": {**EXACT, "crafting": "train"},
               "live-dropout": {**LIVE, "crafting": "train"}}.get(kind, LIVE)

    def make():
        members = [ea.Source(net, **o) for o in ([LIVE, {"dtype": torch.float32}] if kind == "ensemble" else [options])]
        return ea.Ensemble(members) if kind == "ensemble" else members[0]

    source, attack, serial = make(), ea.pgd(0.1, steps=4), make()

    def work(i, source=source):
        x, y = batch(seed=i)
        return attack(source, x, y, key=ea.fresh_key(seed=i))

    state = torch.get_rng_state()
    found = in_threads(work)
    assert all(torch.equal(found[i], work(i, serial)) for i in range(8))
    assert net.training == (kind == "live-training") and torch.equal(state, torch.get_rng_state())


def test_plain_modules_attacked_by_threads_keep_their_modes():
    net, attack = small_net().train(), ea.pgd(0.1, steps=4)
    found = in_threads(lambda i: attack(net, *batch(seed=i), key=ea.fresh_key(seed=i)))
    assert all(m.training for m in net.modules())
    assert all(torch.equal(f, attack(net, *batch(seed=i), key=ea.fresh_key(seed=i))) for i, f in enumerate(found))


def test_sources_made_by_threads_while_others_run():
    """torch.fx patches nn.Module for all threads while it traces."""
    net, (x, y) = small_net().eval(), batch()
    wanted = ea.Source(net, dtype=torch.float32).input_grad(x, y).grad
    with torch.no_grad():
        logits = net(x)

    def work(i):
        if i % 2:
            return all(torch.equal(net(x).detach(), logits) for _ in range(50))
        return torch.equal(ea.Source(net, dtype=torch.float32).input_grad(x, y).grad, wanted)

    assert all(in_threads(work, 16))
    assert nn.Module.__call__ is type(net).__call__ and "fx" not in nn.Module.__call__.__module__
