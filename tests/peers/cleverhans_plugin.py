"""Prepares CleverHans' own suite: of nose, which newer Pythons do not run, it needs the exception that skips a test."""
import os
import sys
from types import ModuleType
from unittest import SkipTest

if "ENSADV_PEER_PATH" in os.environ:
    sys.path.insert(0, os.environ["ENSADV_PEER_PATH"])
nose = {name: ModuleType(name) for name in ("nose", "nose.plugins", "nose.plugins.skip")}
nose["nose.plugins.skip"].SkipTest = SkipTest
sys.modules.update(nose)
