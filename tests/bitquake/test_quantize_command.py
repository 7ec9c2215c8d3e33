"""``bitquake quantize`` on the shipped model: the checkpoint it writes, and what a killed or starved run leaves."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from loguru import logger
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoProcessor

from bitquake import cli
from bitquake.model_wrappers.loading import load_model, load_quantized, resolve_pretrained
from bitquake.model_wrappers.quantizers import load_spec, replace, transformers_quantizer
from bitquake.model_wrappers.quantizers.replace import quantize_model
from bitquake.quant_card import PARTIAL, QuantCard
from bitquake.quantize_command import Quantized, QuantizeError, quantize, summary

MODEL = "bitquake/block-idefics3"
GPTQ = "gptq-int3-g64:calibration.samples=2"
N_MODULES = 28

KILLED = """
import os, signal, sys
from bitquake import cli
from bitquake.model_wrappers.quantizers.partial import PartialQuantization

put, done = PartialQuantization.put, []

def put_and_die(self, *arguments):
    put(self, *arguments)
    done.append(1)
    if len(done) == 9:
        os.kill(os.getpid(), signal.SIGKILL)

PartialQuantization.put = put_and_die
cli.main(sys.argv[1:])
"""


@pytest.fixture(scope="module", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """Calibration sets go to a cache that lives as long as these tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Quantized]:
    """``made(quant)``: the reference model, quantized by an undisturbed run, float32."""
    known: dict[str, Quantized] = {}

    def make(quant: str) -> Quantized:
        if quant not in known:
            out = tmp_path_factory.mktemp("made") / "out"
            known[quant] = quantize(MODEL, quant, out, dtype="float32", device="cpu", progress=False)
        return known[quant]

    return make


def assert_same_checkpoint(a: Path, b: Path) -> None:
    names = sorted(path.relative_to(a) for path in a.rglob("*") if path.is_file())
    assert names == sorted(path.relative_to(b) for path in b.rglob("*") if path.is_file())
    for name in names:
        if name.suffix == ".safetensors":
            left, right = load_file(a / name), load_file(b / name)
            assert left.keys() == right.keys()
            assert all(left[key].dtype == right[key].dtype and torch.equal(left[key], right[key]) for key in left)
        else:
            assert (a / name).read_bytes() == (b / name).read_bytes(), name


def test_the_checkpoint_is_what_quantizing_in_memory_gives(made: Callable[[str], Quantized], tmp_path: Path) -> None:
    done = made("rtn-int4-g64")
    arguments: dict[str, Any] = {
        "revision": None, "dtype": torch.float32, "device": torch.device("cpu"), "device_map": None,
        "attn_implementation": None, "trust_remote_code": False,
    }  # fmt: skip
    loaded = load_quantized(str(done.folder), load_spec(None), **arguments)
    model = load_model(resolve_pretrained(MODEL), **arguments)
    assert loaded.before == quantize_model(model, load_spec("rtn-int4-g64"))
    assert (loaded.spec, loaded.base) == (load_spec("rtn-int4-g64"), MODEL)
    expected = model.state_dict()
    found = loaded.model.state_dict()
    assert found.keys() == expected.keys() and all(torch.equal(found[key], expected[key]) for key in expected)

    card = QuantCard.model_validate_json((done.folder / "quant_card.json").read_bytes())
    assert card == done.card and len(card.modules) == N_MODULES and card.execution == "packed"
    held = {tensor.data_ptr(): tensor.nbytes for tensor in found.values()}  # the head is tied to the embedding
    assert done.packed_bytes == sum(held.values())
    full = load_model(resolve_pretrained(MODEL), **arguments)
    assert done.full_bytes == sum(parameter.nbytes for parameter in full.parameters())
    assert not (done.folder / PARTIAL).exists()
    readme = (done.folder / "README.md").read_text()
    assert readme.startswith(
        "---\nlibrary_name: transformers\ntags: [bitquake, quantized]\n---\n\n# block-idefics3, rtn-"
    )
    ours, theirs = (AutoProcessor.from_pretrained(path) for path in (done.folder, resolve_pretrained(MODEL)))
    assert ours.chat_template == theirs.chat_template and ours.tokenizer.get_vocab() == theirs.tokenizer.get_vocab()


def test_a_killed_calibrated_run_goes_on_and_ends_with_the_same_bytes(
    made: Callable[[str], Quantized], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    whole = made(GPTQ)
    out = tmp_path / "out"
    arguments = ["quantize", MODEL, "--quant", GPTQ, "--out", str(out), "--dtype", "float32", "--device", "cpu"]
    killed = subprocess.run([sys.executable, "-c", KILLED, *arguments], capture_output=True, text=True, check=False)
    assert killed.returncode == -signal.SIGKILL, killed.stderr
    kept = {path: path.stat().st_mtime_ns for path in (out / PARTIAL).glob("model.*.safetensors")}
    assert len(kept) == 9 and not (out / "config.json").exists()
    broken = next(iter(kept))  # as a full disk might leave it
    broken.write_bytes(broken.read_bytes()[:-5])

    assert cli.main(arguments) == 0
    said = capsys.readouterr().out
    assert f"{N_MODULES} modules quantized (8 of them by an earlier run)" in said and "peak memory" in said
    assert_same_checkpoint(out, whole.folder)
    calibration = json.loads((out / "config.json").read_text())["quantization_config"]["calibration"]
    assert calibration["n_samples"] == 2
    ids = json.loads((out / "calibration" / f"{calibration['ids_hash']}.json").read_text())["image_ids"]
    assert ids and whole.card.calibration.ids_hash == calibration["ids_hash"]


def test_out_of_memory_keeps_what_is_done(
    made: Callable[[str], Quantized],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out, calls, real = tmp_path / "out", [0], replace.quantize_weight

    def starved(*arguments: Any) -> Any:
        calls[0] += 1
        if calls[0] > 5:
            raise RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried")
        return real(*arguments)

    arguments = ["quantize", MODEL, "--quant", "rtn-int4-g64", "--out", str(out), "--dtype", "float32"]
    with monkeypatch.context() as patch:
        patch.setattr(transformers_quantizer, "quantize_weight", starved)
        assert cli.main(arguments) == 2
    said = capsys.readouterr().err.splitlines()[-1]
    assert "out of memory after 5 of 28 modules" in said and "the same command goes on from there" in said
    calls[0] = -1000

    def counted(*arguments: Any) -> Any:
        calls[0] += 1
        return real(*arguments)

    monkeypatch.setattr(transformers_quantizer, "quantize_weight", counted)
    assert cli.main(arguments) == 0
    assert calls[0] == -1000 + N_MODULES - 5
    assert_same_checkpoint(out, made("rtn-int4-g64").folder)


def test_finished_modules_of_another_quantization_are_not_taken(
    made: Callable[[str], Quantized], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "out"
    with monkeypatch.context() as patch:
        patch.setattr("bitquake.quantize_command._save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(MODEL, "rtn-int4-g64", out, dtype="float32", progress=False)
    assert len(list((out / PARTIAL).glob("model.*.safetensors"))) == N_MODULES
    for other, said in (
        ({"quant": "rtn-int3-g64"}, "quant"),
        ({"dtype": "bfloat16"}, 'dtype "float32", not "bfloat16"'),
    ):
        with pytest.raises(ValueError, match=f"holds finished modules of another quantization .*{said}"):
            quantize(MODEL, **{"quant": "rtn-int4-g64", "out": out, "dtype": "float32", "progress": False, **other})  # type: ignore[arg-type]
    done = quantize(MODEL, "rtn-int3-g64", out, dtype="float32", overwrite=True, progress=False)
    assert done.n_resumed == 0 and done.card.modules[0].bits == 3


def test_a_model_that_changed_in_between_is_noticed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    model = load_model(
        resolve_pretrained(MODEL), revision=None, dtype=torch.float32, device=torch.device("cpu"), device_map=None,
        attn_implementation=None, trust_remote_code=False,
    )  # fmt: skip
    model.save_pretrained(source)
    AutoProcessor.from_pretrained(resolve_pretrained(MODEL)).save_pretrained(source)
    with monkeypatch.context() as patch:
        patch.setattr("bitquake.quantize_command._save", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            quantize(str(source), "rtn-int4-g64", out, dtype="float32", progress=False)
    with torch.no_grad():
        model.model.text_model.layers[2].mlp.up_proj.weight[0, 0] += 1
    model.save_pretrained(source)
    with pytest.raises(ValueError, match=r"layers\.2\.mlp\.up_proj was finished from another weight"):
        quantize(str(source), "rtn-int4-g64", out, dtype="float32", progress=False)


def test_a_folder_in_use_is_left_alone(made: Callable[[str], Quantized], tmp_path: Path) -> None:
    folder = made("rtn-int4-g64").folder
    stamps = {path: path.stat().st_mtime_ns for path in folder.rglob("*")}
    for other in ({"quant": "rtn-int3-g64"}, {"dtype": "bfloat16"}, {"quant": "rtn-int4-g64:execution=packed"}):
        with pytest.raises(QuantizeError, match=r"is not empty \(README.md …\).*--overwrite"):
            quantize(MODEL, **{"quant": "rtn-int4-g64", "out": folder, "dtype": "float32", "progress": False, **other})  # type: ignore[arg-type]
    assert {path: path.stat().st_mtime_ns for path in folder.rglob("*")} == stamps
    (tmp_path / "notes.txt").write_text("mine")
    with pytest.raises(QuantizeError, match=r"holds notes.txt and no checkpoint; it is not overwritten"):
        quantize(MODEL, "rtn-int4-g64", tmp_path, overwrite=True, progress=False)
    with pytest.raises(QuantizeError, match="is a file"):
        quantize(MODEL, "rtn-int4-g64", tmp_path / "notes.txt", progress=False)


def test_overwriting_leaves_no_shard_of_the_old_checkpoint(tmp_path: Path) -> None:
    out = tmp_path / "out"
    quantize(MODEL, "rtn-int8-g64", out, dtype="float32", max_shard_size="500KB", progress=False)
    assert len(list(out.glob("model-*.safetensors"))) > 3
    done = quantize(MODEL, "rtn-int2-g64:execution=packed", out, overwrite=True, progress=False)
    assert [path.name for path in out.glob("*.safetensors*")] == ["model.safetensors"]
    assert oct((out / "model.safetensors").stat().st_mode & 0o777) == "0o644"
    assert "rtn-int2-g64" in summary(done) and done.card.dtype == "bfloat16"
    assert json.loads((out / "config.json").read_text())["quantization_config"]["quant"]["execution"] == "packed"


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--quant", "none"), "quantizes nothing"),
        (("--quant", "bnb-nf4"), "bitsandbytes's own format, which is not saved"),
        (("--quant", "rtn-int5-g65"), "unknown quantization spec"),
        (("--quant", "rtn-int4-g64", "--dtype", "int8"), "dtype must be"),
        (("--quant", "rtn-int4-g64", "--device", "cuda:99"), "--device cuda:99: cannot be used here ("),
        (("--quant", "rtn-int4-g64", "--device", "abacus"), "--device abacus: cannot be used here ("),
        (("--quant", "rtn-int4-g64", "--device", "meta"), "--device meta: cannot be used here ("),
        (("--quant", "rtn-int4-g64", "--max-shard-size", "foo"), "--max-shard-size foo: expected a number and KB"),
        (("--quant", "rtn-int4-g64", "--max-shard-size", "0GB"), "--max-shard-size 0GB: expected a number and KB"),
    ],
)
def test_bad_input_is_one_line(
    arguments: tuple[str, ...], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["quantize", MODEL, "--out", str(tmp_path / "out"), *arguments]) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("bitquake quantize: ")]
    assert len(lines) == 1 and said in lines[0]
    assert not (tmp_path / "out").exists()


def test_the_same_command_again_says_that_it_is_done(
    made: Callable[[str], Quantized], capsys: pytest.CaptureFixture[str]
) -> None:
    whole = made("rtn-int4-g64")
    stamps = {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")}
    arguments = ["--quant", "rtn-int4-g64", "--out", str(whole.folder), "--dtype", "float32", "--device", "cpu"]
    assert cli.main(["quantize", MODEL, *arguments]) == 0
    said = capsys.readouterr().out.splitlines()
    first = summary(whole).splitlines()
    assert said[:2] == first[:2] and said[3:] == first[3:]
    assert said[2] == f"done      by an earlier run, in {whole.folder}; --overwrite quantizes anew"
    assert {path: path.stat().st_mtime_ns for path in whole.folder.rglob("*")} == stamps


def test_a_model_that_was_trained_on_is_not_called_done(tmp_path: Path) -> None:
    source, out = tmp_path / "model", tmp_path / "out"
    shutil.copytree(resolve_pretrained(MODEL), source)
    assert not quantize(str(source), "rtn-int4-g64", out, progress=False).was_done
    again = (source / "model.safetensors", (out / "config.json").stat().st_mtime)
    os.utime(again[0], (again[1] - 9, again[1] - 9))
    assert quantize(str(source), "rtn-int4-g64", out, progress=False).was_done
    os.utime(again[0], (again[1] + 9, again[1] + 9))
    with pytest.raises(QuantizeError, match="is not empty"):
        quantize(str(source), "rtn-int4-g64", out, progress=False)


def test_a_run_that_finished_nothing_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither new folders nor an identity that stands in the way of another quantization."""
    out = tmp_path / "some" / "out"
    with pytest.raises(OSError, match="no_such_model"):
        quantize(str(tmp_path / "no_such_model"), "rtn-int4-g64", out, progress=False)
    with monkeypatch.context() as patch:
        patch.setattr(replace, "quantize_weight", lambda *_: 1 / 0)
        patch.setattr("bitquake.model_wrappers.quantizers.calibrated.batched", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            quantize(MODEL, GPTQ, out, dtype="float32", progress=False)
    assert list(tmp_path.iterdir()) == []
    (out / PARTIAL).mkdir(parents=True)  # killed before its first module
    (out / PARTIAL / "identity.json").write_text("{}")
    assert quantize(MODEL, "rtn-int2-g64", out, progress=False).card.modules[0].bits == 2


def test_a_small_calibration_source_is_told_in_one_line(tmp_path: Path) -> None:
    pictures = tmp_path / "pictures"
    pictures.mkdir()
    for name in ("red", "blue"):
        Image.new("RGB", (64, 64), name).save(pictures / f"{name}.png")
    rows = [{"file_name": f"{name}.png", "text": f"a {name} square"} for name in ("red", "blue")]
    (pictures / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    quant = f"smoothquant-w8a8:calibration.data={pictures}:calibration.samples=5"
    lines: list[str] = []
    handler = logger.add(lambda message: lines.append(str(message)), level="WARNING")
    try:
        done = quantize(MODEL, quant, tmp_path / "out", dtype="float32", progress=False)
    finally:
        logger.remove(handler)
    said = [line for line in lines if "5 samples were asked for" in line]
    assert done.card.calibration.n_samples == 2 and len(said) == 1 and "has 2; going on" in said[0]


def test_a_plan_that_matches_nothing_leaves_the_folder_free(tmp_path: Path) -> None:
    plan = tmp_path / "plan.yaml"
    plan.write_text("{method: rtn, bits: 4, group_size: 64, plan: [{modules: no_such_module}]}")
    with pytest.raises(ValueError, match="matches no Linear module"):
        quantize(MODEL, str(plan), tmp_path / "out", progress=False)
    assert quantize(MODEL, "rtn-int2-g64", tmp_path / "out", progress=False).card.modules[0].bits == 2


def test_a_quantized_model_is_not_quantized_again(made: Callable[[str], Quantized], tmp_path: Path) -> None:
    folder = str(made("rtn-int4-g64").folder)
    for quant in ("rtn-int4-g64", "rtn-int3-g64"):
        with pytest.raises(ValueError, match="quantized already"):
            quantize(folder, quant, tmp_path / "out", dtype="float32", progress=False)
