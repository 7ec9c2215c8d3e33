"""``bitquake card``: what it shows of a checkpoint, and that a card which does not fit its tensors is found out."""

from __future__ import annotations

import json
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitquake import cli
from bitquake.model_wrappers.loading import load_quantized
from bitquake.model_wrappers.quant_cards import build_card
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.quant_card import QuantCard
from bitquake.quantize_command import quantize

QUANT = "rtn-int4-g64:components=connector+language"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("card") / "checkpoint"
    quantize("bitquake/block-idefics3", QUANT, folder, device="cpu", progress=False)
    return folder


@pytest.fixture
def copy(checkpoint: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(checkpoint, tmp_path / "checkpoint"))


def _run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str, str]:
    code = cli.main(["card", *arguments])
    said = capsys.readouterr()
    return code, said.out, said.err


def _problems(err: str) -> list[str]:
    return [line for line in err.splitlines() if line.startswith("bitquake card: ")]


def _row(table: str, name: str) -> str:
    [line] = [line for line in table.splitlines() if line.startswith(f"{name} ")]
    return line


def test_a_checkpoint_is_checked_and_shown(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = _run(capsys, str(checkpoint))
    assert (code, err) == (0, "")
    tensors = load_file(checkpoint / "model.safetensors")
    n = sum(name.endswith(".codes") for name in tensors)
    assert f"weights hash and {n} modules fit the tensors" in _row(out, "check")
    assert "4" in _row(out, "bits") and "64, asymmetric" in _row(out, "group size")
    assert f"{n} quantized, {n} changed, 0 unchanged" in _row(out, "modules")
    assert "connector, language" in _row(out, "components") and "none" in _row(out, "calibration")
    assert "lm_head" in _row(out, "kept") and "transformers" in _row(out, "libraries")

    # counted from the file: two 4-bit codes in a byte
    language = {name: tensor for name, tensor in tensors.items() if name.startswith("model.text_model")}
    n_codes = 2 * sum(tensor.numel() for name, tensor in language.items() if name.endswith(".codes"))
    n_others = sum(t.numel() for n, t in language.items() if not n.endswith((".codes", ".scale", ".zero")))
    columns = _row(out, "language").split()
    assert columns[1:3] == [f"{n_codes + n_others:,}", f"{n_codes:,}"]
    assert columns[3:5] == [f"{sum(tensor.nbytes for tensor in language.values()):,}"] * 2


def test_modules_and_json(checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, out, _ = _run(capsys, str(checkpoint), "--unchecked", "--modules")
    assert code == 0 and "not checked" in _row(out, "check")
    row = _row(out, "model.text_model.layers.0.mlp.down_proj")
    assert "language/front/mlp" in row and "64, asymmetric" in row
    code, out, _ = _run(capsys, str(checkpoint / "quant_card.json"), "--json")
    card = QuantCard.model_validate_json(out)
    assert code == 0 and card.to_json() == (checkpoint / "quant_card.json").read_text().strip()
    assert row.split()[-1] == {m.name: m for m in card.modules}[row.split()[0]].hash_after[:8]


def test_a_checkpoint_without_a_card_gets_one_from_its_tensors(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    stored = QuantCard.model_validate_json((copy / "quant_card.json").read_bytes())
    (copy / "quant_card.json").unlink()
    code, out, _ = _run(capsys, str(copy), "--json")
    made = QuantCard.model_validate_json(out)
    assert code == 0
    assert (made.modules, made.kept, made.weights_hash) == (stored.modules, stored.kept, stored.weights_hash)


def _flip_a_code(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.text_model.layers.1.self_attn.q_proj.codes"][0, 0] ^= 1
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _move_a_norm(folder: Path) -> None:
    tensors = load_file(folder / "model.safetensors")
    tensors["model.text_model.layers.1.input_layernorm.weight"] += torch.tensor(1.0, dtype=torch.bfloat16)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _edit(change: Callable[[dict[str, Any]], None]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        file = folder / "quant_card.json"
        card = json.loads(file.read_text())
        change(card)
        file.write_text(json.dumps(card))

    return edit


@pytest.mark.parametrize(
    ("damage", "said"),
    [
        (_flip_a_code, "layers.1.self_attn.q_proj: the card says hash_after"),
        (_move_a_norm, "the weights that are not quantized are others"),
        (_edit(lambda card: card["modules"][3].update(bits=8)), "the card says bits 8, not 4"),
        (_edit(lambda card: card["modules"].pop()), "1 quantized modules are not in it"),
        (_edit(lambda card: card["modules"].append(card["modules"][0])), "1 are in it more than once"),
        (_edit(lambda card: card["modules"][0].update(name="lm_head")), "1 modules that it calls quantized are not"),
        (_edit(lambda card: card["modules"][0].update(hash_before="00")), "the card says hash_before 00, not"),
    ],
)
def test_a_card_that_does_not_fit_the_tensors_is_a_problem(
    copy: Path, damage: Callable[[Path], None], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    damage(copy)
    code, out, err = _run(capsys, str(copy))
    assert code == 1 and said in err and "does NOT fit the tensors" in _row(out, "check")


FORGED = [
    ("effective_bpw", 3.0),
    ("nominal_bpw", 3.0),
    ("method", "gptq"),
    ("spec_name", "gptq-int3-g64"),
    ("spec.bits", 3),
    ("spec.calibration", {"source": "text"}),
    ("pretrained", "somebody/else"),
    ("base", "somebody/else"),
    ("revision", "0123"),
    ("architecture", "Qwen2VLForConditionalGeneration"),
    ("dtype", "float16"),
    ("dtype", "float32"),
    ("dtype", "float3"),
    ("kernel", "torch int4 (CPU)"),
    ("execution", "simulated"),
    ("execution", "full-precision"),
    ("checkpoint_format", "awq gemm"),
    ("weights_hash", "00"),
    ("adapter", {"source": "somebody/else", "hash": "00"}),
    ("calibration.source", "self"),
    ("calibration.n_samples", 128),
    ("calibration.ids_hash", "00"),
    ("components.language.packed_bytes", 1),
    ("components.language.n_bytes", 1),
    ("components.vision.n_quantized", 694656),
    ("components.other", {"n_parameters": 0, "n_quantized": 0, "n_bytes": 0, "packed_bytes": 0}),
    ("kept.lm_head", "float32"),
    ("kept.model.connector", "bfloat16"),
    ("version", 1),
]


@pytest.mark.parametrize(("field", "value"), FORGED)
def test_a_forged_field_is_a_problem_of_its_name(
    copy: Path, field: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    def forge(card: dict[str, Any]) -> None:
        *outer, last = field.split(".", 2 if field.startswith("components") else 1)
        for key in outer:
            card = card[key]
        assert card.get(last, "nothing") != value
        card[last] = value

    _edit(forge)(copy)
    code, out, err = _run(capsys, str(copy))
    problems = _problems(err)
    assert code == 1 and "does NOT fit" in _row(out, "check")
    said = {line.split("quant_card.json: ")[1].split(": the card says ")[0] for line in problems}
    below = {f"{field}.{key}" for key in value} if isinstance(value, dict) else {field}
    assert said <= {field} | below and said, problems
    if not isinstance(value, dict):
        assert f"{field}: the card says {value}, found " in problems[0]


@pytest.mark.parametrize(
    ("field", "value"),
    [("component", "vision"), ("third", "end"), ("layer", "attention"), ("format", "bitsandbytes nf4"),
     ("shape", [512, 96]), ("per_tensor", True), ("input_scale", True), ("order", True), ("activation_bits", 8),
     ("n_weights", 1), ("n_bytes", 1), ("packed_bytes", 1), ("symmetric", True), ("group_size", 32)],
)  # fmt: skip
def test_a_forged_field_of_a_module_is_a_problem(
    copy: Path, field: str, value: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    _edit(lambda card: card["modules"][0].update({field: value}))(copy)
    code, _, err = _run(capsys, str(copy))
    assert code == 1 and f"model.connector.modality_projection.proj: the card says {field} " in err


def test_a_spec_with_its_defaults_written_out_is_the_same(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    full = load_spec(QUANT).model_dump(mode="json", exclude_none=True) | {"execution": "packed"}
    _edit(lambda card: card.update(spec=full))(copy)
    assert full != load_spec(QUANT).options() | {"execution": "packed"}
    code, _, err = _run(capsys, str(copy))
    assert (code, err) == (0, "")


def test_what_the_tensors_do_not_decide_may_differ_and_is_told(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def elsewhere(card: dict[str, Any]) -> None:
        card.update(device="2 x cuda NVIDIA H200", kernel="another", image_processor="X", libraries={"torch": "1"})

    _edit(elsewhere)(copy)
    code, out, err = _run(capsys, str(copy))
    assert (code, err) == (0, "")
    assert _row(out, "check").endswith("not in them: device, image processor, libraries, kernel")


def test_the_dtype_is_that_of_the_tensors(copy: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As BLIP-2's in float16, whose first parameter stays in float32, and so its config.json says."""
    config = json.loads((copy / "config.json").read_text())
    (copy / "config.json").write_text(json.dumps(config | {"dtype": "float32"}))
    code, out, err = _run(capsys, str(copy))
    assert (code, err) == (0, "") and "bfloat16" in _row(out, "architecture")


@pytest.mark.parametrize(
    ("quant", "dtype"), [("gptq-int3-g64:calibration.samples=2", "float16"), ("rtn-int4-g64", "float32")]
)
def test_cards_of_other_methods_and_dtypes_fit(
    tmp_path: Path, quant: str, dtype: str, capsys: pytest.CaptureFixture[str]
) -> None:
    quantize("bitquake/block-idefics3", quant, tmp_path, dtype=dtype, device="cpu", progress=False)
    capsys.readouterr()
    code, out, err = _run(capsys, str(tmp_path))
    assert (code, err) == (0, "") and "fit the tensors" in _row(out, "check") and dtype in _row(out, "architecture")
    if quant.startswith("gptq"):
        _edit(lambda card: card["calibration"].update(n_samples=3))(tmp_path)
        code, _, err = _run(capsys, str(tmp_path))
        assert code == 1 and "calibration.n_samples: the card says 3, found 2" in err


@pytest.mark.parametrize("execution", ["simulated", "packed"])
def test_how_it_is_stored_and_how_it_runs(tmp_path: Path, execution: str, capsys: pytest.CaptureFixture[str]) -> None:
    quantize("bitquake/block-idefics3", f"rtn-int4-g64:execution={execution}", tmp_path, device="cpu", progress=False)
    loaded = load_quantized(
        str(tmp_path), load_spec("none"), revision=None, dtype=torch.bfloat16, device=torch.device("cpu"),
        device_map=None, attn_implementation=None, trust_remote_code=False,
    )  # fmt: skip
    card = build_card(loaded.model, loaded.spec, pretrained=str(tmp_path), before=loaded.before or {})
    assert card.execution == execution
    capsys.readouterr()
    for path in (tmp_path, tmp_path / "quant_card.json"):
        code, out, err = _run(capsys, str(path))
        said = _row(out, "execution").removeprefix("execution").strip()
        assert code == 0 and not err
        assert said.startswith(f"packed: so it is stored; a run of it is {execution} ")
    (tmp_path / "run.json").write_text(card.to_json())  # a run's card says how the run computed
    _, out, _ = _run(capsys, str(tmp_path / "run.json"))
    assert _row(out, "execution").split() == ["execution", execution]


def _stopped(*_: Any, **__: Any) -> None:
    raise KeyboardInterrupt


def test_an_unfinished_quantization_names_the_command_that_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "half done"
    with monkeypatch.context() as patch:
        patch.setattr("bitquake.quantize_command._save", _stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize("bitquake/block-idefics3", QUANT, out, dtype="float32", device="cpu", progress=False)
    n = len(list((out / ".partial").glob("model.*.safetensors")))
    capsys.readouterr()
    code, _, err = _run(capsys, str(out))
    assert code == 2 and f"is unfinished ({n} modules are done)" in err
    program, *arguments = shlex.split(err.split("this goes on from there: ")[1])
    assert program == "bitquake" and cli.main(arguments) == 0
    assert f"({n} of them by an earlier run)" in capsys.readouterr().out
    code, _, err = _run(capsys, str(out))
    assert (code, err) == (0, "")

    # a checkpoint that another quantization is about to replace; of a spec from a file
    spec = tmp_path / "mine.yaml"
    spec.write_text("name: mine\nmethod: rtn\nbits: 3\ngroup_size: 64\n")
    with monkeypatch.context() as patch:
        patch.setattr("bitquake.quantize_command._save", _stopped)
        with pytest.raises(KeyboardInterrupt):
            quantize("bitquake/block-idefics3", str(spec), out, overwrite=True, device="cpu", progress=False)
    capsys.readouterr()
    code, shown, err = _run(capsys, str(out))
    assert code == 1 and "fit the tensors" in _row(shown, "check")
    assert "is unfinished" in err and "--quant FILE" in err and "what mine is" in err
    (out / ".partial" / "identity.json").write_text("{")
    code, _, err = _run(capsys, str(out), "--unchecked")
    assert code == 1 and "the command that began it goes on from there, without --overwrite" in err


def test_what_has_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    for path, said in (
        (tmp_path / "nothing", "is not there"),
        (tmp_path / "x.json", "is no quant card"),
        (tmp_path, "no complete result"),
    ):
        code, _, err = _run(capsys, str(path))
        assert code == 2 and said in err and "Traceback" not in err
