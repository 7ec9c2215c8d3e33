"""What a checkpoint's own files say about its quantization: ``read_config``."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from bitquake.model_wrappers.quantizers.published import awq, gptq
from bitquake.model_wrappers.quantizers.published.compressed_tensors import Scheme, read_schemes
from bitquake.model_wrappers.quantizers.published.grace import SIDECAR
from bitquake.model_wrappers.quantizers.published.stored import PublishedCheckpointError

PublishedMethod = Literal["awq", "gptq", "compressed-tensors", "grace"]
_GRACE_MODULES = "awq_quantized_modules.json"
_SIDE_FILES = {"quantize_config.json": "gptq", "quant_config.json": "awq"}  # what each means if it names no method


@dataclass(frozen=True)
class PublishedFormat:
    """What a published checkpoint claims to be.

    Attributes:
        method: whose format.
        variant: ``gemm``; ``v1``, ``v2``; the format of compressed-tensors; ``packed`` or ``sidecar`` of GRACE.
        bits: of the weights; None where it differs by module.
        group_size: columns that share a scale; -1: a row; None: not said, or different by module.
        source: file that says so.
        settings: all of it, as it stands there.
        schemes: of compressed-tensors.
    """

    method: PublishedMethod
    variant: str
    bits: int | None
    group_size: int | None
    source: str
    settings: Mapping[str, Any] = field(default_factory=dict)
    schemes: tuple[Scheme, ...] = ()

    def __str__(self) -> str:
        bits = "" if self.bits is None else f", {self.bits} bits"
        group = {None: "", -1: ", a scale per row"}.get(self.group_size, f", groups of {self.group_size}")
        return f"{self.method} {self.variant}{bits}{group} ({self.source})"


def read_config(
    checkpoint: str | Path | Mapping[str, Any] | Any, *, revision: str | None = None
) -> PublishedFormat | None:
    """What a checkpoint says of its quantization; None where it says nothing that is read here.

    Args:
        checkpoint: a folder, a hub name, a config.json as a mapping, or a config of transformers. With a folder or a
            hub name the files beside config.json count, too.
        revision: of a hub name.

    Raises:
        PublishedCheckpointError: a variant that is not read, by its name; a file that is no JSON.
    """
    if isinstance(checkpoint, Mapping):
        return _from_config(checkpoint, "config.json")
    if hasattr(checkpoint, "to_dict"):
        return _from_config(checkpoint.to_dict(), "config.json")
    name = str(checkpoint)
    if found := _from_config(_read_json(name, "config.json", revision) or {}, "config.json"):
        return found
    for file, method in _SIDE_FILES.items():
        if settings := _read_json(name, file, revision):
            return _read_settings({"quant_method": method, **settings}, file)
    if settings := _read_json(name, _GRACE_MODULES, revision):
        return _packed_grace(settings, _GRACE_MODULES)
    if find_file(name, SIDECAR, revision) is not None:
        return PublishedFormat("grace", "sidecar", None, None, SIDECAR)
    return None


def find_file(name: str, file: str, revision: str | None) -> Path | None:
    """The path of a checkpoint's file, downloaded if need be; None where it has none."""
    if Path(name).is_dir():
        path = Path(name) / file
        return path if path.is_file() else None
    from transformers.utils.hub import cached_file

    found = cached_file(
        name, file, revision=revision, _raise_exceptions_for_missing_entries=False,
        _raise_exceptions_for_connection_errors=False,
    )  # fmt: skip
    return None if found is None else Path(found)


def _read_json(name: str, file: str, revision: str | None) -> dict[str, Any] | None:
    path = find_file(name, file, revision)
    if path is None:
        return None
    try:
        values = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PublishedCheckpointError(f"{path} is no JSON: {error}") from error
    if not isinstance(values, dict):
        raise PublishedCheckpointError(f"{path}: expected one object, got {type(values).__name__}")
    return values


def _from_config(config: Mapping[str, Any], source: str) -> PublishedFormat | None:
    nested = config.get("text_config")
    for holder in (config, nested if isinstance(nested, Mapping) else {}):
        settings = holder.get("quantization_config") or holder.get("compression_config")
        if settings is not None:
            settings = settings.to_dict() if hasattr(settings, "to_dict") else settings
            return _read_settings(settings, source)
    packing = config.get("awq_packing")
    return _packed_grace(packing, source) if isinstance(packing, Mapping) else None


def _packed_grace(settings: Mapping[str, Any], source: str) -> PublishedFormat:
    if (bits := settings.get("bits", awq.BITS)) != awq.BITS:
        raise PublishedCheckpointError(f"{source}: GRACE packs {awq.BITS} bits in AutoAWQ's layout, not {bits}")
    return PublishedFormat("grace", "packed", awq.BITS, None, source, dict(settings))


def _read_settings(settings: Mapping[str, Any], source: str) -> PublishedFormat | None:
    method = str(settings.get("quant_method") or ("compressed-tensors" if "config_groups" in settings else ""))
    try:
        if method == "awq":
            return _awq(settings, source)
        if method == "gptq":
            return _gptq(settings, source)
        if method == "compressed-tensors":
            schemes = read_schemes(settings)
            formats, bits = {scheme.format for scheme in schemes}, {scheme.bits for scheme in schemes}
            groups = {scheme.group_size for scheme in schemes}
            return PublishedFormat(
                "compressed-tensors", "+".join(sorted(formats)), bits.pop() if len(bits) == 1 else None,
                groups.pop() if len(groups) == 1 else None, source, dict(settings), schemes,
            )  # fmt: skip
    except PublishedCheckpointError as error:
        raise PublishedCheckpointError(f"{source}: {error}") from error
    return None


def _integer(settings: Mapping[str, Any], *keys: str) -> int | None:
    for key in keys:
        value = settings.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return value
        if value is not None:
            raise PublishedCheckpointError(f"{key} must be a whole number, got {value!r}")
    return None


def _awq(settings: Mapping[str, Any], source: str) -> PublishedFormat:
    said = settings.get("version") or settings.get("checkpoint_format") or settings.get("format") or "gemm"
    version = str(said).lower()
    if version != "gemm" or settings.get("backend") == "llm-awq":
        raise PublishedCheckpointError(
            f"AWQ version {version if version != 'gemm' else 'llm-awq'!r} is not read, gemm is; "
            "use a GEMM checkpoint, or quantize the full-precision model with quant=awq-int4-g128"
        )
    bits = _integer(settings, "bits", "w_bit")
    if bits not in (None, awq.BITS):
        raise PublishedCheckpointError(f"AWQ's GEMM layout has {awq.BITS} bits, and the config says {bits}")
    return PublishedFormat(
        "awq", "gemm", awq.BITS, _integer(settings, "group_size", "q_group_size"), source, dict(settings)
    )


def _gptq(settings: Mapping[str, Any], source: str) -> PublishedFormat:
    layout = str(settings.get("checkpoint_format") or settings.get("format") or "gptq").lower()
    if settings.get("is_marlin_format"):
        layout = "marlin"
    variants = {"gptq": "v1", "gptq_v1": "v1", "gptq_v2": "v2"}
    if layout not in variants:
        raise PublishedCheckpointError(
            f"GPTQ checkpoint_format {layout!r} is not read; gptq (v1) and gptq_v2 are. Use such a checkpoint, or "
            "quantize the full-precision model with quant=gptq-int4-g128"
        )
    bits, group = _integer(settings, "bits"), _integer(settings, "group_size")
    if bits is not None and bits not in gptq.BITS:
        raise PublishedCheckpointError(
            f"GPTQ layouts of {', '.join(map(str, gptq.BITS))} bits are read, and the config says {bits}"
        )
    if settings.get("dynamic"):  # GPTQModel: other settings for some modules
        bits = group = None
    return PublishedFormat("gptq", variants[layout], bits, group, source, dict(settings))
