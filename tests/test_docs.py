"""README.md says what is run and measured: CI runs its command, its tables come from bench/results/."""
import importlib.util
import json
import re
import shlex
from pathlib import Path

import pytest

import ensadv_fast as ea
from ensadv_fast import cli, ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_the_commands_of_the_readme_are_understood():
    lines = README.replace("\\\n", "").splitlines()
    commands = [shlex.split(line) for line in lines if line.startswith("    ensadv-fast ")]
    assert [words[1] for words in commands] == ["train", "evaluate", "diagnose"]
    for words in commands:
        assert cli._parser().parse_args(words[1:]).command == words[1]


@pytest.fixture
def report():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_tables_come_from_the_results(report):
    for path, tables in report.DOCUMENTS.items():
        text = path.read_text()
        assert report.rendered(text, tables) == text, path


def test_results_are_shown_and_tables_have_results(report, monkeypatch, tmp_path):
    shown = {file for tables in report.DOCUMENTS.values() for file, _ in tables.values()}
    assert {path.name for path in report.RESULTS.iterdir()} <= shown
    assert {"targets_cpu", "attack_step_cpu"} <= set(re.findall(r"<!-- table: (\w+) -->", README))
    with pytest.raises(ValueError, match=r"0 tables targets_cpu, and bench/results/ops_cpu.json exists"):
        report.rendered(README.replace("<!-- table: targets_cpu -->", ""))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    with pytest.raises(ValueError, match=r"1 tables main_job, and bench/results/main_job.json is missing"):
        report.rendered(README)


def test_cells_that_were_not_measured_stay_empty(report, monkeypatch, tmp_path):
    result = report.load("ops_cpu.json")
    result["rows"] = [r for r in result["rows"] if (r["size"], r["dtype"]) == ("imagenet", "float32")]
    for row in result["rows"]:
        row["contenders"].pop("torch.compile", None)
    (tmp_path / "ops_cpu.json").write_text(json.dumps(result))
    monkeypatch.setattr(report, "RESULTS", tmp_path)
    lines = [line for line in report.per_op("ops_cpu.json").splitlines() if line.startswith("| sign_step-free")]
    assert [cell.strip() for cell in lines[0].strip("|").split("|")].count(report.NONE) == 5


def test_names_in_the_tables_exist():
    section = README.split("| attack |")[1].split("Every public function")[0]
    names = re.findall(r"^\| (`[^|]*)\|", section, re.M)
    names = [n for cell in names for n in re.findall(r"`([a-z0-9_]+)`", cell)]
    assert {"fgsm", "sign_step"} <= set(names)
    assert [n for n in names if not hasattr(ea, n) and not hasattr(ops, n)] == []


def test_every_rule_of_contributing_names_tests_that_exist():
    text = (ROOT / "CONTRIBUTING.md").read_text()
    paths = re.findall(r"`((?:tests|csrc|\.ci)/[\w./]+)`", text.split("## Rules")[1])
    assert len(paths) > 8
    assert [p for p in paths if not (ROOT / p).exists()] == []
