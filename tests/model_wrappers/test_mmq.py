"""mmq's three configuration formats: each module of tiny models gets the bits that the configuration gives it."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import Blip2ForImageTextRetrieval

from bitquake import cli
from bitquake.model_wrappers.components import cells
from bitquake.model_wrappers.quantizers.mmq import import_mmq, load_mmq
from bitquake.model_wrappers.quantizers.plan import QuantizationError, resolve
from bitquake.model_wrappers.quantizers.spec import QuantSpec, QuantSpecError, load_spec

GPTQ = {
    "percent_dampening": 0.01, "group_size": -1, "use_symmetric": True, "use_act_order": False,
    "use_static_groups": False,
}  # fmt: skip
BLIP2_LAYERS = ("self_attn", "self_attn_output", "fc1", "fc2")


@pytest.fixture(scope="module")
def meta(tiny_architectures: Any) -> Callable[[str], Any]:
    """Models without weights, six blocks to a stack."""
    found: dict[str, Any] = {}

    def make(name: str) -> Any:
        if name not in found:
            config = tiny_architectures.config(name.removesuffix("-itm"), vision_blocks=6, text_blocks=6)
            with torch.device("meta"):
                if name.endswith("-itm"):
                    config.qformer_config.use_qformer_text_input = True
                    found[name] = Blip2ForImageTextRetrieval(config)
                else:
                    from transformers import AutoModelForImageTextToText

                    found[name] = AutoModelForImageTextToText.from_config(config)
        return found[name]

    return make


def _bits(model: Any, spec: QuantSpec) -> dict[str, int]:
    return {name: one.bits or 16 for name, one in resolve(model, spec).items()}


def test_uniform_takes_thirds_and_layers_of_each_part(meta: Callable[[str], Any]) -> None:
    model = meta("blip-2")
    spec = load_mmq(
        [
            {"model_part": "LLM", "layer_group": "MIDDLE", "layer_type": "ATTENTION", "num_bits": 5},
            {"model_part": "VIT", "layer_group": "ALL", "layer_type": "BOTH", "num_bits": 4},
            {"model_part": "QFORMER", "layer_group": "LAST", "layer_type": "MLP", "num_bits": 3},
            {"model_part": "LLM", "layer_group": "FIRST", "layer_type": "MLP", "num_bits": 16},
        ]
    )
    assert (spec.method, spec.group_size, spec.symmetric) == ("uniform", "tensor", False)
    assert spec.uniform is not None and spec.uniform.quantize_bias
    got = _bits(model, spec)
    expected = {}
    for name in cells(model):
        if re.match(r"vision_model\.encoder\.layers", name):
            expected[name] = 4
        elif re.match(r"language_model\.model\.decoder\.layers\.[23]\.self_attn", name):
            expected[name] = 5
        elif match := re.match(r"qformer\.encoder\.layer\.(\d+)\.(intermediate|output)_query", name):
            last = sum(1 for _ in model.get_submodule("qformer.encoder.layer").children())
            if int(match[1]) >= 2 * last // 3:
                expected[name] = 3
    assert got == expected and len(set(got.values())) == 3


def test_gptq_takes_what_it_is_told_of_each_part(meta: Callable[[str], Any]) -> None:
    model = meta("blip-2")
    spec = load_mmq(
        {
            "vision": {"bits": 8, **GPTQ},
            "qformer": {"bits": 16, **GPTQ},
            "language": {"bits": 4, **GPTQ, "group_size": 16, "use_symmetric": False},
        }
    )
    assert (spec.method, spec.calibration is not None, spec.gptq and spec.gptq.damp) == ("gptq", True, 0.01)
    found = resolve(model, spec)
    every = cells(model)
    assert set(found) == {n for n, c in every.items() if c.component in ("vision", "language") and c.third}
    assert {(one.bits, one.group_size, one.symmetric) for n, one in found.items() if n.startswith("vision")} == {
        (8, "channel", True)
    }
    assert {(one.bits, one.group_size, one.symmetric) for n, one in found.items() if n.startswith("language")} == {
        (4, 16, False)
    }
    options = load_mmq({"language": {"bits": 3, "use_act_order": True, "percent_dampening": 0.05}}).gptq
    assert options is not None and options.act_order and options.damp == 0.05


@pytest.mark.parametrize("name", ["blip-2", "blip-2-itm"])
def test_awq_takes_blip2_layer_by_layer(meta: Callable[[str], Any], name: str) -> None:
    model = meta(name)
    qformer = {
        "self_attn": 8, "self_attn_output": 7, "cross_attn": 6, "cross_attn_output": 5, "intermediate_query": 4,
        "output_query": 4,
    }  # fmt: skip
    if name.endswith("itm"):
        qformer |= {"intermediate_txt": 3, "output_txt": 2}
    config: dict[str, Any] = {
        "vit_layers": {"self_attn": 6, "self_attn_output": 4, "fc1": 3, "fc2": 16},
        "qformer_layers": qformer,
    }
    if name == "blip-2":
        config["llm_layers"] = {"self_attn": 8, "self_attn_output": 5, "fc1": 4, "fc2": 2}
    spec = load_mmq(config)
    assert (spec.method, spec.bits, spec.group_size, spec.symmetric) == ("awq", 8, 128, False)
    names = [
        (r"vision.*self_attn\.qkv", 6), (r"vision.*projection", 4), (r"vision.*mlp\.fc1", 3),
        (r"qformer.*\.attention\.attention\.(query|key|value)", 8), (r"qformer.*\.attention\.output\.dense", 7),
        (r"qformer.*crossattention\.attention\.\w+", 6), (r"qformer.*crossattention\.output\.dense", 5),
        (r"qformer.*\.(intermediate|output)_query\.dense", 4), (r"qformer.*\.\d+\.intermediate\.dense", 3),
        (r"qformer.*\.\d+\.output\.dense", 2), (r"language.*[qkv]_proj", 8), (r"language.*out_proj", 5),
        (r"language.*\d\.fc1", 4), (r"language.*\d\.fc2", 2),
    ]  # fmt: skip
    expected = {}
    for module, cell in cells(model).items():
        bits = [b for pattern, b in names if re.fullmatch(pattern, module) and cell.third]
        assert len(bits) <= 1
        if bits:
            expected[module] = bits[0]
    assert _bits(model, spec) == expected


def test_awq_takes_llavas_layers(meta: Callable[[str], Any]) -> None:
    model = meta("llava")
    spec = load_mmq({"vision_layers": {"self_attn": 8, "mlp": 6}, "llm_layers": {"self_attn": 4, "mlp": 4}})
    wanted = {("vision", "attention"): 8, ("vision", "mlp"): 6, ("language", "attention"): 4, ("language", "mlp"): 4}
    expected = {n: wanted[c.component, c.kind] for n, c in cells(model).items() if c.third}
    assert _bits(model, spec) == expected  # and the projector stays
    assert len(spec.plan) == 3 and spec.plan[2].modules is None  # all layers alike are one plain rule


def test_a_part_that_a_model_lacks_is_named(meta: Callable[[str], Any]) -> None:
    spec = load_mmq({"qformer": {"bits": 4, **GPTQ}})
    with pytest.raises(QuantizationError, match=r"components connector.*matches no Linear module of Llava"):
        resolve(meta("llava"), spec)


@pytest.mark.parametrize("trailing", ["", ","])
def test_a_file_is_imported_and_read_back(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], meta: Callable[[str], Any], trailing: str
) -> None:
    """mmq's own awq.json has a comma after the last item, which is no JSON."""
    config = {"vit_layers": dict.fromkeys(BLIP2_LAYERS, 8), "llm_layers": dict.fromkeys(BLIP2_LAYERS, 4)}
    file, out = tmp_path / "awq.json", tmp_path / "mine.yaml"
    text = json.dumps(config, indent=4)
    file.write_text(text[:-1].rstrip() + trailing + "\n}\n")
    assert cli.main(["quants", "import", str(file), "--out", str(out)]) == 0
    assert capsys.readouterr().out == out.read_text()
    spec = load_spec(str(out))
    assert spec.name == "mine"
    assert spec.model_copy(update={"name": "awq"}) == load_mmq(file) == load_mmq(str(file), "awq")
    assert _bits(meta("blip-2"), spec) == _bits(meta("blip-2"), load_mmq(config))


def test_sixteen_bits_everywhere_is_full_precision(tmp_path: Path) -> None:
    file = tmp_path / "all16.json"
    file.write_text(json.dumps({part: {"bits": 16, **GPTQ} for part in ("vision", "qformer", "language")}))
    assert load_mmq(file).is_full_precision
    assert "full-precision" in import_mmq(file, tmp_path / "all16.yaml")
    assert load_spec(str(tmp_path / "all16.yaml")).is_full_precision


ENTRY = {"model_part": "VIT", "layer_group": "ALL", "layer_type": "BOTH", "num_bits": 4}


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ([{**ENTRY, "model_part": "QFORMERS"}], r"entry 1: model_part: expected one of VIT, QFORMER, LLM, got"),
        ([{**ENTRY, "group_size": 64}], r"entry 1: cannot honour 'group_size'"),
        ([{**ENTRY, "num_bits": 9}], r"entry 1: num_bits: expected 2 to 8, or 16"),
        ([{k: v for k, v in ENTRY.items() if k != "layer_type"}], r"entry 1: layer_type is missing"),
        ([ENTRY, {**ENTRY, "layer_group": "FIRST"}], r"entry 2: vision/front/attention is in entry 1 already"),
        ([4], r"entry 1: expected a mapping"),
        ({"vision": {"bits": 4, "desc_act": True}}, r"vision: cannot honour 'desc_act'"),
        ({"vision": {"group_size": 64}}, r"vision: bits is missing"),
        ({"vision": {"bits": True}}, r"vision: bits: expected 2 to 8"),
        ({"vision": {"bits": 4, "use_symmetric": 1}}, r"use_symmetric: expected true or false"),
        ({"vision": {"bits": 4}, "language": {"bits": 4, "percent_dampening": 0.1}},
         r"percent_dampening differs by part \(vision 0.01, language 0.1\)"),
        ({"vision": {"bits": 4, "group_size": "g"}}, r"group_size"),
        ({"vit_layers": {"selt_attn_output": 4}},
         r"vit_layers: cannot honour 'selt_attn_output' \(did you mean 'self_attn_output'\?\)"),
        ({"llm_layers": {"self_attn": 4}}, r"self_attn alone"),
        ({"vit_layers": {"fc1": 4}, "vision_layers": {"mlp": 4}}, r"the same part"),
        ({"visoin": {"bits": 4}}, r"unknown part 'visoin' \(did you mean 'vision'\?\)"),
        ({"vision": {"bits": 4}, "llm_layers": {"fc1": 4}}, r"mixes the parts of two kinds"),
        ({}, r"expected a list \(uniform\) or a mapping"),
    ],
)  # fmt: skip
def test_what_cannot_be_honoured_is_named(config: Any, message: str) -> None:
    with pytest.raises(QuantSpecError, match=message):
        load_mmq(config)


def test_a_file_that_is_none(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "x.json"
    file.write_text("[{]")
    assert cli.main(["quants", "import", str(file)]) == 2
    assert "is no JSON" in capsys.readouterr().err
    file.write_text(json.dumps([ENTRY]))
    with pytest.raises(QuantSpecError, match="is a configuration for uniform, not for awq"):
        load_mmq(file, "awq")
    assert cli.main(["quants", "import", str(file), "--out", str(tmp_path / "x.json")]) == 2
    assert "ends in .yaml" in capsys.readouterr().err
    assert cli.main(["quants", "import", str(tmp_path / "none.json")]) == 2
    assert "No such file" in capsys.readouterr().err
