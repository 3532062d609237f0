"""The verdicts of an evaluation as they come, in a file that a killed process can leave at any byte."""
from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from pathlib import Path


class Journal:
    """The file `folder`/cells.jsonl, one line for each attack on one batch: what it holds is known, and more is added.

    A line holds the fingerprint of its cell (attack, source, noise), the digest of its batch, for each model, named by
    its fingerprint, the packed verdicts, and the SHA-256 of all that. Lines are only appended. A line that is cut off
    or altered is ignored. After a power failure the newest lines may be missing; their verdicts are computed again.
    """

    def __init__(self, folder: str | Path) -> None:
        self.path = Path(folder) / "cells.jsonl"
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._known: dict[tuple[str, str, str], bytes] = {}
        self._file = open(self.path, "a+b")  # closed by close()
        self._file.seek(0)
        line = b"\n"
        for line in self._file:
            self._learn(line)
        if not line.endswith(b"\n"):
            self._file.write(b"\n")

    def _learn(self, line: bytes) -> None:
        try:
            record = json.loads(line)
            if record.pop("sha256") != _sha256(record):
                return
            for model, verdicts in record["verdicts"].items():
                self._known[record["cell"], record["batch"], model] = base64.b64decode(verdicts)
        except (ValueError, KeyError, AttributeError, TypeError):
            return

    def get(self, cell: str, batch: str, model: str) -> bytes | None:
        """The packed verdicts of this model on this batch of this cell; None where they are not known."""
        return self._known.get((cell, batch, model))

    def add(self, cell: str, batch: str, verdicts: Mapping[str, bytes]) -> None:
        """Append the verdicts (model fingerprint -> packed) of one cell on one batch."""
        record = {"cell": cell, "batch": batch,
                  "verdicts": {model: base64.b64encode(packed).decode() for model, packed in verdicts.items()}}
        line = json.dumps({**record, "sha256": _sha256(record)}) + "\n"
        self._file.write(line.encode())
        self._file.flush()  # to the operating system, where it survives the end of this process

    def close(self) -> None:
        self._file.close()


def _sha256(record: dict) -> str:
    return hashlib.sha256(json.dumps(record, sort_keys=True).encode()).hexdigest()
