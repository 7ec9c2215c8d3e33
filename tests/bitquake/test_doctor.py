"""The doctor's verdict must follow from what it finds."""

from __future__ import annotations

import sys

import pytest

from bitquake import doctor


def test_all_that_evaluation_needs_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run()
    said = capsys.readouterr().out
    assert "Ready" in said and "block-world tasks are registered" in said and "relative weight error" in said


def test_a_broken_library_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes every import of it fail
    assert not doctor.run()
    said = capsys.readouterr().out
    assert "BROKEN" in said and "Not ready: " in said and "transformers" in said.split("Not ready: ")[1]


def test_an_absent_extra_is_no_failure() -> None:
    found = doctor._try("made up", lambda: "never run", package="bitquake-no-such-package")
    assert found.state == "absent" and "pip install bitquake-no-such-package" in found.detail
