"""Foolbox's own tests of gradient attacks before and after ours are put in place: ENSADV_PEER_FOOLBOX=its source tree.

Every test's outcome must be the same, and without us all pass.
"""
import os
from pathlib import Path

import pytest
from suites import outcomes

TREE = os.environ.get("ENSADV_PEER_FOOLBOX")
# L1 attacks, which stay the library's, are among them. The rest of the suite never asks for ours.
ATTACKS = "(FastGradient or ProjectedGradient or BasicIterative or Momentum or fgsm) and pytorch_simple"
PROBE = "foolbox.attacks:PGD"


@pytest.mark.skipif(not TREE, reason="ENSADV_PEER_FOOLBOX names no source tree: its suite is not run")
@pytest.mark.parametrize("precision", ["exact", "fast"])
def test_the_librarys_own_suite(tmp_path, precision, monkeypatch):
    monkeypatch.setenv("ENSADV_PEER_PATH", TREE)

    def run(swap):
        return outcomes(tmp_path, "foolbox", PROBE, Path(TREE) / "tests", "--backend", "pytorch", "--skipslow", "-k",
                        ATTACKS, swap=swap, precision=precision, only=("test_attacks.py", "test_attacks_raise.py"))

    (before, theirs), (after, ours) = run(False), run(True)
    assert (theirs, ours) == ("foolbox.attacks.projected_gradient_descent", "ensadv_fast.compat.foolbox.attacks")
    assert set(before.values()) == {"passed"}
    attacked = [name for name in before if name.startswith(("test_untargeted_attacks", "test_targeted_attacks"))]
    assert (len(before), len(attacked)) == (70, 68)
    assert after == before
