"""train/claims.py: the papers' claims go by intervals of paired differences, over images and seeds."""
import json
import math

import numpy as np
import pytest

from ensadv_fast.evaluate import TransferMatrix
from ensadv_fast.train.claims import claims_of, difference
from ensadv_fast.train.results import results_of, text


def bits(errors, n):
    return np.arange(n) < errors


def matrix(n, adv, ens, adv_fgsm=5, adv_rand=5):
    """Errors under transfer from A of each seed of D_adv and D_ens, and white-box errors of D_adv."""
    wrong, clean = {}, {}
    for name, seeds in (("D_adv", adv), ("D_ens", ens)):
        for seed, errors in enumerate(seeds):
            t = f"{name}-seed{seed}"
            clean[t] = bits(0, n)
            for attack, own in (("fgsm", adv_fgsm), ("rand_fgsm", adv_rand)):
                wrong[attack, "A", t], wrong[attack, t, t] = bits(errors, n), bits(own, n)
    return TransferMatrix(wrong, clean)


def claims(*args):
    return [c["holds"] for c in claims_of(matrix(*args), {"D_adv": range(len(args[1])), "D_ens": range(len(args[2]))},
                                          ["A"])]


def test_a_claim_holds_or_fails_where_the_interval_leaves_no_doubt():
    assert claims(1000, [500], [300], 100, 300) == [True, True]
    assert claims(1000, [300], [500], 300, 100) == [False, False]
    assert claims(40, [3], [2], 2, 3) == [None, None]  # one image of 40
    assert claims(1000, [300], [300]) == [None, None]  # no difference at all
    assert claims(1000, [300, 700], [250, 300], 100, 300) == [None, True]  # two seeds that do not agree
    assert claims(1000, [500, 510, 505], [300, 310, 290]) == [True, None]


def test_the_interval_is_that_of_its_definition():
    a, b = bits(30, 100), bits(20, 100)
    value, low, high = difference([a], [b])
    variance = (10 + 2) / 102 - (10 / 102) ** 2
    half = 1.959963984540054 * math.sqrt(variance / 102)
    assert (value, low, high) == pytest.approx((0.1, 0.1 - half, 0.1 + half))
    value, low, high = difference([a, a], [b, bits(26, 100)])
    assert value == pytest.approx(0.07) and high - value > 12.7 * 0.03 * 0.99


def test_results_say_the_claims_and_print_them():
    body = results_of(matrix(1000, [500], [300], 100, 300), "d", 0.3, {"A": "held_out"}, {"D_adv": [0], "D_ens": [0]},
                      {"total": 1.0, "workers": 1, "threads_per_worker": 1, "training": 1.0, "evaluation": 1.0,
                       "train": {}})
    assert body["images"] == 1000 and json.loads(json.dumps(body["claims"])) == body["claims"]
    assert "adversarial training: holds (maximum 50.0 % → 30.0 %; difference 20.0 points, 17." in text(body)
