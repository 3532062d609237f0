"""Every option of a training run: which values it takes, and that a message names it."""
import math
import re
from dataclasses import fields

import pytest

from ensadv_fast import cli, train
from ensadv_fast.train import Config
from ensadv_fast.train.config import check_options

TEXT, FLAG, WORD = ["", 3, True], [1, 0, "yes", None], ["best", "", 3, True, math.nan]
NOT_FINITE = [math.nan, math.inf, -math.inf, True, False, "1"]
COUNT = [-1, 1.5, 2.0, *NOT_FINITE]  # where 0 is none of them
POSITIVE_COUNT = [0, *COUNT]
AT_LEAST_0 = [-0.1, -1, *NOT_FINITE]
POSITIVE = [0, 0.0, *AT_LEAST_0]
SHARE = [1.1, 2, *AT_LEAST_0]
SPECS = ["mnist:A", ("mnist:A", 3), ("mnist:A", ""), 3, None]

# What each option refuses. An option that is missing here fails the test below.
BAD = {
    "preset": [*TEXT, "best", None], "data": [*TEXT, None], "size": POSITIVE_COUNT, "augment": [*WORD, None],
    "model": [*TEXT, "D", "mnist:D=d.pt", None], "init": TEXT, "static": SPECS, "held_out": SPECS,
    "eps": [*POSITIVE, None], "epochs": [*POSITIVE_COUNT, None], "source_epochs": [*COUNT, None],
    "batch_size": [*POSITIVE_COUNT, None], "optimizer": [*WORD, None], "lr": [*POSITIVE, None],
    "schedule": [*WORD, None], "warmup": [*AT_LEAST_0, 16, None], "weight_decay": [*AT_LEAST_0, None],
    "decay_all": FLAG, "label_smoothing": [*SHARE, None], "aux": [*AT_LEAST_0, None], "clip": [*AT_LEAST_0, None],
    "ema": [1, 1.0, *SHARE, None], "accumulate": [*POSITIVE_COUNT, None], "nan": [*WORD, None], "attack": WORD,
    "rule": WORD, "step": POSITIVE, "steps": POSITIVE_COUNT, "fraction": [0, 0.0, *SHARE], "mix": WORD,
    "lam": AT_LEAST_0, "eps_dist": WORD, "select": [(0.5, 0.5), *WORD], "crafting": WORD, "crafting_loss": WORD,
    "delay": [1, 1.0, *SHARE], "start_step": COUNT, "alpha": [*SHARE, None], "eval_steps": [*POSITIVE_COUNT, None],
    "eval_batch_size": [*POSITIVE_COUNT, None], "seed": [1.5, 2.0, *NOT_FINITE, None],
    "seeds": [*POSITIVE_COUNT, None], "dtype": [*WORD, "float64", None], "channels_last": FLAG, "compile": FLAG,
    "source_dtype": [*WORD, "int8", None], "download": FLAG, "device": [*WORD, "gpu", "cuda:", "cuda:x", "mps", None],
    "workers": [*COUNT, None], "threads": [*COUNT, None], "save_every": [*COUNT, None],
    "log_every": [*POSITIVE_COUNT, None], "evaluate": FLAG, "keep": [*POSITIVE_COUNT, None], "loaders": [*COUNT, None],
    "max_corrupt": [*SHARE, None], "sync_bn": FLAG, "tensorboard": FLAG, "monitor": [*COUNT, None],
}
# Values at the ends of what options take, which they do take.
GOOD = [{"lam": 0}, {"fraction": 1}, {"fraction": 1e-3}, {"alpha": 0}, {"alpha": 1}, {"delay": 0}, {"ema": 0},
        {"max_corrupt": 1}, {"max_corrupt": 0}, {"seed": -3}, {"workers": 0}, {"save_every": 0}, {"keep": 1},
        {"size": 1}, {"steps": 1}, {"start_step": 0}, {"label_smoothing": 1}, {"source_epochs": 0}, {"eps": 1},
        {"warmup": 15.5}, {"device": "cuda:3"}, {"source_dtype": "float16"}, {"static": ["mnist:A"]}]


def test_every_option_is_checked():
    assert list(BAD) == [f.name for f in fields(Config)]


@pytest.mark.parametrize("name", [f.name for f in fields(Config)])
def test_a_bad_value_names_its_option(name):
    for value in BAD[name]:
        message = "^model: " if value == "D" else rf"^train: {name} must be .*, got {re.escape(repr(value))}"
        with pytest.raises(ValueError, match=message):
            Config(**{name: value})


@pytest.mark.parametrize("option", GOOD, ids=str)
def test_the_ends_are_taken(option):
    Config(**option)


def test_none_leaves_an_option_to_the_preset_alone_where_it_has_one():
    optional = {f.name for f in fields(Config) if None not in BAD[f.name]}
    assert optional == {f.name for f in fields(Config) if f.default is None}
    assert Config(**dict.fromkeys(optional)) == Config()


def test_one_option_is_checked_without_the_others():
    check_options({"warmup": 100.0, "preset": "a run by its name"})  # what they are together is not its question
    with pytest.raises(ValueError, match="train: keep must be an integer >= 1, got 0"):
        check_options({"keep": 0})


def test_options_that_do_not_fit_together():
    for options, message in (({"warmup": 3.0, "epochs": 3}, r"warmup must be < epochs \(3\), got 3.0"),
                             ({"static": ()}, "static must name a source or more for preset tramer, got none"),
                             ({"preset": "pgd-at", "lam": 0}, "lam must be > 0 where all samples")):
        with pytest.raises(ValueError, match=message):
            Config(**options)


@pytest.mark.parametrize("argv, message", [
    (["--device", "gpu"], "device must be auto, cpu, cuda or cuda:N, got 'gpu'"),
    (["--lam", "nan"], "lam must be a finite number >= 0, got nan"),
    (["--preset", "pgd-at", "--lam", "0"], "lam must be > 0 where all samples"),
    (["--max-corrupt", "2"], "max_corrupt must be a finite number >= 0 and <= 1, got 2.0"),
    (["--threads", "-1"], "threads must be an integer >= 0, got -1"),
])
def test_the_command_says_it_in_a_line(argv, message, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["train", *argv]) == 1
    err = capsys.readouterr().err
    assert message in err and "Traceback" not in err and not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["[]", "3", "null", "{", "", "[" * 100_000, '{"a":' * 100_000, '{"static": {}}',
                                  '{"no_such_option": 1}', '{"keep": 0}'], ids=lambda text: text[:20])
def test_a_damaged_config_is_named(text, tmp_path):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(ValueError, match="config.json is corrupt or of another version"):
        train.load_config(tmp_path)
