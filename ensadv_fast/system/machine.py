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

    ValueError for a name that torch does not know.
    """
    try:
        return torch.device(name if name != "auto" else "cuda" if torch.cuda.is_available() else "cpu")
    except RuntimeError as e:
        raise ValueError(f"device: name must be auto, cpu, cuda or cuda:N, got {name!r}") from e


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
