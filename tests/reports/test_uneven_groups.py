"""Two models in one report of which only one ran the noisy tasks."""

from __future__ import annotations

from pathlib import Path

from run_folders import Model, Runs, Task, noisy

from bitquake.reports import build


def test_a_model_without_noisy_tasks_stands_beside_one_that_has_them(runs: Runs, tmp_path: Path) -> None:
    folders = []
    for name, tasks in (("a/noisy", [Task(n=60), noisy("fog", 1, n=30), noisy("fog", 3, n=30)]), ("b/clean", [Task()])):
        for quant, bits in (("full-precision", 16), ("rtn-int4-g64", 4)):
            model = Model(quant, bits, pretrained=name)
            folders.append(runs.write(model, tasks, name=f"{name}-{quant}"))
    result = build(folders, tmp_path / "site", artifacts=runs.artifacts, replicates=50)
    assert result.n_pairs == 2
    page = (tmp_path / "site" / "index.html").read_text()
    assert "clean: 60 samples, noise: 30" in page
