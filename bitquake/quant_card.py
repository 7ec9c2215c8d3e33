"""The quant card: what was really done to a model, read from its loaded tensors, never from its spec."""

from __future__ import annotations

import hashlib
import json
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

CARD_VERSION = 1


class ModuleEntry(BaseModel):
    """One quantized module, as found in the loaded model.

    ``hash_before``/``hash_after``: blake2 hex of the (de-quantized) weight's bytes before and after; ``changed`` is
    their inequality. ``bits`` counts the integer codes' bits; ``n_bytes`` everything stored for the weight in the
    declared execution (for ``simulated``: the bytes of the de-quantized tensor held in memory).
    ``packed_bytes``: bytes of codes, scales and zeros in the packed format, whatever the execution.
    """

    model_config = ConfigDict(extra="forbid")

    name: str
    component: str
    shape: tuple[int, int]
    bits: int
    group_size: int
    symmetric: bool
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
    """Calibration data: source (``none`` for data-free methods), number of samples, hash of their image ids."""

    model_config = ConfigDict(extra="forbid")

    source: str = "none"
    n_samples: int = 0
    ids_hash: str = ""


class QuantCard(BaseModel):
    """The quant card of one loaded model; a full-precision model has one too (``method: none``).

    ``nominal_bpw``: (sum of bits x weights over quantized modules + stored bits of everything else) / all parameters.
    ``effective_bpw``: the same with scales and zeros counted. ``weights_hash``: blake2 over every parameter and
    persistent buffer of the model as it computes (de-quantized), in name order.
    """

    model_config = ConfigDict(extra="forbid")

    version: int = CARD_VERSION
    pretrained: str
    revision: str = ""
    architecture: str
    dtype: str
    spec_name: str
    spec: dict[str, Any] = Field(default_factory=dict)
    method: str
    execution: Literal["full-precision", "simulated", "packed"]
    kernel: str
    modules: list[ModuleEntry] = Field(default_factory=list)
    kept: dict[str, str] = Field(default_factory=dict)
    """Linear modules left at full precision: name -> dtype."""
    components: dict[str, ComponentEntry]
    nominal_bpw: float
    effective_bpw: float
    weights_hash: str
    calibration: Calibration = Field(default_factory=Calibration)
    libraries: dict[str, str] = Field(default_factory=dict)
    device: str = ""

    def to_json(self) -> str:
        """Canonical JSON: equal cards give equal bytes."""
        return json.dumps(self.model_dump(mode="json"), sort_keys=True, separators=(",", ":"))

    @property
    def content_hash(self) -> str:
        """blake2 hex of the canonical JSON: the card's name in the artifacts folder (``quant_cards/<hash>.json``)."""
        return hashlib.blake2b(self.to_json().encode(), digest_size=16).hexdigest()

    @property
    def model_hash(self) -> str:
        """Hash of spec and weights: two runs with the same one ran the same model."""
        payload = json.dumps([self.weights_hash, self.spec], sort_keys=True)
        return hashlib.blake2b(payload.encode(), digest_size=16).hexdigest()
