"""Batches for training and evaluation: from memory or from files, on the device, augmented there."""
from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from .. import ops
from ..overlap import SideStream
from .augment import Augment
from .folder import FolderSplit, middle
from .loading import Loader
from .sampler import Sampler, derive_seed, upload
from .sets import ImageSplit

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
        self._split = split.to(self.device)
        self._key = ops.fresh_key(self.device, derive_seed(seed, "augment"))
        self._mean, self._std = (fill(split.in_shape[0], device=self.device) for fill in (torch.zeros, torch.ones))
        self._loader: Loader | None = None
        self._side: SideStream | None = None
        self._ahead: _Sent | Exception | None = None
        if isinstance(split, FolderSplit):
            cuda = self.device.type == "cuda"
            self._side = SideStream(self.device) if cuda else None
            self._loader = Loader(split, sampler, workers=workers, prefetch=prefetch, pinned=cuda, endless=train)

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
        for start, stop, images, index in self._from_memory() if self._loader is None else self._from_files():
            x, y = self._entered(images, key, index), self._split.labels[index]
            sampler.position, self.global_size = stop, stop - start
            yield x, y, index
        sampler.next_epoch()

    def _from_memory(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        order = upload(self.sampler.order(self.sampler.epoch), self.device)  # one copy an epoch, none a batch
        for start, stop in self.sampler.spans(self.sampler.position):
            index = self.sampler.share(order, start, stop)
            yield start, stop, self._split.images[index], index

    def _from_files(self) -> Iterator[tuple[int, int, Tensor, Tensor]]:
        tasks = [(self.sampler.epoch, *span) for span in self.sampler.spans(self.sampler.position)]
        for task, following in zip(tasks, [*tasks[1:], None]):
            sent, self._ahead = self._ahead, None
            if isinstance(sent, Exception):
                raise sent
            if sent is None or sent.task != task:
                sent = self._send(task)
            if self._side is not None:
                self._side.hand_over((sent.images, sent.index))
                if following is not None:
                    try:
                        self._ahead = self._send(following)
                    except Exception as e:  # noqa: BLE001 - it belongs to the next batch, not to this one
                        self._ahead = e
            self._count(sent.corrupt)
            yield *task[1:], sent.images, sent.index

    def _send(self, task: tuple[int, int, int]) -> _Sent:
        """The next batch on its way to the device; the host does not wait for it."""
        loaded = self._loader.take(task)
        index = torch.tensor([i for i in loaded.task.index if i not in loaded.corrupt], dtype=torch.int64)

        def copies() -> tuple[Tensor, Tensor]:
            return upload(loaded.images, self.device), upload(index, self.device)

        return _Sent(task, *(copies() if self._side is None else self._side.issue(copies)), loaded.corrupt)

    def _count(self, corrupt: dict[int, str]) -> None:
        for i, reason in corrupt.items():
            self.corrupt += 1
            if len(self.skipped) < NAMED:
                self.skipped[self._split.path(i)] = reason
        if self.corrupt > self.limit:
            self.close()
            few = "; ".join(f"{path} ({reason})" for path, reason in list(self.skipped.items())[-5:])
            raise CorruptImages(f"Stream: {self.corrupt} images of epoch {self.sampler.epoch} cannot be decoded, at "
                                f"most {self.limit} are borne (max_corrupt), the last of them: {few}")

    def _entered(self, images: Tensor, key: Tensor, index: Tensor) -> Tensor:
        if self.augment is not None:
            images = self.augment(images, key, index)
        elif self._loader is not None:
            images = middle(images, self._split.size)
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
        self._ahead = None
        if self._loader is not None:
            self._loader.close()

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()


class _Sent(NamedTuple):
    """A batch on the device, or on its way there."""

    task: tuple[int, int, int]
    images: Tensor
    index: Tensor
    corrupt: dict[int, str]
