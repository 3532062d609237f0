"""Batches for training and evaluation: from memory or from files, on the device, augmented there."""
from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..ops.keys import derive_seed
from ..system.streams import SideStream
from .augment import Augment
from .folder import FolderSplit, middle
from .loading import Loader
from .sampler import Sampler, upload
from .sets import ImageSplit, Split

LEAST = 10  # corrupt images that are borne in any set, where the limit is a share
NAMED = 100  # corrupt images that are kept with their reasons


class CorruptImages(RuntimeError):
    """More images could not be decoded than is borne."""


class Stream:
    """The batches of a split in a sampler's order, on the device.

    Iterating yields the rest of the current epoch: (x, y, index), images float32 in [0, 1] [B, C, H, W], labels
    int64 [B] and positions in the split int64 [B], and then moves to the next epoch. `state_dict` taken after a batch
    describes the position right behind it, whatever was decoded ahead. Which images come in which batch, and all
    their pixels, are a function of (seed, epoch, position in the split, augment) alone: the same for any number of
    workers and ranks, and any prefetch.

    A :class:`Split` in memory lies on the device. The files of a :class:`FolderSplit` are decoded by `workers`
    processes, each up to `prefetch` batches ahead, over epochs' ends too, in uint8; on CUDA by way of pinned memory,
    one batch ahead on a stream of its own. Images are uint8 until they are augmented; one pass makes them floats.

    A file that cannot be decoded is left out and its batch is smaller (it may be empty): counted in `corrupt` and
    named in `skipped`. In one epoch at most `limit` are borne. Files are decoded by whatever version of Pillow and
    libjpeg there is: pixels are the same wherever that is.

    Args:
        split: of `data.load`.
        sampler: over the split's samples, of this rank. With train=False its order is 0..n-1.
        device: of the batches.
        seed: of the augmentation; alike on all ranks.
        augment: what is done to images at random; None: nothing, and of files the middle is taken.
        workers: processes that decode files; 0 decodes in this one. Memory splits need none.
        prefetch: batches that each worker is ahead; at most workers * prefetch lie in memory, and two on the device.
        channels_last: memory format of x; otherwise contiguous.
        max_corrupt: corrupt images that are borne in one epoch: a share of the split in [0, 1] (float; never fewer
            than 10), or a number (int). Ranks count their own; the sum of their `corrupt` is that of the epoch.
        train: False: all samples in their order, no augmentation: for evaluation. Ranks share those too.

    Attributes:
        skipped: path -> reason, of the first 100 corrupt files met.
        corrupt: corrupt images met in this epoch (since the start, where it was resumed) by this rank.
        global_size: samples in the last global batch, over all ranks, the corrupt ones counted.

    Raises:
        TypeError, ValueError: naming the argument. Iterating: CorruptImages, beyond the limit; RuntimeError, where
        a worker died. Both end the processes; :meth:`close` does, and leaving `with Stream(...) as stream`.
    """

    def __init__(self, split: ImageSplit, sampler: Sampler, *, device: torch.device | str, seed: int,
                 augment: Augment | None = None, workers: int = 0, prefetch: int = 2, channels_last: bool = False,
                 max_corrupt: float | int = 0.001, train: bool = True) -> None:
        if not isinstance(split, (Split, FolderSplit)):
            raise TypeError(f"Stream: split: got {type(split).__name__}, want a Split or a FolderSplit")
        if len(split) != sampler.n:
            raise ValueError(f"Stream: sampler: it has n={sampler.n}, the split has {len(split)} samples")
        for name, value, least in (("workers", workers, 0), ("prefetch", prefetch, 1)):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"Stream: {name}: got {value!r}, want a whole number of at least {least}")
        most = 1 if isinstance(max_corrupt, float) else len(split)
        if isinstance(max_corrupt, bool) or not 0 <= max_corrupt <= most:
            raise ValueError(f"Stream: max_corrupt: got {max_corrupt!r}, want a share in [0.0, 1.0] or a number of the "
                             f"{len(split)} images")
        if not train and augment is not None:
            raise ValueError(f"Stream: augment: got {augment}, but images are not augmented with train=False")
        if augment is not None:
            augment.check(*([split.resize] * 2 if isinstance(split, FolderSplit) else split.in_shape[1:]))
        self.device, self.seed, self.augment, self.channels_last = torch.device(device), seed, augment, channels_last
        self.limit = max(LEAST, int(max_corrupt * len(split))) if isinstance(max_corrupt, float) else max_corrupt
        if not train and (sampler.shuffle or sampler.drop_last):
            sampler = Sampler(sampler.n, sampler.batch_size, sampler.seed, rank=sampler.rank, world=sampler.world,
                              shuffle=False)
        self.sampler = sampler
        self.corrupt, self.global_size = 0, 0
        self.skipped: dict[str, str] = {}
        self._counted = sampler.epoch  # the epoch that `corrupt` is of
        self._in_shape = split.in_shape
        self._key = ops.fresh_key(self.device, derive_seed(seed, "augment"))
        self._mean, self._std = (fill(split.in_shape[0], device=self.device) for fill in (torch.zeros, torch.ones))
        self._source: _Memory | _Files
        if isinstance(split, Split):
            self._source = _Memory(split, sampler, self.device)
        else:
            self._source = _Files(split, sampler, self.device, workers=workers, prefetch=prefetch, endless=train)

    @property
    def epoch(self) -> int:
        """Of the batch last yielded, or, once all of its epoch are, of the next one."""
        return self.sampler.epoch

    def __len__(self) -> int:
        """Global batches in one epoch."""
        return len(self.sampler)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        sampler, epoch = self.sampler, self.sampler.epoch
        if self._counted != epoch:
            self._counted, self.corrupt = epoch, 0
        key = self._key.clone()
        key[1].fill_(epoch)
        for batch in self._source.batches():
            self._count(batch.corrupt)
            x = self._entered(batch.images, key, batch.ids)
            sampler.position, self.global_size = batch.stop, batch.stop - batch.start
            yield x, batch.labels, batch.ids
        sampler.next_epoch()

    def _count(self, corrupt: dict[str, str]) -> None:
        self.corrupt += len(corrupt)
        self.skipped |= list(corrupt.items())[:NAMED - len(self.skipped)]
        if self.corrupt > self.limit:
            self.close()
            few = "; ".join(f"{path} ({reason})" for path, reason in list(corrupt.items())[-5:])
            raise CorruptImages(f"Stream: {self.corrupt} images of epoch {self.sampler.epoch} cannot be decoded, at "
                                f"most {self.limit} are borne (max_corrupt), the last of them: {few}")

    def _entered(self, images: Tensor, key: Tensor, index: Tensor) -> Tensor:
        if self.augment is not None:
            images = self.augment(images, key, index)
        elif images.shape[1:] != self._in_shape:
            images = middle(images, self._in_shape[1])
        return ops.model_entry(images, self._mean, self._std, channels_last=self.channels_last)

    def state_dict(self) -> dict[str, int]:
        """The position right behind the batch last yielded, and the seeds: plain numbers, alike on all ranks."""
        return {**self.sampler.state_dict(), "augment_seed": self.seed}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Go on where `state` was taken, with any number of ranks and workers. ValueError for other seeds or another
        number of samples."""
        if state["augment_seed"] != self.seed:
            raise ValueError(f"Stream: the saved position is of seed={state['augment_seed']}, this stream has "
                             f"seed={self.seed}")
        self.sampler.load_state_dict(state)

    def close(self) -> None:
        """End the processes and wait for them. Iterating starts new ones."""
        self._source.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Batch(NamedTuple):
    """This rank's part of the global batch [start, stop) of an epoch, on the device."""

    epoch: int
    start: int
    stop: int
    images: Tensor  # uint8 [B, C, H, W]
    labels: Tensor
    ids: Tensor
    corrupt: dict[str, str]  # path -> reason; these are not among the others


class _Memory:
    """The rest of the sampler's epoch from images that lie on the device."""

    def __init__(self, split: Split, sampler: Sampler, device: torch.device) -> None:
        self.split, self.sampler, self.device = split.to(device), sampler, device

    def batches(self) -> Iterator[_Batch]:
        epoch = self.sampler.epoch
        order = upload(self.sampler.order(epoch), self.device)  # one copy an epoch, none a batch
        for start, stop in self.sampler.spans(self.sampler.position):
            ids = self.sampler.share(order, start, stop)
            yield _Batch(epoch, start, stop, self.split.images[ids], self.split.labels[ids], ids, {})

    def close(self) -> None:
        """Nothing is open."""


class _Files:
    """The rest of the sampler's epoch from files that a :class:`Loader` decodes."""

    def __init__(self, split: FolderSplit, sampler: Sampler, device: torch.device, *, workers: int, prefetch: int,
                 endless: bool) -> None:
        self.split, self.sampler, self.device = split.to(device), sampler, device
        cuda = device.type == "cuda"
        self.loader = Loader(split, sampler, workers=workers, prefetch=prefetch, pinned=cuda, endless=endless)
        self.side = SideStream(device) if cuda else None
        self.ahead: _Batch | Exception | None = None

    def batches(self) -> Iterator[_Batch]:
        tasks = [(self.sampler.epoch, *span) for span in self.sampler.spans(self.sampler.position)]
        for task, following in itertools.zip_longest(tasks, tasks[1:]):
            batch, self.ahead = self.ahead, None
            if isinstance(batch, Exception):
                raise batch
            if batch is None or batch[:3] != task:
                batch = self.sent(task)
            if self.side is not None:
                self.side.hand_over((batch.images, batch.labels, batch.ids))
                if following is not None:
                    try:
                        self.ahead = self.sent(following)
                    except Exception as e:  # noqa: BLE001 - it belongs to the next batch, not to this one
                        self.ahead = e
            yield batch

    def sent(self, task: tuple[int, int, int]) -> _Batch:
        """A batch on its way to the device; the host does not wait for it."""
        loaded = self.loader.take(task)
        ids = torch.tensor([i for i in loaded.task.ids if i not in loaded.corrupt], dtype=torch.int64)

        def copies() -> tuple[Tensor, Tensor, Tensor]:
            there = upload(ids, self.device)
            return upload(loaded.images, self.device), self.split.labels[there], there

        return _Batch(*task, *(copies() if self.side is None else self.side.issue(copies)),
                      {self.split.path(i): reason for i, reason in loaded.corrupt.items()})

    def close(self) -> None:
        self.ahead = None
        self.loader.close()
