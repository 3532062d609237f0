"""What the extension costs before it runs: `python bench/build.py` writes bench/results/build.json.

A clean build in a folder of its own, two jobs: seconds on the clock and of the processors, the size of what comes out,
and by `ptxas -v` the registers, shared memory and spills of every kernel. And what `import ensadv_fast` adds to
`import torch`, by alternating fresh interpreters.
"""
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from pathlib import Path

from ensadv_fast.bench.stamp import stamp

ROOT = Path(__file__).parent.parent
JOBS = 2
FIELDS = ("kernels", "registers", "shared", "spilled")
USED = re.compile(r"Compiling entry function '(\w+)' for '(sm_\d+)'\n.*\n"
                  r"\s*\d+ bytes stack frame, (\d+) bytes spill stores.*\n.*Used (\d+) registers(.*)")


def kernels(log: str) -> dict[str, dict[str, dict[str, int]]]:
    """From what ptxas -v says: by op and architecture the number of kernels, and the most that any of them takes."""
    found: dict = defaultdict(lambda: defaultdict(lambda: dict.fromkeys(FIELDS, 0)))
    for name, arch, spilled, registers, rest in USED.findall(log):
        file, kernel = re.search(r"_\d+_([a-z]\w*?)_cu_[0-9a-f]{8}\d+(\w+?)_kernel", name).groups()
        shared = re.search(r"(\d+) bytes smem", rest)
        entry = found[file if kernel == file else f"{file}: {kernel}"][arch]
        entry["kernels"] += 1
        for key, value in (("registers", registers), ("shared", shared[1] if shared else 0), ("spilled", spilled)):
            entry[key] = max(entry[key], int(value))
    return {op: dict(sorted(archs.items())) for op, archs in sorted(found.items())}


def build() -> dict:
    with tempfile.TemporaryDirectory() as folder:
        env = os.environ | {"MAX_JOBS": str(JOBS), "NVCC_APPEND_FLAGS": "-Xptxas=-v"}
        before, start = resource.getrusage(resource.RUSAGE_CHILDREN), time.perf_counter()
        done = subprocess.run([sys.executable, "setup.py", "build_ext", "--build-temp", f"{folder}/temp", "--build-lib",
                               f"{folder}/lib"], cwd=ROOT, env=env, capture_output=True, text=True)
        wall, after = time.perf_counter() - start, resource.getrusage(resource.RUSAGE_CHILDREN)
        if done.returncode:
            raise RuntimeError(f"the build failed:\n{done.stdout}{done.stderr}")
        (made,) = Path(folder).glob("lib/**/*.so")
        cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
        return {"jobs": JOBS, "wall_s": wall, "cpu_s": cpu, "bytes": made.stat().st_size,
                "kernels": kernels(done.stdout + done.stderr)}


def import_seconds(rounds: int = 7) -> dict[str, float]:
    """Median seconds inside the interpreter."""
    code = ("import time; a = time.perf_counter(); import torch; b = time.perf_counter(); import ensadv_fast;"
            "print(b - a, time.perf_counter() - b)")
    taken = [tuple(map(float, subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True,
                                             check=True).stdout.split())) for _ in range(rounds)]
    return {"torch_s": statistics.median(t for t, _ in taken), "ensadv_fast_s": statistics.median(e for _, e in taken)}


def main() -> int:
    result = {**stamp(), "import": import_seconds(), "compiled": build(), "load_after": os.getloadavg()}
    (ROOT / "bench/results/build.json").write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
