"""Labels, loaders and models as users bring them: alike in attacks, adversary, evaluation and diagnosis."""
import re

import pytest
import torch
import torch.nn.functional as F
from networks import batch, small_net
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

import ensadv_fast as ea
from ensadv_fast import data, diagnose, evaluate
from ensadv_fast.evaluate import example_images

KEY = ea.fresh_key(seed=5)
X, Y = batch(12)
NET = small_net(size=8).eval()
ATTACKS = {"fgsm": ea.fgsm(0.1), "pgd": ea.pgd(0.1, steps=2)}

# ---- labels ------------------------------------------------------------------------------------------------------

INTEGERS = [torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8]
LABELS = [*((dtype, column) for dtype in INTEGERS for column in (False, True)), (torch.bool, False), (torch.bool, True)]


def attacked(y):
    return torch.stack([attack(NET, X, y, key=KEY) for attack in ATTACKS.values()])


def gradient(y):
    return ea.Source(NET, live=True).input_grad(X, y).grad


def made(y):
    """Batches, their labels, and the loss of them."""
    adversary = ea.EnsembleAdversary(NET, attack=ea.fgsm(0.1), key=KEY)
    found = adversary(X, y)
    assert found.y.dtype == torch.int64 and found.y.shape == Y.shape
    loss = ea.mixed_cross_entropy(NET(found.x), y, found.is_adv)
    return torch.cat([found.x.flatten(), found.y.float(), loss[None].detach()])


def matrix(y):
    return evaluate.transfer_matrix({"a": NET}, {"a": NET}, ATTACKS, [(X, y)], key=KEY).to_dict(bits=True)


def diagnosed(y):
    found = diagnose.masking_report(NET, X, y, eps=0.1, steps=2, noises=2, key=KEY)
    from_loader = diagnose.masking_report(NET, [(X, y)], eps=0.1, steps=2, noises=2, key=KEY)
    assert found.to_dict() == from_loader.to_dict()
    return found.to_dict()


def watched(y):
    return diagnose.OverfittingMonitor(NET, X, y, eps=0.1, key=KEY).look(0).to_dict()


def calibrated(y):
    return tuple(ea.Source(NET, dtype=torch.float32).calibrate(X, y))


WAYS = [attacked, gradient, made, matrix, diagnosed, watched, calibrated]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("dtype, column", LABELS)
def test_labels_of_any_integer_dtype_are_taken_everywhere(way, dtype, column):
    y = Y % 2 if dtype == torch.bool else Y
    given = y.to(dtype)
    expected, found = way(y), way(given[:, None] if column else given)
    if isinstance(expected, torch.Tensor):
        assert torch.equal(found, expected)
    elif way is not calibrated:
        assert found == expected
    else:
        assert found == pytest.approx(expected)


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
@pytest.mark.parametrize("y", [Y.float(), Y.float()[:, None], Y[:5], Y[None]],
                         ids=["float", "float column", "too few", "row"])
def test_what_are_no_labels_is_refused_by_name(way, y):
    with pytest.raises((TypeError, ValueError), match=r"\by\b|labels"):
        way(y)


def test_soft_labels_are_taken_where_training_takes_them():
    soft = F.one_hot(Y, 10).float()
    found = ea.EnsembleAdversary(NET, attack=ea.fgsm(0.1), key=KEY)(X, soft)
    assert found.y is soft or torch.equal(found.y, soft)
    assert torch.equal(found.x, ea.EnsembleAdversary(NET, attack=ea.fgsm(0.1), key=KEY)(X, Y).x)
    for way in (attacked, matrix, diagnosed):
        with pytest.raises((TypeError, ValueError), match="y must be int64"):
            way(soft)


# ---- loaders -----------------------------------------------------------------------------------------------------

LOADERS = {
    "dicts": ({"image": X, "label": Y}, lambda b: (b["image"], b["label"])),
    "paths": ((X, Y, ["a.png"] * 12), lambda b: b[:2]),
    "metadata": ((X, Y, torch.zeros(12, 4).long()), lambda b: (b[0], b[1])),
    "rows": ([{"image": x, "label": int(y)} for x, y in zip(X, Y)],
             lambda rows: (torch.stack([r["image"] for r in rows]), torch.tensor([r["label"] for r in rows]))),
    "arrays": ((X.numpy(), Y.numpy()), lambda b: tuple(map(torch.from_numpy, b))),
    "four": ((X, Y, "a", "b"), lambda b: [b[0], b[1], None]),
}


def in_matrix(loader, **pick):
    return evaluate.transfer_matrix({"a": NET}, {"a": NET}, ATTACKS, loader, key=KEY, **pick).to_dict(bits=True)


def in_curve(loader, **pick):
    return evaluate.accuracy_curve(NET, NET, ea.fgsm, [0.0, 0.1], loader, key=KEY, **pick).to_dict()


def in_report(loader, **pick):
    return diagnose.gradient_alignment(NET, loader, key=KEY, **pick).to_dict()


def in_stream(loader, **pick):
    (found,) = ea.EnsembleAdversary(NET, attack=ea.fgsm(0.1), key=KEY).stream(loader, **pick)
    return found.x.tolist()


@pytest.mark.parametrize("way", [in_matrix, in_curve, in_report, in_stream], ids=lambda way: way.__name__)
@pytest.mark.parametrize("kind", LOADERS)
def test_a_function_makes_batches_of_whatever_a_loader_gives(way, kind):
    given, pick = LOADERS[kind]
    assert way([given], batch=pick) == way([(X, Y)])
    with pytest.raises((TypeError, ValueError)) as raised:
        way([given])
    words = {"dicts": r"dict with 'image': Tensor float32 \[12, 3, 8, 8\], 'label': Tensor int64", "paths": "list",
             "metadata": r"index must have shape.*\(12, 4\)|Tensor int64 \[12, 4\]\)",
             "rows": "12 parts \\(dict, dict, dict, dict, ...\\)",
             "arrays": "ndarray", "four": "4 parts|str"}
    assert re.search(words[kind], str(raised.value)), raised.value


# ---- models ------------------------------------------------------------------------------------------------------


class InPlace(nn.Module):
    """Normalises its input in place, as models in the wild do."""

    def __init__(self, seed=1, how="op"):
        super().__init__()
        self.net, self.how = small_net(seed, size=8), how

    def forward(self, x):
        if self.how == "data":
            x.data.sub_(0.5)
        elif self.how == "op":
            x.sub_(0.5)
        else:
            x = x - 0.5
        return self.net(x)


@pytest.mark.parametrize("how", ["op", "data"])
def test_a_model_that_writes_into_its_input_disturbs_nobody(how):
    """Neither the caller, nor those that judge and are attacked after it."""
    def all_of_it(how):
        x = X.clone()
        targets = {"in place": InPlace(how=how), "next": NET, "last": InPlace(2, how)}
        sources = {"next": NET, "saved": ea.Source(small_net(3, size=8), dtype=torch.float32)}
        bits = evaluate.transfer_matrix(targets, sources, ATTACKS, [(x, Y)], key=KEY).to_dict(bits=True)
        curve = evaluate.accuracy_curve(InPlace(how=how), NET, ea.pgd, [0.05, 0.1], [(x, Y)], key=KEY).to_dict()
        source = ea.Source(InPlace(how=how), dtype=torch.float32, mean=[0.0] * 3, std=[1.0] * 3)
        masking = diagnose.masking_report(source, x, Y, sources={"next": NET}, steps=2, noises=2, key=KEY).to_dict()
        surface = diagnose.loss_surface(source, x[:2], Y[:2], points=3, key=KEY).to_dict()
        split = data.Split((X * 255).byte(), Y)
        shown = example_images.craft(split, ATTACKS, "next", NET, targets, KEY)
        assert torch.equal(x, X)
        predictions = {row: {t: p.tolist() for t, p in by.items()} for row, by in shown.predictions.items()}
        return bits, curve, masking, surface, predictions, {row: p.tolist() for row, p in shown.pictures.items()}

    assert all_of_it(how) == all_of_it("")


def test_levels_are_diagnosed_as_the_images_that_they_are():
    levels = (X * 255).round().byte()
    for measure in (diagnose.masking_report, diagnose.gradient_norm, diagnose.cone_dimension, diagnose.loss_surface):
        options = {"key": KEY} if measure is not diagnose.gradient_norm else {}
        assert measure(NET, levels, Y, **options).to_dict() == measure(NET, levels / 255, Y, **options).to_dict()
    found = [diagnose.OverfittingMonitor(NET, x, Y, key=KEY).look(0) for x in (levels, levels / 255)]
    assert found[0] == found[1]


# ---- classes -----------------------------------------------------------------------------------------------------


class Named(TensorDataset):
    classes = ("cat", "dog", "owl")


def test_a_model_of_other_classes_than_the_datas_is_refused():
    y = Y % 3
    for options in ({"loader": DataLoader(Named(X, y), 5)}, {"loader": [(X, y)], "classes": 3}):
        with pytest.raises(ValueError, match=r"targets\['a'\] must give a logit for each of the 3 classes.*got 10"):
            evaluate.transfer_matrix({"a": NET}, {"a": NET}, ATTACKS, **options)
    net = small_net(size=8, classes=3)
    with pytest.raises(ValueError, match=r"sources\['b'\] must give a logit for each of the 3"):
        evaluate.transfer_matrix({"a": net}, {"b": NET}, ATTACKS, DataLoader(Named(X, y), 5))
    assert len(evaluate.transfer_matrix({"a": net}, {"a": net}, ATTACKS, DataLoader(Named(X, y), 5))) == 12
    known = DataLoader(Named(X, y), 5)
    assert len(evaluate.transfer_matrix({"a": NET}, {"a": NET}, ATTACKS, known, classes=10)) == 12
    for wrong in ([], [1, 1], [-1, 2], 0):
        with pytest.raises(ValueError, match="classes must be"):
            evaluate.transfer_matrix({"a": NET}, {}, {}, [(X, y)], classes=wrong)


def test_labels_are_mapped_to_logits():
    """A folder of three of the classes of a model of ten."""
    logits, y = [7, 0, 4], Y % 3
    options = {"targets": {"a": NET}, "sources": {"a": NET}, "attacks": ATTACKS, "key": KEY}
    mapped = evaluate.transfer_matrix(loader=DataLoader(Named(X, y), 5), classes=logits, **options)
    plain = evaluate.transfer_matrix(loader=DataLoader(TensorDataset(X, torch.tensor(logits)[y]), 5), **options)
    assert mapped.to_dict(bits=True) == plain.to_dict(bits=True)
    with pytest.raises(ValueError, match=r"y must lie in \[0, 3\), the places in classes"):
        evaluate.transfer_matrix(loader=[(X, Y)], classes=logits, **options)


def test_nan_is_said_once_and_counted():
    broken = small_net(size=8)
    with torch.no_grad():
        broken[-1].bias[3] = torch.nan
    with pytest.warns(UserWarning) as said:
        found = evaluate.transfer_matrix({"fine": NET, "broken": broken}, {"fine": NET}, ATTACKS, [(X, Y)], key=KEY)
    assert len(said) == 1 and "targets['broken'] gave NaN for 36 of the images" in str(said[0].message)
    assert found.clean_error("broken") == 1


# ---- what is printed ---------------------------------------------------------------------------------------------


def test_one_call_gives_one_table():
    found = evaluate.quick(NET, X, Y[:, None].int(), 0.1, key=KEY, batch_size=5)
    assert found.targets == ["model"] and found.attacks == ["fgsm", "pgd"] and len(found) == 12
    both = {"fgsm": ea.fgsm(0.1), "pgd": ea.pgd(0.1)}
    long = evaluate.transfer_matrix({"model": NET}, {"model": NET}, both, [(X, Y)], key=KEY)
    assert found.to_dict(bits=True) == long.to_dict(bits=True)
    lines = str(found).splitlines()
    assert lines[0].startswith("| model ") and "95 % interval" in lines[0] and len(lines) == 2 + 3 + 2
    assert f"| {100 * found.error('pgd', 'model', 'model'):.2f}" in lines[4] and "itself (white-box)" in lines[4]
    assert repr(found) == "TransferMatrix(2 attacks from 1 sources on 1 targets, 12 test inputs)"
    mine = evaluate.quick(ea.Source(NET), X, Y, 0.1, ["pgd_l2", ea.rand_fgsm(0.2)])
    assert mine.attacks == ["pgd_l2", "rand_fgsm"]
    with pytest.raises(ValueError, match="quick: attacks must be one of .*fgsm.*got 'pdg'"):
        evaluate.quick(NET, X, Y, 0.1, ["pdg"])
    with pytest.raises(ValueError, match=r"quick: y must have shape \[N\] = \[12\]"):
        evaluate.quick(NET, X, Y[:3], 0.1)
    assert str(evaluate.TransferMatrix()).startswith("| model")


def test_a_matrix_as_a_frame(monkeypatch):
    pandas = pytest.importorskip("pandas")
    other = small_net(4, size=8)
    matrix = evaluate.transfer_matrix({"a": NET, "b": other}, {"b": other}, ATTACKS, [(X, Y)], key=KEY)
    frame = matrix.to_pandas()
    assert isinstance(frame, pandas.DataFrame) and len(frame) == 2 + 4
    row = frame[(frame.attack == "pgd") & (frame.target == "a")].iloc[0]
    rate = matrix.error_rate("pgd", "b", "a")
    assert (row.source, row.white_box, row.error, row["count"], row.n) == ("b", False, rate.value, rate.count, 12)
    assert (row.low, row.high) == rate.interval and row.transfer_rate == matrix.transfer_rate("pgd", "b", "a").value
    assert frame[frame.attack == "clean"].error.tolist() == [matrix.clean_error("a"), matrix.clean_error("b")]
    monkeypatch.setitem(__import__("sys").modules, "pandas", None)
    with pytest.raises(ImportError, match="to_pandas needs the package pandas"):
        matrix.to_pandas()


def test_findings_and_sources_are_printed_for_people():
    found = diagnose.masking_report(NET, X, Y, steps=2, noises=2, key=KEY)
    text = str(found)
    assert text.startswith(found.verdict) and all(c.sentence in text for c in found.checks)
    cone = str(diagnose.cone_dimension(NET, X, Y, orders=[1, 4], key=KEY))
    assert "tensor" not in cone and "at_least: 1 " in cone and cone.startswith("ConeDimension\n")
    error = found["unbounded eps"].numbers["error"]
    assert str(error) == f"{error.value:.3g} ({error.low:.3g} to {error.high:.3g})"
    source = ea.Source(NET, dtype=torch.float32, mean=[0.5] * 3)
    assert repr(source) == "Source(Sequential: frozen, float32, normalised, crafting='eval', cpu)"
    live = ea.Source(NET, live=True, crafting="train")
    assert repr(live) == "Source(Sequential: live, the model's dtype, crafting='train', cpu)"
    assert repr(ea.Ensemble([source, live], fuse="probs")) == f"Ensemble({source!r}, {live!r}, fuse='probs')"
