"""The packed format as a quantizer of transformers: importing this registers it.

``from_pretrained(name, quantization_config=BitquakeConfig("rtn-int4-g64"))`` quantizes each weight as it is read, so
that the model is never whole at full precision in memory; ``save_pretrained`` writes the packed tensors, and
``from_pretrained`` of that folder brings back the same bits. To run a saved model in the other execution::

    from_pretrained(folder, quantization_config=BitquakeConfig(execution="packed"))
"""

from __future__ import annotations

import ctypes
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from loguru import logger
from safetensors import SafetensorError, safe_open
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import ConversionOps, WeightConverter, WeightRenaming, rename_source_key
from transformers.quantizers import HfQuantizer, auto, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.linear import STORED, Execution, LinearLayout, QuantizedLinear
from bitquake.model_wrappers.quantizers.plan import QuantizationError, resolve
from bitquake.model_wrappers.quantizers.replace import library_linear, quantize_weight, quantized_linear
from bitquake.model_wrappers.quantizers.spec import CALIBRATED, LIBRARIES, QuantSpec, load_spec
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight

METHOD = "bitquake"
"""``quant_method`` in a checkpoint's config.json."""


class CheckpointError(ValueError):
    """A checkpoint whose tensors are not what its config says."""


class LoadingHooks:
    """What a caller wants to have to do with quantizing while loading.

    ``start(n)`` is told the number of modules before the first one; ``find(name, hash of its weight)`` gives one that
    is finished already, or None; ``finished(name, hash, weight)`` is told of each new one.
    """

    def find(self, name: str, before: str) -> QuantizedWeight | None:
        return None

    def finished(self, name: str, before: str, weight: QuantizedWeight) -> None:
        pass

    def start(self, n_modules: int) -> None:
        pass

    def __deepcopy__(self, memo: object) -> LoadingHooks:
        return self  # transformers copies its arguments; the hooks stay the caller's


@register_quantization_config(METHOD)
class BitquakeConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """Quantization config of transformers for the packed format.

    Args:
        quant: what ``quant=`` of the wrapper takes: a name with overrides, a file, a mapping. Only data-free methods
            can be carried out while loading; for others see ``bitquake quantize``.
        execution: ``simulated`` or ``packed``, instead of the spec's; the one thing that can be changed of a saved
            model.
        layouts: of a saved model: module name -> its ``LinearLayout`` as a mapping.
        before: module name -> hash of the weight before quantization.
        base, base_revision: what the model was quantized from.
        calibration: of a calibrated method: ``quant_card.Calibration`` as a mapping.
        hooks: see ``LoadingHooks``; not part of what is saved.

    Raises:
        QuantSpecError: ``quant`` is unknown or cannot be.
    """

    def __init__(
        self,
        quant: str | Mapping[str, Any] | QuantSpec | None = None,
        *,
        execution: Execution | None = None,
        layouts: Mapping[str, Mapping[str, Any]] | None = None,
        before: Mapping[str, str] | None = None,
        base: str = "",
        base_revision: str = "",
        calibration: Mapping[str, Any] | None = None,
        hooks: LoadingHooks | None = None,
        **_: Any,  # keys of a later version, and transformers' own
    ) -> None:
        self.quant_method = METHOD
        self.quant = load_spec(quant).options()
        self.execution = execution
        self.layouts = {name: dict(layout) for name, layout in (layouts or {}).items()}
        self.before = dict(before or {})
        self.base, self.base_revision = base, base_revision
        self.calibration = dict(calibration) if calibration else None
        self._hooks = hooks or LoadingHooks()

    @property
    def spec(self) -> QuantSpec:
        """The spec, in the execution that is wanted."""
        return load_spec(self.quant if self.execution is None else {**self.quant, "execution": self.execution})

    def get_loading_attributes(self) -> dict[str, Any]:
        """What ``from_pretrained(saved, quantization_config=BitquakeConfig(...))`` may change of a saved model."""
        return {} if self.execution is None else {"execution": self.execution}

    def to_dict(self) -> dict[str, Any]:
        """What goes into config.json."""
        kept = ("quant_method", "quant", "base", "base_revision", "calibration", "layouts", "before")
        return {key: value for key in kept if (value := getattr(self, key))}


# transformers asks this list whose arguments may change a saved model's config, and offers no way to register
auto.LOADING_ATTRIBUTES_CONFIG_TYPES = (*auto.LOADING_ATTRIBUTES_CONFIG_TYPES, BitquakeConfig)


class _QuantizeWeight(ConversionOps):  # type: ignore[misc]
    """Applied by transformers to each weight that it has just read."""

    def __init__(self, quantizer: BitquakeQuantizer) -> None:
        self.quantizer = quantizer

    def convert(
        self, input_dict: dict[str, Any], *, model: nn.Module, missing_keys: set[str] | None = None, **_: Any
    ) -> dict[str, Any]:
        """Put quantized modules in; what is returned is loaded as it is."""
        left = {}
        for key, value in input_dict.items():
            if self.quantizer.take(model, key, value[0] if isinstance(value, list) else value):
                (missing_keys if missing_keys is not None else set()).discard(key)
            else:
                left[key] = value
        return left


@register_quantizer(METHOD)
class BitquakeQuantizer(HfQuantizer):  # type: ignore[misc]
    """Quantizes while loading, and reads and writes what it quantized."""

    quantization_config: BitquakeConfig

    def __init__(self, quantization_config: BitquakeConfig, **kwargs: Any) -> None:
        super().__init__(quantization_config, **kwargs)
        self.targets: dict[str, QuantSpec] = {}
        self._failure: Exception | None = None
        self._pages = _MappedPages(())

    # what transformers asks

    def is_serializable(self) -> bool:
        return self.quantization_config.spec.method not in LIBRARIES

    @property
    def is_trainable(self) -> bool:
        return False

    def param_needs_quantization(self, model: nn.Module, param_name: str, **_: Any) -> bool:
        return param_name.endswith(".weight") and param_name.removesuffix(".weight") in self.targets

    def param_element_size(self, model: nn.Module, param_name: str, param: Tensor) -> float:
        if not self.param_needs_quantization(model, param_name):
            return float(param.element_size())
        spec = self.targets[param_name.removesuffix(".weight")]
        # a fourth of the codes is more than scales and zero-points take from group size 16 on
        codes = 1.25 * (spec.bits or 8) / 8
        return codes + (param.element_size() if spec.execution == "simulated" else 0)

    def get_quantize_ops(self) -> ConversionOps:
        return _QuantizeWeight(self)

    def get_state_dict_and_metadata(self, model: nn.Module) -> tuple[dict[str, Any], dict[str, str]]:
        """What is saved; layers that read the same input share its scales, and safetensors holds no tensor twice."""
        state: dict[str, Any] = model.state_dict()
        seen: set[int] = set()
        for name in self.quantization_config.layouts:
            key = f"{name}.input_scale"
            if key in state:
                if (place := state[key].data_ptr()) in seen:
                    state[key] = state[key].clone()
                seen.add(place)
        return state, {}

    def update_device_map(self, device_map: Any) -> Any:
        if isinstance(device_map, Mapping) and "disk" in device_map.values():
            raise QuantizationError("device_map puts modules on the disk, and a quantized model is held in memory only")
        return device_map

    def _process_model_before_weight_loading(
        self, model: Any, checkpoint_files: Sequence[str] | None = None, **_: Any
    ) -> None:
        config, files = self.quantization_config, [str(file) for file in checkpoint_files or ()]
        check_readable(files)
        self._pages = _MappedPages(files)
        if self.pre_quantized:
            _put_empty_layers(model, config)
            _check_stored(model, config, files)
            return
        spec = config.spec
        if spec.method in CALIBRATED:
            raise QuantizationError(
                f"quantization spec {spec.name!r}: method {spec.method} needs calibration data, which from_pretrained "
                f"does not have; use `bitquake quantize MODEL --quant {spec.name} --out DIR`, or quant= of bitquake_hf"
            )
        if spec.is_full_precision or spec.method == "checkpoint":
            raise QuantizationError(f"quantization spec {spec.name!r} does not quantize; leave quantization_config out")
        tied = getattr(model, "all_tied_weights_keys", None) or {}
        shared = {*tied.keys(), *tied.values()}
        self.targets = {name: one for name, one in resolve(model, spec).items() if f"{name}.weight" not in shared}
        config.before, config.layouts = {}, {}
        config._hooks.start(len(self.targets))

    def _process_model_after_weight_loading(self, model: Any, **_: Any) -> Any:
        config = self.quantization_config
        if self._failure is not None:
            raise self._failure
        for name in self.targets:  # a weight that came before its bias, or out of a fused tensor
            linear = model.get_submodule(name)
            if name not in config.before and not linear.weight.is_meta:
                self._replace(model, name, linear)
        config._hooks = LoadingHooks()
        _refuse_random_weights(model)
        quantized = {name: m for name, m in model.named_modules() if isinstance(m, QuantizedLinear)}
        for layer in quantized.values():
            _restore_dtypes(layer)
            layer.refresh()
        if not self.pre_quantized:
            config.layouts = {name: layer.layout.to_dict() for name, layer in quantized.items()}
        return model

    # quantizing while loading

    def take(self, model: Any, key: str, weight: Tensor) -> bool:
        """Quantize a weight that was just read; False leaves it to be loaded as it is.

        An exception would be buried in a table of transformers' that lists every tensor, so the first one is kept and
        raised after loading; weights that come after it are dropped.
        """
        name, _, leaf = key.rpartition(".")
        if leaf != "weight" or name not in self.targets:
            return False
        linear = model.get_submodule(name)
        if self._failure is not None:
            return True
        try:
            if weight.shape != linear.weight.shape:
                raise CheckpointError(
                    f"{key} has shape {tuple(weight.shape)} in the checkpoint and {tuple(linear.weight.shape)} in "
                    f"{type(model).__name__}: the checkpoint does not belong to its config.json"
                )
            if linear.bias is not None and linear.bias.is_meta:
                return False  # its bias comes later: done after loading
            linear.weight = nn.Parameter(weight, requires_grad=False)
            self._replace(model, name, linear)
        except Exception as error:  # transformers would bury it in a table of keys: raised after loading, as it is
            self._failure = error
        self._pages.release()
        return True

    def _replace(self, model: nn.Module, name: str, linear: nn.Linear) -> None:
        config, spec = self.quantization_config, self.targets[name]
        layer: nn.Module
        try:
            before = tensor_hash(linear.weight)
            if spec.method in LIBRARIES:
                layer = library_linear(linear, spec)
            else:
                weight = config._hooks.find(name, before)
                if weight is None:
                    weight = quantize_weight(linear.weight, spec)
                    config._hooks.finished(name, before, weight)
                layer = quantized_linear(linear, weight, spec)
        except QuantizationError as error:
            raise QuantizationError(f"{name} (shape {tuple(linear.weight.shape)}): {error}") from error
        config.before[name] = before
        for tensor in (*layer.parameters(), *layer.buffers()):
            tensor._is_hf_initialized = True  # type: ignore[attr-defined]  # or some _init_weights overwrites it
        layer._is_hf_initialized = True  # type: ignore[assignment]
        model.set_submodule(name, layer)


def make_savable(
    model: Any,
    spec: QuantSpec,
    before: Mapping[str, str],
    *,
    base: str = "",
    base_revision: str = "",
    calibration: Mapping[str, Any] | None = None,
) -> None:
    """Let ``save_pretrained`` write a model that was quantized after loading, as if ``from_pretrained`` had done it.

    Args:
        model: a transformers model with ``QuantizedLinear`` modules that still have their codes.
        spec: what was done.
        before: ``quantize_model``'s result.
        base, base_revision, calibration: as of ``BitquakeConfig``.

    Raises:
        QuantizationError: nothing in it is in the packed format.
    """
    layouts = {
        name: module.layout.to_dict() for name, module in model.named_modules() if isinstance(module, QuantizedLinear)
    }
    if not layouts:
        raise QuantizationError(
            f"quantization spec {spec.name!r}: the model holds no module in the packed format, so there is nothing to "
            "save that from_pretrained of the full-precision model does not give"
        )
    config = BitquakeConfig(
        spec, layouts=layouts, before=before, base=base, base_revision=base_revision, calibration=calibration
    )
    model.config.quantization_config = config
    model.hf_quantizer = BitquakeQuantizer(config, pre_quantized=True)
    model.quantization_method, model.is_quantized = METHOD, True


def _put_empty_layers(model: Any, config: BitquakeConfig) -> None:
    """Replace the Linear modules that a checkpoint holds quantized by empty layers."""
    if not config.layouts:
        raise CheckpointError(
            f"config.json says quant_method {METHOD} and names no quantized module (layouts); save the model again"
        )
    # some architectures keep parts of the model in float32 whatever its dtype
    whole = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(model.dtype)]
    for name, values in config.layouts.items():
        try:
            linear = model.get_submodule(name)
        except AttributeError:
            linear = None
        if type(linear) is not nn.Linear:
            raise CheckpointError(
                f"config.json says that {name} is quantized, and {type(model).__name__} of this transformers version "
                f"has {'no such module' if linear is None else f'a {type(linear).__name__} there'}; "
                "load it with the version that saved it, or quantize the model again"
            )
        try:
            layout = LinearLayout.from_dict(values)
            kept = any(re.search(pattern, f"{name}.weight") for pattern in whole)
            layer = QuantizedLinear(
                linear.in_features, linear.out_features, layout=layout, bias=linear.bias is not None, device="meta",
                dtype=torch.float32 if kept else linear.weight.dtype, execution=config.spec.execution,
            )  # fmt: skip
        except (ValueError, AttributeError) as error:
            raise CheckpointError(f"config.json: layout of {name}: {error}") from error
        model.set_submodule(name, layer)


@dataclass(frozen=True)
class StoredTensor:
    """Header of one tensor in a checkpoint: its file, its name there, dtype as safetensors calls it, and shape."""

    file: str
    key: str
    dtype: str
    shape: tuple[int, ...]


_STORED_DTYPES = {
    torch.uint8: "U8", torch.int8: "I8", torch.int32: "I32", torch.float16: "F16", torch.bfloat16: "BF16",
    torch.float32: "F32",
}  # fmt: skip


def check_readable(files: Iterable[str]) -> None:
    """Open each safetensors file's header.

    Raises:
        CheckpointError: a file is cut short or none of its kind.
    """
    for file in files:
        if file.endswith(".safetensors"):
            try:
                with safe_open(file, framework="pt"):
                    pass
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{file}: is no whole safetensors file ({error}); it was cut short or is damaged: copy or "
                    "download it again"
                ) from error


def stored_tensors(model: nn.Module, files: Iterable[str]) -> dict[str, StoredTensor]:
    """Headers of a checkpoint's safetensors files by the names that the model gives its tensors."""
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    names = model.state_dict()
    found = {}
    for file in files:
        if not file.endswith(".safetensors"):
            continue
        with safe_open(file, framework="pt") as opened:
            for key in opened.keys():  # noqa: SIM118  # no mapping
                part = opened.get_slice(key)
                name, _ = rename_source_key(key, renamings, converters, model.base_model_prefix, names)
                if name not in names and key in names:
                    name = key
                found[name] = StoredTensor(file, key, part.get_dtype(), tuple(part.get_shape()))
    return found


def _check_stored(model: nn.Module, config: BitquakeConfig, files: Sequence[str]) -> None:
    """A checkpoint holds what its config says; a cast on loading would hide that it does not."""
    if not files or not all(file.endswith(".safetensors") for file in files):
        return
    found = stored_tensors(model, files)
    said = f"config.json says {config.spec.name} with {len(config.layouts)} quantized modules"
    if dense := [name for name in config.layouts if f"{name}.codes" not in found and f"{name}.weight" in found]:
        kind = found[f"{dense[0]}.weight"].dtype
        raise CheckpointError(
            f"{said}, but {len(dense)} of them are stored as plain {kind} weights without codes (first {dense[0]}): "
            "it is not the quantized model. Quantize it again, or remove quantization_config from config.json to run "
            "what is there"
        )
    for name in config.layouts:
        layer = model.get_submodule(name)
        assert isinstance(layer, QuantizedLinear)
        for leaf, (shape, dtype) in layer.layout.shapes(layer.in_features, layer.out_features).items():
            stored, expected = found.get(f"{name}.{leaf}"), _STORED_DTYPES.get(dtype, str(dtype))
            if stored is None:
                raise CheckpointError(f"{said}, but {name}.{leaf} is in none of its files; save or copy it again")
            if (stored.dtype, stored.shape) != (expected, shape):
                raise CheckpointError(
                    f"{said}, but {name}.{leaf} is {stored.dtype} of shape {stored.shape} in {stored.file}, "
                    f"not {expected} of shape {shape}; save the model again"
                )


def _refuse_random_weights(model: Any) -> None:
    """Raise for tensors that no file held: transformers fills them with random numbers, and only warns."""
    ignored = [re.compile(pattern) for pattern in model._keys_to_ignore_on_load_missing or ()]
    kept = {name for name in model.state_dict() if not any(pattern.search(name) for pattern in ignored)}
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    if missing := [n for n, t in tensors.items() if n in kept and not getattr(t, "_is_hf_initialized", False)]:
        raise CheckpointError(
            f"{len(missing)} tensors of {type(model).__name__} are in no file of the checkpoint (first {missing[0]}), "
            "so their values would be random; it is incomplete or belongs to another model"
        )


def _restore_dtypes(layer: QuantizedLinear) -> None:
    """transformers casts what it keeps in float32, scales too; the way back is exact."""
    shapes = layer.layout.shapes(layer.in_features, layer.out_features)
    for leaf in STORED:
        tensor = getattr(layer, leaf)
        if tensor is not None and tensor.dtype != shapes[leaf][1]:
            setattr(layer, leaf, tensor.to(shapes[leaf][1]))


class _MappedPages:
    """Gives the memory of mapped checkpoint files back as loading goes on (Linux; elsewhere it does nothing).

    transformers maps the files and reads from the map. What was read stays counted as the process's memory until the
    map is closed, which would be the whole full-precision model. The pages are the file's own: read again, they come
    back. Maps that were there before are left alone: somebody may have changed a weight in one.
    """

    def __init__(self, files: Iterable[str]) -> None:
        self._files = {os.path.realpath(file) for file in files} if sys.platform == "linux" else set()
        self._before = {start for start, _ in self._maps()}
        self._madvise: Callable[..., int] | None = None
        if self._files:
            self._madvise = ctypes.CDLL(None).madvise

    def release(self) -> None:
        if self._madvise is None:
            return
        for start, end in self._maps():
            if start not in self._before:
                self._madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), 4)  # MADV_DONTNEED

    def _maps(self) -> list[tuple[int, int]]:
        if not self._files:
            return []
        found = []
        try:
            with open("/proc/self/maps", encoding="utf-8", errors="surrogateescape") as lines:
                for line in lines:
                    fields = line.rstrip("\n").split(maxsplit=5)  # span, permissions, offset, device, inode, path
                    if len(fields) == 6 and fields[5] in self._files:
                        start, end = fields[0].split("-")
                        found.append((int(start, 16), int(end, 16)))
        except OSError as error:
            logger.debug(f"maps of this process cannot be read: {error}")
        return found
