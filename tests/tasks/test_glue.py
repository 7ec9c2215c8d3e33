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
from bitquake.noise import ImageError, SampleKey, apply, apply_text, load_rgb, move_box
from bitquake.records import SampleRecord
from bitquake.tasks import aggregate
from bitquake.tasks.contract import CANDIDATES
from bitquake.tasks.documents import IDS
from bitquake.tasks.expand import task_files
from bitquake.tasks.families import FamilyError, load_family
from bitquake.tasks.glue import Task, functions_of, read_task
from bitquake.tasks.scoring.caption import Corpus, score_caption
from bitquake.tasks.scoring.grounding import format_box

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
        ({}, '{"bitquake_envelope":' + "[" * 100_000, "envelope", "recursion"),
        ({}, '{"bitquake_envelope":' + "1" * 5_000 + "}", "envelope", "response envelope"),
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
    for key in ("accuracy", "ece_15", "auroc", "aurc", "coverage_at_risk_0.5", "coverage_at_risk_20"):
        expected = evaluate(score, confidence, images, metrics=[key], seed=0)[key]
        name = key.replace(".", "_")  # of a function
        assert getattr(aggregate, name)(items) == pytest.approx(expected.value)
        assert getattr(aggregate, f"{name}_ci")(items) == f"[{expected.lo:.4f}, {expected.hi:.4f}]"
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


TEXTUAL = VQA.replace("names: [fog]", "names: [fog, keyboard_typos]").replace("severities: [3]", "severities: [5]")


def test_a_text_noise_changes_the_question_alone(make_task: MakeTask, make_picture: Callable[..., bytes]) -> None:
    science = CHOICE + "variants: {noise: {names: [keyboard_typos], severities: [5]}}\n"
    clean, noisy = make_task(science), make_task(science, "tiny_keyboard_typos_5")
    doc = {
        "question": "which of the colours below is darker",
        "choices": ["red apples", "blue"],
        "answer": 1,
        "hint": "look at the picture",
        IDS: IDS_OF,
        "image": make_picture(1),
    }
    kwargs = {"pre_prompt": "<", "post_prompt": ">"}
    plain = clean.doc_to_text(doc, kwargs_of(clean) | kwargs)
    key = SampleKey("someone/science", "test", "s1")
    typed = apply_text(doc["question"], "keyboard_typos", severity=5, key=key)
    assert typed != doc["question"]
    assert noisy.doc_to_text(doc, kwargs_of(noisy) | kwargs) == plain.replace(doc["question"], typed)
    [picture] = noisy.doc_to_visual(doc, kwargs_of(noisy))
    assert np.array_equal(np.asarray(picture), load_rgb(make_picture(1)))
    assert noisy.record(doc, "B").noise["name"] == "keyboard_typos"  # type: ignore[index]
    assert noisy.record(doc, "B").score == 1.0


def test_an_image_noise_leaves_the_question(make_task: MakeTask) -> None:
    clean, foggy = make_task(TEXTUAL), make_task(TEXTUAL, "tiny_fog_5")
    assert clean.doc_to_text(vqa_doc(), kwargs_of(clean)) == foggy.doc_to_text(vqa_doc(), kwargs_of(foggy)) == "is it?"


def test_a_question_written_with_a_capital(make_task: MakeTask) -> None:
    task = make_task(VQA + "text: {case: capitalize}\n")
    assert task.doc_to_text(vqa_doc(question="WHAT is It?"), kwargs_of(task)) == "What is it?"


SHIFTING = """
family: tiny
dataset: {path: someone/science}
splits: {test: {split: test, part: [0.5, 1.0]}, threshold: {split: test, part: [0.0, 0.5]}}
columns: {answers: answers}
protocol: vqa
shift_from: other_clean
variants:
  noise: {names: [fog], severities: [3], subset: {n: 7}}
  shifts:
    easy: {split: test, part: [0.5, 1.0], where: {grade: [g1, g2]}, shift_from: null}
    hard: {split: test, part: [0.5, 1.0], where: {grade: [g3]}, shift_from: easy}
    away: {split: elsewhere}
"""


@pytest.mark.parametrize(
    ("variant", "part", "shift_from"),
    [
        ("clean", "test, pictures with hash in [0.5, 1)", "other_clean"),
        ("threshold", "test, pictures with hash in [0, 0.5)", "other_clean"),
        ("fog_3", "test, pictures with hash in [0.5, 1)", "other_clean"),
        ("easy", "test, pictures with hash in [0.5, 1), rows where grade is g1 or g2", ""),
        ("easy_threshold", "test, pictures with hash in [0, 0.5), rows where grade is g1 or g2", ""),
        ("hard", "test, pictures with hash in [0.5, 1), rows where grade is g3", "tiny_easy"),
        ("away", "", "tiny_clean"),
    ],
)
def test_rows_of_a_variant_and_what_it_is_shifted_from(
    make_task: MakeTask, variant: str, part: str, shift_from: str
) -> None:
    task = make_task(SHIFTING, f"tiny_{variant}")
    record = task.record(vqa_doc(), "yes")
    assert (record.variant, record.part, record.shift_from) == (variant, part, shift_from)
    assert record.split == ("elsewhere" if variant == "away" else "test")


def test_the_subset_is_for_noisy_tasks_and_full_ones_leave_it_out(make_task: MakeTask) -> None:
    rows = [{"question": f"q{i}", "answers": ["yes"] * 10, "image": None, "grade": f"g{i % 3 + 1}"} for i in range(200)]
    dataset = datasets.Dataset.from_list(rows)
    counts, subsets = {}, {}
    for variant in ("clean", "fog_3", "fog_3_full", "easy", "hard", "easy_threshold", "threshold"):
        ready = make_task(SHIFTING, f"tiny_{variant}").process_docs(dataset)
        counts[variant], subsets[variant] = len(ready), {row["subset"] for row in ready[IDS]}
    assert counts["clean"] == counts["fog_3_full"] == counts["easy"] + counts["hard"]
    assert counts["clean"] + counts["threshold"] == 200
    assert counts["fog_3"] == 7
    assert {variant for variant, found in subsets.items() if found != {""}} == {"fog_3"}
    assert 0 < counts["easy_threshold"] < counts["threshold"]


def test_what_is_wrong_with_the_rows_is_said_when_the_task_is_loaded(make_task: MakeTask) -> None:
    task = make_task(SHIFTING, "tiny_hard")
    rows = [{"question": "q", "answers": ["yes"] * 10, "image": None, "grade": "g1"} for _ in range(9)]
    ready = task.process_docs(datasets.Dataset.from_list(rows))
    with pytest.raises(FamilyError, match=r"tiny_hard.yaml: where.grade: 'g3' occurs in none of the 9 rows"):
        task.doc_to_text(ready[0], kwargs_of(task))
    with pytest.raises(FamilyError, match="were not prepared: process_docs did not run"):
        make_task(SHIFTING).doc_to_text(ready[0], kwargs_of(task))


MOVED = BOX.replace("SPACE", "pixels") + "variants: {noise: {names: [rotation, fog], severities: [1, 5]}}\n"


def test_boxes_move_with_a_noise_that_moves_things(make_task: MakeTask) -> None:
    clean, turned, foggy = (make_task(MOVED, f"tiny_{variant}") for variant in ("clean", "rotation_5", "fog_5"))
    doc = {"question": "the dog", "bbox": [20.0, 8.0, 16.0, 30.0], IDS: IDS_OF}
    key = SampleKey("someone/boxes", "test", "s1")
    moved = move_box((20.0, 8.0, 36.0, 38.0), (64, 64), "rotation", severity=5, key=key)
    assert moved is not None
    box, size = moved
    assert box != (20.0, 8.0, 36.0, 38.0)
    right = Envelope(text=format_box(box), image_sizes=[size]).encode()
    assert turned.record(doc, right).scores["iou"] > 0.9
    assert turned.record(doc, right).score == 1.0
    assert turned.doc_to_target(doc) == format_box(box)
    assert clean.doc_to_target(doc) == foggy.doc_to_target(doc) == "[20, 8, 36, 38]"
    assert clean.record(doc, "[20, 8, 36, 38]").scores["iou"] == foggy.record(doc, "[20, 8, 36, 38]").scores["iou"] == 1
    assert turned.record(doc, "[20, 8, 36, 38]").scores["iou"] < 0.95


def test_a_box_that_a_noise_moves_out_of_the_picture_is_a_failed_target(make_task: MakeTask) -> None:
    task = make_task(MOVED.replace("rotation", "off_centre_crop"), "tiny_off_centre_crop_5")
    found = []
    for i in range(40):
        doc = {"question": "the dog", "bbox": [1.0, 1.0, 4.0, 4.0], IDS: IDS_OF | {"sample_id": f"s{i}"}}
        found.append(task.record(doc, "[1, 1, 5, 5]"))
    lost = [record for record in found if record.failure]
    assert 0 < len(lost) < 40
    assert {record.failure for record in lost} == {"target"}
    assert "off_centre_crop at severity 5 leaves too little of (1.0, 1.0, 5.0, 5.0)" in lost[0].failure_detail
    unsized = {"question": "the dog", "bbox": [1.0, 1.0, 4.0, 4.0], IDS: IDS_OF | {"width": None, "height": None}}
    assert "the picture's size, which that needs, is not known" in task.record(unsized, "[1, 1, 5, 5]").failure_detail


def test_a_picture_of_another_size_than_the_columns_say_is_not_scored(make_task: MakeTask) -> None:
    task = make_task(BOX.replace("SPACE", "unit"))
    doc = {"question": "the dog", "bbox": [8.0, 8.0, 16.0, 16.0], IDS: IDS_OF}
    text = "[0.125, 0.125, 0.375, 0.375]"
    assert task.record(doc, Envelope(text=text, image_sizes=[(64, 64)]).encode()).score == 1.0
    record = task.record(doc, Envelope(text=text, image_sizes=[(64, 48)]).encode())
    assert record.failure == "target" and "was shown one of 64x48" in record.failure_detail


@pytest.mark.parametrize(
    ("yaml", "noise", "reason"),
    [
        (BOX.replace("SPACE", "pixels"), "{name: zoom_blur, severity: 3}", "moves things in the picture"),
        (
            VQA.replace("answers: answers", "captions: answers").replace("protocol: vqa", "protocol: caption")
            + "text: {template: Say.}\n",
            "{name: keyboard_typos, severity: 3}",
            "columns.question is not set",
        ),
    ],
)
def test_an_edited_file_cannot_have_a_noise_that_the_family_cannot(
    make_task: MakeTask, tmp_path: Path, yaml: str, noise: str, reason: str
) -> None:
    make_task(yaml)
    file = tmp_path / "tiny_clean.yaml"
    file.write_text(file.read_text().replace("noise: null", f"noise: {noise}"))
    with pytest.raises(FamilyError, match=reason):
        read_task(file)


def test_one_annotator(make_task: MakeTask) -> None:
    task = make_task(VQA + "annotators: 1\n")
    for answers in ("Blue", ["Blue"], [{"answer": "Blue"}]):
        doc = vqa_doc(answers=answers)
        assert [task.record(doc, text).score for text in ("blue", "the blue.", "red", "")] == [1, 1, 0, 0]
        assert task.doc_to_target(doc) == ["Blue"]
    for answers in (["blue", "red"], "", None, [None], [{"a": 1}]):
        assert task.record(vqa_doc(answers=answers), "blue").failure == "target" or answers == ""
    assert make_task(VQA).record(vqa_doc(answers="yes"), "yes").failure == "target"


CAPTION = """
family: tiny
dataset: {path: someone/captions}
splits: {test: test, threshold: val}
columns: {captions: answer, sample_id: id, image_id: id}
protocol: caption
text: {template: "Describe it."}
variants: {noise: {names: [fog], severities: [3], subset: {n: 2}}}
"""


def caption_rows(n: int = 12) -> datasets.Dataset:
    shapes = ("circle", "square", "star", "cross")
    rows = [
        {"id": i, "image": None, "answer": [f"a {shapes[i % 4]} in room {i}", f"room {i} has a {shapes[i % 4]}"]}
        for i in range(n)
    ]
    return datasets.Dataset.from_list(rows)


def test_captions_are_scored_by_the_whole_part_whatever_is_evaluated(make_task: MakeTask) -> None:
    clean, foggy = make_task(CAPTION), make_task(CAPTION, "tiny_fog_3")
    ready, some = clean.process_docs(caption_rows()), foggy.process_docs(caption_rows())
    assert (len(ready), len(some)) == (12, 2)
    references = caption_rows()["answer"]
    corpus = Corpus.of(references)
    for doc in some:
        text = f"a circle in room {doc['id']}"
        expected = score_caption(text, doc["answer"], corpus).score
        assert 0 < expected < 1.0
        record = foggy.record(doc, text)
        assert record.score == clean.record(doc, text).score == expected
        assert record.scores == {"cider": expected}
    assert foggy.corpus() is clean.corpus()  # counted once for both
    assert clean.doc_to_text(ready[0], kwargs_of(clean)) == "Describe it."
    assert clean.doc_to_target(ready[3]) == references[3]
    values = clean.process_results(ready[0], ["a circle in room 0"])
    assert values["cider"] == values["cider_ci"] == [values["bitquake"]["score"], False, "0"]
    assert clean.record(ready[0], " ").parse_failure
    assert clean.record(ready[0] | {"answer": []}, "a circle").failure == "target"


def test_captions_need_their_corpus(make_task: MakeTask) -> None:
    with pytest.raises(FamilyError, match="call it first, in this process"):
        make_task(CAPTION).record({"id": 0, "answer": ["a"], IDS: IDS_OF}, "a circle")


RETRIEVAL = CAPTION.replace("protocol: caption", "protocol: retrieval\ncandidates: {n: 6}")


def test_a_retrieval_record(make_task: MakeTask) -> None:
    task = make_task(RETRIEVAL)
    doc = task.process_docs(caption_rows())[4]
    target = doc[IDS]["target"]
    assert doc[CANDIDATES][target] in doc["answer"]
    assert task.doc_to_target(doc) == doc[CANDIDATES][target]
    scores = [-50.0 - i for i in range(6)]
    scores[target] = -10.0
    envelope = Envelope(text="ignored", candidate_scores=scores, confidence={"candidates": 0.9})
    record = task.record(doc, envelope.encode())
    assert (record.score, record.answer, record.primary) == (1.0, doc[CANDIDATES][target], 0.9)
    assert record.scores == {"recall_1_of_6": 1.0, "recall_5_of_6": 1.0, "reciprocal_rank": 1.0}
    scores[target] = -50.0 - (1 if target == 0 else 0)  # the same as another's: the other one stands first
    record = task.record(doc, envelope.model_copy(update={"candidate_scores": scores}).encode())
    assert record.score == 0.0 and record.scores["reciprocal_rank"] == 0.5
    assert record.answer != doc[CANDIDATES][target]


def test_retrieval_without_scores_or_with_bad_ones(make_task: MakeTask) -> None:
    task = make_task(RETRIEVAL)
    doc = task.process_docs(caption_rows())[4]
    record = task.record(doc, doc[CANDIDATES][doc[IDS]["target"]])
    assert record.parse_failure and record.score == 0.0 and record.failure is None
    assert "a text cannot be ranked" in record.failure_detail
    values = task.process_results(doc, ["a text"])
    assert values["parse_failures"] == values["parse_failure_rate"] == [1]
    assert values["recall_1_of_6"] == [0.0, False, "4"]
    record = task.record(doc, Envelope(text="", candidate_scores=[0.0] * 5).encode())
    assert record.failure == "model" and "expected 6, one for each candidate, got 5" in record.failure_detail
    record = task.record(doc, Envelope(text="", candidate_scores=[0.0] * 6, error="image: broken").encode())
    assert record.failure == "image"
    alone = task.process_docs(caption_rows().map(lambda row: {"answer": []} if row["id"] == 4 else row))[4]
    assert task.record(alone, "").failure == "target"
    assert task.doc_to_target(alone) == ""


def test_a_decompression_bomb_is_one_failed_image(make_task: MakeTask) -> None:
    import struct
    import zlib

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = chunk(b"IHDR", struct.pack(">IIBBBBB", 60_000, 60_000, 8, 2, 0, 0, 0))
    bomb = b"\x89PNG\r\n\x1a\n" + header + chunk(b"IDAT", zlib.compress(b"\0" * 1000)) + chunk(b"IEND", b"")
    task = make_task(BOX.replace("SPACE", "pixels").replace("bbox}", "bbox, image_id: q, sample_id: q}"))
    rows = [{"question": "the dog", "q": i, "bbox": [1.0, 1.0, 4.0, 4.0], "image": {"bytes": bomb}} for i in range(2)]
    ready = task.process_docs(datasets.Dataset.from_list(rows).cast_column("image", datasets.Image()))
    assert ready[0][IDS]["width"] is None
    with pytest.raises(ImageError, match=r"image: .*decompression bomb.*scale it down.*task tiny_clean, sample 0"):
        task.doc_to_visual(ready[0], kwargs_of(task))


def test_further_scores_in_the_results_table(make_task: MakeTask) -> None:
    assert aggregate.score([[1.0, False, "a"], [0.0, False, "b"], [0.0, True, "c"], [0.6, False, "d"]]) == 0.4
    assert aggregate.cider([[0.1, False, "a"], [0.2, False, "b"]]) == pytest.approx(1.5)
    # A score that no answer has (letters of a model without probabilities) is no 0.
    assert aggregate.score([[None, False, "a"], [0.0, True, "b"]]) == "N/A"
    assert aggregate.score_ci([[None, False, "a"]]) == aggregate.cider_ci([]) == "N/A"
    assert aggregate.score([[1.0, False, "a"], [None, False, "b"]]) == 0.5
    assert aggregate.share([[1], [0], [0], [1]]) == 0.5 and aggregate.share([]) == "N/A"
    items = [[float(i % 3 == 0), False, str(i // 2)] for i in range(90)]
    low, high = (float(edge) for edge in aggregate.score_ci(items).strip("[]").split(", "))
    assert low < 1 / 3 < high
    wide = [10 * edge for edge in (low, high)]
    assert [float(edge) for edge in aggregate.cider_ci(items).strip("[]").split(", ")] == pytest.approx(wide, abs=1e-3)
    values = make_task(CHOICE).process_results(
        {"question": "which?", "choices": ["red", "blue"], "answer": 1, "hint": "", IDS: IDS_OF}, ["(B)"]
    )
    assert values["strict"] == [0.0, False, "i1"] and values["lenient"] == [1.0, False, "i1"]
    assert values["letter"] == values["letter_ci"] == [None, False, "i1"]
