"""Files that version 0.1.0 wrote (tests/written_by_0_1/make.py) are read, and gone on with, and give the same numbers.

What is only read back is compared exactly; so are predictions for saved images, which make.py saw to be clear. What is
computed anew is not: processors differ in the last bits of sums.
"""
import gzip
import hashlib
import importlib.metadata
import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from ensadv_fast import cli, models, report
from ensadv_fast.attacks import BaseAttack
from ensadv_fast.evaluate import TransferMatrix, find_sets, load_set, transfer_matrix

WRITTEN = Path(__file__).parent / "written_by_0_1"
EXPECTED = json.loads((WRITTEN / "expected.json").read_text())
SETS = {"uint8": "B-fgsm", "float32": "B-pgd_l2"}
LAST_BITS = {"rtol": 1e-5, "atol": 1e-5}


@pytest.fixture
def copy(tmp_path, monkeypatch):
    """The files again, where they may change, as the working directory: the runs name their data "mnist:data"."""
    shutil.copytree(WRITTEN, tmp_path / "copy")
    monkeypatch.chdir(tmp_path / "copy")
    return tmp_path / "copy"


@pytest.fixture
def inputs(monkeypatch):
    monkeypatch.syspath_prepend(WRITTEN)  # for the command too, which finds written_inputs:D there
    import written_inputs

    return written_inputs


@pytest.fixture
def same_versions(monkeypatch):
    """A journal is of no use to other versions of torch or of this package, so these say that they are the old ones."""
    monkeypatch.setattr(importlib.metadata, "version", lambda name: EXPECTED["versions"][name])
    monkeypatch.setattr(torch, "__version__", type(torch.__version__)(EXPECTED["versions"]["torch"]))


@pytest.fixture
def calls(monkeypatch):
    """The names of all attacks that are called."""
    made, call = [], BaseAttack.__call__

    def counted(self, *args, **options):
        made.append(self.name)
        return call(self, *args, **options)

    monkeypatch.setattr(BaseAttack, "__call__", counted)
    return made


def contents(folder):
    return {path.relative_to(folder): path.read_bytes() for path in sorted(folder.rglob("*")) if path.is_file()}


def read_json(path):
    return json.loads(Path(path).read_text())


def as_json(matrix):
    return json.loads(json.dumps(matrix.to_dict(bits=True)))


# ---------------------------------------------------------------------------------------------- adversarial sets


@pytest.mark.parametrize("dtype", SETS)
def test_a_saved_set_has_the_same_images(dtype):
    saved = load_set(WRITTEN / "sets" / dtype / SETS[dtype])
    saved.verify()
    rows = saved.rows(0, len(saved))
    assert hashlib.sha256(rows.x_adv.numpy().tobytes()).hexdigest() == EXPECTED["images"][dtype]
    assert (f"{saved.source}-{saved.attack}", saved.eps) == (SETS[dtype], {"uint8": 0.3, "float32": 1.5}[dtype])
    assert rows.index.tolist() == list(range(40)) and rows.labels.tolist() == [i % 10 for i in range(40)]
    assert [one.manifest for one in find_sets(WRITTEN / "sets" / dtype)] == [saved.manifest]


@pytest.mark.parametrize("dtype", SETS)
def test_a_saved_set_is_shown_to_models_without_an_attack(dtype, inputs, calls):
    options = inputs.set_options()[dtype]
    source = {"B": load_set(WRITTEN / "sets" / dtype / SETS[dtype])}
    found = transfer_matrix(options["targets"], source, {}, options["loader"], key=options["key"])
    assert as_json(found) == read_json(WRITTEN / f"sets/{dtype}.json")
    assert calls == []


@pytest.mark.parametrize("dtype", SETS)
def test_a_saved_set_is_not_crafted_again(dtype, copy, inputs, same_versions, calls):
    before = contents(copy / "sets")
    found = transfer_matrix(save_sets=copy / "sets" / dtype, **inputs.set_options()[dtype])
    assert calls == [] and contents(copy / "sets") == before
    assert as_json(found) == read_json(copy / f"sets/{dtype}.json")


# ------------------------------------------------------------------------------------------ journal and matrix


def test_a_saved_matrix_is_the_same():
    for path in (WRITTEN / "journal/matrix.json", WRITTEN / "evaluated/matrix.json"):
        assert as_json(TransferMatrix.load(path)) == read_json(path)


@pytest.mark.parametrize("name", ["attacks", "sources"])
def test_an_evaluation_goes_on_from_its_journal(name, copy, inputs, same_versions, calls):
    """All of it is known, so nothing is crafted, nothing judged, and nothing added to the file."""
    journal, options = (copy / "journal/cells.jsonl").read_bytes(), inputs.passes()[name]
    found = as_json(transfer_matrix(folder=copy / "journal", **options))
    assert calls == [] and (copy / "journal/cells.jsonl").read_bytes() == journal
    expected = {"attacks": EXPECTED["bits"], "sources": read_json(copy / "journal/matrix.json")["bits"]}
    assert found["bits"] == expected[name]


def test_the_journal_is_what_spares_the_attacks(copy, inputs, same_versions, calls):
    lines = (copy / "journal/cells.jsonl").read_text().splitlines(keepends=True)
    del lines[1]  # a cell of "fgsm", the first attack; the first line is of the clean images
    (copy / "journal/cells.jsonl").write_text("".join(lines))
    transfer_matrix(folder=copy / "journal", **inputs.passes()["attacks"])
    assert calls == ["fgsm"]
    transfer_matrix(**inputs.passes()["attacks"])
    assert calls[1:] == list(inputs.every_attack())


# -------------------------------------------------------------------------------------------------- training


@pytest.fixture
def resumed(copy, inputs):
    """The interrupted run after `ensadv-fast train --resume`."""
    kept = contents(copy / "interrupted")
    assert cli.main(["train", "--resume", "interrupted"]) == 0
    return copy / "interrupted", kept


def weights(run):
    return torch.load(run / "models/D_ens-seed0.pt", weights_only=True)


def test_an_interrupted_run_goes_on(resumed):
    run, kept = resumed
    finished = WRITTEN / "finished"
    for name in ("models/source-A.pt", "models/source-B.pt"):  # these were trained
        assert (run / name).read_bytes() == kept[Path(name)]
    assert not list((run / "checkpoints").iterdir())
    old, new = ([json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
                for folder in (finished, run))
    assert [(r["job"], r["step"]) for r in new] == [(r["job"], r["step"]) for r in old]
    before = [r for r in old if r["job"] != "D_ens-seed0" or r["step"] <= 10]  # the step of its checkpoint
    assert [r for r in new if r in before] == before
    assert weights(run)["step"] == weights(finished)["step"] == 32
    assert {path.relative_to(run) for path in run.rglob("*.*")} == {
        Path("report.html") if path.name == "report.gz" else path.relative_to(finished)
        for path in finished.rglob("*.*")}


def test_an_interrupted_run_ends_with_the_same_weights_and_errors(resumed):
    """Up to the last bits: another processor adds up the elements of a convolution in another order. Where the
    processor is of the same kind all bits are the same, and so is every error; else one image of 40 may differ."""
    torch.manual_seed(0)
    if F.dropout(torch.ones(64)).tolist() != EXPECTED["dropout"]:
        pytest.skip("torch's generator draws other dropout masks here, as builds without MKL do")
    run, _ = resumed
    old, new = weights(WRITTEN / "finished"), weights(run)
    for what in ("model", "optimizer", "ema", "adversary", "sampler", "monitor"):
        torch.testing.assert_close(new[what], old[what], **LAST_BITS)
    same = all(torch.equal(new["ema"]["model"][k], t) for k, t in old["ema"]["model"].items())
    found, expected = ({k: v for k, v in read_json(folder / "results.json").items() if k not in ("versions", "seconds")}
                       for folder in (run, WRITTEN / "finished"))
    assert found.pop("images") == 40 and found.pop("claims") == []  # version 0.1 did not say them
    if same:
        assert found == expected
    else:
        assert flat(found) == pytest.approx(flat(expected), abs=1.01 / 40)


def flat(tree, name=""):
    """The numbers and words of nested dicts by their paths."""
    if not isinstance(tree, dict):
        return {name: tree}
    return {k: v for key, value in tree.items() for k, v in flat(value, f"{name}/{key}").items()}


def test_the_weights_of_a_network_have_the_same_names():
    """A checkpoint of a network by name loads only where these are the same."""
    for spec, expected in EXPECTED["layers"].items():
        shapes = [[name, list(t.shape)] for name, t in models.build(spec).state_dict().items()]
        assert hashlib.sha256(json.dumps(shapes).encode()).hexdigest() == expected, spec


# -------------------------------------------------------------------------------- evaluate, diagnose, bench, pages


def evaluate(*options):
    given = read_json(WRITTEN / "evaluated/config.json")
    assert cli.main(["evaluate", "--model", *given["model"], "--set", *given["set"], "--data", given["data"],
                     "--attack", *given["attack"], "--eps", *map(str, given["eps"]), "--steps", str(given["steps"]),
                     "--batch-size", str(given["batch_size"]), "--device", given["device"], *options]) == 0


def results(folder):
    """results.json without what says when, where and how it was made."""
    return {k: v for k, v in read_json(Path(folder) / "results.json").items()
            if k not in ("versions", "seconds", "config")}


def test_networks_of_a_finished_run_have_the_same_errors(copy, inputs):
    """They are attacked anew, where the last bits may decide about one image, and are shown a saved set."""
    evaluate("--out", "again")
    assert results("again").keys() == results("evaluated").keys()
    new, old = (TransferMatrix.load(copy / folder / "matrix.json") for folder in ("again", "evaluated"))
    assert new.data == old.data and list(new.wrong) == list(old.wrong)
    for (attack, source, target), wrong in old.wrong.items():
        different = (new.wrong[attack, source, target] != wrong).sum()
        assert different <= (source in old.clean), (attack, source, target)
    assert {t: wrong.tolist() for t, wrong in new.clean.items()} == {t: w.tolist() for t, w in old.clean.items()}


def test_evaluate_goes_on_with_its_folder(copy, inputs, same_versions, calls):
    before = contents(copy / "evaluated")
    evaluate("--out", "evaluated", "--resume")
    assert calls == ["fgsm", "pgd"]  # for the example images alone
    for name in ("cells.jsonl", "matrix.json"):
        assert (copy / "evaluated" / name).read_bytes() == before[Path(name)]
    assert results("evaluated") == results(WRITTEN / "evaluated")


@pytest.mark.parametrize("run", ["finished", "evaluated", "diagnosed"])
def test_the_page_of_a_run_is_made_anew(run, copy, inputs):
    """All of it is the same but for how zlib packs the images. (The page's own words are today's: report.gz is written
    anew where they change, from the same files.)"""
    page = report.write(copy / run)
    assert page == copy / run / "report.html"
    assert inputs.without_images(page) == gzip.decompress((copy / run / "report.gz").read_bytes()).decode()


def test_a_benchmark_is_compared_with_an_old_one(tmp_path, capsys):
    options = ["bench", "--device", "cpu", "--sizes", "tiny", "--cases", "null", "--dtypes", "float32", "--seconds",
               "0.01", "--compile", "--compare"]
    assert cli.main([*options, str(WRITTEN / "bench.json"), "--limit", "1e6"]) == 0
    old = read_json(WRITTEN / "bench.json")
    for contender in old["rows"][0]["contenders"]:
        if contender.startswith("ours"):
            old["rows"][0]["contenders"][contender]["ms"] /= 1e9
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert cli.main([*options, str(tmp_path / "old.json"), "--limit", "1e6"]) == 1
    assert "slower: null-copy tiny float32 contiguous contenders ours" in capsys.readouterr().err
