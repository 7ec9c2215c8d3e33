"""torchao: int4 (tinygemm, CUDA), int8, int8 with int8 inputs, and float8 weights.

The layer stays an ``nn.Linear``; its weight becomes a tensor subclass that says what ``F.linear`` does with it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from bitquake.model_wrappers.quantizers.libraries.bnb import finite_weight
from bitquake.model_wrappers.quantizers.options import TorchaoOptions
from bitquake.model_wrappers.quantizers.plan import QuantizationError

INT4_GROUPS = (32, 64, 128, 256)
"""Group sizes that the tinygemm kernel knows."""


def load_library() -> Any:
    """``torchao.quantization``.

    Raises:
        ImportError: torchao is not installed.
    """
    try:
        import torchao.quantization
    except ImportError as error:
        raise ImportError("method torchao needs the torchao package: pip install 'bitquake[torchao]'") from error
    return torchao.quantization


def quantize_torchao(
    linear: nn.Linear, options: TorchaoOptions, group_size: int | str | None, device: torch.device | str
) -> nn.Module:
    """The twin of one layer with a torchao weight on ``device``; ``linear`` itself is left alone.

    ``int8``, ``int8-dynamic`` and ``fp8`` (e4m3) have a scale for each row and take any shape; ``int4`` has groups of
    ``group_size``, computes in bfloat16 and pads a matrix to what its kernel needs.

    Raises:
        ImportError: torchao is not installed.
        QuantizationError: weights that are not finite; for int4 a device, dtype, group size or width that tinygemm
            cannot do (torchao would leave such a layer at full precision and say nothing).
    """
    torchao = load_library()
    weight = finite_weight(linear)
    device = torch.device(device)
    if options.kind == "int4":
        _check_int4(linear, group_size, device)
    layer = nn.Linear(linear.in_features, linear.out_features, bias=False, device="meta")
    layer.weight = nn.Parameter(weight.to(device), requires_grad=False)
    layer.bias = linear.bias
    # set_inductor_config would change the precision of every float32 product in the process
    torchao.quantize_(layer, _config(torchao, options, group_size), filter_fn=lambda module, name: True)
    return layer.train(linear.training)


def _config(torchao: Any, options: TorchaoOptions, group_size: int | str | None) -> Any:
    if options.kind == "int4":
        return torchao.Int4WeightOnlyConfig(
            group_size=group_size, int4_packing_format="tile_packed_to_4d", set_inductor_config=False
        )
    by_kind = {
        "int8": torchao.Int8WeightOnlyConfig,
        "int8-dynamic": torchao.Int8DynamicActivationInt8WeightConfig,
        "fp8": torchao.Float8WeightOnlyConfig,
    }
    return by_kind[options.kind](set_inductor_config=False)


def _check_int4(linear: nn.Linear, group_size: int | str | None, device: torch.device) -> None:
    if device.type != "cuda":
        raise QuantizationError(
            f"torchao int4 is the tinygemm kernel, which runs on CUDA only, and the layer is on {device}; "
            "use bitsandbytes nf4, or rtn or hqq with 4 bits, there"
        )
    if torch.cuda.get_device_capability(device) < (8, 0):
        raise QuantizationError(
            f"torchao int4 needs compute capability 8.0, and {torch.cuda.get_device_name(device)} has less; "
            "use bitsandbytes nf4, or rtn or hqq with 4 bits"
        )
    if linear.weight.dtype != torch.bfloat16:
        raise QuantizationError(f"torchao int4 computes in bfloat16, got {linear.weight.dtype}; use dtype=bfloat16")
    if group_size not in INT4_GROUPS:
        raise QuantizationError(
            f"torchao int4 has groups of {', '.join(map(str, INT4_GROUPS))}, got group_size {group_size}"
        )
    assert isinstance(group_size, int)
    if linear.in_features % group_size:
        fitting = [str(size) for size in INT4_GROUPS if linear.in_features % size == 0]
        way = f"group_size {' or '.join(fitting)} would fit" if fitting else "no group size of its kernel would fit"
        raise QuantizationError(
            f"torchao int4 needs in_features that are a multiple of the group size {group_size}, got "
            f"{linear.in_features}; {way}. A plan with keep: true leaves such layers out, rtn and hqq can do them"
        )
