"""The package's own annotations hold, and say to users' programs what comes back."""
import os
import re
import runpy
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "typed_program.py"
WRONG = '''\
import torch

import ensadv_fast as ea
from ensadv_fast.compat.torchattacks import PGD

model, x = torch.nn.Linear(4, 2), torch.rand(3, 4)
ea.fgsm("8/255")
ea.fgsm(8 / 255)(model, x).success
ea.fgsm(8 / 255)(model, [x])
ea.pgd()(model, x, return_info="yes")
ea.EnsembleAdversary(model)(x, x).images
PGD(model, steps=0.5)
ea.fgsm(8 / 255, rul="true")
ea.pgd(8 / 255, targeted="yes")
ea.fgsm(8 / 255, momentum=1.0)
'''


def mypy(*arguments: str | Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """Where cwd is not ROOT, the package is found as an installed one is, by its py.typed."""
    cache = ROOT / "build" / ("mypy" if cwd == ROOT else "mypy-user")
    command = [sys.executable, "-m", "mypy", "--cache-dir", str(cache), *map(str, arguments)]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True,
                          env={**os.environ, "PYTHONPATH": str(ROOT)})


def test_the_package_is_clean():
    done = mypy(cwd=ROOT)
    assert done.returncode == 0, done.stdout + done.stderr


def test_every_ignored_error_says_which_and_why():
    lines = [line for path in (ROOT / "ensadv_fast").rglob("*.py") for line in path.read_text().splitlines()
             if "type: ignore" in line or "mypy:" in line]
    assert [line for line in lines if not re.search(r"# type: ignore\[[a-z-]+\]  # \w", line)] == []


@pytest.fixture(scope="module")
def strict(tmp_path_factory):
    """mypy --strict on programs elsewhere, with no settings but its own."""
    folder = tmp_path_factory.mktemp("user")
    (folder / "mypy.ini").write_text("[mypy]\n")

    def run(text: str) -> subprocess.CompletedProcess[str]:
        (folder / "program.py").write_text(text)
        return mypy("--strict", "program.py", cwd=folder)
    return run


def test_a_users_program_is_understood(strict):
    done = strict(PROGRAM.read_text())
    assert done.returncode == 0, done.stdout + done.stderr


def test_the_program_says_what_is_so():
    runpy.run_path(str(PROGRAM))


def test_wrong_programs_are_found_out(strict):
    done = strict(WRONG)
    found = {int(line): code for line, code in re.findall(r"^program.py:(\d+): error: .*\[([a-z-]+)\]$", done.stdout,
                                                          re.M)}
    assert found == {7: "arg-type", 8: "attr-defined", 9: "call-overload", 10: "call-overload", 11: "attr-defined",
                     12: "arg-type", 13: "call-arg", 14: "arg-type", 15: "call-arg"}, done.stdout
