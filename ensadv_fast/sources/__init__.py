"""What perturbations are computed on: a model, live or frozen, or several of them."""
from .base import BaseSource, InputGrad, for_autograd
from .calibration import Agreement
from .ensemble import Ensemble
from .source import Source, as_source

__all__ = ["Agreement", "BaseSource", "Ensemble", "InputGrad", "Source", "as_source", "for_autograd"]
