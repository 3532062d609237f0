"""evaluate.py: errors white-box and by transfer, and their summaries."""
import numpy as np
import pytest
import torch
from torch import nn

from ensadv_fast import Source, ops
from ensadv_fast.attacks import fgsm, pgd
from ensadv_fast.evaluate import TransferMatrix, black_box, transfer_matrix

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
