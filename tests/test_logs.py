"""Log lines: one write each, strict JSON, the same numbers in TensorBoard, curves that do not double after a resume."""
import builtins
import json
import sys
import threading

import pytest

from ensadv_fast.train import logs
from ensadv_fast.train.logs import Log

LINE = {"step": 5, "epoch": 1, "clean_loss": 0.69314, "adv_loss": None, "finite": True, "source": 2,
        "images_per_second": 812.4, "share_data": 0.03, "share_attack": 0.21, "share_train": 0.7, "peak_memory": None,
        "monitor": {"alignment": 0.5, "note": "words"}}


def lines(folder) -> list[dict]:
    return [json.loads(line) for line in (folder / logs.METRICS).read_text().splitlines()]


def curves(folder) -> dict[str, list[tuple[int, float]]]:
    """What TensorBoard shows of a job's folder."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    events = EventAccumulator(str(folder))
    events.Reload()
    return {tag: [(e.step, e.value) for e in events.Scalars(tag)] for tag in events.Tags()["scalars"]}


def test_a_line_is_the_record_with_its_job(tmp_path):
    with Log(tmp_path, "D-seed0") as log:
        log(LINE)
        log({"step": 6, "clean_loss": None})
    assert lines(tmp_path) == [{"job": "D-seed0", **LINE}, {"job": "D-seed0", "step": 6, "clean_loss": None}]
    assert not (tmp_path / logs.TENSORBOARD).exists()


def test_what_is_not_strict_json_is_refused_whole(tmp_path):
    logs.append(tmp_path / "m.jsonl", {"a": 1})
    with pytest.raises(ValueError):
        logs.append(tmp_path / "m.jsonl", {"a": float("nan")})
    assert (tmp_path / "m.jsonl").read_text() == '{"a": 1}\n'


def test_lines_of_many_writers_stay_whole(tmp_path):
    def write(job):
        log = Log(tmp_path, job)
        for step in range(50):
            log({"step": step, "words": job * 100})

    threads = [threading.Thread(target=write, args=(f"job{i}",)) for i in range(4)]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    found = lines(tmp_path)
    assert len(found) == 200 and all(r["words"] == r["job"] * 100 for r in found)


def test_tensorboard_shows_the_same_numbers(tmp_path):
    pytest.importorskip("tensorboard")
    with Log(tmp_path, "D-seed0", tensorboard=True) as log:
        log(LINE)
        log(LINE | {"step": 10, "clean_loss": 0.25})
    found = curves(tmp_path / logs.TENSORBOARD / "D-seed0")
    assert found["clean_loss"] == [(5, pytest.approx(0.69314)), (10, 0.25)]
    assert found["monitor/alignment"] == [(5, 0.5), (10, 0.5)]
    assert found["images_per_second"][0] == (5, pytest.approx(812.4))
    assert found["finite"] == [(5, 1.0), (10, 1.0)]
    assert set(found) == set(logs.numbers(LINE)) == {
        "epoch", "clean_loss", "finite", "source", "images_per_second", "share_data", "share_attack", "share_train",
        "monitor/alignment"}


@pytest.mark.parametrize("saved", [0, 2])
def test_curves_do_not_double_after_a_resume(tmp_path, saved):
    """Killed at step 4 after a checkpoint at step `saved`: the steps after it come again."""
    pytest.importorskip("tensorboard")
    killed = Log(tmp_path, "D", tensorboard=True)
    for step in range(1, 5):
        killed({"step": step, "loss": 1.0})
    # No close: every line has been flushed.
    with Log(tmp_path, "D", tensorboard=True, step=saved) as log:
        for step in range(saved + 1, 7):
            log({"step": step, "loss": 2.0})
    assert curves(tmp_path / logs.TENSORBOARD / "D")["loss"] == [
        (step, 1.0 if step <= saved else 2.0) for step in range(1, 7)]
    killed.close()


def test_tensorboard_is_imported_only_when_asked_for(tmp_path, monkeypatch):
    real = builtins.__import__

    def without(name, *args, **kwargs):
        if name.split(".")[0] == "tensorboard" or name == "torch.utils.tensorboard":
            raise ImportError("no module")
        return real(name, *args, **kwargs)

    for name in [n for n in sys.modules if "tensorboard" in n]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    Log(str(tmp_path / "new" / "run"), "D")(LINE)
    assert len(lines(tmp_path / "new" / "run")) == 1
    with pytest.raises(ImportError, match=r"pip install 'ensadv-fast\[tensorboard\]'"):
        Log(tmp_path / "none", "D", tensorboard=True)
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("change, words", [
    ({}, "loss 0.693, 812 images/s, 12:33 left, data 3 % attack 21 % train 70 %"),
    ({"adv_loss": 2.0, "images_per_second": 8.123, "share_data": None},
     "loss 0.693, adversarial 2.000, 8.12 images/s, 20:55:12 left, attack 21 % train 70 %"),
    ({"clean_loss": None, "finite": False, "images_per_second": None},
     "NOT FINITE, data 3 % attack 21 % train 70 %")])
def test_progress_in_words(change, words):
    assert logs.progress(LINE | change, 611_760) == words


def test_progress_of_an_empty_record():
    assert logs.progress({}, 5) == ""
