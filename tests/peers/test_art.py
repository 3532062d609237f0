"""ART's own tests of the gradient attacks before and after ours are put in place: ENSADV_PEER_ART=its source tree, and
MNIST where ART looks for it, as ~/.art/data/mnist.npz.

Every test's outcome must be the same, and without us all pass but for UPSTREAM, by name and reason.
"""
import os
from pathlib import Path

import pytest
from suites import outcomes

TREE = os.environ.get("ENSADV_PEER_ART")
MNIST = Path("~/.art/data/mnist.npz").expanduser()
UPSTREAM = {"test_classifier_defended_images": "torch refuses the float64 images that FeatureSqueezing makes"}
FILES = ("tests/attacks/evasion/test_fast_gradient.py", "tests/attacks/test_projected_gradient_descent.py",
         "tests/attacks/test_iterative_method.py", "tests/defences/trainer/test_adversarial_trainer_madry_pgd.py")


@pytest.mark.skipif(not TREE or not MNIST.exists(),
                    reason=f"ENSADV_PEER_ART names no source tree, or {MNIST} is missing: its suite is not run")
def test_the_librarys_own_suite(tmp_path, monkeypatch):
    monkeypatch.setenv("ENSADV_PEER_PATH", TREE)

    def run(**kw):
        return outcomes(tmp_path, "art", "art.attacks.evasion:ProjectedGradientDescent", Path(TREE),
                        "--framework=pytorch", "-k", "not keras and not tensorflow and not scikit", only=FILES, **kw)

    before, theirs = run(swap=False)
    assert theirs.startswith("art.attacks.evasion.")
    assert {name for name, outcome in before.items() if outcome == "failed"} == set(UPSTREAM)
    assert list(before.values()).count("passed") > 10
    after, ours = run(swap=True)
    assert ours == "ensadv_fast.compat.art.projected"
    assert after == before
