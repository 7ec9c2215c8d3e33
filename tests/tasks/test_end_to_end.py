"""Through the real lmms-eval: tasks that the plugin registered, real parquet files, models that are not ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from bitquake.envelope import Envelope
from bitquake.metrics import evaluate
from bitquake.noise import ImageError, SampleKey, apply, load_rgb, pixel_hash
from bitquake.records import SampleRecord
from bitquake.tasks.expand import builtin_index

lmms_eval_model = pytest.importorskip("lmms_eval.api.model")
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402
from lmms_eval.utils import make_table  # noqa: E402

MakeFamily = Callable[..., Path]


class OddIsYes(lmms_eval_model.lmms):  # type: ignore[misc,name-defined]
    """A chat model of somebody else's: plain text, right for odd questions, and it remembers what it was shown."""

    is_simple = False

    def __init__(self) -> None:
        super().__init__()
        self.seen: dict[tuple[str, int], tuple[str, str]] = {}

    def answer(self, text: str) -> str:
        number = int(re.findall(r"\d+", text)[0]) if re.search(r"\d", text) else 0
        return "yes" if number % 2 else "maybe"

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            [message] = doc_to_messages(self.task_dict[task][split][doc_id])
            picture, text = message["content"][0]["url"], message["content"][-1]["text"]
            self.seen[task, doc_id] = (text, pixel_hash(picture))
            answers.append(self.answer(text))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


class WithEnvelopes(OddIsYes):
    """The same in envelopes with a confidence; a sample whose image fails is answered by an error."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for i, request in enumerate(requests):
            try:
                [text] = super().generate_until([request])
            except ImageError as error:
                answers.append(Envelope(text="", error=f"image: {error}").encode())
                continue
            answers.append(Envelope(text=text, confidence={"joint": 1 / (1 + i)}).encode())
        return answers


def run(folder: Path, tasks: list[str], model: Any, cache: Path, **kwargs: Any) -> dict[str, Any]:
    root = builtin_index([folder], cache).root
    manager = TaskManager(include_path=str(root / folder.name), include_defaults=False)
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, batch_size=1, **kwargs)
    assert results is not None
    return results  # type: ignore[no-any-return]


@pytest.fixture
def family(make_family: MakeFamily) -> Path:
    return make_family()


def test_plain_text_model_on_clean_noisy_and_threshold(
    family: Path, tmp_path: Path, make_picture: Callable[..., bytes]
) -> None:
    model = OddIsYes()
    results = run(family, ["tiny_clean", "tiny_noise", "tiny_threshold"], model, tmp_path / "cache")
    assert set(results["results"]) == {
        f"tiny_{name}" for name in ["clean", "threshold", "gaussian_noise_1", "gaussian_noise_5", "fog_1", "fog_5"]
    }
    for task, table in results["results"].items():
        assert table["accuracy,none"] == pytest.approx(0.5)
        assert table["bitquake,none"] == (8 if task == "tiny_threshold" else 12)
        assert table["failures,none"] == table["parse_failures,none"] == 0
        assert table["ece_15,none"] == table["ece_15_ci,none"] == "N/A"
        assert table["accuracy_stderr_clustered,none"] != "N/A"
    # The prompt is the family's, the pixels are those of the noise room, the row is the sample's.
    assert model.seen["tiny_clean", 3] == ("Q: is it 3? A:", pixel_hash(load_rgb(make_picture(1))))
    pixels = apply(load_rgb(make_picture(1)), "fog", severity=5, key=SampleKey("tiny", "test", "3"), mode="scaled")
    assert model.seen["tiny_fog_5", 3][1] == pixel_hash(pixels)
    assert len({hash_ for (task, doc), (_, hash_) in model.seen.items() if doc == 3 and task != "tiny_threshold"}) == 5
    records = [SampleRecord.model_validate(line["bitquake"]) for line in results["samples"]["tiny_fog_5"]]
    assert [record.sample_id for record in records] == [str(i) for i in range(12)]
    assert [record.score for record in records] == [0.0, 1.0] * 6
    # No pixels and no base64 text in what is logged.
    line = json.dumps(
        results["samples"]["tiny_fog_5"][0], default=lambda value: pytest.fail(f"{type(value)} in the log")
    )
    assert "input_media" not in line and len(line) < 6000


def test_envelopes_reach_the_results_table_with_intervals(family: Path, tmp_path: Path) -> None:
    results = run(family, ["tiny_gaussian_noise_5"], WithEnvelopes(), tmp_path / "cache")
    table = results["results"]["tiny_gaussian_noise_5"]
    records = [SampleRecord.model_validate(line["bitquake"]) for line in results["samples"]["tiny_gaussian_noise_5"]]
    keys = ["accuracy", "ece_15", "ece_mass_15", "brier", "auroc", "aurc"]
    keys += [f"coverage_at_risk_{risk}" for risk in (1, 5, 10, 20)]
    expected = evaluate(
        [record.score for record in records],
        [record.primary for record in records],  # type: ignore[misc]
        [record.image_id for record in records],
        metrics=keys,
        seed=0,
    )
    printed = make_table(results)
    for key in keys:
        assert table[f"{key},none"] == pytest.approx(expected[key].value), key
        if expected[key].available:
            interval = f"[{expected[key].lo:.4f}, {expected[key].hi:.4f}]"
            assert table[f"{key}_ci,none"] == interval
            assert interval in printed
        assert f"|{key}" in printed
    assert not any("phi" in key for key in table)


def test_bad_rows_are_counted_by_name_and_lose_no_other(
    make_family: MakeFamily, rows: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    made = rows(10)
    made[0]["image"] = {"bytes": b"broken", "path": None}
    made[2]["image"] = None
    made[4]["question"] = ""
    made[6]["answers"] = made[6]["answers"][:3]
    made[8]["image"] = {"bytes": made[9]["image"]["bytes"][:500], "path": None}
    family = make_family("bad", test=made, threshold=rows(4, start=500))
    results = run(family, ["bad_fog_1"], WithEnvelopes(), tmp_path / "cache")
    records = [line["bitquake"] for line in results["samples"]["bad_fog_1"]]
    assert [record["failure"] for record in records] == [
        "image", None, "image", None, "question", None, "target", None, "image", None
    ]  # fmt: skip
    assert [record["score"] for record in records] == [0, 1, 0, 1, 0, 1, 0, 1, 0, 1]
    table = results["results"]["bad_fog_1"]
    assert (table["failures,none"], table["bitquake,none"]) == (5, 5)
    assert table["accuracy,none"] == 0.5


def test_a_model_named_key_that_switches_the_noise_off_is_refused(family: Path, tmp_path: Path) -> None:
    root = builtin_index([family], tmp_path / "cache").root
    file = root / "tiny" / "tiny_fog_5.yaml"
    text = file.read_text()
    assert "  default:\n" in text
    file.write_text(text + "  some_model: {pre_prompt: '', post_prompt: ' Answer:'}\n")
    manager = TaskManager(include_path=str(root / "tiny"), include_defaults=False, model_name="another_model")
    assert manager.load_task_or_group(["tiny_fog_5"], "chat")
    manager = TaskManager(include_path=str(root / "tiny"), include_defaults=False, model_name="some_model")
    with pytest.raises(ValueError, match=r"tiny_fog_5.yaml.*this model is given noise: 'missing'.*'name': 'fog'"):
        manager.load_task_or_group(["tiny_fog_5"], "chat")


def test_a_dataset_without_a_declared_column_is_named_when_the_task_is_loaded(
    make_family: MakeFamily, rows: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    made = [{("replies" if key == "answers" else key): value for key, value in row.items()} for row in rows(2)]
    family = make_family("lacking", test=made, threshold=made)
    with pytest.raises(ValueError, match=r"columns.answers: the dataset has no column 'answers'"):
        run(family, ["lacking_clean"], OddIsYes(), tmp_path / "cache")


def test_simple_models_see_the_same_pixels(family: Path, tmp_path: Path) -> None:
    class Simple(OddIsYes):
        is_simple = True

        def generate_until(self, requests: list[Any]) -> list[str]:
            answers = []
            for request in requests:
                context, _, doc_to_visual, doc_id, task, split = request.args
                [picture] = doc_to_visual(self.task_dict[task][split][doc_id])
                self.seen[task, doc_id] = (context, pixel_hash(np.asarray(picture)))
                answers.append(self.answer(context))
            return answers

    chat, simple = OddIsYes(), Simple()
    run(family, ["tiny_fog_1"], chat, tmp_path / "cache", limit=4)
    run(family, ["tiny_fog_1"], simple, tmp_path / "cache", limit=4)
    assert chat.seen == simple.seen
    assert len(chat.seen) == 4
