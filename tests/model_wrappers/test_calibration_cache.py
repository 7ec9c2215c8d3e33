"""Calibration sets on disk: the same bytes in any process, resumed, mended, streamed."""

from __future__ import annotations

import gc
import subprocess
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bitquake.model_wrappers.calibration import (
    CalibrationError,
    CalibrationInputs,
    CalibrationSample,
    build_calibration,
)
from bitquake.model_wrappers.calibration.build import _fill
from bitquake.model_wrappers.calibration.cache import read_entry, write_entry
from bitquake.model_wrappers.calibration.sample import SampleError
from bitquake.model_wrappers.loading import load_model, load_processor
from bitquake.model_wrappers.quantizers.spec import CalibrationSpec

SPECS = ("caption", "in-domain", "corrupted-in-domain", "text", "noise", "self")
BLOCK = "bitquake/block-anything"  # for the block world's defaults; the model comes from a folder


def loaded(path: Path, dtype: torch.dtype = torch.float32) -> tuple[Any, Any]:
    processor = load_processor(str(path), revision=None, trust_remote_code=False)
    model = load_model(
        str(path), revision=None, dtype=dtype, device=torch.device("cpu"), device_map=None, attn_implementation=None,
        trust_remote_code=False,
    )  # fmt: skip
    return model, processor


@pytest.fixture(scope="module")
def tiny(tiny_checkpoint: Path) -> tuple[Any, Any]:
    return loaded(tiny_checkpoint)


def build(tiny: tuple[Any, Any], cache: Path, **spec: Any) -> Any:
    return build_calibration(CalibrationSpec(**{"samples": 6, **spec}), *tiny, pretrained=BLOCK, cache=cache)


def contents(cache: Path) -> dict[str, bytes]:
    return {str(file.relative_to(cache)): file.read_bytes() for file in cache.rglob("*") if file.is_file()}


def test_the_same_bytes_in_another_process(tiny: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    """Every source; the other process has another hash seed, and makes them in another order."""
    hashes = [build(tiny, tmp_path / "here", source=source).ids_hash for source in SPECS]
    script = (
        "import sys, torch, pathlib\n"
        "from bitquake.model_wrappers.loading import load_model, load_processor\n"
        "from bitquake.model_wrappers.calibration import build_calibration\n"
        "from bitquake.model_wrappers.quantizers.spec import CalibrationSpec\n"
        "path, cache, *sources = sys.argv[1:]\n"
        "processor = load_processor(path, revision=None, trust_remote_code=False)\n"
        "model = load_model(path, revision=None, dtype=torch.float32, device=torch.device('cpu'), device_map=None,\n"
        "                   attn_implementation=None, trust_remote_code=False)\n"
        "for source in sources:\n"
        "    spec = CalibrationSpec(source=source, samples=6)\n"
        f"    made = build_calibration(spec, model, processor, pretrained={BLOCK!r}, cache=pathlib.Path(cache))\n"
        "    print(made.ids_hash)\n"
    )
    arguments = [str(tiny_checkpoint), str(tmp_path / "there"), *reversed(SPECS)]
    run = subprocess.run(
        [sys.executable, "-c", script, *arguments], capture_output=True, text=True, check=True, timeout=300
    )
    assert run.stdout.split() == hashes[::-1]
    here, there = contents(tmp_path / "here"), contents(tmp_path / "there")
    assert here == there and len(here) == 6 * len(SPECS)


def test_what_decides_the_content_decides_the_folder(tiny: Any, tmp_path: Path) -> None:
    _, processor = tiny
    before = processor.tokenizer.backend_tokenizer.to_str()
    made = build(tiny, tmp_path, source="in-domain")
    assert processor.tokenizer.backend_tokenizer.to_str() == before  # a call would leave its padding there
    first = set(contents(tmp_path))
    assert {name.split("/")[0] for name in first} == {made.content_hash}
    build(tiny, tmp_path, source="in-domain", noise="fog", severity=5)  # means nothing to this source
    build(tiny, tmp_path, source="in-domain", data="block_vqav2")  # what None stands for
    assert set(contents(tmp_path)) == first
    for n, change in enumerate(
        ({"seed": 1}, {"samples": 5}, {"data": "block_advqa"}, {"source": "corrupted-in-domain"}), start=2
    ):
        build(tiny, tmp_path, **{"source": "in-domain", **change})
        assert len(list(tmp_path.iterdir())) == n
    processor.image_processor.image_mean = [0.4, 0.5, 0.5]
    try:
        build(tiny, tmp_path, source="in-domain")
    finally:
        processor.image_processor.image_mean = [0.5, 0.5, 0.5]
    assert len(list(tmp_path.iterdir())) == 6


def test_a_killed_build_goes_on_and_damage_is_mended(
    tiny: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, log: list[str]
) -> None:
    from bitquake.model_wrappers.calibration import encoding

    whole, calls = contents_of(build(tiny, tmp_path / "whole", source="caption")), 0
    real = encoding.Encoder.encode

    def dies(self: Any, sample: CalibrationSample) -> CalibrationInputs:
        nonlocal calls
        calls += 1
        if calls == 4:
            raise KeyboardInterrupt
        return real(self, sample)

    monkeypatch.setattr(encoding.Encoder, "encode", dies)
    with pytest.raises(KeyboardInterrupt):
        build(tiny, tmp_path / "cut", source="caption")
    assert len(contents(tmp_path / "cut")) == 3
    calls = 4
    resumed = build(tiny, tmp_path / "cut", source="caption")
    assert calls == 4 + 3 and contents(tmp_path / "cut") == contents(tmp_path / "whole")
    files = sorted(file for file in (tmp_path / "cut").rglob("*.safetensors"))
    flipped = bytearray(files[1].read_bytes())
    flipped[-5] ^= 1  # in a tensor: the file still reads
    files[1].write_bytes(bytes(flipped))
    files[2].write_bytes(files[2].read_bytes()[:100])
    with pytest.raises(CalibrationError, match=r"000001\.safetensors was damaged or removed"):
        list(resumed)
    calls = 4
    assert contents_of(build(tiny, tmp_path / "cut", source="caption")) == whole
    assert calls == 4 + 2 and sum("is damaged; it is built again" in line for line in log) == 2


def contents_of(made: Any) -> list[Any]:
    return [
        ({name: value.tolist() for name, value in one.inputs.items()}, one.vision.tolist(), one.answer.tolist())
        for one in made
    ]


def test_a_set_is_read_again_and_again_in_the_model_s_dtype(tiny: Any, tiny_checkpoint: Path, tmp_path: Path) -> None:
    single = build(tiny, tmp_path, source="in-domain")
    half = build(loaded(tiny_checkpoint, torch.bfloat16), tmp_path, source="in-domain")
    assert len(list(tmp_path.iterdir())) == 1  # one folder for both
    assert contents_of(single) == contents_of(single) and len(single) == len(list(single)) == 6
    for a, b in zip(single, half, strict=True):
        assert (a.inputs["pixel_values"].dtype, b.inputs["pixel_values"].dtype) == (torch.float32, torch.bfloat16)
        assert torch.equal(a.inputs["pixel_values"].bfloat16(), b.inputs["pixel_values"])
        assert b.inputs["input_ids"].dtype == torch.int64
    assert single.ids_hash == half.ids_hash and single.source == "in-domain" and single.spec.samples == 6


class Pictures:
    """Numbered samples, some of which cannot be used."""

    title = "pictures"
    identity: dict[str, Any] = {}

    def __init__(self, n: int, bad: tuple[int, ...] = ()) -> None:
        self.n, self.bad = n, bad

    def __len__(self) -> int:
        return self.n

    def sample(self, index: int) -> CalibrationSample:
        if index in self.bad:
            raise SampleError(f"number {index} is damaged")
        pixels = np.full((8, 8, 3), index % 256, dtype=np.uint8)
        return CalibrationSample((Image.fromarray(pixels),), "what", "that", (f"pixels:{index}",))


def test_memory_does_not_grow_with_samples(tmp_path: Path) -> None:
    """Of encoded samples at most two are alive at a time, however many there are: the new one and the one before."""
    alive: set[int] = set()
    peaks = []
    for n in (4, 60):
        peak = 0

        def encode(sample: CalibrationSample) -> CalibrationInputs:
            nonlocal peak
            made = CalibrationInputs({"x": torch.ones(1, 1000)}, torch.ones(3, dtype=torch.bool), torch.ones(3))
            name = id(made.inputs["x"])
            alive.add(name)
            weakref.finalize(made.inputs["x"], alive.discard, name)
            peak = max(peak, len(alive))
            return made

        files, _ = _fill(tmp_path / str(n), Pictures(n), n, encode)
        assert len(files) == n
        gc.collect()
        peaks.append(peak)
        assert not alive
    assert peaks[0] == peaks[1] <= 2


def test_unusable_samples_are_left_out_and_named(tmp_path: Path, log: list[str]) -> None:
    def encode(sample: CalibrationSample) -> CalibrationInputs:
        mask = torch.zeros(1, dtype=torch.bool)
        return CalibrationInputs({"x": torch.tensor(float(sample.image_ids[0][7:]))}, mask, mask.clone())

    files, ids = _fill(tmp_path / "a", Pictures(10, (0, 3)), 4, encode)
    assert [file.stem for file in files] == ["000001", "000002", "000004", "000005"]
    assert ids == {"pixels:1", "pixels:2", "pixels:4", "pixels:5"}
    assert any("2 cannot be used: number 0 is damaged; number 3 is damaged" in line for line in log)
    assert not any("were asked for" in line for line in log)
    files, _ = _fill(tmp_path / "b", Pictures(3, (0,)), 4, encode)
    assert len(files) == 2 and any("4 samples were asked for, and pictures has 2" in line for line in log)
    for source in (Pictures(0), Pictures(2, (0, 1))):
        with pytest.raises(CalibrationError, match="pictures holds no sample that can be used"):
            _fill(tmp_path / "c", source, 4, encode)


def test_a_cache_that_cannot_be_written_is_named(tiny: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(CalibrationError, match="cannot be written"):
        build(tiny, tmp_path / "file", source="noise")


def test_an_entry_comes_back_as_it_was(tmp_path: Path) -> None:
    inputs = {"input_ids": torch.arange(5)[None], "pixel_values": torch.randn(1, 3, 2, 2), "grid": torch.ones(1, 3)}
    masks = torch.arange(5) < 2, torch.arange(5) > 3
    write_entry(tmp_path / "x.safetensors", CalibrationInputs(inputs, *masks), ("pixels:b", "a:ü"))
    entry = read_entry(tmp_path / "x.safetensors")
    assert entry is not None and entry.image_ids == ("a:ü", "pixels:b")
    assert all(torch.equal(entry.inputs.inputs[name], value) for name, value in inputs.items())
    assert torch.equal(entry.inputs.vision, masks[0]) and torch.equal(entry.inputs.answer, masks[1])
    assert read_entry(tmp_path / "nothing.safetensors") is None
