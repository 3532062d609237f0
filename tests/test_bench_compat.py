"""The benchmark of the drop-in backends verifies before it times, and says what it could not. No time is asserted."""
import importlib.util
import json
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from networks import small_net
from test_steps import bench, load  # noqa: F401  bench is a fixture

pytestmark = pytest.mark.filterwarnings("ignore")  # the peers' own
LIBRARIES = ("torchattacks", "foolbox", "cleverhans", "art")


@pytest.fixture
def compat(bench, tmp_path, monkeypatch):  # noqa: F811
    """bench/compat.py, with a small network alone."""
    module = load("compat")
    monkeypatch.setattr(bench[0], "BUILD", tmp_path / "networks")
    network = bench[0].Network("small", small_net, (3, 8, 8), 10, 8 / 255, 6, 6, 6)
    monkeypatch.setattr(module, "SIZES", {"small": network})
    monkeypatch.setattr(module, "ATTACKS", {"small": ("fgsm", "pgd")})
    return module


def backend(name: str) -> bool:
    return importlib.util.find_spec(f"ensadv_fast.compat.{name}") is not None


@pytest.mark.parametrize("attack", ["fgsm", "pgd"])
@pytest.mark.parametrize("name", LIBRARIES)
def test_ours_are_verified_against_theirs(compat, bench, name, attack):  # noqa: F811
    library = compat.LIBRARIES[name]
    theirs, why = compat.imported(library.theirs)
    if theirs is None:
        pytest.skip(f"{name} is not installed: {why}")
    network = compat.SIZES["small"]
    net = bench[0].settled(network)
    row = compat.row(library, theirs, network, net, attack, 6, "cpu", 0.0, 2)
    if backend(name):
        assert row["left_out"] == {} and list(row["contenders"]) == ["theirs", "ours, exact", "ours, fast"]
        assert row["contenders"]["ours, exact"]["equal_pixels"] >= compat.EQUAL[attack]
    else:
        assert list(row["contenders"]) == ["theirs"] and list(row["left_out"]) == list(compat.OURS)
        assert all("cannot be imported" in reason for reason in row["left_out"].values())
    assert row["contenders"]["theirs"]["loss_increase"] >= 0.97
    assert all(c["ms"] > 0 and (attack == "pgd" or c["bytes"] > 0) for c in row["contenders"].values())


@pytest.mark.parametrize(("wrong", "message"), [
    (lambda x, good: good + 0.01, "out of the budget"), (lambda x, good: x, "too weak"),
    (lambda x, good: torch.where(torch.arange(64).view(8, 8) == 0, x, good), "of pixels equal the library's")])
def test_wrong_ones_are_not_timed(compat, bench, monkeypatch, wrong, message):  # noqa: F811
    def case(lib, job, **more):
        (good,) = compat.plain(job).results
        return lambda: good if lib is theirs or more["precision"] == "fast" else wrong(job.x, good)

    theirs, network = SimpleNamespace(), compat.SIZES["small"]
    library = replace(compat.LIBRARIES["torchattacks"], case=case)
    row = compat.row(library, theirs, network, bench[0].settled(network), "fgsm", 6, "cpu", 0.0, 2)
    assert list(row["contenders"]) == ["theirs", "ours, fast"]
    assert list(row["left_out"]) == ["ours, exact"] and message in row["left_out"]["ours, exact"]


def test_results_are_stamped_shown_and_name_what_is_missing(compat, tmp_path, monkeypatch, capsys):
    def absent():
        raise ModuleNotFoundError("No module named 'foolbox'")

    simple = replace(compat.LIBRARIES["torchattacks"], ours="ensadv_fast.compat.no_such_backend")

    def theirs(lib, job, **more):
        return lambda: compat.plain(job).results[0]

    monkeypatch.setattr(compat, "LIBRARIES", {
        "torchattacks": replace(simple, case=theirs, theirs=lambda: SimpleNamespace()),
        "foolbox": replace(compat.LIBRARIES["foolbox"], theirs=absent)})
    out = tmp_path / "compat_cpu.json"
    command = ["--device", "cpu", "--seconds", "0", "--least", "2", "--out", str(out)]
    assert compat.main(command) == 0
    result = json.loads(out.read_text())
    assert {"commit", "time", "build", "runtime", "machine", "load_before", "load_after"} <= result.keys()
    assert [(r["library"], r["attack"]) for r in result["rows"]] == [("torchattacks", "fgsm"), ("torchattacks", "pgd")]
    assert result["missing"] == ["foolbox: ModuleNotFoundError: No module named 'foolbox'"]
    assert all(set(r["left_out"]) == set(compat.OURS) for r in result["rows"])
    said = capsys.readouterr().out
    assert "MISSING: foolbox" in said and "LEFT OUT: ours, exact" in said
    assert compat.main([*command, "--libraries", "torchattacks", "--batch", "1", "--add"]) == 0
    report = load("report")
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    shown = report.compat("compat_cpu.json")
    assert "calls/s" in shown and "| torchattacks, 1x3x8x8 |" in shown
