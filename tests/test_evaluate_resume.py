"""evaluate/journal.py: a killed evaluation goes on, and nothing computed from something else is used."""
import json
import os
import signal
import subprocess
import sys
from dataclasses import fields, replace

import numpy as np
import pytest
import torch
from torch import nn

from ensadv_fast import Source, ops
from ensadv_fast.attacks import Attack, fgsm, pgd
from ensadv_fast.evaluate import accuracy_curve, load_set, transfer_matrix
from ensadv_fast.evaluate.fingerprint import describe, fingerprint, image_checksums
from ensadv_fast.evaluate.journal import Journal
from ensadv_fast.evaluate.verdicts import Arrivals

N, BATCH = 40, 8
KEY = ops.fresh_key("cpu", 3)
ATTACKS = {"fgsm": fgsm(0.1), "pgd": pgd(0.1, steps=2)}


def net(seed):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Flatten(), nn.Linear(16, 12), nn.ReLU(), nn.Linear(12, 8))


def batches(size=BATCH):
    g = torch.Generator().manual_seed(1)
    x, y = torch.rand(N, 1, 4, 4, generator=g), torch.randint(0, 8, (N,), generator=g)
    return [(x[i], y[i], i) for i in torch.arange(N).split(size)]


class Counting(Attack):
    """The attack itself, which counts its calls and stops the process in one of them."""

    calls, kill_at = 0, None

    def __call__(self, *args, **kw):
        Counting.calls += 1
        if Counting.calls == Counting.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().__call__(*args, **kw)


def counting(attack):
    return Counting(**{f.name: getattr(attack, f.name) for f in fields(attack)})


def evaluate(folder, targets=None, sources=None, attacks=None, size=BATCH, key=KEY, **kw):
    """(matrix, attack calls made)."""
    before = Counting.calls
    attacks = {name: counting(a) for name, a in (attacks or ATTACKS).items()}
    matrix = transfer_matrix(targets or {"a": net(0), "b": net(1)}, sources or {"s": net(2), "b": net(1)}, attacks,
                             batches(size), key=key, folder=folder, **kw)
    return matrix, Counting.calls - before


def same(one, two):
    return one.to_dict(bits=True) == two.to_dict(bits=True)


CALLS = 4 * N // BATCH


@pytest.mark.parametrize("sets", [False, True])
def test_a_killed_evaluation_goes_on_with_the_attack_it_was_killed_in(tmp_path, sets):
    folder, save = tmp_path / "run", tmp_path / "sets" if sets else None
    run = subprocess.run([sys.executable, "-W", "error", __file__, str(folder), str(save or "")], timeout=120)
    assert run.returncode == -signal.SIGKILL
    resumed, calls = evaluate(folder, save_sets=save)
    assert calls == CALLS - 12
    unbroken, calls = evaluate(None, save_sets=tmp_path / "others" if sets else None)
    assert calls == CALLS and same(resumed, unbroken)
    again, calls = evaluate(folder, save_sets=save)
    assert calls == 0 and same(again, resumed)
    if sets:
        for name in ("s-fgsm", "s-pgd", "b-fgsm", "b-pgd"):
            one, two = load_set(save / name), load_set(tmp_path / "others" / name)
            assert torch.equal(one.rows(0, N).x_adv, two.rows(0, N).x_adv)


def test_what_it_was_computed_from_decides(tmp_path):
    """Each change costs its own cells alone, and the result is always that of a fresh evaluation."""
    first, calls = evaluate(tmp_path)
    assert calls == CALLS
    per_cell = CALLS // 4
    other = net(5)
    cases = [
        ({}, 0),
        ({"attacks": {**ATTACKS, "pgd": pgd(0.1, steps=3)}}, 2 * per_cell),
        ({"attacks": {**ATTACKS, "fgsm": replace(fgsm(0.1), eps=0.2)}}, 2 * per_cell),
        ({"attacks": {**ATTACKS, "more": fgsm(0.1)}}, 2 * per_cell),
        ({"sources": {"s": other, "b": net(1)}}, 2 * per_cell),
        ({"sources": {"s": Source(net(2), dtype=torch.float32), "b": net(1)}}, 2 * per_cell),
        ({"targets": {"a": net(0)}}, 0),
        ({"targets": {"a": net(0), "b": net(1), "c": other}}, CALLS),
        ({"key": ops.fresh_key("cpu", 4)}, CALLS),
        ({"size": 10}, 4 * N // 10),
        ({"save_sets": tmp_path / "sets"}, CALLS),
        ({}, 0),
    ]
    for change, wanted in cases:
        found, calls = evaluate(tmp_path, **change)
        fresh, _ = evaluate(None, **{**change, **({"save_sets": tmp_path / "fresh"} if "save_sets" in change else {})})
        assert calls == wanted, change
        assert same(found, fresh), change


def test_other_images_are_not_mixed_up(tmp_path, monkeypatch):
    evaluate(tmp_path)
    changed = batches()
    changed[2][0][3] += 1e-3
    relabelled = batches()
    relabelled[1][1][0] = (relabelled[1][1][0] + 1) % 8
    for loader in (changed, relabelled):
        monkeypatch.setitem(globals(), "batches", lambda size, loader=loader: loader)
        found, calls = evaluate(tmp_path)
        fresh, _ = evaluate(None)
        assert calls == 4 and same(found, fresh)  # one of five batches


def test_a_cut_or_altered_line_is_computed_again(tmp_path):
    first, _ = evaluate(tmp_path)
    path = tmp_path / "cells.jsonl"
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    assert len(lines) == CALLS + N // BATCH
    path.write_bytes(whole[:-20])
    found, calls = evaluate(tmp_path)
    assert calls == 1 and same(found, first)
    broken = json.loads(lines[1])
    model = next(iter(broken["verdicts"]))
    broken["verdicts"][model] = "AAAA"
    for bad in (json.dumps(broken).encode() + b"\n", b"\xff\x00\n", b"[1]\n", b"{}\n", b"\n"):
        path.write_bytes(b"".join([lines[0], bad, *lines[2:]]))
        found, calls = evaluate(tmp_path)
        assert calls == 1 and same(found, first)


def test_the_journal_is_appended_to(tmp_path):
    journal = Journal(tmp_path)
    journal.add("c", "b", {"m": b"12", "n": b""})
    journal.close()
    with open(tmp_path / "cells.jsonl", "ab") as f:
        f.write(b'{"cell": "c", "ba')
    again = Journal(tmp_path)
    again.add("c", "b2", {"m": b"3"})
    again.close()
    last = Journal(tmp_path)
    last.close()
    found = [last.get("c", batch, model) for batch, model in (("b", "m"), ("b", "n"), ("b2", "m"), ("b", "x"))]
    assert found == [b"12", b"", b"3", None]


def test_verdicts_that_arrive_late_are_kept_under_their_own_batch(tmp_path, monkeypatch):
    """On a GPU the verdicts of a batch arrive while the next one is judged."""
    put = []
    monkeypatch.setattr(Arrivals, "put", lambda self, t, then: put.append(t) or self._waiting.append((t, None, then)))
    late, _ = evaluate(tmp_path)
    monkeypatch.undo()
    again, calls = evaluate(tmp_path)
    assert calls == 0 and same(again, late) and same(again, evaluate(None)[0])
    assert len(put) == CALLS + 2 * N // BATCH


def test_curves_go_on_too(tmp_path):
    model, loader, before = net(0), batches(), Counting.calls
    one, two = (accuracy_curve(model, model, counting(fgsm(0.3)), [0.0, 0.05, 0.1], loader, folder=tmp_path)
                for _ in range(2))
    assert one == two and Counting.calls - before == 2 * len(loader)


# ---- fingerprints ------------------------------------------------------------------------------------------------


def test_fingerprints_tell_models_and_attacks_apart():
    a, b = net(0), net(0)
    assert fingerprint(a) == fingerprint(b) != fingerprint(net(1))
    with torch.no_grad():
        b[1].weight[3, 2] += 1e-7
    assert fingerprint(a) != fingerprint(b)
    dropping = nn.Sequential(nn.Dropout(0.1)), nn.Sequential(nn.Dropout(0.2))
    assert fingerprint(dropping[0]) != fingerprint(dropping[1])
    sources = [Source(net(0), dtype=d, mean=m) for d in (torch.float32, torch.float64) for m in (None, [0.5])]
    assert len({fingerprint(s) for s in sources}) == 4
    attacks = [fgsm(0.1), fgsm(0.2), replace(fgsm(0.1), loss="cw"), pgd(0.1), pgd(0.1, steps=3)]
    assert len({fingerprint(a) for a in attacks}) == 5 and fingerprint(fgsm(0.1)) == fingerprint(fgsm(0.1))


SCALE = 1.0


def scaled(logits):
    return SCALE * logits


class Head(nn.Module):
    """All that a forward pass may depend on beside layers and state."""

    gain = 1.0

    def __init__(self, shift=0.0, scale=1.0, listed=0, act=torch.relu):
        super().__init__()
        self.layer = net(0)
        self.shift = shift * torch.arange(8)
        self.options = {"scale": scale, "listed": [net(listed)]}
        self.act = act
        self.me = [self]  # a cycle

    def forward(self, x):
        logits = self.act(self.layer(x) + self.shift) * self.options["scale"] * self.gain
        return scaled(logits) + self.options["listed"][0](x)


class OtherHead(Head):
    def forward(self, x):
        return -super().forward(x)


def other_forward(self, x):
    return self.layer(x) - 1


def closed_over(by):
    return lambda t: t * by


def test_fingerprints_tell_look_alikes_apart(monkeypatch):
    """Each differs in nothing that the state or the representation of its layers shows."""
    def all_of_them():
        yield Head()
        yield Head(shift=0.1)
        yield Head(scale=2.0)
        yield Head(listed=1)
        yield from (Head(act=closed_over(by)) for by in (1, 2))
        yield OtherHead()
        bound = Head()
        bound.forward = other_forward.__get__(bound)
        yield bound
        hooked = Head()
        hooked.layer[1].register_forward_hook(lambda m, given, made: made + 1)
        yield hooked
        plain = net(0)
        yield plain
        plain[1].scale = torch.tensor(2.0)
        yield plain
        plain[1].forward = lambda x: x[:, :12]
        yield plain
        with monkeypatch.context() as changed:
            changed.setattr(Head, "gain", 2.0)
            yield Head()
        with monkeypatch.context() as changed:
            changed.setitem(globals(), "SCALE", 2.0)
            yield Head()
        with monkeypatch.context() as changed:
            changed.setitem(globals(), "scaled", lambda logits: logits + 1)
            yield Head()

    one, two = ([fingerprint(Source(m, live=True)) for m in all_of_them()] for _ in range(2))
    assert one == two and len(set(one)) == len(one) == 15


def test_losses_that_are_functions_are_told_apart_by_their_code():
    assert describe(closed_over(1)) != describe(closed_over(2)) and describe(closed_over(1)) == describe(closed_over(1))
    assert describe(scaled) != describe(other_forward)


def test_networks_of_torchs_layers_are_described_as_before():
    """So verdicts that are kept stay useful."""
    assert set(describe(net(0))) == {"class", "layers", "sha256"}


@pytest.mark.parametrize("change", ["attribute", "code"])
def test_a_look_alike_is_judged_anew(tmp_path, change):
    def targets(model):
        return {"a": model, "b": net(1)}

    evaluate(tmp_path, targets(Head()))
    other = Head(shift=0.5) if change == "attribute" else OtherHead()
    found, calls = evaluate(tmp_path, targets(other))
    assert same(found, evaluate(None, targets(other))[0]) and calls == CALLS
    assert not same(found, evaluate(None, targets(Head()))[0])
    assert evaluate(tmp_path, targets(other))[1] == 0


def test_describing_what_says_nothing_about_itself():
    class Own:
        def __init__(self):
            self.sizes, self.w = (1, 2), np.ones(3)

    assert describe(Own()) == {"class": Own.__qualname__, "sizes": [1, 2], "w": describe(torch.ones(3).double())}
    assert describe(fgsm) == "ensadv_fast.attacks.fgsm"
    assert " at 0x" not in describe(object())


def test_checksums_are_of_the_images_alone(monkeypatch):
    g = torch.Generator().manual_seed(0)
    levels = torch.randint(0, 256, (9, 3, 5, 7), generator=g, dtype=torch.uint8)
    whole = image_checksums(levels)
    x = levels.float() / 255
    assert torch.equal(whole, image_checksums(x)) and len(set(whole.tolist())) == 9
    assert torch.equal(whole, image_checksums(x.to(memory_format=torch.channels_last)))
    assert torch.equal(whole[4:], image_checksums(x[4:]))
    monkeypatch.setattr("ensadv_fast.evaluate.fingerprint.ELEMENTS", 200)
    assert torch.equal(whole, image_checksums(levels))
    for i, j in ((0, 1), (3, 50), (0, 104)):  # two elements exchanged
        other = x.clone().flatten(1)
        other[:, [i, j]] = other[:, [j, i]]
        assert bool((image_checksums(other) != whole).all() or (other == x.flatten(1)).all(1).any())
    assert image_checksums(x[:0]).shape == (0,)
    wide = x.double()
    assert not torch.equal(image_checksums(wide), whole) and torch.equal(wide, x.double())


if __name__ == "__main__":  # a process that is killed in its thirteenth attack
    Counting.kill_at = 13
    evaluate(sys.argv[1], save_sets=sys.argv[2] or None)
