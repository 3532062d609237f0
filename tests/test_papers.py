"""bench/papers/: every table runs, tiny; claims are decided by rule; what is cached is not made again."""
import importlib
import json
import sys
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import ensadv_fast as ea
from ensadv_fast import data, evaluate
from ensadv_fast.train import checkpoints

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))  # not first: tests/networks.py is another one
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


def test_gaps_pair_the_seeds():
    errors = [[0.2, 0.4, 0.6]], [[0.1, 0.3, 0.5]]
    (gap,) = claims.gaps(*errors, 1000)
    images = claims.difference(claims.estimate([0.4], 1000), claims.estimate([0.3], 1000))
    assert (gap.low, gap.high) == pytest.approx((images.low, images.high)) and gap.seeds == 3
    (a,), (b,) = (claims.column(e, 1000) for e in errors)
    assert claims.difference(a, b).low < 0 < gap.low  # the seeds differ much, but all alike


def test_difference_and_ratio_cover_as_often_as_they_say():
    rng = np.random.default_rng(0)
    p, q, n, inside, within = 0.3, 0.2, 400, 0, 0
    for a, b in rng.binomial(n, (p, q), (1000, 2)) / n:
        d = claims.difference(claims.estimate([a], n), claims.estimate([b], n))
        r = claims.ratio(claims.estimate([a], n), claims.estimate([b], n))
        inside += d.low <= p - q <= d.high
        within += r.low <= p / q <= r.high
    assert 930 <= inside <= 970 and 930 <= within <= 970


def test_transfer_rate_counts_what_fooled_the_source():
    table = importlib.import_module("papers.e_transfer")
    wrong = {("a", "s", "s"): [1, 1, 1, 0], ("a", "s", "t"): [1, 0, 1, 1], ("a", "t", "t"): [0, 0, 0, 0],
             ("a", "t", "s"): [1, 1, 1, 1]}
    clean = {"s": [0, 0, 1, 0], "t": [0, 0, 0, 0]}
    matrix = evaluate.TransferMatrix({k: np.array(v, bool) for k, v in wrong.items()},
                                     {k: np.array(v, bool) for k, v in clean.items()})
    rate = table.rate(matrix, "a", [("s", "t")])
    assert (rate.value, rate.n, rate.low, rate.high) == (0.5, 2, *claims.wilson(0.5, 2))
    nobody = table.rate(matrix, "a", [("t", "s")])
    assert (nobody.low, nobody.high, nobody.n) == (0.0, 1.0, 0)


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
    changes = {
        "train": small, "test": replace(small, n=4 if cifar else 10, part="test"), "seeds": 1, "epochs": 1,
        "adv_epochs": 1, "transferred": replace(small, n=10, part="test"), "cw_images": 2, "cw_iterations": 2,
        "neighbours": 1, "networks": ("convnet",) if cifar else ("D",), "conv": False, "sources": ("D", "C_tanh"),
        "held_out": ("convnet",) if cifar else ("D",), "static": ("convnet",), "options": (("batch_size", 20),)}
    return replace(sizes, **{f.name: changes[f.name] for f in fields(sizes) if f.name in changes})


@pytest.mark.parametrize("name", [t for t in papers.TABLES if t != "g"])
def test_every_table_runs(lab, name, tmp_path, monkeypatch):
    table = importlib.import_module(f"papers.{papers.TABLES[name]}")
    sizes = tiny(table.SIZES["small"])
    if name in "de":
        monkeypatch.setattr(table, "EPSILONS", (0.1, 0.3))
    if name == "a":  # its static B and C take long
        monkeypatch.setattr(mnist, "ensemble", lambda sizes, name, seed, static: mnist.trained(
            sizes, name, replace(common.ENS, suffix=f"_ens{len(static)}"), seed,
            static=(mnist.plain(sizes, "D", role="static"),)))
    result = table.run(lab, sizes)
    path = tmp_path / "papers_x.json"
    common.write(path, name, "small", sizes, result, lab, {
        "machine": {"cpu": "x"}, "commit": "y", "load_before": [0.5]})
    written = json.loads(path.read_text())
    assert written["claims"] and {c["verdict"] for c in written["claims"]} <= {REPRODUCED, NOT_REPRODUCED, UNDECIDED}
    text = show.numbers(written)
    assert all(b["title"] in text for b in written["blocks"]) and "1 seed" in text
    assert "1 seed" in show.claims(written) and "load average 0.5" in show.claims(written)
    assert show.claims(written).count("[V]") + show.claims(written).count("[M]") >= len(written["claims"])
    for block in written["blocks"]:
        for row in block["rows"]:
            assert "n " in row["size"]
            assert all(isinstance(c, str) or c["low"] <= c["value"] <= c["high"] for c in row["cells"])


def net(**changes):
    return replace(common.Net("mnist:D", common.ADV, 2, common.Images("mnist", 40), options=(("batch_size", 20),)),
                   **changes)


def test_a_network_that_was_interrupted_ends_with_the_same_weights(lab, folder, tmp_path, monkeypatch):
    save = checkpoints.save

    def interrupted(path, state):
        save(path, state)
        raise KeyboardInterrupt

    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "mnist").symlink_to(folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(checkpoints, "save", interrupted)
        common.Lab(tmp_path, "cpu").network(net())  # is killed after its first epoch
    said = []
    again = common.Lab(tmp_path, "cpu", said.append).network(net())
    assert said == []  # it goes on, it does not begin
    assert all(torch.equal(a, b) for a, b in zip(again.state_dict().values(), lab.network(net()).state_dict().values()))


def test_what_is_in_the_cache_is_not_made_again(lab, monkeypatch):
    test = common.Images("mnist", 10, "test")
    first = lab.white_box({"D": net()}, {"FGSM": mnist.FGSM}, test)
    spent = dict(lab.seconds)

    def unwanted(*args, **kw):
        raise AssertionError("made again")

    monkeypatch.setattr(evaluate, "transfer_matrix", unwanted)
    again = common.Lab(lab.cache, "cpu", unwanted)
    second = again.white_box({"D": net()}, {"FGSM": mnist.FGSM}, test)
    assert np.array_equal(first.wrong["FGSM", "D", "D"], second.wrong["FGSM", "D", "D"])
    assert again.seconds == spent and len(spent) == 2  # the network's and the cell's, whoever made them
    with pytest.raises(AssertionError, match="made again"):
        again.white_box({"D": net()}, {"FGSM": replace(mnist.FGSM, eps=0.2)}, test)


def test_an_identity_is_all_that_a_network_depends_on(lab):
    static = net(recipe=common.PLAIN, role="static")
    other = (net(seed=1), net(role="static"), net(epochs=3), net(eps=0.2), net(options=(("batch_size", 10),)),
             net(images=common.Images("mnist", 30)), net(recipe=replace(common.ADV, lam=0.3)), net(spec="mnist:A"),
             net(static=(static,)), net(static=(replace(static, seed=1),)))
    assert len({lab.identity(n) for n in (net(), *other)}) == 1 + len(other)
    assert lab.identity(net()) == lab.identity(net())


def test_defaults_leave_no_trace_in_fingerprints():
    assert common.essence(common.Images("digits")) == {"Images": {"data": "digits"}}
    assert common.essence(common.Images("digits", 5)) == {"Images": {"data": "digits", "n": 5}}


def test_cw_takes_positions_in_the_data_set_where_samples_leave_early(lab):
    split = lab.split(common.Images("mnist", 10, "test"))
    x, y = split.batch(torch.arange(10))
    d = lab.network(net())
    attack = ea.cw_linf(0.3, max_iterations=4, check_every=1, learning_rate=0.1)
    index = torch.arange(10)
    assert torch.equal(attack(ea.Source(d), x, y, index=index), attack(ea.Source(d), x, y))


def test_images_are_spread_over_the_file(lab):
    labels = lab.split(common.Images("mnist", 20)).labels
    whole = lab.whole("mnist").train
    assert torch.equal(labels, whole.labels[torch.arange(20) * len(whole) // 20])
    with pytest.raises(ValueError, match="there are only"):
        lab.split(common.Images("mnist", 10**6))


# ------------------------------------------------------------------------------------ networks, data, commands


def test_networks_are_what_their_names_say():
    def sizes(net):
        return [tuple(p.shape) for p in net.parameters()]

    from ensadv_fast import models
    assert sizes(networks.d()) == sizes(models.mnist_d())
    assert sizes(networks.B_star()) == sizes(models.mnist_b())
    assert sizes(networks.D_double())[2] == (600, 600)
    assert not any(isinstance(m, torch.nn.Dropout) for m in networks.D_no_dropout())
    x = torch.rand(2, 1, 28, 28, requires_grad=True)
    binary = networks.Binarise()(x)
    assert torch.equal(binary, (x >= 0.5).float())
    assert torch.equal(torch.autograd.grad(binary.sum(), x)[0], torch.ones_like(x))  # attacks see through it
    for name in ("resnet8", "resnet14", "convnet"):
        assert models.build(f"papers.networks:{name}").eval()(torch.rand(2, 3, 32, 32)).shape == (2, 10)


def test_an_archive_is_checked_and_unpacked(tmp_path):
    import hashlib
    import zipfile
    path = tmp_path / "a-1-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as f:
        f.writestr("a/data.txt", "digits")
    good = fetch.Archive("a==1", path.name, "x", hashlib.sha256(path.read_bytes()).hexdigest())
    with pytest.raises(ValueError, match="SHA-256"):
        fetch.unpack(path, replace(good, sha256="0" * 64), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    fetch.unpack(path, good, tmp_path / "x")
    assert (tmp_path / "x" / "a" / "data.txt").read_text() == "digits"
    assert (tmp_path / "x" / f"{path.name}.sha256").exists()
    assert {a.folder for a in fetch.ARCHIVES} == {"mnist", "cifar10", "imagenet"}


@pytest.mark.parametrize("name", ["b", "f", "g"])
def test_a_table_without_its_data_is_skipped_loudly(name, tmp_path, capsys):
    assert papers.main([name, "--cache", str(tmp_path), "--out", str(tmp_path / "out"), "--device", "cpu"]) == 1
    assert f"SKIPPED table {name}" in capsys.readouterr().err and not (tmp_path / "out").exists()


def test_the_command_writes_a_stamped_result(lab, tmp_path, monkeypatch, capsys):
    table = importlib.import_module("papers.b_random_start")
    monkeypatch.setattr(table, "SIZES", {"small": tiny(table.SIZES["small"])})
    assert papers.main(["b", "--seeds", "2", "--cache", str(lab.cache), "--out", str(tmp_path), "--device", "cpu"]) == 0
    made = json.loads((tmp_path / "papers_b.json").read_text())
    assert {"commit", "runtime", "machine", "load_before", "load_after", "sizes", "seconds", "preset"} <= set(made)
    assert made["blocks"][0]["rows"][0]["size"] == "20 x 1 epochs, 2 seeds, n 10"
    assert made["blocks"][0]["rows"][0]["cells"][1]["paper"] == 90.0
    assert capsys.readouterr().out.count("(b)") == len(made["claims"])


def test_every_table_has_both_presets():
    for module in papers.TABLES.values():
        sizes = importlib.import_module(f"papers.{module}").SIZES
        assert set(sizes) == {"small", "full"}
