"""What a forward pass keeps for the backward pass, whoever keeps it. Nothing here uses ensadv_fast."""
import gc

from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class _Storages(TorchDispatchMode):
    """The storages of all results, by address while they live."""

    def __init__(self):
        super().__init__()
        self.seen: dict[int, tuple[StorageWeakRef, int]] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for t in tree_leaves(result):
            if isinstance(t, Tensor):
                storage = t.untyped_storage()
                self.seen[storage._cdata] = StorageWeakRef(storage), storage.nbytes()
        return result


def kept_bytes(net: nn.Module, forward, x: Tensor) -> int:
    """Bytes that forward(x) leaves alive until the backward pass: saved tensors, attributes of autograd nodes,
    closures, each storage once; but for x, the net's parameters and buffers, and the result itself."""
    x = x.detach().requires_grad_()
    forward(x)  # what is made once, and is no part of a pass
    with _Storages() as storages:
        logits = forward(x)
    gc.collect()
    known = {t.untyped_storage()._cdata for t in (x, logits, *net.parameters(), *net.buffers())}
    return sum(size for address, (ref, size) in storages.seen.items() if not ref.expired() and address not in known)
