"""Options of each quantization method, with the defaults of its paper or code (papers.md section 4). Torch-free."""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, field_validator, model_validator


class Options(BaseModel):
    """Base of every section of a spec."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class HqqOptions(Options):
    """Options of HQQ (papers.md section 4). ``axis`` 1: groups run along the input features, as in the packed format.

    Attributes:
        iterations: most half-quadratic steps (a fixed point ends them).
        p: norm of the shrinkage, 0 < p <= 1.
        beta: its strength, > 0.
    """

    axis: int = 1
    iterations: int = Field(default=20, ge=1, le=1000)
    p: float = Field(default=0.7, gt=0.0, le=1.0)
    beta: float = Field(default=10.0, gt=0.0)

    @field_validator("axis")
    @classmethod
    def _axis_is_representable(cls, axis: int) -> int:
        if axis != 1:
            raise ValueError(f"only axis 1 (groups along the input features) fits the packed format, got axis {axis}")
        return axis


class UniformOptions(Options):
    """Options of per-tensor uniform quantization. ``quantize_bias``: biases too, as in mmq."""

    quantize_bias: bool = True


class GptqOptions(Options):
    """Options of GPTQ.

    Attributes:
        damp: share of the Hessian's mean diagonal that is added to it.
        act_order: columns by falling diagonal; needs a column order in the checkpoint unless ``static_groups``.
        static_groups: parameters of all groups are fitted before the first column.
        block: columns between two updates of the rest.
        mse: search each group's range for the least error (norm 2.4, 100 steps down to a fifth) instead of min-max.
    """

    damp: float = Field(default=0.01, gt=0.0, le=1.0)
    act_order: bool = False
    static_groups: bool = False
    block: int = Field(default=128, ge=1)
    mse: bool = False


class AwqOptions(Options):
    """Options of AWQ.

    Attributes:
        grid: exponents tried: 0, 1/grid, ..., 1 - 1/grid.
        duo_scaling: the weights' mean magnitude takes part in the scales.
        clip: search each group's range afterwards.
    """

    grid: int = Field(default=20, ge=1)
    duo_scaling: bool = True
    clip: bool = True


class MbqOptions(Options):
    """Options of MBQ.

    Attributes:
        grid: exponents tried.
        loss: mean absolute or mean squared error of the block's output.
        reweight: weigh vision tokens by the gradient ratio; False gives both modalities the same weight.
        distort: inputs of later layers come from the quantized earlier ones.
    """

    grid: int = Field(default=20, ge=1)
    loss: Literal["mae", "mse"] = "mae"
    reweight: bool = True
    distort: bool = False


class SmoothquantOptions(Options):
    """Options of SmoothQuant. ``alpha``: how much of the difficulty goes from activations to weights, 0 to 1."""

    alpha: float = Field(default=0.5, ge=0.0, le=1.0)


class BitsandbytesOptions(Options):
    """Options of bitsandbytes.

    Attributes:
        type: ``int8`` is LLM.int8(), which quantizes the inputs too.
        double_quant: (4 bits) the scales are quantized, too.
        threshold: (int8) columns with an input of at least this stay at full precision; 0: none do.
    """

    type: Literal["nf4", "fp4", "int8"] = "nf4"
    double_quant: bool = False
    threshold: float = Field(default=6.0, ge=0.0)

    @model_validator(mode="after")
    def _belong_to_the_type(self) -> BitsandbytesOptions:
        odd = "double_quant" if self.type == "int8" else "threshold"
        if getattr(self, odd) != type(self).model_fields[odd].default:
            raise ValueError(f"{odd} does nothing for type {self.type}; leave it out")
        return self


class TorchaoOptions(Options):
    """Options of torchao. ``int4`` is the tinygemm kernel (CUDA), ``int8-dynamic`` quantizes activations too."""

    kind: Literal["int4", "int8", "int8-dynamic", "fp8"] = "int8"


OPTIONS: dict[str, type[Options]] = {
    "hqq": HqqOptions,
    "uniform": UniformOptions,
    "gptq": GptqOptions,
    "awq": AwqOptions,
    "mbq": MbqOptions,
    "smoothquant": SmoothquantOptions,
    "bitsandbytes": BitsandbytesOptions,
    "torchao": TorchaoOptions,
}
"""Method -> its section, which bears the method's name in a spec."""
