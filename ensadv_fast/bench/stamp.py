"""What a measurement was made with."""
import os
import platform
import subprocess
import time
from pathlib import Path

import torch

from .. import ops
from ..sources.precision import fast_dtype

_ISA = {"avx2": "_is_avx2_supported", "avx512": "_is_avx512_supported", "avx512_bf16": "_is_avx512_bf16_supported",
        "amx": "_is_amx_tile_supported"}


def stamp() -> dict:
    """The commit, the build, the machine and its load, as every result's file holds them."""
    root = Path(__file__).parent.parent.parent
    git = subprocess.run(["git", "describe", "--always", "--dirty", "--abbrev=12", "--exclude=*"], cwd=root,
                         capture_output=True, text=True)
    return {
        "commit": git.stdout.strip() if git.returncode == 0 else "unknown",
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()), "build": build(), "runtime": runtime(),
        "machine": {"cpu": _cpu_name(), "cores": os.cpu_count(), "system": platform.platform(terse=True)},
        "load_before": os.getloadavg(),
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), "unknown")


def build() -> dict[str, str]:
    """The extension as built."""
    info = ops.build_info()
    target = int(info["abi_target"], 16)
    info["abi_target"] = f"torch >= {target >> 56}.{target >> 48 & 0xFF} (stable ABI), Python >= 3.10"
    return info


def runtime() -> dict[str, str]:
    """What is found at run time."""
    found = {
        "python": platform.python_version(),
        "torch": f"{torch.__version__} (CUDA {torch.version.cuda or 'none'})",
        "cpu": f"{torch.get_num_threads()} threads, "
               + ", ".join(name for name, f in _ISA.items() if getattr(torch.cpu, f, lambda: False)()),
        "auto dtype on the CPU": str(fast_dtype(torch.device("cpu"))).removeprefix("torch."),
    }
    if not torch.cuda.is_available():
        found["cuda devices"] = "none"
    for i in range(torch.cuda.device_count() if torch.cuda.is_available() else 0):
        p = torch.cuda.get_device_properties(i)
        found[f"cuda:{i}"] = f"{p.name}, sm_{p.major}{p.minor}, {p.total_memory / 2**30:.0f} GiB"
    return found
