"""Measurements of the gradient itself: its size, and whether it points the same way nearby."""
from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from ..ops import checks
from ..sources.base import BaseSource
from . import batches
from .batches import Data, Model, Pick, Result


@dataclass(frozen=True)
class GradientNorm(Result):
    """mean_l2, mean_l1: means over samples of the norms of the gradient of the cross-entropy by the image, in loss per
    image unit. zero_samples: share of samples whose gradient is zero everywhere; zero_elements, nonfinite_elements:
    shares of all gradient elements. l2, l1: [N]; zero, nonfinite: int64 [N], elements of each sample; elements: of one
    image."""

    mean_l2: float
    mean_l1: float
    zero_samples: float
    zero_elements: float
    nonfinite_elements: float
    elements: int
    l2: Tensor
    l1: Tensor
    zero: Tensor
    nonfinite: Tensor


def norm_rows(grad: Tensor) -> batches.Rows:
    """Of gradients [N, ...]: norms of the finite elements, and the numbers of elements: zero, not finite, all."""
    flat = grad.flatten(1)
    finite = flat.isfinite()
    flat = torch.where(finite, flat, 0).double()
    zero = (finite & (flat == 0)).sum(1)
    return {"l2": flat.norm(dim=1), "l1": flat.abs().sum(1), "zero": zero, "nonfinite": (~finite).sum(1),
            "elements": torch.full_like(zero, flat.shape[1])}


def norm_summary(rows: Mapping[str, Tensor]) -> GradientNorm:
    """Of the joined rows of :func:`norm_rows`."""
    n, elements = len(rows["l2"]), int(rows["elements"][-1])
    zero, nonfinite = (rows[k].sum().item() / (n * elements) for k in ("zero", "nonfinite"))
    return GradientNorm(batches.mean(rows["l2"]), batches.mean(rows["l1"]),
                        (rows["zero"] == elements).sum().item() / n, zero, nonfinite, elements,
                        l2=rows["l2"], l1=rows["l1"], zero=rows["zero"], nonfinite=rows["nonfinite"])


def gradient_norm(model: Model, x: Data, y: Tensor | None = None, *, index: Tensor | None = None,
                  batch_size: int = batches.BATCH_SIZE, batch: Pick = None) -> GradientNorm:
    """Norm of the true input gradient of the cross-entropy, and the shares of zero and of non-finite elements.

    Tramer et al. 2018, section 4.1: adversarial training did not make the loss flat (mean norm 0.17 against 0.10), so
    single steps do not fail for flatness. All arguments and errors: :func:`ensadv_fast.diagnose.batches.per_batch`.
    """
    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        return norm_rows(batches.gradient(source, x, y))

    return norm_summary(batches.per_batch("gradient_norm", model, x, y, index, batch_size, measure, batch))


@dataclass(frozen=True)
class GradientAlignment(Result):
    """mean: over the samples where it is defined, -1..1; undefined: share of the others (a gradient is zero).
    cosine: [N], the mean over the draws, NaN where undefined."""

    mean: float
    undefined: float
    cosine: Tensor


def gradient_alignment(model: Model, x: Data, y: Tensor | None = None, *, eps: float = 8 / 255, draws: int = 1,
                       key: Tensor | None = None, index: Tensor | None = None,
                       batch_size: int = batches.BATCH_SIZE, batch: Pick = None) -> GradientAlignment:
    """cos(grad loss(x), grad loss(x + eta)), eta ~ U(-eps, eps) for each pixel: 1 where the loss is locally linear.

    Andriushchenko and Flammarion, "Understanding and improving fast adversarial training" (NeurIPS 2020), equation 4.
    As in the paper, x + eta is not clipped to the box. The alignment falls towards 0 when single-step adversarial
    training overfits catastrophically. eps > 0: half-width of the noise, in image units; draws: noises per sample; key:
    int64 [2], the same key gives the same noise. Cross-entropy with the labels y, true gradients. Other arguments and
    errors:
    :func:`ensadv_fast.diagnose.batches.per_batch`.
    """
    op = "gradient_alignment"
    eps = batches.check_eps(op, eps)
    noise_keys = batches.child_keys(op, key, checks.integer(op, "draws", draws, 1))

    def measure(source: BaseSource, x: Tensor, y: Tensor, index: Tensor) -> batches.Rows:
        grad = batches.gradient(source, x, y)
        cosines = [batches.cosine(grad, batches.gradient(source, x + batches.noise(x, k, eps, "uniform", index), y))
                   for k in noise_keys]
        return {"cosine": torch.stack(cosines).nanmean(0)}

    cosine = batches.per_batch(op, model, x, y, index, batch_size, measure, batch)["cosine"]
    return GradientAlignment(batches.mean(cosine), cosine.isnan().sum().item() / len(cosine), cosine)
