"""Specs: what is accepted, what is refused with which words, and the catalogue without torch."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from bitquake.model_wrappers.quantizers import QuantSpec, QuantSpecError, list_specs, load_spec
from bitquake.model_wrappers.quantizers.catalog import describe_spec, quants_table


def test_named_specs_are_the_whole_matrix() -> None:
    expected = {f"{method}-int{b}-g{g}" for method in ("rtn", "hqq") for b in (8, 4, 3, 2) for g in (64, 128)}
    assert set(list_specs()) == expected | {"full-precision"}
    for name in expected:
        spec = load_spec(name)
        method, bits, group = name.split("-")
        assert (spec.name, spec.method, f"int{spec.bits}", f"g{spec.group_size}") == (name, method, bits, group)
        assert spec.components == ("language",)
        assert (spec.execution, spec.backend, spec.symmetric) == ("simulated", "own", False)
        assert (spec.hqq is not None) == (method == "hqq")


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
        ("rtn-int4-g64:bits=5", ["bits must be one of 2, 3, 4, 8, got 5"]),
        ("rtn-int4-g64:bits", ["expected key=value after ':', got 'bits'"]),
        ("rtn-int4-g64:group_size=0", ["group_size", "greater than 0"]),
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
        ({"method": "awq", "bits": 4, "group_size": 64}, ["method", "'none', 'rtn' or 'hqq'"]),
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


def test_catalogue_needs_no_torch() -> None:
    code = (
        "import sys; from bitquake.model_wrappers.quantizers.catalog import quants_table; quants_table();"
        "from bitquake.model_wrappers import quant_cards;"
        "print([m for m in ('torch', 'transformers', 'lmms_eval', 'hqq') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
