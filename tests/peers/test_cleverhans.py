"""CleverHans' own tests of the two attacks before and after ours are put in place: those of the installed package, or
ENSADV_PEER_CLEVERHANS=its source tree.

Every test's outcome must be the same, and without us all pass but for UPSTREAM, by name and reason.
"""
import importlib.util
import os
from pathlib import Path

import pytest
from suites import outcomes

TREE = os.environ.get("ENSADV_PEER_CLEVERHANS")
UPSTREAM = {"TestProjectedGradientMethod::test_clips": "for norm 1 it calls assertRaises without the attack"}
FUNCTION = "fast_gradient_method"


def suite_of_cleverhans() -> Path | None:
    """Where its torch tests lie; the wheel carries them."""
    if TREE:
        return Path(TREE) / "cleverhans" / "torch" / "tests"
    spec = importlib.util.find_spec("cleverhans")
    folder = None if spec is None or spec.origin is None else Path(spec.origin).parent / "torch" / "tests"
    return folder if folder is not None and folder.is_dir() else None


@pytest.mark.skipif(suite_of_cleverhans() is None,
                    reason="neither cleverhans with its tests nor ENSADV_PEER_CLEVERHANS: its suite is not run")
def test_the_librarys_own_suite(tmp_path, monkeypatch):
    if TREE:
        monkeypatch.setenv("ENSADV_PEER_PATH", TREE)

    def run(**kw):
        return outcomes(tmp_path, "cleverhans", f"cleverhans.torch.attacks.{FUNCTION}:{FUNCTION}",
                        suite_of_cleverhans(), "-k", "FastGradient or ProjectedGradient", **kw)

    before, theirs = run(swap=False)
    assert theirs == f"cleverhans.torch.attacks.{FUNCTION}"
    assert list(before.values()).count("passed") == 27
    assert {name for name, outcome in before.items() if outcome == "failed"} == set(UPSTREAM)
    for precision in ("exact", "fast"):
        after, ours = run(swap=True, precision=precision)
        assert ours == "ensadv_fast.compat.cleverhans.attacks"
        assert after == before
