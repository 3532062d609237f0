"""Prepares ART's own suite: its helpers import tensorflow and keras, also where a run is --framework=pytorch. Here
these are modules of mocks."""
import os
import sys
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from unittest.mock import MagicMock

sys.path.insert(0, os.environ["ENSADV_PEER_PATH"])


class Mocks(MetaPathFinder, Loader):
    def find_spec(self, name, path, target=None):
        if name.split(".")[0] in ("tensorflow", "keras"):
            return ModuleSpec(name, self, is_package=True)

    def exec_module(self, module):
        module.__version__ = "2.0"
        module.__getattr__ = lambda name: MagicMock()


sys.meta_path.append(Mocks())
