"""Options of the long benchmark, and what its JSON is stamped with."""
import pytest
import torch

from ensadv_fast.bench.stamp import stamp

BEFORE = pytest.StashKey[dict]()


def pytest_addoption(parser):
    parser.addoption("--threads", type=int, default=None, help="of PyTorch on the CPU (default: its own choice)")


def pytest_configure(config):
    if config.getoption("--threads") is not None:
        torch.set_num_threads(config.getoption("--threads"))
    # Compilers and peers warn about themselves; a benchmark is not the place where that is an error.
    config.addinivalue_line("filterwarnings", "ignore")
    config.stash[BEFORE] = stamp()


def pytest_benchmark_update_json(config, benchmarks, output_json):
    """Our stamp in place of pytest-benchmark's description of the machine, which names host and user."""
    after = stamp()
    output_json["stamp"] = {**config.stash[BEFORE], "threads": torch.get_num_threads(),
                            "load_after": after["load_before"]}
    output_json["machine_info"] = {}
    output_json["commit_info"] = {"id": after["commit"]}
    for benchmark in output_json["benchmarks"]:
        benchmark["stats"].pop("data", None)  # every round of every contender: megabytes that nothing reads
        del benchmark["options"]
