"""Errors of targets under attacks crafted on sources: white-box and black-box (transfer).

`transfer_matrix` crafts and shows, in one pass over a loader; `TransferMatrix` keeps bits per example and has every
measure; `quick` is that for one model in one call; `black_box` summarises held-out sources; `accuracy_curve` goes over
eps; `save_set` and `load_set` keep adversarial sets for later targets.
"""
from .curves import Curve, Curves, accuracy_curve, accuracy_curves
from .matrix import BlackBox, TransferMatrix, black_box
from .one_call import quick
from .sets import AdversarialSet, find_sets, load_set
from .statistics import Rate, mcnemar, ties, two_proportions, wilson
from .transfer import save_set, transfer_matrix

__all__ = [
    "AdversarialSet", "BlackBox", "Curve", "Curves", "Rate", "TransferMatrix", "accuracy_curve", "accuracy_curves",
    "black_box", "find_sets", "load_set", "mcnemar", "quick", "save_set", "ties", "transfer_matrix", "two_proportions",
    "wilson",
]
