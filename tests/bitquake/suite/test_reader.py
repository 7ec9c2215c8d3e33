"""Suite files: what may stand in one, and errors that name the line."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import pytest
import yaml

import bitquake.suite
from bitquake.suite.reader import load_suite, suite_names
from bitquake.suite.schema import Suite, SuiteError, json_schema

SCHEMA = Path(bitquake.suite.__file__).parent / "suite.schema.json"


def test_the_published_schema_is_the_models() -> None:
    assert SCHEMA.read_text(encoding="utf-8") == json_schema(), (
        "suite.schema.json is stale: write bitquake.suite.schema.json_schema() to it"
    )


@pytest.mark.parametrize("name", suite_names())
@pytest.mark.parametrize("world", ["real", "block"])
def test_every_suite_that_ships_is_valid_by_model_and_schema(name: str, world: Any) -> None:
    loaded = load_suite(name, world)
    assert loaded.suite.suite == name and loaded.world == world
    schema = json.loads(SCHEMA.read_text(encoding="utf-8"))
    jsonschema.validate(yaml.safe_load(loaded.file.read_text(encoding="utf-8")), schema)


CASES: list[tuple[list[str | int], Any, str]] = [
    (["pages"], "noise", "pages: unknown key; remove it, or did you mean 'page'"),
    (["page"], "nois", "page: Input should be"),
    (["models", 0, "pretrainde"], "x", "models.0.pretrainde: unknown key"),
    (["models"], [], "models: List should have at least 1 item"),
    (["models", 0, "name"], "a/b", "models.0.name"),
    (["models", 0, "arguments"], {"quant": "rtn-int4-g64"}, "arguments: quant (of block-idefics3) is not an argument"),
    (["models", 0, "arguments"], {"adapter": "a,b"}, "comma"),
    (["models", 0, "quantizations"], ["as-trained"], "as-trained is for models with training"),
    (["quantizations"], [{"name": "x", "grid": {}}], "grid: is empty"),
    (["quantizations"], [{"name": "x{bits}", "grid": {"bits": []}}], "quantizations.0.grid.bits"),
    (["quantizations"], [{"name": "x{bits}", "grid": {"bits": [4, 4]}}], "bits has a level twice"),
    (["quantizations"], [{"name": "x", "grid": {"bits": [4]}, "factors": {"bits": 4}}], "bits is in the grid already"),
    (["quantizations"], [{"name": "x", "grid": {"model": ["a"]}}], "model is a factor of every suite"),
    (["calibration"], ["txt"], "calibration.0.source"),
    (["calibration"], ["text", "text"], "calibration: 'text' is named twice"),
    (["seeds"], [0, -1], "seeds.1"),
    (["seeds"], [True], "seeds.0"),
    (["limit"], 0, "limit"),
    (["limit"], "10", "limit"),
    (["exclude"], [{}], "exclude.0: is empty"),
    (["selectors"], ["mixture"], "selector_mixture: belongs to"),
    (["tasks"], [], "tasks: List should have at least 1 item"),
    (["minutes"], -1, "minutes"),
]


@pytest.mark.parametrize(("place", "value", "message"), CASES, ids=[message[:30] for _, _, message in CASES])
def test_what_cannot_be_is_refused_with_its_line(
    write_suite: Callable[..., Path], place: list[str | int], value: Any, message: str
) -> None:
    data = copy.deepcopy(yaml.safe_load(write_suite().read_text(encoding="utf-8")))
    inside = data
    for key in place[:-1]:
        inside = inside[key]
    inside[place[-1]] = value
    file = write_suite(**data)
    with pytest.raises(SuiteError) as caught:
        load_suite(file)
    assert message in str(caught.value) and str(file) in str(caught.value)
    top = next(i for i, line in enumerate(file.read_text().splitlines(), 1) if line.startswith(f"{place[0]}:"))
    line = str(caught.value).splitlines()[0].removeprefix(f"{file}:").partition(":")[0]
    assert not line.isdigit() or int(line) >= min(top, 1)


def test_yaml_numbers_without_a_sign_in_the_exponent_are_numbers(write_suite: Callable[..., Path]) -> None:
    file = write_suite(models=[{"name": "a", "pretrained": "b/c", "parameters": "8.29e9"}], minutes=30)
    suite = load_suite(file).suite
    assert suite.models[0].parameters == 8.29e9 and suite.minutes == 30.0


def test_the_twin_replaces_whole_keys_and_errors_name_its_lines(write_suite: Callable[..., Path]) -> None:
    file = write_suite(limit=5, block={"title": "Twin", "tasks": ["block_vqav2_clean"]})
    assert load_suite(file).suite.title == "A suite for tests"
    twin = load_suite(file, "block").suite
    assert (twin.title, [task.name for task in twin.tasks], twin.limit) == ("Twin", ["block_vqav2_clean"], 5)
    file = write_suite(block={"title": "Twin", "seeds": [-3]})
    with pytest.raises(SuiteError, match=r"seeds\.0") as caught:
        load_suite(file, "block")
    lines = file.read_text(encoding="utf-8").splitlines()
    assert int(str(caught.value).removeprefix(f"{file}:").partition(":")[0]) == lines.index("  - -3") + 1
    load_suite(file)  # the real one is fine


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("suite: x\nsuite: y\n", "given twice"),
        ("suite: &a x\ntitle: *a\n", "aliases"),
        ("- a\n", "expected a mapping"),
        ("suite: [\n", "not plain YAML"),
        ("", "expected a mapping"),
    ],
)
def test_what_is_no_plain_mapping_is_refused(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "x.yaml").write_text(text, encoding="utf-8")
    with pytest.raises(SuiteError, match=message):
        load_suite(tmp_path / "x.yaml")


def test_names_that_lead_nowhere(write_suite: Callable[..., Path], tmp_path: Path) -> None:
    with pytest.raises(SuiteError, match="did you mean 'reliable_vqa'"):
        load_suite("reliable_vq")
    with pytest.raises(SuiteError, match="no suite file"):
        load_suite("suites/nothing_like_it.yaml")
    with pytest.raises(SuiteError, match="is a folder"):
        load_suite(tmp_path)
    with pytest.raises(SuiteError, match="has no twin in the block world"):
        load_suite(write_suite(block=None), "block")
    with pytest.raises(SuiteError, match=r"block\.pages: unknown key; remove it, or did you mean 'page'"):
        load_suite(write_suite(block={"pages": "noise"}))
    file = write_suite()
    with pytest.raises(SuiteError, match=r"must stand in a file called tiny\.yaml"):
        load_suite(file.rename(tmp_path / "other.yaml"))


def test_documented_attributes_are_all_there() -> None:
    documented = Suite.__doc__ or ""
    assert not [key for key in Suite.model_fields if f"{key}" not in documented]
