"""bitsandbytes: NF4, FP4 (blocks of 64 weights, absmax scales) and LLM.int8().

Three of its habits (0.50.2) would make a run wrong or noisy, and are kept out: on CPUs with AVX512-BF16 a 4-bit layer
repacks its weight in the first forward pass, which fails for odd shapes and corrupts the state dict; where a row is not
a whole number of blocks (SigLIP's 4304 inputs), CPUs with AVX512 de-quantize with other blocks' scales; and an int8
layer logs a line per call.
"""

from __future__ import annotations

import copy
import logging
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.quantizers.options import BitsandbytesOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError

_GREATEST_FLOAT16 = torch.finfo(torch.float16).max


def load_library() -> Any:
    """The bitsandbytes module, its log reduced to errors.

    Raises:
        ImportError: it is not installed.
    """
    for name in ("bitsandbytes.autograd._functions", "bitsandbytes.backends.cpu.ops"):
        logging.getLogger(name).setLevel(logging.ERROR)  # casts at every call; a hub kernel that we do not use
    try:
        import bitsandbytes
    except ImportError as error:
        raise ImportError(
            "method bitsandbytes needs the bitsandbytes package: pip install 'bitquake[bitsandbytes]'"
        ) from error
    return bitsandbytes


def quantize_bnb(linear: nn.Linear, options: BitsandbytesOptions, device: torch.device | str) -> nn.Module:
    """The ``Linear4bit`` or ``Linear8bitLt`` of one layer; ``linear`` itself is left alone.

    It is quantized on ``device`` by the library's own code, as transformers does, and computes in the dtype of
    ``linear``. Blocks of a 4-bit weight run over the flattened matrix, so any shape will do. The outlier columns of
    ``int8`` are found among all tokens of a batch: there, what stands beside a sample moves its answer.

    Raises:
        ImportError: bitsandbytes is not installed.
        QuantizationError: weights that are not finite, or for int8 beyond float16, which the library goes through.
    """
    bnb = load_library()
    weight = finite_weight(linear).to(device)
    in_features, out_features, dtype = linear.in_features, linear.out_features, linear.weight.dtype
    layer: nn.Module
    if options.type == "int8":
        if (greatest := float(weight.abs().max())) > _GREATEST_FLOAT16:
            raise QuantizationError(
                f"bitsandbytes quantizes to int8 by way of float16, and a weight of {greatest:g} is beyond it; "
                "use method torchao (int8) or rtn"
            )
        layer = bnb.nn.Linear8bitLt(
            in_features, out_features, bias=False, has_fp16_weights=False, threshold=options.threshold, device="meta"
        )
        # quantizes on its way from the CPU only
        layer.weight = bnb.nn.Int8Params(weight.cpu(), requires_grad=False, has_fp16_weights=False).to(device)
    else:
        settings = {"compress_statistics": options.double_quant, "quant_type": options.type}
        layer = linear4bit()(in_features, out_features, bias=False, compute_dtype=dtype, device="meta", **settings)
        layer.weight = bnb.nn.Params4bit(weight, requires_grad=False, module=layer, **settings).to(device)
    layer.bias = linear.bias
    return layer.train(linear.training)


@cache
def linear4bit() -> type[nn.Module]:
    """``bitsandbytes.nn.Linear4bit`` that never repacks, with ``dequantize_4bit`` where rows are no whole blocks."""
    bnb = load_library()

    class Linear4bit(bnb.nn.Linear4bit):  # type: ignore[misc, name-defined]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.support_avx512bf16_for_cpu = False

        def forward(self, x: Tensor) -> Tensor:
            if whole_blocks(self):
                return super().forward(x)  # type: ignore[no-any-return]
            dtype = self.compute_dtype or x.dtype
            bias = None if self.bias is None else self.bias.to(dtype)
            return functional.linear(x.to(dtype), dequantize_4bit(self).to(dtype), bias).to(x.dtype)

    return Linear4bit


def whole_blocks(layer: Any) -> bool:
    """Whether no block of a 4-bit layer goes on in the next row."""
    return bool(layer.in_features % layer.weight.quant_state.blocksize == 0)


def dequantize_4bit(layer: Any) -> Tensor:
    """The weight of a 4-bit layer, shape (out_features, in_features), in the dtype that it was quantized from."""
    state = layer.weight.quant_state
    if not whole_blocks(layer):  # as one long row, blocks lie as they were made
        state = copy.copy(state)
        state.shape = torch.Size((1, layer.out_features * layer.in_features))
    weight: Tensor = load_library().functional.dequantize_4bit(layer.weight.data, state)
    return weight.reshape(layer.out_features, layer.in_features)


def finite_weight(linear: nn.Linear) -> Tensor:
    """The weight of a layer that a library is to quantize; libraries turn NaN into numbers without a word.

    Raises:
        QuantizationError: a weight that is not finite.
    """
    weight = linear.weight.detach()
    if bad := int((~weight.isfinite()).sum()):
        raise QuantizationError(f"{bad} weights are NaN or infinite")
    return weight
