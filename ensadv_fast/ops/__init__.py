"""The ops: fused kernels behind plain functions, on the CPU and CUDA, safe under torch.compile and CUDA graphs."""
from . import _library
from .keys import fresh_key, manual_seed, split
from .null import null
from .random_step import random_step
from .sample_eps import sample_eps
from .sign_step import sign_step

build_info = _library.build_info

__all__ = ["build_info", "fresh_key", "manual_seed", "null", "random_step", "sample_eps", "sign_step", "split"]
