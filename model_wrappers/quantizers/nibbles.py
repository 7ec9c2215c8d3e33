"""How a library arranges 4-bit codes in memory, found out by packing known codes: its order is no public promise.

The CPU's order even depends on the instructions that torch finds at run time (AVX-512, AVX2, none).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

Pack = Callable[[Tensor], Tensor]
"""Packs codes (rows x columns, uint8, below 16) to any contiguous tensor of half a byte for each code."""


class UnknownOrder(Exception):
    """The codes lie in an order that was not thought of."""


def nibbles(packed: Tensor) -> Tensor:
    """The 4-bit codes of ``packed`` as they lie in memory, the low half of each byte first; 1-D, uint8."""
    flat = packed.contiguous().flatten().view(torch.uint8)
    return torch.stack((flat & 15, flat >> 4), dim=-1).flatten()


def tile_order(pack: Pack, rows: int, columns: int, device: torch.device | str = "cpu") -> Tensor:
    """Which element of a tile of ``rows`` x ``columns`` codes each nibble holds.

    Every element's flat index is packed digit by digit to base 16 and read where it comes out.

    Returns:
        int64, shape (rows * columns,): nibble i holds element ``order[i] // columns, order[i] % columns``.

    Raises:
        UnknownOrder: not every element comes out once.
    """
    index = torch.arange(rows * columns, device=device)
    found = torch.zeros_like(index)
    for shift in range(0, (rows * columns - 1).bit_length(), 4):
        digit = (index >> shift & 15).to(torch.uint8).reshape(rows, columns)
        held = nibbles(pack(digit))
        if held.shape != found.shape:
            raise UnknownOrder
        found |= held.long() << shift
    if not torch.equal(found.sort().values, index):
        raise UnknownOrder
    return found


def block_rows(pack: Pack, candidates: tuple[int, ...] = (16, 32, 64, 128)) -> int:
    """Least number of rows that are packed by themselves, one block after the other.

    Raises:
        UnknownOrder: none of ``candidates`` is.
    """
    generator = torch.Generator().manual_seed(0)
    for rows in candidates:
        codes = torch.randint(0, 16, (2 * rows, 6), dtype=torch.uint8, generator=generator)
        halves = torch.cat([nibbles(pack(part)) for part in codes.reshape(2, rows, -1)])
        if torch.equal(nibbles(pack(codes)), halves):
            return rows
    raise UnknownOrder
