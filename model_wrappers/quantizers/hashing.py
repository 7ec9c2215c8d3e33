"""Hashes of tensors: equal bytes give equal hashes on every device and in every process."""

from __future__ import annotations

import hashlib

import torch
from torch import Tensor


def tensor_hash(tensor: Tensor) -> str:
    """blake2 hex (16 bytes) of the tensor's elements, row by row, in its own dtype."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    return hashlib.blake2b(flat.view(torch.uint8).numpy().data, digest_size=16).hexdigest()
