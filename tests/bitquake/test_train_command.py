"""``bitquake train`` as a user calls it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from bitquake.cli import main
from bitquake.model_wrappers.training.config import LoraConfig
from bitquake.model_wrappers.training.run import read_config

MODEL = "bitquake/block-idefics3"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Twelve pictures with a question and an answer each, in the reference model's words."""
    folder = tmp_path / "data"
    folder.mkdir()
    entries: list[dict[str, Any]] = []
    rng = np.random.default_rng(0)
    for i in range(12):
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(folder / f"{i}.png")
        turns = [{"from": "human", "value": "<image>\nwhat color is the circle?"}, {"from": "gpt", "value": "red"}]
        entries.append({"id": i, "image": f"{i}.png", "conversations": turns})
    (folder / "mix.json").write_text(json.dumps(entries))
    return folder


def test_qat_from_a_file_with_options_over_it_stops_and_goes_on(
    data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file, out = tmp_path / "grace.yaml", tmp_path / "out"
    file.write_text(
        f"method: qat\npretrained: {MODEL}\nbits: 8\ngroup_size: 64\ndata: [{data}]\nepochs: 3\nbatch_size: 4\n"
        "precision: fp32\nvalidation_samples: 1\nloader_threads: 0\n"
    )
    command = ["train", "qat", "--config", str(file), "--out", str(out), "--bits", "2", "--steps", "2"]
    command += ["--set", "omega=2", "gate=false"]
    assert main([*command, "--minutes", "0"]) == 1
    assert "stopped at step 1 of 2" in capsys.readouterr().err
    config = read_config(out)
    assert (config.bits, config.steps, config.epochs, config.omega, config.gate) == (2, 2, None, 2.0, False)  # type: ignore[union-attr]
    assert main(command) == 0
    written = capsys.readouterr().out
    assert written.splitlines()[0] == str(out / "model")
    assert f"--model_args pretrained={out / 'model'} --tasks" in written
    assert main([*command, "--seed", "1"]) == 1
    assert "holds another training (seed 0, not 1); give another folder" in capsys.readouterr().err


def test_lora_from_options_alone(data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "out"
    command = ["train", "lora", "--pretrained", MODEL, "--quant", "rtn-int3-g64", "--rank", "4", "--data", f"{data}=2"]
    command += ["--steps", "1", "--batch-size", "2", "--precision", "fp32", "--out", str(out)]
    assert main([*command, "--set", "validation_samples=1"]) == 0
    config = read_config(out)
    assert isinstance(config, LoraConfig) and config.rank == 4 and config.data[0].share == 2.0
    expected = f"pretrained={MODEL},quant=rtn-int3-g64,adapter={out / 'adapter'}"
    assert f"--model_args {expected} --tasks" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["qat"], "train qat: pretrained: is missing"),
        (["qat", "--pretrained", "a", "--bits", "3", "--data", "b", "--steps", "1", "--set", "rat=1"],
         "train qat: rat: unknown key (did you mean 'rate'?)"),
        (["qat", "--set", "rate"], "--set: expected KEY=VALUE, got 'rate'"),
        (["qat", "--rate", "1", "--set", "rate=2"], "--set: rate is given twice"),
        (["lora", "--pretrained", "a", "--data", "b", "--steps", "1", "--quant", "rtn-int4"],
         "unknown quantization spec 'rtn-int4'"),
        (["lora", "--config", "{file}"], "method is 'qat'; run `bitquake train qat`"),
        (["qat", "--config", "{file}"], "{file}:2: bitz: unknown key (did you mean 'bits'?)"),
        (["qat", "--config", "none.yaml"], "none.yaml: cannot be read"),
        (["qat", "--pretrained", MODEL, "--bits", "3", "--data", "block_vizwiz", "--steps", "1"],
         "the family 'block_vizwiz' has no train split"),
    ],
)  # fmt: skip
def test_what_cannot_be_trained_is_said_and_nothing_is_left(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    file, out = tmp_path / "f.yaml", tmp_path / "out"
    file.write_text("method: qat\nbitz: 3\n")
    assert main(["train", *(one.format(file=file) for one in arguments), "--out", str(out)]) == 2
    assert message.format(file=file) in capsys.readouterr().err
    assert not (out / "state").exists()
