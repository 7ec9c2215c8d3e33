"""Quantizers: a spec names a quantization, ``replace.quantize_model`` carries it out. Importing this loads no torch."""

from __future__ import annotations

from bitquake.model_wrappers.quantizers.spec import QuantSpec, QuantSpecError, list_specs, load_spec

__all__ = ["QuantSpec", "QuantSpecError", "list_specs", "load_spec"]
