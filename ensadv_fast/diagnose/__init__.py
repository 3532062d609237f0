"""Diagnosis: is a model robust, or does it only mask its gradients?

Every measurement takes a model (a :class:`Source`, an :class:`Ensemble` or a plain module), images with labels or a
loader, and returns a small frozen dataclass with ``.to_dict()``. :func:`masking_report` puts them together.
"""
from .cone import ConeDimension, cone_dimension, cone_directions
from .gradients import GradientAlignment, GradientNorm, gradient_alignment, gradient_norm
from .hadamard import regular_hadamard
from .masking import MaskingReport, masking_report
from .monitor import CatastrophicOverfitting, OverfittingMonitor, Watch
from .perturbations import (
    ApproximationRatio,
    LabelLeaking,
    PerturbationCosine,
    RandomStartGap,
    approximation_ratio,
    label_leaking,
    perturbation_cosine,
    random_start_gap,
)
from .statistics import Interval
from .surface import LossSurface, loss_surface
from .verdict import Check

__all__ = [
    "ApproximationRatio", "CatastrophicOverfitting", "Check", "ConeDimension", "GradientAlignment", "GradientNorm",
    "Interval", "LabelLeaking", "LossSurface", "MaskingReport", "OverfittingMonitor", "PerturbationCosine",
    "RandomStartGap", "Watch", "approximation_ratio", "cone_dimension", "cone_directions", "gradient_alignment",
    "gradient_norm", "label_leaking", "loss_surface", "masking_report", "perturbation_cosine", "random_start_gap",
    "regular_hadamard",
]
