"""Specs: what is accepted, what is refused with which words, and the catalogue without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bitquake.model_wrappers.quantizers import QuantSpec, QuantSpecError, list_specs, load_spec
from bitquake.model_wrappers.quantizers.catalog import describe_spec, quants_table
from bitquake.model_wrappers.quantizers.options import OPTIONS

GROUPED = ("rtn", "hqq", "gptq", "awq", "mbq")
ALONE = {
    "full-precision", "rtn-w4a8", "rtn-w8a8", "mbq-w4a8", "smoothquant-w8a8", "bnb-nf4", "bnb-fp4", "bnb-int8",
    "torchao-int4-g128", "torchao-int8", "torchao-int8-dynamic", "torchao-fp8",
}  # fmt: skip


def test_named_specs_are_the_whole_matrix() -> None:
    expected = {f"{method}-int{b}-g{g}" for method in GROUPED for b in (8, 4, 3, 2) for g in (64, 128)}
    assert set(list_specs()) == expected | ALONE | {f"uniform-int{b}" for b in (8, 6, 5, 4, 3, 2)}
    for name in expected:
        spec = load_spec(name)
        method, bits, group = name.split("-")
        assert (spec.name, spec.method, f"int{spec.bits}", f"g{spec.group_size}") == (name, method, bits, group)
        assert spec.components == ("language",)
        assert (spec.execution, spec.backend, spec.symmetric) == ("simulated", "own", False)
        assert {key for key in OPTIONS if getattr(spec, key) is not None} == {method} - {"rtn"}
        assert (spec.calibration is not None) == (method in ("gptq", "awq", "mbq"))
    for name in ("rtn-w4a8", "mbq-w4a8", "rtn-w8a8", "smoothquant-w8a8"):  # papers.md section 4: settings of MBQ
        spec = load_spec(name)
        assert (f"w{spec.bits}a{spec.activation_bits}", spec.group_size, spec.symmetric) == (name[-4:], "channel", True)
    assert all(load_spec(name).bits == (4 if "4" in name else 8) for name in ALONE if name.startswith(("bnb", "torch")))


@pytest.mark.parametrize("none", [None, "", "none", "full-precision", {"method": "none"}])
def test_full_precision(none: str | None) -> None:
    spec = load_spec(none)
    assert spec.is_full_precision and spec.components == () and spec.bits is None


def test_overrides() -> None:
    spec = load_spec("rtn-int3-g64:execution=packed:components=language+vision:symmetric=true")
    assert spec.components == ("vision", "language")  # in the order of the model, whatever the order given
    assert (spec.bits, spec.group_size, spec.execution, spec.symmetric) == (3, 64, "packed", True)
    assert spec.name == "rtn-int3-g64:components=language+vision:execution=packed:symmetric=true"
    assert load_spec("hqq-int4-g128:hqq.iterations=7:hqq.p=0.5").hqq.model_dump() == {  # type: ignore[union-attr]
        "axis": 1, "iterations": 7, "p": 0.5, "beta": 10.0,
    }  # fmt: skip
    assert load_spec("hqq-int4-g64:backend=hqq").backend == "hqq"
    assert load_spec(spec) is spec


def test_a_name_shows_nobodys_folders() -> None:
    spec = load_spec("awq-int4-g64:calibration.samples=3:calibration.data=some/where/photos")
    assert spec.name == "awq-int4-g64:calibration.data=photos:calibration.samples=3"
    assert spec.calibration is not None and spec.calibration.data == "some/where/photos"
    assert load_spec("awq-int4-g64:calibration.data=block_vqav2").name == "awq-int4-g64:calibration.data=block_vqav2"


def test_a_file_of_the_users(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text("method: rtn\nbits: 4\ngroup_size: 48\ncomponents: [connector, language]\n")
    spec = load_spec(str(path))
    assert (spec.name, spec.group_size, spec.components) == ("mine", 48, ("connector", "language"))
    assert load_spec(f"{path}:bits=2").bits == 2
    mapping = {"name": "m", "method": "hqq", "bits": 2, "group_size": 32}
    assert load_spec(mapping) == QuantSpec(name="m", method="hqq", bits=2, group_size=32)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("rtn-int4-g46", ["unknown quantization spec 'rtn-int4-g46'", "did you mean 'rtn-int4-g64'", "hqq-int2-g128"]),
        ("rtn-int4-g64:bit=3", ["bit: unknown key", "did you mean 'bits'"]),
        ("rtn-int4-g64:bits=9", ["bits must be one of 2, 3, 4, 5, 6, 7, 8, got 9"]),
        ("rtn-int4-g64:bits=1", ["bits must be one of", "got 1"]),
        ("rtn-int4-g64:bits", ["expected key=value after ':', got 'bits'"]),
        ("rtn-int4-g64:bits=3:bits=2", ["bits is given twice"]),
        ("rtn-int4-g64:name=mine", ["the name is made of the overrides"]),
        ("rtn-int4-g64:method=[rtn]", ["method", "'awq', 'mbq'"]),
        ("none:bits=4", ["method none quantizes nothing", "bits"]),
        ("rtn-int4-g64:group_size=0", ["group_size", "must be a positive whole number, channel or tensor, got 0"]),
        ("rtn-int4-g64:components=vision+lm_head", ["components", "'vision', 'connector' or 'language'"]),
        ("rtn-int4-g64:components=[]", ["components is empty"]),
        ("rtn-int4-g64:hqq.p=0.5", ["hqq options belong to method hqq"]),
        ("rtn-int4-g64:execution=fast", ["execution", "'simulated' or 'packed'"]),
        ("hqq-int4-g64:hqq.axis=0", ["hqq.axis", "only axis 1"]),
        ("hqq-int4-g64:hqq.iters=0", ["hqq.iters: unknown key", "did you mean 'iterations'"]),
        ("hqq-int4-g64:symmetric=true", ["cannot be symmetric"]),
        ("hqq-int4-g64:backend=hqq:group_size=12", ["multiple of 8, got 12"]),
        ("hqq-int4-g64:backend=hqq:hqq.p=0.5", ["runs with its own defaults"]),
        ("full-precision:bits=4", ["method none quantizes nothing"]),
        ("no/such/file.yaml", ["no/such/file.yaml", "cannot be read: No such file"]),
        ({"method": "rtn", "group_size": 64}, ["bits must be one of"]),
        ({"method": "rtn", "bits": 4}, ["needs a group_size"]),
        ({"method": "awk", "bits": 4, "group_size": 64}, ["method", "'awq', 'mbq'"]),
        ("awq-int4-g64:group_size=tensor", ["group_size tensor fits methods uniform and rtn; awq needs groups"]),
        ("awq-int4-g64:calibration.source=none", ["method awq needs calibration data"]),
        ("awq-int4-g64:calibration.sauce=text", ["calibration.sauce: unknown key", "did you mean 'source'"]),
        ("awq-int4-g64:calibration.samples=0", ["calibration.samples", "greater than or equal to 1"]),
        ("rtn-int4-g64:calibration.source=text", ["method rtn is data-free and takes no calibration"]),
        ("gptq-int4-g64:activation_bits=8", ["activation_bits fits methods rtn, mbq and smoothquant, not gptq"]),
        ("gptq-int4-g64:gptq.damp=0", ["gptq.damp", "greater than 0"]),
        ("uniform-int4:group_size=64", ["method uniform is per tensor and asymmetric"]),
        ("bnb-nf4:bits=3", ["bitsandbytes nf4 has 4 bits, got 3"]),
        ("bnb-int8:group_size=64", ["bitsandbytes int8 takes no group_size"]),
        ("bnb-int8:bitsandbytes.double_quant=true", ["double_quant does nothing for type int8"]),
        ("bnb-nf4:bitsandbytes.threshold=3", ["threshold does nothing for type nf4"]),
        ({"method": "bitsandbytes", "plan": [{"layers": ["mlp"], "symmetric": True}]}, ["rules take no symmetric"]),
        ({"method": "torchao", "plan": [{"layers": ["mlp"], "group_size": 64}]}, ["group_size for torchao int4 only"]),
        ("torchao-int8:execution=simulated", ["torchao runs packed"]),
        ("smoothquant-w8a8:activation_bits=null", ["smoothquant is for quantized activations"]),
        ({"method": "rtn", "bits": 4, "group_size": 64, "plan": [{"bits": 3}]}, ["plan.0", "a rule needs modules"]),
        ({"method": "rtn", "bits": 4, "group_size": 64, "plan": [{"modules": "("}]}, ["no regular expression"]),
        (
            {"method": "rtn", "bits": 4, "group_size": 64, "components": ["vision"], "plan": [{"layers": ["mlp"]}]},
            ["a plan says itself what is quantized"],
        ),
    ],
)
def test_refusals_say_what_and_how(spec: object, words: list[str]) -> None:
    with pytest.raises(QuantSpecError) as caught:
        load_spec(spec)  # type: ignore[arg-type]
    assert isinstance(caught.value, ValueError)
    for word in words:
        assert word in str(caught.value)


@pytest.mark.parametrize(("content", "words"), [("- 1\n- 2\n", "expected one mapping, got list"), ("a: [", "not YAML")])
def test_files_that_are_no_spec(tmp_path: Path, content: str, words: str) -> None:
    path = tmp_path / "bad.yml"
    path.write_text(content)
    with pytest.raises(QuantSpecError, match=words):
        load_spec(str(path))


def test_catalogue() -> None:
    rows = {row["name"]: row for row in quants_table()}
    assert list(rows) == list_specs()
    assert len({tuple(row) for row in rows.values()}) == 1  # one set of columns
    # by hand: 4 + (16 + 8)/64; 3 + (16 + 16)/128
    assert rows["rtn-int4-g64"]["bits/weight"] == "4.375"
    assert rows["hqq-int3-g128"]["bits/weight"] == "3.250"
    assert "quant=rtn-int4-g64" in describe_spec("rtn-int4-g64")
    with pytest.raises(QuantSpecError, match="did you mean"):
        describe_spec("rtn-int4-64")


def test_a_users_file_is_described_by_its_path_and_its_rules(tmp_path: Path) -> None:
    path = tmp_path / "mine.yaml"
    path.write_text(
        "method: rtn\nbits: 4\ngroup_size: 128\nplan:\n"
        "  - {layers: [attention], components: [language]}\n  - {layers: [mlp], bits: 3, symmetric: true}\n"
    )
    text = describe_spec(str(path))
    assert f"quant={path}\n" in text
    assert "# 3.125 or 4.188 bits per quantized weight" in text  # by hand: 3 + 16/128, 4 + (16 + 8)/128


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("bnb-nf4", {"group": "64", "symmetric": "yes", "activations": "-"}),
        ("bnb-int8", {"group": "channel", "symmetric": "yes", "activations": "8"}),
        ("torchao-int8", {"group": "channel", "symmetric": "yes", "activations": "-"}),
        ("torchao-int8-dynamic", {"group": "channel", "symmetric": "yes", "activations": "8"}),
        ("torchao-fp8", {"group": "channel", "symmetric": "yes", "activations": "-"}),
    ],
)
def test_the_catalogue_says_what_the_librarys_layer_is(name: str, shown: dict[str, str]) -> None:
    spec = load_spec(name)
    pytest.importorskip(spec.method)
    import torch

    from bitquake.model_wrappers.quantizers.libraries.facts import library_facts
    from bitquake.model_wrappers.quantizers.replace import library_linear

    row = next(row for row in quants_table() if row["name"] == name)
    assert {key: row[key] for key in shown} == shown
    facts = library_facts(library_linear(torch.nn.Linear(256, 128, bias=False, dtype=torch.bfloat16), spec))
    assert facts is not None
    assert facts.group_size == (256 if row["group"] == "channel" else int(row["group"]))
    assert (facts.symmetric, str(facts.activation_bits or "-")) == (row["symmetric"] == "yes", row["activations"])
    if not row["bits/weight"].endswith("+"):
        assert float(row["bits/weight"]) == pytest.approx(8 * facts.held_bytes / facts.n_weights, abs=1e-3)


def test_catalogue_needs_no_torch() -> None:
    code = (
        "import sys; from bitquake.model_wrappers.quantizers.catalog import quants_table; quants_table();"
        "from bitquake.model_wrappers import quant_cards;"
        "print([m for m in ('torch', 'transformers', 'lmms_eval', 'hqq') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
