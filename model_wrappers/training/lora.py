"""LoRA adapters (Hu et al. 2021) on a base at full precision or quantized by any of our quantizers (as QLoRA does).

The base stays as it is; gradients flow through it to the adapters below. What is saved is a standard peft adapter,
which ``bitquake_hf adapter=FOLDER,quant=SAME`` puts on the same base.
"""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import nn

from ..calibration import build_calibration
from ..components import component_map
from ..loading import load_quantized, resolve_pretrained, without_progress_bars
from ..quantizers.linear import QuantizedLinear
from ..quantizers.replace import quantize_model
from .config import LoraConfig, QatConfig, training_hash
from .loop import Outcome, Trainee
from .run import ADAPTER_FOLDER, BASE_FILE, Prepared, processor_of
from .seen import store_seen

if TYPE_CHECKING:
    from .examples import Examples


class AdapterError(ValueError):
    """An adapter that cannot be put on a model."""


def prepare_lora(config: LoraConfig, folder: Path, device: torch.device) -> Prepared:
    """The base with its adapter, ready to be trained.

    Raises:
        AdapterError: peft is not installed, or ``target`` names nothing in the model.
        ValueError: as ``load_quantized`` and ``build_calibration``.
    """
    from .objective import QatObjective

    processor = processor_of(config)
    model = load_base(config, processor, device)
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    torch.manual_seed(config.seed)  # of the adapters' first values
    wrapped = put_on(model, config)
    if config.gradient_checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    learning = [p for p in model.parameters() if p.requires_grad]
    groups = [{"name": "adapters", "params": learning, "lr": config.rate, "weight_decay": config.weight_decay}]
    # the answers' cross-entropy is what is left of GRACE without a teacher
    plain = QatConfig(
        pretrained=config.pretrained, data=config.data, steps=1, bits=16, distillation=False, relational=False,
        scale_rate=config.rate,
    )  # fmt: skip

    def write(outcome: Outcome, examples: Examples) -> Mapping[str, Any]:
        out = folder / ADAPTER_FOLDER
        with without_progress_bars():
            wrapped.save_pretrained(str(out), save_embedding_layers=False)
        store_seen(outcome.image_ids, out, training_hash(config))
        quant = _spec_file(config.quant, folder) if isinstance(config.quant, dict) else config.quant or ""
        return {"pretrained": config.pretrained, "quant": quant, "adapter": ADAPTER_FOLDER}

    return Prepared(Trainee(model, groups, lambda inner: QatObjective(inner, None, plain)), processor, write)


def _spec_file(quant: Mapping[str, Any], folder: Path) -> str:
    """A file with the base's quantization, which has no name."""
    import yaml

    (folder / BASE_FILE).write_text(yaml.safe_dump(dict(quant), sort_keys=False), encoding="utf-8")
    return BASE_FILE


def load_base(config: LoraConfig, processor: Any, device: torch.device) -> Any:
    """The base, quantized as ``bitquake_hf`` would; what stays at full precision is in the training's precision."""
    if config.spec.activation_bits is not None:
        raise AdapterError(
            f"quant={config.spec.name!r}: rounded activations pass no gradient to the adapters below; train on a base "
            "whose weights alone are quantized"
        )
    dtype = torch.float32 if config.precision == "fp32" else torch.bfloat16
    with without_progress_bars():
        loaded = load_quantized(
            resolve_pretrained(config.pretrained), config.spec, revision=config.revision, dtype=dtype, device=device,
            device_map=None, attn_implementation=None, trust_remote_code=config.trust_remote_code,
        )  # fmt: skip
    spec = loaded.spec
    if loaded.before is None and not spec.is_full_precision:
        data = None
        if spec.calibration is not None:
            data = build_calibration(spec.calibration, loaded.model, processor, pretrained=config.pretrained)
        quantize_model(loaded.model, spec, calibration=data)
    return loaded.model


def put_on(model: Any, config: LoraConfig) -> Any:
    """Put a new adapter into a model, in place; returns peft's wrapper, which saves it.

    Raises:
        AdapterError: see ``prepare_lora``.
    """
    try:
        import peft
        from peft.tuners.lora import Linear as LoraLinear
    except ImportError as error:
        raise AdapterError("bitquake train lora needs the peft package: pip install 'bitquake[adapters]'") from error
    kinds = (nn.Linear, QuantizedLinear)
    targets = list(config.target)
    if config.target == "language":
        parts = component_map(model)
        targets = [n for n, m in model.named_modules() if isinstance(m, kinds) and parts.component(n) == "language"]
        if not targets:
            raise AdapterError(f"{type(model).__name__}: its language model holds no Linear that an adapter fits")
    lora = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, lora_dropout=config.dropout, target_modules=targets, bias="none"
    )
    # peft knows the quantized layers of its own backends only; ours has in_features, out_features and a weight too
    lora._register_custom_module({QuantizedLinear: LoraLinear})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        try:
            wrapped = peft.get_peft_model(model, lora)
        except ValueError as error:
            raise AdapterError(f"target={list(config.target)}: {error}") from error
    wrapped.peft_config["default"].base_model_name_or_path = config.pretrained
    wrapped.peft_config["default"].revision = config.revision
    return wrapped
