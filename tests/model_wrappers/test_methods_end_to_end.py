"""Each method as a user meets it: ``quant=`` in the wrapper, ``bitquake quantize`` to a folder, that folder again."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitquake.envelope import decode
from bitquake.model_wrappers.quantizers import load_spec
from bitquake.quantize_command import quantize

OURS = {"bitquake": {"envelope": True}}
DATA = "calibration.data=block_coco_caption:calibration.samples=6"
SAVED = [
    "rtn-int3-g64",
    "uniform-int5",
    "hqq-int2-g64",
    f"gptq-int3-g64:{DATA}",
    f"gptq-int4-g64:gptq.act_order=true:{DATA}",
    f"awq-int3-g64:{DATA}",
    f"mbq-int3-g64:{DATA}",
    f"mbq-w4a8:{DATA}",
    f"smoothquant-w8a8:{DATA}",
    "rtn-w4a8:components=vision+connector+language",
]
BY_LIBRARIES = ["bnb-nf4", "bnb-fp4", "bnb-int8", "torchao-int8", "torchao-int8-dynamic", "torchao-fp8"]


def answers(task: Any, model: Any) -> list[tuple[str, dict[str, float | None]]]:
    envelopes = [decode(text) for text in task.run(model)]
    assert all(envelope.error is None for envelope in envelopes)
    return [(envelope.text, envelope.confidence) for envelope in envelopes]


@pytest.fixture(scope="module")
def task(chat_task: Any, random_docs: Any) -> Any:
    return chat_task(random_docs(12), OURS)


@pytest.mark.parametrize("quant", SAVED)
def test_saved_and_loaded_again_it_gives_the_same_answers(
    quant: str, load: Callable[..., Any], task: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    here = load(quant=quant, batch_size=4)
    spec = load_spec(quant)
    assert (here.card.method, here.card.spec_name) == (spec.method, spec.name)
    assert here.card.modules and all(entry.changed and entry.bits == spec.bits for entry in here.card.modules)
    assert here.card.calibration.source == ("caption" if spec.calibration else "none")
    assert bool(here.card.calibration.ids_hash) == (spec.calibration is not None)
    expected = answers(task, here)
    assert expected != answers(task, load(batch_size=4))  # it is another model than full precision
    done = quantize(str(tiny_checkpoint), quant, tmp_path / "saved", dtype="float32", device="cpu", progress=False)
    assert done.card.weights_hash == here.card.weights_hash
    again = load(pretrained=str(tmp_path / "saved"), batch_size=4)
    assert again.card.weights_hash == here.card.weights_hash and again.card.subject == str(tiny_checkpoint)
    assert answers(task, again) == expected
    packed = load(pretrained=str(tmp_path / "saved"), batch_size=4, execution="packed")
    assert packed.card.execution == "packed" and answers(task, packed) == expected  # float32: no kernel of its own


@pytest.mark.parametrize("quant", BY_LIBRARIES)
def test_libraries_run_and_are_not_saved(
    quant: str, load: Callable[..., Any], task: Any, tiny_checkpoint: Path, tmp_path: Path
) -> None:
    spec = load_spec(quant)
    pytest.importorskip(spec.method)
    model = load(quant=quant, batch_size=4, dtype="bfloat16")
    assert {entry.bits for entry in model.card.modules} == {spec.bits}
    assert all(entry.changed and entry.format.startswith(spec.method) for entry in model.card.modules)
    assert spec.method in model.card.libraries and model.card.execution == "packed"
    assert len(answers(task, model)) == 12
    with pytest.raises(ValueError, match=spec.method):
        quantize(str(tiny_checkpoint), quant, tmp_path / "saved", dtype="bfloat16", device="cpu", progress=False)


def test_a_checkpoint_that_was_changed_is_not_run(
    load: Callable[..., Any], tiny_checkpoint: Path, tmp_path: Path
) -> None:
    from safetensors.torch import load_file, save_file

    folder = tmp_path / "saved"
    quantize(str(tiny_checkpoint), "rtn-int4-g64", folder, dtype="float32", device="cpu", progress=False)
    load(pretrained=str(folder), dtype="bfloat16")  # in another dtype the weights are others: no complaint
    file = folder / "model.safetensors"
    tensors = load_file(file)
    name = next(key for key in tensors if key.endswith(".codes"))
    tensors[name][0, 0] ^= 1
    save_file(tensors, file, metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"are not those that its quant_card.json was made from .* `bitquake card"):
        load(pretrained=str(folder))
    (folder / "quant_card.json").unlink()
    assert load(pretrained=str(folder), batch_size=2).card.modules
