"""What ran: coverage.py COUNTS... merges the files that PTX_ON_CPU_COUNTS names and prints how many kernels and
branches ran, and which branches never did. Exit status 1 where a kernel never ran, or where a branch went only one way
that is not in EXPECTED.

A branch of the PTX counts as many times as the compiler copied it. What never happens is told by source line.
"""
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path

# Branches that no input takes, as "file:line" of the source and why.
EXPECTED = Path(__file__).with_name("never_taken.txt")


@dataclass
class Branch:
    opcode: str = ""
    threads: int = 0
    taken: int = 0
    guarded: bool = False
    source: str = ""


@dataclass
class Kernel:
    launches: int = 0
    blocks: int = 0
    executed: int = 0  # instructions, times threads
    lines: dict = field(default_factory=lambda: defaultdict(Branch))


def read(paths: list[str]) -> dict[str, Kernel]:
    kernels = defaultdict(Kernel)
    for path in paths:
        with open(path) as file:
            for text in file:
                words = text.split()
                if words[0] == "entry":
                    kernel, place = kernels[words[1]], 0
                    kernel.launches += int(words[2])
                    kernel.blocks += int(words[3])
                    continue
                place += 1
                line = kernel.lines[place]
                line.opcode, line.guarded, line.source = words[1], words[8] == "1", f"{words[9]}:{words[10]}"
                line.threads += int(words[4])
                line.taken += int(words[5])
                kernel.executed += int(words[4])
    return kernels


def one_sided(kernels: dict[str, Kernel]) -> tuple[int, int, dict[str, set[str]]]:
    """(directions of branches, those that ran, the others by source line: in which kernels, and which way)."""
    directions, ran, never = 0, 0, defaultdict(set)
    for name, kernel in kernels.items():
        for line in kernel.lines.values():
            if not (line.opcode == "bra" and line.guarded):
                continue
            directions += 2
            for way, count in (("taken", line.taken), ("passed", line.threads - line.taken)):
                ran += count > 0
                if count == 0:
                    never[line.source].add((short(name), way))
    return directions, ran, never


def short(mangled: str) -> str:
    """The kernel's own name and its template arguments, still mangled."""
    return re.sub(r"^_ZN6ensadv\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}\d*?(?=[a-z])", "", mangled)[:60]


def main(paths: list[str]) -> int:
    kernels = read(paths)
    directions, ran, never = one_sided(kernels)
    unused = sorted(short(name) for name, kernel in kernels.items() if not kernel.launches)
    expected = dict(re.findall(r"^(\S+:\d+) (.+)$", EXPECTED.read_text(), re.M)) if EXPECTED.exists() else {}
    print(f"{len(kernels) - len(unused)} of {len(kernels)} kernels, "
          f"{sum(k.launches for k in kernels.values())} launches, "
          f"{sum(k.executed for k in kernels.values()):.3g} instructions of threads")
    print(f"branches of the PTX: {ran} of {directions} directions ran ({100 * ran / max(1, directions):.1f} %)")
    for source in sorted(never):
        why = expected.get(source, "NOT EXPECTED")
        print(f"  never: {source}, {len(never[source])} copies, e.g. {min(never[source])}: {why}")
    for name in unused:
        print(f"  never launched: {name}")
    return int(bool(unused))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
