"""checkpoint.py: checkpoints by step, full disks, damaged files."""
import errno
import os
import warnings

import pytest
import torch

from ensadv_fast.system import files
from ensadv_fast.train import checkpoints
from ensadv_fast.train.checkpoints import Checkpoints


def state(step):
    return {"step": step, "model": {"w": torch.full((300,), float(step))}, "ranks": [torch.get_rng_state()] * 2}


@pytest.fixture
def three(tmp_path):
    kept = Checkpoints(tmp_path / "checkpoints", "D_ens-seed0", keep=3)
    for step in (100, 200, 300):
        kept.save(state(step))
    return kept


def test_the_newest_are_kept(three):
    assert three.steps() == [300, 200, 100]
    three.save(state(400))
    assert three.steps() == [400, 300, 200]
    assert files.digest(three.newest()) == files.digest(state(400))
    assert three.load(200)["step"] == 200
    assert not list(three.folder.glob("*.tmp"))


def test_other_trainings_in_the_folder_are_left_alone(three):
    other = Checkpoints(three.folder, "D_ens", keep=1)
    assert other.steps() == [] and other.newest() is None
    other.save(state(7))
    other.save(state(8))
    (three.folder / "D_ens-seed0-best.pt").write_bytes(b"mine")
    three.save(state(400))
    assert other.steps() == [8] and three.steps() == [400, 300, 200]
    assert (three.folder / "D_ens-seed0-best.pt").exists()


def test_truncated_at_any_length_the_one_before_is_found(three):
    path = three.path(300)
    whole = path.read_bytes()
    for length in (0, 1, 4, 100, *range(500, len(whole), 701), len(whole) - 1):
        path.write_bytes(whole[:length])
        with pytest.warns(UserWarning, match=f"{path.name} is corrupt"):
            assert three.newest()["step"] == 200
    path.write_bytes(whole)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert three.newest()["step"] == 300


def test_all_damaged(three):
    for step in three.steps():
        three.path(step).write_bytes(b"")
    with pytest.warns(UserWarning, match="corrupt"):
        assert three.newest() is None


def test_damaged_ones_of_later_steps_do_not_crowd_out_whole_ones(three):
    """After going back from 300, damaged, to 200, saves at 250 and 290 must both stay."""
    three.path(300).write_bytes(b"half")
    three.save(state(250))
    three.save(state(290))
    assert three.steps() == [290, 250, 200]


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="no /dev/full here")
@pytest.mark.parametrize("size", [10, 10_000_000])
def test_a_full_disk_leaves_all_others(three, monkeypatch, size):
    opened = open

    def full(path, mode="r", *args, **kwargs):
        if str(path).endswith(".tmp"):
            opened(path, mode).close()  # there is a name, but no room for more
            path = "/dev/full"
        return opened(path, mode, *args, **kwargs)

    monkeypatch.setattr("builtins.open", full)
    with pytest.raises(OSError, match=r"the disk is full: .*D_ens-seed0-000000400.pt could not be written") as e:
        three.save({**state(400), "more": torch.zeros(size, dtype=torch.uint8)})
    assert e.value.errno == errno.ENOSPC
    monkeypatch.undo()
    assert sorted(p.name for p in three.folder.iterdir()) == [three.path(s).name for s in (100, 200, 300)]
    assert three.newest()["step"] == 300


@pytest.mark.parametrize("where", ["fsync", "replace"])
def test_what_fails_late_leaves_all_others_too(three, monkeypatch, where):
    def fail(*_):
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    monkeypatch.setattr(os, where, fail)
    with pytest.raises(OSError, match="disk is full"):
        three.save(state(400))
    monkeypatch.undo()
    assert three.steps() == [300, 200, 100] and not list(three.folder.glob("*.tmp"))


def test_other_errors_are_told_as_they_are(tmp_path):
    def fail(f):
        f.write(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        files.atomic_write(tmp_path / "c.pt", fail)
    assert not list(tmp_path.iterdir())
    with pytest.raises(ValueError, match="keep must be >= 1, got 0"):
        Checkpoints(tmp_path, "a", keep=0)


def test_old_ones_go_only_after_the_new_one_is_on_the_disk(three, monkeypatch):
    events = []
    fsync, unlink = os.fsync, checkpoints.Path.unlink
    monkeypatch.setattr(os, "fsync", lambda handle: (events.append("fsync"), fsync(handle))[1])
    monkeypatch.setattr(checkpoints.Path, "unlink",
                        lambda path, **options: (events.append(path.name), unlink(path, **options))[1])
    three.save(state(400))
    assert events == ["fsync", "fsync", three.path(100).name]  # the file, its folder, then the oldest goes
