"""Integer codes of 2 to 8 bits as bytes, without a gap.

A row is a little-endian bit stream: code i occupies bits ``bits*i`` to ``bits*(i+1) - 1``, and bit k is bit ``k % 8``
of byte ``k // 8``. So 8-bit codes are bytes, two 4-bit or four 2-bit codes share one, eight 3-bit codes fill three.
Every row begins at a byte of its own and is filled up with zero codes to whole blocks.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor


def block(bits: int) -> tuple[int, int]:
    """(codes, bytes) of the smallest run of codes that ends at a byte's end: (1, 1), (2, 1), (4, 1), (8, 3), …"""
    if not 2 <= bits <= 8:
        raise ValueError(f"packing: bits must be 2 to 8, got {bits}")
    common = math.gcd(bits, 8)
    return 8 // common, bits // common


def row_bytes(n_codes: int, bits: int) -> int:
    """Bytes of one packed row of ``n_codes`` codes."""
    per_block, block_bytes = block(bits)
    return -(-n_codes // per_block) * block_bytes


def _word_dtype(block_bytes: int) -> torch.dtype:
    return torch.uint8 if block_bytes == 1 else torch.int32 if block_bytes == 3 else torch.int64


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack ``codes`` (rows x n, uint8, each below ``2**bits``) to uint8 of shape (rows, ``row_bytes(n, bits)``)."""
    rows, n = codes.shape
    per_block, block_bytes = block(bits)
    if fill := -n % per_block:
        codes = torch.nn.functional.pad(codes, (0, fill))
    blocks = codes.reshape(rows, -1, per_block)
    dtype = _word_dtype(block_bytes)
    word = blocks[..., 0].to(dtype, copy=True)
    for i in range(1, per_block):
        word |= blocks[..., i].to(dtype) << (bits * i)
    if block_bytes == 1:
        return word.contiguous()
    return torch.stack([(word >> (8 * k) & 0xFF).to(torch.uint8) for k in range(block_bytes)], dim=-1).reshape(rows, -1)


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Inverse of ``pack``: uint8 codes of shape (rows, n)."""
    per_block, block_bytes = block(bits)
    if bits == 8:
        return packed[:, :n]
    blocks = packed.reshape(packed.shape[0], -1, block_bytes)
    dtype = _word_dtype(block_bytes)
    word = blocks[..., 0].to(dtype)
    for k in range(1, block_bytes):
        word |= blocks[..., k].to(dtype) << (8 * k)
    mask = (1 << bits) - 1
    codes = torch.stack([(word >> (bits * i) & mask).to(torch.uint8) for i in range(per_block)], dim=-1)
    return codes.reshape(packed.shape[0], -1)[:, :n]
