"""Our torchattacks: torchattacks' own numbers, modes and files in exact precision, our engine in fast."""
import importlib.util
import inspect
import warnings
from dataclasses import replace

import pytest
import torch
from backends import runs_without, same, says_another_version
from networks import batch, small_net, trained
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ensadv_fast as ea
from ensadv_fast import compat
from ensadv_fast.compat import source_cache
from ensadv_fast.compat import torchattacks as ours

peer = pytest.mark.skipif(importlib.util.find_spec("torchattacks") is None,
                          reason="torchattacks is not installed: nothing is compared with it")
NAMES = [name for name in ours.__all__ if name != "MultiAttack"]
SINGLE = ("FGSM", "FFGSM")
LINF = [name for name in NAMES if name != "PGDL2"]
EPS = 8 / 255


@pytest.fixture
def theirs():
    import torchattacks
    return torchattacks


def setting(dtype=torch.float32, channels=3, size=28, n=6):
    net = small_net(channels=channels, size=size).to(dtype)
    x, y = batch(n, channels, size)
    return net, x.to(dtype), y


def seeded(attack, *args, seed=3):
    """The result, and what torch's generator gives next."""
    torch.manual_seed(seed)
    return attack(*args), torch.rand(1)


def modes_of(net):
    return [m.training for m in net.modules()]


# ---- exact: their numbers --------------------------------------------------------------------------------------------

@peer
@pytest.mark.parametrize(("channels", "size"), [(3, 28), (1, 28), (3, 64)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_librarys_numbers_and_draws(name, dtype, channels, size, theirs):
    if name == "TIFGSM" and (channels == 1 or dtype == torch.float64):
        pytest.skip("the library's TIFGSM takes float32 images of 3 channels alone")
    net, x, y = setting(dtype, channels, size)
    wanted, after = seeded(getattr(theirs, name)(net), x, y)
    mine, left = seeded(getattr(ours, name)(net), x, y)
    same(mine, wanted, name in SINGLE)
    assert torch.equal(left, after)


@peer
def test_tifgsm_takes_any_channels_and_dtype(theirs):
    net, x, y = setting(torch.float64)
    library = theirs.TIFGSM(net)
    library.stacked_kernel = library.stacked_kernel.double()  # what theirs needs to work
    same(seeded(ours.TIFGSM(net), x, y)[0], seeded(library, x, y)[0])
    net, x, y = setting(channels=1)
    adv = ours.TIFGSM(net)(x, y)
    assert 0 < (adv - x).abs().max() <= EPS + 2.0**-24


ARGUMENTS = {
    "FGSM": {"eps": 0.1}, "BIM": {"eps": 0.03, "steps": 0}, "RFGSM": {"eps": 0.1, "alpha": 0.2, "steps": 3},
    "FFGSM": {"alpha": 0.01}, "PGD": {"steps": 3, "random_start": False}, "MIFGSM": {"decay": 0.3, "steps": 4},
    "PGDL2": {"eps": 0.3, "random_start": False, "eps_for_division": 1e-3}, "NIFGSM": {"decay": 0.5, "alpha": 0.02},
    "DIFGSM": {"resize_rate": 1.2, "diversity_prob": 0.3, "decay": 1.0, "random_start": True},
    "TIFGSM": {"kernel_name": "linear", "len_kernel": 7, "resize_rate": 0.5, "diversity_prob": 1.0},
    "SINIFGSM": {"m": 3}, "VMIFGSM": {"N": 2, "beta": 1.0}, "VNIFGSM": {"N": 3, "steps": 3, "decay": 0.5},
}


class Pooled(nn.Sequential):
    """Takes images of any size."""

    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU(), nn.Dropout(0.5), nn.AdaptiveAvgPool2d(4),
                         nn.Flatten(), nn.Linear(128, 10))


@peer
@pytest.mark.parametrize("name", NAMES)
def test_every_argument(name, theirs):
    net, (x, y) = Pooled(), batch(6, 3, 28)
    for kw in (ARGUMENTS[name], *([{"kernel_name": "uniform"}] if name == "TIFGSM" else [])):
        wanted, after = seeded(getattr(theirs, name)(net, **kw), x, y)
        mine, left = seeded(getattr(ours, name)(net, **kw), x, y)
        same(mine, wanted, name in SINGLE)
        assert torch.equal(left, after)


def towards(attack, mode):
    """The attack in a mode."""
    if mode == "label":
        attack.set_mode_targeted_by_label(quiet=True)
    elif mode == "function":
        attack.set_mode_targeted_by_function(lambda images, labels: (labels + 1) % 10, quiet=True)
    elif mode == "random":
        attack.set_mode_targeted_random(quiet=True)
    elif mode.startswith("least"):
        attack.set_mode_targeted_least_likely(int(mode[-1]), quiet=True)
    return attack


@peer
@pytest.mark.parametrize("mode", ["label", "function", "random", "least likely 1", "least likely 3"])
@pytest.mark.parametrize("name", NAMES)
def test_targeted_modes(name, mode, theirs):
    net, x, y = setting()
    attacks = [towards(getattr(library, name)(net, eps=EPS), mode) for library in (theirs, ours)]
    (wanted, after), (mine, left) = (seeded(attack, x, y) for attack in attacks)
    same(mine, wanted, name in SINGLE)
    assert torch.equal(left, after)
    assert attacks[0].get_mode() == attacks[1].get_mode()
    assert repr(attacks[0]) == repr(attacks[1])


@peer
@pytest.mark.parametrize("name", NAMES)
def test_normalisation(name, theirs):
    net, x, y = setting()
    found = []
    for library in (theirs, ours):
        attack = getattr(library, name)(net)
        attack.set_normalization_used([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
        found.append(seeded(attack, attack.normalize(x), y)[0])
    same(found[1], found[0])


@peer
@pytest.mark.parametrize("flags", [(True,), (True, True), (True, False, True), (False, True, True)])
def test_training_modes(flags, theirs):
    net, x, y = setting()
    statistics = [b.clone() for b in net.buffers()]
    wanted_net = small_net(size=28)
    found = []
    for library, model in ((theirs, wanted_net), (ours, net)):
        attack = library.PGD(model, steps=3)
        attack.set_model_training_mode(*flags)
        found.append(seeded(attack, x, y)[0])
    same(found[1], found[0])
    assert all(map(torch.equal, net.buffers(), statistics))  # theirs move the running statistics


@peer
def test_signatures_and_interface(theirs):
    for name in ours.__all__:
        mine, wanted = (inspect.signature(getattr(library, name)).parameters for library in (ours, theirs))
        shared = [(p.name, p.default) for p in mine.values() if p.name != "precision"]
        assert shared == [(p.name, p.default) for p in wanted.values()]
        public = {m for m in dir(getattr(theirs, name)) if not m.startswith("_")}
        assert public <= set(dir(getattr(ours, name)))
        for method in public:
            mine, wanted = (inspect.signature(getattr(getattr(library, name), method)) for library in (ours, theirs))
            if "args" not in wanted.parameters:  # the library wraps its setters
                assert [*mine.parameters] == [*wanted.parameters], method
    assert set(ours.PASSED) | set(ours.__all__) == set(theirs.__all__)
    assert ours.CW is theirs.CW
    with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
        ours.Nothing


# ---- the base class --------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_model_is_left_as_it_was(precision):
    net, x, y = setting()
    net[1].eval()  # a frozen part of a model in training
    before, statistics = modes_of(net), [b.clone() for b in net.buffers()]
    attack = ours.PGD(net, steps=2, precision=precision)
    attack(x, y)
    attack.set_mode_targeted_least_likely(quiet=True)
    attack(x, y)
    handle = net[-1].register_forward_hook(lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        attack(x, y)
    handle.remove()
    assert modes_of(net) == before
    assert all(map(torch.equal, net.buffers(), statistics))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


def test_a_models_own_train_and_eval_are_called():
    class Merging(nn.Sequential):
        merged = 0

        def train(self, mode=True):
            self.merged += 1 if mode is False else -1
            return super().train(mode)

    net, (x, y) = Merging(*small_net().children()), batch()
    ours.FGSM(net)(x, y)
    assert net.merged == 0 and net.training


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", NAMES)
def test_where_autograd_is_off(name, precision, around):
    net, x, y = setting(n=2)
    attack = getattr(ours, name)(net, precision=precision)
    with around():
        adv = attack(x.clone(), y.clone())
    assert not torch.equal(adv, x) and not adv.requires_grad


def test_an_exception_keeps_the_normalisation():
    net, x, y = setting()
    attack = ours.FGSM(net)
    attack.set_normalization_used([0.5] * 3, [0.5] * 3)
    wanted = attack(attack.normalize(x), y)
    with pytest.raises(TypeError, match="FGSM: labels must be a torch.Tensor, got NoneType"):
        attack(x)
    assert torch.equal(attack(attack.normalize(x), y), wanted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", LINF)
def test_sixteen_bits_keep_the_budget(name, dtype):
    net, x, y = setting(dtype)
    adv = getattr(ours, name)(net, eps=EPS)(x, y)
    assert adv.dtype == dtype and 0 <= adv.min() and adv.max() <= 1
    assert (adv.double() - x.double()).abs().max() <= torch.tensor(EPS).double()
    assert (adv != x).any()


def test_a_vanishing_gradient_moves_nothing_and_stops_nothing():
    class Dead(nn.Module):
        """Its gradient is 0 for dark images."""

        def forward(self, x):
            mean = x.flatten(1).mean(1, keepdim=True)
            return torch.cat([mean * (mean > 0.4), torch.zeros(len(x), 9)], 1)

    x = torch.stack([torch.full((3, 8, 8), 0.2), torch.full((3, 8, 8), 0.6)])
    for name in ("MIFGSM", "NIFGSM", "SINIFGSM", "VMIFGSM", "PGDL2"):
        assert getattr(ours, name)(Dead(), steps=2)(x, torch.tensor([0, 0])).isfinite().all()
    assert torch.equal(ours.MIFGSM(Dead())(x, torch.tensor([0, 0]))[0], x[0])
    assert ours.PGDL2(Dead(), eps=0.0, random_start=False)(x, torch.tensor([0, 0])).equal(x)


@pytest.mark.parametrize("name", ["FGSM", "BIM", "PGD", "RFGSM", "FFGSM", "MIFGSM", "VMIFGSM", "PGDL2"])
def test_sizes_per_sample(name):
    net, x, y = setting()
    eps = torch.linspace(0, 0.1, len(x))
    make = getattr(ours, name)
    (adv, _), (shaped, _) = (seeded(make(net, eps=e), x, y) for e in (eps, eps.view(-1, 1, 1, 1)))
    assert torch.equal(adv, shaped)
    delta = (adv - x).flatten(1)
    length = delta.norm(dim=1) if name == "PGDL2" else delta.abs().amax(1)
    assert (length <= eps + 1e-6).all() and (length[1:] > 0).all()
    if name in ("FGSM", "BIM", "MIFGSM"):
        assert torch.equal(adv[2:3], make(net, eps=float(eps[2]))(x[2:3], y[2:3]))
    with pytest.raises(ValueError, match="one element per sample, 6"):
        make(net, eps=eps[:2])(x, y)
    with pytest.raises(TypeError, match=f"{name}: images must be float in \\[0, 1\\], got torch.uint8"):
        make(net)(x.to(torch.uint8), y)


def test_targets_without_host_syncs():
    net, x, y = setting(n=40)
    attack = ours.FGSM(net)
    logits = attack.get_output_with_eval_nograd(x)
    attack._kth_min = 2
    least = attack.get_least_likely_label(x, y)
    for row, label, target in zip(logits, y, least):
        others = [c for c in row.argsort().tolist() if c != label]
        assert target == others[1]
    drawn = attack.get_random_target_label(x, y)
    assert (drawn != y).all() and drawn.min() >= 0 and drawn.max() < 10
    assert (attack.get_random_target_label(x) != logits.argmax(1)).all()
    attack._kth_min = 10
    with pytest.raises(ValueError, match="kth_min must be less than the 10 classes, got 10"):
        attack.get_least_likely_label(x, y)


def test_modes_reach_attacks_that_are_held(capsys):
    net, x, y = setting()

    class Outer(ours.Attack):
        def __init__(self, inner):
            super().__init__("Outer", inner.model)
            self.inner = {"first": [inner]}
            self.supported_mode = ["default", "targeted"]

        def forward(self, images, labels):
            return self.inner["first"][0](images, labels)

    outer = Outer(ours.PGD(net, steps=2))
    inner = outer.inner["first"][0]
    outer.set_mode_targeted_by_label()
    outer.set_model_training_mode(True)
    outer.set_normalization_used([0.5] * 3, [0.5] * 3)
    outer.precision = "exact"
    assert (inner.targeted, inner._model_training, inner.precision) == (True, True, "exact")
    assert inner.normalization_used is not None
    assert outer(x * 2 - 1, y).shape == x.shape
    outer.set_mode_default()
    assert not inner.targeted
    assert "targeted(label)" in capsys.readouterr().out
    other = small_net(1, size=28)
    outer.set_model(other)
    assert inner.model is other
    outer.inner = None
    assert not outer._attacks
    outer.inner = [ours.MultiAttack([inner, ours.FGSM(other)])]
    with pytest.raises(ValueError, match="Targeted mode is not supported"):
        outer.set_mode_targeted_by_label(quiet=True)
    assert not outer.targeted  # nothing half-changed


def loader(x, y):
    return DataLoader(TensorDataset(x, y), batch_size=4)


@peer
@pytest.mark.parametrize("save_type", ["float", "int"])
def test_saving_and_loading(save_type, theirs, tmp_path, capsys):
    net, x, y = setting(n=11)
    found, files = [], [tmp_path / "theirs.pt", tmp_path / "ours.pt"]
    for library, file in zip((theirs, ours), files):
        attack = library.PGD(net)
        attack.set_normalization_used([0.4] * 3, [0.3] * 3)
        torch.manual_seed(0)
        found.append(attack.save(loader(attack.normalize(x), y), file, verbose=True, return_verbose=True,
                                 save_predictions=True, save_clean_inputs=True, save_type=save_type)[:2])
    assert found[1] == pytest.approx(found[0], rel=1e-5)
    wanted, mine = (torch.load(file) for file in files)
    assert wanted.keys() == mine.keys()
    for key, value in wanted.items():
        if key.endswith("inputs"):
            assert (value.float() - mine[key].float()).abs().max() <= (1 if save_type == "int" else 1e-6)
        else:
            assert torch.equal(value, mine[key]) if isinstance(value, torch.Tensor) else value == mine[key]
    options = {"batch_size": 5, "normalize": {"mean": [0.4] * 3, "std": [0.3] * 3}, "load_predictions": True,
               "load_clean_inputs": True}
    for read, expected in zip(ours.PGD.load(files[0], **options), theirs.PGD.load(files[0], **options)):
        assert all(map(torch.allclose, read, expected))
    assert "Robust accuracy" in capsys.readouterr().out


def test_saving_predictions_quietly(tmp_path):
    net, x, y = setting(n=5)
    attack = ours.FGSM(net)
    assert attack.save(loader(x, y), tmp_path / "a.pt", verbose=False, save_predictions=True, save_type="int") is None
    saved = torch.load(tmp_path / "a.pt")
    assert torch.equal(saved["preds"], attack.get_output_with_eval_nograd(attack(x, y)).argmax(1))
    assert saved["adv_inputs"].dtype == torch.uint8 and len(saved["labels"]) == 5
    levels = torch.arange(256)
    assert torch.equal(attack.to_type(levels.float() / 255, "int"), levels.to(torch.uint8))
    assert torch.equal(attack.to_type(levels.to(torch.uint8), "float"), levels.float() / 255)
    with pytest.raises(ValueError, match="not a valid type"):
        attack.to_type(x, "half")


@peer
def test_multi_attack(theirs, tmp_path, capsys):
    net, x, y = setting(n=12)
    with torch.no_grad():
        y = net.eval()(x).argmax(1)  # right where nothing is done
    found = []
    for library in (theirs, ours):
        attack = library.MultiAttack([library.FGSM(net, 0.5 / 255), library.PGD(net, 2 / 255, 1 / 255),
                                      theirs.CW(net, steps=3)], verbose=True)
        adv, after = seeded(attack, x, y)
        torch.manual_seed(1)
        found.append((adv, after, attack.save(loader(x, y), tmp_path / "a.pt", True, True)[:3]))
    assert torch.equal(found[0][0], found[1][0]) and torch.equal(found[0][1], found[1][1])
    assert found[0][2][0] == found[1][2][0] and found[0][2][1] == pytest.approx(found[1][2][1])
    printed = [line for line in capsys.readouterr().out.splitlines() if line.startswith("Attack success")]
    assert len(printed) == 2 and printed[0] == printed[1]
    with pytest.raises(ValueError, match="More than two"):
        ours.MultiAttack([ours.FGSM(net)])
    with pytest.raises(ValueError, match="different model"):
        ours.MultiAttack([ours.FGSM(net), ours.FGSM(Pooled())])


# ---- fast ------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("mode", ["default", "least likely 1"])
@pytest.mark.parametrize("name", NAMES)
def test_fast_is_as_strong(name, mode):
    net, x, y = trained()
    losses = {}
    kw = {"diversity_prob": 0.0} if name in ("DIFGSM", "TIFGSM") else {}  # few draws, which differ, decide otherwise
    for precision in ("exact", "fast"):
        torch.manual_seed(0)
        ea.manual_seed(0)
        attack = towards(getattr(ours, name)(net, precision=precision, **kw), mode)
        target = attack.get_target_label(x, y) if attack.targeted else y
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adv = attack(x, y)
        assert adv.dtype == x.dtype and not adv.requires_grad
        if name != "PGDL2":
            assert (adv - x).abs().max() <= EPS + 2.0**-24
        losses[precision] = nn.functional.cross_entropy(net(adv), target).item()
    clean = nn.functional.cross_entropy(net(x), target).item()
    assert (losses["fast"] - clean) / (losses["exact"] - clean) > 0.85


FAST = {
    "FGSM": ea.fgsm(0.1), "BIM": ea.ifgsm(0.03, 2 / 255, 9), "PGD": ea.pgd(EPS, 2 / 255, 3, False),
    "RFGSM": ea.Attack("rfgsm", EPS, start="rademacher", alpha=0.02, step=0.02, steps=3),
    "FFGSM": ea.Attack("ffgsm", EPS, start="uniform", step=0.01), "PGDL2": ea.pgd_l2(0.3, 0.2, 10, False),
    "MIFGSM": ea.mifgsm(EPS, 2 / 255, 4, 0.3), "NIFGSM": ea.nifgsm(EPS, 0.02, 10, 0.5),
    "DIFGSM": ea.difgsm(EPS, 2 / 255, 10, 1.0, 1.2, 0.3, start="uniform"),
    "TIFGSM": ea.difgsm(EPS, 2 / 255, 10, 0.0, 0.5, 1.0, transforms=[ea.ti("linear", 7)]),
    "SINIFGSM": ea.sinifgsm(EPS, 2 / 255, 10, 1.0, 3), "VMIFGSM": ea.vmifgsm(EPS, 2 / 255, 10, 1.0, 2, 1.0),
    "VNIFGSM": ea.vnifgsm(EPS, 2 / 255, 3, 0.5, 3),
}


@pytest.mark.parametrize("name", NAMES)
def test_fast_is_our_attack_with_every_argument(name):
    kw = ARGUMENTS[name] | ({"alpha": 0.02} if name == "RFGSM" else {}) | ({"eps": EPS} if name == "RFGSM" else {})
    attack = getattr(ours, name)(Pooled(), **kw)
    assert attack._make_fast() == FAST[name]
    attack.set_mode_targeted_by_label(quiet=True)
    assert attack._make_fast() == replace(FAST[name], targeted=True)


def test_fast_noise_is_by_our_keys():
    net, x, y = setting()
    attack = ours.PGD(net, precision="fast")
    found = []
    for seed in (1, 1, 2):
        ea.manual_seed(seed)
        found.append(attack(x, y))
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    state = torch.get_rng_state()
    attack(x, y)
    assert torch.equal(torch.get_rng_state(), state)


def test_fast_normalises():
    net, x, y = setting()
    attack = ours.FGSM(net, precision="fast")
    attack.set_normalization_used([0.4, 0.5, 0.6], [0.2, 0.3, 0.25])
    adv = attack.inverse_normalize(attack(attack.normalize(x), y))
    attack.precision = "exact"
    wanted = attack.inverse_normalize(attack(attack.normalize(x), y))
    assert ((adv - wanted).abs() < 1e-3).double().mean() > 0.8  # 16 bits may turn small gradients' signs


def changed_in_turn(net):
    """Yields after each change of a trained network."""
    with torch.no_grad():
        net[0].weight.mul_(1.1)
    yield
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    yield
    optimizer = torch.optim.Adam(net.parameters(), fused=True)
    net[0].weight.grad = torch.ones_like(net[0].weight)
    optimizer.step()
    yield
    net.load_state_dict(small_net(1, size=28).state_dict())
    yield
    net[0] = nn.Conv2d(3, 8, 3, padding=1)
    yield
    net[1].running_mean.add_(1)
    yield
    net[2] = nn.GELU()
    yield
    net[0].register_forward_hook(lambda *_: None)
    yield


def test_a_source_is_made_once_and_noticed_when_it_is_old():
    net, x, y = trained()
    attack = ours.FGSM(net, precision="fast")
    first = source_cache.get_source(net)
    attack(x, y)
    assert source_cache.get_source(net) is first and not first.live
    assert source_cache.get_source(net, torch.tensor([0.5]), torch.tensor([0.5])) is not first

    for _ in changed_in_turn(net):
        moved = source_cache.get_source(net)
        assert moved.live and moved.module is net
        settled = source_cache.get_source(net)
        assert not settled.live and settled is not first
        assert source_cache.get_source(net) is settled
        with torch.no_grad():
            assert torch.allclose(settled.logits(x).float(), net(x), atol=0.1, rtol=0.1)
        first = settled
    net[0].weight.data.mul_(2)
    compat.forget(net)
    assert source_cache.get_source(net) is not first


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("change", "why"), [
    (lambda a, x: (setattr(a, "get_logits", lambda images: a.model(images) * 2), x)[1], "get_logits is overridden"),
    (lambda a, x: (a.set_model_training_mode(True), x)[1], "in training mode"),
    (lambda a, x: (setattr(a, "steps", 0), x)[1], "no step"),
    (lambda a, x: (setattr(a, "eps", torch.full((6,), EPS)), x)[1], "sizes are tensors"),
    (lambda a, x: (a.model.double(), x.double())[1], "float64"),
])
def test_what_a_source_cannot_do_is_exact_and_says_so(change, why):
    net, x, y = setting()
    attack = ours.PGD(net, steps=2, precision="fast")
    x = change(attack, x)
    with pytest.warns(UserWarning, match=f"PGD: is exact, not fast, since .*{why}"):
        adv, _ = seeded(attack, x, y)
    attack.precision = "exact"
    assert torch.equal(adv, seeded(attack, x, y)[0])


def test_precision_is_chosen_for_all_or_for_one():
    net, x, y = setting()
    exact, default = ours.FGSM(net, precision="exact"), ours.FGSM(net)
    calls = []
    default._make_fast = exact._make_fast = lambda: calls.append(1) or ours.FGSM._make_fast(default)
    default(x, y)
    assert not calls and compat.current_precision() == "exact"
    with compat.precision("fast"):
        default(x, y)
        assert len(calls) == 1
        exact(x, y)
        with compat.precision("exact"):
            default(x, y)
        assert len(calls) == 1 and compat.current_precision() == "fast"
    assert compat.current_precision() == "exact"
    compat.precision("fast")
    try:
        default(x, y)
        assert len(calls) == 2
    finally:
        compat.precision("exact")
    with pytest.raises(ValueError, match="which must be one of exact, fast, got 'quick'"):
        compat.precision("quick")
    with pytest.raises(ValueError, match="FGSM: precision must be None, exact, fast, got 'quick'"):
        default.precision = "quick"


# ---- install ---------------------------------------------------------------------------------------------------------

@peer
def test_install_and_uninstall(theirs):
    from torchattacks.attacks import pgd
    own = theirs.PGD, theirs.attack.Attack, theirs.CW
    net, x, y = setting()
    with compat.install("torchattacks"):
        from torchattacks import PGD
        assert PGD is theirs.PGD is pgd.PGD is ours.PGD
        assert theirs.attack.Attack is ours.Attack and theirs.CW is own[2]
        assert theirs.wrappers.lgv.BIM is ours.BIM
        assert isinstance(PGD(net), theirs.attack.Attack) and isinstance(own[0](net), theirs.attack.Attack)
        assert not isinstance(own[0](net), ours.PGD)
        with compat.install("torchattacks"):
            assert theirs.PGD is ours.PGD
        assert theirs.PGD is ours.PGD  # the outer one holds
        wanted, _ = seeded(own[0](net), x, y)
        assert torch.equal(seeded(theirs.PGD(net), x, y)[0], wanted)
        assert theirs.MultiAttack([theirs.PGD(net, steps=1), theirs.CW(net, steps=1)])(x, y).shape == x.shape
    assert (theirs.PGD, theirs.attack.Attack, theirs.CW) == own and pgd.PGD is own[0]
    compat.install("torchattacks")
    try:
        assert theirs.PGD is ours.PGD
        theirs.FGSM = somebody = object()
    finally:
        compat.uninstall("torchattacks")
    assert theirs.PGD is own[0] and theirs.FGSM is somebody
    theirs.FGSM = theirs.attacks.fgsm.FGSM
    with pytest.raises(RuntimeError, match="torchattacks is not installed: there is nothing to undo"):
        compat.uninstall("torchattacks")


@peer
def test_an_installed_backend_serves_the_librarys_own_attacks(theirs):
    net, x, y = setting(n=4)
    from torchattacks.attacks import autoattack
    wanted, _ = seeded(theirs.AutoAttack(net, version="standard", n_classes=10, seed=0), x, y)
    with compat.install("torchattacks"):
        assert autoattack.MultiAttack is ours.MultiAttack
        mine, _ = seeded(theirs.AutoAttack(net, version="standard", n_classes=10, seed=0), x, y)
    assert torch.equal(mine, wanted)


@peer
def test_another_version_is_said(theirs, monkeypatch):
    says_another_version("torchattacks", "3.5.1", monkeypatch)


def test_unknown_libraries():
    assert compat.torchattacks is ours and not hasattr(compat, "nothing")
    for call in (compat.install, compat.uninstall):
        with pytest.raises(ValueError, match="name must be one of .*torchattacks.*, got 'nothing'"):
            call("nothing")


def test_without_the_library():
    runs_without("torchattacks", """
        import torch
        assert "torchattacks.attack" not in sys.modules
        from ensadv_fast.compat import torchattacks as ours
        net = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(12, 3))
        x = torch.rand(2, 3, 2, 2)
        assert (ours.PGD(net)(x, torch.tensor([0, 1])) - x).abs().max() <= 8 / 255 + 2**-24
        """, "ours.CW")
