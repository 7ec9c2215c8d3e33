"""``QuantizedLinear``: a Linear whose weight lies on a low-bit grid, held packed or de-quantized."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn
from torch.nn import functional

from bitquake.model_wrappers.quantizers.activations import quantize_tokens
from bitquake.model_wrappers.quantizers.packing import pack, row_bytes, unpack
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight, dequantize

if TYPE_CHECKING:
    from bitquake.model_wrappers.quantizers.kernels import Int4Kernel

Execution = Literal["simulated", "packed"]
STORED = ("codes", "scale", "zero", "input_scale", "order")
"""Names in a state dict, beside ``bias``; ``codes`` are packed there."""
_FLOATS = ("float16", "bfloat16", "float32")


@dataclass(frozen=True)
class LinearLayout:
    """What the state dict of a ``QuantizedLinear`` holds; it goes into a checkpoint's config as JSON.

    Attributes:
        bits, group_size: as of ``QuantizedWeight``.
        symmetric: there is no ``zero``.
        per_tensor: one scale for the matrix.
        scale_dtype, zero_dtype: names without ``torch.``.
        has_input_scale, has_order: whether these are stored.
        activation_bits: bits of the dynamic quantization of the input; None: the input stays as it is.
    """

    bits: int
    group_size: int
    symmetric: bool = False
    per_tensor: bool = False
    scale_dtype: str = "float16"
    zero_dtype: str = "int8"
    has_input_scale: bool = False
    has_order: bool = False
    activation_bits: int | None = None

    @classmethod
    def of(cls, weight: QuantizedWeight, activation_bits: int | None = None) -> LinearLayout:
        """The layout that holds ``weight``."""
        zero = weight.zero
        return cls(
            bits=weight.bits,
            group_size=weight.group_size,
            symmetric=zero is None,
            per_tensor=weight.per_tensor,
            scale_dtype=_name(weight.scale.dtype),
            zero_dtype="int8" if zero is None else _name(zero.dtype),
            has_input_scale=weight.input_scale is not None,
            has_order=weight.order is not None,
            activation_bits=activation_bits,
        )

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> LinearLayout:
        """Inverse of ``to_dict``.

        Raises:
            ValueError: an unknown or a missing key, or a value that cannot be.
        """
        known = {item.name for item in fields(cls)}
        if odd := sorted(set(values) - known) or [key for key in ("bits", "group_size") if key not in values]:
            raise ValueError(
                f"layout of a quantized layer: key {odd[0]!r} is unknown or missing; known: {sorted(known)}"
            )
        layout = cls(**values)
        fits = {
            "bits": isinstance(layout.bits, int),  # packing says how many
            "group_size": isinstance(layout.group_size, int) and layout.group_size > 0,
            "scale_dtype": layout.scale_dtype in _FLOATS,
            "zero_dtype": layout.zero_dtype in (*_FLOATS, "int8"),
            "activation_bits": layout.activation_bits is None or layout.activation_bits in range(2, 9),
        }
        if wrong := [key for key, good in fits.items() if not good]:
            raise ValueError(f"layout of a quantized layer: {wrong[0]} cannot be {values[wrong[0]]!r}")
        return layout

    def to_dict(self) -> dict[str, Any]:
        """Plain values, defaults left out."""
        return {
            item.name: value
            for item in fields(self)
            if (value := asdict(self)[item.name]) != item.default or item.name in ("bits", "group_size")
        }

    def shapes(self, in_features: int, out_features: int) -> dict[str, tuple[tuple[int, ...], torch.dtype]]:
        """Shape and dtype of each stored tensor by its name in the state dict (``bias`` apart)."""
        groups = (1, 1) if self.per_tensor else (out_features, -(-in_features // self.group_size))
        stored: dict[str, tuple[tuple[int, ...], torch.dtype]] = {
            "codes": ((out_features, row_bytes(in_features, self.bits)), torch.uint8),
            "scale": (groups, getattr(torch, self.scale_dtype)),
        }
        if not self.symmetric:
            stored["zero"] = (groups, getattr(torch, self.zero_dtype))
        if self.has_input_scale:
            stored["input_scale"] = ((in_features,), torch.float32)
        if self.has_order:
            stored["order"] = ((in_features,), torch.int32)
        return stored


class _FromCodes(torch.autograd.Function):
    """``x @ weight.T`` of a packed layer, whose weight is de-quantized again for the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: QuantizedLinear) -> Tensor:
        ctx.layer, ctx.dtype = layer, x.dtype
        return functional.linear(x, layer.weight.to(x.dtype))

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor, None]:
        return (gradient @ ctx.layer.weight.to(gradient.dtype)).to(ctx.dtype), None


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


class QuantizedLinear(nn.Module):
    """Linear layer with a weight of 2 to 8 bits.

    Both executions store the same: packed ``codes``, ``scale``, and where there are such ``zero``, ``input_scale`` and
    ``order`` (see ``QuantizedWeight``). ``simulated`` also holds the de-quantized weight (``dequantized``, not in the
    state dict) and computes with that; ``packed`` computes from the codes, either de-quantized at each call, then bit
    for bit as ``simulated``, or by a low-bit kernel (``use_kernel``), whose rounding is its own.

    The constructor makes an empty layer to load a state dict into; ``from_weight`` makes a filled one. Tensors that
    are put in by other ways than ``load_state_dict`` need ``refresh`` afterwards.

    Args:
        in_features, out_features: as of ``nn.Linear``.
        layout: what is stored.
        bias: whether there is a bias (kept in ``dtype``).
        dtype: of the de-quantized weight.
        execution: see above.
    """

    codes: Tensor | None
    scale: Tensor | None
    zero: Tensor | None
    input_scale: Tensor | None
    order: Tensor | None
    dequantized: Tensor | None

    def __init__(
        self,
        in_features: int,
        out_features: int,
        *,
        layout: LinearLayout,
        bias: bool = True,
        dtype: torch.dtype = torch.bfloat16,
        device: torch.device | str | None = None,
        execution: Execution = "simulated",
    ) -> None:
        super().__init__()
        if not 1 <= layout.group_size <= in_features:
            raise ValueError(f"QuantizedLinear: group_size must be 1 to {in_features} (a row), got {layout.group_size}")
        self.in_features, self.out_features = in_features, out_features
        self.layout, self.weight_dtype, self.execution = layout, dtype, execution
        shapes = layout.shapes(in_features, out_features)
        for name in STORED:
            shape, kind = shapes.get(name, ((), torch.uint8))
            self.register_buffer(name, torch.empty(shape, dtype=kind, device=device) if name in shapes else None)
        self.register_buffer("dequantized", None, persistent=False)
        values = torch.empty(out_features, dtype=dtype, device=device) if bias else None
        self.bias = None if values is None else nn.Parameter(values, requires_grad=False)
        self.kernel: Int4Kernel | None = None

    @classmethod
    def from_weight(
        cls,
        weight: QuantizedWeight,
        *,
        bias: nn.Parameter | None,
        dtype: torch.dtype,
        execution: Execution,
        activation_bits: int | None = None,
    ) -> QuantizedLinear:
        """Make a filled layer on the device of ``weight``; ``bias`` is kept as it is."""
        out_features, in_features = weight.codes.shape
        layout = LinearLayout.of(weight, activation_bits)
        layer = cls(
            in_features, out_features, layout=layout, bias=False, dtype=dtype, device="meta", execution=execution
        )
        layer.codes = pack(weight.codes, weight.bits)
        layer.scale, layer.zero = weight.scale.contiguous(), None if weight.zero is None else weight.zero.contiguous()
        layer.input_scale, layer.order = weight.input_scale, weight.order
        layer.bias = bias
        return layer.refresh()

    @property
    def bits(self) -> int:
        return self.layout.bits

    @property
    def group_size(self) -> int:
        return self.layout.group_size

    @property
    def symmetric(self) -> bool:
        return self.layout.symmetric

    @property
    def activation_bits(self) -> int | None:
        return self.layout.activation_bits

    def quantized_weight(self) -> QuantizedWeight:
        """The weight on its grid, codes unpacked.

        Raises:
            RuntimeError: the codes were forgotten, or nothing was loaded.
        """
        kernel = self.kernel
        if kernel is not None:
            codes, scale, zero = kernel.codes(), kernel.scale(), kernel.zero()
        else:
            packed, scale = self._held()
            codes, zero = unpack(packed, self.bits, self.in_features), self.zero
        return QuantizedWeight(codes, scale, zero, self.bits, self.group_size, self.input_scale, self.order)

    def _held(self) -> tuple[Tensor, Tensor]:
        """Packed codes and scale."""
        if self.codes is None or self.scale is None:
            raise RuntimeError(
                "QuantizedLinear holds no codes: a simulated layer forgot them, or none were loaded. "
                "Quantize or load the model again to save it"
            )
        return self.codes, self.scale

    def _dequantize(self, *, divided: bool) -> Tensor:
        if self.kernel is not None:
            return self.quantized_weight().dequantize(self.weight_dtype, divided=divided)
        packed, scale = self._held()
        return dequantize(
            lambda rows: unpack(packed[rows], self.bits, self.in_features),
            (self.out_features, self.in_features), scale, self.zero, bits=self.bits, group_size=self.group_size,
            input_scale=self.input_scale if divided else None, order=self.order, dtype=self.weight_dtype,
        )  # fmt: skip

    @property
    def weight(self) -> Tensor:
        """The weight as a plain Linear would hold it, shape (out_features, in_features): input scales divided out."""
        if self.dequantized is not None and (self.activation_bits is None or self.input_scale is None):
            return self.dequantized
        if self.dequantized is not None and self.input_scale is not None and self.codes is None:
            return (self.dequantized.float() / self.input_scale).to(self.weight_dtype)  # rounded twice: codes forgotten
        return self._dequantize(divided=True)

    def is_on_grid(self) -> bool:
        """Whether a simulated weight is what its codes say, bit for bit; True for packed layers."""
        if self.dequantized is None:
            return True
        return torch.equal(self._dequantize(divided=self.activation_bits is None), self.dequantized)

    def refresh(self) -> QuantizedLinear:
        """Make ``dequantized`` anew from the codes (simulated execution); returns the layer itself."""
        if self.execution == "simulated" and self.codes is not None and not self.codes.is_meta:
            self.dequantized = self._dequantize(divided=self.activation_bits is None)
        return self

    def forget_codes(self) -> None:
        """Free what a simulated layer does not compute with. It cannot be saved any more."""
        if self.dequantized is not None:
            self.codes = self.scale = self.zero = self.order = None

    def use_kernel(self) -> str | None:
        """Compute with a low-bit kernel from now on, where there is one; returns why not, or None when it does.

        The kernel holds the codes in its own layout; state dicts stay as they were.
        """
        from bitquake.model_wrappers.quantizers.kernels import Int4Kernel

        if self.execution != "packed":
            return "simulated execution computes with the de-quantized weight"
        if self.kernel is not None:
            return None
        if self.activation_bits is not None:
            return "a layer with quantized inputs computes with the de-quantized weight"
        device = self._held()[1].device
        reason = Int4Kernel.suits(self.layout, self.in_features, self.out_features, self.weight_dtype, device)
        if reason is None:
            self.kernel = Int4Kernel.from_weight(self.quantized_weight(), self.weight_dtype)
            self.codes = self.scale = self.zero = None
        return reason

    def drop_kernel(self) -> None:
        """Back to the packed codes."""
        if self.kernel is not None:
            weight, self.kernel = self.quantized_weight(), None
            self.codes, self.scale, self.zero = pack(weight.codes, self.bits), weight.scale, weight.zero

    @property
    def packed_bytes(self) -> int:
        """Bytes that the weight takes in a state dict, whatever the execution."""
        shapes = self.layout.shapes(self.in_features, self.out_features).values()
        return sum(torch.Size(shape).numel() * kind.itemsize for shape, kind in shapes)

    @property
    def held_bytes(self) -> int:
        """Bytes that this execution needs for the weight, read from the tensors."""
        if self.dequantized is not None:
            scaled = self.activation_bits is not None and self.input_scale is not None
            return self.dequantized.nbytes + (self.input_scale.nbytes if scaled and self.input_scale is not None else 0)
        tensors: list[Tensor | None] = [getattr(self, name) for name in STORED]
        held = sum(tensor.nbytes for tensor in tensors if tensor is not None)
        return held + (self.kernel.held_bytes if self.kernel is not None else 0)

    def forward(self, x: Tensor) -> Tensor:
        """``x @ weight.T + bias`` over the last dimension of ``x``, quantized too where ``activation_bits`` says so.

        Gradients flow to ``x`` (not through a quantization of it); a packed layer keeps nothing for them but its codes.
        """
        learning = torch.is_grad_enabled() and x.requires_grad
        if learning and self.dequantized is None and self.activation_bits is None:
            y: Tensor = _FromCodes.apply(x, self)
            return y if self.bias is None else y + self.bias
        if self.activation_bits is not None:
            if self.input_scale is not None:
                x = (x.float() / self.input_scale).to(x.dtype)
            x = quantize_tokens(x, self.activation_bits)
            weight = self.dequantized if self.dequantized is not None else self._dequantize(divided=False)
        elif self.kernel is not None and x.dtype == self.weight_dtype:
            if self.input_scale is not None:
                x = (x.float() / self.input_scale).to(x.dtype)
            y = self.kernel.matmul(x)
            return y if self.bias is None else y + self.bias
        else:
            weight = self.weight
        return functional.linear(x, weight if weight.dtype == x.dtype else weight.to(x.dtype), self.bias)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        if self.kernel is None:
            self._held()  # a layer without codes would save a hole
        super()._save_to_state_dict(destination, prefix, keep_vars)
        if self.kernel is not None:
            weight = self.quantized_weight()
            destination[f"{prefix}codes"], destination[f"{prefix}scale"] = pack(weight.codes, self.bits), weight.scale
            if weight.zero is not None:
                destination[f"{prefix}zero"] = weight.zero

    def _load_from_state_dict(self, state_dict: Any, prefix: str, *args: Any, **kwargs: Any) -> None:
        given = any(f"{prefix}{name}" in state_dict for name in STORED)  # an adapter's state dict passes by here, too
        if given:
            self.drop_kernel()
        super()._load_from_state_dict(state_dict, prefix, *args, **kwargs)
        if given:
            self.refresh()

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> Any:
        # .half(), .bfloat16() and .to(dtype) are meant for what the model computes in; a rounded scale or zero-point
        # would change the weight, so these keep their dtype and follow to the device only.
        self.drop_kernel()
        kept = {name: getattr(self, name) for name in ("scale", "zero", "input_scale")}
        wanted = fn(torch.empty(0, dtype=self.weight_dtype)).dtype  # a packed layer holds no tensor of that dtype
        super()._apply(fn, recurse)  # type: ignore[no-untyped-call]
        for name, before in kept.items():
            after = getattr(self, name)
            if before is not None and after.dtype != before.dtype:
                setattr(self, name, before.to(after.device))
        if wanted != self.weight_dtype:
            self.weight_dtype = wanted
            self.refresh()  # from the codes: rounded once
        return self

    def extra_repr(self) -> str:
        layout = ", ".join(f"{key}={value}" for key, value in self.layout.to_dict().items())
        return f"{self.in_features}, {self.out_features}, {layout}, bias={self.bias is not None}, {self.execution}"


def use_kernels(model: nn.Module) -> dict[str, int]:
    """Give each packed layer of a model its low-bit kernel, where there is one.

    Returns:
        Why not -> number of packed layers that are de-quantized at every call instead.
    """
    reasons: dict[str, int] = {}
    for layer in _quantized_layers(model):
        if layer.execution == "packed" and (reason := layer.use_kernel()) is not None:
            reasons[reason] = reasons.get(reason, 0) + 1
    return reasons


def forget_codes(model: nn.Module) -> None:
    """Free the codes of a model's simulated layers, which compute without them; it cannot be saved any more."""
    for layer in _quantized_layers(model):
        layer.forget_codes()


def _quantized_layers(model: nn.Module) -> list[QuantizedLinear]:
    return [module for module in model.modules() if isinstance(module, QuantizedLinear)]
