"""The quant card: what was really done to a model, read from its loaded tensors, never from its spec."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

CARD_VERSION = 2
CARD_FILE = "quant_card.json"
"""Its name in a folder that ``bitquake quantize`` wrote."""
PARTIAL = ".partial"
"""Folder of finished modules in a folder that ``bitquake quantize`` writes, as long as it is not done."""


class ModuleEntry(BaseModel):
    """One quantized module, as found in the loaded model.

    ``hash_before``/``hash_after``: blake2 hex of the (de-quantized) weight's bytes before and after; ``changed`` is
    their inequality. ``bits`` counts the integer codes' bits; ``n_bytes`` everything stored for the weight in the
    declared execution (for ``simulated``: the bytes of the de-quantized tensor held in memory).
    ``packed_bytes``: bytes of codes, scales and zeros in the packed format, whatever the execution; for a library's
    layer what it stores. ``third``, ``layer``: place in its stack of blocks (``front``, ``middle``, ``end``) and
    ``attention`` or ``mlp``, where there is one. ``group_size``: of ``in_features`` is a scale for each row, with
    ``per_tensor`` one for the matrix. ``input_scale``: the layer divides its input by a scale for each feature.
    ``order``: columns are stored in another order (act-order). ``activation_bits``: of the input, quantized at run
    time; None: it is not. ``format``: ``bitquake``, or a library's own, such as ``bitsandbytes nf4``.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    component: str
    third: str | None = None
    layer: str = "other"
    format: str = "bitquake"
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
    per_tensor: bool = False
    input_scale: bool = False
    order: bool = False
    activation_bits: int | None = None
    n_weights: int
    n_bytes: int
    packed_bytes: int
    hash_before: str
    hash_after: str

    @property
    def changed(self) -> bool:
        return self.hash_before != self.hash_after


class ComponentEntry(BaseModel):
    """Totals of a component (``vision``, ``connector``, ``language``, ``other``): weights, bytes, quantized weights."""

    model_config = ConfigDict(extra="forbid")

    n_parameters: int
    n_quantized: int
    n_bytes: int
    packed_bytes: int


class Calibration(BaseModel):
    """Calibration data: source (``none`` for data-free methods), what it was drawn from, number of samples, hash of
    their image ids (the ids themselves: ``calibration/<ids_hash>.json`` in the artifacts folder)."""

    model_config = ConfigDict(extra="forbid")

    source: str = "none"
    data: str = ""
    n_samples: int = 0
    ids_hash: str = ""


class Adapter(BaseModel):
    """A peft adapter on top: where it came from and the hash of its tensors."""

    model_config = ConfigDict(extra="forbid")

    source: str
    hash: str


class QuantCard(BaseModel):
    """The quant card of one loaded model; a full-precision model has one too (``method: none``).

    ``execution``: ``unknown`` of a model that was not loaded here, see ``self_declared``.
    ``nominal_bpw``: (sum of bits x weights over quantized modules + stored bits of everything else) / all parameters.
    ``effective_bpw``: the same with scales and zeros counted. ``weights_hash``: blake2 over every parameter and
    persistent buffer of the model as it computes (de-quantized), in name order.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = CARD_VERSION
    pretrained: str
    base: str = ""
    """What a checkpoint that came quantized was made from: its full-precision twin; "" for others."""
    revision: str = ""
    architecture: str
    dtype: str
    spec_name: str
    spec: dict[str, Any] = Field(default_factory=dict)
    method: str
    execution: Literal["full-precision", "simulated", "packed", "unknown"]
    kernel: str
    modules: list[ModuleEntry] = Field(default_factory=list)
    kept: dict[str, str] = Field(default_factory=dict)
    """Linear modules left at full precision: name -> dtype."""
    components: dict[str, ComponentEntry]
    nominal_bpw: float
    effective_bpw: float
    weights_hash: str
    calibration: Calibration = Field(default_factory=Calibration)
    adapter: Adapter | None = None
    checkpoint_format: str = ""
    """Format of a checkpoint that came quantized (``bitquake``, ``awq gemm``, ``gptq v1``, …); "" for others."""
    image_processor: str = ""
    """Class of the image processor: backends differ in how they resize."""
    libraries: dict[str, str] = Field(default_factory=dict)
    device: str = ""
    self_declared: bool = False
    """What somebody says of a model that answered elsewhere (``bitquake records import``): nothing in such a card was
    read from tensors, its widths are 0 (unknown), and it never pairs with a card that was."""

    @property
    def subject(self) -> str:
        """The model that was quantized, whatever it was loaded from: a run and its full-precision twin share it."""
        return f"{self.base or self.pretrained}{f' + {self.adapter.source}' if self.adapter else ''}"

    def to_json(self) -> str:
        """Canonical JSON: equal cards give equal bytes."""
        # Cards that were read from tensors keep the bytes, and so the hash, that they had before there were others.
        left_out = set() if self.self_declared else {"self_declared"}
        return json.dumps(self.model_dump(mode="json", exclude=left_out), sort_keys=True, separators=(",", ":"))

    @classmethod
    def declared(cls, model: str, quantization: str = "", *, twin: str = "", libraries: dict[str, str]) -> QuantCard:
        """The card of a model that answered elsewhere, as whoever imports its answers declares it.

        Args:
            model: what ran.
            quantization: how it was quantized; "": at full precision.
            twin: the full-precision model that it was made from, where ``model`` is another name.
            libraries: what ran it: name -> version.
        """
        name = quantization or "full-precision"
        return cls(
            pretrained=model,
            base=twin,
            architecture="undeclared",
            dtype="undeclared",
            spec_name=name,
            spec={"method": "imported", "name": name, "model": model},
            method="imported" if quantization else "none",
            execution="unknown" if quantization else "full-precision",
            kernel="unknown",
            components={},
            nominal_bpw=0.0,
            effective_bpw=0.0,
            weights_hash="",
            libraries=libraries,
            self_declared=True,
        )

    @property
    def content_hash(self) -> str:
        """blake2 hex of the canonical JSON: the card's name in the artifacts folder (``quant_cards/<hash>.json``)."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    @property
    def model_hash(self) -> str:
        """Hash of spec and weights: two runs with the same one ran the same model."""
        adapter = [self.adapter.hash] if self.adapter else []
        payload = json.dumps([self.weights_hash, self.spec, *adapter], sort_keys=True)
        return hashlib.blake2b(payload.encode(), digest_size=16).hexdigest()
