"""New family files: each is valid as it is written, by the model, by the published schema, and through expansion."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest
import yaml

from bitquake.tasks import catalog
from bitquake.tasks.expand import task_files
from bitquake.tasks.families import FamilyError, load_family
from bitquake.tasks.scaffold import PROTOCOLS, SCHEMA, new_family


def published(file: Path) -> Path:
    """The schema that the first line of a family file points an editor to."""
    first = file.read_text().splitlines()[0]
    prefix = "# yaml-language-server: $schema="
    assert first.startswith(prefix)
    return Path(first.removeprefix(prefix).removeprefix("file://"))


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_each_protocol(protocol: str, tmp_path: Path) -> None:
    file = new_family("mine", protocol, out=tmp_path / "new")
    assert file == tmp_path / "new" / "family.yaml"
    loaded = load_family(file)
    assert loaded.family.protocol == protocol and loaded.family.family == "mine"
    assert catalog.validate(file) == []
    assert "mine_fog_3_full.yaml" in task_files(loaded)
    schema = published(file)
    assert schema == SCHEMA and schema.is_file()
    jsonschema.validate(yaml.safe_load(file.read_text()), json.loads(schema.read_text()))


def test_the_commented_lines_are_valid_too(tmp_path: Path) -> None:
    for protocol in PROTOCOLS:
        file = new_family("mine", protocol, out=tmp_path / protocol)
        lines = file.read_text().splitlines()
        opened = [line.replace("# ", "", 1) if line.startswith("  # ") else line for line in lines]
        if protocol == "choice":
            opened = [line.replace('"{question}\\n{choices}"', '"{hint}{question}\\n{choices}"') for line in opened]
        file.write_text("\n".join(opened))
        family = load_family(file).family
        assert family.variants.shifts and family.columns.sample_id


def test_a_stock_task(tmp_path: Path) -> None:
    pytest.importorskip("lmms_eval")
    file = new_family("mine", extends="pope", out=tmp_path / "new")
    loaded = load_family(file)
    assert loaded.family.extends is not None and loaded.family.extends.task == "pope"
    assert loaded.family.splits.test.split == "test"
    assert catalog.validate(file) == []
    jsonschema.validate(yaml.safe_load(file.read_text()), json.loads(SCHEMA.read_text()))


def test_the_default_folder_and_a_schema_beside_the_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert new_family("mine") == Path("mine/family.yaml")
    monkeypatch.setattr("bitquake.tasks.scaffold.PACKAGE", tmp_path)
    monkeypatch.setattr("bitquake.tasks.scaffold.SCHEMA", tmp_path / "family.schema.json")
    file = new_family("other", out=tmp_path / "families" / "other")
    assert str(published(file)) == "../../family.schema.json"  # the same in every checkout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"name": "Mine"}, "'Mine' cannot be a family's name"),
        ({"name": "../mine"}, "cannot be a family's name"),
        ({"name": "vqav2"}, "'vqav2' is the name of a built-in family"),
        ({"name": "mine", "protocol": "vqaa"}, "unknown protocol 'vqaa'; known: vqa, choice"),
        ({"name": "mine", "extends": "no_such_task"}, "no_such_task"),
    ],
)
def test_what_is_refused_writes_nothing(arguments: dict[str, str], message: str, tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=message):
        new_family(**arguments, out=tmp_path / "new")  # type: ignore[arg-type]
    assert not (tmp_path / "new").exists()


def test_a_file_that_exists_is_kept(tmp_path: Path) -> None:
    file = new_family("mine", out=tmp_path)
    file.write_text("mine")
    with pytest.raises(FamilyError, match="exists; name another folder with --out"):
        new_family("mine", out=tmp_path)
    assert file.read_text() == "mine"
