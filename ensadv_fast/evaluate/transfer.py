"""Crafting on sources, showing to targets: one pass over a loader, in constant memory but for bits per example.

On top of the attacks a pass costs each target, and each source for the transfer rate, one forward pass on every version
of a batch. Nothing waits for a GPU within a batch, unless `folder` is given and the loader's images are on the GPU
(then once a batch), or sets are read or written.
"""
from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import ExitStack, closing, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from .. import ops
from ..attacks import BaseAttack
from ..ops import checks
from ..ops.keys import derive_seed
from .cells import OP, Model, Participants, SavedCell, Sources, plan_cells
from .journal import Journal
from .loader import Classes, Pick, read
from .matrix import TransferMatrix
from .run import TransferPass
from .sets import DTYPES, AdversarialSet, load_set, set_folder

Progress = Callable[[int], object] | bool


def transfer_matrix(targets: Mapping[str, Model], sources: Sources, attacks: Mapping[str, BaseAttack],
                    loader: Iterable[Any] | None, *, key: Tensor | None = None, progress: Progress = False,
                    white_box: bool = False, folder: str | Path | None = None,
                    save_sets: str | Path | None = None, set_dtype: str = "uint8",
                    data: str | None = None, batch: Pick = None,
                    classes: int | Sequence[int] | None = None) -> TransferMatrix:
    """Craft every attack on every source and show the examples to every target.

    Attacks are given the true labels. A target that is named among the sources too gives the white-box errors
    wrong[attack, name, name]. :class:`TransferMatrix` says what counts as misclassified.

    Args:
        targets: :class:`Source`, :class:`Ensemble`, or plain modules. Plain modules are used as they are, in eval mode
            meanwhile, and left exactly as they were, also after an exception.
        sources: the same, or saved sets: an :class:`AdversarialSet` or several of one source. A set brings its attack
            with it and must hold this loader's examples in this order, which is checked.
        attacks: name -> :class:`Attack`. The noise depends on (key, attack's name, source's name, index) alone.
        loader: batches (x, y) or (x, y, index): x [N, ...] in [0, 1], float or uint8 levels; y integers or bools [N]
            or [N, 1]; index int64 [N], positions in the test set, counted where absent. They are moved to the models'
            device. None where all sources are sets: the sets' labels are used, and clean errors are unknown.
        key: int64 [2] from `ops.fresh_key`. None draws one; with folder or save_sets, so that a repeated call can go
            on, None is fresh_key(seed=0).
        progress: True for a bar on stderr, or called with the batch size after each (batch, source, attack).
        white_box: attack each target too that is not among the sources; only that target is shown the examples.
        folder: keep verdicts in this folder (:class:`Journal`) and reuse those that it has. A killed call that is
            repeated with the same key goes on where it stopped; the attack that was under way (on a GPU: up to two
            batches) is computed again. Nothing computed from another model, attack, key, image or version of
            ensadv_fast or torch is used.
        save_sets: write each (source, attack) as an adversarial set into a folder of this folder. Crafting then
            happens once for a batch, also for targets that come later. Targets are shown the examples as saved.
        set_dtype: of saved sets, "uint8" (levels within the budget) or "float32" (exactly what was crafted).
        data: what the sets' manifests call the data.
        batch: makes (x, y) or (x, y, index) of what the loader gives, where that has another form: dicts, rows, paths
            or metadata beside the labels.
        classes: the number of logits that every model must have, or, for data of a part of the classes, the logit of
            each class: [207, 3] where label 0 means logit 207. Predictions are among all logits. None: the number that
            the loader's data set tells (`dataset.classes`, as torchvision's has), if it does.

    A model's NaN logits count as misclassified and are said in one warning.

    Raises TypeError, ValueError: no target, models on several devices, batches of wrong types or shapes, labels out of
    range (on the CPU; on a GPU those count as wrong), a model with another number of logits than classes, an empty
    loader, sets that are damaged or of other examples.
    """
    return measure(targets, sources, attacks, loader, key=key, progress=progress, white_box=white_box, folder=folder,
                   save_sets=None if save_sets is None else partial(set_folder, save_sets), set_dtype=set_dtype,
                   data=data, batch=batch, classes=classes)


def save_set(folder: str | Path, source: Model, attack: BaseAttack, loader: Iterable[Any], *, name: str = "source",
             attack_name: str | None = None, key: Tensor | None = None, dtype: str = "uint8", data: str | None = None,
             progress: Progress = False, batch: Pick = None,
             classes: int | Sequence[int] | None = None) -> AdversarialSet:
    """Craft one adversarial set and keep it in `folder`; a killed call that is repeated goes on where it stopped.

    name, attack_name: what the source and the attack are called in the manifest and in matrices; attack_name None is
    the attack's own name. loader, key (None: fresh_key(seed=0)), dtype, data, progress, batch, classes: as for
    :func:`transfer_matrix`; the same key and names give the same noise. Each batch is a shard.
    Raises TypeError, ValueError: also where the folder holds another set.
    """
    attack_name = getattr(attack, "name", "attack") if attack_name is None else attack_name
    measure({name: source}, {name: source}, {attack_name: attack}, loader, key=key, progress=progress,
            save_sets=lambda *_: Path(folder), set_dtype=dtype, data=data, batch=batch, classes=classes)
    return load_set(folder)


def measure(targets: Mapping[str, Model], sources: Sources, attacks: Mapping[str, BaseAttack],
            loader: Iterable[Any] | None, *, key: Tensor | None = None, progress: Progress = False,
            white_box: bool = False, folder: str | Path | None = None,
            save_sets: Callable[[str, str], Path] | None = None, set_dtype: str = "uint8", data: str | None = None,
            noise: Mapping[str, str] | None = None, batch: Pick = None,
            classes: int | Sequence[int] | None = None) -> TransferMatrix:
    """:func:`transfer_matrix` with two arguments of another form.

    save_sets: (source, attack) -> the folder of its set. noise: attack -> the name that its noise is drawn under,
    where that is another name than its own.
    """
    if not targets:
        raise ValueError(f"{OP}: targets must hold at least one model, got none")
    if set_dtype not in DTYPES:
        raise ValueError(f"{OP}: set_dtype must be uint8 or float32, got {set_dtype!r}")
    kept = folder is not None or save_sets is not None
    key = ops.fresh_key("cpu", 0 if kept else None) if key is None else key
    seed = derive_seed(*checks.key(OP, key, getattr(key, "device", torch.device("cpu"))).tolist())
    participants = Participants(targets, sources, kept)
    cells = plan_cells(participants, attacks, seed, white_box=white_box, noise=noise or {},
                       set_dtype=None if save_sets is None else set_dtype)
    if loader is None and not (cells and all(isinstance(cell, SavedCell) for cell in cells)):
        raise ValueError(f"{OP}: loader must be given unless all sources are saved sets, got None")
    of_data = Classes(OP, classes, loader)
    with ExitStack() as stack:
        journal = None if folder is None else stack.enter_context(closing(Journal(folder)))
        run = TransferPass(participants, cells, seed, journal, of_data)
        if save_sets is not None:
            run.open_writers(save_sets, set_dtype, data)
        for source in participants.plain_modules():
            stack.enter_context(source.session())
        count = stack.enter_context(_counter(progress, loader, len(cells)))
        for part in (run.saved_batches() if loader is None
                     else read(OP, loader, participants.device, batch, of_data)):
            run.judge_clean(part)
            for cell in cells:
                run.judge_cell(cell, part)
                count(len(part))
            run.settle(keep_current=True)
        run.settle()
    return run.finish()


@contextmanager
def _counter(progress: Progress, loader: Iterable[Any] | None, cells: int) -> Iterator[Callable[[int], object]]:
    """The function that is called with the size of each batch after each attack: the caller's, or that of a bar."""
    if progress is not True:
        yield progress or (lambda n: None)
        return
    data_set = getattr(loader, "dataset", None)
    total = len(data_set) * cells if isinstance(data_set, Sized) else None
    with tqdm(total=total, unit=" attacks", unit_scale=True, disable=None) as bar:
        yield bar.update
