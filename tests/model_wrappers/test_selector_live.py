"""``selector=PATH``: the confidence that a run gives is the one that its saved features give afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitquake.envelope import Envelope, decode
from bitquake.model_wrappers.bitquake_hf import BitquakeHF
from bitquake.model_wrappers.calibration import OverlapError
from bitquake.model_wrappers.calibration.overlap import ids_hash
from bitquake.model_wrappers.selector.features import load_features
from bitquake.model_wrappers.selector.model import (
    Member,
    Selector,
    SelectorCard,
    SelectorError,
    TrainedOn,
    Validation,
    input_width,
)
from bitquake.noise import ImageError, pixel_hash

OURS = {"bitquake": {"envelope": True, "protocol": "vqa", "confidence": "joint"}}
CHOICE = {
    "bitquake": {"envelope": True, "protocol": "choice", "confidence": "options", "letters": ["A", "B", "C", "D", "E"]}
}
D = 32


@pytest.fixture
def new(tiny_checkpoint: Path, tmp_path: Path) -> Callable[..., Any]:
    def new(**arguments: Any) -> Any:
        defaults = {"pretrained": str(tiny_checkpoint), "dtype": "float32", "device": "cpu", "batch_size": 4}
        return BitquakeHF(**{**defaults, "artifacts": str(tmp_path / "artifacts"), **arguments})

    return new


@pytest.fixture(scope="session")
def weights_hash(load: Any) -> str:
    return str(load().card.weights_hash)


@pytest.fixture
def save(tiny_checkpoint: Path, tmp_path: Path, weights_hash: str) -> Callable[..., Path]:
    """``save(file, **of its card)``: a Selector of random weights for the tiny model, on the disk."""

    def save(
        file: str = "one.safetensors",
        *,
        seed: int = 0,
        images: tuple[str, ...] = ("pixels:none",),
        quant: str = "full-precision",
        weights: str = "",
        **card: Any,
    ) -> Path:
        rng = np.random.default_rng(seed)
        d = card.get("hidden_size", D)
        sizes = [(8, input_width(d, None)), (8, 8), (1, 8)]
        members = tuple(
            Member(
                tuple(rng.normal(0, 1 / n_in**0.5, (n_out, n_in)) for n_out, n_in in sizes),  # type: ignore[arg-type]
                tuple(rng.normal(0, 0.3, n_out) for n_out, _ in sizes),  # type: ignore[arg-type]
                np.array([0.4]),
                np.array([0.1]),
            )
            for _ in range(2)
        )
        judged = Validation(n=1, n_images=1, aurc=0.1, aurc_maxprob=0.2, ece=0.1, ece_maxprob=0.1)
        run = TrainedOn(quant=quant, model_hash="m", weights_hash=weights or weights_hash, tasks=["a_dev"], n=1)
        known = {
            "name": "selector", "subject": str(tiny_checkpoint), "hidden_size": D, "joint": "joint",
            "trained_on": [run], "datasets_hash": "d", "image_ids_hash": ids_hash(images), "validation": judged,
            "options": {}, "bitquake": "0",
        }  # fmt: skip
        path = tmp_path / file
        path.parent.mkdir(exist_ok=True)
        return Selector(SelectorCard(**{**known, **card}), members, None, frozenset(images)).save(path)

    return save


def answers(model: Any, task: Any) -> list[Envelope]:
    return [decode(one) for one in task.run(model)]


def by_hand(path: Path, model: Any, found: list[Envelope], artifacts: Path) -> Any:
    """What the Selector makes of the features on disk and of the other confidences (none of them is missing here)."""
    features = load_features(artifacts, model.model_hash, [one.features for one in found])
    joint = np.array([one.confidence["joint"] for one in found], dtype=float)
    mean = np.log([one.confidence["geometric_mean"] or one.confidence["joint"] for one in found])
    return Selector.load(path).predict(features, joint, mean)


def test_live_and_afterwards_are_one(new: Any, save: Any, chat_task: Any, random_docs: Any, tmp_path: Path) -> None:
    task, path = chat_task(random_docs(30, text_only_every=6), OURS), save()
    model = new(selector=str(path), features=True, batch_size=8)
    found = answers(model, task)
    live = np.array([one.confidence["selector"] for one in found])
    assert np.abs(live - by_hand(path, model, found, tmp_path / "artifacts")).max() <= 1e-6
    assert live.min() >= 0 and live.max() <= 1 and live.std() > 0.02
    assert np.abs(live - np.array([one.confidence["joint"] for one in found])).max() > 0.05

    # answers that find features of another batch on the disk go by these
    small = new(selector=str(path), features=True, batch_size=3)
    again = answers(small, task)
    afterwards = by_hand(path, small, again, tmp_path / "artifacts")
    assert np.abs(np.array([one.confidence["selector"] for one in again]) - afterwards).max() <= 1e-6

    bare = answers(new(selector=str(path), batch_size=8, artifacts=str(tmp_path / "none")), task)
    assert [one.confidence["selector"] for one in bare] == live.tolist()
    assert not any(one.features for one in bare) and not (tmp_path / "none" / "features").exists()


def test_a_quantized_model_gives_it_too(new: Any, save: Any, chat_task: Any, random_docs: Any, tmp_path: Path) -> None:
    task = chat_task(random_docs(12), OURS)
    path = save("folder/t.safetensors", name="selector_transfer")
    quant = "rtn-int4-g64:group_size=16"
    model = new(selector=str(path.parent), features=True, quant=quant, batch_size=6)
    found = answers(model, task)
    live = [one.confidence["selector_transfer"] for one in found]
    np.testing.assert_allclose(live, by_hand(path, model, found, tmp_path / "artifacts"), atol=1e-6)
    assert [one.confidence.keys() - {"selector_transfer"} for one in found] == [
        one.confidence.keys() for one in answers(new(quant=quant), task)
    ]


def test_several_with_a_plus(new: Any, save: Any, chat_task: Any, random_docs: Any, log: list[str]) -> None:
    paths = [save("a.safetensors"), save("b.safetensors", seed=1, name="selector_mixture"), save("c+d.safetensors")]
    found = answers(new(selector=f"{paths[0]}+{paths[1]}"), chat_task(random_docs(4), OURS))
    values = [(one.confidence["selector"], one.confidence["selector_mixture"]) for one in found]
    assert all(a != b for a, b in values)
    assert sum("confidence 'selector" in line and "hash" in line for line in log) == 2
    alone = answers(new(selector=str(paths[2])), chat_task(random_docs(4), OURS))
    assert [one.confidence["selector"] for one in alone] == [a for a, _ in values]


def test_it_judges_only_tasks_of_its_own_confidence(new: Any, save: Any, chat_task: Any, random_docs: Any) -> None:
    docs = random_docs(6)
    save("both/a.safetensors")
    path = save("both/b.safetensors", seed=1, joint="options")
    model = new(selector=str(path.parent))
    free, choice = answers(model, chat_task(docs, OURS)), answers(model, chat_task(docs, CHOICE))
    lone = answers(new(selector=str(path)), chat_task(docs, OURS))
    assert all(one.confidence["selector"] is not None for one in free)
    assert not any("selector" in one.confidence for one in lone)
    # an answer that is no letter has no options confidence, and so none of the Selector's
    assert all((one.confidence["selector"] is None) == (one.confidence["options"] is None) for one in choice)


def test_failures_and_plain_answers_get_none(
    new: Any, save: Any, chat_task: Any, random_docs: Any, log: list[str]
) -> None:
    docs = random_docs(6)
    docs[2]["image"] = ImageError("image: gone")
    model = new(selector=str(save()))
    found = answers(model, chat_task(docs, OURS))
    assert [one.confidence.get("selector") is not None for one in found] == [i != 2 for i in range(6)]
    assert found[2].confidence == {}
    assert not any(text.startswith("{") for text in chat_task(random_docs(3), None).run(model))
    assert any("task 'task' asks for no envelope: no features" in line for line in log)


@pytest.mark.parametrize("by", ["pixels", "pixels of a noisy variant's clean picture"])
def test_a_picture_that_it_was_fitted_on_ends_the_run(
    by: str, new: Any, save: Any, chat_task: Any, random_docs: Any
) -> None:
    docs = random_docs(6)
    path = save(images=(f"pixels:{pixel_hash(docs[4]['image'])}",))
    if by != "pixels":  # the row holds the clean picture, the model is shown another one
        docs[4] = {**docs[4], "clean": docs[4]["image"], "image": docs[3]["image"]}
    model = new(selector=str(path))
    with pytest.raises(
        OverlapError, match=r"task 'task', document 4: its picture pixels:\w+ .* selector was fitted on"
    ):
        chat_task(docs, OURS).run(model)
    assert len(chat_task(docs[:4], OURS).run(model)) == 4


def test_a_selector_of_another_model_is_refused(new: Any, save: Any, tiny_checkpoint: Path) -> None:
    with pytest.raises(SelectorError, match=f"fitted on other/model; this run is of {tiny_checkpoint}"):
        new(selector=str(save(subject="other/model")))
    with pytest.raises(SelectorError, match=f"states of 24 numbers, those of {tiny_checkpoint} have 32"):
        new(selector=str(save(hidden_size=24)))
    path = save(weights="other", quant="rtn-int4-g64")
    with pytest.raises(SelectorError, match=f"selector={path}: selector: fitted on rtn-int4-g64, and this run is of"):
        new(selector=str(path))
    assert new(selector=str(save(weights="other", name="selector_transfer")))._emitters


def test_a_folder_may_hold_other_quantizations_own(
    new: Any, save: Any, chat_task: Any, random_docs: Any, log: list[str]
) -> None:
    own = save("all/own.safetensors")
    save("all/int4.safetensors", weights="other", quant="rtn-int4-g64", seed=1)
    task = chat_task(random_docs(3), OURS)
    assert answers(new(selector=str(own.parent)), task) == answers(new(selector=str(own)), task)
    assert sum("int4.safetensors is another quantization's own" in line for line in log) == 1
    lone = save("lone/int4.safetensors", weights="other", quant="rtn-int4-g64")
    with pytest.raises(SelectorError, match="lone: its 1 files are other quantizations' own Selectors, none is for"):
        new(selector=str(lone.parent))
    save("all/strange.safetensors", subject="other/model")
    with pytest.raises(SelectorError, match=r"strange\.safetensors: selector: fitted on other/model"):
        new(selector=str(own.parent))


def test_paths_that_do_not_do(new: Any, save: Any, tmp_path: Path) -> None:
    with pytest.raises(SelectorError, match="is not there"):
        new(selector=str(tmp_path / "nothing.safetensors"))
    (tmp_path / "empty").mkdir()
    with pytest.raises(SelectorError, match=r"empty: holds no \*\.safetensors"):
        new(selector=str(tmp_path / "empty"))
    one, other = save("a.safetensors"), save("b.safetensors", seed=1)
    with pytest.raises(SelectorError, match=r"a\.safetensors and .*b\.safetensors both give the confidence 'selector'"):
        new(selector=f"{one}+{other}")
    damaged = tmp_path / "damaged.safetensors"
    damaged.write_bytes(one.read_bytes()[:-9])
    with pytest.raises(SelectorError, match=r"damaged\.safetensors"):
        new(selector=str(damaged))


def test_a_journal_belongs_to_its_selectors(
    new: Any, save: Any, chat_task: Any, random_docs: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    task, journal, path = chat_task(random_docs(8), OURS), str(tmp_path / "journal"), save()
    runs, batches = [], []
    for step in ("first", "again", "another", "none"):
        if step == "another":
            save(seed=5)  # another Selector under the same name
        model = new(journal=journal, selector=None if step == "none" else str(path))
        generate, calls = model._model.generate, []
        monkeypatch.setattr(
            model._model, "generate", lambda generate=generate, calls=calls, **kw: calls.append(1) or generate(**kw)
        )
        runs.append([one.confidence.get("selector") for one in answers(model, task)])
        batches.append(len(calls))
    assert batches == [2, 0, 2, 2]
    assert runs[0] == runs[1] and all(a != b for a, b in zip(runs[1], runs[2], strict=True))
    assert runs[3] == [None] * 8
