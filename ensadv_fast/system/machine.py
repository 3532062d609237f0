"""The machine: a device by name, its cores, and the versions that results were made with."""
from __future__ import annotations

import os
import platform
from importlib import metadata
from typing import Any

import numpy as np
import torch


def versions() -> dict[str, Any]:
    """The versions, GPU and threads that numbers were made with, for results.json."""
    try:
        ours = metadata.version("ensadv_fast")
    except metadata.PackageNotFoundError:
        ours = "not installed: run from its source folder"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"ensadv_fast": ours, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "machine": platform.machine(), "gpu": gpu,
            "threads": torch.get_num_threads()}


def device(name: str) -> torch.device:
    """The device of this name, such as "cpu" or "cuda:1"; "auto" is the GPU where there is one, else the CPU.

    ValueError for another name, and for a GPU that is not here.
    """
    try:
        found = torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError:
        found = None
    if found is None or found.type not in ("cpu", "cuda"):
        raise ValueError(f"device: name must be auto, cpu, cuda or cuda:N, got {name!r}")
    gpus = torch.cuda.device_count() if found.type == "cuda" else 0
    if found.type == "cuda" and (found.index or 0) >= gpus:
        raise ValueError(f"device: name must be that of a device of this machine, where torch finds {gpus} GPUs, got "
                         f"{name!r}")
    return found


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
