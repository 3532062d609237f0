"""What ran: coverage.py FLOOR COUNTS... merges the files that PTX_ON_CPU_COUNTS names. It prints how many kernels ran,
how many directions of the PTX's branches, and which never did, by source line. Exit status 1 where a kernel never ran,
or where less than FLOOR percent of the directions did.

The compiler copies a branch into every kernel and every unrolled step that it belongs to, and each copy counts. Some
copies have one way only: the first element of a pack always exists.
"""
import re
import sys
from collections import defaultdict
from dataclasses import dataclass, field


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


def branches(kernels: dict[str, Kernel]) -> tuple[int, int, dict[str, dict[str, set[str]]]]:
    """(directions, those that ran, and by source line and way the kernels with a copy that never went there)."""
    directions, ran, never = 0, 0, defaultdict(lambda: defaultdict(set))
    for name, kernel in kernels.items():
        for line in kernel.lines.values():
            if not (line.opcode == "bra" and line.guarded):
                continue
            directions += 2
            for way, count in (("taken", line.taken), ("passed", line.threads - line.taken)):
                ran += count > 0
                if count == 0:
                    never[line.source][way].add(short(name))
    return directions, ran, never


def short(mangled: str) -> str:
    """The kernel's own name and its template arguments, still mangled."""
    return re.sub(r"^_ZN6ensadv\d+_GLOBAL__N__\w+?_cu_[0-9a-f]{8}\d*?(?=[a-z])", "", mangled)[:60]


def main(floor: float, paths: list[str]) -> int:
    kernels = read(paths)
    directions, ran, never = branches(kernels)
    unused = sorted(short(name) for name, kernel in kernels.items() if not kernel.launches)
    share = 100 * ran / max(1, directions)
    print(f"{len(kernels) - len(unused)} of {len(kernels)} kernels, "
          f"{sum(k.launches for k in kernels.values())} launches, "
          f"{sum(k.executed for k in kernels.values()):.3g} instructions of threads")
    print(f"branches of the PTX: {ran} of {directions} directions ran ({share:.1f} %)")
    for source, ways in sorted(never.items()):
        print(f"  never: {source}: " + ", ".join(f"{way} in {len(k)} kernels, say {min(k)}" for way, k in ways.items()))
    for name in unused:
        print(f"  never launched: {name}")
    return int(bool(unused) or share < floor)


if __name__ == "__main__":
    sys.exit(main(float(sys.argv[1]), sys.argv[2:]))
