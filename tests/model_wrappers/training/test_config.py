"""Training configurations: what is filled in, what is refused and how, what decides the hash."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from bitquake.model_wrappers.training.config import (
    LoraConfig,
    QatConfig,
    TrainingConfigError,
    load_training,
    read_training,
    training_hash,
)

QAT: dict[str, Any] = {"method": "qat", "pretrained": "student", "bits": 3, "data": ["block_vqav2"], "steps": 10}
LORA: dict[str, Any] = {"method": "lora", "pretrained": "student", "data": "block_vqav2", "epochs": 1}


def qat(**changes: Any) -> QatConfig:
    config = load_training({**QAT, **changes})
    assert isinstance(config, QatConfig)
    return config


def test_defaults_are_grace_s() -> None:
    config = qat()
    assert (config.teacher, config.temperature, config.alpha, config.beta_dkd, config.ema) == ("student", 2, 1, 4, 0.99)
    assert (config.tau, config.eta, config.beta0, config.beta_min, config.beta_max) == (0.35, 0.0015, 1, 0.1, 5)
    assert (config.omega, config.omega_warmup, config.relational_layer) == (1, 0, -2)
    assert config.scale_rate == pytest.approx(10 * config.rate)
    assert config.components == config.trained == ("language",)
    assert all((config.distillation, config.decoupled, config.gate, config.controller, config.relational))


def test_the_teacher_is_the_student_unless_told_otherwise() -> None:
    assert qat(revision="v2").teacher_revision == "v2"
    assert (qat(teacher="big", revision="v2").teacher, qat(teacher="big", revision="v2").teacher_revision) == (
        "big",
        None,
    )
    plain = qat(distillation=False, relational=False)
    assert (plain.teacher, plain.uses_teacher, plain.decoupled, plain.gate, plain.controller) == (None, *[False] * 4)
    assert qat(distillation=False).teacher == "student"  # of the relations


def test_short_ways_to_write() -> None:
    assert [one.model_dump() for one in qat(data="a").data] == [{"data": "a", "share": 1.0}]
    assert [one.share for one in qat(data=["a", {"data": "b", "share": 2}]).data] == [1, 2]
    assert qat(components="vision+language", trained="language+vision").components == ("vision", "language")
    assert qat(rate="1e-4").rate == 1e-4  # YAML reads it as a text
    assert qat(group_size=-1).group_size == "channel"


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rat": 1}, r"rat: unknown key \(did you mean 'rate'\?\)"),
        ({"bits": 9}, "bits: bits must be 2 to 8, or 16 for the full-precision twin, got 9"),
        ({"bits": None}, "bits: Input should be a valid integer, got 'None'"),
        ({"steps": None}, "give either steps or epochs"),
        ({"epochs": 2}, "give either steps or epochs"),
        ({"data": []}, "data: .*at least 1 item"),
        ({"data": ["a", "a"]}, "data: each source once, got a, a"),
        ({"data": [{"date": "a"}]}, r"data.0.date: unknown key \(did you mean 'data'\?\)"),
        ({"group_size": "tensor"}, "a step size per tensor is not trained"),
        ({"components": ["vision"]}, "components: vision is quantized but does not learn; add it to trained"),
        ({"components": []}, "components: name at least one"),
        ({"distillation": False, "gate": True}, "gate is a part of distillation, which is off"),
        ({"distillation": False, "relational": False, "teacher": "t"}, "teacher='t' is asked nothing"),
        ({"beta0": 9}, r"beta0 must lie in \[beta_min, beta_max\] = \[0.1, 5.0\]"),
        ({"awq": True}, "AutoAWQ's layout has 4 bits, got bits 3"),
        ({"rate": "fast"}, "rate: Input should be a valid number"),
        ({"rate": float("inf")}, "rate: Input should be a finite number"),
        ({"method": "sft"}, "method: expected qat or lora, got 'sft'"),
    ],
)
def test_what_cannot_be_is_refused_by_its_key(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingConfigError, match=message):
        load_training({**QAT, **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"quant": "rtn-int4-g6"}, r"unknown quantization spec 'rtn-int4-g6' \(did you mean 'rtn-int4-g64'\?\)"),
        ({"target": []}, "target: name at least one module"),
        ({"bits": 4}, "bits: unknown key"),
    ],
)
def test_what_an_adapter_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(TrainingConfigError, match=message):
        load_training({**LORA, **changes})


def test_a_file_s_problems_have_their_lines(tmp_path: Path) -> None:
    file = tmp_path / "grace.yaml"
    file.write_text("method: qat\npretrained: a\nbits: 9\ndata:\n  - {data: x}\n  - {data: y, shar: 2}\nsteps: 1\n")
    with pytest.raises(TrainingConfigError) as caught:
        read_training(file)
    problems = str(caught.value).splitlines()
    assert len(problems) == 2
    assert problems[0].startswith(f"{file}:3: bits: ") and problems[1].startswith(f"{file}:6: data.1.shar: unknown key")
    for text, message in (("a: *b", "plain YAML"), ("- a", "expected a mapping"), ("a: 1\na: 2", "given twice")):
        file.write_text(text)
        with pytest.raises(TrainingConfigError, match=message):
            read_training(file)
    with pytest.raises(TrainingConfigError, match="cannot be read"):
        read_training(tmp_path / "none.yaml")


def test_the_hash_is_of_what_decides_the_result() -> None:
    same = [qat(), qat(save_every=7), qat(validate_every=3), qat(loader_threads=0), qat(gradient_checkpointing=True),
            qat(teacher="student"), qat(data=[{"data": "block_vqav2", "share": 1}]), qat(scale_rate=1e-4)]  # fmt: skip
    assert len({training_hash(one) for one in same}) == 1
    other = [
        qat(seed=1),
        qat(bits=4),
        qat(rate=2e-5),
        qat(relational=False),
        qat(data=["block_scienceqa"]),
        qat(samples=9),
    ]
    assert len({training_hash(one) for one in [*same, *other]}) == 1 + len(other)
    named, inline = (
        load_training({**LORA, "quant": quant})
        for quant in ("rtn-int4-g64", {"name": "rtn-int4-g64", "method": "rtn", "bits": 4, "group_size": 64})
    )
    assert isinstance(named, LoraConfig) and training_hash(named) == training_hash(inline)
    assert training_hash(named) != training_hash(load_training(LORA))
    assert (
        load_training(named.model_dump(mode="json")) == named and load_training(qat().model_dump(mode="json")) == qat()
    )


def test_reading_a_configuration_imports_no_torch() -> None:
    code = (
        "import sys; from bitquake.model_wrappers.training.config import load_training\n"
        f"load_training({QAT!r}); load_training({LORA!r})\n"
        "sys.exit(' '.join(sorted({'torch', 'transformers', 'datasets', 'peft'} & set(sys.modules))) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
