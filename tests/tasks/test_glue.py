"""What lmms-eval's calls of a task give: pictures, prompts, records, and every kind of failure."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bitquake.envelope import Envelope
from bitquake.noise import ImageError, SampleKey, apply, load_rgb
from bitquake.records import SampleRecord
from bitquake.tasks import aggregate
from bitquake.tasks.documents import IDS
from bitquake.tasks.expand import task_files
from bitquake.tasks.families import FamilyError, load_family
from bitquake.tasks.glue import Task, functions_of, read_task

IDS_OF = {"sample_id": "s1", "image_id": "i1", "width": 64, "height": 64, "subset": ""}
VQA = """
family: tiny
world: block
dataset: {files: {test: t.parquet, threshold: h.parquet}}
splits: {test: test, threshold: threshold}
columns: {answers: answers}
protocol: vqa
variants: {noise: {names: [fog], severities: [3]}}
"""
CHOICE = """
family: tiny
dataset: {path: someone/science}
splits: {test: test, threshold: val}
columns: {choices: choices, answer: answer, hint: hint}
protocol: choice
text: {template: "{hint}{question}\\n{choices}", hint: "Context: {hint}\\n"}
prompts: {default: {pre_prompt: "<", post_prompt: ">"}}
"""
BOX = """
family: tiny
dataset: {path: someone/boxes}
splits: {test: test, threshold: val}
columns: {box: bbox}
protocol: grounding
coordinates: {default: SPACE}
"""


def task_in(folder: Path, yaml: str, task: str = "tiny_clean") -> Task:
    (folder / "family.yaml").write_text(yaml)
    for name, text in task_files(load_family(folder / "family.yaml")).items():
        (folder / name).write_text(text)
    return read_task(folder / f"{task}.yaml")


@pytest.fixture
def make_task(tmp_path: Path) -> Callable[..., Task]:
    return lambda yaml, task="tiny_clean": task_in(tmp_path, yaml, task)


MakeTask = Callable[..., Task]


def vqa_doc(**changes: Any) -> dict[str, Any]:
    return {"question": "is it?", "answers": [{"answer": "yes"}] * 10, "image": None, IDS: IDS_OF} | changes


def kwargs_of(task: Task) -> dict[str, Any]:
    return {"noise": task.noise_as_written}


def test_the_picture_is_corrupted_by_the_sample(make_task: MakeTask, make_picture: Callable[..., bytes]) -> None:
    clean, foggy = make_task(VQA), make_task(VQA, "tiny_fog_3")
    doc = vqa_doc(image=make_picture(1))
    [picture] = clean.doc_to_visual(doc, kwargs_of(clean))
    assert picture.mode == "RGB"
    assert np.array_equal(np.asarray(picture), load_rgb(make_picture(1)))
    [noisy] = foggy.doc_to_visual(doc, kwargs_of(foggy))
    expected = apply(load_rgb(make_picture(1)), "fog", severity=3, key=SampleKey("tiny", "test", "s1"))
    assert np.array_equal(np.asarray(noisy), expected)
    assert not np.array_equal(np.asarray(noisy), np.asarray(picture))
    [other] = foggy.doc_to_visual(doc | {IDS: IDS_OF | {"sample_id": "s2"}}, kwargs_of(foggy))
    assert not np.array_equal(np.asarray(noisy), np.asarray(other))


@pytest.mark.parametrize("image", [None, b"", b"broken", "truncated"])
def test_a_missing_or_corrupt_image_names_task_and_sample(
    make_task: MakeTask, make_picture: Callable[..., bytes], image: bytes | str | None
) -> None:
    task = make_task(VQA)
    data = make_picture(1)[:200] if image == "truncated" else image
    with pytest.raises(ImageError, match=r"image: .*task tiny_clean, sample s1"):
        task.doc_to_visual(vqa_doc(image=data), kwargs_of(task))


def test_a_row_of_text_only_is_a_question_where_the_family_says_so(make_task: MakeTask) -> None:
    task = make_task(VQA + "text_only_rows: true\n")
    assert task.doc_to_visual(vqa_doc(), kwargs_of(task)) == []


@pytest.mark.parametrize("kwargs", [None, {}, {"pre_prompt": "x"}, {"noise": None}, {"noise": {"name": "fog"}}])
def test_a_mapping_that_would_switch_the_noise_off_is_refused(make_task: MakeTask, kwargs: Any) -> None:
    task = make_task(VQA, "tiny_fog_3")
    for call in (task.doc_to_visual, task.doc_to_text):
        with pytest.raises(FamilyError, match=r"tiny_fog_3.yaml.*A key named after a model replaces `default`"):
            call(vqa_doc(), kwargs)


def test_a_clean_task_refuses_noise_that_its_records_would_not_show(make_task: MakeTask) -> None:
    task = make_task(VQA)
    with pytest.raises(FamilyError, match="replaces `default`"):
        task.doc_to_text(vqa_doc(), {"noise": {"name": "fog", "severity": 3}})


def test_the_question_text(make_task: MakeTask) -> None:
    task = make_task(CHOICE)
    doc = {
        "question": "which {hint}?",
        "choices": ["red", "blue"],
        "answer": 1,
        "hint": "h",
        IDS: IDS_OF,
        "image": None,
    }
    kwargs = kwargs_of(task) | {"pre_prompt": "<", "post_prompt": ">"}
    assert task.doc_to_text(doc, kwargs) == "<Context: h\nwhich {hint}?\nA. red\nB. blue>"
    assert task.doc_to_text(doc | {"hint": ""}, kwargs) == "<which {hint}?\nA. red\nB. blue>"
    assert task.doc_to_text(doc | {"hint": None, "choices": None}, kwargs) == "<which {hint}?\n>"
    assert task.doc_to_target(doc) == "B"
    assert task.doc_to_target(doc | {"answer": 7}) == ""


def test_the_built_in_science_prompt_is_the_one_the_reference_model_is_trained_on(tmp_path: Path) -> None:
    questions = pytest.importorskip("bitquake.tasks.world.questions")
    from bitquake.tasks.families import BUILT_IN

    loaded = load_family(BUILT_IN / "block_scienceqa" / "family.yaml")
    for name, text in task_files(loaded).items():
        (tmp_path / name).write_text(text)
    task = read_task(tmp_path / "block_scienceqa_clean.yaml")
    made = questions.ScienceQuestion("a hint.", "which one?", ("red", "blue", "cyan"), 1, "topic", "skill")
    doc = {"hint": made.hint, "question": made.text, "choices": list(made.choices), "answer": 1, IDS: IDS_OF}
    assert task.doc_to_text(doc, kwargs_of(task)) == questions.science_prompt(made)


def test_a_vqa_record(make_task: MakeTask) -> None:
    task = make_task(VQA, "tiny_fog_3")
    envelope = Envelope(
        text="Yes", confidence={"joint": 0.7}, pixel_hash=["p"], prompt_hash="q", model_hash="m", card="c", n_tokens=2
    )
    values = task.process_results(vqa_doc(), [envelope.encode()])
    record = SampleRecord.model_validate(values["bitquake"])
    assert record.score == 1.0
    assert record.scores == {"reliable_vqa": 0.0, "lmms_eval": 1.0}
    assert (record.family, record.variant, record.task) == ("tiny", "fog_3", "tiny_fog_3")
    assert (record.dataset, record.split, record.sample_id, record.image_id) == ("tiny", "test", "s1", "i1")
    assert record.noise == {"name": "fog", "severity": 3, "seed": 0, "version": 1, "mode": "native"}
    assert (record.pixel_hash, record.prompt_hash, record.model_hash, record.card) == (["p"], "q", "m", "c")
    assert record.primary == 0.7
    assert values["accuracy"] == {"accuracy": 1.0, "score": 1.0, "image_id": "i1"}
    assert values["ece_15"] == values["ece_15_ci"] == [1.0, 0.7, "i1"]
    assert values["failures"] == values["parse_failures"] == [0]
    json.dumps(values)


def test_plain_text_of_any_other_model_has_accuracy_only(make_task: MakeTask) -> None:
    values = make_task(VQA).process_results(vqa_doc(), ["yes"])
    assert values["bitquake"]["score"] == 1.0
    assert values["bitquake"]["confidence"] == {}
    assert values["brier"] == [1.0, None, "i1"]


def test_a_choice_record_takes_the_probability_of_the_letter_that_was_read(make_task: MakeTask) -> None:
    task = make_task(CHOICE)
    doc = {"question": "which?", "choices": ["red", "blue"], "answer": 1, "hint": "", IDS: IDS_OF}
    probabilities = {"A": 0.6, "B": 0.4}
    envelope = Envelope(text="(B)", confidence={"joint": 0.9, "options": 0.6}, option_probabilities=probabilities)
    record = task.record(doc, envelope.encode())
    assert (record.score, record.answer) == (1.0, "B")
    assert record.scores == {"strict": 0.0, "lenient": 1.0, "letter": 0.0}
    assert record.primary_confidence == "options"
    assert record.primary == 0.4
    record = task.record(doc, "no idea")
    assert record.parse_failure and record.score == 0.0 and record.failure is None


@pytest.mark.parametrize(
    ("space", "text", "processed"),
    [
        ("pixels", "[8, 8, 24, 24]", []),
        ("pixels", "[8, 8, 24, 24]", [(128, 128)]),
        ("unit", "[0.125, 0.125, 0.375, 0.375]", []),
        ("thousand", "(125,125),(375,375)", []),
        ("processed", "[16, 32, 48, 96]", [(128, 256)]),
    ],
)
def test_a_box_record(make_task: MakeTask, space: str, text: str, processed: list[tuple[int, int]]) -> None:
    task = make_task(BOX.replace("SPACE", space))
    doc = {"question": "the dog", "bbox": [8.0, 8.0, 16.0, 16.0], IDS: IDS_OF}
    record = task.record(doc, Envelope(text=text, processed_sizes=processed, confidence={"box_joint": 0.5}).encode())
    assert record.score == 1.0
    assert record.scores["iou"] == pytest.approx(1.0)
    assert record.answer == "[8, 8, 24, 24]"
    assert record.primary == 0.5
    assert task.doc_to_target(doc) == "[8, 8, 24, 24]"


@pytest.mark.parametrize(
    ("changes", "response", "failure", "detail"),
    [
        ({"question": ""}, "yes", "question", "is empty"),
        ({"question": None}, "yes", "question", "is empty"),
        ({"question": " \n"}, Envelope(text="", error="model: x").encode(), "question", "is empty"),
        ({"answers": None}, "yes", "target", "holds no answers"),
        ({"answers": []}, "yes", "target", "holds no answers"),
        ({"answers": ["yes"] * 3}, "yes", "target", "10 annotators, got 3"),
        ({"answers": [{"answer": None}] * 10}, "yes", "target", "expected texts"),
        ({}, Envelope(text="", error="image: does not decode").encode(), "image", "does not decode"),
        ({}, Envelope(text="", error="question: no").encode(), "question", "question: no"),
        ({}, Envelope(text="", error="out of memory").encode(), "model", "out of memory"),
        ({}, Envelope(text="yes").encode()[:40], "envelope", "damaged"),
        ({}, '{"bitquake_envelope":{"version":99}}', "envelope", "expected version 1, got 99"),
    ],
)
def test_a_failed_sample_is_counted_by_name(
    make_task: MakeTask, changes: dict[str, Any], response: str, failure: str, detail: str
) -> None:
    values = make_task(VQA).process_results(vqa_doc(**changes), [response])
    record = SampleRecord.model_validate(values["bitquake"])
    assert record.failure == failure
    assert detail in record.failure_detail
    assert record.score == 0.0
    assert record.confidence == {}
    assert values["failures"] == [1]


@pytest.mark.parametrize("bbox", [None, [64.0, 64.0, 5.0, 5.0], [1.0, 1.0, 0.0, 4.0], [1.0, 2.0]])
def test_a_box_outside_its_picture_is_a_failed_target(make_task: MakeTask, bbox: list[float] | None) -> None:
    task = make_task(BOX.replace("SPACE", "pixels"))
    doc = {"question": "the dog", "bbox": bbox, IDS: IDS_OF}
    record = task.record(doc, "[1, 1, 5, 5]")
    assert record.failure == "target"
    assert "box:" in record.failure_detail
    assert task.doc_to_target(doc) == ""


@pytest.fixture(scope="module")
def vqa_task(tmp_path_factory: pytest.TempPathFactory) -> Task:
    return task_in(tmp_path_factory.mktemp("vqa"), VQA)


@given(st.text())
@settings(deadline=None, max_examples=50)
def test_no_output_of_a_model_raises(vqa_task: Task, text: str) -> None:
    for response in ([text], [text.strip()], ['{"bitquake_envelope":' + text], []):
        SampleRecord.model_validate(vqa_task.process_results(vqa_doc(), response)["bitquake"])


def test_a_dataset_without_its_columns_is_named_before_any_model_runs(make_task: MakeTask) -> None:
    task = make_task(VQA)
    dataset = datasets.Dataset.from_list([{"question": "q", "image": None, "replies": []}])
    [row] = task.process_docs(dataset)
    with pytest.raises(FamilyError, match="no column 'answers'; it has image, question, replies"):
        task.doc_to_text(row, kwargs_of(task))


def test_functions_of_a_folder(make_task: MakeTask, tmp_path: Path) -> None:
    make_task(VQA)
    get = functions_of(str(tmp_path / "glue.py"))
    assert get("doc_to_target__tiny_clean")(vqa_doc()) == ["yes"] * 10
    assert get("process_results__tiny_fog_3")(vqa_doc(), ["no"])["bitquake"]["variant"] == "fog_3"
    for name in ("record__tiny_clean", "doc_to_text", "doc_to_text__other", "__file__", "doc_to_text__"):
        with pytest.raises(AttributeError, match="expected FUNCTION__TASK"):
            get(name)


def test_an_edited_task_file_does_what_it_says(make_task: MakeTask, tmp_path: Path) -> None:
    make_task(VQA, "tiny_fog_3")
    file = tmp_path / "tiny_fog_3.yaml"
    text = file.read_text()
    file.write_text(text.replace("severity: 3", "severity: 5"))
    edited = read_task(file)
    assert edited.noise is not None and edited.noise.severity == 5
    assert edited.record(vqa_doc(), "yes").noise["severity"] == 5  # type: ignore[index]
    file.write_text(text.replace("severity: 3", "severity: 6"))
    with pytest.raises(ValueError, match=r"tiny_fog_3.yaml.*severities 1 to 5"):
        read_task(file)
    file.write_text(text.replace("name: fog", "name: smog"))
    with pytest.raises(ValueError, match="unknown noise 'smog'"):
        read_task(file)
    file.write_text("task: other\n")
    with pytest.raises(FamilyError, match="not a task file of bitquake"):
        read_task(file)


def test_aggregations_are_the_metrics_and_their_intervals() -> None:
    from bitquake.metrics import evaluate

    rng = np.random.default_rng(0)
    score = rng.integers(0, 2, 200).astype(float)
    confidence = rng.random(200)
    images = [str(i // 2) for i in range(200)]
    items = [aggregate.item(*sample) for sample in zip(score, confidence, images, strict=True)]
    for key in ("accuracy", "ece_15", "auroc", "aurc", "coverage_at_risk_20"):
        expected = evaluate(score, confidence, images, metrics=[key], seed=0)[key]
        assert getattr(aggregate, key)(items) == pytest.approx(expected.value)
        assert getattr(aggregate, f"{key}_ci")(items) == f"[{expected.lo:.4f}, {expected.hi:.4f}]"
    as_accuracy = [aggregate.accuracy_item(s, i) for s, i in zip(score, images, strict=True)]
    assert aggregate.accuracy(as_accuracy) == pytest.approx(score.mean())


def test_aggregations_without_confidence_or_samples_are_not_available() -> None:
    items = [aggregate.item(1.0, None, "a"), aggregate.item(0.0, None, "b")]
    assert aggregate.accuracy(items) == 0.5
    for name in ("ece_15", "auroc_ci", "coverage_at_risk_1"):
        assert getattr(aggregate, name)(items) == "N/A"
    assert aggregate.accuracy([]) == "N/A"
    assert math.isfinite(aggregate.brier([aggregate.item(1.0, 0.5, "a"), aggregate.item(0.0, None, "b")]))
    for name in ("phi_10", "median", "ece_15_ci_ci"):
        with pytest.raises(AttributeError, match="no aggregation"):
            getattr(aggregate, name)
