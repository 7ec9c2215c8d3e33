"""Load a Hugging Face image-text-to-text model and its processor, with errors that say what to change."""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import transformers
from loguru import logger as eval_logger
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForImageTextToText, AutoProcessor, Blip2ForImageTextRetrieval
from transformers.utils import logging as hf_logging

from bitquake.model_wrappers.quantizers.linear import Execution
from bitquake.model_wrappers.quantizers.published.formats import PublishedFormat, read_config
from bitquake.model_wrappers.quantizers.published.loading import load_published
from bitquake.model_wrappers.quantizers.spec import CALIBRATED, QuantSpec
from bitquake.model_wrappers.quantizers.transformers_quantizer import (
    METHOD,
    BitquakeConfig,
    CheckpointError,
    LoadingHooks,
    check_readable,
)
from bitquake.quant_card import CARD_FILE, QuantCard

REFERENCE_PREFIX = "bitquake/"
"""``pretrained`` names that begin like this are reference checkpoints shipped in the package."""
_TEXTS = "{% for part in message['content'] %}{% if part['type'] == 'text' %}{{ part['text'] }}{% endif %}{% endfor %}"
_PLAIN_TEMPLATES = {
    # places of pictures, then the texts as they stand; the processor adds the start token and the line end
    "PaliGemmaProcessor": "{% for message in messages %}{% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% endif %}{% endfor %}{% endfor %}"
    f"{{% for message in messages %}}{_TEXTS}{{% endfor %}}",
    # the texts; the processor puts the query tokens before them; an answer goes on after a blank
    "Blip2Processor": "{% for message in messages %}{% if message['role'] == 'assistant' %} {% endif %}"
    f"{_TEXTS}{{% endfor %}}",
}
"""Prompts of processors whose published checkpoints come without a chat template, as their models were trained."""
ONLY_WITH_IMAGE = ("paligemma", "blip-2")
"""``model_type``s that cannot take a prompt without a picture."""


def resolve_pretrained(pretrained: str) -> str:
    """The folder of a shipped reference checkpoint (``bitquake/block-idefics3``), or the name unchanged.

    Raises:
        ValueError: a ``bitquake/`` name, and this installation ships no reference checkpoints or none of that name.
    """
    if not pretrained.startswith(REFERENCE_PREFIX):
        return pretrained
    try:
        from bitquake.model_wrappers.checkpoints import resolve
    except ImportError as error:
        raise ValueError(
            f"pretrained={pretrained!r}: names that begin with {REFERENCE_PREFIX!r} are reference checkpoints inside "
            f"the package, and this installation has none ({error}). Reinstall bitquake, or give a hub name or folder."
        ) from error
    return str(resolve(pretrained))


def load_processor(
    pretrained: str,
    *,
    revision: str | None,
    trust_remote_code: bool,
    min_pixels: int | None = None,
    max_pixels: int | None = None,
) -> Any:
    """The model's processor, padding on the left; PaliGemma's and BLIP-2's get a plain chat template if they have none.

    Args:
        min_pixels, max_pixels: bounds on width x height of the processed image, where the image processor knows them.

    Raises:
        ValueError: no image processor or chat template, or pixel bounds that it would silently ignore.
    """
    processor = AutoProcessor.from_pretrained(pretrained, revision=revision, trust_remote_code=trust_remote_code)
    image_processor = getattr(processor, "image_processor", None)
    if image_processor is None or getattr(processor, "tokenizer", None) is None:
        raise ValueError(
            f"pretrained={pretrained!r}: {type(processor).__name__} has no image processor with a tokenizer beside it; "
            "bitquake_hf runs image-text-to-text models. Check that the folder holds the processor's files."
        )
    _bound_pixels(image_processor, pretrained, min_pixels=min_pixels, max_pixels=max_pixels)
    if processor.chat_template is None:
        processor.chat_template = _PLAIN_TEMPLATES.get(type(processor).__name__)
    if processor.chat_template is None:
        raise ValueError(f"pretrained={pretrained!r}: its processor has no chat template, so no prompt can be built.")
    processor.tokenizer.padding_side = "left"
    if processor.tokenizer.pad_token is None:
        processor.tokenizer.pad_token = processor.tokenizer.eos_token
    return processor


def _bound_pixels(image_processor: Any, pretrained: str, **bounds: int | None) -> None:
    """Set ``min_pixels`` and ``max_pixels`` where the image processor keeps them."""
    known = getattr(getattr(image_processor, "valid_kwargs", None), "__annotations__", {})
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # of the Qwen-VL kind; not edges, but areas
    for name, value in bounds.items():
        if value is None:
            continue
        if name not in known:
            raise ValueError(
                f"{name}={value}: {type(image_processor).__name__} of {pretrained!r} has no such setting and would "
                "ignore it. Leave it out (models of the Qwen-VL kind know it)."
            )
        if getattr(image_processor, name, None) is not None:
            setattr(image_processor, name, value)
        else:
            image_processor.size = type(image_processor.size)(**{**dict(image_processor.size), edges[name]: value})


def load_model(
    pretrained: str,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    device_map: str | None,
    attn_implementation: str | None,
    trust_remote_code: bool,
) -> Any:
    """The model as its checkpoint is, in evaluation mode, on its device or spread by ``device_map``.

    A checkpoint whose config names ``Blip2ForImageTextRetrieval`` is loaded with its image-text matching head.

    Raises:
        ValueError: an architecture that transformers does not list as image-text-to-text, an encoder-decoder, or a
            checkpoint that is cut short or lacks tensors.
    """
    config = _image_text_config(pretrained, revision=revision, trust_remote_code=trust_remote_code)
    return _from_pretrained(
        pretrained, config, revision=revision, dtype=dtype, device=device, device_map=device_map,
        attn_implementation=attn_implementation, trust_remote_code=trust_remote_code,
    )  # fmt: skip


@dataclass(frozen=True)
class LoadedModel:
    """A model, and what a quant card says of where it came from.

    Attributes:
        model: in evaluation mode, on its device.
        spec: what was done to it, or is to be done.
        before: name of each quantized module -> hash of its weight before ("" where nobody knows). None: the spec is
            still to be carried out, by ``quantize_model``.
        base, base_revision: what a checkpoint that came quantized was made from; "" where it does not say.
        checkpoint_format: ``bitquake``, ``awq gemm`` and so on of a checkpoint that came quantized, else "".
        calibration: of a checkpoint that was calibrated: fields of ``quant_card.Calibration``.
    """

    model: Any
    spec: QuantSpec
    before: dict[str, str] | None
    base: str = ""
    base_revision: str = ""
    checkpoint_format: str = ""
    calibration: dict[str, Any] | None = None


def load_quantized(
    pretrained: str,
    spec: QuantSpec,
    *,
    revision: str | None,
    dtype: torch.dtype,
    device: torch.device,
    device_map: str | None,
    attn_implementation: str | None,
    trust_remote_code: bool,
    execution: Execution | None = None,
    hooks: LoadingHooks | None = None,
) -> LoadedModel:
    """Load a model for a spec: whatever can be done while loading is done, so that it is never whole at full precision.

    - A checkpoint in the packed format, or a published one that came quantized, is taken as it is. ``spec`` must then
      be full precision (nothing was asked) or, for the packed format, what was done to it; its execution counts.
    - A data-free method is carried out weight by weight as the checkpoint is read.
    - Otherwise the model is loaded whole, and ``before`` is None.

    Args:
        spec: what was asked for.
        execution: of a checkpoint that came quantized, where ``spec`` asks for nothing; None: its own, or simulated.
        hooks: of quantizing while loading.

    Raises:
        ValueError: as ``load_model``; a spec for a checkpoint that is quantized already; one that says it is and is
            not, or in a format that is not read; as ``quantize_model``.
    """
    config = _image_text_config(pretrained, revision=revision, trust_remote_code=trust_remote_code)
    arguments: dict[str, Any] = {
        "revision": revision, "dtype": dtype, "device": device, "device_map": device_map,
        "attn_implementation": attn_implementation, "trust_remote_code": trust_remote_code,
    }  # fmt: skip
    stored = getattr(config, "quantization_config", None) or {}
    if stored.get("quant_method") == METHOD:
        saved = BitquakeConfig.from_dict(stored)
        done = _done_to(pretrained, saved.spec, spec, execution)
        config.quantization_config = {**stored, "execution": done.execution}
        model = _from_pretrained(pretrained, config, **arguments)
        return LoadedModel(model, done, saved.before, saved.base, saved.base_revision, METHOD, saved.calibration)
    published = read_config(pretrained, revision=revision)
    if published is not None:
        return _load_published(pretrained, config, published, spec, execution or "simulated", **arguments)
    if stored:
        raise CheckpointError(
            f"pretrained={pretrained!r}: config.json says that it is quantized by {stored.get('quant_method')!r}, "
            "whose checkpoints are not read here (bitquake's, AutoAWQ's, GPTQ's, compressed-tensors' and GRACE's are). "
            "Load the full-precision model, with quant= for a quantization of it"
        )
    _refuse_false_card(pretrained)
    if spec.is_full_precision or spec.method in CALIBRATED:
        return LoadedModel(_from_pretrained(pretrained, config, **arguments), spec, None)
    wanted = BitquakeConfig(spec, hooks=hooks)
    model = _from_pretrained(pretrained, config, quantization_config=wanted, **arguments)
    return LoadedModel(model, spec, model.config.quantization_config.before)


def _load_published(
    pretrained: str,
    config: Any,
    published: PublishedFormat,
    asked: QuantSpec,
    execution: Execution,
    *,
    device: torch.device,
    device_map: str | None,
    **arguments: Any,
) -> LoadedModel:
    """A checkpoint that others quantized, its modules in the packed format."""
    if not asked.is_full_precision:
        raise ValueError(_quantized_already(pretrained, str(published), asked))
    optional = {"device_map": device_map, "attn_implementation": arguments.pop("attn_implementation")}
    model, stored, _ = load_published(
        pretrained, config, loader=_loader(config), execution=execution, published=published,
        **{key: value for key, value in optional.items() if value is not None}, **arguments,
    )  # fmt: skip
    if device_map is None:
        model = model.to(device)
    bits = "" if published.bits is None else f"-int{published.bits}"
    group = {None: "", -1: "-channel"}.get(published.group_size, f"-g{published.group_size}")
    name = f"{published.method}{bits}{group}"
    spec = QuantSpec(name=name, method="checkpoint", execution=execution)
    # nobody has the weights that they were before
    return LoadedModel(
        model.eval(), spec, dict.fromkeys(stored, ""), checkpoint_format=f"{published.method} {published.variant}"
    )


def _done_to(pretrained: str, saved: QuantSpec, asked: QuantSpec, execution: Execution | None) -> QuantSpec:
    """The spec of a quantized checkpoint, in the execution that is asked for."""
    if asked.is_full_precision:
        return saved if execution is None else saved.model_copy(update={"execution": execution})

    def what(spec: QuantSpec) -> dict[str, Any]:
        return {key: value for key, value in spec.options().items() if key not in ("name", "execution")}

    if what(asked) != what(saved):
        raise ValueError(_quantized_already(pretrained, saved.name, asked))
    return asked


def _quantized_already(pretrained: str, how: str, asked: QuantSpec) -> str:
    return (
        f"pretrained={pretrained!r} is quantized already ({how}) and cannot be quantized again by {asked.name!r}. "
        "Leave quant= out to run it as it is, or quantize the full-precision model"
    )


def _refuse_false_card(pretrained: str) -> None:
    """A folder whose quant card says quantized and whose config does not holds something else than its card says."""
    file = Path(pretrained) / CARD_FILE
    if not file.is_file():
        return
    try:
        card = QuantCard.model_validate_json(file.read_bytes())
    except ValueError as error:
        raise CheckpointError(f"{file}: is no quant card ({str(error).splitlines()[0]}); remove it") from error
    if card.method != "none":
        raise CheckpointError(
            f"{pretrained}: {CARD_FILE} says {card.spec_name} with {len(card.modules)} quantized modules, but "
            "config.json has no quantization_config, so its tensors are full-precision weights. Quantize it again, or "
            f"remove {CARD_FILE} to run what is there"
        )


def _image_text_config(pretrained: str, *, revision: str | None, trust_remote_code: bool) -> Any:
    config = AutoConfig.from_pretrained(pretrained, revision=revision, trust_remote_code=trust_remote_code)
    if getattr(config, "is_encoder_decoder", False):
        raise ValueError(
            f"pretrained={pretrained!r}: {config.model_type!r} is an encoder-decoder; decoder-only models run here."
        )
    if type(config) not in AutoModelForImageTextToText._model_mapping and not trust_remote_code:
        raise ValueError(
            f"pretrained={pretrained!r}: model type {config.model_type!r} is no image-text-to-text model of "
            f"transformers {transformers.__version__}. If its code comes with the checkpoint and you trust it, set "
            "trust_remote_code=True."
        )
    return config


def _loader(config: Any) -> Any:
    """The class to load with; a checkpoint of an image-text matching head keeps it."""
    matching = Blip2ForImageTextRetrieval.__name__ in (config.architectures or ())
    return Blip2ForImageTextRetrieval if matching else AutoModelForImageTextToText


def _from_pretrained(
    pretrained: str, config: Any, *, device: torch.device, device_map: str | None, **arguments: Any
) -> Any:
    """``from_pretrained`` that raises where transformers would fill what is missing with random numbers and warn."""
    given = {key: value for key, value in {"device_map": device_map, **arguments}.items() if value is not None}
    try:
        model, info = _loader(config).from_pretrained(
            pretrained, config=config, output_loading_info=True, ignore_mismatched_sizes=True, **given
        )
    except SafetensorError as error:
        check_readable(sorted(map(str, Path(pretrained).glob("*.safetensors"))))
        raise CheckpointError(f"pretrained={pretrained!r}: its weights cannot be read ({error})") from error
    if mismatched := sorted(info["mismatched_keys"]):
        name, stored, expected = mismatched[0]
        raise CheckpointError(
            f"pretrained={pretrained!r}: {len(mismatched)} tensors do not fit {type(model).__name__} (first {name}: "
            f"shape {tuple(stored)}, expected {tuple(expected)}); the weights do not belong to the config.json"
        )
    if missing := sorted(info["missing_keys"]):
        raise CheckpointError(
            f"pretrained={pretrained!r}: {len(missing)} tensors of {type(model).__name__} are in none of its files "
            f"(first {missing[0]}), so their values would be random; the checkpoint is incomplete or of another model"
        )
    if device_map is None:
        model = model.to(device)
    return model.eval()


@contextmanager
def without_progress_bars() -> Iterator[None]:
    """transformers loads and saves without its bars."""
    shown = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if shown:
            hf_logging.enable_progress_bar()


def matches_captions(model: Any) -> bool:
    """True for a model with an image-text matching head and no language model: it ranks captions, nothing else."""
    return isinstance(model, Blip2ForImageTextRetrieval)


def commit(model: Any, revision: str | None) -> str:
    """The commit that was really loaded from a hub, else the revision asked for, else ""."""
    return str(getattr(model.config, "_commit_hash", None) or revision or "")


def put_adapter_on(model: Any, adapter: str, *, revision: str | None = None) -> tuple[Any, str]:
    """Put a peft adapter (LoRA and its kin) on top of a loaded, perhaps quantized, model.

    Returns:
        The same model, now with the adapter's layers in it, and the blake2 hex of the adapter's tensors.

    Raises:
        ValueError: peft is not installed, the adapter works on prompts and not on layers, or lacks weights for layers
            that it names.
    """
    try:
        from peft import LoraConfig, PeftConfig, PeftModel, get_peft_model_state_dict
        from peft.tuners.lora import Linear as LoraLinear
    except ImportError as error:
        raise ValueError(f"adapter={adapter!r} needs the peft package: pip install 'bitquake[adapters]'") from error
    from .quantizers.linear import QuantizedLinear

    config = PeftConfig.from_pretrained(adapter, revision=revision)
    if config.is_prompt_learning:
        raise ValueError(
            f"adapter={adapter!r} is a {config.peft_type} adapter; adapters that change layers (LoRA) run here."
        )
    if isinstance(config, LoraConfig):
        # peft knows the quantized layers of its own backends only; ours has in_features, out_features and a weight too
        config._register_custom_module({QuantizedLinear: LoraLinear})
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="Unsupported layer type")
        warnings.filterwarnings("ignore", message="TorchaoLoraLinear was instantiated")  # nothing is merged here
        warnings.filterwarnings("error", message="Found missing adapter keys")  # they would stay at zero
        try:
            wrapped = PeftModel.from_pretrained(model, adapter, config=config).eval()
        except UserWarning as error:
            raise ValueError(f"adapter={adapter!r} does not fit {type(model).__name__}: {error}") from error
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(get_peft_model_state_dict(wrapped).items()):
        digest.update(f"{name}:{tensor.dtype}:{tuple(tensor.shape)}:".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    eval_logger.info(f"bitquake_hf: adapter {adapter} on top, hash {digest.hexdigest()}")
    return wrapped.get_base_model(), digest.hexdigest()


def processed_sizes(
    processor: Any, inputs: Any, image_sizes: list[list[tuple[int, int]]]
) -> list[list[tuple[int, int]]]:
    """(width, height) in pixels of each image as the processor resized it.

    Read from the model's inputs: the patch grid (Qwen-VL and its kin), tiles and pixel mask (Idefics2, Idefics3,
    SmolVLM), or one picture per image (LLaVA). Where the inputs do not tell, every list is empty.

    Args:
        image_sizes: per sample, (width, height) of its images before the processor.
    """
    nothing: list[list[tuple[int, int]]] = [[] for _ in image_sizes]
    counts = [len(sizes) for sizes in image_sizes]
    image_processor = processor.image_processor
    pixels, grid, mask = (inputs.get(key) for key in ("pixel_values", "image_grid_thw", "pixel_attention_mask"))
    flat: list[tuple[int, int]]
    if grid is not None and isinstance(patch := getattr(image_processor, "patch_size", None), int):
        flat = [(w * patch, h * patch) for _, h, w in grid.tolist()]
    elif mask is not None and mask.ndim == 4:
        heights, widths = mask.amax(dim=3).sum(dim=2).tolist(), mask.amax(dim=2).sum(dim=2).tolist()
        flat = []
        for row, sizes in enumerate(image_sizes):
            at = 0
            for width, height in sizes:
                rows, columns = _tiles(image_processor, width, height)
                if at + rows * columns >= mask.shape[1]:
                    return nothing
                if rows:
                    edge = image_processor.max_image_size["longest_edge"]
                    flat.append((columns * edge, rows * edge))
                else:
                    flat.append((int(widths[row][at]), int(heights[row][at])))
                at += rows * columns + 1
            if any(widths[row][at:]):  # tiles that we did not account for: say nothing rather than something wrong
                return nothing
    elif pixels is not None and pixels.ndim == 4 and len(pixels) == sum(counts):
        flat = [(pixels.shape[3], pixels.shape[2])] * len(pixels)
    else:
        return nothing
    if len(flat) != sum(counts):
        return nothing
    sizes_left = iter(flat)
    return [[next(sizes_left) for _ in range(count)] for count in counts]


def _tiles(image_processor: Any, width: int, height: int) -> tuple[int, int]:
    """Rows and columns of tiles that an image is split into; (0, 0) when it stays whole."""
    if not getattr(image_processor, "do_image_splitting", False):
        return 0, 0
    count = getattr(image_processor, "get_number_of_image_patches", None)
    if count is None:
        return 0, 0
    _, rows, columns = count(height, width, {})
    return int(rows), int(columns)
