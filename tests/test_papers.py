"""bench/papers/: every table runs, tiny; claims are decided by rule; what is cached is not made again."""
import importlib
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

from ensadv_fast import data, train

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT / "bench"))
from papers import claims, common, fetch, mnist, networks, show  # noqa: E402
from papers import run as papers  # noqa: E402
from papers.claims import NOT_REPRODUCED, REPRODUCED, UNDECIDED, Estimate  # noqa: E402


# ---------------------------------------------------------------------------------------------- the rules


def around(value, half):
    return Estimate(value, value - half, value + half, 1000, 3)


@pytest.mark.parametrize(("a", "b", "verdict"), [
    (around(0.5, 0.03), around(0.3, 0.03), REPRODUCED), (around(0.3, 0.03), around(0.5, 0.03), NOT_REPRODUCED),
    (around(0.5, 0.1), around(0.45, 0.1), UNDECIDED), (around(0.45, 0.1), around(0.5, 0.1), UNDECIDED),
    (around(0.5, 0.001), around(0.5, 0.001), NOT_REPRODUCED),  # certainly less than a point apart
    (around(0.505, 0.001), around(0.5, 0.001), REPRODUCED), (around(0.9, 0.05), 0.8, REPRODUCED),
    (around(0.9, 0.05), 0.9, UNDECIDED), (around(0.8, 0.05), 0.9, NOT_REPRODUCED)])
def test_greater_and_less_follow_the_interval_of_the_difference(a, b, verdict):
    assert claims.greater("", a, b).verdict == verdict
    if isinstance(b, Estimate):
        assert claims.less("", b, a).verdict == verdict


@pytest.mark.parametrize(("a", "verdict"), [(0.101, REPRODUCED), (0.12, UNDECIDED), (0.2, NOT_REPRODUCED)])
def test_same_wants_the_whole_interval_inside(a, verdict):
    assert claims.same("", around(a, 0.004), around(0.1, 0.003), 0.02).verdict == verdict
    assert claims.same("", around(0.1, 0.003), around(a, 0.004), 0.02).verdict == verdict


def test_a_claim_is_as_weak_as_its_weakest_finding():
    good, open_, bad = (claims.Finding(v, "") for v in (REPRODUCED, UNDECIDED, NOT_REPRODUCED))
    assert claims.every([good, good]) == REPRODUCED
    assert claims.every([good, open_]) == UNDECIDED
    assert claims.every([open_, bad, good]) == NOT_REPRODUCED
    with pytest.raises(ValueError, match="at least one"):
        claims.every([])
    with pytest.raises(ValueError, match="mark"):
        claims.claim("", "", "D", [good])


def test_wilson_and_student():
    assert np.allclose(claims.wilson(0.1, 100), (0.05523, 0.17437), atol=1e-5)
    assert claims.wilson(0.0, 10)[0] == 0.0 and claims.wilson(1.0, 10)[1] == pytest.approx(1.0)
    assert claims.student(2) == 4.3027
    assert [round(claims.student(n), 3) for n in (11, 15, 30, 120)] == [2.201, 2.131, 2.042, 1.980]


def test_an_estimate_takes_in_images_and_seeds():
    one = claims.estimate([0.1], 100)
    assert (one.low, one.high) == claims.wilson(0.1, 100) and one.seeds == 1
    alike, apart = claims.estimate([0.1, 0.1, 0.1], 100), claims.estimate([0.05, 0.1, 0.15], 100)
    assert (alike.low, alike.high) == pytest.approx((one.low, one.high))
    half = 4.3027 * 0.05 / 3**0.5
    assert apart.high == pytest.approx(0.1 + np.hypot(one.high - 0.1, half))
    assert apart.low == 0.0
    two = claims.column([[0.1, 0.1], [0.2, 0.3]], 100)  # pooled: sd = sqrt(0.005 / 2), two degrees of freedom
    assert two[0].high == pytest.approx(0.1 + np.hypot(one.high - 0.1, 4.3027 * 0.05 / 2**0.5))


def test_difference_and_ratio_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    p, q, n, inside, within = 0.3, 0.2, 400, 0, 0
    for a, b in rng.binomial(n, (p, q), (1000, 2)) / n:
        d = claims.difference(claims.estimate([a], n), claims.estimate([b], n))
        r = claims.ratio(claims.estimate([a], n), claims.estimate([b], n))
        inside += d.low <= p - q <= d.high
        within += r.low <= p / q <= r.high
    assert 930 <= inside <= 970 and 930 <= within <= 970


# ------------------------------------------------------------------------------------------------ the lab


@pytest.fixture(scope="module")
def cache(tmp_path_factory, folder):
    """A cache whose MNIST is the little data set, and whose CIFAR-10 is noise."""
    path = tmp_path_factory.mktemp("papers")
    (path / "data").mkdir()
    (path / "data" / "mnist").symlink_to(folder)
    pixels = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    split = data.Split(pixels, torch.arange(40) % 10)
    return path, data.Dataset("cifar10", split, split, 10)


@pytest.fixture
def lab(cache, monkeypatch):
    path, cifar = cache
    load = data.load
    monkeypatch.setattr(data, "load", lambda spec: cifar if spec.startswith("cifar10") else load(spec))
    return common.Lab(path, "cpu")


def tiny(sizes):
    """The same table from a few images, one epoch, few seeds."""
    cifar = sizes.train.data == "cifar10"
    small = common.Images("cifar10" if cifar else "mnist", 20)
    changes = {"train": small, "test": replace(small, n=10, part="test"), "seeds": 1, "epochs": 1, "adv_epochs": 1,
               "transferred": replace(small, n=10, part="test"), "cw_images": 2, "cw_iterations": 2, "neighbours": 1,
               "networks": ("resnet8",) if cifar else ("D",), "held_out": ("convnet",) if cifar else ("D",),
               "static": ("convnet",), "sources": ("D", "C_tanh"), "conv": False, "options": (("batch_size", 20),)}
    return replace(sizes, **{f.name: changes[f.name] for f in fields(sizes) if f.name in changes})


@pytest.mark.parametrize("name", [t for t in papers.TABLES if t != "g"])
def test_every_table_runs(lab, name, tmp_path, monkeypatch):
    table = importlib.import_module(f"papers.{papers.TABLES[name]}")
    sizes = tiny(table.SIZES["small"])
    if name == "a":  # its static B and C take long
        monkeypatch.setattr(mnist, "ensemble", lambda sizes, name, seed, static: mnist.trained(
            sizes, name, replace(common.ENS, suffix=f"_ens{len(static)}"), seed,
            static=(mnist.plain(sizes, "D", role="static"),)))
    result = table.run(lab, sizes)
    path = tmp_path / "papers_x.json"
    common.write(path, name, "small", sizes, result, lab, {"machine": {"cpu": "x"}, "commit": "y"})
    written = json.loads(path.read_text())
    assert written["claims"] and {c["verdict"] for c in written["claims"]} <= {REPRODUCED, NOT_REPRODUCED, UNDECIDED}
    text = show.numbers(written)
    assert all(b["title"] in text for b in written["blocks"]) and "1 seed" in text
    assert show.claims(written).count("[V]") + show.claims(written).count("[M]") >= len(written["claims"])
    for block in written["blocks"]:
        for row in block["rows"]:
            assert "n " in row["size"]
            assert all(isinstance(c, str) or c["low"] <= c["value"] <= c["high"] for c in row["cells"])
