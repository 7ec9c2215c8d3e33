"""What a library's layer holds, read from its tensors: for the quant card."""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from bitquake.model_wrappers.quantizers.libraries.bnb import dequantize_4bit, linear4bit, whole_blocks
from bitquake.model_wrappers.quantizers.plan import QuantizationError

_ROWS = 256  # of the identity that a packed weight is multiplied with at a time


@dataclass(frozen=True)
class LayerFacts:
    """A quantized layer of bitsandbytes or torchao.

    Attributes:
        format: library and format, ``bitsandbytes nf4``.
        shape: (out_features, in_features).
        bits: of a code.
        group_size: weights that share a scale.
        symmetric: there is no zero-point, or it is zero everywhere.
        activation_bits: bits of the inputs where the layer quantizes them at run time, else None.
        held_bytes: of codes, scales and zero-points; a code book that is the same for every layer is not counted.
        kernel: what computes, in words.
        package: the library's name, for its version.
        weight: makes the weight that the layer computes with, shape ``shape``: in the dtype of the matrix product,
            in float32 where the product is taken with the codes themselves.
    """

    format: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    activation_bits: int | None
    held_bytes: int
    kernel: str
    package: str
    weight: Callable[[], Tensor]

    @property
    def n_weights(self) -> int:
        return self.shape[0] * self.shape[1]


def library_facts(module: nn.Module) -> LayerFacts | None:
    """Facts of a layer of bitsandbytes or torchao; None for any other module and before it is quantized.

    Imports neither library: a module of theirs has.

    Raises:
        QuantizationError: a torchao format that the card does not know, or a 4-bit layer that bitsandbytes repacked
            or would not compute as it stands (``bnb``'s docstring).
    """
    if (bnb := sys.modules.get("bitsandbytes")) is not None:
        if isinstance(module, bnb.nn.Linear4bit):
            return _bnb_4bit(module)
        if isinstance(module, bnb.nn.Linear8bitLt):
            return _bnb_int8(bnb, module)
    if isinstance(module, nn.Linear) and (torchao := sys.modules.get("torchao.utils")) is not None:
        weight = module._parameters.get("weight")
        if isinstance(weight, torchao.TorchAOBaseTensor):
            return _torchao(module, weight)
    return None


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _bnb_4bit(module: Any) -> LayerFacts | None:
    packed: Any = module.weight
    state = getattr(packed, "quant_state", None)
    if state is None:
        return None
    aligned = whole_blocks(module)
    if getattr(state, "packing_format_for_cpu", False) or not (aligned or isinstance(module, linear4bit())):
        raise QuantizationError(
            "a 4-bit layer of bitsandbytes computes with other weights than it stores on some CPUs; load the model at "
            "full precision and quantize it here with method bitsandbytes"
        )
    held = [packed.data, state.absmax]
    if state.nested:
        held += [state.state2.absmax, state.offset]
    dtype = _dtype(module.compute_dtype or state.dtype)
    return LayerFacts(
        format=f"bitsandbytes {state.quant_type}" + (" double-quant" if state.nested else ""),
        shape=(module.out_features, module.in_features),
        bits=4,
        group_size=state.blocksize,
        symmetric=True,
        activation_bits=None,
        held_bytes=sum(tensor.nbytes for tensor in held),
        kernel=f"bitsandbytes gemm_4bit on {dtype}"
        if aligned
        else f"torch F.linear on {dtype} de-quantized by bitsandbytes at every call",
        package="bitsandbytes",
        weight=lambda: dequantize_4bit(module),
    )


def _bnb_int8(bnb: Any, module: Any) -> LayerFacts | None:
    if module.weight.dtype != torch.int8:
        return None
    # both move from the parameter to the state in the first forward pass
    codes = module.weight.data
    scale: Tensor = module.state.SCB if module.weight.SCB is None else module.weight.SCB
    threshold = module.state.threshold
    outliers = f", columns with an input of {threshold:g} or more not" if threshold else ""
    return LayerFacts(
        format="bitsandbytes int8",
        shape=(module.out_features, module.in_features),
        bits=8,
        group_size=module.in_features,
        symmetric=True,
        activation_bits=8,
        held_bytes=codes.nbytes + scale.nbytes,
        kernel=f"bitsandbytes int8_scaled_mm, inputs rounded to 8 bits{outliers}",
        package="bitsandbytes",
        weight=lambda: bnb.functional.int8_vectorwise_dequant(codes, scale),
    )


def _torchao(module: nn.Linear, weight: Any) -> LayerFacts:
    kind, dtype = type(weight).__name__, _dtype(weight.dtype)
    names, _ = weight.__tensor_flatten__()
    activation_bits, bits, symmetric = None, 8, True
    values: Callable[[], Tensor]
    if kind == "Int8Tensor":
        shown, kernel = "int8", f"torch.mm on {dtype}, int8 weight cast at every call and scaled afterwards"
        symmetric = weight.zero_point is None or not bool(weight.zero_point.any())
        values = lambda: weight.dequantize(torch.float32)  # noqa: E731
        if weight.act_quant_kwargs is not None:
            shown, activation_bits = "int8-dynamic", 8
            kernel = "torchao int_scaled_matmul, inputs rounded to 8 bits"
    elif kind == "Float8Tensor" and weight.act_quant_kwargs is None:
        shown = "fp8"
        kernel = f"torch F.linear on {dtype} de-quantized from {_dtype(weight.qdata.dtype)} at every call"
        values = weight.dequantize
    elif kind == "Int4TilePackedTo4dTensor":
        shown, bits, symmetric, kernel = "int4", 4, False, "torch _weight_int4pack_mm (tinygemm) on bfloat16"
        values = lambda: multiply_by_identity(module)  # noqa: E731
    else:
        raise QuantizationError(
            f"a weight is a {kind} of torchao, which Bitquake does not know; known: Int8Tensor, Float8Tensor (weight "
            "only), Int4TilePackedTo4dTensor"
        )
    return LayerFacts(
        format=f"torchao {shown}",
        shape=(module.out_features, module.in_features),
        bits=bits,
        group_size=int(weight.block_size[-1]),
        symmetric=symmetric,
        activation_bits=activation_bits,
        held_bytes=sum(getattr(weight, name).nbytes for name in names),
        kernel=kernel,
        package="torchao",
        weight=values,
    )


def multiply_by_identity(module: nn.Linear) -> Tensor:
    """The weight of a layer whose format cannot be de-quantized, shape (out_features, in_features).

    Each product has one term that is not zero, so it is exact.
    """
    weight, n = module.weight, module.in_features
    columns = []
    with torch.no_grad():
        for start in range(0, n, _ROWS):
            rows = torch.zeros(min(_ROWS, n - start), n, dtype=weight.dtype, device=weight.device)
            rows[:, start:].fill_diagonal_(1.0)
            columns.append(nn.functional.linear(rows, weight).T)
    return torch.cat(columns, dim=1)
