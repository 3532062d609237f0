"""The benchmark verifies before it times, and --compare sees a regression. No time is asserted."""
import copy
import json

import pytest
import torch

from ensadv_fast import bench, cli
from ensadv_fast.testing import CASES, Inputs

CASE = {case.name: case for case in CASES}


def test_every_eager_expression_belongs_to_a_case_and_computes_it():
    assert set(bench.EAGER) <= set(CASE)
    for name in bench.EAGER:
        args, kw = bench.finite_arguments(CASE[name], Inputs((8, 3, 20, 20)))
        bench.verify(CASE[name], args, kw, bench.contenders(CASE[name], args, kw, compiled=False))


def test_a_wrong_contender_is_an_error():
    case = CASE["sign_step-free"]
    args, kw = bench.finite_arguments(case, Inputs((8, 3, 20, 20)))
    with pytest.raises(AssertionError, match="sign_step-free: eager differs from the reference by"):
        bench.verify(case, args, kw, {"eager": lambda: bench.EAGER["sign_step-free"](*args) + 1e-3})
    noisy = CASE["random_step-rademacher"]
    args, kw = bench.finite_arguments(noisy, Inputs((8, 3, 20, 20)))
    with pytest.raises(AssertionError, match="adds noise of another size"):
        bench.verify(noisy, args, kw, {"eager": lambda: torch.clamp(args[0] + 0.2 * torch.randn_like(args[0]), 0, 1)})


def test_the_command_writes_stamped_results_and_compares(tmp_path, capsys):
    out = tmp_path / "results" / "new.json"
    command = ["bench", "--device", "cpu", "--sizes", "mnist", "--dtypes", "float32", "--cases", "sign_step-free",
               "--seconds", "0.001", "--no-compile"]
    assert cli.main([*command, "--out", str(out)]) == 0
    result = json.loads(out.read_text())
    assert {"commit", "time", "build", "runtime", "machine", "load_before", "load_after"} <= result.keys()
    (row,) = result["rows"]
    assert set(row["contenders"]) == {"ours", "ours out=", "eager", "copy"}
    assert all(c["ms"] > 0 for c in row["contenders"].values())

    old = copy.deepcopy(result)
    for cell in old["rows"][0]["contenders"].values():
        cell["ms"] /= 1e6
    old["rows"][0]["contenders"]["copy"]["ms"] = 1e9
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert cli.main([*command, "--compare", str(tmp_path / "old.json")]) == 1
    assert "slower: sign_step-free mnist float32 contiguous ours" in capsys.readouterr().err
    assert bench.regressions(result, result, 1.25) == []
