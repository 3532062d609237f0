"""Draws the pictures of README.md from bench/results/: `python bench/pictures.py`; `--check` only compares."""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT))
from ensadv_fast.report.figures import ticks  # noqa: E402
from ensadv_fast.report.markup import Markup, tag  # noqa: E402
from ensadv_fast.report.style import MODES, SERIES  # noqa: E402

RESULTS = ROOT / "bench" / "results"
# Contenders by the names of bench/attack_step.py: what the legend calls them.
LIBRARIES = {"torchattacks": "torchattacks", "foolbox": "Foolbox", "cleverhans": "CleverHans", "art": "ART",
             "torchattacks, compiled, bfloat16 autocast, channels_last": "torchattacks, compiled, bfloat16"}
GROUPS = (("resnet50", "fgsm", "FGSM, ResNet-50"), ("resnet50", "pgd", "PGD-10, ResNet-50"),
          ("cifar_resnet18", "fgsm", "FGSM, CIFAR ResNet-18"), ("mnist_a", "pgd", "PGD-10, MNIST A"))
WIDTH, LEFT, RIGHT, BAR, GAP, HEAD, FOOT = 580, 184, 532, 15, 14, 96, 70
LOOKS = (0, 1, 2, 3, 7)  # colours of the series


def look() -> str:
    """The colours of the report pages, on a background of its own, by the reader's preference for light or dark."""
    def variables(mode: str) -> str:
        shown = {k: MODES[mode][k] for k in ("page", "line", "text", "quiet")}
        shown |= {f"s{i}": SERIES[mode][i] for i in LOOKS}
        return ";".join(f"--{name}:{colour}" for name, colour in shown.items())

    return (f"svg{{{variables('light')}}}@media(prefers-color-scheme:dark){{svg{{{variables('dark')}}}}}"
            "text{fill:var(--text);font:13px system-ui,-apple-system,'Segoe UI',Roboto,'Liberation Sans',Arial,"
            "sans-serif}"
            ".title{font-size:16px;font-weight:600}.quiet{fill:var(--quiet);font-size:12px}"
            ".page{fill:var(--page);stroke:var(--line)}.rule{stroke:var(--line)}.ours{stroke:var(--text);stroke-width:1.5}"
            + "".join(f".s{i}{{fill:var(--s{i})}}" for i in LOOKS))


def speedups() -> str:
    """How many times as long each library takes for an attack as ours does, as bars."""
    result = json.loads((RESULTS / "attack_step_cpu.json").read_text())
    rows = {(r["network"], r["attack"]): r for r in result["rows"]}
    groups = []
    for network, attack, words in GROUPS:
        row = rows[network, attack]
        ms = {name: c["ms"] for name, c in row["contenders"].items()}
        groups.append((f"{words}", f"batch {row['shape'][0]}, ours {ms['ours']:.0f} ms",
                       [(i, ms[name] / ms["ours"]) for i, name in enumerate(LIBRARIES) if name in ms]))
    most = max(times for _, _, bars in groups for _, times in bars)
    height = HEAD + sum(len(bars) * BAR + GAP for _, _, bars in groups) + FOOT
    right = RIGHT - 40  # room for the number behind the longest bar

    def at(times: float) -> float:
        return LEFT + times / most * (right - LEFT)

    parts: list[Markup] = [
        tag("style", Markup(look())),
        tag("rect", x=0.5, y=0.5, width=WIDTH - 1, height=height - 1, rx=6, class_="page"),
        tag("text", "Time of the same attack, as a multiple of ours", x=16, y=28, class_="title")]
    x, y = 16.0, 53
    for i, name in enumerate(LIBRARIES.values()):
        if x + 20 + 7.3 * len(name) > WIDTH - 16:
            x, y = 16.0, y + 20
        parts += [tag("rect", x=f"{x:.0f}", y=y - 10, width=11, height=11, class_=f"s{LOOKS[i]}"),
                  tag("text", name, x=f"{x + 16:.0f}", y=y)]
        x += 40 + 7.3 * len(name)
    bottom = height - FOOT
    for times in ticks(0, most, 8):
        parts += [tag("line", x1=f"{at(times):.1f}", x2=f"{at(times):.1f}", y1=HEAD - 6, y2=bottom, class_="rule"),
                  tag("text", f"{times:g}", x=f"{at(times):.1f}", y=bottom + 16, text_anchor="middle", class_="quiet")]
    y = HEAD
    for words, more, bars in groups:
        middle = y + len(bars) * BAR / 2
        parts += [tag("text", words, x=LEFT - 10, y=f"{middle - 1:.0f}", text_anchor="end"),
                  tag("text", more, x=LEFT - 10, y=f"{middle + 15:.0f}", text_anchor="end", class_="quiet")]
        for i, times in bars:
            parts += [tag("rect", x=LEFT, y=y + 1, width=f"{at(times) - LEFT:.1f}", height=BAR - 2,
                          class_=f"s{LOOKS[i]}"),
                      tag("text", f"{times:.1f}", x=f"{at(times) + 5:.1f}", y=y + BAR - 3, class_="quiet")]
            y += BAR
        y += GAP
    parts += [tag("line", x1=f"{at(1):.1f}", x2=f"{at(1):.1f}", y1=HEAD - 6, y2=bottom + 3, class_="ours"),
              tag("text", "ours", x=f"{at(1):.1f}", y=bottom + 16, text_anchor="middle"),
              tag("text", f"{result['machine']['cpu']}, {result['threads']} threads, "
                  f"torch {result['runtime']['torch']}.", x=16, y=height - 28, class_="quiet"),
              tag("text", f"Ours computes in {result['runtime']['auto dtype on the CPU']} (its default here), "
                  "the libraries in float32. No bar: not timed.", x=16, y=height - 12, class_="quiet")]
    return tag("svg", parts, xmlns="http://www.w3.org/2000/svg", viewBox=f"0 0 {WIDTH} {height}",
               width=WIDTH, height=height, role="img",
               aria_label="Time of the same attack in each library, as a multiple of ours") + "\n"


PICTURES = {ROOT / "docs" / "pictures" / "speedups.svg": speedups}


def main() -> int:
    changed = False
    for path, make in PICTURES.items():
        old, new = path.read_text() if path.exists() else "", make()
        changed |= old != new
        if "--check" not in sys.argv[1:]:
            path.parent.mkdir(exist_ok=True)
            path.write_text(new)
    return int(changed and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
