"""The ops: fused kernels behind plain functions, on the CPU and CUDA, safe under torch.compile and CUDA graphs.

`ensadv_fast.ops.losses` has the losses in plain PyTorch; `ensadv_fast.ops.cases` is the registry that the tests and
benchmarks of the ops run over.
"""
from . import library, losses
from .act_grad import act_grad
from .bias_act import bias_act
from .ensemble_linear import ensemble_linear, ensemble_linear_grad
from .keys import fresh_key, manual_seed, split
from .l2_step import l2_step
from .logit_grad import LogitGrad, logit_grad
from .model_entry import model_entry
from .momentum_step import momentum_step
from .null import null
from .project import project
from .random_step import random_step
from .sample_eps import sample_eps
from .sign_step import sign_step

build_info = library.build_info

__all__ = [
    "LogitGrad", "act_grad", "bias_act", "build_info", "ensemble_linear", "ensemble_linear_grad", "fresh_key",
    "l2_step", "logit_grad", "losses", "manual_seed", "model_entry", "momentum_step", "null", "project", "random_step",
    "sample_eps", "sign_step", "split",
]
