"""Matrix products with 4-bit weights that stay 4 bits in memory: torch's int4 kernels, on the CPU and on CUDA.

Both ("tinygemm") compute with ``(code - 8) * s + z`` for a pair (s, z) of bfloat16 in each group. Ours are finer, so
the kernel's weight differs from ``QuantizedWeight.dequantize``: by at most ``2**-8 * (|code - 8| + |zero|) * scale``,
1/16 of a step where zero-points lie on the grid. In the mean that is 0.003 of a step (RTN of normal weights), no more
than rounding the weight to bfloat16 moves it; quantizing moved it by 0.25. ``Int4Kernel.scale`` and ``zero`` give the
exact ones back all the same: what bfloat16 drops of them is held beside the pairs, and nothing twice.
"""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.quantizers.nibbles import UnknownOrder, block_rows, nibbles, tile_order
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

if TYPE_CHECKING:
    from bitquake.model_wrappers.quantizers.linear import LinearLayout

GROUPS = (256, 128, 64, 32)
"""Group sizes of torch's kernels; a longer group of ours is several of theirs with the same pair."""

_CHUNK = 1 << 18  # weights that are repacked or de-quantized at a time on the CPU
_CUDA_CHUNK = 1 << 24
_LOW_NIBBLES = 0x0F0F0F0F0F0F0F0F  # of eight bytes
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32}


class Int4Kernel(nn.Module):
    """One layer's 4-bit weight in a kernel's own layout, which is the only copy of the codes.

    Few rows of ``x`` (decoding) go through the int4 kernel. For many (prefill), and where a gradient is wanted, the
    weight is de-quantized exactly as ``QuantizedWeight.dequantize`` does it, a part at a time, for a bfloat16 product.

    It knows nothing of ``input_scale``: give ``matmul`` the scaled input. It belongs to one device and dtype: make it
    anew rather than move it. Its buffers are in no state dict.
    """

    name: ClassVar[str]
    many_rows: ClassVar[int]
    """From so many rows of ``x`` on, de-quantizing is faster than the int4 kernel."""

    packed: Tensor
    pairs: Tensor
    scale_rest: Tensor | None
    zero_rest: Tensor | None
    order: Tensor | None

    @staticmethod
    def suits(
        layout: LinearLayout, in_features: int, out_features: int, dtype: torch.dtype, device: torch.device | str
    ) -> str | None:
        """None when there is a kernel for such a layer, else why not."""
        kind = _KINDS.get(torch.device(device).type)
        if layout.bits != 4:
            return f"torch has a 4-bit kernel, not one of {layout.bits} bits"
        if kind is None:
            return f"torch has no int4 kernel for {torch.device(device).type}"
        if dtype != torch.bfloat16:
            return f"torch's int4 kernel is fast in bfloat16 only, not in {str(dtype).removeprefix('torch.')}"
        if in_features % layout.group_size or _kernel_group(layout.group_size) is None:
            return (
                f"torch's int4 kernel needs whole groups of a multiple of 32, not groups of {layout.group_size} in "
                f"{in_features} input features"
            )
        try:
            return kind._suits_shape(in_features, out_features, torch.device(device))
        except UnknownOrder:
            return "this build of torch packs 4-bit codes in an order that is not understood"

    @staticmethod
    def from_weight(weight: QuantizedWeight, dtype: torch.dtype = torch.bfloat16) -> Int4Kernel:
        """Make the kernel for the device of ``weight``; ``suits`` must have said None.

        Raises:
            ValueError: there is none.
            RuntimeError: the packed codes do not read back as they were.
        """
        device = weight.codes.device
        kind = _KINDS.get(device.type)
        if kind is None or dtype != torch.bfloat16 or weight.bits != 4:
            raise ValueError(f"Int4Kernel: no kernel for {weight.bits} bits in {dtype} on {device}")
        return kind(weight)

    @staticmethod
    def name_on(device: torch.device) -> str:
        """Name of the kernel of a kind of device, or that there is none."""
        kind = _KINDS.get(device.type)
        return f"no int4 kernel on {device.type}" if kind is None else kind.name

    def __init__(self, weight: QuantizedWeight) -> None:
        super().__init__()
        self.out_features, self.in_features = weight.codes.shape
        group = _kernel_group(weight.group_size)
        if group is None or self.in_features % weight.group_size:
            raise ValueError(f"Int4Kernel: no kernel for groups of {weight.group_size} in {self.in_features} features")
        self.group = group
        self.repeats = self.in_features // group if weight.per_tensor else weight.group_size // group
        self.scale_dtype, self.zero_dtype = weight.scale.dtype, None if weight.zero is None else weight.zero.dtype
        scale = weight.scale.t()
        offset = torch.zeros_like(scale) if weight.zero is None else -weight.zero.t().float() * scale.float()
        stored = torch.stack((scale.to(torch.bfloat16), offset.to(torch.bfloat16)), dim=-1)
        self.per_tensor = weight.per_tensor
        columns = stored.expand(-1, self.out_features, -1) if weight.per_tensor else stored
        buffers = {
            "packed": self._pack(weight.codes),
            "pairs": columns.repeat_interleave(self.repeats, dim=0).contiguous(),
            "scale_rest": _rest(scale, self._rough_scale(stored)),
            "zero_rest": None,
            "order": weight.order,
        }
        if weight.zero is not None:
            buffers["zero_rest"] = _rest(weight.zero.t(), self._rough_zero(stored, scale))
        for name, value in buffers.items():
            self.register_buffer(name, value, persistent=False)
        exact = torch.equal(self.codes(), weight.codes) and torch.equal(self.scale(), weight.scale)
        zero = self.zero()
        if not exact or (zero is not None and weight.zero is not None and not torch.equal(zero, weight.zero)):
            raise RuntimeError("Int4Kernel: torch's packed codes do not read back as they were; use no kernel here")

    # Scales and zero-points: (groups, out_features) inside, as the kernels want their pairs.

    def _stored_pairs(self) -> Tensor:
        pairs = self.pairs[:: self.repeats]
        return pairs[:, :1] if self.per_tensor else pairs

    def _rough_scale(self, pairs: Tensor) -> Tensor:
        return pairs[..., 0].to(self.scale_dtype)

    def _rough_zero(self, pairs: Tensor, scale: Tensor) -> Tensor:
        assert self.zero_dtype is not None
        zero = (-pairs[..., 1].float() / scale.float()).nan_to_num_(0.0, 0.0, 0.0)
        return zero.to(self.zero_dtype) if self.zero_dtype.is_floating_point else _to_int8(zero)

    def _scale_of_groups(self) -> Tensor:
        return _restored(self._rough_scale(self._stored_pairs()), self.scale_rest)

    def _zero_of_groups(self, scale: Tensor) -> Tensor | None:
        if self.zero_dtype is None:
            return None
        return _restored(self._rough_zero(self._stored_pairs(), scale), self.zero_rest)

    def _float_grid(self) -> tuple[Tensor, Tensor | None]:
        """Exact scale and zero in float32, each (groups, out_features)."""
        scale = self._scale_of_groups()
        zero = self._zero_of_groups(scale)
        rows = self.out_features
        return scale.float().expand(-1, rows), None if zero is None else zero.float().expand(-1, rows)

    def scale(self) -> Tensor:
        """Exactly ``QuantizedWeight.scale``."""
        return self._scale_of_groups().t().contiguous()

    def zero(self) -> Tensor | None:
        """Exactly ``QuantizedWeight.zero``."""
        zero = self._zero_of_groups(self._scale_of_groups())
        return None if zero is None else zero.t().contiguous()

    def codes(self) -> Tensor:
        """Exactly ``QuantizedWeight.codes``: uint8, shape (out_features, in_features), stored columns."""
        raise NotImplementedError

    @property
    def held_bytes(self) -> int:
        """Bytes of codes, pairs, and what makes them exact (``order`` belongs to the layer)."""
        return sum(t.nbytes for t in (self.packed, self.pairs, self.scale_rest, self.zero_rest) if t is not None)

    def matmul(self, x: Tensor) -> Tensor:
        """``x @ weight.T``; x: bfloat16, shape (..., in_features), features in the model's order."""
        rows = x.reshape(-1, self.in_features)
        if self.order is not None:
            rows = rows.index_select(1, self.order)
        wants_gradient = torch.is_grad_enabled() and x.requires_grad  # the int4 operators have none
        if len(rows) < self.many_rows and not wants_gradient:
            y = self._few(rows.contiguous())
        else:
            y = self._many(rows)
        return y.reshape(*x.shape[:-1], self.out_features)

    forward = matmul

    def kernel_weight(self) -> Tensor:
        """The weight that the int4 kernel computes with, float32, stored columns: to compare, not to compute with."""
        scale, offset = (self.pairs[..., i].float().t().repeat_interleave(self.group, dim=1) for i in (0, 1))
        return torch.addcmul(offset, self.codes().float() - 8, scale)

    @classmethod
    def _suits_shape(cls, in_features: int, out_features: int, device: torch.device) -> str | None:
        raise NotImplementedError

    def _pack(self, codes: Tensor) -> Tensor:
        raise NotImplementedError

    def _few(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def _many(self, rows: Tensor) -> Tensor:
        raise NotImplementedError

    def extra_repr(self) -> str:
        return f"{self.in_features}, {self.out_features}, {self.name}"


def _kernel_group(group_size: int) -> int | None:
    return next((size for size in GROUPS if group_size % size == 0), None)


def _to_int8(values: Tensor) -> Tensor:
    return values.round_().clamp_(-128, 127).to(torch.int8)


def _rest(exact: Tensor, rough: Tensor) -> Tensor | None:
    """What turns ``rough`` into ``exact``, in units of the last place: the narrowest integers that hold it."""
    integer = _INTEGER[exact.dtype.itemsize]
    rest = exact.contiguous().view(integer) - rough.contiguous().view(integer)  # wraps around, and back again
    low, high = (int(value) for value in rest.aminmax())
    if low == high == 0:
        return None
    return rest.to(
        next(kind for kind in _INTEGER.values() if torch.iinfo(kind).min <= low <= high <= torch.iinfo(kind).max)
    )


def _restored(rough: Tensor, rest: Tensor | None) -> Tensor:
    if rest is None:
        return rough
    integer = _INTEGER[rough.dtype.itemsize]
    return (rough.contiguous().view(integer) + rest.to(integer)).view(rough.dtype)


class CpuInt4(Int4Kernel):
    """``_weight_int4pack_mm_for_cpu``: blocks of rows (64 with AVX-512), in each a column after the other.

    De-quantizing and a bfloat16 product overtake it between 64 rows (large matrices) and 128 (small ones)
    (benchmarks/decode.py shows both).
    """

    many_rows = 96
    name = (
        f"torch int4 on the CPU below {many_rows} rows (scales and zero-points rounded to bfloat16), "
        "from there on de-quantized to bfloat16"
    )

    @classmethod
    def _suits_shape(cls, in_features: int, out_features: int, device: torch.device) -> str | None:
        if out_features % 16:
            return f"torch's int4 kernel for the CPU needs a multiple of 16 output features, not {out_features}"
        for rows in {_cpu_block(), out_features % _cpu_block()} - {0}:
            _cpu_rows(rows)
        return None

    def _blocks(self) -> list[tuple[int, int]]:
        """(first row, rows) of each block."""
        block = _cpu_block()
        return [(start, min(block, self.out_features - start)) for start in range(0, self.out_features, block)]

    def _pack(self, codes: Tensor) -> Tensor:
        block = self._blocks()[0][1]
        step = block * max(1, _CHUNK // (block * self.in_features))
        return torch.cat([_cpu_pack(codes[start : start + step]) for start in range(0, self.out_features, step)])

    def _planes(self, start: int, rows: int, blocks: int, out: Tensor) -> Tensor:
        """Codes of some blocks, as numbers, shape (blocks, in_features, rows), rows in the order of ``_cpu_rows``."""
        # two codes to a byte, so the bytes of a row count half; eight bytes at a time
        words = self.packed.view(-1)[start * self.in_features // 2 :][: blocks * rows * self.in_features // 2]
        words = words.view(torch.int64)
        low, high = words & _LOW_NIBBLES, (words >> 4) & _LOW_NIBBLES
        shape, half = (blocks, self.in_features, rows // 2), rows // 2
        out[..., :half] = low.view(torch.uint8).view(shape)
        out[..., half:] = high.view(torch.uint8).view(shape)
        return out

    def codes(self) -> Tensor:
        codes = torch.empty((self.out_features, self.in_features), dtype=torch.uint8)
        for start, rows in self._blocks():
            planes = torch.empty((1, self.in_features, rows), dtype=torch.uint8)
            codes[start + _cpu_rows(rows)] = self._planes(start, rows, 1, planes)[0].t()
        return codes

    def _few(self, rows: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm_for_cpu(rows, self.packed, self.group, self.pairs)
        return y

    def _many(self, rows: Tensor) -> Tensor:
        scale, zero = self._float_grid()
        size = self.in_features // len(scale)  # of our groups, which may be several of the kernel's
        keep = torch.is_grad_enabled() and rows.requires_grad  # the backward pass needs each part of the weight
        parts: list[Tensor] = []
        values = weight = torch.empty(0)
        blocks = self._blocks()
        together = max(1, _CHUNK // (blocks[0][1] * self.in_features))
        first = 0
        while first < len(blocks):
            start, count = blocks[first]
            n = sum(1 for _, same in blocks[first : first + together] if same == count)
            part, order, shape = slice(start, start + n * count), _cpu_rows(count), (n, self.in_features, count)
            if values.shape != shape:  # fresh memory for each part would cost a quarter of the time
                values = torch.empty(shape)
            if keep or weight.shape != shape:
                weight = torch.empty(shape, dtype=torch.bfloat16)
            grouped = self._planes(start, count, n, values).view(n, -1, size, count)
            grouped -= 8.0
            if zero is not None:
                grouped -= _by_block(zero[:, part], n, order)
            grouped *= _by_block(scale[:, part], n, order)
            weight.copy_(values)
            back = torch.argsort(order)
            products = (rows @ matrix for matrix in weight)
            parts += products if _is_sorted(count) else (y.index_select(1, back) for y in products)
            first += n
        return torch.cat(parts, dim=1)


def _by_block(per_row: Tensor, blocks: int, order: Tensor) -> Tensor:
    """(groups, blocks * rows) -> (blocks, groups, 1, rows), rows in ``order``."""
    return per_row.reshape(len(per_row), blocks, -1)[..., order].transpose(0, 1).unsqueeze(2)


def _cpu_pack(codes: Tensor) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack_for_cpu(codes.to(torch.int32), 1)
    return packed


@cache
def _cpu_block() -> int:
    """Rows of a block.

    Raises:
        UnknownOrder: there are no such blocks.
    """
    return block_rows(_cpu_pack)


@cache
def _cpu_rows(rows: int) -> Tensor:
    """Row of each code of one column in a block of ``rows``: the low halves of its bytes, then the high ones.

    Raises:
        UnknownOrder: a block is not column after column, each in the same order.
    """
    columns = 4
    order = tile_order(_cpu_pack, rows, columns).view(columns, rows)
    row = order[0] // columns
    if not torch.equal(order, row * columns + torch.arange(columns)[:, None]):
        raise UnknownOrder
    return torch.cat((row[::2], row[1::2]))


@cache
def _is_sorted(rows: int) -> bool:
    return torch.equal(_cpu_rows(rows), torch.arange(rows))


class CudaInt4(Int4Kernel):
    """``_weight_int4pack_mm``: tiles of 8 rows by up to 128 columns in the order of the tensor cores' fragments.

    torchao's table for an A6000 (4096 x 4096, torchao/prototype/hqq/README.md) has tinygemm and de-quantizing level at
    128 rows; benchmarks/decode.py measures both on the card at hand. Nothing here waits for the device after
    construction, so that it can go into a CUDA graph.
    """

    many_rows = 128
    back: Tensor
    name = (
        f"torch tinygemm int4 on CUDA below {many_rows} rows (scales and zero-points rounded to bfloat16), "
        "from there on de-quantized to bfloat16"
    )

    @classmethod
    def _suits_shape(cls, in_features: int, out_features: int, device: torch.device) -> str | None:
        if torch.version.hip is not None or torch.cuda.get_device_capability(device) < (8, 0):
            return "torch's int4 kernel for CUDA needs compute capability 8.0 (Ampere) or later"
        if out_features % 8:
            return f"torch's int4 kernel for CUDA needs a multiple of 8 output features, not {out_features}"
        _cuda_back(_inner_tiles(in_features), device)
        return None

    def _pack(self, codes: Tensor) -> Tensor:
        inner = _inner_tiles(self.in_features)
        self.register_buffer("back", _cuda_back(inner, codes.device), persistent=False)  # one for all layers
        return _cuda_pack(codes, inner)

    def _rows_of_codes(self, rows: slice) -> Tensor:
        tiles = self.packed[rows.start // 8 : rows.stop // 8]
        elements = nibbles(tiles).view(len(tiles), -1, len(self.back))[..., self.back]
        return elements.view(len(tiles), -1, 8, len(self.back) // 8).transpose(1, 2).reshape(-1, self.in_features)

    def codes(self) -> Tensor:
        return self._rows_of_codes(slice(0, self.out_features))

    def _few(self, rows: Tensor) -> Tensor:
        y: Tensor = torch.ops.aten._weight_int4pack_mm(rows, self.packed, self.group, self.pairs)
        return y

    def _many(self, rows: Tensor) -> Tensor:
        scale, zero = self._float_grid()
        step = 8 * max(1, _CUDA_CHUNK // (8 * self.in_features))
        parts = []
        for start in range(0, self.out_features, step):
            part = slice(start, min(start + step, self.out_features))
            values = self._rows_of_codes(part).float().view(part.stop - start, len(scale), -1) - 8.0
            if zero is not None:
                values = values - zero[:, part].t().unsqueeze(-1)
            weight = (values * scale[:, part].t().unsqueeze(-1)).to(torch.bfloat16).view(-1, self.in_features)
            parts.append(functional.linear(rows, weight))
        return torch.cat(parts, dim=1)


def _inner_tiles(in_features: int) -> int:
    """Tiles of 16 columns that are packed together: 8, or what divides the row."""
    return next(inner for inner in (8, 4, 2) if in_features % (16 * inner) == 0)


def _cuda_pack(codes: Tensor, inner: int) -> Tensor:
    packed: Tensor = torch.ops.aten._convert_weight_to_int4pack(codes[:, ::2] << 4 | codes[:, 1::2], inner)
    return packed


@cache
def _cuda_back(inner: int, device: torch.device) -> Tensor:
    """Nibble of each element of a tile, row after row."""
    return torch.argsort(tile_order(lambda codes: _cuda_pack(codes, inner), 8, 16 * inner, device))


_KINDS: dict[str, type[CpuInt4] | type[CudaInt4]] = {"cpu": CpuInt4, "cuda": CudaInt4}
