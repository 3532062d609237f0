"""Whatever ends a run, going on gives the same weights, bit for bit: killed processes, signals, damaged files, NaN."""
import contextlib
import io
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from ensadv_fast import cli, train
from ensadv_fast.system import files, ranks, signals
from ensadv_fast.train import Config, checkpoints, job, logs
from ensadv_fast.train.logs import NONFINITE
from ensadv_fast.train.trainer import Training

ENS = "D_ens-seed0"
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(["ensadv_fast.cli", "ensadv_fast.train"])  # processes start in no time


@pytest.fixture(scope="module")
def small(folder):
    """A source of 6 steps and a target of 18, dropout and all."""
    return Config(data=f"mnist:{folder}", preset="tramer", static=("mnist:D",), held_out=(), epochs=3, source_epochs=1,
                  batch_size=16, seeds=1, eval_steps=2, eval_batch_size=40, workers=1, threads=1, log_every=4,
                  save_every=2, device="cpu")


def options(config, out):
    found = ["train", "--out", str(out), "--resume"]
    for k in ("data", "preset", "epochs", "source_epochs", "batch_size", "seeds", "eval_steps", "eval_batch_size",
              "workers", "threads", "log_every", "save_every", "device", "nan"):
        found += ["--" + k.replace("_", "-"), str(getattr(config, k))]
    return [*found, "--static", *config.static, "--held-out", *config.held_out]


# ---------------------------------------------------------------------------------------------------- faults


def after_step(name, step, rank, happen):
    """Let something happen on one rank once a job has done that many steps."""
    advance = Training.advance

    def watched(self, *batch):
        result = advance(self, *batch)
        if (self.job.name, self.step, self.setup.ranks.rank) == (name, step, rank):
            happen()
        return result

    Training.advance = watched


def kill(name, step, rank):
    after_step(name, step, rank, lambda: os.kill(os.getpid(), signal.SIGKILL))


def terminate(name, step, rank):
    after_step(name, step, rank, lambda: os.kill(os.getpid(), signal.SIGTERM))


def kill_while_writing(name, step, rank):
    """Half of the checkpoint of that step is on the disk."""
    whole = checkpoints.atomic_write

    def half(path, write):
        if path.name == f"{name}-{step:09d}.pt":
            write(body := io.BytesIO())
            path.with_name(path.name + ".1.tmp").write_bytes(body.getvalue()[:len(body.getvalue()) // 2])
            os.kill(os.getpid(), signal.SIGKILL)
        whole(path, write)

    checkpoints.atomic_write = half


def kill_before_it_is_published(name, step, rank):
    publish = checkpoints.Checkpoints.publish

    def late(self, at, path):
        if (self.name, at) == (name, step):
            os.kill(os.getpid(), signal.SIGKILL)
        publish(self, at, path)

    checkpoints.Checkpoints.publish = late


def poison(name, step, rank):
    """NaN in the images of one rank's part of a batch."""
    advance = Training.advance

    def poisoned(self, x, y, index):
        hit = (self.job.name, self.step + 1, self.setup.ranks.rank) == (name, step, rank)
        return advance(self, x * torch.nan if hit else x, y, index)

    Training.advance = poisoned


# ------------------------------------------------------------------------------------------------- processes


def process(rank, world, port, argv, fault, out):
    os.environ.update(GLOO_SOCKET_IFNAME="lo", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
    if world > 1:
        os.environ.update(RANK=str(rank), WORLD_SIZE=str(world), LOCAL_RANK=str(rank))
    with open(out, "w") as f, contextlib.redirect_stdout(f), contextlib.redirect_stderr(f):
        torch.set_num_threads(1)
        if fault is not None:
            globals()[fault[0]](*fault[1:])
        try:
            status = cli.main(argv)
        except BaseException as e:
            print(f"{type(e).__name__}: {e}", flush=True)
            status = 70
        f.flush()
        os._exit(status)


def launch(config, run, world=1, fault=None, timeout=60):
    """Go on with the run in processes of their own; (exit statuses, what they wrote)."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    run.parent.mkdir(exist_ok=True)
    texts = [run.parent / f"{run.name}-{r}.txt" for r in range(world)]
    started = [SERVER.Process(target=process, args=(r, world, port, options(config, run), fault, str(texts[r])))
               for r in range(world)]
    for p in started:
        p.start()
    for p in started:
        p.join(timeout)
        assert p.exitcode is not None or p.kill(), "it hangs"
    return [p.exitcode for p in started], [t.read_text() for t in texts]


def assert_same_weights(a, b):
    names = sorted(p.stem for p in (a / "models").glob("*.pt"))
    assert names == sorted(p.stem for p in (b / "models").glob("*.pt")) and ENS in names
    for name in names:
        one, two = (torch.load(d / "models" / f"{name}.pt", weights_only=True) for d in (a, b))
        assert one["step"] == two["step"] in (6, 18)
        assert files.digest([one["model"], one["rng"], one["sampler"], one["adversary"]]) == files.digest(
            [two["model"], two["rng"], two["sampler"], two["adversary"]]), name
    assert not list(b.rglob("*.tmp")) and not list((b / "checkpoints").glob("*"))
    one, two = (json.loads((d / "results.json").read_text())["models"] for d in (a, b))
    assert one == two
    one, two = (lines_of(d) for d in (a, b))
    assert list(one) == list(two)  # no line lost, none twice
    for at in one:  # and each covers all of its steps; ranks add up in another order after a resume
        assert two[at] == pytest.approx(one[at], rel=1e-12), at


def lines_of(run):
    """The lines of metrics.jsonl by job and step, without those of time."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    assert len({(r["job"], r["step"]) for r in lines}) == len(lines)
    return {at: logs.numbers(r) for at, r in sorted(((r["job"], r["step"]), {
        k: v for k, v in r.items() if not k.startswith("share_") and k != "images_per_second"}) for r in lines)}


@pytest.fixture(scope="module")
def unbroken(small, tmp_path_factory):
    """By the number of ranks."""
    out = tmp_path_factory.mktemp("unbroken")
    train.run(small, out / "1", progress=False, say=lambda text: None)
    statuses, texts = launch(small, out / "2", 2)
    assert statuses == [0, 0], texts
    return {1: out / "1", 2: out / "2"}


def test_one_process_killed_again_and_again(small, unbroken, tmp_path):
    run = tmp_path / "run"
    for fault in (("kill", "source-D", 3, 0), ("kill_while_writing", ENS, 4, 0), ("kill", ENS, 7, 0),
                  ("kill_before_it_is_published", ENS, 10, 0), ("kill_while_writing", ENS, 18, 0),
                  ("kill_before_it_is_published", ENS, 18, 0)):
        statuses, texts = launch(small, run, fault=fault)
        assert statuses == [-signal.SIGKILL], texts
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


class Dead(BaseException):
    """Instead of kill -9."""


@contextlib.contextmanager
def dying(monkeypatch, at):
    """Within it this process dies at its write of number `at`, as by kill -9: neither that write nor any later one, be
    it of an `except` or a `finally`, is done. It gives the list of all writes."""
    writes = []

    def counted(write):
        def instead(*args, **options):
            writes.append(write.__name__)
            if 0 < at <= len(writes):
                raise Dead
            return write(*args, **options)
        return instead

    with monkeypatch.context() as m:
        for module, name in ((os, "replace"), (os, "link"), (os, "unlink"), (os, "fsync"), (logs, "append")):
            m.setattr(module, name, counted(getattr(module, name)))
        if at:
            with pytest.raises(Dead):
                yield writes
        else:
            yield writes


def assert_same_run(a, b):
    """The same files, networks, lines and results, and nothing left over."""
    assert sorted(p.relative_to(a) for p in a.rglob("*")) == sorted(p.relative_to(b) for p in b.rglob("*"))
    assert not list(b.rglob("*.tmp")) and not list((b / "checkpoints").glob("*"))
    one, two = ({p.name: checkpoints.load(p) for p in (d / "models").iterdir()} for d in (a, b))
    for name in one:
        assert one[name]["step"] == two[name]["step"] == 3
        assert files.digest(one[name]["model"]) == files.digest(two[name]["model"]), name
    assert lines_of(a) == lines_of(b)
    one, two = (json.loads(p.read_text())["models"] if (p := d / "results.json").exists() else None for d in (a, b))
    assert one == two


def test_killed_at_any_write(small, tmp_path, monkeypatch):
    """Every edge of the state machine of docs/training.md: what a kill leaves is gone on with."""
    tiny = replace(small, preset="plain", static=(), epochs=1, batch_size=32, save_every=1, log_every=2, keep=1,
                   eval_steps=1, evaluate=False)
    quiet = {"progress": False, "say": lambda text: None}
    with dying(monkeypatch, 0) as writes:
        train.run(tiny, tmp_path / "trained", **quiet)
    assert {"replace", "link", "unlink", "fsync", "append"} == set(writes)
    for at in range(1, len(writes) + 1):
        with dying(monkeypatch, at):
            train.run(tiny, tmp_path / f"{at}", **quiet)
        train.run(tiny, tmp_path / f"{at}", resume=True, **quiet)
        assert_same_run(tmp_path / "trained", tmp_path / f"{at}")

    evaluated = replace(tiny, evaluate=True)
    shutil.copytree(tmp_path / "trained", tmp_path / "whole")
    with dying(monkeypatch, 0) as writes:
        train.run(evaluated, tmp_path / "whole", resume=True, **quiet)
    for at in range(1, len(writes) + 1):
        run = tmp_path / f"evaluated{at}"
        shutil.copytree(tmp_path / "trained", run)
        with dying(monkeypatch, at):
            train.run(evaluated, run, resume=True, **quiet)
        train.run(evaluated, run, resume=True, **quiet)
        assert_same_run(tmp_path / "whole", run)


def test_two_ranks_of_which_one_or_both_are_killed(small, unbroken, tmp_path):
    run = tmp_path / "run"
    for fault, killed in ((("kill", "source-D", 4, 1), 1), (("kill", ENS, 7, 0), 0),
                          (("kill_while_writing", ENS, 10, 0), 0)):
        statuses, texts = launch(small, run, 2, fault)
        assert statuses[killed] == -signal.SIGKILL and statuses[1 - killed] not in (0, None), texts
    statuses, texts = launch(small, run, 2)
    assert statuses == [0, 0], texts
    assert_same_weights(unbroken[2], run)
    assert texts[1] == "" and "D_ens" in texts[0]  # only rank 0 prints


def test_sigterm_saves_and_ends_with_status_0(small, unbroken, tmp_path):
    run = tmp_path / "run"
    statuses, (text,) = launch(small, run, fault=("terminate", ENS, 5, 0))
    assert statuses == [0] and f"stopped by SIGTERM; step 5 of 18 of {ENS} is saved; " in text
    assert f"--resume {run}" in text
    assert checkpoints.load(run / "models" / f"{ENS}.pt")["step"] == 5
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def test_sigterm_of_one_rank_stops_all_at_one_step(small, unbroken, tmp_path):
    run = tmp_path / "run"
    statuses, texts = launch(small, run, 2, ("terminate", ENS, 5, 1))
    assert statuses == [0, 0], texts
    step = int(re.search(r"stopped by SIGTERM; step (\d+)", texts[0])[1])
    assert 5 < step <= 5 + 2 * ranks.EVERY and checkpoints.load(run / "models" / f"{ENS}.pt")["step"] == step
    statuses, texts = launch(small, run, 2)
    assert statuses == [0, 0], texts
    assert_same_weights(unbroken[2], run)


def test_sigterm_reaches_the_workers_of_a_pool(small, unbroken, tmp_path):
    run, path = tmp_path / "run", tmp_path / "run" / "models" / f"{ENS}.pt"
    config = replace(small, workers=2, save_every=1)
    started = subprocess.Popen([sys.executable, "-m", "ensadv_fast", *options(config, run)], stderr=subprocess.PIPE,
                               stdout=subprocess.DEVNULL, text=True)
    while not path.exists():
        assert started.poll() is None
    started.send_signal(signal.SIGTERM)
    _, text = started.communicate(timeout=60)
    assert started.returncode == 0, text
    assert f"of {ENS} is saved" in text or "all networks are trained" in text
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def test_the_second_ctrl_c_ends_at_once():
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt), signals.handled():
        os.kill(os.getpid(), signal.SIGINT)
        assert signals.asked.value == signal.SIGINT
        os.kill(os.getpid(), signal.SIGINT)
    assert signal.getsignal(signal.SIGINT) is before and not signals.asked.value
    with pytest.raises(signals.Stopped), signals.handled(), signals.at_once():
        os.kill(os.getpid(), signal.SIGTERM)


# ---------------------------------------------------------------------------------- damaged files, full disks, NaN


def stopped_at(step, monkeypatch, small, run):
    save = checkpoints.Checkpoints.save

    def save_and_stop(self, state):
        save(self, state)
        if (self.name, state["step"]) == (ENS, step):
            raise KeyboardInterrupt

    with monkeypatch.context() as m, pytest.raises(KeyboardInterrupt):
        m.setattr(checkpoints.Checkpoints, "save", save_and_stop)
        train.run(small, run, progress=False, say=lambda text: None)


def test_a_truncated_checkpoint_gives_way_to_the_one_before(small, unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped_at(8, monkeypatch, small, run)
    kept = sorted((run / "checkpoints").glob(f"{ENS}-*.pt"))
    assert [p.name for p in kept] == [f"{ENS}-00000000{s}.pt" for s in (6, 8)]
    kept[1].write_bytes(kept[1].read_bytes()[:5000])
    with pytest.warns(UserWarning, match=f"{ENS}-000000008.pt is corrupt"):
        train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def test_a_run_of_damaged_checkpoints_alone_does_not_start_anew(small, tmp_path, monkeypatch):
    run = tmp_path / "run"
    stopped_at(8, monkeypatch, small, run)
    for path in [*(run / "checkpoints").glob(f"{ENS}-*.pt"), run / "models" / f"{ENS}.pt"]:
        path.write_bytes(b"")
    with pytest.warns(UserWarning, match="is corrupt"), pytest.raises(ValueError, match=f"{ENS}.pt is corrupt"):
        train.run(small, run, resume=True, progress=False)


def test_a_full_disk_leaves_the_checkpoint_before(small, unbroken, tmp_path, monkeypatch):
    run = tmp_path / "run"
    real = open

    class Full(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > 4000:
                raise OSError(28, "No space left on device")
            return super().write(data)

    def crowded(path, mode="r", **more):
        full = mode == "wb" and f"{ENS}-000000008.pt" in str(path)
        return Full(path, "w") if full else real(path, mode, **more)

    with monkeypatch.context() as m, pytest.raises(OSError, match=f"disk is full.*{ENS}-000000008.pt.*--resume"):
        m.setattr(files, "open", crowded, raising=False)
        train.run(small, run, progress=False, say=lambda text: None)
    assert checkpoints.load(run / "models" / f"{ENS}.pt")["step"] == 6
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    assert_same_weights(unbroken[1], run)


def nonfinite(run):
    return [json.loads(line) for line in (run / NONFINITE).read_text().splitlines()]


def test_nan_stops_the_run_and_names_the_images(small, unbroken, tmp_path):
    run = tmp_path / "run"
    statuses, texts = launch(small, run, 2, ("poison", ENS, 7, 1))
    assert statuses == [1, 1], texts
    assert "the gradients of step 7 are not finite (1 such steps up to step 8)" in texts[0]
    assert str(run / NONFINITE) in texts[0]
    (line,) = nonfinite(run)
    assert (line["job"], line["step"], line["count"], line["skipped"]) == (ENS, 7, 1, False)
    state = checkpoints.load(run / "models" / f"{ENS}.pt")
    assert state["step"] == 6  # nothing later is saved
    from ensadv_fast.data import Sampler
    order = Sampler(96, 16, state["sampler"]["seed"]).order(1)[:16]  # the first batch of the second epoch
    assert line["index"] == [order[r::2].tolist() for r in range(2)]
    statuses, texts = launch(small, run, 2)
    assert statuses == [0, 0], texts
    assert_same_weights(unbroken[2], run)


def test_nan_is_skipped_by_choice(small, tmp_path, monkeypatch):
    run, advance = tmp_path / "run", Training.advance
    weights = {}

    def poisoned(self, x, y, index):
        if self.job.name == ENS and self.step in (7, 8):
            weights.setdefault("before", files.digest(self.model.state_dict()))
        result = advance(self, x * torch.nan if self.job.name == ENS and self.step in (7, 8) else x, y, index)
        if self.job.name == ENS and self.step == 9:
            weights["after"] = files.digest(self.model.state_dict())
        return result

    monkeypatch.setattr(Training, "advance", poisoned)
    with pytest.warns(UserWarning, match="are not finite.*left out"):
        train.run(replace(small, nan="skip"), run, progress=False, say=lambda text: None)
    assert weights["before"] == weights["after"]
    assert [(r["step"], r["count"], r["skipped"]) for r in nonfinite(run)] == [(8, 1, True), (9, 1, True)]
    lines = [json.loads(t) for t in (run / logs.METRICS).read_text().splitlines()]
    assert [r["step"] for r in lines if not r["finite"]] == [8, 12]


# ------------------------------------------------------------------------------------------------- torchrun


def torchrun(run, small, *more, wait=None):
    """The command that README.md gives; wait: a file at whose sight one rank is killed."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m",
               "ensadv_fast", *options(small, run), *more]
    started = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env={
        **os.environ, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"})
    if wait is not None:
        while not wait.exists():
            assert started.poll() is None, started.communicate()
        children = Path(f"/proc/{started.pid}/task/{started.pid}/children").read_text().split()
        os.kill(int(children[-1]), signal.SIGKILL)
    out, err = started.communicate(timeout=120)
    return started.returncode, out, err


def test_torchrun_killed_and_resumed(small, unbroken, tmp_path):
    run = tmp_path / "run"
    status, _, err = torchrun(run, small, wait=run / "checkpoints" / f"{ENS}-000000002.pt")
    assert status not in (0, None), err
    assert not (run / "results.json").exists()
    status, out, err = torchrun(run, small)
    assert status == 0, err
    assert out.count("Errors in %") == 1
    assert_same_weights(unbroken[2], run)


# ------------------------------------------------------------------------------------------ other data, other logs


def test_other_data_of_the_same_size_are_refused(small, folder, tmp_path):
    """The same names, sizes and labels; other pixels."""
    mine = shutil.copytree(folder, tmp_path / "data")
    config = replace(small, data=f"mnist:{mine}", preset="plain", static=(), evaluate=False, epochs=1)
    run = tmp_path / "run"
    quiet = {"progress": False, "say": lambda text: None}
    train.run(config, run, **quiet)
    saved = json.loads((run / "config.json").read_text())
    train.run(config, run, resume=True, **quiet)
    path = mine / "t10k-images-idx3-ubyte"
    raw = path.read_bytes()
    path.write_bytes(raw[:16] + bytes(255 - b for b in raw[16:]))
    job._load_dataset.cache_clear()
    with pytest.raises(ValueError, match=f"data mnist:{mine} must be those that the run in {run} was started with"):
        train.run(config, run, resume=True, **quiet)
    del saved["data_sha256"]  # as 0.1 wrote it
    (run / "config.json").write_text(json.dumps(saved))
    train.run(config, run, resume=True, **quiet)


@pytest.mark.parametrize("line", ["{}", "[]", "null", '{"job": "D-seed0"}', '{"job": [], "step": 1}', "[" * 100_000,
                                  '{"job": "D-seed0", "step": "a"}', "\xff"], ids=lambda line: line[:20])
def test_a_damaged_log_is_named(small, tmp_path, line):
    config = replace(small, preset="plain", static=(), evaluate=False, epochs=1)
    train.run(config, tmp_path, progress=False, say=lambda text: None)
    with open(tmp_path / logs.METRICS, "ab") as f:
        f.write(line.encode("latin1") + b"\n")
    message = rf"train: line \d+ of {tmp_path / logs.METRICS} must be a record of this run"
    with pytest.raises(ValueError, match=message):
        train.run(config, tmp_path, resume=True, progress=False)


def test_an_old_checkpoint_has_no_sums(small, unbroken, tmp_path, monkeypatch):
    """Of 0.1: the line after the resume says which steps it covers."""
    run = tmp_path / "run"
    stopped_at(10, monkeypatch, small, run)
    for path in (run / "checkpoints").glob(f"{ENS}-*.pt"):
        state = checkpoints.load(path)
        del state["meter"]
        checkpoints.save(path, state)
    train.run(small, run, resume=True, progress=False, say=lambda text: None)
    one, two = lines_of(unbroken[1]), lines_of(run)
    assert {at: r["since"] for at, r in two.items() if "since" in r} == {(ENS, 12): 10}
    assert two[ENS, 16] == one[ENS, 16]
