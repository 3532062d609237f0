"""Checkpoints: files that are either whole or not there, and that hold their own SHA-256."""
from __future__ import annotations

import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch

from ..system.files import atomic_write, digest, flush_folder


def save(path: Path, state: dict[str, Any]) -> None:
    """Write `state` with its digest, atomically. It is an ordinary torch.save file of tensors and plain values."""
    atomic_write(path, lambda f: torch.save({**state, "sha256": digest(state)}, f))


def load(path: Path) -> dict[str, Any]:
    """Read what `save` wrote, on the CPU, without running any code in it (weights_only=True).

    Raises FileNotFoundError, and ValueError naming the file where it is truncated, altered or something else.
    """
    if not path.is_file():
        raise FileNotFoundError(f"checkpoint: no file {path}")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
        wanted = state.pop("sha256")
    except Exception as e:  # a damaged zip or pickle raises almost anything
        raise ValueError(f"checkpoint: {path} is corrupt or no checkpoint of ensadv-fast ({type(e).__name__}: {e}); "
                         "delete it to train this model again") from e
    if digest(state) != wanted:
        raise ValueError(f"checkpoint: {path} is corrupt: its contents do not match their SHA-256; "
                         "delete it to train this model again")
    return state


def is_same_file(a: Path, b: Path) -> bool:
    """Are both there, and one file under two names?"""
    return a.exists() and b.exists() and a.samefile(b)


class Checkpoints:
    """The checkpoints of one training, NAME-STEP.pt in a folder of their own: the newest `keep` of them.

    One process writes, all may read. The state that it writes holds what other ranks must not lose: the generators of
    each. A checkpoint is deleted only when a newer one is whole and on the disk.
    """

    def __init__(self, folder: str | Path, name: str, keep: int = 2) -> None:
        if keep < 1:
            raise ValueError(f"Checkpoints: keep must be >= 1, got {keep}")
        self.folder, self.name, self.keep = Path(folder), name, keep

    def path(self, step: int) -> Path:
        """Where the checkpoint of this step lies."""
        return self.folder / f"{self.name}-{step:09d}.pt"

    def steps(self) -> list[int]:
        """The steps that there are files of, the newest first."""
        pattern = re.compile(re.escape(self.name) + r"-(\d{9,})\.pt")
        found = (pattern.fullmatch(p.name) for p in self.folder.glob("*.pt"))
        return sorted((int(m[1]) for m in found if m), reverse=True)

    def save(self, state: dict[str, Any]) -> Path:
        """Write a checkpoint of step state["step"]; then delete the oldest ones, and those of later steps, which were
        left behind when training went back to an older one. OSError where the disk is full: all others are kept."""
        self.folder.mkdir(parents=True, exist_ok=True)
        path, step = self.path(state["step"]), state["step"]
        save(path, state)
        steps = self.steps()
        for old in (*(s for s in steps if s > step), *[s for s in steps if s <= step][self.keep:]):
            self.path(old).unlink(missing_ok=True)
        return path

    def publish(self, step: int, path: Path) -> None:
        """Let `path` be the checkpoint of this step too, atomically: a hard link where the file system has them, else a
        copy. On return it is on the disk. To publish twice is to publish once."""
        if is_same_file(path, self.path(step)):
            return
        temporary = path.with_name(f"{path.name}.{os.getpid()}.tmp")
        temporary.unlink(missing_ok=True)
        try:
            os.link(self.path(step), temporary)
        except OSError:
            with open(self.path(step), "rb") as whole:
                atomic_write(path, lambda f: shutil.copyfileobj(whole, f))
            return
        os.replace(temporary, path)
        flush_folder(path.parent)

    def forget(self) -> None:
        """Delete all of them: the training is over, and its last one was published."""
        for step in self.steps():
            self.path(step).unlink(missing_ok=True)

    def load(self, step: int) -> dict[str, Any]:
        """The checkpoint of this step; FileNotFoundError or ValueError as of `load`."""
        return load(self.path(step))

    def settle(self, path: Path) -> dict[str, Any] | None:
        """Let the newest whole checkpoint, of these and of the published one at `path`, be the published one, and give
        it; None where there is no file of any.

        It undoes whatever a kill between two writes has left. A warning names damaged files; ValueError where all are.
        """
        found = self.newest()
        if path.exists() and not (found and is_same_file(path, self.path(found["step"]))):
            try:
                published = load(path)
            except ValueError as e:
                if found is None:
                    raise
                warnings.warn(f"{e}; taking that of step {found['step']}", stacklevel=2)
            else:
                if found is None or published["step"] >= found["step"]:
                    return published
        if found is not None:
            self.publish(found["step"], path)
        elif steps := self.steps():
            return self.load(steps[0])  # which raises
        return found

    def newest(self) -> dict[str, Any] | None:
        """The newest checkpoint that is whole, or None where there is none; a warning names damaged ones.

        With many ranks one of them asks this, and the others `load` the step that it found.
        """
        for step in self.steps():
            try:
                return self.load(step)
            except (ValueError, FileNotFoundError) as e:
                warnings.warn(f"{e}; looking for an older checkpoint", stacklevel=2)
        return None
