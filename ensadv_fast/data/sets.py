"""What a data set is: splits that give batches by the positions of their samples."""
from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor

from ..system import files


class ImageSplit(Protocol):
    """What every split can do, wherever its images lie: :class:`Split` (in memory) and
    :class:`ensadv_fast.data.FolderSplit` (files)."""

    @property
    def labels(self) -> Tensor:
        """int64 [N], on the split's device."""

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of an image as it comes in a batch."""

    def __len__(self) -> int: ...

    def contents(self) -> list[Any]:
        """What tells this split from others: tensors and plain values, alike on all devices."""

    def to(self, device: torch.device | str) -> ImageSplit:
        """The split whose batches are on `device`."""

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `index` (int64 [B]): images float32 in [0, 1] [B, C, H, W] and labels int64 [B]."""

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All samples in their order, `size` at a time: (images float32 in [0, 1], labels, index)."""


@dataclass(frozen=True)
class Split:
    """Images uint8 [N, C, H, W] and labels int64 [N] on one device."""

    images: Tensor
    labels: Tensor

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image."""
        c, h, w = self.images.shape[1:]
        return c, h, w

    def __len__(self) -> int:
        return self.images.shape[0]

    def contents(self) -> list[Any]:
        """Images and labels."""
        return [self.images, self.labels]

    def to(self, device: torch.device | str) -> Split:
        """The split on `device`."""
        return Split(self.images.to(device), self.labels.to(device))

    def batch(self, index: Tensor) -> tuple[Tensor, Tensor]:
        """The samples at `index` (int64 [B]): images float32 in [0, 1] [B, C, H, W] and labels [B]."""
        return self.images[index].float().div_(255), self.labels[index]

    def batches(self, size: int) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """All samples in their order, `size` at a time: (images float32 in [0, 1], labels, index)."""
        for index in torch.arange(len(self), device=self.images.device).split(size):
            yield *self.batch(index), index


@dataclass(frozen=True)
class Dataset:
    """A named data set: its training and test splits and its number of classes.

    Raises ValueError where images of the two splits have different shapes, or no pixels.
    """

    name: str
    train: ImageSplit
    test: ImageSplit
    classes: int

    def __post_init__(self) -> None:
        if self.train.in_shape != self.test.in_shape:
            raise ValueError(f"data: {self.name}: test images must have the shape of training images, "
                             f"{self.train.in_shape}, got {self.test.in_shape}")
        if 0 in self.in_shape:
            raise ValueError(f"data: {self.name}: images must have pixels, got shape {self.in_shape}")

    def digest(self) -> str:
        """SHA-256 in hex of all images and labels; of folders that of the names and labels of all files, and of the
        contents of a few hundred."""
        return files.digest([self.classes, self.train.contents(), self.test.contents()])

    @property
    def in_shape(self) -> tuple[int, int, int]:
        """(channels, height, width) of one image as it comes in a batch."""
        return self.train.in_shape

    def to(self, device: torch.device | str) -> Dataset:
        """The data set whose batches are on `device`."""
        return Dataset(self.name, self.train.to(device), self.test.to(device), self.classes)


def make_split(images: np.ndarray, labels: np.ndarray, classes: int, origin: object) -> Split:
    """The split of images uint8 [N, C, H, W] and integer labels [N] in 0..classes-1.

    origin: where they were read from, for the ValueError that is raised where they do not fit.
    """
    if len(images) != len(labels):
        raise ValueError(f"data: {origin}: {len(images)} images but {len(labels)} labels")
    if not len(images):
        raise ValueError(f"data: {origin}: no images")
    if labels.min() < 0 or labels.max() >= classes:
        raise ValueError(f"data: {origin}: labels must be 0..{classes - 1}, got {labels.min()}..{labels.max()}")
    return Split(torch.from_numpy(np.ascontiguousarray(images)), torch.from_numpy(labels.astype(np.int64)))
