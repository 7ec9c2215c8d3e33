"""``bitquake card``: what it shows of a checkpoint, and that a card which does not fit its tensors is found out."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from bitquake import cli
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


def test_what_has_no_card(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "x.json").write_text("{}")
    for path, said in (
        (tmp_path / "nothing", "is not there"),
        (tmp_path / "x.json", "is no quant card"),
        (tmp_path, "no complete result"),
    ):
        code, _, err = _run(capsys, str(path))
        assert code == 2 and said in err and "Traceback" not in err
