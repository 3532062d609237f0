"""torchattacks' own suite before and after ours are put in place: ENSADV_PEER_TORCHATTACKS=its source tree.

Every test's outcome must be the same, and without us all pass but for UPSTREAM, by name and reason.
"""
import os
from pathlib import Path

import pytest
from suites import outcomes

TREE = os.environ.get("ENSADV_PEER_TORCHATTACKS")
UPSTREAM: dict[str, str] = {}  # none of 3.5.1's
SLOW = "JSMA"  # minutes, and nothing of it is ours


@pytest.mark.skipif(not TREE, reason="ENSADV_PEER_TORCHATTACKS names no source tree: its suite is not run")
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_librarys_own_suite(tmp_path, precision, monkeypatch):
    monkeypatch.setenv("ENSADV_PEER_PATH", TREE)

    def run(swap):
        return outcomes(tmp_path, "torchattacks", "torchattacks:PGD", Path(TREE) / "code_coverage", "-k", f"not {SLOW}",
                        swap=swap, precision=precision)

    (before, theirs), (after, ours) = run(False), run(True)
    assert (theirs, ours) == ("torchattacks.attacks.pgd", "ensadv_fast.compat.torchattacks.projected")
    assert len(before) > 30
    assert {name for name, outcome in before.items() if outcome != "passed"} == set(UPSTREAM)
    assert after == before
