"""Whether the data of a tensor can be looked at."""

from __future__ import annotations

import torch
from torch import Tensor

from softcap_runtime.compat.torch_transforms import in_transform


def data_is_readable(tensor: Tensor) -> bool:
    """Whether the data can be read without waiting: a CPU tensor with data, outside of tracing."""
    return tensor.device.type == "cpu" and data_is_there(tensor)


def data_is_there(tensor: Tensor) -> bool:
    """Whether there are data to read (a fake tensor has none), outside of tracing.

    False for tensors of a torch.func transform: one may stand for many, with different data.
    """
    own = type(tensor) in (Tensor, torch.nn.Parameter)
    traced = torch.compiler.is_compiling() or torch.jit.is_tracing()
    return own and not traced and not in_transform(tensor)
