"""Loads the compiled extension and registers what Python adds to its ops."""
import ctypes
from pathlib import Path

import torch

PATH = Path(__file__).parent.parent / "_C.abi3.so"


def load() -> None:
    if not PATH.exists():
        raise ImportError(
            f"ensadv_fast: the compiled extension {PATH.name} is missing beside the package. "
            "Install the package with `pip install .` (see docs/building.md)."
        )
    torch.ops.load_library(str(PATH))


def build_info() -> dict[str, str]:
    """How the extension was built: compiler, ABI target, commit, CUDA version and architectures."""
    function = ctypes.CDLL(str(PATH)).ensadv_build_info
    function.restype = ctypes.c_char_p
    return dict(item.split("=", 1) for item in function().decode().split(";"))


def register_fake(name: str) -> None:
    """Every op writes into its `out` argument and returns nothing, so its fake kernel has nothing to do."""
    torch.library.register_fake(f"ensadv_fast::{name}", lambda *args: None)


load()
