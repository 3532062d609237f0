"""Our CleverHans: the library's own numbers, errors and draws in exact precision, our engine in fast."""
import importlib.util
import inspect
import types
import warnings

import numpy as np
import pytest
import torch
from backends import runs_without, same, says_another_version
from networks import batch, small_net, trained
from torch import nn

import ensadv_fast as ea
from ensadv_fast import compat
from ensadv_fast.compat import cleverhans as ours

peer = pytest.mark.skipif(importlib.util.find_spec("cleverhans") is None,
                          reason="cleverhans is not installed: nothing is compared with it")
FGM, PGD = "fast_gradient_method", "projected_gradient_descent"
EPS = {np.inf: 8 / 255, 2: 0.5, 1: 0.5}
CLIP = {"clip_min": 0.0, "clip_max": 1.0}


@pytest.fixture
def theirs():
    modules = [importlib.import_module(f"cleverhans.torch.attacks.{name}") for name in (FGM, PGD)]
    return types.SimpleNamespace(modules=modules, **{m.__name__.split(".")[-1]: getattr(m, m.__name__.split(".")[-1])
                                                     for m in modules})


@pytest.fixture(scope="module")
def easy():
    return trained()


def attack(library, name, net, x, norm, **kw):
    """The result, and what torch's generator gives next."""
    torch.manual_seed(3)
    eps = kw.get("eps", EPS.get(norm, 0.1))
    sizes = {"eps": eps, "norm": norm} | ({"eps_iter": abs(eps) / 4, "nb_iter": 8} if name == PGD else {})
    return getattr(library, name)(net, x, **(sizes | kw)), torch.rand(1)


def compared(theirs, name, x, norm, net, **kw):
    """Both on networks of the same weights; the library's own moves statistics and gradients."""
    wanted, after = attack(theirs, name, net(), x, norm, **kw)
    mine, left = attack(ours, name, net(), x, norm, **kw)
    same(mine, wanted.detach(), name == FGM)
    assert torch.equal(left, after)
    return mine


# ---- exact: their numbers --------------------------------------------------------------------------------------------

@peer
@pytest.mark.parametrize(("channels", "size"), [(3, 28), (1, 28), (3, 40)])
@pytest.mark.parametrize("norm", [np.inf, 2, 1])
@pytest.mark.parametrize("name", [FGM, PGD])
def test_the_librarys_numbers_and_draws(name, norm, channels, size, theirs):
    if (name, norm) == (PGD, 1):
        return  # neither has it
    x, y = batch(6, channels, size)
    for training in (False, True):  # dropout draws, batch normalisation computes by the batch
        def net():
            return small_net(channels=channels, size=size).train(training)

        for kw in ({}, {"y": y}, {"y": y, "targeted": True, **CLIP}, {**CLIP, "targeted": True}):
            compared(theirs, name, x, norm, net, **kw)


@peer
@pytest.mark.parametrize("kw", [{"rand_init": False}, {"rand_minmax": 0.001}, {"rand_minmax": 0.5}, {"nb_iter": 0},
                                {"nb_iter": 3, "eps": np.float32(0.1), "clip_min": -1, "clip_max": 2}])
@pytest.mark.parametrize("norm", [np.inf, 2])
def test_every_argument(norm, kw, theirs):
    x, _ = batch(6, 3, 28)
    compared(theirs, PGD, x, norm, lambda: small_net(size=28).eval(), **kw)


@peer
@pytest.mark.parametrize("norm", [np.inf, 2])
@pytest.mark.parametrize("name", [FGM, PGD])
def test_float64(name, norm, theirs, monkeypatch):
    x, y = batch(6, 3, 28)
    proxy = types.SimpleNamespace(**vars(torch))
    proxy.float = torch.float64  # the library makes float32 of everything
    for module in theirs.modules:
        monkeypatch.setattr(module, "torch", proxy)
    mine = compared(theirs, name, x.double(), norm, lambda: small_net(size=28).eval().double(), y=y)
    assert mine.dtype == torch.float64


@peer
def test_images_of_224_pixels(theirs):
    def net():
        torch.manual_seed(0)
        return nn.Sequential(nn.Conv2d(3, 4, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(),
                             nn.Linear(64, 10))

    x, _ = batch(2, 3, 224)
    for norm in (np.inf, 2):
        compared(theirs, PGD, x, norm, net, **CLIP)


@peer
@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.uint8], ids=str)
def test_other_dtypes_become_float32_as_theirs(dtype, theirs):
    x, y = batch(6, 3, 28)
    x = (x * 255).to(dtype) if dtype == torch.uint8 else x.to(dtype)
    mine = compared(theirs, FGM, x, np.inf, lambda: small_net(size=28).eval(), y=y)
    assert mine.dtype == torch.float32


@peer
def test_any_callable_and_any_rank(theirs):
    weight = torch.randn(7, 4, generator=torch.Generator().manual_seed(0))
    x = torch.randn(5, 7, generator=torch.Generator().manual_seed(1))
    for name in (FGM, PGD):
        compared(theirs, name, x, 2, lambda: lambda images: images.tanh() @ weight)
    targets = torch.rand(5, 4, generator=torch.Generator().manual_seed(2)).softmax(1)  # of probabilities
    compared(theirs, PGD, x, np.inf, lambda: lambda images: images.tanh() @ weight, y=targets)


@peer
@pytest.mark.gpu
def test_on_a_gpu(theirs):
    x, y = (t.cuda() for t in batch(6, 3, 28))
    net = small_net(size=28).eval().cuda()
    for norm in (np.inf, 2):
        mine, wanted = (attack(library, PGD, net, x, norm, y=y, sanity_checks=library is ours, **CLIP)[0]
                        for library in (ours, theirs))  # of tensors on a GPU the library cannot take np.all
        same(mine, wanted.detach())


@peer
def test_signatures(theirs):
    for name in ours.__all__:
        mine, wanted = (inspect.signature(getattr(library, name)).parameters for library in (ours, theirs))
        shared = [(p.name, p.default, p.kind) for p in mine.values() if p.name != "precision"]
        assert shared == [(p.name, p.default, p.kind) for p in wanted.values()]


# ---- errors and sanity checks ----------------------------------------------------------------------------------------

BAD = [
    (FGM, {"norm": 3}, ValueError, "norm must be np.inf, 1 or 2, got 3"),
    (FGM, {"eps": -0.1}, ValueError, "eps must be >= 0, got -0.1"),
    (FGM, {"clip_min": 0.5, "clip_max": -0.5}, ValueError, "clip_min must not exceed clip_max"),
    (FGM, {"clip_min": 0.0}, ValueError, "both or neither, got 0.0 and None"),
    (FGM, {"clip_min": 0.5, "clip_max": 0.6, "sanity_checks": True}, AssertionError, "x must be in"),
    (PGD, {"norm": 1}, NotImplementedError, "norm must be np.inf or 2"),
    (PGD, {"norm": 3}, ValueError, "norm must be np.inf or 2, got 3"),
    (PGD, {"eps": -0.1}, ValueError, "eps must be >= 0, got -0.1"),
    (PGD, {"eps_iter": -0.1}, ValueError, "eps_iter must be >= 0, got -0.1"),
    (PGD, {"eps_iter": 0.5}, AssertionError, "eps_iter must not exceed eps"),
    (PGD, {"clip_max": 1.0}, ValueError, "both or neither, got None and 1.0"),
    (PGD, {"clip_min": 0.1, "clip_max": 1.0}, AssertionError, "x must be in"),
    (PGD, {"eps": 1.5, **CLIP}, AssertionError, "eps must not exceed clip_max - clip_min"),
]


@peer
@pytest.mark.parametrize(("name", "kw", "error", "message"), BAD)
def test_the_librarys_errors(name, kw, error, message, theirs):
    x, _ = batch(2)
    net, kw = small_net().eval(), {"norm": np.inf} | kw
    with pytest.raises(error):
        attack(theirs, name, net, x, **kw)
    with pytest.raises(error, match=f"{name}: .*{message}"):
        attack(ours, name, net, x, **kw)


def test_bad_arguments_of_our_own():
    x, y = batch(2)
    net = small_net().eval()
    with pytest.raises(ValueError, match=f"{FGM}: precision must be None, exact, fast, got 'quick'"):
        ours.fast_gradient_method(net, x, 0.1, np.inf, precision="quick")
    with pytest.raises(TypeError, match=f"{PGD}: x must be a torch.Tensor, got ndarray"):
        ours.projected_gradient_descent(net, x.numpy(), 0.1, 0.1, 1, 2)
    with pytest.raises(TypeError, match=f"{FGM}: y must be a torch.Tensor, got list"):
        ours.fast_gradient_method(net, x, 0.1, np.inf, y=y.tolist())


def test_no_size_gives_the_very_images():
    x, _ = batch(2)
    for norm in (np.inf, 2):
        assert ours.fast_gradient_method(None, x, 0, norm) is x
        assert ours.projected_gradient_descent(None, x, 0, 0.1, 1, norm) is x
        assert ours.projected_gradient_descent(None, x, 0.1, 0, 1, norm) is x


def test_sanity_checks_look_at_the_images_once_and_only_where_asked_for(monkeypatch):
    x, _ = batch(2)
    net, seen = small_net().eval(), []
    monkeypatch.setattr(torch.Tensor, "__bool__", lambda self, own=torch.Tensor.__bool__: seen.append(1) or own(self))
    for checks, count in ((False, 0), (True, 1)):
        seen.clear()
        ours.projected_gradient_descent(net, x, 0.1, 0.1, 3, np.inf, **CLIP, sanity_checks=checks)
        assert len(seen) == count


# ---- what is left alone ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", [FGM, PGD])
def test_the_model_is_left_as_it_was(name, precision):
    net = small_net()
    net[1].eval()  # a frozen part of a model in training
    net[0].weight.grad = torch.ones_like(net[0].weight)
    modes, statistics = [m.training for m in net.modules()], [b.clone() for b in net.buffers()]
    x, y = batch()
    x.requires_grad_()

    def check():
        assert [m.training for m in net.modules()] == modes
        assert all(m.track_running_stats for m in (net[1], net[5]))
        assert all(map(torch.equal, net.buffers(), statistics))
        assert (net[0].weight.grad == 1).all() and all(p.grad is None for p in list(net.parameters())[1:])
        assert x.grad is None

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # fast is exact in training mode
        adv, _ = attack(ours, name, net, x, np.inf, y=y, precision=precision)
        check()
        handle = net[-1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attack(ours, name, net, x, np.inf, y=y, precision=precision)
        handle.remove()
        check()
    assert not adv.requires_grad and adv.is_leaf and not torch.equal(adv, x)


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", [FGM, PGD])
def test_where_autograd_is_off(name, precision, around):
    net, (x, y) = small_net().eval(), batch(2)
    with around():
        adv, _ = attack(ours, name, net, x.clone(), np.inf, y=y.clone(), precision=precision)
        predicted, _ = attack(ours, name, net, x.clone(), 2, precision=precision)
    for result in (adv, predicted):
        assert not torch.equal(result, x) and not result.requires_grad


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", [FGM, PGD])
def test_sixteen_bits_keep_the_budget(name, dtype):
    net, (x, y) = small_net().eval().to(dtype), batch()
    x = x.to(dtype)
    for norm in (np.inf, 2):
        adv, _ = attack(ours, name, net, x, norm, y=y, **CLIP)
        assert adv.dtype == dtype and 0 <= adv.min() and adv.max() <= 1 and (adv != x).any()
        delta = (adv.double() - x.double()).flatten(1)
        length = delta.abs().amax(1) if norm == np.inf else delta.norm(dim=1)
        assert (length <= torch.tensor(EPS[norm]).double() * (1 if norm == np.inf else 1 + 1e-6)).all()


def test_a_gradient_of_nan_moves_nothing():
    class Bad(nn.Module):
        def forward(self, x):
            bad = torch.where(x > 0.5, x.sqrt() - torch.zeros_like(x).sqrt() * (x - x), x)  # NaN backward, not forward
            return torch.stack([bad.flatten(1).sum(1), -bad.flatten(1).sum(1)], 1)

    x, _ = batch(4)
    for name in (FGM, PGD):
        for norm in (np.inf, 2):
            assert attack(ours, name, Bad(), x, norm, y=torch.zeros(4).long())[0].isfinite().all()


# ---- fast ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("kw", [{}, {"targeted": True}, {"y": None}])
@pytest.mark.parametrize("norm", [np.inf, 2])
@pytest.mark.parametrize("name", [FGM, PGD])
def test_fast_is_as_strong(name, norm, kw, easy):
    net, x, y = easy
    losses = {}
    for precision in ("exact", "fast"):
        ea.manual_seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adv, _ = attack(ours, name, net, x, norm, precision=precision, **({"y": y} | kw))
        assert (adv.dtype, adv.shape, adv.requires_grad) == (x.dtype, x.shape, False)
        delta = (adv - x).flatten(1)
        assert (delta.abs().amax(1) if norm == np.inf else delta.norm(dim=1)).max() <= EPS[norm] + 1e-6
        losses[precision] = nn.functional.cross_entropy(net(adv), y).item()
    clean = nn.functional.cross_entropy(net(x), y).item()
    assert (losses["fast"] - clean) / (losses["exact"] - clean) > 0.85


def test_fast_draws_by_our_keys_and_clips_nothing_unless_asked(easy):
    net, x, _ = easy
    found = []
    for seed in (1, 1, 2):
        ea.manual_seed(seed)
        state = torch.get_rng_state()
        found.append(ours.projected_gradient_descent(net, x * 4 - 2, 0.3, 0.1, 3, np.inf, precision="fast"))
        assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert found[0].min() < -1.5 and found[0].max() > 1.5
    boxed = ours.fast_gradient_method(net, x, 0.3, np.inf, 0.2, 0.8, precision="fast")
    assert boxed.min() >= 0.2 and boxed.max() <= torch.tensor(0.8)


@pytest.mark.parametrize(("name", "change", "why"), [
    (FGM, {"norm": 1}, "norm is 1"),
    (FGM, {"targeted": True}, "targeted, without labels"),
    (FGM, {"y": torch.full((6, 10), 0.1)}, "labels are not int64"),
    (PGD, {"nb_iter": 0}, "no step"),
    (PGD, {"rand_minmax": 0.01}, "rand_minmax is not eps"),
    (PGD, {"train": True}, "in training mode"),
    (PGD, {"double": True}, "float64"),
    (PGD, {"function": True}, "no torch.nn.Module"),
])
def test_what_a_source_cannot_do_is_exact_and_says_so(name, change, why):
    change = dict(change)
    if change.get("norm") == 1:
        pytest.importorskip("cleverhans")
    x, _ = batch(6)
    net = small_net().train(change.pop("train", False))
    if change.pop("double", False):
        net, x = net.double(), x.double()
    if change.pop("function", False):
        net = net.forward
    norm = change.pop("norm", np.inf)
    with pytest.warns(UserWarning, match=f"{name}: is exact, not fast, since .*{why}"):
        adv, _ = attack(ours, name, net, x, norm, precision="fast", **change)
    assert torch.equal(adv, attack(ours, name, net, x, norm, **change)[0])


# ---- install ---------------------------------------------------------------------------------------------------------

@peer
def test_install_and_uninstall(theirs):
    own = [getattr(m, name) for m, name in zip(theirs.modules, (FGM, PGD))]
    with compat.install("cleverhans"):
        from cleverhans.torch.attacks.fast_gradient_method import fast_gradient_method
        from cleverhans.torch.attacks.projected_gradient_descent import projected_gradient_descent
        assert fast_gradient_method is ours.fast_gradient_method
        assert projected_gradient_descent is ours.projected_gradient_descent
        assert theirs.modules[1].fast_gradient_method is ours.fast_gradient_method
        x, _ = batch(2)
        net = small_net().eval()
        assert torch.equal(ours.fast_gradient_method(net, x, 0.5, 1), own[0](net, x, 0.5, 1))  # L1 is still theirs
        with compat.precision("fast"):
            ea.manual_seed(0)
            fast = projected_gradient_descent(net, x, 0.1, 0.1, 1, np.inf)
            ea.manual_seed(0)
            assert torch.equal(fast, ours.projected_gradient_descent(net, x, 0.1, 0.1, 1, np.inf))
        import cleverhans.torch.attacks as package
        assert isinstance(package.fast_gradient_method, types.ModuleType)  # the module of the same name stays
    assert [getattr(m, name) for m, name in zip(theirs.modules, (FGM, PGD))] == own
    assert theirs.modules[1].fast_gradient_method is own[0]


@peer
def test_another_version_is_said(theirs, monkeypatch):
    says_another_version("cleverhans", "4.0.0", monkeypatch)


def test_without_the_library():
    runs_without("cleverhans", """
        import numpy as np, torch
        from ensadv_fast.compat import cleverhans as ours
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        x = torch.rand(2, 3, 2, 2)
        assert (ours.fast_gradient_method(net, x, 0.1, np.inf) - x).abs().max() <= 0.1 + 2**-24
        """, "ours.fast_gradient_method(net, x, 0.1, 1)")
