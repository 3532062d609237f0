"""Builds layer 1's numpy module (csrc/numpy) with CMake and imports it.

ENSADV_KERNELS_DIR: a folder that holds the module already, say that of a sanitizer preset (.ci/sanitize).
"""
import fcntl
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent


def build() -> Path:
    """Configure and build the release preset for this Python; quick where nothing has changed."""
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    cmake = shutil.which("cmake", path=env["PATH"])
    if cmake is None:
        raise RuntimeError("the tests of layer 1 need cmake: pip install '.[test]'")
    folder = ROOT / "build/cmake" / f"release-{sys.implementation.cache_tag}"
    folder.mkdir(parents=True, exist_ok=True)
    configure = [cmake, "--preset", "release", "-B", str(folder), f"-DPython_EXECUTABLE={sys.executable}"]
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest processes may start at once
        for command in (configure, [cmake, "--build", str(folder), "-j2"]):
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return folder


def load():
    folder = os.environ.get("ENSADV_KERNELS_DIR")
    (path,) = Path(folder or build()).glob("ensadv_kernels*.so")
    spec = importlib.util.spec_from_file_location("ensadv_kernels", path)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module
