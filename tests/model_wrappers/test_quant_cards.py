"""Quantizing a tiny Idefics3 in place and its quant card, counted by hand; the store of cards."""

from __future__ import annotations

import copy
import hashlib
import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch import nn
from transformers import Idefics3Config, Idefics3ForConditionalGeneration

from bitquake.model_wrappers.quant_cards import QuantCardError, artifacts_dir, build_card, load_card, store_card
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.model_wrappers.quantizers.hashing import tensor_hash
from bitquake.model_wrappers.quantizers.linear import QuantizedLinear
from bitquake.model_wrappers.quantizers.replace import QuantizationError, quantize_model
from bitquake.quant_card import Adapter, QuantCard

HIDDEN, INTER, VOCAB, LAYERS, KV = 32, 72, 50, 2, 16  # 72 is no multiple of the group: a short last group
VISION = 24


def tiny(*, tied: bool = True, dtype: torch.dtype = torch.bfloat16) -> nn.Module:
    """Idefics3 with random weights, the same at every call."""
    torch.manual_seed(0)
    config = Idefics3Config(
        vision_config={"hidden_size": VISION, "intermediate_size": 40, "num_hidden_layers": 2, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 8},
        text_config={"model_type": "llama", "hidden_size": HIDDEN, "intermediate_size": INTER,
                     "num_hidden_layers": LAYERS, "num_attention_heads": 4, "num_key_value_heads": 2,
                     "vocab_size": VOCAB, "pad_token_id": 0},
        scale_factor=2, image_token_id=VOCAB - 1, tie_word_embeddings=tied,
    )  # fmt: skip
    return Idefics3ForConditionalGeneration(config).to(dtype).eval()


def quantized(quant: str, **how: object) -> tuple[nn.Module, QuantCard]:
    model, spec = tiny(**how), load_spec(quant)  # type: ignore[arg-type]
    before = quantize_model(model, spec)
    return model, build_card(model, spec, pretrained="tiny", before=before)


def test_only_the_asked_components_change() -> None:
    original = dict(tiny().named_parameters())
    model, card = quantized("rtn-int4-g64:group_size=16")
    assert {e.component for e in card.modules} == {"language"}
    assert len(card.modules) == 7 * LAYERS
    assert all(e.changed and e.hash_before == tensor_hash(original[f"{e.name}.weight"]) for e in card.modules)
    assert all(e.hash_after == tensor_hash(model.get_submodule(e.name).weight) for e in card.modules)
    assert "lm_head" in card.kept and not set(card.kept) & {e.name for e in card.modules}
    left = dict(model.named_parameters())
    assert model.lm_head.weight is model.model.text_model.embed_tokens.weight  # still tied
    assert all(torch.equal(value, original[name]) for name, value in left.items())
    assert any("embed_tokens" in n for n in left) and any("layernorm" in n for n in left)
    assert original.keys() - left.keys() == {f"{e.name}.weight" for e in card.modules}


@pytest.mark.parametrize("components", ["vision", "connector", "language", "vision+connector+language"])
def test_components(components: str) -> None:
    _, card = quantized(f"rtn-int3-g64:components={components}")
    assert {e.component for e in card.modules} == set(components.split("+"))
    for name, entry in card.components.items():
        assert (entry.n_quantized > 0) == (name in components)
        assert (entry.packed_bytes < entry.n_bytes) == (name in components)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("execution", ["simulated", "packed"])
def test_bytes_and_bits_by_hand(execution: str, tied: bool) -> None:
    _, card = quantized(f"rtn-int3-g64:group_size=16:execution={execution}", tied=tied)
    # q, o: 32x32; k, v: 16x32; gate, up: 72x32; down: 32x72
    shapes = [(HIDDEN, HIDDEN)] * 2 + [(KV, HIDDEN)] * 2 + [(INTER, HIDDEN)] * 2 + [(HIDDEN, INTER)]
    n_quantized = LAYERS * sum(rows * columns for rows, columns in shapes)
    # 8 codes in 3 bytes; groups of 16: 2 in a row of 32, 5 in one of 72; a group's scale is 2 bytes, its zero-point 1
    codes = LAYERS * sum(rows * columns * 3 // 8 for rows, columns in shapes)
    groups = LAYERS * sum(rows * {32: 2, 72: 5}[columns] for rows, columns in shapes)
    assert sum(e.n_weights for e in card.modules) == n_quantized
    assert sum(e.packed_bytes for e in card.modules) == codes + 3 * groups
    n_all = sum(p.numel() for p in tiny(tied=tied).parameters())
    n_rest = n_all - n_quantized
    assert card.nominal_bpw == pytest.approx((3 * n_quantized + 16 * n_rest) / n_all, rel=1e-12)
    assert card.effective_bpw == pytest.approx((8 * (codes + 3 * groups) + 16 * n_rest) / n_all, rel=1e-12)
    assert sum(c.n_parameters for c in card.components.values()) == n_all
    assert ("other" in card.components) == (not tied)  # an untied head is the only thing outside the three
    language = card.components["language"]
    rest = 2 * (language.n_parameters - n_quantized)
    assert language.packed_bytes == rest + codes + 3 * groups
    assert language.n_bytes == rest + (codes + 3 * groups if execution == "packed" else 2 * n_quantized)
    assert (card.execution, card.method, card.dtype) == (execution, "rtn", "bfloat16")
    assert card.kernel.startswith("torch F.linear on bfloat16 de-quantized ")


def test_packed_model_is_smaller_in_memory_and_computes_the_same() -> None:
    (simulated, one), (packed, other) = (quantized(f"hqq-int2-g64:execution={e}") for e in ("simulated", "packed"))
    ids = torch.tensor([[1, 4, 9, 16, 25]])
    with torch.inference_mode():
        assert torch.equal(simulated(input_ids=ids).logits, packed(input_ids=ids).logits)

    for module in simulated.modules():
        if isinstance(module, QuantizedLinear):
            module.forget_codes()  # as the wrapper does once it has the card

    def held(model: nn.Module) -> int:
        return sum(t.nbytes for t in (*model.parameters(), *model.buffers()))

    saved = held(simulated) - held(packed)
    assert (
        saved == sum(c.n_bytes for c in one.components.values()) - sum(c.n_bytes for c in other.components.values()) > 0
    )
    assert one.weights_hash == other.weights_hash  # the same weights
    assert one.model_hash != other.model_hash  # but not the same spec


def test_full_precision_has_a_card_too() -> None:
    model = tiny()
    spec = load_spec(None)
    assert quantize_model(model, spec) == {}
    card = build_card(model, spec, pretrained="tiny", revision="abc", before={})
    assert (card.method, card.execution, card.spec_name, card.revision) == (
        "none",
        "full-precision",
        "full-precision",
        "abc",
    )
    assert card.modules == [] and card.nominal_bpw == card.effective_bpw == 16.0
    assert len(card.kept) == sum(isinstance(m, nn.Linear) for m in model.modules())
    assert card.libraries.keys() == {"bitquake", "torch", "transformers", "lmms-eval"} and card.device == "cpu"


def test_a_model_knows_what_it_was_made_from() -> None:
    """A quantized checkpoint, and a model with an adapter, find their full-precision twin by the card's subject."""
    card = quantized("rtn-int4-g64")[1]
    assert card.subject == "tiny"
    assert card.model_copy(update={"pretrained": "folder", "base": "tiny"}).subject == "tiny"
    adapted = card.model_copy(update={"adapter": Adapter(source="lora", hash="1")})
    assert adapted.subject == "tiny + lora"
    assert len({adapted.model_hash, card.model_hash, adapted.model_copy(update={"adapter": None}).model_hash}) == 2


def test_the_hqq_librarys_version_stands_in_the_card() -> None:
    pytest.importorskip("hqq")
    assert "hqq" in quantized("hqq-int4-g64:backend=hqq")[1].libraries


def test_weights_hash_is_over_names_and_bytes() -> None:
    model = tiny(dtype=torch.float32)
    lines = []  # an independent reading: state dict, in name order
    for name, tensor in sorted(model.state_dict().items()):
        data = tensor.contiguous().numpy().tobytes()
        digest = hashlib.blake2b(data, digest_size=16).hexdigest()
        lines.append(f"{name} {str(tensor.dtype)[6:]} {tuple(tensor.shape)} {digest}\n")
    expected = hashlib.blake2b("".join(lines).encode(), digest_size=16).hexdigest()

    def found() -> str:
        return build_card(model, load_spec(None), pretrained="", before={}).weights_hash

    assert found() == expected
    with torch.no_grad():
        model.model.connector.modality_projection.proj.weight[3, 5] += 1e-6
    assert found() != expected


def test_every_spec_gives_other_weights() -> None:
    quants = ["none", "rtn-int8-g64", "rtn-int4-g64", "rtn-int3-g64", "rtn-int2-g64", "hqq-int3-g64", "hqq-int2-g64"]
    assert len({quantized(quant)[1].weights_hash for quant in quants}) == len(quants)


def test_hashes_are_the_same_in_another_process_and_with_more_threads() -> None:
    code = (
        "import importlib.util, sys, torch; torch.set_num_threads(int(sys.argv[2]));"
        "s = importlib.util.spec_from_file_location('m', sys.argv[1]); m = importlib.util.module_from_spec(s);"
        "s.loader.exec_module(m); c = m.quantized('hqq-int3-g64')[1]; print(c.weights_hash, c.content_hash)"
    )
    card = quantized("hqq-int3-g64")[1]
    done = subprocess.run([sys.executable, "-c", code, __file__, "3"], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [card.weights_hash, card.content_hash]


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("quant", ["none", "rtn-int4-g64", "hqq-int3-g64:execution=packed"])
def test_device_does_not_change_the_weights(quant: str) -> None:
    model, spec = tiny().cuda(), load_spec(quant)
    card = build_card(model, spec, pretrained="tiny", before=quantize_model(model, spec))
    assert card.weights_hash == quantized(quant)[1].weights_hash
    assert card.device.startswith("cuda ")


def test_a_shared_weight_is_left_alone() -> None:
    model = tiny()
    layers = model.model.text_model.layers
    layers[1].mlp.up_proj.weight = layers[0].mlp.up_proj.weight
    layers[1].self_attn.k_proj = layers[0].self_attn.k_proj
    spec = load_spec("rtn-int4-g64")
    before = quantize_model(model, spec)
    assert len(before) == 7 * LAYERS - 4
    assert not any("up_proj" in n or "k_proj" in n for n in before)
    kept = build_card(model, spec, pretrained="", before=before).kept
    assert "model.text_model.layers.0.mlp.up_proj" in kept


def test_what_cannot_be_quantized_is_refused() -> None:
    spec = load_spec("rtn-int4-g64")
    model = tiny()
    quantize_model(model, spec)
    with pytest.raises(
        QuantizationError, match=r"quantized already \(14 modules, first model.text_model.layers.0.*load it afresh"
    ):
        quantize_model(model, spec)

    model = tiny()
    model.model.connector = nn.Identity()
    with pytest.raises(
        QuantizationError, match=r"no Linear module of Idefics3.* belongs to connector; .* in language, vision"
    ):
        quantize_model(model, load_spec("rtn-int4-g64:components=connector+language"))
    assert not any(isinstance(m, QuantizedLinear) for m in model.modules())  # refused before anything changed

    model = tiny()
    with torch.no_grad():
        model.model.text_model.layers[1].mlp.down_proj.weight[5, 7] = float("nan")
    with pytest.raises(QuantizationError, match=r"layers.1.mlp.down_proj \(shape \(32, 72\)\): 1 weights .* NaN"):
        quantize_model(model, spec)
    done = [name for name, m in model.named_modules() if isinstance(m, QuantizedLinear)]
    assert len(done) == 13 and all(name.startswith("model.text_model.layers.") for name in done)  # kept as they are

    with pytest.raises(QuantizationError, match="method gptq needs calibration data, and there is none"):
        quantize_model(tiny(), load_spec("gptq-int4-g64"))

    with pytest.raises(QuantizationError, match="14 weights are offloaded"):
        quantize_model(tiny().to("meta"), spec)


def test_a_card_is_made_from_the_tensors_not_from_the_spec() -> None:
    spec = load_spec("rtn-int3-g64")
    model = tiny()
    before = quantize_model(model, spec)
    with pytest.raises(QuantCardError, match="not \\(2, "):  # another spec than was carried out
        build_card(model, load_spec("rtn-int2-g64"), pretrained="", before=before)
    with pytest.raises(QuantCardError, match="14 modules are quantized, 0 have a hash"):
        build_card(model, spec, pretrained="", before={})
    with pytest.raises(QuantCardError, match="0 modules are quantized, 14 have a hash"):
        build_card(tiny(), spec, pretrained="", before=before)
    dense = copy.deepcopy(model)
    target = dense.get_submodule("model.text_model.layers.1.mlp.gate_proj")
    target.dequantized[-1, -1] += 1
    with pytest.raises(
        QuantCardError, match=r"gate_proj claims 3 bits, but its de-quantized weight is not what its codes say"
    ):
        build_card(dense, spec, pretrained="", before=before)
    with pytest.raises(QuantCardError, match="is offloaded"):
        build_card(tiny().to("meta"), load_spec(None), pretrained="x", before={})


def test_store_and_load(tmp_path: Path) -> None:
    card = quantized("rtn-int4-g64")[1]
    folder = artifacts_dir(tmp_path / "a" / "b")
    card_hash = store_card(card, folder)
    assert card_hash == card.content_hash
    path = folder / "quant_cards" / f"{card_hash}.json"
    written = path.stat().st_mtime_ns
    assert store_card(card, folder) == card_hash and path.stat().st_mtime_ns == written  # nothing to do
    assert [p.name for p in path.parent.iterdir()] == [path.name]  # no temporary file stays
    assert load_card(card_hash, folder) == card

    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(QuantCardError, match="is damaged"):
        load_card(card_hash, folder)
    store_card(card, folder)  # repairs it
    changed = json.loads(path.read_text()) | {"nominal_bpw": 1.0}
    path.write_text(json.dumps(changed))
    with pytest.raises(QuantCardError, match="is damaged: its content's hash is"):
        load_card(card_hash, folder)
    with pytest.raises(QuantCardError, match=r"is not in .*No such file.*artifacts folder of the run"):
        load_card("0" * 32, folder)
    with pytest.raises(QuantCardError, match="expected a content hash"):
        load_card("../secret", folder)
    (tmp_path / "file").write_text("")
    with pytest.raises(QuantCardError, match=r"cannot be made: Not a directory; give another artifacts="):
        artifacts_dir(tmp_path / "file" / "x")


def test_default_folder_is_the_users_cache(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr("platformdirs.user_cache_path", lambda name, **_: tmp_path / "cache" / name)
    assert artifacts_dir(None) == tmp_path / "cache" / "bitquake"
    assert (tmp_path / "cache" / "bitquake").is_dir()
