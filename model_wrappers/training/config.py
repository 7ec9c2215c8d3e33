"""What a training is: ``QatConfig`` (quantization-aware, GRACE) and ``LoraConfig`` (adapters). Torch-free.

Values that GRACE (arXiv 2601.22709) was published with, for those who want to repeat it:

============================  =============  ====================  ==============
field                         paper's code   Qwen3-VL's script     LLaVA's script
============================  =============  ====================  ==============
tau                           0.35           3.0                   0.35
eta                           0.0015         0.003                 0.0015
beta0, beta_min, beta_max     1, 0.1, 5      0.5, 0.1, 1           1, 0.1, 5
omega, omega_warmup           1, 0           3, 400                1, 0
rate, scale_rate              (10 x rate)    1e-5, 2e-4            2e-5, 2e-6
============================  =============  ====================  ==============

All of them: bits 4 or 8, group 128, symmetric, temperature 2, alpha 1, beta_dkd 4, ema 0.99, layer -2, an effective
batch of 512, cosine with a warm-up of 0.03, weight decay 0.001, one epoch (the paper: three) of LLaVA's mix665k,
``max_pixels`` 200704. The defaults here are the paper's code's.
"""

from __future__ import annotations

import difflib
import hashlib
import json
from collections.abc import Iterator, Mapping
from functools import cache
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, TypeAdapter, ValidationError, field_validator, model_validator

from bitquake.model_wrappers.quantizers.options import Options
from bitquake.model_wrappers.quantizers.spec import COMPONENTS, Component, GroupSize, QuantSpec, load_spec
from bitquake.tasks.strict_yaml import Place, line_of, load_mapping

TRAINING_VERSION = 1
"""Rises when the same configuration gives another model."""
FULL_PRECISION_BITS = 16
_NO_RESULT = ("save_every", "validate_every", "loader_threads", "gradient_checkpointing")
"""Fields that change neither the trained weights nor what they were trained on."""


class TrainingConfigError(ValueError):
    """A training configuration that cannot be; the message names the key, what was got, and how to write it."""


class DataShare(Options):
    """One source of training examples.

    Attributes:
        data: a task family with a ``train`` split, or a folder with pictures and conversations (LLaVA's JSON form).
        share: how often it is drawn from, as a share of the sum of all shares.
    """

    data: str = Field(min_length=1)
    share: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)


class _Training(Options):
    """What every training has.

    Attributes:
        pretrained, revision: what is trained; trust_remote_code: as of ``bitquake_hf``.
        data: where examples come from; without: families whose evaluated pictures are left out of it, found by their
            pixels. (The pictures that a family in ``data`` evaluates always are.)
        samples: so many examples, the same in every epoch; None: all that the data has.
        steps, epochs: how long; exactly one of them. A step is one of the optimiser's.
        batch_size: examples of one process in one forward pass; gradient_accumulation: passes in one step. A step so
            sees batch_size x gradient_accumulation x processes examples.
        max_length: tokens of an example, those of its pictures included; longer ones are skipped, and counted.
        min_pixels, max_pixels: bounds of a processed picture, for processors that have them.
        rate: of AdamW at its highest; weight_decay: of weights, not of biases, norms and step sizes.
        warmup: share of the steps in which the rate rises; schedule: how it falls afterwards.
        clip_norm: largest norm of a step's gradient.
        precision: of the forward pass; the weights that learn are always float32.
        gradient_checkpointing: forget activations and compute them again, for memory.
        seed: of the examples' order, and of adapters' first values.
        save_every, validate_every: in steps; a killed training goes on from the last save. validate_every None: never.
        validation_samples: examples kept out of the training with all others on their pictures (of a small source at
            most a tenth), whose loss is measured.
        loader_threads: that prepare examples ahead of the model.
    """

    pretrained: str = Field(min_length=1)
    revision: str | None = None
    trust_remote_code: bool = False
    data: tuple[DataShare, ...] = Field(min_length=1)
    without: tuple[str, ...] = ()
    samples: int | None = Field(default=None, ge=1)
    steps: int | None = Field(default=None, ge=1)
    epochs: float | None = Field(default=None, gt=0.0, allow_inf_nan=False)
    batch_size: int = Field(default=8, ge=1)
    gradient_accumulation: int = Field(default=1, ge=1)
    max_length: int = Field(default=2048, ge=16)
    min_pixels: int | None = Field(default=None, ge=1)
    max_pixels: int | None = Field(default=None, ge=1)
    rate: float = Field(default=1e-5, gt=0.0, allow_inf_nan=False)
    weight_decay: float = Field(default=1e-3, ge=0.0, allow_inf_nan=False)
    warmup: float = Field(default=0.03, ge=0.0, lt=1.0)
    schedule: Literal["cosine", "constant"] = "cosine"
    clip_norm: float = Field(default=1.0, gt=0.0, allow_inf_nan=False)
    precision: Literal["bf16", "fp32"] = "bf16"
    gradient_checkpointing: bool = False
    seed: int = Field(default=0, ge=0)
    save_every: int = Field(default=500, ge=1)
    validate_every: int | None = Field(default=None, ge=1)
    validation_samples: int = Field(default=256, ge=1)
    loader_threads: int = Field(default=2, ge=0)

    @field_validator("data", mode="before")
    @classmethod
    def _names_alone(cls, data: Any) -> Any:
        """``data: block_vqav2`` and ``data: [block_vqav2, …]`` stand for mappings."""
        given = [data] if isinstance(data, (str, Mapping)) else data
        if not isinstance(given, (list, tuple)):
            return given
        return [{"data": one} if isinstance(one, str) else one for one in given]

    @model_validator(mode="after")
    def _one_length(self) -> _Training:
        if (self.steps is None) == (self.epochs is None):
            raise ValueError("give either steps or epochs")
        names = [one.data for one in self.data]
        if len(set(names)) < len(names):
            raise ValueError(f"data: each source once, got {', '.join(names)}")
        return self


class QatConfig(_Training):
    """Quantization-aware training (papers.md section 3): learned step sizes, and GRACE's losses where a teacher is.

    Attributes:
        teacher, teacher_revision: what is distilled from; by default ``pretrained`` itself at full precision. None
            where ``distillation`` and ``relational`` are off.
        bits: 2 to 8, or 16: the full-precision twin, trained with the same losses.
        group_size: input features that share a step size, or ``channel``; symmetric: codes around 0.
        components: whose Linear modules are quantized; trained: whose weights learn.
        distillation: towards the teacher's answers; decoupled: into target and other classes (else the plain
            divergence); gate: weighted by the teacher's certainty; controller: beta follows the loss (else beta0).
        relational: the teacher's relations between visual tokens, with weight omega.
        temperature, alpha, beta_dkd: of the distillation.
        tau, eta, beta0, beta_min, beta_max, ema: of the controller.
        omega: of the relational loss; omega_warmup: steps in which it rises to that; relational_layer: hidden state
            that is compared, counted as ``hidden_states`` are.
        scale_rate: learning rate of the step sizes; 10 x ``rate`` by default.
        awq: write AutoAWQ's GEMM layout too (4 bits).
    """

    method: Literal["qat"] = "qat"
    teacher: str | None = None
    teacher_revision: str | None = None
    bits: int
    group_size: GroupSize = 128
    symmetric: bool = True
    components: tuple[Component, ...] = ("language",)
    trained: tuple[Component, ...] = ("language",)
    distillation: bool = True
    decoupled: bool = True
    gate: bool = True
    controller: bool = True
    relational: bool = True
    temperature: float = Field(default=2.0, gt=0.0, allow_inf_nan=False)
    alpha: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    beta_dkd: float = Field(default=4.0, ge=0.0, allow_inf_nan=False)
    tau: float = Field(default=0.35, ge=0.0, allow_inf_nan=False)
    eta: float = Field(default=0.0015, ge=0.0, allow_inf_nan=False)
    beta0: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    beta_min: float = Field(default=0.1, ge=0.0, allow_inf_nan=False)
    beta_max: float = Field(default=5.0, ge=0.0, allow_inf_nan=False)
    ema: float = Field(default=0.99, ge=0.0, lt=1.0)
    omega: float = Field(default=1.0, ge=0.0, allow_inf_nan=False)
    omega_warmup: int = Field(default=0, ge=0)
    relational_layer: int = -2
    scale_rate: float = Field(gt=0.0, allow_inf_nan=False)
    awq: bool = False

    @model_validator(mode="before")
    @classmethod
    def _fill_defaults(cls, data: Any) -> Any:
        if not isinstance(data, Mapping):
            return data
        filled = dict(data)
        if filled.get("distillation") is False:  # what is part of it goes with it
            filled = {"decoupled": False, "gate": False, "controller": False, **filled}
        asked = filled.get("distillation") is not False or filled.get("relational") is not False
        if asked and filled.get("teacher") is None and isinstance(filled.get("pretrained"), str):
            filled["teacher"] = filled["pretrained"]
            filled.setdefault("teacher_revision", filled.get("revision"))
        rate = filled.get("rate", cls.model_fields["rate"].default)
        if filled.get("scale_rate") is None and isinstance(rate, (int, float, str)):
            try:
                filled["scale_rate"] = 10 * float(rate)
            except ValueError:
                filled["scale_rate"] = 1.0  # the rate is refused by its own field
        for key in ("components", "trained"):
            if isinstance(filled.get(key), str):  # "vision+language", as of a spec
                filled[key] = [part.strip() for part in filled[key].split("+")]
        return filled

    @field_validator("components", "trained")
    @classmethod
    def _in_standard_order(cls, components: tuple[Component, ...]) -> tuple[Component, ...]:
        if not components:
            raise ValueError(f"name at least one of {', '.join(COMPONENTS)}")
        return tuple(one for one in COMPONENTS if one in components)

    @field_validator("bits")
    @classmethod
    def _possible(cls, bits: int) -> int:
        if bits not in (*range(2, 9), FULL_PRECISION_BITS):
            raise ValueError(f"bits must be 2 to 8, or {FULL_PRECISION_BITS} for the full-precision twin, got {bits}")
        return bits

    @model_validator(mode="after")
    def _consistent(self) -> QatConfig:
        if self.group_size == "tensor":
            raise ValueError("group_size: a positive whole number or channel; a step size per tensor is not trained")
        if not self.distillation and (on := [k for k in ("decoupled", "gate", "controller") if getattr(self, k)]):
            raise ValueError(f"{on[0]} is a part of distillation, which is off; leave it out or switch distillation on")
        if self.awq and self.bits != 4:
            raise ValueError(f"awq: AutoAWQ's layout has 4 bits, got bits {self.bits}")
        if not self.uses_teacher and self.teacher is not None:
            raise ValueError(
                f"teacher={self.teacher!r} is asked nothing: distillation and relational are off; leave teacher out"
            )
        if not self.beta_min <= self.beta0 <= self.beta_max:
            raise ValueError(f"beta0 must lie in [beta_min, beta_max] = [{self.beta_min}, {self.beta_max}]")
        if still := [one for one in self.components if one not in self.trained]:
            raise ValueError(f"components: {still[0]} is quantized but does not learn; add it to trained")
        return self

    @property
    def uses_teacher(self) -> bool:
        """Whether a loss asks the teacher."""
        return self.distillation or self.relational

    @property
    def is_full_precision(self) -> bool:
        """Whether nothing is quantized: the twin."""
        return self.bits == FULL_PRECISION_BITS


class LoraConfig(_Training):
    """A LoRA adapter (Hu et al. 2021) on a base at full precision or, as QLoRA does, on a quantized one.

    Attributes:
        quant: what the base is quantized with: anything that ``load_spec`` takes. None: full precision.
        rank, alpha, dropout: of the adapter.
        target: ``language``: every Linear of the language model; or names of modules as peft takes them.
    """

    method: Literal["lora"] = "lora"
    quant: str | dict[str, Any] | None = None
    rank: int = Field(default=16, ge=1)
    alpha: float = Field(default=32.0, gt=0.0, allow_inf_nan=False)
    dropout: float = Field(default=0.0, ge=0.0, lt=1.0)
    target: Literal["language"] | tuple[str, ...] = "language"
    rate: float = Field(default=2e-4, gt=0.0, allow_inf_nan=False)
    weight_decay: float = Field(default=0.0, ge=0.0, allow_inf_nan=False)

    @model_validator(mode="after")
    def _quant_exists(self) -> LoraConfig:
        load_spec(self.quant)
        if not self.target:
            raise ValueError("target: name at least one module, or language for every Linear of the language model")
        return self

    @property
    def spec(self) -> QuantSpec:
        """What the base is quantized with."""
        return load_spec(self.quant)


TrainingConfig = Annotated[QatConfig | LoraConfig, Field(discriminator="method")]


@cache
def _adapter() -> TypeAdapter[QatConfig | LoraConfig]:
    return TypeAdapter(TrainingConfig)


def load_training(
    values: Mapping[str, Any], where: str = "training", lines: Mapping[Place, int] | None = None
) -> QatConfig | LoraConfig:
    """Read a training configuration from plain values.

    Args:
        where: what messages call it.
        lines: of the values, where they stand in a file.

    Raises:
        TrainingConfigError: an unknown or missing key, or a value that cannot be; every problem is named.
    """
    try:
        return _adapter().validate_python(dict(values))
    except ValidationError as error:
        problems = sorted(_problems(error, values, where, lines or {}), key=lambda one: one[0])
        raise TrainingConfigError("\n".join(text for _, text in problems)) from error


def read_training(file: Path) -> QatConfig | LoraConfig:
    """Read a training configuration from a YAML file.

    Raises:
        TrainingConfigError: it cannot be read or is not plain YAML, or see ``load_training``.
    """
    values, lines = read_values(file)
    return load_training(values, str(file), lines)


def read_values(file: Path) -> tuple[dict[str, Any], Mapping[Place, int]]:
    """The mapping in a YAML file, and the line of each of its values.

    Raises:
        TrainingConfigError: it cannot be read, or holds no mapping.
    """
    return load_mapping(file, "that begins with `method: qat` or `method: lora`", TrainingConfigError)


def _problems(
    error: ValidationError, values: Mapping[str, Any], where: str, lines: Mapping[Place, int]
) -> Iterator[tuple[int, str]]:
    """(line, 0 where it is not known, message) of each."""
    methods: dict[Any, type[Options]] = {"qat": QatConfig, "lora": LoraConfig}
    items = error.errors()
    for item in items:
        if item["type"] == "too_short" and any(one["loc"][: len(item["loc"])] == item["loc"] for one in items[:-1]):
            continue  # what is wrong with the list's entries has been said
        place = [part for part in item["loc"] if part not in methods]
        message = item["msg"].removeprefix("Value error, ")
        if item["type"].startswith("union_tag"):
            place, message = ["method"], f"expected qat or lora, got {values.get('method')!r}"
        elif item["type"] == "extra_forbidden":
            model = DataShare if place[0] == "data" else methods[values["method"]]
            known = list(model.model_fields)
            close = difflib.get_close_matches(str(place[-1]), known, n=1)
            hint = f" (did you mean {close[0]!r}?)" if close else ""
            message = f"unknown key{hint}; known: {', '.join(known)}"
        elif item["type"] == "missing":
            message = "is missing"
        elif not item["type"].startswith("value_error"):
            message = f"{message}, got {str(item['input'])[:80]!r}"
        line = line_of(lines, place)
        at = where if line is None else f"{where}:{line}"
        yield line or 0, f"{at}: {'.'.join(map(str, place))}: {message}" if place else f"{at}: {message}"


def training_hash(config: QatConfig | LoraConfig) -> str:
    """blake2 hex of everything in a configuration that decides what comes out."""
    values = config.model_dump(mode="json", exclude=set(_NO_RESULT))
    if isinstance(config, LoraConfig):  # two ways to write one quantization are one training
        values["quant"] = config.spec.options()
    text = json.dumps([TRAINING_VERSION, values], sort_keys=True, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()
