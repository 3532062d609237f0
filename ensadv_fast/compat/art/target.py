"""A PyTorchClassifier as attacks need it: gradients by the images alone, predictions, and a source of its model."""
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

# A number, or a tensor that broadcasts over images, or None. It is Any, because torch annotates clamp for either alone.
Extent = Any


class Target:
    """A classifier for the time of one ``generate``. ART's wrapper of the model is called, under its private name; its
    last output is the model's.

    lo, hi: the range of pixels as numbers, or tensors that broadcast over images; None: nothing is clipped. plain: is
    the preprocessing none but normalisation by means and deviations (`statistics`), in which labels do not change?
    """

    def __init__(self, estimator: PyTorchClassifier, x: np.ndarray):
        self.estimator, self.device = estimator, estimator.device
        self.lo: Extent
        self.hi: Extent
        self.lo, self.hi = (None, None) if estimator.clip_values is None else (
            float(v) if np.ndim(v) == 0 else torch.tensor(v, device=self.device) for v in estimator.clip_values)
        operations = [p for p in estimator.preprocessing_operations if p.apply_predict]
        # Other operations may change labels too: the classifier itself then applies all of them, in each step.
        self.plain = all(type(p) is StandardisationMeanStdPyTorch for p in operations)
        self.statistics = [broadcastable_mean_std(x, p.mean, p.std) for p in operations] if self.plain else []
        self.statistics = [(m, s) for m, s in self.statistics if (m != 0).any() or (s != 1).any()]
        self._tensors = [tuple(torch.tensor(v, device=self.device) for v in pair) for pair in self.statistics]

    @contextmanager
    def attacking(self) -> Iterator[None]:
        """Within it the model is in the mode in which ART computes gradients. Every flag is restored at the end.

        That mode is eval; for recurrent networks training, except for their dropout and batch normalisation.
        """
        with torch.inference_mode(False), torch.no_grad(), model_mode(self.estimator._model, self.estimator.is_rnn):
            yield

    @contextmanager
    def predicting(self) -> Iterator[None]:
        """Within it the model is in eval mode. Every flag is restored at the end."""
        with torch.inference_mode(False), torch.no_grad(), model_mode(self.estimator._model):
            yield

    def to_images(self, x: np.ndarray) -> Tensor:
        """A copy on the classifier's device, in the dtype of iterates."""
        return torch.tensor(np.asarray(x, ART_NUMPY_DTYPE), device=self.device)

    def to_labels(self, targets: np.ndarray) -> Tensor:
        """Labels in the form that :meth:`gradient` takes: that of the loss; where they are preprocessed, unchanged."""
        labels = torch.tensor(np.asarray(targets, ART_NUMPY_DTYPE), device=self.device)
        return self.estimator.reduce_labels(labels) if self.plain else labels

    def gradient(self, point: Tensor, labels: Tensor) -> Tensor:
        """The gradient of the classifier's loss by the point, without a host sync; only within :meth:`attacking`."""
        with torch.enable_grad():
            leaf = point.detach().requires_grad_()
            if self.plain:
                images = self._standardise(leaf)
            else:
                images, labels = self.estimator._apply_preprocessing(leaf, y=labels, fit=False, no_grad=False)
                labels = self.estimator.reduce_labels(labels)
            loss = self.estimator.loss(self.estimator._model(images)[-1], labels)
            (grad,) = torch.autograd.grad(loss, leaf)
        return grad

    def predict(self, x: Tensor) -> Tensor:
        """Classes int64 [N]; only within :meth:`attacking`."""
        eval_mode: AbstractContextManager = self.predicting() if self.estimator.is_rnn else nullcontext()
        with eval_mode:
            images = self._standardise(x) if self.plain else self.estimator._apply_preprocessing(x, y=None)[0]
            outputs = self.estimator._model(images)[-1]
        outputs = outputs[:, None] if outputs.dim() == 1 else outputs
        if self.estimator.postprocessing_defences:
            arrays = outputs.cpu().numpy().astype(np.float32)
            outputs = torch.from_numpy(self.estimator._apply_postprocessing(preds=arrays, fit=False))
        return outputs.argmax(1).to(self.device)

    def _standardise(self, images: Tensor) -> Tensor:
        for mean, std in self._tensors:
            images = (images - mean) / std
        return images

    def why_no_source(self, x: np.ndarray) -> str | None:
        """Why a source of the model cannot compute the classifier's gradients, or None."""
        loss = self.estimator.loss
        if type(loss) is not nn.CrossEntropyLoss or loss.weight is not None or loss.label_smoothing:
            return "its loss is not the plain cross-entropy"
        if type(self.estimator)._make_model_wrapper is not PyTorchClassifier._make_model_wrapper:
            return f"{type(self.estimator).__name__} calls its model in its own way"
        if not self.plain or not self._is_per_channel(x):
            return "its preprocessing is not one mean and deviation per channel"
        return "clip_values are arrays" if isinstance(self.lo, Tensor) else None

    def _is_per_channel(self, x: np.ndarray) -> bool:
        """Is the normalisation none, or one by numbers per channel of images [N, C, H, W]?"""
        if not self.statistics:
            return True
        if len(self.statistics) > 1 or x.ndim != 4:
            return False
        return all(v.size == 1 or v.size == x.shape[1] and v.shape[-2:] == (1, 1) for v in self.statistics[0])

    def get_source(self) -> Source:
        """The model's source, for a classifier of which :meth:`why_no_source` says None."""
        mean, std = ((torch.tensor(v).flatten() for v in self.statistics[0]) if self.statistics else (None, None))
        return source_cache.get_source(self.estimator.model, mean, std)
