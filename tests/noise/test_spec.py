"""A noise in YAML: what is accepted, and what each mistake is told."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from bitquake.noise import NoiseError, NoiseSpec, SampleKey, apply, image_noises

FULL = {"name": "fog", "severity": 3, "seed": 4, "version": 1, "mode": "scaled"}


def test_round_trip_and_defaults() -> None:
    assert NoiseSpec.from_mapping(FULL).to_mapping() == FULL
    short = NoiseSpec.from_mapping({"name": "fog", "severity": 3})
    assert short == NoiseSpec("fog", 3, seed=0, version=1, mode="native")
    assert hash(short) == hash(NoiseSpec("fog", 3)) and short.noise() is image_noises()["fog"]
    with pytest.raises(FrozenInstanceError):
        short.severity = 4  # type: ignore[misc]


def test_spec_applies_what_it_says() -> None:
    image = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    key = SampleKey("d", "s", "1")
    ours = NoiseSpec.from_mapping(FULL).apply(image, key)
    assert np.array_equal(ours, apply(image, "fog", severity=3, seed=4, mode="scaled", key=key))
    assert not np.array_equal(ours, apply(image, "fog", severity=3, seed=5, mode="scaled", key=key))


MISTAKES = {
    "no mapping": (["fog"], r"^vqa\.yaml: noise: expected a mapping"),
    "null": (None, "expected a mapping"),
    "typo in the name": (
        {**FULL, "name": "gausian_noise"},
        r"^vqa\.yaml: noise\.name: .*Did you mean 'gaussian_noise'",
    ),
    "the list is shown": (
        {**FULL, "name": "rain"},
        "Known: gaussian_noise, shot_noise, defocus_blur, fog, contrast, jpeg",
    ),
    "name of another type": ({**FULL, "name": ["fog"]}, "unknown noise"),
    "null name": ({**FULL, "name": None}, "unknown noise None"),
    "severity 6": ({**FULL, "severity": 6}, r"noise\.severity: fog has severities 1 to 5.*got 6"),
    "severity 0": ({**FULL, "severity": 0}, "got 0"),
    "severity true": ({**FULL, "severity": True}, "got True"),
    "severity text": ({**FULL, "severity": "3"}, "got '3'"),
    "severity 3.0": ({**FULL, "severity": 3.0}, r"got 3\.0"),
    "severity missing": ({"name": "fog"}, "'severity' is missing"),
    "name missing": ({"severity": 1}, "'name' is missing"),
    "unknown key": ({**FULL, "severty": 3}, "unknown key 'severty'. Did you mean 'severity'"),
    "key of another type": ({**FULL, 7: 3}, "unknown key 7"),
    "later version": ({**FULL, "version": 2}, "implements fog version 1, got 2. Write version: 1"),
    "version true": ({**FULL, "version": True}, "got True"),
    "negative seed": ({**FULL, "seed": -1}, r"noise\.seed: .*at least 0, got -1"),
    "seed true": ({**FULL, "seed": True}, r"noise\.seed"),
    "unknown mode": ({**FULL, "mode": "Native"}, r"noise\.mode: expected one of native, scaled, got 'Native'"),
    "mode of another type": ({**FULL, "mode": []}, r"noise\.mode"),
}


@pytest.mark.parametrize("mapping, message", MISTAKES.values(), ids=MISTAKES)
def test_mistakes_are_explained(mapping: object, message: str) -> None:
    with pytest.raises(NoiseError, match=message):
        NoiseSpec.from_mapping(mapping, where="vqa.yaml: noise")
    assert issubclass(NoiseError, ValueError)


@pytest.mark.parametrize(
    "bad",
    [{"name": "nope"}, {"severity": 6}, {"mode": "huge"}, {"seed": -1}, {"seed": 0.5}, {"version": 9}, {"key": "1"}],
)
def test_apply_refuses_the_same_mistakes(bad: dict) -> None:
    request = {"name": "fog", "severity": 1, "key": SampleKey("d", "s", "1")} | bad
    with pytest.raises(NoiseError):
        apply(np.zeros((4, 4, 3), np.uint8), request.pop("name"), **request)
