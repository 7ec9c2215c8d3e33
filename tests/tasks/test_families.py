"""Family files: what is accepted, what is refused and with which words, and the published schema."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jsonschema
import pytest
import yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from bitquake.noise import image_noises, text_noises
from bitquake.tasks import families, variants
from bitquake.tasks.families import Family, FamilyError, Loaded, fill, json_schema, load_families, load_family

GOOD = """
family: mine
dataset: {path: someone/mine}
splits: {test: validation, threshold: train}
columns: {answers: answers}
protocol: vqa
"""


def load(tmp_path: Path, text: str) -> Family:
    return load_family_of(tmp_path, text).family


def load_family_of(tmp_path: Path, text: str) -> Loaded:
    (tmp_path / "family.yaml").write_text(text)
    return load_family(tmp_path / "family.yaml")


def test_the_smallest_family(tmp_path: Path) -> None:
    family = load(tmp_path, GOOD)
    assert family.primary_confidence == "joint"
    assert family.dataset_id == "someone/mine"
    assert family.splits.test.split == "validation"
    assert family.noises() == []


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"protocol": "vqaa"}, "protocol: .*got 'vqaa'"),
        ({"protocol": "choice"}, "columns.choices is missing"),
        ({"protocol": "grounding"}, "columns.box is missing"),
        ({"family": "Bad Name"}, "family: .*got 'Bad Name'"),
        ({"famly": "x"}, "famly: unknown key"),
        ({"family": None}, "family: "),
        ({"dataset": {}}, "dataset: give either `path`"),
        ({"dataset": {"path": "a", "files": {"x": "y"}}}, "dataset: give either `path`"),
        ({"dataset": {"files": {"test": "t.parquet"}}}, "splits.test: dataset.files has no split 'validation'"),
        ({"splits": {"test": "validation"}}, "splits.threshold: this key is missing"),
        ({"splits": {"test": {"split": "v", "ids": "a.json"}, "threshold": "v"}}, "one of them has `ids`"),
        ({"splits": {"test": {"split": "v", "ids": "a.json", "part": [0, 1]}, "threshold": "t"}}, "either `part` or"),
        ({"splits": {"test": {"split": "v", "ids": "../a.json"}, "threshold": "t"}}, "splits.test.ids: .*got '../a"),
        ({"splits": {"test": {"split": "v", "where": {"grade": []}}, "threshold": "t"}}, "where.grade: .*at least 1"),
        ({"splits": {"test": "validation", "threshold": "validation"}}, "share images"),
        (
            {"splits": {"test": {"split": "v", "part": [0.4, 1]}, "threshold": {"split": "v", "part": [0, 0.5]}}},
            "share images",
        ),
        ({"splits": {"test": "v", "threshold": "t", "dev": "v"}}, "test and dev share images"),
        ({"splits": {"test": "v", "threshold": "t", "calibration": "c", "dev": "c"}}, "calibration and dev share"),
        (
            {
                "splits": {"test": "v", "threshold": "t", "dev": "d"},
                "variants": {"shifts": {"hard": {"split": "d", "part": [0.0, 0.1]}}},
            },
            "hard: shares images with dev",
        ),
        ({"splits": {"test": {"split": "v", "part": [0.5, 0.5]}, "threshold": "t"}}, "low < high"),
        ({"splits": {"test": {"split": "v", "part": [0, 2]}, "threshold": "t"}}, "got 2"),
        ({"text": {"template": "{question} {expression}"}}, r"unknown field \{expression\}"),
        ({"text": {"template": "{question.__class__} {question}"}}, None),
        ({"text": {"template": "look"}}, r"must contain \{question\}"),
        ({"text": {"template": "{question} {choices}"}}, r"\{choices\} must stand in it"),
        ({"text": {"template": "{hint} {question}"}}, r"\{hint\} needs columns.hint"),
        ({"prompts": {"qwen2_vl": {}}}, "entry `default` is missing"),
        ({"prompts": {"default": {"pre": ""}}}, "prompts.default.pre: unknown key"),
        ({"coordinates": {"default": "pixels"}}, "coordinates: needed with"),
        ({"metrics": ["accurac"]}, "unknown metric 'accurac'"),
        ({"metrics": ["phi_10"]}, "unknown metric 'phi_10' for one task's samples"),
        ({"metrics": []}, "at least one metric"),
        ({"confidence": "certainty"}, "unknown confidence 'certainty'; known: joint"),
        ({"tags": ["Reliable VQA"]}, "tags.0: .*got 'Reliable VQA'"),
        ({"tags": ["a", "a"]}, "tag 'a' is named twice"),
        ({"shift_from": "vqav2 clean"}, "shift_from: .*got 'vqav2 clean'"),
        ({"explode": "answrs"}, "explode: 'answrs' is none of the columns"),
        ({"max_choices": 4}, "max_choices: belongs to the protocol 'choice', this one is 'vqa'"),
        ({"box_format": "xyxy"}, "box_format: belongs to the protocol 'grounding'"),
        ({"candidates": {"n": 100}}, "candidates: belongs to the protocol 'retrieval'"),
        ({"protocol": "caption"}, "columns.captions is missing"),
        ({"protocol": "retrieval", "columns": {"captions": "c"}}, "candidates: needed"),
        ({"protocol": "stock"}, "'stock' belongs to `extends`"),
        ({"extends": {"task": "pope", "score": "pope_accuracy"}}, "give either `dataset` or `extends`"),
        ({"extends": {"task": "pope"}}, "extends: give either `score`"),
        ({"max_new_tokens": 0}, "max_new_tokens: .*got 0"),
        ({"max_choices": 27}, "max_choices: .*got 27"),
        ({"variants": {"noise": {"names": ["gausian_noise"]}}}, "unknown noise 'gausian_noise'.*gaussian_noise"),
        ({"variants": {"noise": {"names": ["camra"]}}}, "unknown noise 'camra'. Did you mean 'camera'"),
        ({"variants": {"noise": {"names": ["fog", "imagenet_c"]}}}, "noise 'fog' is named twice"),
        ({"variants": {"noise": {"names": []}}}, "at least one noise"),
        ({"variants": {"noise": {"severities": []}}}, "at least one severity"),
        ({"variants": {"noise": {"severities": [6]}}}, "severities 1 to 5"),
        ({"variants": {"noise": {"severities": [1, 1]}}}, "severity 1 is named twice"),
        ({"variants": {"noise": {"names": ["fog", "fog"]}}}, "noise 'fog' is named twice"),
        ({"variants": {"noise": {"mode": "big"}}}, "mode: .*got 'big'"),
        ({"variants": {"noise": {"name": ["fog"]}}}, "name: unknown key; remove it, or did you mean 'names'"),
        ({"lmms_eval_specific_kwargs": {"qwen_vl": {}}}, "key named after a model would replace the noise"),
        *(
            ({"variants": {"shifts": {name: {"split": "s"}}}}, f"'{name}' (is what another|reads like|ends like)")
            for name in ("clean", "threshold", "dev", "noise", "all", "shift", "fog", "fog_3", "text_noise", "noise_2")
        ),
        ({"variants": {"shifts": {"a_threshold": {"split": "s"}}}}, "ends like a threshold task"),
        ({"variants": {"shifts": {"a b": {"split": "s"}}}}, "shifts.a b: .*got 'a b'"),
        (
            {"variants": {"shifts": {"a": {"split": "s", "shift_from": "b"}}}},
            "'b' is no other variant; name one of clean",
        ),
        ({"variants": {"shifts": {"a": {"split": "s", "shift_from": "a"}}}}, "'a' is no other variant"),
        (
            {"variants": {"shifts": {"a": {"split": "s"}, "b": {"split": "s", "shift_from": "a"}}}},
            "'a' is shifted itself",
        ),
        ({"variants": {"shifts": {"a": {"split": "train"}}}}, "variants.shifts.a: shares images with threshold"),
        ({"variants": {"shifts": {"a": {"split": "s", "threshold": "t"}}}}, "a: threshold: only with shift_from: null"),
        (
            {"variants": {"shifts": {"a": {"split": "s", "shift_from": None, "threshold": "s"}}}},
            "variants.shifts.a.threshold: shares images with a",
        ),
        (
            {
                "variants": {
                    "shifts": {
                        "a": {"split": "s", "shift_from": None, "threshold": "t"},
                        "b": {"split": "t", "shift_from": "a"},
                    }
                }
            },
            "variants.shifts.a.threshold: shares images with b",
        ),
    ],
)
def test_what_is_refused_says_where_and_what(tmp_path: Path, change: dict[str, object], message: str | None) -> None:
    text = yaml.safe_dump(yaml.safe_load(GOOD) | change)
    if message is None:  # braces around anything but a plain name are ordinary text
        assert fill(load(tmp_path, text).text.template, {"question": "q"}) == "{question.__class__} q"
        return
    with pytest.raises(FamilyError, match=message) as caught:
        load(tmp_path, text)
    # Each message names the file, and a line at or below that of the key that was changed.
    keys = tuple(f"{key}:" for key in change)
    lines = [i for i, line in enumerate(text.splitlines(), 1) if line.startswith(keys)]
    for said in str(caught.value).splitlines():
        assert said.startswith(str(tmp_path / "family.yaml"))
        number = int(said.removeprefix(f"{tmp_path / 'family.yaml'}:").split(":")[0])
        # Where a key is missing, or two do not go together, it is the line of what should hold it: of the whole file.
        together = re.search("give either|is missing|belongs? to|needed|shares? images|must contain", said)
        assert number >= lines[0] or (together and number == 1), said


def test_the_line_is_that_of_the_value(tmp_path: Path) -> None:
    text = GOOD + "variants:\n  noise:\n    names: [fog]\n    severities:\n    - 1\n    - 7\n"
    with pytest.raises(FamilyError) as caught:
        load(tmp_path, text)
    assert str(caught.value).startswith(f"{tmp_path / 'family.yaml'}:10: variants.noise.severities: ")
    with pytest.raises(FamilyError) as caught:
        load(tmp_path, GOOD + "splits_of_mine: 3\nmax_new_tokens: many\n")
    first, second = str(caught.value).splitlines()
    assert f"{tmp_path / 'family.yaml'}:8: max_new_tokens: " in first and "got 'many'" in first
    assert f"{tmp_path / 'family.yaml'}:7: splits_of_mine: unknown key" in second


def test_grounding_has_a_noise_that_moves_things_only_where_boxes_can_move_too(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from dataclasses import replace

    known = variants.image_noises()
    changed = {
        "fog": replace(known["fog"], geometry="changed", move_box=None),
        "contrast": replace(known["contrast"], geometry="changed", move_box=lambda box, size, *_: (box, size)),
    }
    monkeypatch.setattr(variants, "image_noises", lambda: known | changed)
    change: dict[str, object] = {
        "protocol": "grounding",
        "columns": {"box": "bbox"},
        "coordinates": {"default": "pixels"},
        "variants": {"noise": {"names": ["fog"]}},
    }
    with pytest.raises(FamilyError, match=r"variants.noise.names: fog moves things .* boxes would be wrong"):
        load(tmp_path, yaml.safe_dump(yaml.safe_load(GOOD) | change))
    for names in ("all", ["imagenet_c"]):
        change["variants"] = {"noise": {"names": names}}
        found = {noise.name for noise in load(tmp_path, yaml.safe_dump(yaml.safe_load(GOOD) | change)).noises()}
        assert "fog" not in found and "contrast" in found


def test_noises_on_the_text_need_a_question(tmp_path: Path) -> None:
    caption: dict[str, object] = {
        "protocol": "caption",
        "columns": {"captions": "c"},
        "text": {"template": "Describe."},
    }
    texts, images = set(text_noises()), set(image_noises())
    for names, expected in (("all", images), (["camera", "fog"], set(variants.groups()["camera"]) | {"fog"})):
        made = yaml.safe_load(GOOD) | caption | {"variants": {"noise": {"names": names}}}
        assert {noise.name for noise in load(tmp_path, yaml.safe_dump(made)).noises()} == expected
    for names in (["text"], [next(iter(texts))]):
        made = yaml.safe_load(GOOD) | caption | {"variants": {"noise": {"names": names}}}
        with pytest.raises(FamilyError, match=r"columns.question is not set"):
            load(tmp_path, yaml.safe_dump(made))
    made = yaml.safe_load(GOOD) | {"variants": {"noise": {"names": "all", "mode": "scaled"}}}
    found = load(tmp_path, yaml.safe_dump(made)).noises()
    assert {noise.name for noise in found} == texts | images
    assert {noise.mode for noise in found if noise.name in texts} == {"native"}
    assert {noise.mode for noise in found if noise.name in images} == {"scaled"}


@pytest.mark.parametrize("key", ["text", "prompts", "max_new_tokens", "explode"])
def test_what_the_stock_task_decides_cannot_be_set(tmp_path: Path, key: str) -> None:
    value = {"text": {}, "prompts": {"default": {}}, "max_new_tokens": 8, "explode": "question"}[key]
    made = yaml.safe_load(GOOD) | {
        "protocol": "stock",
        "extends": {"task": "pope", "score": "pope_accuracy"},
        key: value,
    }
    del made["dataset"]
    with pytest.raises(FamilyError, match=f"{key}: with `extends` the stock task's own holds"):
        load(tmp_path, yaml.safe_dump(made))
    del made[key]
    family = load(tmp_path, yaml.safe_dump(made))
    assert family.dataset_id == "lmms-eval/pope"
    assert family.columns.question is None  # no noise on a text that the stock task may not have


def test_one_broken_family_does_not_hide_the_others(tmp_path: Path) -> None:
    for name, text in {"a": GOOD, "b": "family: [", "c": GOOD.replace("mine", "other", 1)}.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "family.yaml").write_text(text)
    loaded, problems = load_families([tmp_path])
    assert {"mine", "other", "block_vqav2"} <= {one.family.family for one in loaded}
    assert len(problems) == 1
    assert "not plain YAML" in problems[0]


def test_a_name_that_is_taken_is_a_problem_and_the_first_stays(tmp_path: Path) -> None:
    (tmp_path / "family.yaml").write_text(GOOD.replace("mine", "block_vqav2", 1))
    loaded, problems = load_families([tmp_path])
    assert len(problems) == 1
    assert f"{tmp_path / 'family.yaml'}:2: family: the name 'block_vqav2' is a built-in family's" in problems[0]
    assert next(one for one in loaded if one.family.family == "block_vqav2").family.world == "block"


def test_the_built_in_families_are_fine() -> None:
    loaded, problems = load_families()
    assert problems == []
    names = {one.family.family for one in loaded}
    assert names >= {"block_vqav2", "block_advqa", "block_vizwiz", "block_refcocoplus", "block_scienceqa", "vqav2"}
    for one in loaded:
        assert one.file.parent.name == one.family.family
        assert len(one.family.noises()) == 5 * len({noise.name for noise in one.family.noises()}) >= 75


def test_the_published_schema_is_the_models() -> None:
    published = Path(families.__file__).parent / "family.schema.json"
    assert published.read_text(encoding="utf-8") == json_schema(), (
        "family.schema.json is stale: write bitquake.tasks.families.json_schema() to it"
    )


def test_the_schema_accepts_our_families_and_refuses_what_the_model_refuses() -> None:
    schema = json.loads(json_schema())
    jsonschema.Draft202012Validator.check_schema(schema)
    validator = jsonschema.Draft202012Validator(schema)
    for one in load_families()[0]:
        validator.validate(yaml.safe_load(one.file.read_text()))
    good = yaml.safe_load(GOOD)
    validator.validate(good)
    noise = {"names": ["camera", "spoken", "fog"], "severities": [1, 3]}
    validator.validate(good | {"variants": {"noise": noise, "shifts": {"a": {"split": "s", "where": {"x": [1, "b"]}}}}})
    for change in (
        {"famly": 1},
        {"protocol": "x"},
        {"max_new_tokens": 0},
        {"splits": {"test": 3, "threshold": "t"}},
        {"splits": {"test": {"split": "a", "ids": "../b.json"}, "threshold": "t"}},
        {"metrics": ["accurac"]},
        {"confidence": "certainty"},
        {"tags": ["A B"]},
        {"lmms_eval_specific_kwargs": {}},
        {"variants": {"noise": {"names": ["rain"]}}},
        {"variants": {"noise": {"names": ["fog", "fog"]}}},
        {"variants": {"noise": {"severities": [6]}}},
        {"variants": {"noise": {"severities": []}}},
        {"variants": {"shifts": {"a b": {"split": "s"}}}},
        {"variants": {"shifts": {"a": {"split": "s", "where": {"x": []}}}}},
    ):
        assert not validator.is_valid(good | change), change


def test_values_are_not_templates() -> None:
    assert fill("{a}-{b}", {"a": "{b}", "b": "{a}"}) == "{b}-{a}"


SCALARS = (
    st.none() | st.booleans() | st.integers(-3, 9) | st.floats() | st.sampled_from(["", "all", "fog", "test", "x"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inside: (
        st.lists(inside, max_size=3)
        | st.dictionaries(st.sampled_from(["default", "noise", "shifts", "split", "part", "n", "path", "a"]), inside)
    ),
    max_leaves=6,
)


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(change=st.dictionaries(st.sampled_from(sorted(Family.model_fields)), VALUES, max_size=3), odd=SCALARS)
def test_whatever_stands_in_a_file_it_is_a_family_or_a_family_error(
    tmp_path: Path, change: dict[str, object], odd: object
) -> None:
    data = yaml.safe_load(GOOD) | change | ({odd: 1} if odd in (7, True, None) else {})
    try:
        loaded = load_family_of(tmp_path, yaml.safe_dump(data))
        assert loaded.family.family
        assert loaded.family.noises() is not None
    except FamilyError as error:
        assert all(line.startswith(str(tmp_path)) for line in str(error).splitlines())
