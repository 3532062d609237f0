"""Our Foolbox: Foolbox's own numbers, models, criteria and returns in exact precision, our engine in fast."""
import copy
import importlib.util
import inspect
import pickle
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
from ensadv_fast.compat import foolbox as ours
from ensadv_fast.compat.foolbox import attacks, models

if importlib.util.find_spec("foolbox") is not None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of other packages' age
        import eagerpy as ep
        import foolbox as theirs
peer = pytest.mark.skipif(importlib.util.find_spec("foolbox") is None,
                          reason="foolbox is not installed: ours are subclasses of its classes")
NAMES = attacks.NAMES
TARGETED = [name for name in NAMES if "FastGradient" not in name or "Momentum" in name]
SINGLE = [name for name in NAMES if name not in TARGETED]
PLAIN = [norm + kind for norm in ("Linf", "L2")
         for kind in ("FastGradientAttack", "BasicIterativeAttack", "ProjectedGradientDescentAttack")]
EPS = 8 / 255


def few(name, steps=4):
    """Arguments with which an attack takes no more steps than needed."""
    return {"steps": steps} if name in TARGETED else {}


def budget(name, bounds=(0, 1)):
    return (1.0 if name.startswith("L2") else EPS) * (bounds[1] - bounds[0])


def setting(dtype=torch.float32, channels=3, size=28, n=4, bounds=(0, 1), **preprocessing):
    """A network in eval mode, Foolbox's model of it, images within the bounds and labels."""
    net = small_net(channels=channels, size=size).to(dtype).eval()
    x, y = batch(n, channels, size)
    x = (x.double() * (bounds[1] - bounds[0]) + bounds[0]).clamp(*bounds).to(dtype)
    return net, theirs.PyTorchModel(net, bounds, device="cpu", preprocessing=preprocessing), x, y


def seeded(attack, *args, seed=3, **kw):
    """The results, as tensors, and what torch's generator gives next."""
    torch.manual_seed(seed)
    raw, clipped, success = attack(*args, **kw)
    if isinstance(raw, list):
        raw, clipped = torch.stack(raw), torch.stack(clipped)
    return raw, clipped, success, torch.rand(1)


def close(mine, wanted, single):
    backends.same(mine, wanted, single, scale=max(1, wanted.abs().max()))


def same(name, fmodel, x, criterion, epsilons, seed=3, **kw):
    """Compares the two libraries' attacks; returns ours."""
    wanted = seeded(getattr(theirs.attacks, name)(**kw), fmodel, x, criterion, epsilons=epsilons, seed=seed)
    attack = getattr(attacks, name)(**kw)
    mine = seeded(attack, fmodel, x, criterion, epsilons=epsilons, seed=seed)
    for result, expected in zip(mine[:2], wanted):
        close(result, expected, single=name in SINGLE)
    assert torch.equal(mine[2], wanted[2]) and torch.equal(mine[3], wanted[3])
    return attack


# ---- exact: their numbers --------------------------------------------------------------------------------------------

@peer
@pytest.mark.parametrize(("dtype", "channels", "size"), [
    (torch.float32, 3, 28), (torch.float32, 1, 28), (torch.float64, 3, 28), (torch.float32, 3, 48)], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_the_librarys_numbers_and_draws(name, dtype, channels, size):
    net, fmodel, x, y = setting(dtype, channels, size)
    all_steps = dtype == torch.float32 and channels * size == 3 * 28
    same(name, fmodel, x, y, budget(name), **({} if all_steps else few(name, 8)))
    assert all(p.grad is not None for p in net.parameters())  # the library's doing
    for p in net.parameters():
        p.grad = None
    getattr(attacks, name)(**few(name))(fmodel, x, y, epsilons=budget(name))
    assert all(p.grad is None for p in net.parameters())


ARGUMENTS = [{"random_start": True}, {"random_start": False, "steps": 3, "rel_stepsize": 0.5},
             {"abs_stepsize": 0.01, "steps": 4}, {"steps": 0, "random_start": True}, {"momentum": 0.3},
             {"adam_beta1": 0.5, "adam_beta2": 0.7, "adam_epsilon": 1e-3}]


@peer
@pytest.mark.parametrize("name", NAMES)
def test_every_argument(name):
    _, fmodel, x, y = setting(size=16)
    for kw in ARGUMENTS:
        if kw.keys() <= inspect.signature(getattr(attacks, name)).parameters.keys():
            same(name, fmodel, x, y, budget(name), **few(name) | kw)


@peer
@pytest.mark.parametrize("bounds", [(0, 255), (-1, 1), (-3.5, 2.25)])
@pytest.mark.parametrize("name", NAMES)
def test_bounds(name, bounds):
    _, fmodel, x, y = setting(size=16, bounds=bounds, mean=[bounds[0]] * 3, std=[bounds[1] - bounds[0]] * 3, axis=-3)
    same(name, fmodel, x, y, budget(name, bounds), random_start=True, **few(name))


@peer
@pytest.mark.parametrize("name", NAMES)
def test_criteria(name):
    _, fmodel, x, y = setting(size=16)
    same(name, fmodel, x, theirs.Misclassification(y), budget(name), **few(name))
    same(name, fmodel, x, ep.astensor(y), budget(name), **few(name))
    reach = theirs.TargetedMisclassification((y + 1) % 10)
    if name in TARGETED:
        same(name, fmodel, x, reach, budget(name), **few(name))
    for criterion in ([] if name in TARGETED else [reach]) + [theirs.Misclassification(y) & reach]:
        for library in (theirs.attacks, attacks):
            attack = getattr(library, name)()
            with pytest.raises(ValueError, match="unsupported criterion"):
                attack(fmodel, x, criterion, epsilons=0.1)
            with pytest.raises(ValueError, match="unsupported criterion"):
                attack.run(fmodel, x, criterion, epsilon=0.1)


@peer
def test_a_criterion_of_the_callers_own_decides_on_success():
    class Sure(theirs.Misclassification):
        def __call__(self, perturbed, outputs):
            return outputs.max(axis=-1) > outputs.max(axis=-1).mean()

    _, fmodel, x, y = setting(size=16, n=30)
    _, _, success = same("LinfBasicIterativeAttack", fmodel, x, Sure(y), EPS)(fmodel, x, Sure(y), epsilons=EPS)
    assert 0 < success.sum() < 30


class Thresholded(theirs.Model if "theirs" in globals() else object):
    """A model of the caller's own, in terms of eagerpy."""

    bounds = (0, 1)

    def __init__(self, fmodel):
        self.bounds = fmodel.bounds
        self.fmodel = fmodel

    def __call__(self, inputs):
        x, restore_type = ep.astensor_(inputs)
        return restore_type(self.fmodel(x.square()))


@peer
@pytest.mark.parametrize("preprocessing", [{"flip_axis": -3}, {"mean": 0.5 * np.ones(1, np.float32)},
                                           {"std": torch.tensor([0.2, 0.3, 0.25]), "axis": -3, "flip_axis": -1},
                                           {"mean": torch.rand(3, 16, 16)}], ids=lambda p: "-".join(p))
def test_models(preprocessing):
    _, fmodel, x, y = setting(size=16, **preprocessing)
    flat = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 10)).eval()
    wrappers = theirs.models.wrappers
    for model in (fmodel, fmodel.transform_bounds((0, 1), wrapper=True), Thresholded(fmodel),
                  wrappers.ExpectationOverTransformationWrapper(fmodel, 3)):
        for name in ("LinfFastGradientAttack", "LinfProjectedGradientDescentAttack", "L2BasicIterativeAttack"):
            same(name, model, x, y, budget(name), random_start=True, **few(name, 3))
    for name in ("LinfBasicIterativeAttack", "L2BasicIterativeAttack"):
        same(name, theirs.PyTorchModel(flat, (0, 1), device="cpu"), x[:, :, 0, :4].flatten(1), y, budget(name))


@peer
def test_images_of_224_pixels():
    torch.manual_seed(0)
    net = nn.Sequential(nn.Conv2d(3, 4, 7, 4), nn.ReLU(), nn.Conv2d(4, 8, 3, 2), nn.ReLU(), nn.AdaptiveAvgPool2d(4),
                        nn.Flatten(), nn.Linear(128, 10)).eval()
    statistics = {"mean": [0.485, 0.456, 0.406], "std": [0.229, 0.224, 0.225], "axis": -3}
    fmodel = theirs.PyTorchModel(net, (0, 1), device="cpu", preprocessing=statistics)
    x, y = batch(2, 3, 224)
    for image in (x, x.to(memory_format=torch.channels_last)):
        for name, eps in (("LinfFastGradientAttack", EPS), ("LinfProjectedGradientDescentAttack", EPS),
                          ("L2ProjectedGradientDescentAttack", 3.0)):
            same(name, fmodel, image, y, [eps / 2, eps], **few(name))


@peer
@pytest.mark.parametrize("name", NAMES)
def test_a_model_that_computes_the_same_twice_gives_the_same_bits(name):
    net = nn.Sequential(nn.Flatten(), nn.Linear(192, 10)).eval()
    fmodel = theirs.PyTorchModel(net, (0, 1), device="cpu")
    x, y = batch(5, 3, 8)
    found = [seeded(getattr(library, name)(random_start=True), fmodel, x, y, epsilons=[0.01, 0.3])
             for library in (theirs.attacks, attacks)]
    assert all(map(torch.equal, *found))


@peer
@pytest.mark.parametrize("name", NAMES)
def test_on_every_device(name, device):
    net, _, x, y = setting(torch.float64, size=16)
    fmodel = theirs.PyTorchModel(net, (0, 1), device=device)
    x, y = x.to(device), y.to(device)
    same(name, fmodel, x, y, [budget(name) / 2, budget(name)], random_start=True, **few(name))
    net.float()
    for precision in ("exact", "fast"):
        attack = getattr(attacks, name)(precision=precision, **few(name))
        raw, _, success = attack(fmodel, x.float(), y, epsilons=[budget(name)])
        assert raw[0].device == success.device == x.device and not torch.equal(raw[0], x.float())


# ---- the call --------------------------------------------------------------------------------------------------------

@peer
@pytest.mark.parametrize("epsilons", [[0.02, EPS, 0.3], (EPS,), np.array([0.01, 0.1]), torch.tensor([0.01, 0.1])])
def test_several_sizes(epsilons):
    _, fmodel, x, y = setting(size=16)
    for name in NAMES:
        attack = same(name, fmodel, x, y, [float(eps) for eps in epsilons], **few(name, 2))
        raw, clipped, success = attack(fmodel, x, y, epsilons=epsilons)
        assert isinstance(raw, list) and isinstance(clipped, list)
        assert len(raw) == len(clipped) == len(epsilons) and success.shape == (len(epsilons), 4)
        assert len({t.data_ptr() for t in (*raw, *clipped, x)}) == 2 * len(epsilons) + 1


@peer
def test_the_type_of_the_inputs_is_that_of_the_results():
    _, fmodel, x, y = setting(size=16)
    for attack in (attacks.PGD(steps=2), attacks.AdamPGD(steps=2), attacks.FGSM(precision="fast")):
        assert all(type(t) is torch.Tensor for t in attack(fmodel, x, y, epsilons=EPS))
        assert type(attack.run(fmodel, x, y, epsilon=EPS)) is torch.Tensor
        raw, clipped, success = attack(fmodel, ep.astensor(x), ep.astensor(y), epsilons=[EPS])
        assert all(type(t) is ep.PyTorchTensor for t in (raw[0], clipped[0], success))
        assert type(attack.run(fmodel, ep.astensor(x), y, epsilon=EPS)) is ep.PyTorchTensor


@peer
def test_repeat():
    _, fmodel, x, y = setting(size=16)
    found = [seeded(library.PGD(steps=2).repeat(2).repeat(2), fmodel, x, y, epsilons=[0.002, 0.01])
             for library in (theirs.attacks, attacks)]
    close(found[1][0], found[0][0], False)
    assert torch.equal(found[1][2], found[0][2]) and torch.equal(found[1][3], found[0][3])


class Counted(nn.Module):
    """Counts its forward passes; its dropout is always on where asked for."""

    def __init__(self, drops=False):
        super().__init__()
        self.passes, self.net, self.drops = 0, small_net(size=8), drops
        self.eval()

    def forward(self, x):
        self.passes += 1
        return self.net(nn.functional.dropout(x, 0.5, training=self.drops))


@peer
@pytest.mark.parametrize(("name", "steps", "wanted"), [
    ("FGSM", 1, 1 + 3), ("FGM", 1, 1 + 3), ("MIFGSM", 10, 1 + 27 + 3), ("LinfBasicIterativeAttack", 10, 1 + 27 + 3)])
def test_sizes_share_the_first_gradient(name, steps, wanted):
    x, y = batch(4)
    net = Counted()
    same(name, theirs.PyTorchModel(net, (0, 1), device="cpu"), x, y, [0.01, 0.02, 0.1])
    assert net.passes == 3 * (steps + 1) + wanted
    random = theirs.PyTorchModel(Counted(drops=True), (0, 1), device="cpu")
    same(name, random, x, y, [0.01, 0.02, 0.1])  # each its own, drawn in the library's order
    if steps == 1:
        fmodel = theirs.PyTorchModel(net, (0, 1), device="cpu")
        clipped = getattr(attacks, name)(precision="fast")(fmodel, x, y, epsilons=[0.01, 0.02])[1]
        for eps, several in zip((0.01, 0.02), clipped):
            close(several, getattr(attacks, name)(precision="fast")(fmodel, x, y, epsilons=eps)[1], True)


@peer
def test_errors():
    _, fmodel, x, y = setting(size=16)
    attack = attacks.PGD(steps=1)
    for library in (theirs.attacks, attacks):
        for epsilons in (None, [0.1, None]):
            with pytest.raises(NotImplementedError, match="None"):
                library.PGD()(fmodel, x, y, epsilons=epsilons)
        for bad in (x - 1, x + 1, x * torch.nan):
            with pytest.raises(AssertionError):
                library.PGD()(fmodel, bad, y, epsilons=EPS)
            with pytest.raises(AssertionError):
                library.PGD().run(fmodel, bad, y, epsilon=EPS)
        with pytest.raises(TypeError, match="unexpected keyword argument 'starts'"):
            library.PGD()(fmodel, x, y, epsilons=EPS, starts=2)
        with pytest.raises(TypeError, match="positional"):
            library.PGD(0.1)
        with pytest.raises(TypeError, match="unexpected keyword argument 'momentum'"):
            library.PGD(momentum=0.1)
        with pytest.raises(ValueError, match="must match the length of logits"):
            library.PGD()(fmodel, x, y[:2], epsilons=EPS)
    with pytest.raises(AssertionError, match=r"inputs must be in the model's bounds \[0, 1\], got \["):
        attack(fmodel, x + 1, y, epsilons=EPS)
    with pytest.raises(ValueError, match="epsilons must not be empty"):
        attack(fmodel, x, y, epsilons=[])
    for bad in (lambda: attacks.PGD(precision="quick"), lambda: setattr(attack, "precision", "quick")):
        with pytest.raises(ValueError, match="GradientDescentAttack: precision must be None, exact, fast, got 'quick'"):
            bad()


# ---- what the model and the caller keep ------------------------------------------------------------------------------

@peer
@pytest.mark.filterwarnings("ignore:The PyTorch model is in training mode")
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_model_is_left_as_it_was(precision):
    net, fmodel, x, y = setting(size=16)
    statistics = [b.clone() for b in net.buffers()]
    for training in (False, True):
        net.train(training)
        net[4].eval()
        before = [m.training for m in net.modules()]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # in training mode it is exact
            for attack in (attacks.PGD(steps=2, precision=precision), attacks.FGM(precision=precision)):
                attack(fmodel, x, y, epsilons=[0.1, 0.2])
                handle = net[-1].register_forward_hook(lambda *_: 1 / 0)
                with pytest.raises(ZeroDivisionError):
                    attack(fmodel, x, y, epsilons=0.1)
                handle.remove()
        assert [m.training for m in net.modules()] == before
        assert all(m.track_running_stats for m in net.modules() if isinstance(m, nn.BatchNorm2d))
    assert all(map(torch.equal, net.buffers(), statistics))
    assert all(p.grad is None and p.requires_grad for p in net.parameters())


@peer
@pytest.mark.filterwarnings("ignore:The PyTorch model is in training mode")
def test_a_model_in_training_mode_gives_the_librarys_numbers():
    net, fmodel, x, y = setting(size=16)
    net.train()
    for name in NAMES:
        same(name, fmodel, x, y, [budget(name) / 2, budget(name)], **few(name, 2))


@peer
@pytest.mark.parametrize("around", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("name", NAMES)
def test_where_autograd_is_off(name, precision, around):
    _, fmodel, x, y = setting(size=16, n=3)
    attack = getattr(attacks, name)(precision=precision, **few(name, 2))
    torch.manual_seed(0)
    ea.manual_seed(0)
    wanted = attack(fmodel, x, y, epsilons=0.1)
    torch.manual_seed(0)
    ea.manual_seed(0)
    with around():
        found = attack(fmodel, x.clone(), y.clone(), epsilons=0.1)
    assert all(map(torch.equal, found, wanted)) and not torch.equal(found[0], x)
    leaf = x.clone().requires_grad_()
    torch.manual_seed(0)
    ea.manual_seed(0)
    found = attack(fmodel, leaf * 1, y, epsilons=0.1)
    assert all(map(torch.equal, found, wanted)) and not any(t.requires_grad for t in found)
    assert leaf.grad is None


@peer
@pytest.mark.parametrize("precision", ["exact", "fast"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("name", NAMES)
def test_sixteen_bits_keep_the_budget(name, dtype, precision):
    net, fmodel, x, y = setting(dtype, size=16)
    for criterion in (y, theirs.TargetedMisclassification(y)):
        if criterion is y or name in TARGETED:
            raw, clipped, success = getattr(attacks, name)(precision=precision, **few(name, 10))(
                fmodel, x, criterion, epsilons=[budget(name)])
            assert raw[0].dtype == dtype and torch.equal(raw[0], clipped[0]) and raw[0] is not clipped[0]
            assert 0 <= raw[0].min() and raw[0].max() <= 1 and (raw[0] != x).any()
            delta = (raw[0].double() - x.double()).flatten(1)
            if name.startswith("L2"):
                assert (delta.norm(dim=1) <= 1 + 1e-6).all()
            else:
                assert delta.abs().max() <= torch.tensor(EPS).double()


@peer
def test_the_range_of_the_inputs_is_read_once(monkeypatch):
    _, fmodel, x, y = setting(size=16)
    reads = []
    for name in ("item", "tolist"):
        own = getattr(torch.Tensor, name)
        monkeypatch.setattr(torch.Tensor, name, lambda t, own=own: reads.append(1) or own(t))
    attacks.PGD(steps=3)(fmodel, x, y, epsilons=[0.01, 0.1])
    assert len(reads) == 1
    theirs.attacks.PGD(steps=3)(fmodel, x, y, epsilons=[0.01, 0.1])
    assert len(reads) == 1 + 6


# ---- their interface -------------------------------------------------------------------------------------------------

@peer
def test_signatures_and_interface():
    for name in (*NAMES, *attacks.ALIASES):
        mine, wanted = getattr(attacks, name), getattr(theirs.attacks, name)
        parameters = [p for p in inspect.signature(mine).parameters.values() if p.name != "precision"]
        assert parameters == [*inspect.signature(wanted).parameters.values()]
        assert (mine.__name__, mine.__module__) == (wanted.__name__, "ensadv_fast.compat.foolbox.attacks")
        assert repr(mine()) == repr(wanted()) and vars(mine()) == vars(wanted())
        assert issubclass(mine, wanted) and isinstance(mine(), theirs.attacks.base.FixedEpsilonAttack)
        assert [*inspect.signature(mine.run).parameters] == [*inspect.signature(wanted.run).parameters]
        assert mine().distance is wanted().distance
        for again in (copy.deepcopy(mine(precision="fast")), pickle.loads(pickle.dumps(mine(precision="fast")))):
            assert type(again) is mine and again.precision == "fast"
    assert "precision=fast" in repr(attacks.PGD(precision="fast"))
    wanted = {n for n in dir(theirs.attacks) if isinstance(getattr(theirs.attacks, n), type) and "Gradient" in n}
    assert {n for n in wanted if not n.startswith("L1") and n != "FixedEpsilonAttack"} <= {*NAMES, *attacks.ALIASES}
    assert attacks.L1PGD is theirs.attacks.L1PGD and ours.PyTorchModel is theirs.PyTorchModel
    assert ours.attacks.LinfPGD is attacks.PGD and {"PGD", *NAMES} <= set(dir(attacks))
    for module in (ours, attacks):
        with pytest.raises(AttributeError, match="no attribute 'Nothing'"):
            module.Nothing
        with pytest.raises(AttributeError, match="no attribute '_nothing'"):
            module._nothing


@peer
def test_the_librarys_own_objects_count_as_ours():
    assert isinstance(theirs.attacks.PGD(), attacks.PGD) and isinstance(theirs.attacks.AdamPGD(), attacks.PGD)
    assert issubclass(attacks.MIFGSM, attacks.LinfBasicIterativeAttack)
    assert not isinstance(theirs.attacks.PGD(), attacks.L2PGD) and not issubclass(int, theirs.attacks.PGD)

    class Own(attacks.PGD):
        pass

    assert isinstance(Own(), attacks.PGD) and not isinstance(attacks.PGD(), Own) and not isinstance(1, Own)


def overriding(base):
    """Subclasses as users write them, one for each extension point."""
    def value_and_grad(self, loss_fn, x):
        value, grad = base.value_and_grad(self, loss_fn, x)
        return value, grad * (x.raw > 0.5)

    def get_loss_fn(self, model, labels):
        return lambda inputs: model(inputs).square().sum()

    class Half(theirs.distances.LpDistance):
        def clip_perturbation(self, references, perturbed, epsilon):
            return super().clip_perturbation(references, perturbed, epsilon / 2)

    methods = {"value_and_grad": value_and_grad, "get_loss_fn": get_loss_fn,
               "normalize": lambda self, gradients, *, x, bounds: gradients * 3.0,
               "project": lambda self, x, x0, epsilon: x0 + (x - x0).clip(0, epsilon),
               "get_random_start": lambda self, x0, epsilon: x0 + epsilon,
               "get_optimizer": lambda self, x, stepsize: lambda gradients: gradients * 0.01,
               "distance": Half(np.inf)}
    return {name: type("Own", (base,), {name: method}) for name, method in methods.items()}


@peer
@pytest.mark.parametrize("hook", [*overriding(object)] if "theirs" in globals() else [])
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_an_extension_point_that_is_overridden_is_respected(hook, precision):
    _, fmodel, x, y = setting(size=16)
    found = [seeded(overriding(library.PGD)[hook](steps=3), fmodel, x, y, epsilons=[0.1, 0.2])
             for library in (theirs.attacks, attacks)]
    with compat.precision(precision):
        found.append(seeded(overriding(attacks.PGD)[hook](steps=3), fmodel, x, y, epsilons=[0.1, 0.2]))
    assert all(map(torch.equal, found[0], found[1])) and all(map(torch.equal, found[0], found[2]))
    assert not torch.equal(found[0][1], seeded(attacks.PGD(steps=3), fmodel, x, y, epsilons=[0.1, 0.2])[1])


@peer
def test_overridden_runs_and_attributes_and_gradient_estimators():
    _, fmodel, x, y = setting(size=16)

    def twice(base):
        class Twice(base):
            def run(self, model, inputs, criterion, *, epsilon, often=2, **kw):
                for _ in range(often):
                    inputs = super().run(model, inputs, criterion, epsilon=epsilon, **kw)
                return inputs

        return Twice(steps=2)

    for kw in ({}, {"often": 3}):
        found = [seeded(twice(library.PGD), fmodel, x, y, epsilons=[0.1, 0.2], **kw)
                 for library in (theirs.attacks, attacks)]
        close(found[1][0], found[0][0], False)
        assert torch.equal(found[1][3], found[0][3])
    mine, wanted = attacks.PGD(steps=2), theirs.attacks.PGD(steps=2)
    for attack in (mine, wanted):
        attack.project = lambda x, x0, epsilon: x0 + (x - x0).clip(0, epsilon)
    assert torch.equal(seeded(mine, fmodel, x, y, epsilons=0.1)[0], seeded(wanted, fmodel, x, y, epsilons=0.1)[0])
    found = [seeded(theirs.gradient_estimators.es_gradient_estimator(
        library.FGSM, samples=4, sigma=0.03, bounds=(0, 1), clip=True)(), fmodel, x, y, epsilons=0.1)[0]
        for library in (theirs.attacks, attacks)]
    assert torch.equal(*found)


# ---- fast ------------------------------------------------------------------------------------------------------------

@peer
@pytest.mark.parametrize("name", NAMES)
def test_fast_is_as_strong(name):
    net, x, y = trained()
    fmodel = theirs.PyTorchModel(net, (0, 1), device="cpu")
    for criterion in (y, theirs.TargetedMisclassification((y + 1) % 10)):
        if criterion is not y and name not in TARGETED:
            continue
        losses, labels = {}, y if criterion is y else criterion.target_classes.raw
        for precision in ("exact", "fast"):
            torch.manual_seed(0)
            ea.manual_seed(0)
            attack = getattr(attacks, name)(precision=precision, **few(name, 10))
            raw, clipped, success = attack(fmodel, x, criterion, epsilons=budget(name))
            logits = net(clipped)
            assert torch.equal(success, (logits.argmax(1) == labels) == (criterion is not y))
            assert 0 <= raw.min() and raw.max() <= 1
            delta = (raw - x).flatten(1)
            length = delta.norm(dim=1) if name.startswith("L2") else delta.abs().amax(1)
            assert (length <= budget(name) * (1 + 1e-5)).all()
            losses[precision] = nn.functional.cross_entropy(logits, labels).item()
        clean = nn.functional.cross_entropy(net(x), labels).item()
        assert (losses["fast"] - clean) / (losses["exact"] - clean) > 0.85


@peer
@pytest.mark.parametrize(("preprocessing", "bounds"), [
    ({}, (0, 255)), ({"mean": [100.0, 110.0, 120.0], "std": [50.0, 60.0, 70.0], "axis": -3}, (0, 255)),
    ({"mean": 0.3 * torch.ones(1), "flip_axis": -3}, (-1, 1)), ({"flip_axis": (-1, -3)}, (0, 1))],
    ids=["255", "statistics", "mean-flip", "flips"])
@pytest.mark.parametrize("name", PLAIN)
def test_fast_in_any_bounds(name, preprocessing, bounds):
    net, _, x, y = setting(size=16, n=10)
    x = x * (bounds[1] - bounds[0]) + bounds[0]
    if not preprocessing and bounds == (0, 255):
        preprocessing = {"std": torch.tensor(255.0)}
    fmodel = theirs.PyTorchModel(net, bounds, device="cpu", preprocessing=preprocessing)
    eps, losses = budget(name, bounds), {}
    for precision in ("exact", "fast"):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            attack = getattr(attacks, name)(precision=precision, **few(name, 30))
            adv = attack(fmodel, x, y, epsilons=eps)[1]
        assert bounds[0] <= adv.min() and adv.max() <= bounds[1]
        delta = (adv - x).flatten(1)
        length = delta.norm(dim=1) if name.startswith("L2") else delta.abs().amax(1)
        assert (length <= eps * (1 + 1e-5)).all() and (length > 0.5 * eps).all()
        losses[precision] = nn.functional.cross_entropy(fmodel(adv), y).item()
    clean = nn.functional.cross_entropy(fmodel(x), y).item()
    assert (losses["fast"] - clean) / (losses["exact"] - clean) > 0.85


FAST = {
    "FGSM": ({}, ea.Attack("LinfFastGradientAttack", 0.1, lo=0, hi=1)),
    "FGM": ({"random_start": True}, ea.Attack("L2FastGradientAttack", 0.1, direction="l2", start="uniform", step=0.1)),
    "PGD": ({"steps": 7}, ea.Attack("LinfProjectedGradientDescentAttack", 0.1, start="uniform", step=0.1 * (0.01 / 0.3),
                                    steps=7)),
    "L2BasicIterativeAttack": ({"abs_stepsize": 0.3}, ea.Attack("L2BasicIterativeAttack", 0.1, direction="l2", step=0.3,
                                                                steps=10)),
}


@peer
@pytest.mark.parametrize("name", FAST)
def test_fast_is_our_attack_with_every_argument(name, monkeypatch):
    kw, wanted = FAST[name]
    _, fmodel, x, y = setting(size=16)
    made = []
    from ensadv_fast.compat.foolbox import descent
    monkeypatch.setattr(descent.gradient, "Attack", lambda *args, **kw: made.append(ea.Attack(*args, **kw)) or made[-1])
    found = []
    for _ in range(2):
        ea.manual_seed(1)
        found.append(getattr(attacks, name)(**kw, precision="fast")(fmodel, x, y, epsilons=0.1)[0])
    assert made[0] == wanted
    assert torch.equal(*found)  # noise by our keys
    state = torch.get_rng_state()
    getattr(attacks, name)(**kw, precision="fast")(fmodel, x, y, epsilons=0.1)
    assert torch.equal(torch.get_rng_state(), state)
    ea.manual_seed(1)
    source = models.make_view(fmodel, x).source
    assert source is models.make_view(fmodel, x).source and not source.live
    assert torch.equal(made[0](source, x, y), found[0])


@peer
@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("change", "why"), [
    (lambda net, fmodel, x: (fmodel.transform_bounds((0, 2), wrapper=True), x), "a TransformBoundsWrapper"),
    (lambda net, fmodel, x: (theirs.models.wrappers.ExpectationOverTransformationWrapper(fmodel), x), "not a plain"),
    (lambda net, fmodel, x: (type("Own", (theirs.PyTorchModel,), {})(net, (0, 1)), x), "its model is a Own"),
    (lambda net, fmodel, x: (setattr(fmodel, "_model", lambda t: net(t) * 2), (fmodel, x))[1], "was exchanged"),
    (lambda net, fmodel, x: (net.train(), (fmodel, x))[1], "in training mode"),
    (lambda net, fmodel, x: (net.double(), (fmodel, x.double()))[1], "float64"),
    (lambda net, fmodel, x: (theirs.PyTorchModel(net, (0, 1), preprocessing={"mean": torch.rand(3, 16, 16)}), x),
     "not per channel"),
])
def test_what_a_source_cannot_do_is_exact_and_says_so(change, why):
    net, fmodel, x, y = setting(size=16)
    fmodel, x = change(net, fmodel, x)
    with pytest.warns(UserWarning, match=f"LinfProjectedGradientDescentAttack: is exact, not fast, since .*{why}"):
        found = seeded(attacks.PGD(steps=2, precision="fast"), fmodel, x, y, epsilons=[0.1, 0.2])
    assert all(map(torch.equal, found, seeded(attacks.PGD(steps=2), fmodel, x, y, epsilons=[0.1, 0.2])))


@peer
def test_no_step_is_exact():
    _, fmodel, x, y = setting(size=16)
    with pytest.warns(UserWarning, match="since it takes no step"):
        raw, _, _ = attacks.LinfBasicIterativeAttack(steps=0, precision="fast")(fmodel, x, y, epsilons=0.1)
    assert torch.equal(raw, x) and raw is not x


@peer
def test_one_warning_a_call_names_the_callers_line():
    _, fmodel, x, y = setting(torch.float64, size=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        attacks.PGD(steps=1, precision="fast")(fmodel, x, y, epsilons=[0.1, 0.2])
    assert [w.filename for w in caught] == [__file__]


# ---- install ---------------------------------------------------------------------------------------------------------

@peer
def test_install_and_uninstall():
    def held():
        return {(n, k): v for n, m in sys.modules.items() if m is not None and n.split(".")[0] == "foolbox"
                for k, v in vars(m).items() if isinstance(v, type)}

    own, before = theirs.attacks.PGD(steps=2), held()
    _, fmodel, x, y = setting(size=16)
    with compat.install("foolbox"):
        from foolbox.attacks import FGM, LinfPGD
        assert LinfPGD is theirs.attacks.PGD is attacks.PGD and FGM is attacks.L2FastGradientAttack
        assert theirs.attacks.L2AdamPGD is attacks.L2AdamProjectedGradientDescentAttack
        assert theirs.attacks.projected_gradient_descent.LinfProjectedGradientDescentAttack is attacks.PGD
        assert isinstance(own, LinfPGD) and isinstance(LinfPGD(), theirs.Attack)
        assert theirs.attacks.L1PGD is before["foolbox.attacks", "L1PGD"]
        with compat.install("foolbox"):
            pass
        assert theirs.attacks.PGD is attacks.PGD
        close(seeded(theirs.attacks.PGD(steps=2), fmodel, x, y, epsilons=0.1)[0],
              seeded(own, fmodel, x, y, epsilons=0.1)[0], False)
        assert theirs.attacks.L1PGD(steps=2)(fmodel, x, y, epsilons=5.0)[0].shape == x.shape
    assert held() == before and type(own) is theirs.attacks.PGD


@peer
@pytest.mark.skipif(importlib.util.find_spec("torchattacks") is None, reason="torchattacks is not installed")
def test_beside_another_backend():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import torchattacks
    net, fmodel, x, y = setting(size=16)
    with compat.install("torchattacks"), compat.install("foolbox"):
        adv = torchattacks.FGSM(net, 0.1)(x, y)
        assert (theirs.attacks.FGSM()(fmodel, x, y, epsilons=0.1)[1] - adv).abs().max() <= 1e-6
    assert [library.PGD.__module__.split(".")[0] for library in (torchattacks, theirs.attacks)] == [
        "torchattacks", "foolbox"]


@peer
def test_another_version_is_said(monkeypatch):
    backends.says_another_version("foolbox", "3.3.4", monkeypatch)


def test_without_the_library():
    backends.runs_without("foolbox", """
        from ensadv_fast.compat import foolbox as ours
        from ensadv_fast.compat.foolbox import attacks
        assert compat.foolbox is ours and "eagerpy" not in sys.modules
        """, "attacks.PGD", "ours.PyTorchModel")
