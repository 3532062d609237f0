"""What numbers were made with."""
from __future__ import annotations

import platform
from importlib import metadata
from typing import Any

import numpy as np
import torch


def versions() -> dict[str, Any]:
    """What the numbers were made with."""
    try:
        ours = metadata.version("ensadv_fast")
    except metadata.PackageNotFoundError:
        ours = "not installed: run from its source folder"
    gpu = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    return {"ensadv_fast": ours, "torch": torch.__version__, "numpy": np.__version__,
            "python": platform.python_version(), "machine": platform.machine(), "gpu": gpu,
            "threads": torch.get_num_threads()}
