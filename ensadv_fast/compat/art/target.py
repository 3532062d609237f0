"""A PyTorchClassifier as attacks see it: gradients by the images alone, predictions, and what a source needs of it."""
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import numpy as np
import torch
from art.config import ART_NUMPY_DTYPE
from art.estimators.classification.pytorch import PyTorchClassifier
from art.preprocessing.standardisation_mean_std.pytorch import StandardisationMeanStdPyTorch
from art.preprocessing.standardisation_mean_std.utils import broadcastable_mean_std
from torch import Tensor, nn

from ...sources.source import Source
from .. import source_cache
from ..model_mode import model_mode

# A number, or a tensor that broadcasts over images, or None. Any, as torch annotates clamp for one or the other.
Extent = Any


class Target:
    """For the time of one ``generate``. The classifier's forward is ART's wrapper of the model, which has no public
    name; its last output is the model's.

    lo, hi: the range of pixels as numbers, or tensors that broadcast over images; None: nothing is clipped.
    """

    def __init__(self, estimator: PyTorchClassifier, x: np.ndarray):
        self.estimator, self.device = estimator, estimator.device
        self.lo: Extent
        self.hi: Extent
        self.lo, self.hi = (None, None) if estimator.clip_values is None else (
            float(v) if np.ndim(v) == 0 else torch.tensor(v, device=self.device) for v in estimator.clip_values)
        operations = [p for p in estimator.preprocessing_operations if p.apply_predict]
        # Other operations may change labels, too, and are left to the classifier, in each step.
        self.plain = all(type(p) is StandardisationMeanStdPyTorch for p in operations)
        self.statistics = [broadcastable_mean_std(x, p.mean, p.std) for p in operations] if self.plain else []
        self.statistics = [(m, s) for m, s in self.statistics if (m != 0).any() or (s != 1).any()]
        self._tensors = [tuple(torch.tensor(v, device=self.device) for v in pair) for pair in self.statistics]

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """The mode in which ART computes gradients: eval; recurrent networks in training mode, but for their dropout
        and batch normalisation. Every flag is restored."""
        with torch.inference_mode(False), torch.no_grad(), model_mode(self.estimator._model, self.estimator.is_rnn):
            yield

    @contextmanager
    def predicting(self) -> Iterator[None]:
        with torch.inference_mode(False), torch.no_grad(), model_mode(self.estimator._model):
            yield

    def images(self, x: np.ndarray) -> Tensor:
        """A copy, as iterates are kept."""
        return torch.tensor(np.asarray(x, ART_NUMPY_DTYPE), device=self.device)

    def labels(self, targets: np.ndarray) -> Tensor:
        """As :meth:`gradient` takes them: as the loss does, or where labels are preprocessed, as they are."""
        labels = torch.tensor(np.asarray(targets, ART_NUMPY_DTYPE), device=self.device)
        return self.estimator.reduce_labels(labels) if self.plain else labels

    def gradient(self, point: Tensor, labels: Tensor) -> Tensor:
        """Of the classifier's loss by the point, without a sync; in a session of :meth:`attacking`."""
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            if self.plain:
                images = self._standardised(leaf)
            else:
                images, labels = self.estimator._apply_preprocessing(leaf, y=labels, fit=False, no_grad=False)
                labels = self.estimator.reduce_labels(labels)
            loss = self.estimator.loss(self.estimator._model(images)[-1], labels)
            (grad,) = torch.autograd.grad(loss, leaf)
        return grad

    def predicted(self, x: Tensor) -> Tensor:
        """Classes int64 [N]; in a session of :meth:`attacking`."""
        eval_mode: AbstractContextManager = self.predicting() if self.estimator.is_rnn else nullcontext()
        with eval_mode:
            images = self._standardised(x) if self.plain else self.estimator._apply_preprocessing(x, y=None)[0]
            outputs = self.estimator._model(images)[-1]
        outputs = outputs[:, None] if outputs.dim() == 1 else outputs
        if self.estimator.postprocessing_defences:
            arrays = outputs.cpu().numpy().astype(np.float32)
            outputs = torch.from_numpy(self.estimator._apply_postprocessing(preds=arrays, fit=False))
        return outputs.argmax(1).to(self.device)

    def _standardised(self, images: Tensor) -> Tensor:
        for mean, std in self._tensors:
            images = (images - mean) / std
        return images

    def why_no_source(self, x: np.ndarray) -> str | None:
        """What a source of the model could not do, or None."""
        loss = self.estimator.loss
        if type(loss) is not nn.CrossEntropyLoss or loss.weight is not None or loss.label_smoothing:
            return "its loss is not the plain cross-entropy"
        if type(self.estimator)._make_model_wrapper is not PyTorchClassifier._make_model_wrapper:
            return f"{type(self.estimator).__name__} calls its model in its own way"
        per_channel = len(self.statistics) <= 1 and all(
            v.size == 1 or x.ndim == 4 and v.size == x.shape[1] and v.shape[-2:] == (1, 1)
            for pair in self.statistics for v in pair)
        if not self.plain or not per_channel or self.statistics and x.ndim != 4:
            return "its preprocessing is not one mean and deviation per channel"
        return "clip_values are arrays" if isinstance(self.lo, Tensor) else None

    def source(self) -> Source:
        mean, std = ((torch.tensor(v).flatten() for v in self.statistics[0]) if self.statistics else (None, None))
        return source_cache.prepared(self.estimator.model, mean, std)
