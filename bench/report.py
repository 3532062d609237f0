"""Writes the tables of README.md and docs/: `python bench/report.py`; `--check` only compares. Numbers come from
bench/results/, options of commands from their parsers."""
import json
import statistics
import sys
import textwrap
from collections.abc import Callable
from functools import partial
from pathlib import Path

ROOT = Path(__file__).parent.parent
sys.path.append(str(ROOT / "bench"))
from papers import show  # noqa: E402

RESULTS = ROOT / "bench" / "results"
NONE = "-"


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


def headline() -> str:
    """FGSM on ResNet-50 beside the libraries, in a sentence."""
    result = load("attack_step_cpu.json")
    row = next(r for r in result["rows"] if (r["network"], r["attack"]) == ("resnet50", "fgsm"))
    ms = {name: c["ms"] for name, c in row["contenders"].items()}
    times = {name: f"{ms[name] / ms['ours']:.1f}" for name in ms}
    return textwrap.fill(
        f"FGSM on ResNet-50, batch {row['shape'][0]}, takes {ms['ours']:.0f} ms on {result['threads']} CPU threads "
        f"({result['machine']['cpu']}). torchattacks takes {times['torchattacks']} times as long, Foolbox "
        f"{times['foolbox']}, CleverHans {times['cleverhans']} and ART {times['art']} times. torchattacks on a frozen, "
        f"compiled, channels_last model in bfloat16 takes {times[COMPILED]} times as long. Ours computes in "
        f"{result['runtime']['auto dtype on the CPU']} by default there, and raises the loss by "
        f"{row['contenders']['ours']['loss_increase']:.3f} of what plain float32 reaches; in float32 torchattacks "
        f"takes {ms['torchattacks'] / ms['ours, float32 source']:.1f} times as long as ours.", 120)


def options(command: str) -> str:
    """The options of a command, from its parser."""
    sys.path.append(str(ROOT))
    from ensadv_fast.cli import make_parser

    (commands,) = (a for a in make_parser(command)._actions if isinstance(a.choices, dict))
    parser = commands.choices[command]
    formatter, rows = parser._get_formatter(), []
    for action in parser._actions[1:]:  # the first is --help
        value = action.metavar or ", ".join(map(str, action.choices or (action.dest.upper(),)))
        value = "" if action.nargs == 0 else f"{value} ..." if action.nargs in ("*", "+") else value
        flags = ", ".join(action.option_strings)
        cells = [f"`{f'{flags} {value}'.strip()}`", formatter._expand_help(action) if action.help else ""]
        rows.append([cells[0].replace("|", " or "), cells[1].replace("|", "\\|")])
    return "\n".join(["| option | meaning |", "| --- | --- |", *(f"| {a} | {b} |" for a, b in rows)])


def conditions(stamp: dict) -> str:
    """Where, from what and how undisturbed the numbers are."""
    before, after = (stamp[f"load_{when}"][0] for when in ("before", "after"))
    commits = dict.fromkeys([stamp["commit"], *(r.get("commit", stamp["commit"]) for r in stamp.get("rows", ()))])
    return (f"{stamp['machine']['cpu']}, {stamp['runtime']['cpu'].split(' threads')[0]} threads; "
            f"torch {stamp['runtime']['torch']}; commit{'s' * (len(commits) > 1)} {', '.join(commits)}; load "
            f"average {before:.1f} before, {after:.1f} after.")


class Ops:
    """The results of `ensadv-fast bench`, cell by cell; on a GPU those of graph replay."""

    def __init__(self, file: str):
        self.result = load(file)
        self.how = "graph" if self.result["device"] == "cuda" else "contenders"
        self.rows = {(r["case"], r["size"], r["dtype"], r["format"]): r for r in self.result["rows"]}
        self.cases = list(dict.fromkeys(r["case"] for r in self.result["rows"]))

    def cell(self, case: str, name: str, size: str = "imagenet", dtype: str = "float32", fmt: str = "contiguous",
             how: str | None = None) -> dict:
        """{} where this was not measured."""
        return self.rows.get((case, size, dtype, fmt), {}).get(how or self.how, {}).get(name, {})

    def ours(self, case: str, **where) -> dict:
        return self.cell(case, "ours out=", **where) or self.cell(case, "ours", **where)


def over(a: float | None, b: float | None, form: str) -> str:
    return NONE if not a or not b else form.format(a / b)


def targets(file: str) -> str:
    """What the kernels are meant to reach, in units measured in the same run."""
    ops = Ops(file)
    lines = []
    for label, case, yardstick, dtype in (
            ("`sign_step(out=)`, GB/s over those of `torch.add(x, grad, out=o)`", "sign_step-free", "torch.add out=",
             "float32"),
            ("`random_step` rademacher, GB/s over those of a copy", "random_step-rademacher", "copy", "float32"),
            ("`model_entry` uint8 to bfloat16 channels_last, GB/s over those of a copy", "model_entry-bfloat16", "copy",
             "uint8")):
        rates = []
        for fmt in ("contiguous", "channels_last"):
            where = {"dtype": dtype, "fmt": fmt}
            rates.append(over(ops.ours(case, **where).get("gb_per_s"),
                              ops.cell(case, yardstick, **where).get("gb_per_s"), "{:.0%}"))
        lines.append([label, *rates])
    return table(["", "contiguous input", "channels_last input"], lines)


def per_op(file: str) -> str:
    """Every case on the ImageNet-sized batch."""
    ops, rows = Ops(file), []
    for case in ops.cases:
        if not ops.ours(case):
            continue
        ms = ops.ours(case)["ms"]
        eager, compiled = (ops.cell(case, name).get("ms") for name in ("eager", "torch.compile"))
        rows.append([
            case, *(over(v, 1, "{:.3g}") for v in (eager, compiled, ms)),
            over(ops.ours(case).get("of_copy"), 1, "{:.0%}"),
            over(ops.ours(case, fmt="channels_last").get("of_copy"), 1, "{:.0%}"),
            over(eager, ms, "{:.1f}"), over(compiled, ms, "{:.1f}"),
            *(over(ms, ops.ours(case, dtype=dtype).get("ms"), "{:.2f}") for dtype in ("bfloat16", "float16")),
            over(ops.ours(case, size="tiny", how="contenders").get("ms"), 1e-3, "{:.1f}")])
    shapes = dict.fromkeys("x".join(map(str, r["shape"])) for r in ops.result["rows"] if r["size"] == "imagenet")
    return (f"Batches {', '.join(shapes)}, float32; medians in ms; {conditions(ops.result)}\n\n" + table(
        ["op", "eager", "torch.compile", "ours", "of copy's GB/s", "the same, channels_last", "times eager",
         "times compile", "bfloat16 elements/s", "float16 elements/s", "us on 16 elements"], rows))


def peers(file: str) -> str:
    """The peers' own code, from the JSON that pytest-benchmark wrote of bench/test_ops.py."""
    result = load(file)
    groups: dict[str, dict[str, float]] = {}
    for b in result["benchmarks"]:
        e = b["extra_info"]
        words = [e["case"], e["size"], e["dtype"], e["format"], *(["graph replay"] if e["method"] == "graph" else [])]
        groups.setdefault(", ".join(words), {})[e["contender"]] = e["ms"]
    own = ("copy", "torch.add out=", "eager", "torch.compile", "ours", "ours out=", STUB)
    rows = []
    for words, ms in groups.items():
        best = ms.get("ours out=", ms.get("ours"))
        for name in [n for n in ms if n not in own]:
            stub = ms.get(STUB) if name in ON_STUB else None
            less = over(ms[name] - (stub or 0), best, "{:.1f}") if stub else NONE
            rows.append([words, name, f"{ms[name]:.3g}", over(best, 1, "{:.3g}"),
                         over(ms[name], best, "{:.1f}"), less])
    return conditions(result["stamp"]) + "\n\n" + table(
        ["op", "peer", "ms", "ours", "times ours", "times ours, stub subtracted"], rows)


COMPILED = "torchattacks, compiled, bfloat16 autocast, channels_last"
F32, EXACT, NO_GRAPH = "ours, float32 source", "ours, exact source", "ours, no graph"
# (network, attack, ours, whose time is divided by ours, at least)
ATTACK_TARGETS = (
    ("resnet50", "fgsm", "ours", "torchattacks", 2.5), ("resnet50", "fgsm", F32, "torchattacks", 1.25),
    ("resnet50", "fgsm", EXACT, "torchattacks", 1.0), ("resnet50", "fgsm", "ours", COMPILED, 1.1),
    ("mnist_a", "fgsm", "ours", "torchattacks", 2.0), ("mnist_a", "pgd", "ours", "torchattacks", 2.0),
)


def attack_step(file: str) -> str:
    """Whole attacks, from the JSON of bench/attack_step.py: how many times faster than each contender ours is."""
    result = load(file)
    cells = {(r["network"], r["attack"]): r["contenders"] for r in result["rows"]}
    graphs = any(NO_GRAPH in row for row in cells.values())

    def times(row: dict, name: str, mine: str = "ours") -> str:
        return over(row.get(name, {}).get("ms"), row.get(mine, {}).get("ms"), "{:.2f}")

    goals = [[f"{attack} on {network}: {mine} over {name}", f"{least:g}",
              times(cells.get((network, attack), {}), name, mine)]
             for network, attack, mine, name, least in ATTACK_TARGETS]
    rows = []
    for r in result["rows"]:
        c = r["contenders"]
        size = "x".join(map(str, r["shape"]))
        rows.append([f"{r['network']} {r['attack']}, {size}", *(over(c.get(n, {}).get("ms"), 1, "{:.4g}")
                                                                for n in ("torchattacks", "ours")),
                     *(times(c, n) for n in ("torchattacks", "foolbox", "cleverhans", "art", COMPILED)),
                     times(c, "torchattacks", F32), times(c, "torchattacks", EXACT),
                     over(c.get("ours", {}).get("loss_increase"), 1, "{:.3f}"),
                     *([times(c, NO_GRAPH)] if graphs else [])])
    return conditions(result) + "\n\n" + table(["times faster", "wanted", "measured"], goals) + "\n\n" + table(
        ["network, attack, batch", "torchattacks, ms", "ours, ms", "times faster than torchattacks", "foolbox",
         "cleverhans", "art", "compiled bfloat16 torchattacks", "ours in float32 over torchattacks",
         "ours exact over torchattacks", "loss increase over float32's", *(["ours without graphs"] if graphs else [])],
        rows)


def compat(file: str) -> str:
    """The drop-in backends beside their libraries, from the JSON of bench/compat.py; then the calls of one image."""
    result = load(file)
    rows, tiny = [], []
    for r in result["rows"]:
        theirs, exact, fast = (r["contenders"].get(n, {}) for n in ("theirs", "ours, exact", "ours, fast"))
        size = "x".join(map(str, r["shape"]))
        times = [over(theirs.get("ms"), c.get("ms"), "{:.2f}") for c in (exact, fast)]
        if r["shape"][0] == 1:
            tiny.append([f"{r['library']}, {size}", *(over(1e3, c.get("ms"), "{:.0f}") for c in (theirs, exact, fast)),
                         *times])
            continue
        rows.append([f"{r['library']} {r['attack']}, {r['network']}, {size}", over(theirs.get("ms"), 1, "{:.4g}"),
                     *times, over(exact.get("equal_pixels"), 1, "{:.2%}"), over(fast.get("loss_increase"), 1, "{:.3f}"),
                     over(theirs.get("bytes"), 1e6, "{:.1f}"),
                     *(over(c.get("bytes"), theirs.get("bytes"), "{:.2f}") for c in (exact, fast))])
    tables = [table(["library, attack, network, batch", "theirs, ms", "exact, times faster", "fast, times faster",
                     "exact: pixels equal theirs", "fast: loss increase over theirs", "theirs, MB", "exact, of that",
                     "fast, of that"], rows)] if rows else []
    tables += [table(["FGSM, one image", "theirs, calls/s", "exact", "fast", "exact, times faster",
                      "fast, times faster"], tiny)] if tiny else []
    missing = f" Not measured: {'; '.join(result['missing'])}." if result["missing"] else ""
    return "\n\n".join([conditions(result) + missing, *tables])


def train_step(file: str) -> str:
    """Training steps, from the JSON of bench/train_step.py, over the clean float32 step."""
    result = load(file)
    rows = []
    for r in result["rows"]:
        clean = r["contenders"]["clean"]
        rows += [[f"{r['network']} {name}, {'x'.join(map(str, r['shape']))}", f"{c['ms']:.4g}",
                  *(over(c[key], clean[key], "{:.3f}") for key in ("ms", "step_bytes", "peak_bytes"))]
                 for name, c in r["contenders"].items()]
    return (conditions(result) + " Wanted of EAT: at most 1.20 of the clean step's time and 1.10 of its memory.\n\n"
            + table(["network, step, batch", "ms", "of clean", "memory of a step, of clean",
                     "with all weights and optimizer state, of clean"], rows))


def ensemble_linear(file: str) -> str:
    """How the op, and its kernel alone, compare with what users write, over all shapes."""
    result, rows = load(file), []
    for direction, dtype in dict.fromkeys((r["direction"], r["dtype"]) for r in result["rows"]):
        some = [r for r in result["rows"] if (r["direction"], r["dtype"]) == (direction, dtype)]
        members = ", ".join(str(k) for k in sorted({r["members"] for r in some}))
        cells = [f"{direction}, {dtype}, K {members}", str(len(some)), f"{max(r['errors']['op'] for r in some):.2f}"]
        for name, limits in (("op", (1.0, 0.95, 0.9)), ("ours", (0.9,))):
            # where the kernel was not timed beside the op, the op is the kernel
            over = sorted(r["ms"]["users"] / r["ms"].get(name, r["ms"]["op"]) for r in some)
            cells.append(f"{statistics.median(over):.2f} ({over[0]:.2f}-{over[-1]:.2f})")
            cells += [str(sum(v < limit for v in over)) for limit in limits]
        rows.append(cells)
    return conditions(result) + "\n\n" + table(
        ["", "shapes", "largest error, times users'", "op: times as fast as users' code", "below 1", "below 0.95",
         "below 0.90", "our kernel alone", "below 0.90"], rows)


STUB = "torchattacks stub alone"
ON_STUB = ("torchattacks FGSM", "torchattacks PGD", "torchattacks MIFGSM", "torchattacks PGDL2")


def build() -> str:
    """The clean build, the import, and what ptxas made of the kernels."""
    result = load("build.json")
    made = result["compiled"]
    archs = sorted({arch for entry in made["kernels"].values() for arch in entry})
    rows = [[op, *(str(entry[arch][f]) for arch in archs for f in ("registers", "shared", "spilled"))]
            for op, entry in made["kernels"].items()]
    head = (f"A clean build with {made['jobs']} jobs takes {made['wall_s']:.0f} s ({made['cpu_s']:.0f} s of processor "
            f"time) and gives one file of {made['bytes'] / 1e6:.1f} MB for {result['build']['cuda_archs']}; `import "
            f"ensadv_fast` adds {1e3 * result['import']['ensadv_fast_s']:.0f} ms to torch's "
            f"{result['import']['torch_s']:.2f} s. The most that any kernel of an op takes, by ptxas:\n\n")
    counts = ("registers", "shared bytes", "spilled")
    return head + table(["op", *(f"{arch} {what}" for arch in archs for what in counts)], rows)


def kept(file: str) -> str:
    """What sources keep for the backward pass, from the JSON of bench/kept.py."""
    rows = []
    for r in load(file)["rows"]:
        sizes = r["bytes_per_image"]
        rows.append([f"{r['network']}, {r['shape'][-1]} px", *(f"{sizes[k] / 1e6:.1f}" for k in sizes),
                     *(f"{sizes['plain'] / sizes[k]:.0f}" for k in ("float32", "bfloat16"))])
    return table(["MB an image", "plain module, float32", "`Source`, float32", "`Source`, bfloat16",
                  "times less, float32", "times less, bfloat16"], rows)


def large(file: str) -> str:
    """The run that is killed and resumed, from the JSON of bench/large.py."""
    r = load(file)
    last, same = r["last_line"], all(r["same"].values())
    rows = [[name, str(run["status"]), str(run["checkpoint"] or NONE), f"{run['seconds']}"]
            for name, run in r["runs"].items()]
    return (f"{r['model']} on static {', '.join(r['static'])} and itself, {r['steps']} steps of 128 images by "
            f"{r['ranks']} processes: weights, optimizer, adversary, sampler and generators of the two runs are "
            f"{'the same, bit for bit' if same else 'NOT THE SAME'}. At the end of the unbroken run: accuracy "
            f"{last['clean_accuracy']:.2f} on clean and {last['adv_accuracy']:.2f} on adversarial training images, "
            f"{last['images_per_second']:.0f} images/s, {last['share_attack']:.0%} of the time crafting, "
            f"{last['share_data']:.1%} waiting for data. {conditions(r)}\n\n"
            + table(["run", "exit status", "last checkpoint's step", "seconds"], rows))


def reading(file: str) -> str:
    """Images a second from files, from the JSON of bench/input.py."""
    r = load(file)
    rate = {(row["contender"], row["workers"]): row["images_per_second"] for row in r["rows"]}
    names = list(dict.fromkeys(row["contender"] for row in r["rows"]))
    rows = [[str(w), *(f"{rate[n, w]:.0f}" for n in names)] for w in dict.fromkeys(row["workers"] for row in r["rows"])]
    return (f"{r['images']:,} JPEGs of about {r['size']} pixels, batch {r['batch']}; the crop, the mirror and the "
            f"floats of ours are made on the device ({r['device']}), which alone does "
            f"{r['device_part_images_per_second']:.0f} images/s. {conditions(r)}\n\n"
            + table(["processes", *(f"{n}, images/s" for n in names)], rows))


def scale(file: str) -> str:
    """EAT on many GPUs by the cost model of bench/scale.py, what a GPU holds, and how the model was checked."""
    result = load(file)
    rows, memory = [], []
    for r in result["predicted"]:
        steps = {int(w): s for w, s in r["steps"].items()}
        rows.append([r["preset"], str(r["batch"]), f"{r['gradient_bytes'] / 1e6:.1f}", f"{r['over_clean']:.2f}",
                     *(f"{steps[w]['images_per_second']:,.0f}" for w in sorted(steps)),
                     f"{steps[512]['images_per_second'] / (512 * steps[1]['images_per_second']):.0%}",
                     "loaders" if steps[1]["data"] == steps[1]["seconds"] else "computing"])
        m = result["memory"][r["preset"]]
        memory.append([r["preset"], *(f"{m[k] / 1e6:,.0f}" for k in (
            "weights", "gradients", "buckets", "optimizer", "static_weights", "images", "kept_by_training",
            "kept_by_crafting", "peak")), f"{m['kept_per_trained_image'] / 1e6:.1f}"])
    a = result["assumed"]
    given = [r["preset"] for r in result["predicted"] if r["costs_are"] == "measured"]
    head = (f"Predicted, not measured. Assumed of a GPU: {a['tflops_float32']:g} (float32) and "
            f"{a['tflops_bfloat16']:g} (bfloat16) sustained TFLOP/s, {a['memory_tb']:g} TB/s for the optimizer, "
            f"{a['loaders']} loaders of {a['loader']:g} images/s; of the links: {a['inside_gb']:g} GB/s and "
            f"{a['inside_us']:g} us in a node of {a['per_node']}, {a['between_gb']:g} GB/s and {a['between_us']:g} us "
            "between nodes. " + (f"Measured, and given: seconds of images of {', '.join(given)}. " if given else "")
            + f"Images a second of all GPUs; commit {result['commit']}.")
    head_2 = ("MB that a step holds on one GPU, counted on the CPU (`bench/scale_memory.py` says what is left out); "
              "static sources in bfloat16; the larger of what training and crafting keep counts in the sum:")
    return "\n\n".join([head, table(
        ["preset", "images a GPU", "gradients, MB", "EAT over clean training, time", "1 GPU", "8 GPUs", "64 GPUs",
         "512 GPUs", "efficiency of 512", "bound by"], rows), head_2, table(
        ["preset", "weights", "gradients", "buckets", "optimizer", "static sources", "images", "kept by training",
         "kept by crafting", "in all", "kept of an image"], memory), *scale_checks(result)])


def scale_checks(result: dict) -> list[str]:
    """What the model says against what was measured."""
    def row(what: str, form: str, predicted: float, measured: float, unit: float = 1.0) -> list[str]:
        off = round(predicted / measured - 1, 3) or 0.0  # no minus before a zero
        return [what, form.format(predicted / unit), form.format(measured / unit), f"{off:+.1%}"]

    rows = [row(f"{r['network']}: step of EAT with {r['static']} static, ms", "{:.1f}", r["predicted_ms"],
                r["measured_ms"]) for r in result["sources_check"]]
    rows += [row(f"{r['network']}, batch {r['batch']}: memory of a clean step, MB", "{:.1f}", r["estimated_bytes"],
                 r["measured_bytes"], 1e6) for r in result["memory_check"]]
    words = ("The model against measurements on the CPU. Steps of EAT from a clean step, FGSM-AT and one static source "
             "alone (`bench/results/train_step_cpu.json`); memory against the allocator's record")
    t = result["timings"]
    if t is None:
        return [words + ":", table(["", "predicted", "measured", "off by"], rows)]
    rows += [row(f"{t['network']}, EAT under {r['world']} gloo processes, ms a step", "{:.1f}", r["predicted_s"],
                 r["measured_s"], 1e-3) for r in t["eat"]]
    errors = "; ".join(f"{w} processes: median {e['median']:.0%}, most {e['most']:.0%}" for w, e in t["errors"].items())
    return [words + f"; gloo processes on {t['cores']} cores from what the parts cost one process, how much clean "
            "training of as many processes that do not communicate is slower than that of one, a link fitted to "
            f"every other size of all-reduces of two processes ({1e3 * t['latency_s']:.2f} ms, "
            f"{t['bandwidth'] / 1e9:.2f} GB/s) and the wait of crowded ones ({1e3 * t['wait_s']:.2f} ms). The other "
            f"all-reduces, 1 KiB to 64 MiB, are off by: {errors}. {conditions(result)}",
            table(["", "predicted", "measured", "off by"], rows)]


def tested() -> str:
    rows = [[t["torch"], t["python"], t["device"], t["how"], t["result"]] for t in load("tested_versions.json")["runs"]]
    return table(["torch", "Python", "device", "how", "result"], rows)


# For each document, by the name of a table's marks: the file it comes from (None: none), and what makes it.
Tables = dict[str, tuple[str | None, Callable[[], str]]]
README: Tables = {"headline": ("attack_step_cpu.json", headline), "main_job": ("main_job.json", main_job)}
ONCE = {"kept_cpu": ("kept_cpu.json", partial(kept, "kept_cpu.json")),
        "scale": ("scale.json", partial(scale, "scale.json")),
        "papers": ("papers_a.json", lambda: show.verdicts([load(f"papers_{t}.json") for t in "abcdefgh"])),
        "build": ("build.json", build), "tested": ("tested_versions.json", tested)}
PLACES = {"targets": ("ops", targets), "ops": ("ops", per_op), "peers": ("peers", peers),
          "attack_step": ("attack_step", attack_step), "compat": ("compat", compat),
          "train_step": ("train_step", train_step), "large": ("large", large), "input": ("input", reading)}
DETAILS: Tables = {
    "main_job": ("main_job.json", main_job),
    **{f"{name}_{on}": (f"{file}_{on}.json", partial(make, f"{file}_{on}.json"))
       for name, (file, make) in PLACES.items() for on in ("cpu", "gpu")},
    **{f"ensemble_linear_{on}": (f"ensemble_linear_{on}.json", partial(ensemble_linear, f"ensemble_linear_{on}.json"))
       for on in ("cpu", "cuda")},
    **ONCE,
}
PAPERS: Tables = {f"{part}_{t}": (f"papers_{t}.json", lambda t=t, make=make: make(load(f"papers_{t}.json")))
                  for part, make in (("claims", show.claims), ("papers", show.numbers)) for t in "abcdefgh"}
COMMANDS: Tables = {f"{command}_options": (None, partial(options, command))
                    for command in ("train", "evaluate", "diagnose", "bench")}
DOCUMENTS = {ROOT / "README.md": README, ROOT / "docs" / "results.md": DETAILS, ROOT / "docs" / "papers.md": PAPERS,
             ROOT / "docs" / "api" / "commands.md": COMMANDS}


def rendered(text: str, tables: Tables = README) -> str:
    """A document with its tables made anew. Results that are there must be shown, and nothing else may be."""
    for name, (file, make) in tables.items():
        begin, end = f"<!-- table: {name} -->", f"<!-- end: {name} -->"
        shown = text.count(begin)
        if shown != int(file is None or (RESULTS / file).exists()):
            raise ValueError(f"the document has {shown} tables {name}, and bench/results/{file} "
                             f"{'is missing' if shown else 'exists'}")
        if shown:
            before, rest = text.split(begin)
            text = before + begin + "\n" + make() + "\n" + end + rest.split(end)[1]
    return text


def main() -> int:
    changed = False
    for path, tables in DOCUMENTS.items():
        old = path.read_text()
        new = rendered(old, tables)
        changed |= old != new
        if "--check" not in sys.argv[1:]:
            path.write_text(new)
    return int(changed and "--check" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
