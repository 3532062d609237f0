"""evaluate/: errors white-box and by transfer, their statistics and summaries, curves over eps."""
import json
import math
import tracemalloc
from contextlib import nullcontext

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader, TensorDataset

from ensadv_fast import Ensemble, Source, ops
from ensadv_fast.attacks import fgsm, pgd, rand_fgsm
from ensadv_fast.evaluate import (
    Rate,
    TransferMatrix,
    accuracy_curve,
    accuracy_curves,
    black_box,
    mcnemar,
    ties,
    transfer_matrix,
    two_proportions,
    wilson,
)

N = 40


def net(seed, dropout=0.0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Dropout(dropout), nn.Linear(12, 4))


@pytest.fixture
def xy():
    g = torch.Generator().manual_seed(1)
    return torch.rand(N, 1, 4, 4, generator=g), torch.randint(0, 4, (N,), generator=g)


def batches(x, y, size):
    return [(x[i], y[i], i) for i in torch.arange(N).split(size)]


ATTACKS = {"fgsm": fgsm(0.1), "pgd": pgd(0.1, steps=3)}


def test_errors_are_those_of_the_definition(xy):
    x, y = xy
    a, b = net(0), net(1)
    matrix = transfer_matrix({"a": a, "b": b}, {"b": b, "s": Source(net(2), dtype=torch.float32)},
                             {"fgsm": fgsm(0.1)}, batches(x, y, N))
    assert set(matrix.wrong) == {("fgsm", s, t) for s in "bs" for t in "ab"} and matrix.attacks == ["fgsm"]
    for s, source in (("b", b), ("s", net(2))):
        x_adv = fgsm(0.1)(source, x, y)
        for t, target in (("a", a), ("b", b)):
            wrong = (target.eval()(x_adv).argmax(1) != y).numpy()
            assert np.array_equal(matrix.wrong["fgsm", s, t], wrong)
            assert matrix.error("fgsm", s, t) == wrong.mean()
    assert matrix.clean_error("a") == (a(x).argmax(1) != y).float().mean().item()


def test_batch_size_changes_nothing(xy):
    x, y = xy
    models = {"a": net(0), "b": net(1)}
    one, two = (transfer_matrix(models, models, ATTACKS, batches(x, y, size), key=ops.fresh_key("cpu", 3))
                for size in (N, 7))
    assert one.wrong.keys() == two.wrong.keys()
    for pair, wrong in one.wrong.items():
        assert wrong.shape == (N,) and np.array_equal(wrong, two.wrong[pair])


def test_targets_are_in_eval_mode_meanwhile_and_left_as_they_were(xy):
    x, y = xy
    model = net(0, dropout=0.9).train()
    model[3].eval()
    one, two = (transfer_matrix({"a": model}, {"a": model}, {"fgsm": fgsm(0.1)}, batches(x, y, 9)) for _ in range(2))
    assert np.array_equal(one.clean["a"], two.clean["a"])
    assert [m.training for m in model.modules()] == [True, True, True, True, False, True]
    model.append(nn.Linear(3, 3))
    with pytest.raises(RuntimeError):
        transfer_matrix({"a": model}, {}, {}, batches(x, y, 9))
    assert [m.training for m in model.modules()] == [True, True, True, True, False, True, True]


def test_progress_counts_every_attack(xy):
    seen = []
    transfer_matrix({"a": net(0)}, {"b": net(1), "c": net(2)}, ATTACKS, batches(*xy, 16), progress=seen.append)
    assert sum(seen) == N * 4


def test_nothing_to_evaluate(xy):
    with pytest.raises(ValueError, match="no batch"):
        transfer_matrix({"a": net(0)}, {}, {}, [])
    with pytest.raises(ValueError, match="targets"):
        transfer_matrix({}, {}, {}, batches(*xy, 16))


def matrix():
    yes = {"f": "1100000000", "g": "0110000000", "h": "0000000000", "i": "1111111111"}
    bits = {k: np.array([c == "1" for c in v]) for k, v in yes.items()}
    return TransferMatrix({("fgsm", "A", "t"): bits["f"], ("pgd", "A", "t"): bits["g"], ("fgsm", "B", "t"): bits["h"],
                           ("fgsm", "A", "u"): bits["i"], ("fgsm", "t", "t"): bits["i"]})


def test_black_box_summaries():
    one = black_box(matrix(), "t", ["A"])
    assert (one.max, one.mean, one.worst_case) == (0.2, 0.2, 0.3)
    two = black_box(matrix(), "t", ["A", "B"])
    assert two.max == 0.2 and two.mean == pytest.approx(0.4 / 3) and two.worst_case == 0.3
    with pytest.raises(ValueError, match="no attack from"):
        black_box(matrix(), "t", [])


def test_merging():
    other = TransferMatrix({("fgsm", "C", "t"): np.ones(10, bool)}, {"t": np.zeros(10, bool)})
    both = matrix().merge(other)
    assert both.error("fgsm", "C", "t") == 1.0 and both.error("fgsm", "A", "t") == 0.2 and both.clean_error("t") == 0


# ---- statistics --------------------------------------------------------------------------------------------------


def test_wilson_is_the_root_of_its_definition():
    z = 1.959963984540054
    for count, n in ((0, 10), (3, 10), (10, 10), (1, 1), (4217, 10000)):
        low, high = wilson(count, n)
        assert 0 <= low <= count / n <= high <= 1
        for p, end in ((low, 0), (high, n)):
            if count != end:  # |count / n - p| = z sqrt(p (1 - p) / n)
                assert abs(count / n - p) == pytest.approx(z * math.sqrt(p * (1 - p) / n))
    assert wilson(0, 10)[0] == 0 and wilson(10, 10)[1] == 1
    assert wilson(0, 10)[1] == pytest.approx(z * z / (10 + z * z))
    with pytest.raises(ValueError, match="0 <= count <= n"):
        wilson(3, 2)
    assert Rate(0, 0).to_dict() == {"value": None, "count": 0, "n": 0, "low": None, "high": None}


def split(both, first, second, neither):
    """Two bool arrays with these counts of pairs."""
    a = np.repeat([True, True, False, False], [both, first, second, neither])
    b = np.repeat([True, False, True, False], [both, first, second, neither])
    return a, b


def test_mcnemar_is_a_coin_toss_over_what_differs():
    assert mcnemar(*split(50, 10, 2, 38)) == pytest.approx(2 * (1 + 12 + 66) / 2**12)
    assert mcnemar(*split(0, 2, 10, 0)) == mcnemar(*split(999, 10, 2, 9))
    assert mcnemar(*split(5, 0, 0, 5)) == mcnemar(*split(5, 3, 3, 5)) == 1.0
    assert mcnemar(*split(0, 30000, 29000, 0)) == pytest.approx(math.erfc(999 / math.sqrt(2 * 59000)), rel=1e-2)


def test_two_proportions_is_the_pooled_z_test():
    a, b = split(20, 40, 20, 20)  # 60 and 40 of 100: z = 0.2 / sqrt(2 * 0.5 * 0.5 / 100) = 2 sqrt 2
    assert two_proportions(a, b) == pytest.approx(math.erfc(2.0))
    assert two_proportions(a, a) == 1.0 and two_proportions(a & ~a, a & ~a) == 1.0
    with pytest.raises(ValueError, match="two bool arrays"):
        two_proportions(a, b[1:])


def test_ties_by_pairs_and_as_if_independent():
    a, b = split(40, 0, 8, 52)  # 40 and 48 errors of 100, nested: told apart only by what differs
    bits = {"a": a, "b": b, "c": np.ones(100, bool)}
    assert ties(bits) == ["a"] and ties(bits, test="independent") == ["a", "b"]
    assert ties(bits, best="highest") == ["c"]
    with pytest.raises(ValueError, match="got none"):
        ties({})
    with pytest.raises(ValueError, match="mcnemar or independent"):
        ties(bits, test="t")


# ---- measures ----------------------------------------------------------------------------------------------------


class Brightness(nn.Module):
    """Six classes by the first pixel, shifted: the label is floor(6 (p + shift)), the ranks follow the distance."""

    def __init__(self, shift=0.0):
        super().__init__()
        self.shift = nn.Parameter(torch.tensor(shift))

    def forward(self, x):
        at = 6 * (x.flatten(1)[:, :1] + self.shift) - 0.5
        return -(at - torch.arange(6, device=x.device)).square()


def bright(n=600):
    p = (torch.arange(n) + 0.5) / n
    return p.view(n, 1, 1, 1).clone(), (6 * p).long()


def test_known_answers_of_a_model_that_reads_one_pixel():
    """A step of eps moves p by eps away from its class's middle: p within eps of a border inside [0, 1] is fooled. A
    class five away from the label is never reached, so top-5 errors come from the sixth place alone."""
    x, y = bright()
    eps = 0.0301
    matrix = transfer_matrix({"m": Brightness()}, {"m": Brightness()}, {"f": fgsm(eps)}, DataLoader(
        TensorDataset(x, y), batch_size=64))
    fooled = np.zeros(600, bool)
    for border in range(1, 6):
        fooled |= np.abs((np.arange(600) + 0.5) / 600 - border / 6) < eps
    assert np.array_equal(matrix.wrong["f", "m", "m"], fooled) and matrix.clean_error("m") == 0
    assert matrix.error_rate("f", "m", "m").count == fooled.sum() == 180
    assert not matrix.wrong5["f", "m", "m"].any()
    # whoever is fooled was right before: the transfer rate of a source to itself is 1, out of the fooled ones
    assert matrix.transfer_rate("f", "m", "m") == Rate(180, 180)
    assert matrix.transfer_rate("f", "m", "m", top=5) == Rate(0, 0)


def test_transfer_rate_counts_what_fools_the_source_and_error_rate_everything():
    x, y = bright()
    source, target, attacks = Brightness(), Brightness(0.01), {"f": fgsm(0.0301)}
    matrix = transfer_matrix({"t": target}, {"s": source}, attacks, [(x, y)])
    x_adv = attacks["f"](source, x, y)
    own = (source(x).argmax(1) == y) & (source(x_adv).argmax(1) != y)
    wrong = target(x_adv).argmax(1) != y
    assert matrix.error_rate("f", "s", "t") == Rate(int(wrong.sum()), 600)
    assert matrix.transfer_rate("f", "s", "t") == Rate(int((wrong & own).sum()), int(own.sum()))
    assert matrix.error("f", "s", "t") != matrix.transfer_rate("f", "s", "t").value
    assert matrix.clean_error("t") == pytest.approx(0.05)  # 6 of 600 above each of five borders
    assert np.array_equal(matrix.wrong5["f", "s", "t"], (target(x_adv).topk(5).indices != y[:, None]).all(1).numpy())


class Fixed(nn.Module):
    def __init__(self, logits):
        super().__init__()
        self.logits = nn.Parameter(torch.tensor(logits))

    def forward(self, x):
        return self.logits + 0 * x.flatten(1)[:, :1]


@pytest.mark.parametrize("logits, wrong, wrong5", [
    ([9., 8, 7, 6, 5, 4], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]),
    ([1., 1, 1, 1, 1, 1], [0, 1, 1, 1, 1, 1], [0, 0, 0, 0, 0, 1]),  # ties: the lowest index first
    ([math.nan] * 6, [1] * 6, [1] * 6),
    ([9., math.nan, 7, 6, 5, 4], [1, 1, 1, 1, 1, 1], [0, 1, 0, 0, 0, 1]),
    ([1., 2], [1, 0], [0, 0]),
])
def test_top_1_and_top_5_by_rank(logits, wrong, wrong5):
    y = torch.arange(len(logits))
    nan = math.nan in logits
    with pytest.warns(UserWarning, match=r"targets\['m'\] gave NaN for 6 of") if nan else nullcontext():
        matrix = transfer_matrix({"m": Fixed(logits)}, {}, {}, [(torch.rand(len(y), 2), y)])
    assert matrix.clean["m"].tolist() == [bool(w) for w in wrong]
    assert matrix.clean5["m"].tolist() == [bool(w) for w in wrong5]


def test_sources_of_every_kind_judge_and_are_judged(xy):
    """Normalisation of a target's own; an ensemble; uint8 images; a source in train mode, reproducibly."""
    x, y = xy
    levels = (x * 255).round().byte()
    shifted = Source(net(1), mean=[0.5], std=[0.25], dtype=torch.float32)
    noisy = Source(net(2, dropout=0.5), crafting="train", dtype=torch.float32)
    targets = {"a": net(0), "n": shifted, "e": Ensemble([net(3), net(4)])}
    one, two = (transfer_matrix(targets, {"n": shifted, "d": noisy}, {"r": rand_fgsm(0.1)}, batches(levels, y, 16),
                                key=ops.fresh_key("cpu", 1)) for _ in range(2))
    for name in ("wrong", "wrong5", "counted"):
        found, again = getattr(one, name), getattr(two, name)
        assert all(np.array_equal(found[k], again[k]) for k in found) and set(found) == set(again)
    plain = net(1).eval()
    assert np.array_equal(one.clean["n"], (plain((levels / 255 - 0.5) / 0.25).argmax(1) != y).numpy())


def test_white_box_crafts_on_each_target_for_itself(xy):
    a, b = net(0), net(1)
    calls = []
    matrix = transfer_matrix({"a": a, "b": b}, {"s": net(2), "b": b}, ATTACKS, batches(*xy, 16), white_box=True,
                             key=ops.fresh_key("cpu", 5), progress=calls.append)
    assert {(s, t) for _, s, t in matrix.wrong} == {("s", "a"), ("s", "b"), ("b", "a"), ("b", "b"), ("a", "a")}
    alone = transfer_matrix({"a": a}, {"a": a}, ATTACKS, batches(*xy, 9), key=ops.fresh_key("cpu", 5))
    assert np.array_equal(matrix.wrong["pgd", "a", "a"], alone.wrong["pgd", "a", "a"])
    assert sum(calls) == N * 2 * 3 and matrix.data == alone.data is not None


def test_black_box_says_which_pair_and_what_ties_with_it():
    found = black_box(matrix(), "t")
    assert found.pair == ("fgsm", "A") and set(found.tied) == {("fgsm", "A"), ("pgd", "A"), ("fgsm", "B")}
    assert found.n == 10 and found.max_interval == wilson(2, 10) and found.worst_case_interval == wilson(3, 10)
    many = TransferMatrix({("f", s, "t"): np.arange(1000) < n for s, n in (("A", 500), ("B", 498), ("C", 300))})
    assert black_box(many, "t").tied == (("f", "A"), ("f", "B"))
    many.wrong["f", "A", "u"] = np.arange(1000) < 100
    assert many.tied_targets("f", "A") == ["u"] and many.tied_targets("f", "B") == ["t"]


def test_a_matrix_is_saved_and_told_as_json(xy, tmp_path):
    matrix = transfer_matrix({"a": net(0), "b": net(1)}, {"b": net(1)}, ATTACKS, batches(*xy, 16))
    path = tmp_path / "matrix.json"
    matrix.save(path)
    again = TransferMatrix.load(path)
    assert again.to_dict(bits=True) == matrix.to_dict(bits=True) and len(again) == N
    body = json.loads(json.dumps(matrix.to_dict(), allow_nan=False))
    assert (body["n"], body["attacks"], body["sources"], body["targets"]) == (N, ["fgsm", "pgd"], ["b"], ["a", "b"])
    cell = next(c for c in body["cells"] if (c["attack"], c["target"]) == ("pgd", "a"))
    assert cell["error"]["top1"] == matrix.error_rate("pgd", "b", "a").to_dict() and not cell["white_box"]
    assert cell["transfer_rate"]["top5"]["n"] == 0 and body["tied_targets"][0]["targets"] == ["a"]
    for text in ("{", "[]", path.read_text()[:500], path.read_text().replace('"bits"', '"bots"')):
        (tmp_path / "bad.json").write_text(text)
        with pytest.raises(ValueError, match="bad.json is corrupt"):
            TransferMatrix.load(tmp_path / "bad.json")


def test_matrices_of_other_inputs_do_not_mix(xy):
    x, y = xy
    one, two = (transfer_matrix({"a": net(0)}, {}, {}, [(images, y)]) for images in (x, x.flip(0)))
    with pytest.raises(ValueError, match="different test inputs"):
        one.merge(two)
    with pytest.raises(ValueError, match="same test inputs, got"):
        TransferMatrix(clean={"a": np.ones(3, bool), "b": np.ones(4, bool)})


# ---- loaders -----------------------------------------------------------------------------------------------------


def test_any_loader_gives_the_same(xy):
    x, y = xy
    model, attacks, key = net(0), {"pgd": pgd(0.1, steps=2)}, ops.fresh_key("cpu", 2)
    loaders = [DataLoader(TensorDataset(x, y), batch_size=7), [[x, y.int(), torch.arange(N, dtype=torch.int32)]],
               ((x[i:i + 1], y[i:i + 1]) for i in range(N)), [(x[:0], y[:0]), (x, y)]]
    found = [transfer_matrix({"a": model}, {"a": model}, attacks, loader, key=key) for loader in loaders]
    assert all(m.to_dict(bits=True) == found[0].to_dict(bits=True) for m in found)


@pytest.mark.parametrize("loader, error, message", [
    ([torch.rand(4, 16)], TypeError, r"batches \(x, y\)"),
    ([(torch.rand(4, 16),)], TypeError, "got 1 parts"),
    ([(torch.rand(4, 16).tolist(), torch.zeros(4).long())], TypeError, "x must be a torch.Tensor, got list"),
    ([(torch.rand(4), torch.zeros(4).long())], ValueError, r"shape \[N, ...\]"),
    ([(torch.rand(4, 16), torch.zeros(3).long())], ValueError, r"y must have shape \[N\] = \[4\]"),
    ([(torch.rand(4, 16), torch.zeros(4))], TypeError, "y must be int64"),
    ([(torch.rand(4, 16), torch.zeros(4).long(), torch.zeros(4, 1).long())], ValueError, "index must have shape"),
    ([(torch.rand(4, 16), torch.full((4,), 7))], ValueError, r"y must lie in \[0, 4\)"),
    ([(torch.rand(0, 16), torch.zeros(0).long())], ValueError, "no batch"),
    (None, ValueError, "loader must be given.*got None"),
])
def test_wrong_batches_are_named(loader, error, message):
    with pytest.raises(error, match=message):
        transfer_matrix({"a": net(0)}, {"a": net(0)}, {"f": fgsm(0.1)}, loader)


def test_wrong_models_are_named(xy):
    with pytest.raises(TypeError, match=r"targets\['a'\] must be a Source.*got int"):
        transfer_matrix({"a": 3}, {}, {}, [xy])
    with pytest.raises(TypeError, match=r"sources\['b'\] must be a Source"):
        transfer_matrix({"a": net(0)}, {"b": []}, {}, [xy])
    with pytest.raises(ValueError, match=r"one device, got targets\['a'\] on cpu, sources\['m'\] on meta"):
        transfer_matrix({"a": net(0)}, {"m": net(1).to("meta")}, {}, [xy])
    with pytest.raises(ValueError, match="set_dtype must be"):
        transfer_matrix({"a": net(0)}, {}, {}, [xy], set_dtype="int8")


def test_memory_does_not_grow_with_batches():
    """Ten times the batches keep no more than their bits."""
    def peak(n):
        g = torch.Generator().manual_seed(0)
        stream = ((torch.rand(50, 1, 4, 4, generator=g), torch.zeros(50).long()) for _ in range(n))
        tracemalloc.start()
        try:
            transfer_matrix({"a": net(0)}, {"b": net(1)}, ATTACKS, stream)
            return tracemalloc.get_traced_memory()[1]
        finally:
            tracemalloc.stop()

    peak(3)
    few, many = peak(3), peak(30)
    # 27 batches x 7 verdicts of 2 bits x 50 examples, in bytes objects and lists of them
    assert many - few < 27 * 7 * 200


# ---- curves ------------------------------------------------------------------------------------------------------


def test_accuracy_curves_of_a_model_that_reads_one_pixel():
    x, y = bright()
    model = Brightness()
    curve = accuracy_curve(model, model, fgsm(0.5), [0.0301, 0.0, 0.0101], [(x, y)])
    assert curve.eps == (0.0, 0.0101, 0.0301) and curve.accuracy == [1.0, 1 - 60 / 600, 1 - 180 / 600]
    assert curve.to_dict()["white_box"] and curve.top1[2] == Rate(420, 600)
    far = accuracy_curve(Brightness(0.01), model, fgsm, [0.0, 0.0301], [(x, y)])
    matrix = transfer_matrix({"t": Brightness(0.01)}, {"s": model}, {"f": fgsm(0.0301)}, [(x, y)])
    assert far.accuracy == [1 - matrix.clean_error("t"), 1 - matrix.error("f", "s", "t")]
    assert (far.attack, far.source, far.target) == ("fgsm", "source", "target")


def test_curves_of_all_pairs_share_one_pass_and_one_noise(xy):
    x, y = xy
    models = {"a": net(0), "b": net(1)}
    passes = []

    def loader():
        passes.append(1)
        yield x, y

    curves = accuracy_curves(models, {"b": models["b"]}, {"pgd": lambda eps: pgd(eps, steps=2)}, [0.2, 0.1],
                             loader(), key=ops.fresh_key("cpu", 3), white_box=True)
    assert passes == [1] and {(c.source, c.target) for c in curves.all()} == {("b", "a"), ("b", "b"), ("a", "a")}
    for eps in (0.1, 0.2):
        alone = transfer_matrix(models, {"b": models["b"]}, {"pgd": pgd(eps, steps=2)}, [(x, y)],
                                key=ops.fresh_key("cpu", 3))
        assert np.array_equal(curves.matrices[eps].wrong["pgd", "b", "a"], alone.wrong["pgd", "b", "a"])
    with pytest.raises(ValueError, match="each >= 0"):
        accuracy_curves(models, {}, {}, [-0.1], [(x, y)])


@pytest.mark.gpu
def test_on_a_gpu_as_on_the_cpu_and_without_a_wait_per_cell(xy):
    x, y = xy
    found = {}
    for device in ("cpu", "cuda"):
        models = {name: net(i).double().to(device) for i, name in enumerate("ab")}
        loader = [(a.double().to(device), b.to(device), i.to(device)) for a, b, i in batches(x, y, 9)]
        transfer_matrix(models, models, ATTACKS, loader[:1], key=ops.fresh_key("cpu", 3))
        if device == "cuda":
            torch.cuda.set_sync_debug_mode("error")
        try:
            found[device] = transfer_matrix(models, models, ATTACKS, loader, key=ops.fresh_key("cpu", 3))
        finally:
            if device == "cuda":
                torch.cuda.set_sync_debug_mode("default")
    assert found["cpu"].to_dict(bits=True) == found["cuda"].to_dict(bits=True)
