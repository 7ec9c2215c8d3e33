"""Loads a published checkpoint through transformers, its quantized modules in the packed format."""

from __future__ import annotations

import copy
import hashlib
import re
from collections import defaultdict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from loguru import logger
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.linear import Execution, QuantizedLinear
from bitquake.model_wrappers.quantizers.packing import row_bytes
from bitquake.model_wrappers.quantizers.published import awq, compressed_tensors, gptq, grace
from bitquake.model_wrappers.quantizers.published.compressed_tensors import scheme_of
from bitquake.model_wrappers.quantizers.published.formats import PublishedFormat, find_file, read_config
from bitquake.model_wrappers.quantizers.published.grid import detect_grid
from bitquake.model_wrappers.quantizers.published.stored import PublishedCheckpointError
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

_METHOD = "bitquake-published"


def load_published(
    pretrained: str,
    config: Any,
    *,
    loader: Any,
    dtype: torch.dtype,
    execution: Execution,
    revision: str | None = None,
    published: PublishedFormat | None = None,
    **arguments: Any,
) -> tuple[Any, dict[str, str], PublishedFormat]:
    """Load a checkpoint that ``read_config`` recognises.

    transformers reads the files, renames the keys and fills everything that is not quantized; the modules that are
    (by the tensors that are there, whatever the config lists) are then read one at a time. Their full-precision
    weights are never in memory, except, with ``simulated``, the de-quantized ones that are computed with.

    Args:
        pretrained: folder or hub name.
        config: its config of transformers; left alone.
        loader: a model class or auto class of transformers.
        dtype: of everything that is not quantized, and of de-quantized weights.
        execution: of the quantized modules.
        published: ``read_config(pretrained, revision=revision)``, if it is at hand.
        arguments: further ones of ``from_pretrained`` (``device_map``, ``attn_implementation``, …).

    Returns:
        The model in evaluation mode; name of each quantized module -> blake2 hex of its tensors as they were stored;
        what the checkpoint said.

    Raises:
        PublishedCheckpointError: the tensors are not what the config says (a plain weight where it says INT4, another
            shape, bits that are not read), a file is missing, cut short or a pickle, or the model lacks a module.
    """
    published = published or read_config(pretrained, revision=revision)
    if published is None:
        raise PublishedCheckpointError(
            f"{pretrained}: no file of it says that it is quantized in a format that is read"
        )
    config = copy.deepcopy(config)
    for holder in (config, getattr(config, "text_config", None)):
        for key in ("quantization_config", "compression_config"):
            if holder is not None and hasattr(holder, key):
                delattr(holder, key)
    stem = published.settings.get("model_file_base_name")
    if stem and stem != "model":  # AutoGPTQ's way to name the file
        config.transformers_weights = f"{stem}.safetensors"
    sidecar = find_file(pretrained, grace.SIDECAR, revision) if published.variant == "sidecar" else None
    try:
        model, info = loader.from_pretrained(
            pretrained, config=config, revision=revision, dtype=dtype, use_safetensors=True, output_loading_info=True,
            quantization_config=_PublishedConfig(pretrained, published, execution, sidecar), **arguments,
        )  # fmt: skip
    except OSError as error:
        raise PublishedCheckpointError(
            f"{pretrained}: {error}. Only safetensors are loaded, never pickles; a shard that the index names may be "
            "missing: download the checkpoint again"
        ) from error
    quantizer: _PublishedQuantizer = model.hf_quantizer
    quantizer.remove_quantization_config(model)
    _refuse_incomplete(pretrained, info)
    return model.eval(), quantizer.hashes, published


def _refuse_incomplete(pretrained: str, info: Mapping[str, Any]) -> None:
    if missing := sorted(info["missing_keys"]):
        raise PublishedCheckpointError(
            f"{pretrained}: {len(missing)} tensors of the model are in no file (first {missing[0]}), so their values "
            "would be random; the checkpoint is incomplete"
        )
    if scaled := sorted(key for key in info["unexpected_keys"] if key.endswith(".scales")):
        raise PublishedCheckpointError(
            f"{pretrained}: {scaled[0]} divides an activation (AutoAWQ's ScaledActivation), which is not carried out"
        )


class _PublishedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Brings what ``load_published`` knows to the quantizer; never saved."""

    def __init__(self, checkpoint: str, published: PublishedFormat, execution: Execution, sidecar: Path | None) -> None:
        self.quant_method = _METHOD
        self.checkpoint, self.published, self.execution, self.sidecar = checkpoint, published, execution, sidecar

    def to_dict(self) -> dict[str, Any]:
        return {"quant_method": self.quant_method}


class _Pending(nn.Module):
    """Stands for a quantized module until transformers has loaded the rest, and says on which device it is to be.

    ``room`` has the size that the module will have, for a ``device_map`` that is made to fit.
    """

    def __init__(self, linear: nn.Linear, dtype: torch.dtype, execution: Execution) -> None:
        super().__init__()
        self.in_features, self.out_features, self.dtype = linear.in_features, linear.out_features, dtype
        self.bias = linear.bias
        simulated = execution == "simulated"
        width = linear.in_features if simulated else row_bytes(linear.in_features, 4)
        room = torch.empty(linear.out_features, width, dtype=dtype if simulated else torch.uint8, device="meta")
        self.register_buffer("room", room, persistent=False)
        self.room: Tensor

    @property
    def weight(self) -> Tensor:
        """For initializers of transformers that look at every Linear's weight; they leave it alone."""
        weight = torch.empty(self.out_features, self.in_features, dtype=self.dtype, device="meta")
        weight._is_hf_initialized = True  # type: ignore[attr-defined]
        return weight


class _Files:
    """Tensors of a checkpoint by their keys, read when they are asked for."""

    def __init__(self, paths: Sequence[str]) -> None:
        self._path: dict[str, str] = {}
        for path in paths:
            try:
                with safe_open(path, framework="pt") as opened:
                    self._path.update(dict.fromkeys(opened.keys(), path))
            except FileNotFoundError as error:
                raise PublishedCheckpointError(
                    f"{path} is missing, and the index names it; download the checkpoint again"
                ) from error
            except (SafetensorError, OSError) as error:
                raise PublishedCheckpointError(
                    f"{path} is no whole safetensors file ({error}): it was cut short or is damaged; download it again"
                ) from error

    def __iter__(self) -> Any:
        return iter(self._path)

    def __contains__(self, key: str) -> bool:
        return key in self._path

    def read(self, key: str) -> Tensor:
        with safe_open(self._path[key], framework="pt") as opened:
            return opened.get_tensor(key)  # type: ignore[no-any-return]

    def header(self, key: str) -> tuple[str, tuple[int, ...]]:
        """dtype as safetensors calls it, and shape."""
        with safe_open(self._path[key], framework="pt") as opened:
            part = opened.get_slice(key)
            return part.get_dtype(), tuple(part.get_shape())


@register_quantizer(_METHOD)
class _PublishedQuantizer(HfQuantizer):  # type: ignore[misc]
    quantization_config: _PublishedConfig

    def __init__(self, quantization_config: _PublishedConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.hashes: dict[str, str] = {}
        self._stored: dict[str, dict[str, str]] = {}  # module -> leaf -> key in the files
        self._names: dict[str, str] = {}  # module -> its name in the checkpoint
        self._files = _Files(())
        self._sidecar: dict[str, dict[str, Tensor]] = {}
        self._leaves: tuple[str, ...] = ()
        self._wrapped: dict[str, int] = {}

    def is_serializable(self) -> bool:
        return False

    @property
    def is_trainable(self) -> bool:
        return False

    def _process_model_before_weight_loading(
        self, model: nn.Module, checkpoint_files: Sequence[str] | None = None, dtype: Any = None, **_: Any
    ) -> None:
        config = self.quantization_config
        self._files = _Files([str(file) for file in checkpoint_files or ()])
        self._leaves = _leaves(config.published)
        found = _modules_by_key(self._files, config.published)
        if config.sidecar is not None and not found:
            self._sidecar = grace.read_sidecar(config.sidecar)
            found = {name: {} for name in self._sidecar}
        if not found:
            raise self._no_quantized_tensors(model)
        self._names = _rename(model, found)
        self._stored = {name: found[source] for name, source in self._names.items()}
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        whole = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(model.dtype)]  # type: ignore[operator]
        for name, source in self._names.items():
            linear = model.get_submodule(name)
            if type(linear) is not nn.Linear:
                raise self._error(f"holds {source} quantized, and {name} is a {type(linear).__name__}, not a Linear")
            if f"{name}.weight" in {*tied.keys(), *tied.values()}:
                raise self._error(
                    f"holds {source} quantized, which its config ties to another weight; that is not read"
                )
            # some architectures keep parts of the model in float32 whatever its dtype
            kept = any(re.search(pattern, f"{name}.weight") for pattern in whole)
            kind = torch.float32 if kept else linear.weight.dtype
            model.set_submodule(name, _Pending(linear, kind, config.execution))
        taken = "|".join(re.escape(name) for name in self._names)
        ignored = set(model._keys_to_ignore_on_load_unexpected or ())  # type: ignore[arg-type]
        leaves = "|".join(("weight", *self._leaves))
        model._keys_to_ignore_on_load_unexpected = {*ignored, rf"^({taken})\.({leaves})$"}  # type: ignore[assignment]

    def _process_model_after_weight_loading(self, model: nn.Module, **_: Any) -> nn.Module:
        for name, keys in self._stored.items():
            pending = model.get_submodule(name)
            assert isinstance(pending, _Pending)
            if pending.room.is_meta:
                raise self._error(f"{name} would be offloaded; use a device_map that keeps the model on devices")
            model.set_submodule(name, self._quantized(name, keys, pending))
        if self._wrapped:
            logger.warning(
                f"{self.quantization_config.checkpoint}: {sum(self._wrapped.values())} zero-points in "
                f"{len(self._wrapped)} modules (first {next(iter(self._wrapped))}) are 0, which GPTQ v1 cannot store "
                "and packers write differently; they are read as GPTQModel does"
            )
        return model

    def _quantized(self, name: str, keys: Mapping[str, str], pending: _Pending) -> QuantizedLinear:
        config = self.quantization_config
        tensors = {leaf: self._files.read(key) for leaf, key in keys.items()} or self._sidecar[self._names[name]]
        self.hashes[name] = _hash(tensors)
        try:
            weight, activation_bits = self._read(name, tensors, pending)
        except PublishedCheckpointError as error:
            raise self._error(f"{self._names[name]}: {error}") from error
        device = pending.room.device
        pending.room = torch.empty(0)  # gives its memory back before the weight is moved there
        return QuantizedLinear.from_weight(
            weight.to(device), bias=pending.bias, dtype=pending.dtype, execution=config.execution,
            activation_bits=activation_bits,
        ).eval()  # fmt: skip

    def _read(self, name: str, tensors: Mapping[str, Tensor], pending: _Pending) -> tuple[QuantizedWeight, int | None]:
        published = self.quantization_config.published
        rows, columns = pending.out_features, pending.in_features
        if published.method == "gptq":
            version: Literal[1, 2] = 1 if published.variant == "v1" else 2
            weight = gptq.read_gptq(
                tensors, in_features=columns, out_features=rows, bits=published.bits, group_size=published.group_size,
                version=version,
            )  # fmt: skip
            if version == 1 and (n := gptq.wrapped_zeros(tensors["qzeros"], weight.bits, rows)):
                self._wrapped[name] = n
            return weight, None
        if published.method == "compressed-tensors":
            scheme = scheme_of(published.schemes, (name, self._names[name]))
            weight = compressed_tensors.read_compressed(tensors, in_features=columns, out_features=rows, scheme=scheme)
            return weight, scheme.activation_bits
        if self._sidecar:
            return grace.read_grace(tensors, in_features=columns, out_features=rows), None
        return awq.read_awq(tensors, in_features=columns, out_features=rows, group_size=published.group_size), None

    def _no_quantized_tensors(self, model: nn.Module) -> PublishedCheckpointError:
        """The error for a config that says it is quantized over tensors that are not."""
        published = self.quantization_config.published
        dense: dict[str, dict[str, str]] = {
            key.removesuffix(".weight"): {} for key in self._files if key.endswith(".weight")
        }
        named = _rename(model, dense, strict=False)
        for name, source in named.items():
            key = f"{source}.weight"
            kind, shape = self._files.header(key)
            if type(model.get_submodule(name)) is not nn.Linear or not kind.startswith(("F", "BF")):
                continue
            with torch.device("cpu"):  # transformers calls with meta as the default
                grid = detect_grid(self._files.read(key))
            on_grid = f" (its values lie on a {grid})" if grid is not None else ""
            return self._error(
                f"{published} says that it is quantized, but its tensors are not: {key} is plain {kind} of shape "
                f"{shape}{on_grid}, and no module has {', '.join(self._leaves)}. It is not the packed model: get that, "
                "or remove the quantization settings from its folder to run what is there"
            )
        return self._error(f"{published} says that it is quantized, but no tensor in its files is ({self._leaves})")

    def _error(self, message: str) -> PublishedCheckpointError:
        return PublishedCheckpointError(f"{self.quantization_config.checkpoint}: {message}")


def _leaves(published: PublishedFormat) -> tuple[str, ...]:
    if published.method == "gptq":
        return gptq.LEAVES
    if published.method == "compressed-tensors":
        return (*compressed_tensors.LEAVES, *compressed_tensors.STATIC_LEAVES)
    return awq.LEAVES


def _modules_by_key(files: _Files, published: PublishedFormat) -> dict[str, dict[str, str]]:
    """Name of each quantized module in the checkpoint -> leaf -> key, by the tensors that are there."""
    leaves = _leaves(published)
    found: dict[str, dict[str, str]] = defaultdict(dict)
    for key in files:
        name, _, leaf = key.rpartition(".")
        if leaf in leaves:
            found[name][leaf] = key
    # a plain weight alone belongs to a module that is not quantized
    return {name: keys for name, keys in found.items() if set(keys) - {"weight"}}


def _rename(model: Any, found: Mapping[str, object], *, strict: bool = True) -> dict[str, str]:
    """Name of each module in the model -> its name in the checkpoint, by transformers' own conversion rules.

    Raises:
        PublishedCheckpointError: strict, and the model has no such module or fuses it with others.
    """
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    known = model.state_dict()
    names = {}
    for source in found:
        key = f"{source}.weight"
        name, fused = rename_source_key(key, renamings, converters, model.base_model_prefix, known)
        if name not in known and key in known:
            name, fused = key, None
        if fused is None and name in known:
            names[name.removesuffix(".weight")] = source
        elif strict:
            what = "is fused with others by transformers" if fused else f"would be {name.removesuffix('.weight')}"
            raise PublishedCheckpointError(
                f"the checkpoint holds {source} quantized, which {what} in {type(model).__name__}: no module takes it. "
                "It belongs to another model or version of transformers"
            )
    return names


def _hash(tensors: Mapping[str, Tensor]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for leaf in sorted(tensors):
        digest.update(f"{leaf}:{tensor_hash(tensors[leaf])};".encode())
    return digest.hexdigest()
