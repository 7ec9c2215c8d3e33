"""The doctor's verdict must follow from what it finds."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable

import pytest

from bitquake import doctor


def test_all_that_evaluation_needs_works_here(capsys: pytest.CaptureFixture[str]) -> None:
    assert doctor.run()
    said = capsys.readouterr().out
    assert "Ready" in said and "block-world tasks are registered" in said and "relative weight error" in said


@pytest.mark.parametrize(
    ("probe", "says"),
    [
        (doctor._bitsandbytes, r"nf4 0\.09\d, fp4 0\.1\d\d, int8 0\.00\d"),
        (doctor._torchao, r"int8 0\.00\d, int8-dynamic 0\.00\d, fp8 0\.02\d"),
        (doctor._peft, "an adapter works on a quantized layer"),
    ],
)
def test_optional_quantizers_are_tried(probe: Callable[[], str], says: str) -> None:
    assert re.search(says, probe())


def test_a_broken_library_is_found(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)  # makes every import of it fail
    assert not doctor.run()
    said = capsys.readouterr().out
    assert "BROKEN" in said and "Not ready: " in said and "transformers" in said.split("Not ready: ")[1]


def test_an_absent_extra_is_no_failure() -> None:
    found = doctor._try("made up", lambda: "never run", package="bitquake-no-such-package")
    assert found.state == "absent" and "pip install bitquake-no-such-package" in found.detail


def test_autoawq_is_not_needed() -> None:
    (found,) = (check for check in doctor.checks() if check.what == "autoawq")
    assert not found.needed and "quant=awq-int4-g128" in found.detail
    if doctor._version("autoawq") is None:
        assert found.state == "absent"
        unusable = doctor._try("autoawq", doctor._autoawq)  # as where it is installed and cannot be imported
        assert unusable.state == "broken" and "not needed" in unusable.detail
    else:
        assert found.state == "ok" and "read exactly" in found.detail
