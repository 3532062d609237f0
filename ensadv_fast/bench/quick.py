"""`ensadv-fast bench`: every op beside what one would write without it, verified, then timed, in one run.

Contenders of each case: the eager expression as users write it (`eager.py`), the same under torch.compile, and ours,
allocating and with `out=`; beside them a plain copy as the machine does it. Rounds interleave the contenders, so that
whatever disturbs one disturbs all; medians and quartiles are reported. On a GPU everything is timed twice: by calls,
and by replaying a CUDA graph over buffers that do not fit into the L2 cache. bench/ holds the long form of the same.
"""
import json
import os
from collections.abc import Sequence

import torch

from ..ops.cases import CASES
from .contenders import (
    DTYPES,
    FORMATS,
    GPU_SIZES,
    SIZES,
    YARDSTICKS,
    Setting,
    binders,
    copy_arguments,
    first,
    rate,
    streamed_bytes,
    verify,
)
from .stamp import stamp
from .timing import Timing, cache_bytes, sets_to_rotate, time_calls, time_replay


def settings(device: str = "cpu", sizes: list[str] | None = None, dtypes: list[str] | None = None,
             cases: list[str] | None = None) -> list[Setting]:
    """The settings that mean something, all of them or those asked for; `cases` are prefixes of names."""
    grid = [Setting(case, size, dtype, fmt, device) for size in sizes or (GPU_SIZES if device == "cuda" else SIZES)
            for dtype in dtypes or DTYPES for case in CASES for fmt in FORMATS
            if not cases or any(case.name.startswith(c) for c in cases)]
    return [s for s in grid if s.exists()]


def run(grid: list[Setting], seconds: float = 0.3, compiled: Sequence[str] = ("float32",)) -> dict:
    """Measure and return the stamped results; a row with a wrong contender is left out and named under "wrong".

    compiled: the dtypes in which torch.compile competes; compiling takes most of a run's time.
    """
    result = {**stamp(), "device": grid[0].device, "threads": torch.get_num_threads(), "rows": [], "wrong": []}
    for setting in grid:
        try:
            row = _row(setting, seconds, setting.dtype in compiled)
        except AssertionError as error:
            result["wrong"].append(f"{setting.name}: {error}")
            continue
        result["rows"].append(row)
        print(_line(row), flush=True)
    result["load_after"] = os.getloadavg()
    return result


def _row(setting: Setting, seconds: float, compiled: bool) -> dict:
    case = setting.case
    args, kw = setting.arguments()
    torch._dynamo.reset()  # otherwise the compiler soon reaches its limit of specialisations
    known = binders(case, compiled)
    calls = {name: bind(args, kw) for name, bind in known.items()}
    wanted = case.reference(*args, **kw)
    verify(setting, args, kw, calls, wanted)
    elements, moved = first(wanted).numel(), streamed_bytes(setting, args, kw, wanted)
    copy_bytes = 2 * elements * first(wanted).element_size()
    cells = _cells(time_calls(calls, seconds, setting.device), moved, copy_bytes)
    row = {"case": case.name, "size": setting.size, "shape": list(setting.shape), "dtype": setting.dtype,
           "format": setting.format, "elements": elements, "bytes": moved, "contenders": cells}
    if setting.device == "cuda":
        sets = [copy_arguments(args, kw) for _ in range(sets_to_rotate(moved or copy_bytes, cache_bytes()))]
        timings, missing = time_replay({n: [bind(*one) for one in sets] for n, bind in known.items()}, seconds)
        row.update(graph=_cells(timings, moved, copy_bytes), graph_sets=len(sets), graph_missing=missing)
    return row


def _cells(timings: dict[str, Timing], moved: int | None, copy_bytes: int) -> dict[str, dict]:
    return {name: {"ms": t.median, "quartiles": t.quartiles, "best": t.best,
                   **rate(name, t.median, moved, copy_bytes, timings["copy"].median)} for name, t in timings.items()}


def _line(row: dict) -> str:
    cells = [f"{name} {c['ms']:.4g} ms" + (f" ({c['of_copy']:.0%} of copy)" if "of_copy" in c else "")
             for name, c in row["contenders"].items() if name not in YARDSTICKS]
    missing = [f"no graph of {name}: {why}" for name, why in row.get("graph_missing", {}).items()]
    return f"{row['case']} {row['size']} {row['dtype']} {row['format']}: " + ", ".join(cells + missing)


def to_json(result: dict) -> str:
    """JSON with one row on a line, so that differences between two results can be read."""
    head = json.dumps({**result, "rows": None}, indent=1)
    rows = ",\n".join(f"  {json.dumps(row)}" for row in result["rows"])
    return head.replace('"rows": null', f'"rows": [\n{rows}\n ]') + "\n"


def regressions(old: dict, new: dict, limit: float) -> list[str]:
    """Rows of `new` whose time, in units of the copy of its own run, exceeds that of `old` by more than `limit`."""
    def ratios(result: dict) -> dict:
        return {(r["case"], r["size"], r["dtype"], r["format"], how, name): c["ms"] / r[how]["copy"]["ms"]
                for r in result["rows"] for how in ("contenders", "graph")
                for name, c in r.get(how, {}).items() if name.startswith("ours")}

    before, after = ratios(old), ratios(new)
    return [f"{' '.join(k)}: {after[k] / before[k]:.2f} times the old time, copies counted out"
            for k in sorted(before.keys() & after.keys()) if after[k] > limit * before[k]]

