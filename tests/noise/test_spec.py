"""A noise in YAML: what is accepted, and what each mistake is told."""

from __future__ import annotations

from dataclasses import FrozenInstanceError

import numpy as np
import pytest

from bitquake.noise import (
    GROUPS,
    NoiseError,
    NoiseSpec,
    SampleKey,
    apply,
    apply_text,
    image_noises,
    noise_names,
    text_noises,
)

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


def test_a_spec_may_name_a_text_noise() -> None:
    key = SampleKey("d", "s", "1")
    spec = NoiseSpec.from_mapping({"name": "spoken", "severity": 5, "seed": 4})
    assert spec.to_mapping() == {"name": "spoken", "severity": 5, "seed": 4, "version": 1, "mode": "native"}
    assert spec.medium == "text" and spec.noise() is text_noises()["spoken"] and NoiseSpec("fog", 1).medium == "image"
    question = "Where would the new boy wear their red hat to school?"
    assert spec.apply_text(question, key) == apply_text(question, "spoken", severity=5, seed=4, key=key) != question
    with pytest.raises(NoiseError, match=r"spoken is a text noise\. Use apply_text"):
        spec.apply(np.zeros((4, 4, 3), np.uint8), key)
    with pytest.raises(NoiseError, match="spoken is a text noise"):
        spec.move_box((0, 0, 1, 1), (4, 4), key)
    with pytest.raises(NoiseError, match=r"fog is an image noise\. Use apply for images; for text: keyboard_typos, "):
        NoiseSpec("fog", 1).apply_text(question, key)


def test_groups_hold_every_noise_once() -> None:
    assert GROUPS == ("imagenet_c", "imagenet_c_extra", "camera", "text", "all")
    parts = [name for group in GROUPS[:-1] for name in noise_names(group)]
    assert sorted(parts) == sorted(noise_names("all")) == sorted([*image_noises(), *text_noises()])
    assert noise_names("text") == list(text_noises()) and len(noise_names("text")) == 9
    assert noise_names("camera") == [n for n, noise in image_noises().items() if 20 <= noise.id <= 25]
    extra = {"speckle_noise", "gaussian_blur", "spatter", "saturate"}
    assert set(noise_names("imagenet_c_extra")) == extra and len(noise_names("imagenet_c")) == 15
    with pytest.raises(NoiseError, match=r"unknown group 'imagenet'\. Did you mean 'imagenet_c'"):
        noise_names("imagenet")


MISTAKES = {
    "no mapping": (["fog"], r"^vqa\.yaml: noise: expected a mapping"),
    "null": (None, "expected a mapping"),
    "typo in the name": (
        {**FULL, "name": "gausian_noise"},
        r"^vqa\.yaml: noise\.name: .*Did you mean 'gaussian_noise'",
    ),
    "the list is shown": (
        {**FULL, "name": "rain"},
        "Known: gaussian_noise, shot_noise, defocus_blur, fog, contrast, jpeg.*, keyboard_typos, ",
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
    "scaled text": ({**FULL, "name": "spoken"}, r"noise\.mode: spoken is a text noise.*got 'scaled'.*native"),
    "typo in a text noise": ({**FULL, "name": "word_dropp"}, "Did you mean 'word_drop'"),
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
