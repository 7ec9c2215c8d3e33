"""``bitquake selector fit`` and ``apply`` on runs as lmms-eval leaves them."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitquake import cli, selector_command
from bitquake.metrics import aurc
from bitquake.model_wrappers.quant_cards import store_card
from bitquake.model_wrappers.selector.features import Features, FeatureStore
from bitquake.model_wrappers.selector.model import Selector
from bitquake.model_wrappers.selector.training import Options
from bitquake.quant_card import QuantCard
from bitquake.reports import read_runs

D = 6
SMALL = Options(folds=2, epochs=6, hidden=8)
ARGUMENTS = ["--folds", "2", "--epochs", "6", "--hidden", "8"]


def make_card(quant: str, pretrained: str = "tiny") -> QuantCard:
    full = quant == "none"
    return QuantCard(
        pretrained=pretrained, architecture="X", dtype="bfloat16", spec_name=quant, method="none" if full else "rtn",
        execution="full-precision" if full else "simulated", kernel="", components={}, nominal_bpw=4,
        effective_bpw=4, weights_hash=f"w-{quant}",
    )  # fmt: skip


class World:
    """Runs of made-up models whose states tell whether they are right."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.artifacts = folder, folder / "artifacts"

    def run(
        self,
        quant: str,
        tasks: Sequence[str],
        *,
        n: int = 240,
        name: str = "",
        pretrained: str = "tiny",
        primary: str = "joint",
        features: bool = True,
        change: Callable[[str, int, dict[str, Any]], None] = lambda task, i, record: None,
    ) -> Path:
        """An output folder: ``n`` samples of each task, two on a picture; ``change`` may edit a record."""
        card = make_card(quant, pretrained)
        store_card(card, self.artifacts)
        store = FeatureStore(self.artifacts, card.model_hash)
        folder = self.folder / "runs" / (name or quant)
        folder.mkdir(parents=True)
        for task in tasks:
            variant = task.removeprefix("block_vqav2_")
            rng = np.random.default_rng([len(task), *task.encode(), *quant.encode()])
            states = [rng.normal(size=(n, D)).astype(np.float32) for _ in range(3)]
            joint = rng.uniform(0.3, 0.98, size=n)
            right = states[2][:, 0] - states[2][:, 1] + rng.normal(scale=0.3, size=n) > -0.3
            keys = [f"{quant}-{task}-{i}" for i in range(n)]
            if features:
                store.put(keys, Features(*states, np.ones(n, dtype=np.bool_)))
            lines = []
            for i in range(n):
                record = {
                    "version": 1, "family": "block_vqav2", "variant": variant, "task": task, "world": "block",
                    "dataset": "block_vqav2", "split": variant, "sample_id": f"{variant}-{i}",
                    "image_id": f"{variant}-{i // 2}", "protocol": "vqa", "score": float(right[i]),
                    "scores": {"iou": float(right[i]) * 0.75}, "answer": "red", "text": "red",
                    "confidence": {
                        "joint": float(joint[i]), "geometric_mean": float(joint[i]) ** 0.5, primary: float(joint[i])
                    },
                    "primary_confidence": primary, "pixel_hash": [f"{variant}{i // 2:08x}"], "prompt_hash": f"{i:x}",
                    "model_hash": card.model_hash, "card": card.content_hash,
                    "features": keys[i] if features else "",
                }  # fmt: skip
                change(task, i, record)
                # what else stands in a line must come through unharmed, whatever it looks like
                doc = {"question": 'is "confidence": {"joint": 1} a trap? ☃ \u2028', "confidence": {"joint": 0.5}}
                lines.append(
                    json.dumps({"doc_id": i, "doc": doc, "bitquake": record, "z": [1e-7]}, ensure_ascii=i % 2 > 0)
                )
            (folder / f"T_samples_{task}.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
        store.write()
        counts = {task: {"original": n, "effective": n} for task in tasks}
        arguments = f"pretrained={pretrained},quant={quant},artifacts={self.artifacts},features=true"
        results = {"n-samples": counts, "config": {"model": "bitquake_hf", "model_args": arguments}, "results": {}}
        (folder / "T_results.json").write_text(json.dumps(results), encoding="utf-8")
        return folder

    def fit(self, *runs: Path, out: str = "one.safetensors", **arguments: Any) -> Path:
        return selector_command.fit(runs, self.folder / out, SMALL, **arguments).path


DEV, CLEAN = "block_vqav2_dev", "block_vqav2_clean"


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path)


def records(folder: Path, task: str) -> list[dict[str, Any]]:
    (file,) = folder.rglob(f"*_samples_{task}.jsonl")
    return [json.loads(line)["bitquake"] for line in file.read_text(encoding="utf-8").split("\n") if line]


def test_from_dev_to_report(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.run("rtn-int4", [DEV, CLEAN], n=800)
    file, out = tmp_path / "own.safetensors", tmp_path / "out"
    arguments = ["--folds", "2", "--epochs", "30", "--hidden", "16"]
    assert cli.main(["selector", "fit", str(run), "--out", str(file), *arguments]) == 0
    said = capsys.readouterr().out
    assert "800 samples of block_vqav2_dev" in said and "MaxProb" in said and "left out   none" in said
    card = Selector.load(file).card
    assert (card.name, card.subject, card.joint, card.hidden_size) == ("selector", "tiny", "joint", D)
    assert [one.weights_hash for one in card.trained_on] == ["w-rtn-int4"]

    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file()}
    assert cli.main(["selector", "apply", str(file), str(run), "--out", str(out)]) == 0
    said = capsys.readouterr().out
    assert "800 confidences added" in said
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file()} == before, "the originals stay"

    judged = records(out, CLEAN)
    plain, learned = ([r["confidence"][name] for r in judged] for name in ("joint", "selector"))
    score = [r["score"] for r in judged]
    assert aurc(score, learned) < aurc(score, plain) - 0.05
    (cell,) = (run.cells[CLEAN] for run in read_runs([out]).runs)
    assert [answer.confidences["selector"] for answer in cell.answers.values()] == [
        r["confidence"]["selector"] for r in sorted(judged, key=lambda r: r["sample_id"])
    ]


def test_all_but_the_added_entries_is_the_original_byte_for_byte(world: World, tmp_path: Path) -> None:
    run = world.run("rtn-int4", [DEV, CLEAN])
    selector_command.apply([world.fit(run)], [run], tmp_path / "out")
    copied = tmp_path / "out" / "rtn-int4"
    for name in ("T_results.json", f"T_samples_{DEV}.jsonl"):
        assert (copied / name).read_bytes() == (run / name).read_bytes()
    lines = zip(
        (run / f"T_samples_{CLEAN}.jsonl").read_text(encoding="utf-8").split("\n"),
        (copied / f"T_samples_{CLEAN}.jsonl").read_text(encoding="utf-8").split("\n"),
        strict=True,
    )
    n = 0
    for old, new in lines:
        if old:
            value = json.loads(new)["bitquake"]["confidence"]["selector"]
            assert new.replace(f', "selector": {value!r}', "") == old
            n += 1
    assert n == 240


def test_apply_is_predict_and_once_more_changes_nothing(world: World, tmp_path: Path) -> None:
    run = world.run("rtn-int4", [DEV, CLEAN])
    file = world.fit(run)
    for _ in range(2):
        selector_command.apply([file], [run], tmp_path / "out")
    once = {p.name: p.read_bytes() for p in (tmp_path / "out" / "rtn-int4").iterdir()}
    selector_command.apply([file], [tmp_path / "out" / "rtn-int4"], tmp_path / "again")
    assert {p.name: p.read_bytes() for p in (tmp_path / "again" / "rtn-int4").iterdir()} == once
    assert [p.name for p in (tmp_path / "out").iterdir()] == ["rtn-int4"], "nothing is left of the folder replaced"

    from bitquake.model_wrappers.selector.features import load_features

    judged = records(tmp_path / "out", CLEAN)
    features = load_features(world.artifacts, judged[0]["model_hash"], [r["features"] for r in judged])
    joint = np.array([r["confidence"]["joint"] for r in judged])
    told = Selector.load(file).predict(features, joint, np.log(joint) / 2)
    np.testing.assert_allclose([r["confidence"]["selector"] for r in judged], told, atol=1e-9)


def test_own_transfer_and_mixture_side_by_side(world: World, tmp_path: Path) -> None:
    full, low = (world.run(quant, [DEV, CLEAN]) for quant in ("none", "rtn-int4"))
    files = [
        world.fit(full, out="transfer.safetensors"),
        world.fit(full, out="full.safetensors", name="selector"),
        world.fit(low, out="low.safetensors"),
        world.fit(full, low, out="mixture.safetensors"),
    ]
    cards = [Selector.load(file).card for file in files]
    assert [card.name for card in cards] == ["selector_transfer", "selector", "selector", "selector_mixture"]
    assert [len(card.trained_on) for card in cards] == [1, 1, 1, 2]
    done = selector_command.apply(files, [full, low], tmp_path / "out")
    assert {(row.quant, row.name): row.n for row in done if row.name} == {
        (quant, name): 240
        for quant in ("none", "rtn-int4")
        for name in ("selector", "selector_transfer", "selector_mixture")
    }
    judged = {quant: records(tmp_path / "out" / quant, CLEAN) for quant in ("none", "rtn-int4")}
    of_full = [(r["confidence"]["selector"], r["confidence"]["selector_transfer"]) for r in judged["none"]]
    assert all(own == transferred for own, transferred in of_full), "one fit under two names"
    of_low = [(r["confidence"]["selector"], r["confidence"]["selector_transfer"]) for r in judged["rtn-int4"]]
    assert all(own != transferred for own, transferred in of_low)


def test_failures_are_left_out_counted_and_get_no_confidence(world: World, tmp_path: Path) -> None:
    def change(task: str, i: int, record: dict[str, Any]) -> None:
        if i < 6:
            record |= {"failure": "model", "score": 0.0, "confidence": {}, "features": ""}
        elif i < 10:
            record["features"] = ""
        elif i == 10:
            record["confidence"] = {"joint": None}

    run = world.run("rtn-int4", [DEV, CLEAN], change=change)
    done = selector_command.fit([run], tmp_path / "one.safetensors", SMALL)
    told = {"failed (model)": 6, "without features": 4, "without a confidence": 1}
    assert done.selector.card.n_left_out == told
    assert done.selector.card.validation.n == 240 - 11
    (row,) = (r for r in selector_command.apply([done.path], [run], tmp_path / "out") if r.task == CLEAN)
    assert (row.n, row.n_without) == (229, 11)
    judged = records(tmp_path / "out", CLEAN)
    assert [r["confidence"]["selector"] for r in judged[:11]] == [None] * 11
    assert all(0 <= r["confidence"]["selector"] <= 1 for r in judged[11:])


def test_iou_as_target(world: World, tmp_path: Path) -> None:
    run = world.run("rtn-int4", [DEV], primary="box_joint")
    card = Selector.load(world.fit(run, target="iou")).card
    assert (card.target, card.joint) == ("iou", "box_joint")
    told = card.validation
    assert told.aurc_maxprob == pytest.approx(
        aurc([r["scores"]["iou"] for r in records(run, DEV)], [r["confidence"]["box_joint"] for r in records(run, DEV)])
    )


def test_a_task_of_another_confidence_is_left_as_it_is(world: World, tmp_path: Path) -> None:
    file = world.fit(world.run("rtn-int4", [DEV]))

    def boxes(task: str, i: int, record: dict[str, Any]) -> None:
        if task == "block_vqav2_boxes":
            record["primary_confidence"] = "box_joint"

    run = world.run("rtn-int4", [CLEAN, "block_vqav2_boxes"], name="test", change=boxes)
    done = {row.task: row for row in selector_command.apply([file], [run], tmp_path / "out")}
    assert done[CLEAN].n == 240
    assert done["block_vqav2_boxes"].why == "its confidence is box_joint, the Selectors judge joint"
    name = "T_samples_block_vqav2_boxes.jsonl"
    assert (tmp_path / "out" / "test" / name).read_bytes() == (run / name).read_bytes()


def said_by(arguments: Sequence[object], capsys: pytest.CaptureFixture[str]) -> str:
    """What a command that must be refused says."""
    capsys.readouterr()
    assert cli.main([str(one) for one in arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    return captured.err


def test_what_cannot_be_fitted_is_refused_by_name(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fit: list[object] = ["selector", "fit", "--out", tmp_path / "x.safetensors", *ARGUMENTS]
    run = world.run("rtn-int4", [DEV, CLEAN])
    full = world.run("none", [DEV])
    test_only = world.run("rtn-int3", [CLEAN])
    plain = world.run("rtn-int8", [DEV], features=False)
    other = world.run("rtn-int2", [DEV], pretrained="other")
    boxes = world.run("rtn-int4", [DEV], name="boxes", primary="box_joint", n=120)
    few = world.run("rtn-int5", [DEV], n=40)
    (tmp_path / "empty").mkdir()

    assert "no *_dev task (block_vqav2_clean)" in said_by([*fit, test_only], capsys)
    assert "block_vqav2_clean: is no *_dev task" in said_by([*fit, run, "--tasks", CLEAN], capsys)
    assert "--tasks vqav2_dev: the runs have block_vqav2_clean, block_vqav2_dev" in said_by(
        [*fit, run, "--tasks", "vqav2_dev"], capsys
    )
    assert "features=true" in said_by([*fit, plain], capsys)
    assert "several models (other, tiny)" in said_by([*fit, run, other], capsys)
    assert "40 answered samples on 20 pictures are too few" in said_by([*fit, few], capsys)
    assert "holds no samples" in said_by([*fit, tmp_path / "empty"], capsys)
    assert "does not exist" in said_by([*fit, tmp_path / "nowhere"], capsys)
    assert "give selector" in said_by([*fit, run, "--name", "selector_transfer"], capsys)
    assert "give selector or selector_transfer" in said_by([*fit, full, "--name", "selector_mixture"], capsys)
    assert "--name mine: expected one of" in said_by([*fit, full, "--name", "mine"], capsys)
    assert "--project 18" in said_by([*fit, full, "--project", "18"], capsys)
    assert "--artifacts DIR" in said_by([*fit, run, "--artifacts", tmp_path / "empty"], capsys)
    assert "second, different answer" in said_by([*fit, run, boxes], capsys)
    assert not (tmp_path / "x.safetensors").exists()

    assert cli.main([str(one) for one in [*fit, run, "--tasks", CLEAN, "--allow-task"]]) == 0
    assert (tmp_path / "x.safetensors").exists()


def test_two_kinds_of_confidence_need_two_selectors(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def boxes(task: str, i: int, record: dict[str, Any]) -> None:
        if task == "block_boxes_dev":
            record |= {"primary_confidence": "box_joint", "variant": "dev", "sample_id": f"box-{i}"}
            record["confidence"]["box_joint"] = record["confidence"]["joint"]

    run = world.run("rtn-int4", [DEV, "block_boxes_dev"], change=boxes)
    fit = ["selector", "fit", run, "--out", tmp_path / "x.safetensors", *ARGUMENTS]
    said = said_by(fit, capsys)
    assert "box_joint (block_boxes_dev), joint (block_vqav2_dev)" in said and "--tasks" in said
    assert cli.main([str(one) for one in [*fit, "--tasks", "block_boxes_dev"]]) == 0


def test_what_cannot_be_applied_is_refused_and_leaves_nothing(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.run("rtn-int4", [DEV, CLEAN])
    own = world.fit(run)
    out = tmp_path / "out"
    apply: list[object] = ["selector", "apply", "--out", out]
    other = world.run("rtn-int3", [CLEAN])
    plain = world.run("rtn-int4", [CLEAN], name="plain", features=False)
    stranger = world.run("rtn-int4", [CLEAN], name="stranger", pretrained="stranger")

    assert "of other quantizations than rtn-int3" in said_by([*apply, own, other], capsys)
    assert "no features were kept" in said_by([*apply, own, plain], capsys)
    assert "fitted on tiny; this run is of stranger" in said_by([*apply, own, stranger], capsys)
    assert "output folder of a run is missing" in said_by([*apply, own], capsys)
    assert "a file of `bitquake selector fit` is missing" in said_by([*apply, run], capsys)
    assert "two Selectors are called selector" in said_by([*apply, own, own, run], capsys)
    assert "is no selector" in said_by([*apply, next(world.artifacts.rglob("shard-*")), run], capsys)
    for place in (run, run.parent, run / "inside"):
        assert "written over or into it" in said_by(["selector", "apply", own, run, "--out", place], capsys)
    (tmp_path / "mine" / "rtn-int4").mkdir(parents=True)
    assert "was not written by `selector apply`" in said_by(
        ["selector", "apply", own, run, "--out", tmp_path / "mine"], capsys
    )
    assert not out.exists() or not list(out.iterdir())

    def seen(task: str, i: int, record: dict[str, Any]) -> None:
        if i == 9:
            record["pixel_hash"] = [f"dev{7:08x}"]

    leaky = world.run("rtn-int4", [CLEAN], name="leaky", change=seen)
    said = said_by([*apply, own, leaky], capsys)
    assert "line 10" in said and "pixels:dev00000007" in said and "fitted on (block_vqav2_dev)" in said
    assert not list(out.iterdir())


def test_another_selectors_confidence_is_not_overwritten(
    world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = world.run("rtn-int4", [DEV, CLEAN])
    first = world.fit(run)
    second = selector_command.fit(
        [run], tmp_path / "two.safetensors", Options(folds=2, epochs=6, hidden=8, seed=5)
    ).path
    selector_command.apply([first], [run], tmp_path / "out")
    said = said_by(["selector", "apply", second, tmp_path / "out" / "rtn-int4", "--out", tmp_path / "next"], capsys)
    assert "has a confidence selector already, by another Selector" in said


def test_a_line_cut_short_is_named(world: World, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    run = world.run("rtn-int4", [DEV, CLEAN])
    file = run / f"T_samples_{CLEAN}.jsonl"
    file.write_bytes(file.read_bytes()[:-50])
    said = said_by(["selector", "apply", world.fit(run), run, "--out", tmp_path / "out"], capsys)
    assert f"T_samples_{CLEAN}.jsonl, line 240" in said and "cut short" in said
