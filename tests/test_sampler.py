"""The order of batches: shared out over ranks, for any batch size, from any position."""
import json

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from ensadv_fast.data import Sampler

SHAPES = dict(n=st.integers(1, 60), batch=st.integers(1, 20), world=st.sampled_from([1, 2, 3, 4]),
              drop_last=st.booleans(), seed=st.integers(0, 3))


def ranks(n, batch, world, drop_last, seed, **options):
    """The samplers of all ranks; None where there are none."""
    try:
        return [Sampler(n, batch, seed, rank=r, world=world, drop_last=drop_last, **options) for r in range(world)]
    except ValueError:
        return None


@given(**SHAPES, epoch=st.integers(0, 2))
def test_ranks_together_have_the_global_batches(n, batch, world, drop_last, seed, epoch):
    samplers = ranks(n, batch, world, drop_last, seed)
    if samplers is None:
        return
    for s in samplers:
        s.epoch = epoch
    parts = [list(s) for s in samplers]
    whole = samplers[0].order(epoch)[:n // batch * batch if drop_last else n].split(batch)
    assert {len(p) for p in parts} == {len(whole)} == {len(s) for s in samplers}
    for number, expected in enumerate(whole):
        shares = [p[number] for p in parts]
        assert min(map(len, shares)) > 0
        for rank, share in enumerate(shares):
            assert torch.equal(share, expected[rank::world])
        for k in range(len(expected) // world):  # the first k of every rank are the first of the global batch
            assert {int(i) for s in shares for i in s[:k]} == set(expected[:k * world].tolist())
    assert [s.epoch for s in samplers] == [epoch + 1] * world


@given(**SHAPES, stop=st.integers(0, 9), other=st.sampled_from([1, 2, 4]))
def test_a_run_goes_on_with_another_number_of_ranks(n, batch, world, drop_last, seed, stop, other):
    """Stopped behind any batch of any epoch: together the ranks have seen, and will see, what one would have."""
    alone = [s for w in (1, world, other) if (s := ranks(n, batch, w, drop_last, seed)) is not None]
    if len(alone) < 3:
        return

    def take(samplers, batches):
        out = []
        while len(out) < batches:
            for shares in zip(*samplers, strict=True):
                out.append(sorted(int(i) for share in shares for i in share))
                if len(out) == batches:
                    break
        return out

    one, first, second = alone
    begun = take(first, stop)
    states = [s.state_dict() for s in first]
    assert all(state == states[0] for state in states)
    for s in second:
        s.load_state_dict(json.loads(json.dumps(states[0])))
    assert begun + take(second, 10 - stop) == take(one, 10)


def test_the_order_depends_on_seed_and_epoch_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    a, b = Sampler(50, 8, 3, rank=1, world=2), Sampler(50, 20, 3, drop_last=True)
    assert torch.equal(a.order(4), b.order(4)) and not torch.equal(a.order(4), a.order(5))
    list(a)
    assert torch.equal(torch.get_rng_state(), state)


@given(n=st.integers(1, 30), batch=st.integers(4, 10), world=st.sampled_from([1, 2, 4]))
def test_evaluation_is_in_order_and_leaves_nobody_out(n, batch, world):
    """Also where the last batch has fewer samples than there are ranks."""
    samplers = ranks(n, batch, world, False, 0, shuffle=False)
    seen = [torch.cat([*s, torch.empty(0, dtype=torch.int64)]).tolist() for s in samplers]
    assert sorted(i for part in seen for i in part) == list(range(n))
    assert all(part == sorted(part) for part in seen) and {s.epoch for s in samplers} == {1}


@pytest.mark.parametrize("options, message", [
    (dict(n=0, batch_size=4), "n must be >= 1, got 0"),
    (dict(n=9, batch_size=0), "batch_size must be >= 1, got 0"),
    (dict(n=9, batch_size=4, rank=2, world=2), "rank must be >= 0 and less than world=2, got 2"),
    (dict(n=9, batch_size=3, world=4), "batch_size must be at least the number of ranks, 4, .*got 3"),
    (dict(n=9, batch_size=4, world=2), "1 samples for 2 ranks .*drop_last=True, or another batch_size"),
    (dict(n=3, batch_size=4, drop_last=True), "n must be at least batch_size=4 with drop_last, .*got 3"),
])
def test_what_cannot_be_shared_out_is_refused(options, message):
    with pytest.raises(ValueError, match=message):
        Sampler(seed=0, **options)


def test_a_position_that_leaves_too_little_is_refused():
    """With another batch size the rest of the epoch is cut otherwise."""
    saved = Sampler(22, 10, 0)
    next(iter(saved))
    other = Sampler(22, 11, 0, world=2)
    with pytest.raises(ValueError, match="1 samples for 2 ranks .*from position 10"):
        other.load_state_dict(saved.state_dict())
    assert other.state_dict() == {**saved.state_dict(), "position": 0}  # nothing half-changed
    other.drop_last = True
    other.load_state_dict(saved.state_dict())
    assert [len(b) for b in other] == [6]
