"""A pytest plugin under which torchattacks' own suite runs: offline, and with our classes in place where asked.

ENSADV_PEER_SWAP=1 installs ours; ENSADV_PEER_OUTCOMES names the file that gets [{test: outcome}, the module of PGD].
The suite asks robustbench for a network and images: here, a small network and images that it classifies as labelled.
"""
import json
import os
import sys
from types import ModuleType

import torch
from torch import nn

sys.path.insert(0, os.environ["ENSADV_PEER_PATH"])


class Net(nn.Sequential):
    def __init__(self):
        torch.manual_seed(0)
        super().__init__(nn.Conv2d(3, 8, 3, 2, padding=1), nn.BatchNorm2d(8), nn.ReLU(), nn.Conv2d(8, 8, 3, 2),
                         nn.ReLU(), nn.Flatten(), nn.Linear(8 * 49, 10))
        self.eval()


def clean_accuracy(model, x, y):
    return (model(x).argmax(1) == y).double().mean().item()


def load_cifar10(n_examples, data_dir):
    x = torch.rand(n_examples, 3, 32, 32, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        return x, Net()(x).argmax(1)


robustbench = {name: ModuleType(name) for name in ("robustbench", "robustbench.utils", "robustbench.data")}
robustbench["robustbench.utils"].load_model = lambda *_, **__: Net()
robustbench["robustbench.utils"].clean_accuracy = clean_accuracy
robustbench["robustbench.data"].load_cifar10 = load_cifar10
sys.modules.update(robustbench)
if os.environ["ENSADV_PEER_SWAP"] == "1":
    from ensadv_fast import compat
    compat.install("torchattacks")
    compat.precision(os.environ["ENSADV_PEER_PRECISION"])

outcomes = {}


def pytest_runtest_setup(item):
    torch.manual_seed(0)


def pytest_runtest_logreport(report):
    if report.when == "call" or report.failed or report.skipped:
        outcomes[report.nodeid.split("::")[-1]] = report.outcome


def pytest_sessionfinish():
    with open(os.environ["ENSADV_PEER_OUTCOMES"], "w") as file:
        json.dump([outcomes, sys.modules["torchattacks"].PGD.__module__], file)
