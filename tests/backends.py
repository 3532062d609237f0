"""What the tests of all drop-in backends share."""
import subprocess
import sys
from textwrap import dedent

import pytest
import torch

from ensadv_fast import compat

ABSENT = """
import sys
sys.modules["{name}"] = None  # as if it were absent
from ensadv_fast import compat
{program}
for call in ({calls}, lambda: compat.install("{name}")):
    try:
        call()
    except ImportError as e:
        assert "{name} is not installed: pip install {pip}" in str(e), e
    else:
        raise AssertionError("no error")
"""


def same(mine, wanted, single=False, scale=1):
    """Every pixel within 1e-6 in float64 and after a single step; else 99.9 % of them to half a last place of `scale`,
    since one that rounds otherwise may move a sign."""
    assert (mine.dtype, mine.shape, mine.requires_grad) == (wanted.dtype, wanted.shape, False)
    if single or mine.dtype == torch.float64:
        assert (mine - wanted).abs().max() <= 1e-6
    assert ((mine - wanted).abs() <= 2.0**-24 * scale).double().mean() >= 0.999


def says_another_version(name, mirrored, monkeypatch):
    monkeypatch.setattr(sys.modules[name], "__version__", "9.9")
    with pytest.warns(UserWarning, match=f"{name} {mirrored} is mirrored, 9.9 is installed") as said:
        compat.install(name)
    compat.uninstall(name)
    assert [warning.filename for warning in said] == [__file__]  # where install was called


def runs_without(name, program, *calls, pip=None):
    """Without the library the program runs; the expressions `calls`, and install, say how to get it."""
    code = ABSENT.format(name=name, program=dedent(program), calls=", ".join(f"lambda: {call}" for call in calls),
                         pip=pip or name)
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)
