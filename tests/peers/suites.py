"""Runs a library's own test suite in a process of its own, with ours in place or not."""
import json
import os
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent


def outcomes(tmp_path, library: str, probe: str, suite: Path, *options: str, swap: bool, precision: str = "exact",
             only: tuple[str, ...] = ("",)) -> tuple[dict[str, str], str]:
    """The outcome of every test, and the module that the function or class `probe` ("module:name") came from.

    ``<library>_plugin.py`` beside this prepares the process; `options` are pytest's; `only`: files of the suite."""
    file = tmp_path / "outcomes.json"
    env = os.environ | {"ENSADV_PEER_LIBRARY": library, "ENSADV_PEER_PROBE": probe, "ENSADV_PEER_SWAP": str(int(swap)),
                        "ENSADV_PEER_PRECISION": precision, "ENSADV_PEER_OUTCOMES": str(file),
                        "PYTHONPATH": os.pathsep.join([str(HERE), str(HERE.parent.parent)])}
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-c", os.devnull, "-p", f"{library}_plugin",
                           "-p", "swapping_plugin", "-p", "no:cacheprovider", *options, "--rootdir", str(suite),
                           *(str(suite / file) for file in only)], env=env, check=False, capture_output=True, text=True)
    assert file.exists(), done.stdout + done.stderr
    return tuple(json.loads(file.read_text()))
