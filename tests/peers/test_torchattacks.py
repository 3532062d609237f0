"""torchattacks' own suite before and after ours are put in place: ENSADV_PEER_TORCHATTACKS=its source tree.

Every test's outcome must be the same, and without us all pass but for UPSTREAM, by name and reason.
"""
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

TREE = os.environ.get("ENSADV_PEER_TORCHATTACKS")
UPSTREAM: dict[str, str] = {}  # none of 3.5.1's
SLOW = "JSMA"  # minutes, and nothing of it is ours


def outcomes(tmp_path, swap: bool, precision: str = "exact") -> tuple[dict[str, str], str]:
    """Of every test, and the module whose PGD was tested."""
    file = tmp_path / "outcomes.json"
    here = Path(__file__).parent
    env = os.environ | {"ENSADV_PEER_SWAP": str(int(swap)), "ENSADV_PEER_OUTCOMES": str(file),
                        "ENSADV_PEER_PATH": TREE, "ENSADV_PEER_PRECISION": precision,
                        "PYTHONPATH": os.pathsep.join([str(here), str(here.parent.parent)])}
    suite = Path(TREE) / "code_coverage"
    subprocess.run([sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", "torchattacks_plugin", "-p",
                    "no:cacheprovider", "-k", f"not {SLOW}", "--rootdir", str(suite), str(suite)], env=env, check=False,
                   capture_output=True)
    return tuple(json.loads(file.read_text()))


@pytest.mark.skipif(not TREE, reason="ENSADV_PEER_TORCHATTACKS names no source tree: its suite is not run")
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_librarys_own_suite(tmp_path, precision):
    (before, theirs), (after, ours) = outcomes(tmp_path, False), outcomes(tmp_path, True, precision)
    assert (theirs, ours) == ("torchattacks.attacks.pgd", "ensadv_fast.compat.torchattacks.projected")
    assert len(before) > 30
    assert {name for name, outcome in before.items() if outcome != "passed"} == set(UPSTREAM)
    assert after == before
