"""A user's program that says of every value what type it has. tests/test_types.py checks and runs it."""
import torch
from torch import Tensor, nn
from typing_extensions import assert_type

import ensadv_fast as ea
from ensadv_fast import compat, evaluate, ops
from ensadv_fast.compat.torchattacks import PGD

model = nn.Sequential(nn.Flatten(), nn.Linear(3 * 4 * 4, 5))
x, y, eps = torch.rand(4, 3, 4, 4), torch.tensor([0, 1, 2, 3]), torch.full((4,), 4 / 255)

# Attacks: one overload for each thing that return_info may be.
attack = ea.fgsm(8 / 255)
assert_type(attack, ea.Attack)
assert_type(attack(model, x, y), Tensor)
assert_type(attack(model, x, y, eps=eps, key=ea.fresh_key("cpu", 0), return_info=False), Tensor)
result = attack(model, x, return_info=True)
assert_type(result, ea.AttackResult)
assert_type(result.success, Tensor)
assert_type(attack(model, x, y, return_info=len(y) > 3), Tensor | ea.AttackResult)
assert_type(ea.pgd(eps=0.1, steps=2, transforms=[ea.ti(size=3)])(model, x, y), Tensor)
assert_type(ea.mifgsm(0.1, rule="least_likely", targeted=True, loss="cw", kappa=1.0, lo=0.0, hi=1.0), ea.Attack)
assert_type(ea.cw_linf(max_iterations=2, learning_rate=0.1)(model, x, y), Tensor)

# Sources are taken wherever modules are.
source = ea.Source(model, mean=[0.5, 0.5, 0.5], std=(0.2, 0.2, 0.2))
ensemble = ea.Ensemble([source, model], fuse="probs")
assert_type(attack(ensemble, x, y), Tensor)
assert_type(ensemble.logits(x), Tensor)
assert_type(source.input_grad(x, y), ea.InputGrad)
assert_type(source.input_grad(x, y).grad, Tensor)

# Training.
adversary = ea.EnsembleAdversary(model, static=[source], attack=attack, eps_dist=0.1)
batch = adversary(x, y)
assert_type(batch, ea.AdversarialBatch)
assert_type(batch.x, Tensor)
assert_type(batch.is_adv, Tensor)
assert_type(batch.source, int)
assert_type(ea.mixed_cross_entropy(model(batch.x), batch.y, batch.is_adv), Tensor)
for each in adversary.stream([(x, y), (x, y)]):
    assert_type(each, ea.AdversarialBatch)

# Ops and evaluation.
assert_type(ops.sign_step(x, torch.randn_like(x), 0.1, center=x, eps=eps), Tensor)
assert_type(ops.logit_grad(model(x), y).loss, Tensor)
matrix = evaluate.transfer_matrix({"ours": model}, {"other": source}, {"fgsm": attack}, [(x, y)])
assert_type(matrix.error("fgsm", "other", "ours"), float)
assert_type(evaluate.quick(model, x, y, 0.1), evaluate.TransferMatrix)

# Other libraries' interfaces.
theirs = PGD(model, eps=8 / 255, steps=2)
assert_type(theirs(x, y), Tensor)
assert_type(theirs.get_mode(), str)
with compat.precision("fast") as chosen:
    assert_type(chosen, compat.precision)
    assert_type(compat.current_precision(), str)
