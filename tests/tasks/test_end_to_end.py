"""Through the real lmms-eval: tasks that the plugin registered, real parquet files, models that are not ours."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest

from bitquake.envelope import Envelope
from bitquake.metrics import evaluate
from bitquake.noise import ImageError, SampleKey, apply, load_rgb, move_box, pixel_hash
from bitquake.records import SampleRecord
from bitquake.tasks.contract import CANDIDATES
from bitquake.tasks.expand import task_files
from bitquake.tasks.families import load_family
from bitquake.tasks.scoring.caption import tokenize
from bitquake.tasks.scoring.grounding import iou

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


def expanded(folder: Path, cache: Path) -> Path:
    """The folder of a family's task files, that of no other family."""
    into = cache / folder.name
    into.mkdir(parents=True, exist_ok=True)
    for name, text in task_files(load_family(folder / "family.yaml")).items():
        (into / name).write_text(text)
    return into


def run(folder: Path, tasks: list[str], model: Any, cache: Path, **kwargs: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(expanded(folder, cache)), include_defaults=False)
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
    root = expanded(family, tmp_path / "cache")
    file = root / "tiny_fog_5.yaml"
    text = file.read_text()
    assert "  default:\n" in text
    other = "  some_model: {pre_prompt: '', post_prompt: ' Answer:'}\n"
    file.write_text(text.replace("  default:\n", f"{other}  default:\n"))
    manager = TaskManager(include_path=str(root), include_defaults=False, model_name="another_model")
    assert manager.load_task_or_group(["tiny_fog_5"], "chat")
    manager = TaskManager(include_path=str(root), include_defaults=False, model_name="some_model")
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


CAPTIONS = """
family: {name}
dataset: {{files: {{test: test.parquet, threshold: threshold.parquet}}}}
splits: {{test: test, threshold: threshold}}
columns: {{captions: captions, sample_id: question_id, image_id: image_id}}
protocol: PROTOCOL
text: {{template: "Describe picture number one."}}
variants: {{noise: {{names: [fog], severities: [5], mode: scaled, subset: {{n: 4}}}}}}
"""


def captioned(rows: Callable[..., list[dict[str, Any]]], n: int = 10) -> list[dict[str, Any]]:
    shapes = ("circle", "square", "star", "cross")
    kept = ("question_id", "image_id", "image")
    return [
        {key: row[key] for key in kept}
        | {"captions": [f"a {shapes[i % 4]} number {i}", f"there is a {shapes[i % 4]}, number {i}."]}
        for i, row in enumerate(rows(n))
    ]


class Ranks(WithEnvelopes):
    """Scores the candidates of a retrieval row: the own caption is the best for odd rows, the third for others."""

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            doc_to_messages(doc)
            own = next(i for i, text in enumerate(doc[CANDIDATES]) if text in doc["captions"])
            scores = [-10.0 - i for i in range(len(doc[CANDIDATES]))]
            others = sorted((score for i, score in enumerate(scores) if i != own), reverse=True)
            scores[own] = others[0] + 0.5 if doc["question_id"] % 2 else (others[1] + others[2]) / 2
            envelope = Envelope(text="", candidate_scores=scores, confidence={"candidates": 0.5 + doc_id / 100})
            answers.append(envelope.encode())
        return answers


class Captions(OddIsYes):
    def answer(self, text: str) -> str:
        return "A circle number 0"


def test_captions_through_lmms_eval(
    make_family: MakeFamily, rows: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    made = captioned(rows)
    family = make_family("captions", CAPTIONS.replace("PROTOCOL", "caption"), test=made, threshold=made[:3])
    tasks = ["captions_clean", "captions_fog_5", "captions_fog_5_full"]
    results = run(family, tasks, Captions(), tmp_path / "cache")
    cider = pytest.importorskip("pycocoevalcap.cider.cider").Cider()
    tokens = [[" ".join(tokenize(text)) for text in row["captions"]] for row in made]
    said = " ".join(tokenize("A circle number 0"))
    mean, each = cider.compute_score(dict(enumerate(tokens)), {i: [said] for i in range(10)})
    table = results["results"]["captions_clean"]
    assert table["cider,none"] == pytest.approx(mean) and mean > 0.5
    low, high = table["cider_ci,none"].strip("[]").split(", ")
    assert float(low) <= mean <= float(high)
    assert table["accuracy,none"] == pytest.approx(mean / 10)
    # A subset is scored by the same document frequencies.
    for task, n in zip(tasks, (10, 4, 10), strict=True):
        records = [SampleRecord.model_validate(line["bitquake"]) for line in results["samples"][task]]
        assert len(records) == n
        for record in records:
            assert 10 * record.score == pytest.approx(each[int(record.sample_id)], abs=1e-9)
    limited = run(family, ["captions_clean"], Captions(), tmp_path / "cache", limit=2)
    assert limited["results"]["captions_clean"]["cider,none"] == pytest.approx(float(np.mean(each[:2])))


def test_retrieval_through_lmms_eval(
    make_family: MakeFamily, rows: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    made = captioned(rows)
    protocol = "retrieval\ncandidates: {{n: 4, seed: 1}}"
    text = CAPTIONS.replace("PROTOCOL", protocol).replace("image_id: image_id", "image_id: question_id")
    family = make_family("retrieval", text, test=made, threshold=made[:4])
    results = run(family, ["retrieval_clean", "retrieval_fog_5"], Ranks(), tmp_path / "cache")
    table = results["results"]["retrieval_clean"]
    assert table["recall_1_of_4,none"] == table["accuracy,none"] == 0.5
    assert table["reciprocal_rank,none"] == pytest.approx((5 * 1 + 5 / 3) / 10)
    assert not any("recall_5" in key for key in table)
    records = [SampleRecord.model_validate(line["bitquake"]) for line in results["samples"]["retrieval_fog_5"]]
    assert [record.score for record in records] == [float(int(record.sample_id) % 2) for record in records]
    assert {record.primary_confidence for record in records} == {"candidates"} and len(records) == 4
    assert all(record.primary is not None for record in records)
    # A model that writes text is told from one that ranks badly.
    plain = run(family, ["retrieval_clean"], Captions(), tmp_path / "cache")
    table = plain["results"]["retrieval_clean"]
    assert (table["parse_failures,none"], table["parse_failure_rate,none"], table["accuracy,none"]) == (10, 1.0, 0.0)
    assert "a text cannot be ranked" in plain["samples"]["retrieval_clean"][0]["bitquake"]["failure_detail"]


EXPRESSIONS = """
family: {name}
dataset: {{files: {{test: test.parquet, threshold: threshold.parquet}}}}
splits: {{test: test, threshold: threshold}}
columns: {{question: sentences, box: bbox, sample_id: question_id, image_id: image_id}}
explode: sentences
protocol: grounding
coordinates: {{default: pixels}}
variants:
  noise: {{names: [rotation, word_drop], severities: [5], mode: scaled}}
  shifts: {{big: {{split: test, where: {{size: [big]}}, shift_from: clean}}}}
"""


class Boxes(OddIsYes):
    """Says where the thing is that a sentence is about; "number 3" is in the box of row 3."""

    boxes: ClassVar[dict[str, str]] = {}

    def answer(self, text: str) -> str:
        return self.boxes[re.findall(r"\d+", text)[0]]


def test_referring_expressions_through_lmms_eval(
    make_family: MakeFamily, rows: Callable[..., list[dict[str, Any]]], tmp_path: Path
) -> None:
    made = [
        {key: row[key] for key in ("question_id", "image_id", "image")}
        | {
            "sentences": [f"the thing number {i}", f"the other name of number {i}"][: 1 + i % 2],
            "bbox": [float(i), 4.0, 14.0, 12.0],
            "size": ("big", "small")[i % 2],
        }
        for i, row in enumerate(rows(6))
    ]
    family = make_family("expressions", EXPRESSIONS, test=made, threshold=made[:2])
    model = Boxes()
    model.boxes = {str(i): f"[{i}, 4, {i + 14}, 16]" for i in range(6)}
    tasks = ["expressions_clean", "expressions_rotation_5", "expressions_word_drop_5", "expressions_big"]
    results = run(family, tasks, model, tmp_path / "cache")
    found = {
        task: [SampleRecord.model_validate(line["bitquake"]) for line in results["samples"][task]] for task in tasks
    }
    clean, turned, dropped, big = (found[task] for task in tasks)
    assert [record.sample_id for record in clean] == ["0-0", "1-0", "1-1", "2-0", "3-0", "3-1", "4-0", "5-0", "5-1"]
    assert {record.score for record in clean} == {1.0}
    assert results["results"]["expressions_clean"]["iou,none"] == pytest.approx(1.0)
    assert results["results"]["expressions_clean"]["iou_ci,none"] == "[1.0000, 1.0000]"
    # Boxes where they were before the picture was turned are not quite where they are now.
    for before, after in zip(clean, turned, strict=True):
        row = int(after.sample_id.split("-")[0])
        moved = move_box(
            (row, 4, row + 14, 16), (40, 30), "rotation", severity=5, mode="scaled",
            key=SampleKey("expressions", "test", after.sample_id),
        )  # fmt: skip
        assert moved is not None
        assert after.scores["iou"] == pytest.approx(iou((row, 4, row + 14, 16), moved[0]))
        assert after.scores["iou"] < before.scores["iou"]
    shown = [text for (task, _), (text, _) in sorted(model.seen.items()) if task == "expressions_word_drop_5"]
    asked = [text for (task, _), (text, _) in sorted(model.seen.items()) if task == "expressions_clean"]
    assert (
        len(shown) == len(asked) and shown != asked and all(len(a) <= len(b) for a, b in zip(shown, asked, strict=True))
    )
    pixels = {task: [seen[1] for (t, _), seen in sorted(model.seen.items()) if t == task] for task in tasks}
    assert pixels["expressions_word_drop_5"] == pixels["expressions_clean"]
    assert not set(pixels["expressions_rotation_5"]) & set(pixels["expressions_clean"])
    assert [record.sample_id for record in big] == ["0-0", "2-0", "4-0"]
    assert {record.shift_from for record in big} == {"expressions_clean"}
    assert {record.part for record in big} == {"test, rows where size is big"}
    assert len(dropped) == 9
