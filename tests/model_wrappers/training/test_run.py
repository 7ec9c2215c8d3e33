"""Whole trainings: from a configuration to a checkpoint that loads, once, resumable, one at a time."""

from __future__ import annotations

import copy
import itertools
import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.calibration.overlap import OverlapError, refuse_overlap
from bitquake.model_wrappers.calibration.sample import CalibrationError
from bitquake.model_wrappers.loading import load_processor, load_quantized
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.spec import load_spec
from bitquake.model_wrappers.training.config import QatConfig, load_training, training_hash
from bitquake.model_wrappers.training.examples import Examples, Place
from bitquake.model_wrappers.training.loop import TrainingError
from bitquake.model_wrappers.training.objective import QatObjective, TeacherError, install
from bitquake.model_wrappers.training.run import (
    Trained,
    read_config,
    run_training,
    share_vision,
    unshare_vision,
)
from bitquake.model_wrappers.training.seen import SEEN_FILE, load_seen


@pytest.fixture(scope="module")
def data(tiny_architectures: Any, conversations: Any) -> Path:
    folder: Path = conversations(24, words=tiny_architectures.words)
    return folder


def config_of(tiny: Any, data: Path, name: str = "idefics3", **keys: Any) -> QatConfig:
    values = {
        "method": "qat", "pretrained": str(tiny.checkpoint(name)), "bits": 3, "group_size": 16, "data": [str(data)],
        "steps": 4, "batch_size": 4, "rate": 1e-3, "precision": "fp32", "save_every": 2, "validation_samples": 2,
        "loader_threads": 0, **keys,
    }  # fmt: skip
    config = load_training(values)
    assert isinstance(config, QatConfig)
    return config


def load(done: Trained) -> Any:
    return load_quantized(
        done.pretrained, load_spec(None), revision=None, dtype=torch.float32, device=torch.device("cpu"),
        device_map=None, attn_implementation=None, trust_remote_code=False,
    ).model  # fmt: skip


def test_a_training_runs_once_and_its_checkpoint_loads(tiny_architectures: Any, data: Path, tmp_path: Path) -> None:
    config = config_of(tiny_architectures, data)
    calls: list[tuple[int, int]] = []
    done = run_training(config, tmp_path, progress=lambda step, steps: calls.append((step, steps)))
    assert calls == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert (done.pretrained, done.quant, done.adapter, done.base) == (
        str(tmp_path / "model"), "", None, config.pretrained,
    )  # fmt: skip
    model = load(done)
    layers = [module for module in model.modules() if isinstance(module, QuantizedLinear)]
    assert len(layers) == 3 * 7 and {layer.bits for layer in layers} == {3}
    told = json.loads((tmp_path / "result.json").read_text())
    assert told["hash"] == training_hash(config) and told["steps"] == 4 and told["validation"]["loss"] > 0
    before = {file: file.stat().st_mtime_ns for file in tmp_path.rglob("*") if file.is_file()}
    again = run_training(config, tmp_path, progress=lambda step, steps: calls.append((step, steps)))
    assert again == done and len(calls) == 4
    assert {file: file.stat().st_mtime_ns for file in before} == before
    assert read_config(tmp_path) == config


def test_it_lowers_the_loss_it_minimises(tiny_architectures: Any, data: Path, tmp_path: Path) -> None:
    config = config_of(tiny_architectures, data, bits=2, steps=30, rate=3e-3, validation_samples=2, warmup=0.1)
    run_training(config, tmp_path)
    losses = [json.loads(line) for line in (tmp_path / "curve.jsonl").read_text().splitlines()][:-1]
    early, late = (sum(one["gdkd"] for one in part) for part in (losses[:5], losses[-5:]))
    assert late < 0.7 * early


def test_an_interrupted_training_exports_the_same_checkpoint(
    tiny_architectures: Any, data: Path, tmp_path: Path
) -> None:
    config = config_of(tiny_architectures, data)
    whole = run_training(config, tmp_path / "whole")
    with pytest.raises(TrainingError, match=r"stopped at step 1 of 4 after 0 minutes; run it again"):
        run_training(config, tmp_path / "cut", minutes=0.0)
    assert not (tmp_path / "cut" / "result.json").exists() and not (tmp_path / "cut" / "model").exists()
    cut = run_training(config, tmp_path / "cut")
    one, other = (Path(done.pretrained, "model.safetensors").read_bytes() for done in (whole, cut))
    assert one == other
    assert Path(whole.pretrained, SEEN_FILE).read_text() == Path(cut.pretrained, SEEN_FILE).read_text()


def test_the_twin_is_a_plain_checkpoint_and_awq_stands_beside(
    tiny_architectures: Any, data: Path, tmp_path: Path
) -> None:
    twin = run_training(config_of(tiny_architectures, data, bits=16, steps=2), tmp_path / "twin")
    assert twin.base is None and "quantization_config" not in json.loads(
        Path(twin.pretrained, "config.json").read_text()
    )
    assert not any(isinstance(module, QuantizedLinear) for module in load(twin).modules())
    four = config_of(tiny_architectures, data, "llava", bits=4, steps=1, awq=True, distillation=False, relational=False)
    run_training(four, tmp_path / "four")
    stored = json.loads((tmp_path / "four" / "model-awq" / "config.json").read_text())["quantization_config"]
    assert (stored["quant_method"], stored["bits"], stored["group_size"]) == ("awq", 4, 16)


def test_another_training_s_folder_is_refused(tiny_architectures: Any, data: Path, tmp_path: Path) -> None:
    config = config_of(tiny_architectures, data)
    with pytest.raises(TrainingError):
        run_training(config, tmp_path, minutes=0.0)
    other = config_of(tiny_architectures, data, bits=2)
    with pytest.raises(TrainingError, match=r"holds another training \(bits 3, not 2\); give another folder"):
        run_training(other, tmp_path)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(TrainingError, match=r"config.json is damaged"):
        run_training(config, tmp_path)
    with pytest.raises(TrainingError, match="holds no training"):
        read_config(tmp_path / "nothing")


def test_what_cannot_begin_leaves_the_folder_free(tiny_architectures: Any, data: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no"):
        run_training(config_of(tiny_architectures, tmp_path / "none"), tmp_path / "out")
    assert run_training(config_of(tiny_architectures, data, steps=1), tmp_path / "out").folder == tmp_path / "out"


def test_two_programs_train_one_after_the_other(tiny_architectures: Any, data: Path, tmp_path: Path) -> None:
    config = config_of(tiny_architectures, data, steps=1)
    found: list[Trained] = []
    with FileLock(tmp_path / ".lock"):
        other = threading.Thread(target=lambda: found.append(run_training(config, tmp_path)))
        other.start()
        other.join(0.5)
        assert not found and not (tmp_path / "state").exists()  # it waits
    other.join()
    assert found == [run_training(config, tmp_path)]


def test_a_teacher_of_another_tokenizer_is_refused_before_anything_is_trained(
    tiny_architectures: Any, tiny_checkpoint: Path, data: Path, tmp_path: Path
) -> None:
    with pytest.raises(TeacherError, match="different tokenizers"):
        run_training(config_of(tiny_architectures, data, teacher=str(tiny_checkpoint)), tmp_path)
    assert not (tmp_path / "state").exists()


@pytest.mark.parametrize("name", ["idefics3", "qwen2_vl", "qwen3_vl", "llava", "paligemma"])
def test_shared_visual_features_change_no_loss(tiny_architectures: Any, data: Path, name: str) -> None:
    config = config_of(tiny_architectures, data, name)
    processor = load_processor(config.pretrained, revision=None, trust_remote_code=False)
    student, teacher = tiny_architectures.make(name), tiny_architectures.make(name)
    with torch.no_grad():
        student.get_output_embeddings().weight.mul_(1.1)
    install(student, config)
    batches = [one.batch for one in itertools.islice(Examples(config, student, processor).batches(Place()), 2)]
    objective = QatObjective(student, teacher, config)
    apart = [objective(batch)[1] for batch in batches]
    calls = []
    tower = next(
        module for key, module in teacher.named_modules() if key.endswith(("vision_model", "visual", "vision_tower"))
    )
    tower.register_forward_hook(lambda *_: calls.append(1))
    assert share_vision(student, teacher, config)
    assert [objective(batch)[1] for batch in batches] == apart and not calls
    unshare_vision(student)
    learning = config.model_copy(update={"trained": ("connector", "language")})
    assert not share_vision(student, tiny_architectures.make(name), learning)
    assert not share_vision(student, tiny_architectures.make(name, seed=6), config)
    copied = copy.deepcopy(student)
    assert "get_image_features" not in vars(copied.model)


def test_a_checkpoint_knows_what_it_was_trained_on(tiny_architectures: Any, data: Path, tmp_path: Path) -> None:
    done = run_training(config_of(tiny_architectures, data, steps=6), tmp_path)
    seen = load_seen(Path(done.pretrained))
    assert seen is not None and len(seen.image_ids) == json.loads((tmp_path / "result.json").read_text())["pictures"]
    with pytest.raises(OverlapError, match=r"the model of training [0-9a-f]{8} was trained on.* without: \[FAMILY\]"):
        refuse_overlap(seen, [next(iter(seen.image_ids))], "sample 1")
    refuse_overlap(seen, ["pixels:other"], "sample 2")
    evaluated = BitquakeHF(
        pretrained=done.pretrained, device="cpu", dtype="float32", artifacts=str(tmp_path / "artifacts")
    )
    assert evaluated._trained == (seen,)
    assert load_seen(tmp_path) is None and load_seen(tmp_path / "model.txt") is None
    (Path(done.pretrained) / SEEN_FILE).write_text("{}")
    with pytest.raises(CalibrationError, match="is damaged"):
        load_seen(Path(done.pretrained))
