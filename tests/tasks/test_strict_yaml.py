"""YAML as plain data: what is refused, on which line, and that every text is either data or a clear error."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from bitquake.tasks.families import FamilyError, load_family
from bitquake.tasks.strict_yaml import MAX_BYTES, StrictYamlError, line_of, load_strict, load_with_lines, read_bounded

GOOD = "family: mine\ndataset: {path: someone/mine}\n"
BOMB = "a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n"


@pytest.mark.parametrize(
    ("text", "line", "message"),
    [
        ("a: [1, 2", 1, "while parsing a flow sequence"),
        ("a:\n\tb: 1", 2, "cannot start any token"),
        (GOOD + "title: !!python/object/apply:os.system ['true']\n", 3, "tags .*python/object/apply:os.system"),
        (GOOD + "title: !function os.system\n", 3, "tags .!function. are not allowed"),
        (GOOD + "title: !!binary aGk=\n", 3, "tags"),
        (GOOD + "title: one\ntitle: two\n", 4, "key 'title' given twice"),
        (GOOD + "columns: {image: a, image: b}\n", 3, "key 'image' given twice"),
        (BOMB, 2, "aliases .* are not allowed"),
        ("base: &b {a: 1}\nother:\n  <<: *b\n", 3, "aliases"),
        ("? [a, b]\n: c\n", 1, "key must be a plain text"),
        ("a: 1\n---\nb: 2\n", 2, "another document"),
        ("[" * 5000, 1, "nested more than 40 levels"),
        ("a: " + "{a: " * 60, 1, "nested more than 40 levels"),
        ("- " * 60 + "a", 1, "nested more than 40 levels"),
        ("\x00", None, "not allowed"),
        ("released: 2024-13-45\n", None, "month must be in 1..12"),
        ("n: " + "9" * 5000, None, "[Ii]nteger string"),
    ],
)
def test_what_is_no_plain_data_is_refused_with_its_line(
    tmp_path: Path, text: str, line: int | None, message: str
) -> None:
    with pytest.raises(StrictYamlError, match=message) as caught:
        load_strict(text)
    assert caught.value.line == line
    file = tmp_path / "family.yaml"
    file.write_text(text)
    with pytest.raises(FamilyError, match="not plain YAML") as told:
        load_family(file)
    assert str(told.value).startswith(f"{file}:{line}: " if line else f"{file}: ")


@pytest.mark.parametrize("text", ["- 1\n- 2\n", "", "just words", "# nothing\n", "3"])
def test_a_family_file_is_a_mapping(tmp_path: Path, text: str) -> None:
    (tmp_path / "family.yaml").write_text(text)
    with pytest.raises(FamilyError, match="expected a mapping that begins with `family: name`"):
        load_family(tmp_path / "family.yaml")


def test_a_file_that_is_huge_no_text_or_not_there(tmp_path: Path) -> None:
    file = tmp_path / "family.yaml"
    file.write_bytes(b"a: " + b"x" * MAX_BYTES)
    with pytest.raises(StrictYamlError, match="larger than 250,000 bytes"):
        read_bounded(file)
    with pytest.raises(FamilyError, match=f"{file}: not plain YAML: larger than"):
        load_family(file)
    file.write_bytes(b"a: " + b"x" * (MAX_BYTES - 3))
    assert len(read_bounded(file)) == MAX_BYTES
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(FamilyError, match="no UTF-8 text"):
        load_family(file)
    with pytest.raises(FamilyError, match=r"none.yaml: cannot be read \(No such file"):
        load_family(tmp_path / "none.yaml")
    with pytest.raises(FamilyError, match="cannot be read"):
        load_family(tmp_path)


def test_lines_of_values_and_of_what_is_around_them() -> None:
    text = "a: 1\nb:\n  c: [x,\n    y]\n  d: {e: 2}\nf:\n- g: 3\n- h: 4\n"
    data, lines = load_with_lines(text)
    assert data == yaml.safe_load(text)
    expected = {("a",): 1, ("b",): 2, ("b", "c"): 3, ("b", "c", 1): 4, ("b", "d", "e"): 5, ("f", 1, "h"): 8}
    assert {place: lines[place] for place in expected} == expected
    assert line_of(lines, ("b", "c", 1)) == 4
    assert line_of(lines, ("b", "list[str]", "c", 0, "missing")) == 3  # what pydantic calls the branch of a union
    assert line_of(lines, ("nowhere",)) == line_of(lines, ()) == 1
    assert line_of({}, ("a",)) is None


class NoAliases(yaml.SafeDumper):
    def ignore_aliases(self, data: object) -> bool:
        return True


PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**70), 2**70) | st.floats(allow_nan=False) | st.text(max_size=12),
    lambda inside: st.lists(inside, max_size=3) | st.dictionaries(st.text(max_size=8), inside, max_size=3),
    max_leaves=12,
)


@given(PLAIN)
def test_plain_data_reads_as_pyyaml_reads_it(data: object) -> None:
    """Not "comes back as it was": PyYAML writes some keys (U+0085, a line break to it) that it reads as others."""
    text = yaml.dump(data, Dumper=NoAliases, allow_unicode=True)
    try:
        expected = yaml.safe_load(text)
    except yaml.YAMLError:
        with pytest.raises(StrictYamlError):
            load_strict(text)
    else:
        assert load_strict(text) == expected


@given(st.text(alphabet="a&*!?:-[]{},'\"\n #|>%@`<=~0.", max_size=40))
def test_any_text_is_data_or_a_strict_yaml_error(text: str) -> None:
    try:
        data = load_strict(text)
    except StrictYamlError:
        return
    assert data == yaml.safe_load(text)
