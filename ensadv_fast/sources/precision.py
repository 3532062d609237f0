"""Which dtype is fast for a network on this machine."""
import itertools

import torch
from torch import nn
from torch.nn.modules.conv import _ConvNd

# Measured with timm: MobileNets and EfficientNet-B0 (477 to 1069) are slower in bfloat16, ConvNeXts (from 1949) faster.
ENOUGH_DENSE = 1500


def fast_dtype(device: torch.device, model: nn.Module | None = None) -> torch.dtype:
    """bfloat16 where this hardware runs the model faster in it, else float32.

    On the CPU, depthwise convolutions are slower in bfloat16, and dense layers faster: a model with depthwise channels
    is run in bfloat16 where it has enough dense work for each of them. Complex tensors have no 16-bit partner.
    """
    if model is not None and any(t.is_complex() for t in itertools.chain(model.parameters(), model.buffers())):
        return torch.float32
    if device.type == "cuda":
        fast = torch.cuda.get_device_capability(device) >= (8, 0)
    else:
        fast = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        fast = fast and (model is None or _dense_work(model) >= ENOUGH_DENSE)
    return torch.bfloat16 if fast else torch.float32


def _dense_work(model: nn.Module) -> float:
    """Weights of dense layers per channel of depthwise convolutions: about the ratio of their work at each pixel."""
    convs = [m for m in model.modules() if isinstance(m, _ConvNd)]
    depthwise = [m for m in convs if m.groups == m.in_channels > 1]
    dense = [m for m in model.modules() if isinstance(m, nn.Linear)] + [m for m in convs if m.groups == 1]
    channels = sum(m.out_channels for m in depthwise)
    return sum(m.weight.numel() for m in dense) / channels if channels else float("inf")
