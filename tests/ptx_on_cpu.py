"""Builds csrc/ptx_on_cpu with CMake and calls it: PTX as text, numpy arrays as its buffers.

ENSADV_PTX_DIR: a folder that holds the build already (.ci/cuda-on-cpu).
"""
import ctypes
import fcntl
import os
import shutil
import subprocess
import sys
import tempfile
from collections import Counter
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent
HOME = os.environ.get("CUDA_HOME") or os.environ.get("CUDA_PATH")
NVCC = shutil.which("nvcc", path=f"{HOME}/bin" if HOME else None)
FLAGS = ["-O3", "-fmad=false", "-std=c++20"]  # setup.py's


class Fault(Exception):
    """What the executor found wrong, with the place in the PTX."""


@cache
def folder() -> Path:
    """Where the library and the programs linked with it lie; built first where they are not."""
    if "ENSADV_PTX_DIR" in os.environ:
        return Path(os.environ["ENSADV_PTX_DIR"])
    env = os.environ | {"PATH": os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])}
    cmake = shutil.which("cmake", path=env["PATH"])
    if cmake is None:
        raise RuntimeError("the tests of csrc/ptx_on_cpu need cmake: pip install '.[test]'")
    build = ROOT / "build/cmake/cuda-on-cpu"
    build.mkdir(parents=True, exist_ok=True)
    with open(build / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # several pytest processes may start at once
        for command in ([cmake, "--preset", "cuda-on-cpu"], [cmake, "--build", str(build), "-j2"]):
            done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
            if done.returncode:
                raise RuntimeError(f"{' '.join(command)} failed:\n{done.stdout}{done.stderr}")
    return build


@cache
def library() -> ctypes.CDLL:
    lib = ctypes.CDLL(str(folder() / "libptx_on_cpu.so"))
    lib.ptx_error.restype = lib.ptx_opcodes.restype = ctypes.c_char_p
    lib.ptx_load.restype = ctypes.c_void_p
    lib.ptx_load.argtypes = [ctypes.c_char_p]
    lib.ptx_add_buffer.argtypes = [ctypes.c_void_p, ctypes.c_size_t]
    lib.ptx_remove_buffer.argtypes = [ctypes.c_void_p]
    lib.ptx_launch.argtypes = [ctypes.c_void_p, ctypes.c_char_p, ctypes.c_void_p, ctypes.c_void_p, ctypes.c_uint32,
                               ctypes.c_void_p]
    return lib


@dataclass
class Counts:
    """How often an entry's instructions ran."""
    threads: Counter = field(default_factory=Counter)  # by opcode
    bytes: Counter = field(default_factory=Counter)  # by opcode, of loads and stores
    sectors: Counter = field(default_factory=Counter)
    passes: Counter = field(default_factory=Counter)
    warps: Counter = field(default_factory=Counter)


class Module:
    def __init__(self, text: str):
        self.handle = library().ptx_load(text.encode())
        if not self.handle:
            raise Fault(library().ptx_error().decode())

    def launch(self, name: str, grid, block, *args, shared: int = 0, seed: int = 1, scatter: bool = False,
               traffic: bool = False):
        """Arguments: numpy arrays, which become buffers of exactly their bytes; numpy scalars; ctypes structures."""
        lib, keep, added = library(), [], []
        for arg in args:
            if isinstance(arg, np.ndarray):
                lib.ptx_add_buffer(arg.ctypes.data, arg.nbytes)
                added.append(arg.ctypes.data)
                keep.append(ctypes.c_uint64(arg.ctypes.data))
            elif isinstance(arg, np.generic):
                keep.append(ctypes.create_string_buffer(arg.tobytes(), arg.nbytes))
            else:
                keep.append(arg)
        pointers = (ctypes.c_void_p * max(1, len(keep)))(*[ctypes.addressof(k) for k in keep])
        three = [np.array([*np.atleast_1d(d), 1, 1][:3], np.uint32) for d in (grid, block)]
        lib.ptx_schedule(seed, int(scatter), int(traffic))
        failed = lib.ptx_launch(self.handle, name.encode(), *[d.ctypes.data for d in three], shared, pointers)
        for base in added:
            lib.ptx_remove_buffer(base)
        if failed:
            raise Fault(lib.ptx_error().decode())


def counts() -> dict[str, Counts]:
    """Of all modules since the last clear_counts(), by entry."""
    with tempfile.NamedTemporaryFile("r") as file:
        library().ptx_write_counts(file.name.encode())
        result, entry = {}, Counts()
        for line in file:
            words = line.split()
            if words[0] == "entry":
                entry = result.setdefault(words[1], Counts())
                continue
            opcode, (size, warps, threads, _, sectors, passes) = words[1], map(int, words[2:8])
            entry.threads[opcode] += threads
            entry.warps[opcode] += warps
            entry.bytes[opcode] += size * threads
            entry.sectors[opcode] += sectors
            entry.passes[opcode] += passes
        return result


def clear_counts():
    library().ptx_clear_counts()


def ptx_of(source: Path, arch: str = "80") -> str:
    """What nvcc makes of a .cu file."""
    command = [NVCC, *FLAGS, "-ptx", f"-gencode=arch=compute_{arch},code=compute_{arch}", str(source), "-o", "-"]
    with tempfile.TemporaryDirectory() as scratch:
        out = Path(scratch) / "out.ptx"
        command[-1] = str(out)
        subprocess.run(command, check=True, capture_output=True, text=True)
        return out.read_text()
