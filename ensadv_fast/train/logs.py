"""Where the log lines of training go: metrics.jsonl, TensorBoard where it is asked for, and the progress bar."""
from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tqdm import tqdm

from .meter import SPANS, eta

METRICS = "metrics.jsonl"
NONFINITE = "nonfinite.jsonl"  # a line for each look that found steps with bad gradients
TENSORBOARD = "tensorboard"


def append(path: Path, record: Mapping[str, Any]) -> None:
    """One line of strict JSON at the end of the file, in one write: lines of other processes stay whole. ValueError,
    and nothing written, for NaN and infinities."""
    line = json.dumps(record, allow_nan=False) + "\n"
    with open(path, "ab", buffering=0) as f:
        f.write(line.encode())


class Log:
    """The log lines of one job in a run folder, which is made where it is missing; one rank writes them.

    tensorboard: also write every number of a line to FOLDER/tensorboard/JOB, a curve for each key. step: where
    training goes on. What was written of later steps, before an interruption, TensorBoard then hides, so that no curve
    doubles back.
    Raises ImportError where TensorBoard is asked for and missing.
    """

    def __init__(self, folder: str | Path, job: str, *, tensorboard: bool = False, step: int = 0) -> None:
        folder = Path(folder)
        self._writer = _summary_writer(folder / TENSORBOARD / job, step) if tensorboard else None
        folder.mkdir(parents=True, exist_ok=True)
        self.path, self.job = folder / METRICS, job

    def __call__(self, record: Mapping[str, Any]) -> None:
        """Write a line that has a "step". Its numbers, also those of mappings within, are the curves."""
        append(self.path, {"job": self.job, **record})
        if self._writer is not None:
            for tag, value in numbers(record).items():
                self._writer.add_scalar(tag, value, record["step"])
            self._writer.flush()  # after a kill, TensorBoard knows all that metrics.jsonl does

    def close(self) -> None:
        """Close TensorBoard's files; nothing must be written after."""
        if self._writer is not None:
            self._writer.close()
            self._writer = None

    def __enter__(self) -> Log:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _summary_writer(folder: Path, step: int) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError as e:
        raise ImportError("train: TensorBoard is asked for, but the package tensorboard is missing: "
                          "pip install 'ensadv-fast[tensorboard]'") from e
    return SummaryWriter(folder, purge_step=step + 1)


def numbers(record: Mapping[str, Any], before: str = "") -> dict[str, float]:
    """The numbers of a line by their names, "monitor/alignment" for those of a mapping within; True is 1.

    The step, None and words are left out.
    """
    found: dict[str, float] = {}
    for key, value in record.items():
        if isinstance(value, Mapping):
            found |= numbers(value, f"{before}{key}/")
        elif isinstance(value, int | float) and key != "step":
            found[before + key] = value
    return found


def progress(record: Mapping[str, Any], left: int) -> str:
    """A line in few words, for a progress bar (`tqdm.set_postfix_str`) or a log without a terminal. left: images still
    to come. "loss 0.693, 812 images/s, 12:33 left, data 3 % attack 21 % train 70 %"; what is not known is left out."""
    told = [f"{name} {record[key]:.3f}" for key, name in (("clean_loss", "loss"), ("adv_loss", "adversarial"))
            if record.get(key) is not None]
    if record.get("finite") is False:
        told.insert(0, "NOT FINITE")
    if rate := record.get("images_per_second"):
        told += [f"{rate:.3g} images/s" if rate < 100 else f"{rate:,.0f} images/s",
                 f"{tqdm.format_interval(eta(left, rate))} left"]
    shares = [f"{name} {100 * record[f'share_{name}']:.0f} %" for name in SPANS
              if record.get(f"share_{name}") is not None]
    return ", ".join([*told, *([" ".join(shares)] if shares else [])])
