"""`ensadv-fast info`: how the extension was built and what it finds where it runs."""
import argparse
import importlib.metadata
import platform
import sys

import torch

from . import ops
from .source import fast_dtype

_ISA = {"avx2": "_is_avx2_supported", "avx512": "_is_avx512_supported", "avx512_bf16": "_is_avx512_bf16_supported",
        "amx": "_is_amx_tile_supported"}


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


def main(argv: list[str]) -> int:
    argparse.ArgumentParser(prog="ensadv-fast info", description=__doc__).parse_args(argv)
    sections = {"ensadv_fast": {"version": importlib.metadata.version("ensadv-fast")}, "build": build(),
                "run time": runtime()}
    for title, entries in sections.items():
        print(title)
        for name, value in entries.items():
            print(f"  {name:22} {value}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
