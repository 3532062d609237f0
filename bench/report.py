"""Writes README.md's tables from bench/results/: `python bench/report.py`; `--check` only compares."""
import json
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
RESULTS = ROOT / "bench" / "results"


def load(name: str) -> dict:
    return json.loads((RESULTS / name).read_text())


def table(header: list[str], rows: list[list[str]]) -> str:
    lines = ["| " + " | ".join(header) + " |", "| --- |" + " ---: |" * (len(header) - 1)]
    return "\n".join(lines + ["| " + " | ".join(row) + " |" for row in rows])


def main_job() -> str:
    """Errors of the main job: what `ensadv-fast train` wrote as results.json."""
    result = load("main_job.json")
    names = list(result["models"])
    percent = "{:.1f}".format

    def cell(value: float, spread: float | None) -> str:
        return percent(100 * value) + (f" ± {percent(100 * spread)}" if spread is not None else "")

    def row(label: str, get) -> list[str]:
        cells = []
        for name in names:
            model = result["models"][name]
            cells.append(cell(get(model), get(model["std"]) if "std" in model else None))
        return [label, *cells]

    white = next(iter(result["models"].values()))["white_box"]
    rows = [row("clean", lambda m: m["clean"])]
    rows += [row(f"white-box {a}", lambda m, a=a: m["white_box"][a]) for a in white]
    rows += [row(f"{k} black-box, held-out sources", lambda m, k=k: m[f"{k}_black_box"])
             for k in ("max", "mean", "worst_case")]
    seconds = result["seconds"]["total"]
    return (f"Error in % of all test inputs, eps {result['eps']:g}, dataset {result['dataset']}, mean ± standard "
            f"deviation over seeds; {seconds:.0f} s in all.\n\n" + table(["", *names], rows))


def ops(file: str) -> str:
    """The ImageNet-sized batch in every dtype measured."""
    result = load(file)
    rows = []
    for r in result["rows"]:
        if r["size"] != "imagenet":
            continue
        c = r["contenders"]

        def ms(name: str) -> str:
            return f"{c[name]['ms']:.2f}" if name in c else "–"

        best = c["ours out="]
        against = [f"{c[n]['ms'] / best['ms']:.1f}" if n in c else "–" for n in ("eager", "torch.compile")]
        rows.append([f"{r['case']}, {r['dtype']}, {r['format']}", ms("eager"), ms("torch.compile"), ms("ours"),
                     ms("ours out="), f"{best['gb_per_s']:.1f}", f"{best['of_copy']:.0%}", *against])
    shape = next(r["shape"] for r in result["rows"] if r["size"] == "imagenet")
    head = (f"Batch {'x'.join(map(str, shape))}; milliseconds, medians of interleaved rounds; {result['machine']['cpu']}, "
            f"{result['runtime']['cpu']}; torch {result['runtime']['torch']}; commit {result['commit']}; load average "
            f"{result['load_before'][0]:.1f} before.\n\n")
    return head + table(["op", "eager", "torch.compile", "ours", "ours, out=", "GB/s", "of copy's GB/s",
                         "times eager", "times compile"], rows)


def tested() -> str:
    rows = [[t["torch"], t["python"], t["device"], t["how"], t["result"]] for t in load("tested_versions.json")["runs"]]
    return table(["torch", "Python", "device", "how", "result"], rows)


TABLES = {"main_job": main_job, "ops_cpu": lambda: ops("ops_cpu.json"), "tested": tested}


def rendered(text: str) -> str:
    for name, make in TABLES.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        before, rest = text.split(begin)
        text = before + begin + "\n" + make() + "\n" + end + rest.split(end)[1]
    return text


def main() -> int:
    readme = ROOT / "README.md"
    old = readme.read_text()
    new = rendered(old)
    if "--check" in sys.argv[1:]:
        return int(old != new)
    readme.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
