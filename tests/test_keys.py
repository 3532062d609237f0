"""Keys: the package's stream, its independence of torch's generators, and split."""
import subprocess
import sys

import torch

import ensadv_fast as ea
from ensadv_fast import ops
from ensadv_fast.ops.keys import split_reference


def test_the_stream_starts_at_torchs_initial_seed_and_advances():
    script = ("import torch, ensadv_fast as ea; torch.manual_seed(77); "
              "print(ea.fresh_key().tolist(), ea.fresh_key().tolist())")
    told = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert told.strip() == "[77, 0] [77, 1]"


def test_manual_seed_restarts_it():
    ea.manual_seed(5)
    first = [ea.fresh_key().tolist() for _ in range(3)]
    assert first == [[5, 0], [5, 1], [5, 2]]
    ea.manual_seed(5)
    assert [ea.fresh_key().tolist() for _ in range(3)] == first


def test_a_key_that_was_handed_out_never_changes():
    ea.manual_seed(5)
    key = ea.fresh_key()
    ea.fresh_key()
    assert key.tolist() == [5, 0]
    with torch.inference_mode():
        assert ea.fresh_key().tolist() == [5, 2]
    assert ea.fresh_key().tolist() == [5, 3]


def test_seeds_of_any_size():
    assert ea.fresh_key(seed=2**64 - 1).tolist() == [-1, 0]
    assert ea.fresh_key(seed=-1).tolist() == [-1, 0]
    assert ea.fresh_key(seed=2**63).tolist() == [-(2**63), 0]


def test_split_children_differ_from_each_other_and_their_parent():
    key = ea.fresh_key(seed=9)
    children = ea.split(key, 1000)
    assert torch.equal(children, split_reference(key, 1000))
    assert len({tuple(c) for c in children.tolist()}) == 1000
    assert torch.equal(ea.split(key, 3), children[:3])
    assert (children[:, 1] >= 0).all() and (children[:, 1] < 2**62).all()
    x = torch.zeros(1, 4096)
    noise = torch.stack([ops.random_step(x, k, 1.0, clip=False)[0] for k in [key, *children[:20]]])
    correlation = (noise @ noise.T) / 4096
    assert (correlation - torch.eye(21)).abs().max() < 5 / 64


def test_torchs_generators_are_not_drawn_from():
    state = torch.get_rng_state()
    key = ea.fresh_key()
    ops.random_step(torch.rand(2, 3, generator=torch.Generator()), key, 0.1)
    ops.sample_eps(4, key, eps_max=0.1)
    ea.split(key, 2)
    assert torch.equal(state, torch.get_rng_state())
