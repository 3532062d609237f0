"""The benchmarks measure every case, verify before they time, and --compare sees a regression. No time is asserted."""
import copy
import importlib.util
import itertools
import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from ensadv_fast import cli
from ensadv_fast.bench import contenders as who
from ensadv_fast.bench import quick, timing
from ensadv_fast.bench.eager import EAGER, NO_EAGER
from ensadv_fast.ops.cases import CASES

ROOT = Path(__file__).parent.parent
CASE = {case.name: case for case in CASES}
SMALL = quick.settings(sizes=["tiny", "mnist"])
PIXELS = quick.settings(sizes=["cifar"], cases=["sign_step", "random_step-rademacher", "model_entry", "project", "l2"])


def module(name: str):
    spec = importlib.util.spec_from_file_location(name, ROOT / "bench" / f"{name}.py")
    found = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(found)
    return found


peers = module("peers")


# ---- who is timed ------------------------------------------------------------------------------------------------

def test_every_case_has_an_eager_twin_or_says_why_not():
    assert not set(EAGER) & set(NO_EAGER)
    assert set(EAGER) | set(NO_EAGER) == set(CASE)
    assert all(len(why) > 20 for why in NO_EAGER.values())


def test_every_case_is_measured_in_every_size_and_in_its_dtypes_and_formats():
    grid = {(s.case.name, s.size) for s in quick.settings("cpu")}
    assert grid == {(name, size) for name in CASE for size in who.SIZES}
    big = [s for s in quick.settings("cuda", sizes=["roofline"], dtypes=["float32"]) if s.case.sweeps]
    assert {s.case.name for s in big} == {case.name for case in CASES if case.sweeps}
    assert all(4 * torch.Size(s.shape).numel() * (who.MEMBERS if "fused" in s.case.mode else 1) > 2**30 for s in big)
    entry = {(s.dtype, s.format) for s in quick.settings(sizes=["imagenet"], cases=["model_entry-bfloat16"])}
    assert entry == {(dtype, fmt) for dtype in who.DTYPES for fmt in who.FORMATS}
    assert {s.dtype for s in quick.settings(cases=["sign_step", "logit_grad"])} == {"float32", "bfloat16", "float16"}
    assert {s.shape[-2:] for s in quick.settings(sizes=["imagenet"], cases=["logit_grad"])} == {(256, 1000)}


@pytest.mark.parametrize("setting", SMALL + PIXELS, ids=lambda s: s.name)
def test_contenders_compute_the_case(setting):
    args, kw = setting.arguments()
    calls = {name: bind(args, kw) for name, bind in who.binders(setting.case, compiled=False).items()}
    assert {"copy", "ours"} <= set(calls)
    assert ("eager" in calls) == (setting.case.name in EAGER)
    who.verify(setting, args, kw, calls)


def test_torch_compile_is_a_contender_of_every_eager_twin():
    assert all(("torch.compile" in who.binders(case)) == (case.name in EAGER) for case in CASES)


def test_bytes_of_an_ideal_kernel():
    """Those of the registry's streams where all are of one dtype; the true ones where not."""
    for setting in quick.settings(sizes=["cifar"], dtypes=["float32"]):
        args, kw = setting.arguments()
        moved = who.streamed_bytes(setting, args, kw, setting.case.reference(*args, **kw))
        if setting.case.op == "logit_grad":
            assert moved == 2 * args[0].numel() * 4
        elif setting.case.name == "model_entry-bfloat16":
            assert moved == (4 + 2) * args[0].numel()
        else:
            assert (moved or 0) == setting.case.streams * 4 * (args[0].numel() if setting.case.streams else 0)
    (setting,) = quick.settings(sizes=["mnist"], dtypes=["uint8"], cases=["model_entry-bfloat16"])
    args, kw = setting.arguments()
    assert who.streamed_bytes(setting, args, kw, setting.case.reference(*args, **kw)) == (1 + 2) * args[0].numel()
    assert who.rate("ours", 2.0, 3_000_000, 4_000_000, 1.0) == {"gb_per_s": 1.5, "of_copy": 0.375}


def setting_of(name: str, size: str = "mnist") -> who.Setting:
    return who.Setting(CASE[name], size, "float32", "contiguous")


@pytest.mark.parametrize(("name", "wrong", "message"), [
    ("sign_step-free", lambda *args: EAGER["sign_step-free"](*args) + 1e-3, "differs from the reference by"),
    ("sign_step-free", lambda *args: EAGER["sign_step-free"](*args)[:3], "differs from the reference by inf"),
    ("random_step-rademacher", lambda x, *_, **kw: (x + 0.2 * torch.randn_like(x)).clamp(0, 1), "of another size"),
    ("sample_eps-uniform", lambda n, *_, **kw: torch.rand(n), "of another size"),
    ("logit_grad-true_ce", lambda z, y, **kw: (2 * EAGER["logit_grad-true_ce"](z, y, **kw)[0], y), "gradient by"),
    ("logit_grad-least_likely_ce", lambda z, y, **kw: EAGER["logit_grad-true_ce"](z, y, **{**kw, "rule": "predicted"}),
     "chose labels that its rule does not allow"),
    ("logit_grad-random_dlr", lambda z, y, **kw: EAGER["logit_grad-true_ce"](z, y, **{**kw, "rule": "true"}),
     "chose labels that its rule does not allow"),
])
def test_a_wrong_contender_is_an_error(name, wrong, message):
    setting = setting_of(name)
    args, kw = setting.arguments()
    with pytest.raises(AssertionError, match=message):
        who.verify(setting, args, kw, {"eager": lambda: wrong(*args, **kw)})


def test_the_momentum_step_is_timed_in_place_on_memory_of_its_own():
    setting = setting_of("momentum_step-ball")
    args, kw = setting.arguments()
    before = args[2].clone()
    calls = {n: bind(args, kw) for n, bind in who.binders(setting.case, compiled=False).items()}
    who.verify(setting, args, kw, calls)
    for _ in range(50):
        last = calls["ours out="]()
    assert torch.equal(args[2], before) and last.isfinite().all()


# ---- peers -------------------------------------------------------------------------------------------------------

def test_peers_belong_to_cases_and_their_packages_are_not_imported_early():
    assert {peer.case for peer in peers.PEERS} <= set(CASE)
    assert len({(peer.name, peer.case) for peer in peers.PEERS}) == len(peers.PEERS)
    code = ("import sys; sys.path.insert(0, 'bench'); import peers; "
            "print(sorted({p.package for p in peers.PEERS} & set(sys.modules)))")
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.filterwarnings("ignore")  # the peers' own
@pytest.mark.parametrize("setting", quick.settings(sizes=["cifar"], cases=[p.case for p in peers.PEERS]),
                         ids=lambda s: s.name)
def test_peers_compute_the_case(setting):
    args, kw = setting.arguments()
    for peer in peers.peers_of(setting):
        if peer.installed:
            call = peer.bind(args, kw)
            if peer.verified:
                who.verify(setting, *peer.start(args, kw), {peer.name: call})
            else:
                assert torch.equal(call(), args[1])  # the stub's gradient is the given one


def test_the_benchmark_of_ensemble_linear_verifies_and_goes_on_where_it_stopped(tmp_path):
    out, command = tmp_path / "out.json", [sys.executable, "bench/ensemble_linear.py", "--device", "cpu", "--dtypes",
                                           "bfloat16", "--members", "2", "--batches", "8", "--widths", "33", "64",
                                           "--seconds", "0.001", "--ways"]
    for directions in (["forward"], ["forward", "gradient"]):
        subprocess.run([*command, "--out", str(out), "--directions", *directions], cwd=ROOT, check=True,
                       capture_output=True)
        if directions == ["forward"]:
            before = json.loads(out.read_text())["rows"]
    result = json.loads(out.read_text())
    assert result["rows"][:4] == before and [row["direction"] for row in result["rows"][4:]] == ["gradient"] * 4
    for row in result["rows"]:
        assert set(row["ms"]) - {row["way"]} == {"users", "op", "ours", "torch's"} - {row["way"]}
        assert row["ratio"].keys() == row["ms"].keys() - {"users"} and row["commit"] == result["commit"]
    assert {"commit", "build", "runtime", "load_before", "load_after"} <= result.keys()


# ---- how it is timed ---------------------------------------------------------------------------------------------

def test_rounds_interleave_the_contenders():
    order = []
    found = timing.rounds({"a": lambda: order.append("a") or 1.0, "b": lambda: order.append("b") or 2.0}, 0.0)
    assert order == ["a", "b"] * 7
    assert found == {"a": timing.Timing(1.0, (1.0, 1.0), 1.0), "b": timing.Timing(2.0, (2.0, 2.0), 2.0)}
    assert timing.rounds({}, 0.0) == {}


def test_ratios_are_measured_until_they_are_known(monkeypatch):
    spans = {"users": 2.0, "steady": 1.0, "noisy": None}
    monkeypatch.setattr(timing, "_measures", lambda calls, device: {
        name: lambda name=name: spans[name] or next(noise) for name in calls})
    found, ratios = timing.time_ratios(dict.fromkeys(["users", "steady"]), "users", 60, "cpu")
    assert ratios == {"steady": timing.Ratio(2.0, 2.0, 2.0)} and found["users"].median == 2.0  # after 7 rounds
    noise = itertools.cycle([1.0, 4.0])
    _, ratios = timing.time_ratios(dict.fromkeys(["users", "noisy"]), "users", 0.01, "cpu")
    assert ratios["noisy"].low == 0.5 and ratios["noisy"].high == 2.0  # cut off


def test_the_interval_of_a_ratio_holds_the_median_as_often_as_it_says():
    g = torch.Generator().manual_seed(0)
    held = 0
    for _ in range(1000):
        over = torch.rand(40, generator=g).add(0.5).tolist()
        ratio = timing.ratio_to(over, [1.0] * 40)
        held += ratio.low <= 1.0 <= ratio.high
    assert 930 <= held <= 990


@pytest.mark.parametrize(("one", "cache", "sets"), [
    (100, 50, 3), (250, 50, 1), (249, 50, 2), (10**9, 50 * 2**20, 1), (0, 50, 250), (4, 50 * 2**20, timing.MOST_SETS)])
def test_rotating_buffers_take_five_times_the_cache(one, cache, sets):
    assert timing.sets_to_rotate(one, cache) == sets
    assert sets * max(1, one) >= 5 * cache or sets == timing.MOST_SETS


def test_buffers_to_rotate_share_no_memory():
    for setting in quick.settings(sizes=["mnist"], dtypes=["float32"]):
        given = setting.arguments()
        other = who.copy_arguments(*given)
        pairs = list(zip([*given[0], *given[1].values()], [*other[0], *other[1].values()], strict=True))
        assert all(a.data_ptr() != b.data_ptr() and torch.equal(a, b) and a.stride() == b.stride()
                   for a, b in pairs if isinstance(a, torch.Tensor))


@pytest.mark.gpu
def test_graph_replay_makes_every_call_and_names_what_cannot_be_captured():
    x = torch.zeros(4, device="cuda")
    timings, missing = timing.time_replay({"add": [lambda: x.add_(1)] * 3, "sync": [lambda: x.sum().item()]}, 0.001)
    assert set(timings) == {"add"} and set(missing) == {"sync"}
    graph = timing.capture([lambda: x.add_(1)] * 3)
    x.zero_()
    graph.replay()
    assert x.tolist() == [3.0] * 4


# ---- the quick form ----------------------------------------------------------------------------------------------

def test_the_command_writes_stamped_results_and_compares(tmp_path, capsys):
    out = tmp_path / "results" / "new.json"
    command = ["bench", "--device", "cpu", "--sizes", "mnist", "--dtypes", "float32", "--cases", "sign_step-free",
               "--seconds", "0.001", "--compile", "--threads", "1"]
    assert cli.main([*command, "--out", str(out)]) == 0
    text = out.read_text()
    result = json.loads(text)
    assert text.splitlines().count(f"  {json.dumps(result['rows'][0])}") == 1  # a row on a line
    assert {"commit", "time", "build", "runtime", "machine", "load_before", "load_after"} <= result.keys()
    assert result["threads"] == 1
    (row,) = result["rows"]
    assert set(row["contenders"]) == {"ours", "ours out=", "eager", "copy", "torch.add out="}
    assert all(c["ms"] > 0 and c["gb_per_s"] > 0 for c in row["contenders"].values())
    assert row["contenders"]["copy"]["of_copy"] == 1

    old = copy.deepcopy(result)
    for cell in old["rows"][0]["contenders"].values():
        cell["ms"] /= 1e6
    old["rows"][0]["contenders"]["copy"]["ms"] = 1e9
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert cli.main([*command, "--compare", str(tmp_path / "old.json")]) == 1
    assert "slower: sign_step-free mnist float32 contiguous contenders ours" in capsys.readouterr().err
    assert quick.regressions(result, result, 1.25) == []
    with pytest.raises(SystemExit):
        cli.main(["bench", "--device", "cpu", "--sizes", "roofline"])


def test_a_wrong_contender_fails_the_command_and_is_not_timed(monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(EAGER, "sign_step-free", lambda x, grad, step: x)
    out = tmp_path / "new.json"
    assert cli.main(["bench", "--device", "cpu", "--sizes", "tiny", "--dtypes", "float32", "--cases", "sign_step-free",
                     "sign_step-ball", "--seconds", "0.001", "--compile", "--out", str(out)]) == 1
    result = json.loads(out.read_text())
    assert [row["case"] for row in result["rows"]] == ["sign_step-ball"]
    assert "wrong: sign_step-free-tiny-float32-contiguous: sign_step-free: eager differs" in capsys.readouterr().err


# ---- the long form -----------------------------------------------------------------------------------------------

def long_form(*options: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-m", "pytest", "bench/test_ops.py", "-q", "-p", "no:cacheprovider", *options]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)


def test_the_long_form_has_every_case_size_and_contender():
    done = long_form("--collect-only")
    assert done.returncode == 0, done.stdout + done.stderr
    found = set(re.findall(r"test_op\[(.+)-(?:calls|graph)\]", done.stdout))
    for setting in quick.settings("cuda" if torch.cuda.is_available() else "cpu"):
        names = [*who.binders(setting.case), *(peer.name for peer in peers.peers_of(setting))]
        assert {f"{setting.name}-{name}" for name in names} <= found


def test_the_long_form_verifies_times_and_stamps(tmp_path):
    out = tmp_path / "out.json"
    done = long_form("-k", "sign_step-free-mnist-float32 and not compile", "--benchmark-max-time", "0.001",
                     "--benchmark-min-rounds", "2", "--threads", "1", "--benchmark-json", str(out))
    assert done.returncode == 0, done.stdout + done.stderr
    result = json.loads(out.read_text())
    assert {"commit", "build", "runtime", "load_before", "load_after"} <= result["stamp"].keys()
    assert result["stamp"]["threads"] == 1
    assert result["machine_info"] == {}  # it would name the host
    cells = {b["extra_info"]["contender"]: b for b in result["benchmarks"]}
    assert {"copy", "torch.add out=", "eager", "ours", "ours out="} <= set(cells)
    assert len({b["group"] for b in result["benchmarks"]}) == len({b["extra_info"]["method"] for b in cells.values()})
    assert all(cells[name]["extra_info"]["of_copy"] > 0 for name in ("copy", "eager", "ours out="))
    assert "data" not in cells["ours"]["stats"]


def test_a_graph_makes_one_call_on_each_of_the_rotating_buffers(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT / "bench"))
    long = module("test_ops")
    captured = []

    class Graph:
        def replay(self):
            return [call() for call in captured]

    monkeypatch.setattr(long, "cache_bytes", lambda: 200_000)
    monkeypatch.setattr(long, "capture", lambda calls: captured.extend(calls) or Graph())
    group = long.Group("sign_step-free-mnist-float32-contiguous")
    replay, n = group.calls("ours out=", "graph")
    assert n == -(-5 * 200_000 // (3 * 64 * 784 * 4)) == len(captured)
    outs = replay()
    assert len({out.data_ptr() for out in outs}) == n
    assert all(torch.equal(out, group.wanted) for out in outs)
    monkeypatch.setattr(long, "capture", lambda calls: "it waits")
    with pytest.raises(pytest.skip.Exception, match="eager cannot be captured: it waits"):
        group.calls("eager", "graph")


def test_the_test_command_leaves_the_benchmarks_out():
    config = (ROOT / "pyproject.toml").read_text()
    assert 'testpaths = ["tests"]' in config


def test_the_gpu_script_runs_what_the_build_makes():
    """Its paths and options exist; here there is nothing to run it on."""
    text = (ROOT / "bench" / "gpu.sh").read_text()
    presets = {p["name"]: p for p in json.loads((ROOT / "CMakePresets.json").read_text())["configurePresets"]}
    folder = presets["release"]["binaryDir"].removeprefix("${sourceDir}/").replace("${presetName}", "cuda")
    assert set(re.findall(r"\S*selftest\S*", re.sub(r"#.*", "", text))) == {f"{folder}/selftest"}
    files = re.findall(r'\$results/([\w.]+)', text)
    assert files == ["ops_gpu.json", "peers_gpu.json", "attack_step_gpu.json", "compat_gpu.json", "train_step_gpu.json",
                     "ensemble_linear_cuda.json"]
    assert set(files) <= {file for tables in module("report").DOCUMENTS.values() for file, _ in tables.values()}
    subprocess.run(["bash", "-n", "bench/gpu.sh"], cwd=ROOT, check=True)


def test_what_ptxas_says_is_read():
    entry = "ptxas info    : Compiling entry function"
    log = "".join(f"""{entry} '_ZN6ensadv46_GLOBAL__N__d5_{file}_cu_0a1b2c3d{kernel}I' for '{arch}'
ptxas info    : Function properties for _Z
    8 bytes stack frame, {spilled} bytes spill stores, 4 bytes spill loads
ptxas info    : Used {registers} registers, used 1 barriers{shared}, 588 bytes cmem[0]
""" for file, kernel, arch, spilled, registers, shared in (
        ("7_l2_step", "14l2_step_kernel", "sm_80", 0, 40, ""), ("7_l2_step", "14l2_step_kernel", "sm_80", 4, 32, ""),
        ("7_l2_step", "19l2_grad_sums_kernel", "sm_90", 0, 24, ", 64 bytes smem")))
    log = log.replace("N__d5_7", "N__d5d5d5d5_7")
    assert module("build").kernels(log) == {
        "l2_step": {"sm_80": {"kernels": 2, "registers": 40, "shared": 0, "spilled": 4}},
        "l2_step: l2_grad_sums": {"sm_90": {"kernels": 1, "registers": 24, "shared": 64, "spilled": 0}}}
