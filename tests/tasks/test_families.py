"""Family files: what is accepted, what is refused and with which words, and the published schema."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from bitquake.tasks import families
from bitquake.tasks.families import Family, FamilyError, fill, json_schema, load_families, load_family

GOOD = """
family: mine
dataset: {path: someone/mine}
splits: {test: validation, threshold: train}
columns: {answers: answers}
protocol: vqa
"""


def load(tmp_path: Path, text: str) -> Family:
    file = tmp_path / "family.yaml"
    file.write_text(text)
    return load_family(file).family


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
        ({"splits": {"test": "validation", "threshold": "validation"}}, "share images"),
        (
            {"splits": {"test": {"split": "v", "part": [0.4, 1]}, "threshold": {"split": "v", "part": [0, 0.5]}}},
            "share images",
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
        ({"max_new_tokens": 0}, "max_new_tokens: .*got 0"),
        ({"max_choices": 27}, "max_choices: .*got 27"),
        ({"variants": {"noise": {"names": ["gausian_noise"]}}}, "unknown noise 'gausian_noise'.*gaussian_noise"),
        ({"variants": {"noise": {"severities": [6]}}}, "severities 1 to 5"),
        ({"variants": {"noise": {"severities": [1, 1]}}}, "severity 1 is named twice"),
        ({"variants": {"noise": {"names": ["fog", "fog"]}}}, "noise 'fog' is named twice"),
        ({"variants": {"noise": {"mode": "big"}}}, "mode: .*got 'big'"),
    ],
)
def test_what_is_refused_says_where_and_what(tmp_path: Path, change: dict[str, object], message: str | None) -> None:
    text = yaml.safe_dump(yaml.safe_load(GOOD) | change)
    if message is None:  # braces around anything but a plain name are ordinary text
        assert fill(load(tmp_path, text).text.template, {"question": "q"}) == "{question.__class__} q"
        return
    with pytest.raises(FamilyError, match=message) as caught:
        load(tmp_path, text)
    assert str(tmp_path / "family.yaml") in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: [1, 2", "not plain YAML.*line 1"),
        ("- 1\n- 2\n", "expected a mapping"),
        ("", "expected a mapping"),
        (GOOD + "title: !!python/object/apply:os.system ['true']\n", "not plain YAML.*python/object"),
        (GOOD + "title: !function os.system\n", "not plain YAML.*!function"),
        (GOOD + "title: one\ntitle: two\n", "'title' given twice.*line 8"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: [*b, *b]\n", "aliases"),
        ("[" * 5000, "not plain YAML"),
        ("\x00", "not plain YAML"),
    ],
)
def test_hostile_yaml_is_refused(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(FamilyError, match=message):
        load(tmp_path, text)


def test_a_file_that_is_not_text_or_not_there(tmp_path: Path) -> None:
    (tmp_path / "family.yaml").write_bytes(b"\xff\xfe\x00")
    for file in (tmp_path / "family.yaml", tmp_path / "none.yaml"):
        with pytest.raises(FamilyError, match="cannot be read"):
            load_family(file)


def test_grounding_refuses_a_noise_that_moves_things(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from dataclasses import replace

    moved = {
        name: replace(noise, geometry="changed") for name, noise in families.image_noises().items() if name == "fog"
    }
    everything = families.image_noises() | moved
    monkeypatch.setattr(families, "image_noises", lambda: everything)
    change = {
        "protocol": "grounding",
        "columns": {"box": "bbox"},
        "coordinates": {"default": "pixels"},
        "variants": {"noise": {"names": ["fog"]}},
    }
    with pytest.raises(FamilyError, match="fog moves things"):
        load(tmp_path, yaml.safe_dump(yaml.safe_load(GOOD) | change))
    change["variants"] = {"noise": {"names": "all"}}
    found = load(tmp_path, yaml.safe_dump(yaml.safe_load(GOOD) | change)).noises()
    assert "fog" not in {noise.name for noise in found}
    assert found


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
    assert "'block_vqav2' is taken by" in problems[0]
    assert next(one for one in loaded if one.family.family == "block_vqav2").family.world == "block"


def test_the_built_in_families_are_fine() -> None:
    loaded, problems = load_families()
    assert problems == []
    names = {one.family.family for one in loaded}
    assert names >= {"block_vqav2", "block_advqa", "block_vizwiz", "block_refcocoplus", "block_scienceqa", "vqav2"}
    for one in loaded:
        assert one.file.parent.name == one.family.family
        assert len(one.family.noises()) == 5 * len({noise.name for noise in one.family.noises()}) >= 30


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
    for change in ({"famly": 1}, {"protocol": "x"}, {"max_new_tokens": 0}, {"splits": {"test": 3, "threshold": "t"}}):
        assert not validator.is_valid(good | change)


def test_values_are_not_templates() -> None:
    assert fill("{a}-{b}", {"a": "{b}", "b": "{a}"}) == "{b}-{a}"
