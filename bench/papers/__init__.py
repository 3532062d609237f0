"""The tables of two papers, made again: `python bench/papers/run.py TABLE`.

(1) Tramer et al., "Ensemble Adversarial Training: Attacks and Defenses", ICLR 2018; (2) Kurakin, Goodfellow, Bengio,
"Adversarial Machine Learning at Scale", ICLR 2017.
"""
