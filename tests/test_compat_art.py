"""Our ART: its own numbers and numpy's draws in exact precision, our engine in fast, its trainers with ours."""
import importlib.util
import inspect
import logging
import sys
import warnings

import backends
import numpy as np
import pytest
import torch
from networks import batch, small_net, trained
from torch import nn

import ensadv_fast as ea
from ensadv_fast import compat

if importlib.util.find_spec("art") is None:
    pytest.skip("adversarial-robustness-toolbox is not installed: nothing is compared with it", allow_module_level=True)
import art.attacks.evasion as theirs
from art.defences.preprocessor.preprocessor import PreprocessorPyTorch
from art.defences.trainer import AdversarialTrainer, AdversarialTrainerMadryPGD
from art.estimators.classification import PyTorchClassifier
from art.preprocessing.standardisation_mean_std.numpy import StandardisationMeanStd

from ensadv_fast.compat import art as ours

pytestmark = pytest.mark.filterwarnings("ignore:__array_(_ implementation|wrap__ must):DeprecationWarning")  # of ART's
FGM, PGD, BIM, MIM = ("FastGradientMethod", "ProjectedGradientDescent", "BasicIterativeMethod",
                      "MomentumIterativeMethod")
NAMES = (FGM, PGD, BIM, MIM)
EPS, STEP = 8 / 255, 2 / 255


def classifier(net=None, *, channels=3, size=28, clip_values=(0.0, 1.0), loss=None, **kw):
    net = small_net(channels=channels, size=size) if net is None else net
    return PyTorchClassifier(net, nn.CrossEntropyLoss() if loss is None else loss, (channels, size, size), 10,
                             clip_values=clip_values, **({"device_type": "cpu"} | kw))


def images(n=6, channels=3, size=28):
    x, y = batch(n, channels, size)
    return x.numpy(), y.numpy()


def made(library, name, estimator, **kw):
    iterated = {} if name == FGM else {"max_iter": 6, "verbose": False}
    return getattr(library, name)(estimator, **({"eps": EPS, "eps_step": STEP} | iterated | kw))


def seeded(attack, *args, seed=3, **kw):
    """The result, and what numpy's and torch's generators give next."""
    np.random.seed(seed)
    torch.manual_seed(seed)
    return attack.generate(*args, **kw), (np.random.rand(), torch.rand(()).item())


def same(mine, wanted, single):
    backends.same(torch.from_numpy(mine), torch.from_numpy(wanted), single)


def compared(name, x, y=None, how=None, mask=None, **kw):
    given = {} if mask is None else {"mask": mask}
    (wanted, after), (mine, left) = (seeded(made(library, name, classifier(**(how or {})), **kw), x, y, **given)
                                     for library in (theirs, ours))
    same(mine, wanted, name == FGM)
    assert left == after
    return mine


# ---- exact: their numbers --------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("channels", "size"), [(3, 28), (1, 28), (3, 40)])
@pytest.mark.parametrize("norm", [np.inf, "inf", 2])
@pytest.mark.parametrize("name", [FGM, PGD, MIM])
def test_arts_numbers_and_draws(name, norm, channels, size):
    x, y = images(6, channels, size)
    how = {"channels": channels, "size": size}
    sizes = {"norm": norm} | ({"eps": 1.0, "eps_step": 0.3} if norm == 2 else {})
    compared(name, x, y, how, **sizes)
    compared(name, x, None, how, **sizes)
    compared(name, x, np.eye(10)[y], how, targeted=True, batch_size=4, **sizes)
    if name != MIM:
        compared(name, x, y, how, num_random_init=1, **sizes)


class Squared(PreprocessorPyTorch):
    """A defence whose gradient flows."""

    def forward(self, x, y=None):
        return x * x, y


VALUES = np.random.default_rng(0)
MANY = {"eps": VALUES.random((6, 1, 1, 1)).astype(np.float32) / 10, "eps_step": np.full((6, 1, 1, 1), 0.02, np.float32)}
CASES = {
    "eps per image": (MANY, {}),
    "eps per image, batches": (MANY | {"batch_size": 4}, {}),
    "eps per image, float64": ({k: v.astype(np.float64) for k, v in MANY.items()}, {}),
    "eps per pixel": ({"eps": VALUES.random((28, 28)) / 10, "eps_step": np.full((28, 28), 0.02)}, {}),
    "restarts": ({"num_random_init": 3}, {}),
    "restarts to targets": ({"num_random_init": 2, "targeted": True, "batch_size": 4}, {}),
    "L2 eps per image": (MANY | {"norm": 2}, {}),
    "one mask per image": ({"num_random_init": 1, "batch_size": 4}, {"mask": VALUES.random((6, 3, 28, 28)) > 0.5}),
    "one mask": ({}, {"mask": VALUES.random((3, 28, 28)).round().astype(np.float32)}),
    "preprocessing": ({}, {"how": {"preprocessing": ((0.4, 0.5, 0.6), (0.2, 0.3, 0.25))}}),
    "preprocessing, one number": ({}, {"how": {"preprocessing": (0.4, 0.3)}}),
    "no preprocessing": ({}, {"how": {"preprocessing": None}}),
    "a defence in PyTorch": ({}, {"how": {"preprocessing_defences": Squared(device_type="cpu")}}),
    "preprocessing in numpy": ({}, {"how": {"preprocessing": StandardisationMeanStd(0.4, 0.3)}}),
    "no clipping": ({"eps": 0.5}, {"how": {"clip_values": None}}),
    "clipping by pixel": ({}, {"how": {"clip_values": (np.zeros((3, 28, 28)), np.full((3, 28, 28), 0.7))}}),
    "another loss": ({}, {"how": {"loss": nn.MultiMarginLoss()}}),
    "a sum": ({}, {"how": {"loss": nn.CrossEntropyLoss(reduction="sum", label_smoothing=0.1)}}),
}


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", [FGM, PGD])
def test_every_argument(name, case):
    kw, how = CASES[case]
    compared(name, *images(), **kw, **how)


def test_pixels_of_255_levels():
    x, y = images()
    for dtype in (np.uint8, np.float32, np.float64):
        levels = (x * 255).astype(dtype)
        for name in (FGM, PGD):
            if name == FGM or dtype == np.float32:
                adv = compared(name, levels, y, {"clip_values": (0, 255), "preprocessing": (127.5, 60.0)}, eps=8,
                               eps_step=2)
                assert adv.dtype == np.float32 and 4 < np.abs(adv - levels).max() <= 8 + 1e-4


@pytest.mark.parametrize("name", NAMES)
def test_soft_labels_random_eps_momentum(name):
    x, _ = images()
    y = np.random.default_rng(1).dirichlet(np.ones(10), 6).astype(np.float32)
    compared(name, x, y)
    if name == PGD:
        compared(name, x, y, random_eps=True)
        compared(name, x, y, random_eps=True, **MANY)
        compared(name, x, y, decay=0.5, max_iter=0)
        compared(name, x, y, decay=0.5, norm=2, num_random_init=1)
    if name == FGM:
        for sizes in ({"eps": 0.2, "eps_step": 0.01}, {"eps": MANY["eps"], "eps_step": MANY["eps_step"] / 4}):
            compared(name, x, y, minimal=True, batch_size=4, **sizes)
            compared(name, x, y, minimal=True, targeted=True, **sizes)


def test_float64(monkeypatch):
    for module in (sys.modules[f"art.{name}"] for name in (
            "attacks.evasion.fast_gradient", "utils",
            "attacks.evasion.projected_gradient_descent.projected_gradient_descent_pytorch")):
        monkeypatch.setattr(module, "ART_NUMPY_DTYPE", np.float64, raising=False)
    for name in ("crafting", "fast_gradient", "projected", "steps", "target"):
        monkeypatch.setattr(f"ensadv_fast.compat.art.{name}.ART_NUMPY_DTYPE", np.float64)
    x, y = images()
    for name in NAMES:
        for norm in ({}, {"norm": 2, "eps": 1.0, "eps_step": 0.3}):
            if name != BIM or not norm:
                (wanted, _), (mine, _) = (
                    seeded(made(library, name, classifier(small_net(size=28).double()), **norm), x.astype(float),
                           np.eye(10)[y]) for library in (theirs, ours))
                assert mine.dtype == np.float64
                same(mine, wanted, True)


def test_images_of_224_pixels_and_recurrent_networks():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 7, 4), nn.ReLU(), nn.AdaptiveAvgPool2d(4), nn.Flatten(), nn.Linear(64, 10))
    compared(PGD, *images(2, 3, 224), how={"net": net}, num_random_init=1)

    class Rows(nn.Module):
        def __init__(self):
            super().__init__()
            self.rnn, self.drop, self.out = nn.GRU(28, 8, batch_first=True), nn.Dropout(0.5), nn.Linear(8, 10)

        def forward(self, x):
            return self.out(self.drop(self.rnn(x.squeeze(1))[0][:, -1]))

    compared(PGD, *images(4, 1, 28), how={"net": Rows(), "channels": 1}, num_random_init=2)


@pytest.mark.gpu
def test_on_a_gpu():
    x, y = images()
    for name in NAMES:
        compared(name, x, y, {"device_type": "gpu"})
    attack = made(ours, PGD, classifier(device_type="gpu"), batch_size=6)
    attack.generate(x, y)
    target = sys.modules["ensadv_fast.compat.art.target"].Target(attack.estimator, x)
    steps = sys.modules["ensadv_fast.compat.art.steps"]
    (part,) = steps.batches(target, x, np.eye(10)[y], None, EPS, STEP, 6)
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        with target.attacking():
            attack._attack._run(target, part)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_signatures_and_parameters():
    for name in (*NAMES, "ProjectedGradientDescentPyTorch"):
        mine, wanted = (inspect.signature(getattr(library, name)).parameters for library in (ours, theirs))
        assert [(p.name, p.default) for p in mine.values() if p.name != "precision"] == [
            (p.name, p.default) for p in wanted.values()]
        cls = getattr(ours, name)
        assert issubclass(cls, getattr(theirs, name)) and issubclass(cls, theirs.ProjectedGradientDescent
                                                                     ) == (name in (PGD, BIM, MIM))
        assert cls.attack_params == getattr(theirs, name).attack_params
        assert repr(getattr(ours, name)(classifier())) == repr(getattr(theirs, name)(classifier()))
    assert ours.DeepFool is theirs.DeepFool
    with pytest.raises(AttributeError):
        ours.Nothing


def test_set_params_and_errors():
    x, y = images()
    found = []
    for library in (theirs, ours):
        attack = made(library, PGD, classifier())
        attack.set_params(eps=0.1, max_iter=2, targeted=True)
        found.append(attack.generate(x, y))
        for kw, error in (({"eps": -1.0}, ValueError), ({"eps": "0.1"}, TypeError), ({"nothing": 1}, ValueError)):
            with pytest.raises(error):
                attack.set_params(**kw)
        with pytest.raises(ValueError, match="targeted"):
            made(library, PGD, classifier(), targeted=True).generate(x)
        with pytest.raises(NotImplementedError):  # an L2 ball has one radius
            made(library, PGD, classifier(), norm=2, eps=np.arange(28) + 1.0, eps_step=np.ones(28)).generate(x, y)
        with pytest.raises(Exception, match="requires an estimator derived from"):
            getattr(library, PGD)(small_net())
    assert np.array_equal(*found)
    with pytest.raises(ValueError, match="FastGradientMethod: precision must be None, exact, fast, got 'quick'"):
        ours.FastGradientMethod(classifier(), precision="quick")
    with pytest.raises(ValueError, match="y must be given where targeted"):
        ours.FastGradientMethod(classifier(), targeted=True).generate(x)


# ---- where they differ on purpose ------------------------------------------------------------------------------------

@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", NAMES)
def test_the_model_is_left_as_it_was(name, precision):
    net = small_net(size=28)
    net[1].eval()  # a frozen part of a model in training
    net[0].weight.grad = torch.ones_like(net[0].weight)
    estimator = classifier(net)
    modes, statistics = [m.training for m in net.modules()], [b.clone() for b in net.buffers()]
    x, y = images()

    def check():
        assert [m.training for m in net.modules()] == modes and estimator._model.training
        assert all(map(torch.equal, net.buffers(), statistics))
        assert (net[0].weight.grad == 1).all() and all(p.grad is None for p in list(net.parameters())[1:])

    attack = made(ours, name, estimator, precision=precision)
    attack.generate(x, y)
    assert np.abs(attack.generate(x) - x).max() > 0  # predictions are made
    check()
    if precision == "exact":
        handle = net[-1].register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            attack.generate(x, y)
        handle.remove()
        check()


@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
def test_where_autograd_is_off(around):
    x, y = images(2)
    for precision in ("exact", "fast"):
        for name in NAMES:
            attack = made(ours, name, classifier(), precision=precision)
            wanted = attack.generate(x, y)
            with around():
                assert np.array_equal(attack.generate(x, y), wanted)


def test_what_fails_in_art():
    x, y = images()
    adv = made(ours, PGD, classifier(), num_random_init=1, **MANY).generate(x, y)
    assert (np.abs(adv - x) <= MANY["eps"] + 2**-24).all()
    assert np.abs(adv - x).max() > 0
    mask = np.zeros((1, 3, 28, 28), np.float32)
    mask[..., :14] = 1
    for name in NAMES:
        for given in (mask, mask[0, 0]):
            adv = made(ours, name, classifier(), batch_size=4).generate(x, y, mask=given)
            assert np.array_equal(adv[..., 14:], x[..., 14:]) and not np.array_equal(adv, x)
        assert made(ours, name, classifier()).generate(x.astype(np.float64)).dtype == np.float32
    assert made(ours, FGM, classifier(), minimal=True).generate(x.astype(np.float64), y).dtype == np.float32
    for broken in ({"num_random_init": 1, **MANY}, {"batch_size": 4}):
        with pytest.raises(Exception):  # so the table in the package's docstring says
            made(theirs, PGD, classifier(), **broken).generate(x, y, **({} if "eps" in broken else {"mask": mask}))


def test_nothing_is_computed_for_a_log_that_is_off(caplog):
    x, y = images()
    for name in (FGM, PGD):
        counts = {}
        for level in (logging.WARNING, logging.INFO):
            net, calls = small_net(size=28), []
            net[0].register_forward_hook(lambda *_: calls.append(1))
            with caplog.at_level(level, logger="art"):
                made(ours, name, classifier(net)).generate(x, y)
            counts[level] = len(calls)
        assert counts[logging.WARNING] == (1 if name == FGM else 6) == counts[logging.INFO] - 2
    rates = [r.getMessage() for r in caplog.records if "uccess rate" in r.getMessage()]
    assert len(rates) == 2 and all("%" in r for r in rates)


@pytest.mark.parametrize("name", [FGM, PGD])
def test_art_computes_what_ours_cannot(name, monkeypatch):
    x, y = images()
    compared(name, x, y, norm=1, eps=1.0, eps_step=0.5)
    compared(name, x, y, norm=3, eps=1.0, eps_step=0.5)

    class Own(PyTorchClassifier):
        """Its gradients are its own."""

        def loss_gradient(self, *args, **kw):
            return -super().loss_gradient(*args, **kw)

    net = small_net(size=28)
    own = Own(net, nn.CrossEntropyLoss(), (3, 28, 28), 10, clip_values=(0, 1))
    wanted, mine = (made(library, name, own).generate(x, y) for library in (theirs, ours))
    assert np.array_equal(mine, wanted) and not np.array_equal(mine, made(ours, name, classifier(net)).generate(x, y))
    if name == FGM:
        class Still(ours.FastGradientMethod):
            def _compute_perturbation(self, x, *args, **kw):
                return np.zeros_like(x)

        assert np.array_equal(Still(own).generate(x, y), x)


# ---- fast ------------------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module")
def easy():
    return trained()


@pytest.mark.parametrize("kw", [{}, {"norm": 2, "eps": 0.5, "eps_step": 0.1}, {"targeted": True},
                                {"num_random_init": 2, "batch_size": 25}])
@pytest.mark.parametrize("name", NAMES)
def test_fast_is_as_strong(name, kw, easy):
    if name in {"norm": (BIM,), "num_random_init": (FGM, BIM, MIM)}.get(next(iter(kw), ""), ()):
        return  # ART's has no such argument; or returns the images themselves where no restart fools the model
    net, x, y = easy
    aims = (y + 1) % 10 if "targeted" in kw else y
    estimator = classifier(net, preprocessing=((0.0,) * 3, (1.0,) * 3))
    losses = {}
    for precision in ("exact", "fast"):
        ea.manual_seed(0)
        np.random.seed(0)
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            adv = made(ours, name, estimator, precision=precision, **kw).generate(x.numpy(), aims.numpy())
        assert (adv.dtype, adv.shape) == (np.float32, tuple(x.shape))
        delta = adv - x.numpy()
        length = np.linalg.norm(delta.reshape(60, -1), axis=1) if "norm" in kw else np.abs(delta)
        assert length.max() <= kw.get("eps", EPS) + 1e-6
        losses[precision] = nn.functional.cross_entropy(net(torch.from_numpy(adv)), aims).item()
    clean = nn.functional.cross_entropy(net(x), aims).item()
    assert (losses["fast"] - clean) / (losses["exact"] - clean) > 0.85


def test_fast_normalises_and_counts_in_the_images_units(easy):
    net, x, y = easy
    found = []
    for precision in ("exact", "fast"):
        estimator = classifier(net, clip_values=(0, 255), preprocessing=(np.zeros(3), np.full(3, 255.0)))
        found.append(made(ours, FGM, estimator, eps=8, eps_step=2, precision=precision).generate(
            x.numpy() * 255, y.numpy()))
    assert np.abs(found[1] - x.numpy() * 255).max() <= 8 + 1e-4
    assert (np.abs(found[1] - found[0]) < 0.1).mean() > 0.8  # 16 bits may turn small gradients' signs


def test_fast_noise_is_by_our_keys():
    x, y = images()
    attack, found = made(ours, PGD, classifier(), num_random_init=1, precision="fast"), []
    for seed in (1, 1, 2):
        ea.manual_seed(seed)
        np.random.seed(0)
        found.append(attack.generate(x, y))
        assert np.random.rand() == np.random.RandomState(0).rand()  # nothing was drawn
    assert np.array_equal(found[0], found[1]) and not np.array_equal(found[0], found[2])


@pytest.mark.parametrize(("kw", "how", "why"), [
    ({"mask": np.ones((28, 28), np.float32)}, {}, "it has a mask"),
    (MANY, {}, "eps is an array"),
    ({"max_iter": 0}, {}, "no step"),
    ({}, {"loss": nn.CrossEntropyLoss(label_smoothing=0.1)}, "not the plain cross-entropy"),
    ({}, {"preprocessing": (np.zeros((28, 28)), np.full((28, 28), 0.5))}, "one mean and deviation per channel"),
    ({}, {"clip_values": (np.zeros((3, 28, 28)), np.ones((3, 28, 28)))}, "clip_values are arrays"),
    ({"y": np.full((6, 10), 0.1, np.float32)}, {}, "not one class each"),
    ({"minimal": True}, {}, "smallest step"),
])
def test_what_a_source_cannot_do_is_exact_and_says_so(kw, how, why):
    x, y = images()
    kw = dict(kw)
    name, y = FGM if "minimal" in kw else PGD, kw.pop("y", y)
    given = {"mask": kw.pop("mask")} if "mask" in kw else {}
    with pytest.warns(UserWarning, match=f"{name}.*: is exact, not fast, since .*{why}"):
        adv = made(ours, name, classifier(**how), precision="fast", **kw).generate(x, y, **given)
    assert np.array_equal(adv, made(ours, name, classifier(**how), precision="exact", **kw).generate(x, y, **given))


# ---- trainers and install --------------------------------------------------------------------------------------------

def training(how, seed=0):
    """The weights after two epochs; how: classifier -> trainer."""
    net = small_net(size=28)
    estimator = classifier(net, optimizer=torch.optim.SGD(net.parameters(), 0.05))
    np.random.seed(seed)
    torch.manual_seed(seed)
    x, y = images(24)
    how(estimator).fit(x, np.eye(10, dtype=np.float32)[y], batch_size=8, nb_epochs=2)
    return net.state_dict()


def ensemble(library):
    def trainer(estimator):
        other = classifier(small_net(1, size=28))
        return AdversarialTrainer(estimator, [
            made(library, FGM, estimator), made(library, PGD, estimator, num_random_init=1), made(library, MIM, other)])
    return trainer


def test_arts_trainers_reach_the_same_weights(capsys):
    wanted, mine = training(ensemble(theirs)), training(ensemble(ours))
    assert all(torch.equal(wanted[k], mine[k]) for k in wanted)

    def madry(estimator):
        from art.defences.trainer import adversarial_trainer_madry_pgd as module
        made_by.append(module.ProjectedGradientDescent)
        return AdversarialTrainerMadryPGD(estimator, eps=EPS, eps_step=STEP, max_iter=3)

    made_by = []
    wanted = training(madry)
    with compat.install("art"):
        mine = training(madry)
        with compat.precision("fast"):
            fast = training(madry)
    assert made_by == [theirs.ProjectedGradientDescent] + [ours.ProjectedGradientDescent] * 2
    assert all(torch.equal(wanted[k], mine[k]) for k in wanted)
    assert all(v.isfinite().all() for v in fast.values()) and not torch.equal(fast["0.weight"], wanted["0.weight"])


def test_install_and_uninstall():
    from art.attacks.evasion.projected_gradient_descent import projected_gradient_descent as module
    own = {name: getattr(theirs, name) for name in (*NAMES, "ProjectedGradientDescentPyTorch", "DeepFool")}
    x, y = images()
    wanted = made(theirs, PGD, classifier()).generate(x, y)
    with compat.install("art"):
        from art.attacks.evasion import FastGradientMethod
        assert FastGradientMethod is ours.FastGradientMethod
        assert module.ProjectedGradientDescent is theirs.ProjectedGradientDescent is ours.ProjectedGradientDescent
        assert theirs.DeepFool is own["DeepFool"]
        assert np.array_equal(made(theirs, PGD, classifier()).generate(x, y), wanted)
        before = own[PGD](classifier(), np.inf, EPS, STEP, verbose=False)  # a class that was imported before
        assert isinstance(before._attack, ours.ProjectedGradientDescentPyTorch)
    assert own == {name: getattr(theirs, name) for name in own}
    assert module.ProjectedGradientDescent is own[PGD]


def test_another_version_is_said(monkeypatch):
    backends.says_another_version("art", "1.20.1", monkeypatch)


def test_without_the_library():
    backends.runs_without("art", "", "compat.art", pip="adversarial-robustness-toolbox")
