"""Exports of trained models: exact in the packed format at every width, and in AutoAWQ's layout to a literal reader."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageTextToText

from bitquake.card_command import cards
from bitquake.model_wrappers.loading import load_model, load_processor, load_quantized, resolve_pretrained
from bitquake.model_wrappers.quant_cards import build_card
from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.spec import load_spec
from bitquake.model_wrappers.training import export as exporting
from bitquake.model_wrappers.training.batch import TrainingBatch
from bitquake.model_wrappers.training.config import QatConfig, load_training
from bitquake.model_wrappers.training.export import ExportError, export
from bitquake.model_wrappers.training.lsq import lsq_layers
from bitquake.model_wrappers.training.objective import QatObjective, install, trained_spec
from bitquake.quant_card import QuantCard

BASE = "bitquake/block-idefics3"
ARGUMENTS: dict[str, Any] = {
    "revision": None, "device": torch.device("cpu"), "device_map": None, "attn_implementation": None,
    "trust_remote_code": False,
}  # fmt: skip


def configuration(**changes: Any) -> QatConfig:
    values = {"method": "qat", "pretrained": BASE, "data": "block_vqav2", "steps": 1, "bits": 4, "group_size": 64,
              "distillation": False, "relational": False, "rate": 1e-3, "scale_rate": 1e-2}  # fmt: skip
    found = load_training({**values, **changes})
    assert isinstance(found, QatConfig)
    return found


@pytest.fixture(scope="module")
def probe() -> TrainingBatch:
    """A picture and a question, whose last words are learned."""
    processor = load_processor(resolve_pretrained(BASE), revision=None, trust_remote_code=False)
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8))
    content = [{"type": "image"}, {"type": "text", "text": "what color is the circle ?"}]
    prompt = processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)
    inputs = dict(processor(text=[prompt], images=[[picture]], return_tensors="pt"))
    labels = inputs["input_ids"].clone()
    labels[:, :-4] = -100
    return TrainingBatch(inputs, labels, inputs["input_ids"] == 4)


@pytest.fixture(scope="module")
def trained(probe: TrainingBatch) -> Callable[..., tuple[Any, QatConfig]]:
    """``trained(bits=…)``: the reference model after three real steps, in float32."""

    def made(**changes: Any) -> tuple[Any, QatConfig]:
        config = configuration(**changes)
        student = load_model(resolve_pretrained(BASE), dtype=torch.float32, **ARGUMENTS)
        objective, optimiser = QatObjective(student, None, config), torch.optim.AdamW(install(student, config))
        student.train()
        for _ in range(3):
            loss, _ = objective(probe)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
        return student, config

    return made


def exported(student: Any, config: QatConfig, out: Path, **changes: Any) -> exporting.Exported:
    return export(student, trained_spec(config), out, source=resolve_pretrained(BASE), base=BASE, **changes)


def logits(model: Any, probe: TrainingBatch) -> torch.Tensor:
    with torch.no_grad():
        found: torch.Tensor = model.eval()(**probe.inputs).logits
    return found


@pytest.mark.parametrize(
    "changes",
    [{"bits": 8}, {"bits": 4}, {"bits": 3}, {"bits": 2, "symmetric": False}, {"group_size": "channel"}],
    ids=str,
)
def test_the_packed_checkpoint_is_what_was_trained(
    trained: Callable[..., tuple[Any, QatConfig]], probe: TrainingBatch, tmp_path: Path, changes: dict[str, Any]
) -> None:
    student, config = trained(**changes)
    before = {name: tensor.clone() for name, tensor in student.state_dict().items()}
    done = exported(student, config, tmp_path, probe=probe)
    assert (done.n_modules, done.logits) == (28, 0.0)
    assert student.training
    assert all(torch.equal(before[name], tensor) for name, tensor in student.state_dict().items())

    # read with nothing of the exporter's: codes by their bits, weights by transformers
    tensors = load_file(tmp_path / "model.safetensors")
    layers = lsq_layers(student)
    for name, layer in layers.items():
        row = np.unpackbits(tensors[f"{name}.codes"].numpy(), axis=1, bitorder="little")
        row = row[:, : layer.in_features * layer.bits].reshape(len(row), layer.in_features, layer.bits)
        codes = torch.from_numpy((row << np.arange(layer.bits)).sum(-1))
        assert int((codes - layer.quantized_weight().codes.long()).abs().max()) == 0
        assert tensors[f"{name}.scale"].dtype == torch.float16
        group = torch.arange(layer.in_features) // layer.group_size
        zero = 0 if layer.zero is None else tensors[f"{name}.zero"][:, group].float()
        grid = (codes - 2 ** (layer.bits - 1) - zero) * tensors[f"{name}.scale"][:, group].float()
        assert torch.equal(grid.float(), layer.rounded())
    expected = logits(student, probe)
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert torch.equal(logits(again, probe), expected)
    packed = load_quantized(str(tmp_path), load_spec("none"), dtype=torch.float32, execution="packed", **ARGUMENTS)
    assert torch.equal(logits(packed.model, probe), expected)


def test_its_card_pairs_it_with_the_full_precision_model(
    trained: Callable[..., tuple[Any, QatConfig]], tmp_path: Path
) -> None:
    student, config = trained(bits=3)
    exported(student, config, tmp_path, dtype=torch.bfloat16)
    card = QuantCard.model_validate_json((tmp_path / "quant_card.json").read_bytes())
    assert (card.spec_name, card.method, card.pretrained, card.dtype) == (
        "qat-int3-g64",
        "checkpoint",
        BASE,
        "bfloat16",
    )
    assert card.spec["bits"] == 3 and card.spec["components"] == ["language"]
    assert {(m.bits, m.group_size, m.symmetric, m.changed) for m in card.modules} == {(3, 64, True, True)}
    start = load_model(resolve_pretrained(BASE), dtype=torch.float32, **ARGUMENTS)
    assert {m.name: m.hash_before for m in card.modules} == {
        m.name: tensor_hash(start.get_submodule(m.name).weight) for m in card.modules
    }
    # as the wrapper loads it: its base is the twin's name
    loaded = load_quantized(str(tmp_path), load_spec("none"), dtype=torch.bfloat16, **ARGUMENTS)
    run = build_card(
        loaded.model, loaded.spec, pretrained=str(tmp_path), base=loaded.base, before=loaded.before or {},
        checkpoint_format=loaded.checkpoint_format,
    )  # fmt: skip
    twin = build_card(start, load_spec("none"), pretrained=BASE, before={})
    assert run.subject == twin.subject == card.subject == BASE
    assert run.weights_hash == card.weights_hash
    (found,) = cards(tmp_path)
    assert found.problems == ()
    assert json.loads((tmp_path / "config.json").read_text())["quantization_config"]["quant"]["name"] == "qat-int3-g64"
    assert not (tmp_path / ".partial").exists()


def literal_awq(words: np.ndarray) -> np.ndarray:
    """AutoAWQ's int32 words (rows, out / 8) to integers (rows, out), nibble by nibble."""
    found = np.zeros((words.shape[0], words.shape[1] * 8), dtype=np.int64)
    for row in range(words.shape[0]):
        for word in range(words.shape[1]):
            bits = int(words[row, word]) & 0xFFFFFFFF
            for nibble, output in enumerate([0, 2, 4, 6, 1, 3, 5, 7]):
                found[row, 8 * word + output] = bits >> (4 * nibble) & 15
    return found


@pytest.mark.parametrize(("group", "symmetric"), [(32, True), (32, False), ("channel", True)])
def test_autoawqs_layout_holds_the_same_integers(
    trained: Callable[..., tuple[Any, QatConfig]], probe: TrainingBatch, tmp_path: Path, group: Any, symmetric: bool
) -> None:
    student, config = trained(group_size=group, symmetric=symmetric)
    done = exported(student, config, tmp_path, layout="awq", probe=probe)
    assert (done.n_modules, done.logits) == (28, 0.0)
    settings = json.loads((tmp_path / "config.json").read_text())["quantization_config"]
    assert settings == {
        "quant_method": "awq", "version": "gemm", "bits": 4, "zero_point": True,
        "group_size": -1 if group == "channel" else 32,
        "modules_to_not_convert": ["model.vision_model", "model.connector", "lm_head"],
    }  # fmt: skip
    tensors = load_file(tmp_path / "model.safetensors")
    layers = lsq_layers(student)
    assert not any(f"{name}.weight" in tensors for name in layers)
    for name in list(layers)[::9]:
        layer = layers[name]
        codes = literal_awq(tensors[f"{name}.qweight"].numpy())
        zeros = literal_awq(tensors[f"{name}.qzeros"].numpy())
        assert np.abs(codes.T - layer.quantized_weight().codes.numpy()).max() == 0
        assert (zeros == 8).all() == symmetric
        scales = tensors[f"{name}.scales"]
        assert scales.dtype == torch.float16
        of = np.arange(layer.in_features) // layer.group_size
        weight = (codes - zeros[of]) * scales.double().numpy()[of]
        assert np.array_equal(weight.T.astype(np.float32), layer.rounded().detach().numpy())
    loaded = load_quantized(str(tmp_path), load_spec("none"), dtype=torch.float32, **ARGUMENTS)
    assert loaded.checkpoint_format == "awq gemm"
    assert torch.equal(logits(loaded.model, probe), logits(student, probe))


def test_the_twin_is_a_plain_checkpoint(
    trained: Callable[..., tuple[Any, QatConfig]], probe: TrainingBatch, tmp_path: Path
) -> None:
    student, config = trained(bits=16)
    assert exported(student, config, tmp_path, probe=probe).logits == 0.0
    again = AutoModelForImageTextToText.from_pretrained(tmp_path, dtype=torch.float32)
    assert not any(isinstance(module, QuantizedLinear) for module in again.modules())
    assert torch.equal(logits(again, probe), logits(student, probe))
    assert "quantization_config" not in json.loads((tmp_path / "config.json").read_text())
    exported(student, config, tmp_path, dtype=torch.bfloat16)  # in place of what is there
    stored = {tensor.dtype for tensor in load_file(tmp_path / "model.safetensors").values()}
    assert stored == {torch.bfloat16}


@pytest.mark.parametrize("name", ["blip-2", "qwen2_5_vl", "paligemma", "llava_onevision"])
def test_other_architectures(tiny_architectures: Any, tmp_path: Path, name: str) -> None:
    """With a head of its own or a tied one, names that transformers stores otherwise, biases, and the connector."""
    config = configuration(bits=2, group_size=16, components="connector+language", trained="connector+language")
    student = tiny_architectures.make(name)
    install(student, config)
    one = tiny_architectures.example(name)
    batch = TrainingBatch(one.inputs, one.inputs["input_ids"], one.image[None])
    done = export(
        student, trained_spec(config), tmp_path, source=str(tiny_architectures.checkpoint(name)), base="some/model",
        probe=batch,
    )  # fmt: skip
    assert (done.n_modules, done.logits) == (len(lsq_layers(student)), 0.0)


# what is refused


def test_what_autoawqs_layout_cannot_hold(trained: Callable[..., tuple[Any, QatConfig]], tmp_path: Path) -> None:
    student, config = trained(bits=3)
    with pytest.raises(ExportError, match="has 4 bits, and the model 3; use layout packed"):
        exported(student, config, tmp_path, layout="awq")
    student, config = trained(group_size=64)
    with pytest.raises(ExportError, match=r"q_proj has 96 inputs in groups of 64 and 96 outputs; train with"):
        exported(student, config, tmp_path, layout="awq")
    student, config = trained(group_size=128)  # rows of 96 are a group of their own
    with pytest.raises(ExportError, match=r"one group size, and the model 96, 128"):
        exported(student, config, tmp_path, layout="awq")
    with pytest.raises(ExportError, match="28 layers have learned step sizes, and the spec is full-precision"):
        export(student, load_spec("none"), tmp_path, source=resolve_pretrained(BASE), base=BASE)
    assert not list(tmp_path.iterdir())


def _next_code(tensors: dict[str, torch.Tensor]) -> None:
    key = "model.text_model.layers.2.mlp.up_proj.codes"
    tensors[key][3, 5] ^= 1


def _next_scale(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.text_model.layers.0.self_attn.k_proj.scale"][0, 0] *= 1.001


def _another_norm(tensors: dict[str, torch.Tensor]) -> None:
    tensors["model.text_model.norm.weight"][0] += 0.01


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (_next_code, r"a code of model\.text_model\.layers\.2\.mlp\.up_proj is 1 off in the file"),
        (_next_scale, r"scales or zero-points of model\.text_model\.layers\.0\.self_attn\.k_proj differ"),
        (_another_norm, r"model\.text_model\.norm\.weight differs in the file"),
    ],
)
def test_a_file_that_is_not_what_was_trained_is_noticed(
    trained: Callable[..., tuple[Any, QatConfig]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    damage: Callable[[dict[str, torch.Tensor]], None],
    message: str,
) -> None:
    student, config = trained(bits=4)
    save = exporting.save_aside

    def damaged(model: Any, aside: Path, **arguments: Any) -> None:
        save(model, aside, **arguments)
        tensors = load_file(aside / "model.safetensors")
        damage(tensors)
        save_file(tensors, aside / "model.safetensors", metadata={"format": "pt"})

    monkeypatch.setattr(exporting, "save_aside", damaged)
    with pytest.raises(ExportError, match=message):
        exported(student, config, tmp_path)
    assert not (tmp_path / "config.json").exists()
