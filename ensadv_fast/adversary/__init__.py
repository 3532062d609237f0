"""Adversarial batches for anyone's training loop, and the loss of a mixed batch."""
from .adversary import EnsembleAdversary
from .batches import AdversarialBatch, Counts, EpsDistribution, Part
from .loss import mixed_cross_entropy

__all__ = ["AdversarialBatch", "Counts", "EnsembleAdversary", "EpsDistribution", "Part", "mixed_cross_entropy"]
