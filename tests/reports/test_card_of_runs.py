"""``bitquake card RUN``: the card that a run's records name, found by its hash."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from run_folders import Model, Runs, Task

from bitquake import cli

INT4 = Model("rtn-int4-g64", 4, 0.1)


def test_the_cards_of_the_runs_in_a_folder(runs: Runs, capsys: pytest.CaptureFixture[str]) -> None:
    runs.write(INT4, [Task()])
    runs.write(Model(), [Task()])
    assert cli.main(["card", str(runs.root), "--artifacts", str(runs.artifacts)]) == 0
    out = capsys.readouterr().out
    for model in (INT4, Model()):
        card = model.card()
        assert f"content hash {card.content_hash}, as the records say" in out
        assert card.spec_name in out
    assert "(simulated)" in out  # whose bytes in memory mean nothing
    folder = runs.root / "rtn-int4-g64"
    assert cli.main(["card", str(folder), "--json", "--artifacts", str(runs.artifacts)]) == 0
    assert json.loads(capsys.readouterr().out) == json.loads(INT4.card().to_json())


def test_a_card_that_is_gone_is_named(runs: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = runs.write(INT4, [Task()])
    assert cli.main(["card", str(folder), "--artifacts", str(tmp_path)]) == 2
    err = capsys.readouterr().err
    assert "name no quant card that can be found" in err and INT4.card().content_hash[:12] in err
