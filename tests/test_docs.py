"""README.md says what is run and measured: CI runs its command, its tables come from bench/results/."""
import importlib.util
import re
from pathlib import Path

import ensadv_fast as ea
from ensadv_fast import ops

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()


def test_ci_runs_the_test_command_of_the_readme():
    commands = [line.strip() for line in README.splitlines() if line.startswith("    python3 -m venv")]
    assert len(commands) == 2
    assert commands[1] in (ROOT / ".ci" / "run").read_text().splitlines()


def test_tables_come_from_the_results():
    spec = importlib.util.spec_from_file_location("report", ROOT / "bench" / "report.py")
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    assert report.rendered(README) == README


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
