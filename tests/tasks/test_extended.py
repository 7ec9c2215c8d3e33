"""Families that extend a stock task, against that task itself, on fixtures with the datasets' columns and types."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pytest
from PIL import Image

from bitquake.envelope import Envelope
from bitquake.noise import ImageError, SampleKey, apply, apply_text, load_rgb, pixel_hash
from bitquake.records import SampleRecord
from bitquake.tasks.contract import OPTIONS
from bitquake.tasks.documents import IDS
from bitquake.tasks.expand import task_files
from bitquake.tasks.families import BUILT_IN, FamilyError, load_family
from bitquake.tasks.glue import read_task
from bitquake.tasks.stock import stock_task

lmms_eval_model = pytest.importorskip("lmms_eval.api.model")
import lmms_eval.api.task  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
ALL_ROWS = ("part: [0.2, 1.0]", "part: [0.0, 0.999999]"), ("part: [0.0, 0.2]", "part: [0.999999, 1.0]")

KEPT = {f"{variant}.yaml" for variant in ("clean", "fog_3", "fog_5", "keyboard_typos_5")}
KEPT |= {f"{variant}_objects.yaml" for variant in ("random", "adversarial")}
"""Variants that are tested: lmms-eval reads every file of a folder."""


def fixture_rows(name: str, picture: Callable[..., bytes]) -> datasets.DatasetDict:
    """The rows of a fixture as the hub would give them; a number in the image column is the seed of a picture."""
    data = json.loads((FIXTURES / f"{name}.json").read_text())
    kinds = {
        column: datasets.Image() if kind == "image" else datasets.Value(kind)
        for column, kind in data["features"].items()
    }
    rows = [row | {"image": {"bytes": picture(row["image"]), "path": None}} for row in data["rows"]]
    made = datasets.Dataset.from_list(rows, features=datasets.Features(kinds))
    return datasets.DatasetDict({data["split"]: made})


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch, make_picture: Callable[..., bytes], tmp_path: Path) -> None:
    """The hub, for lmms-eval: it serves the fixtures. Stock aggregations write files where they are."""
    served = {
        json.loads(file.read_text())["dataset"]: fixture_rows(file.stem, make_picture)
        for file in (FIXTURES / "mmbench.json", FIXTURES / "pope.json")
    }
    monkeypatch.setattr(lmms_eval.api.task.datasets, "load_dataset", lambda path, **_: served[path].copy())
    monkeypatch.chdir(tmp_path)


def answer(prompt: str) -> str:
    """What the models below say: of all kinds, decided by the prompt."""
    said = ("A", "B", "B.", "(C)", "The answer is D.", "yes", "no", "Yes", "square", "no idea")
    return said[hashlib.blake2b(prompt.encode()).digest()[0] % len(said)]


class Plain(lmms_eval_model.lmms):  # type: ignore[misc,name-defined]
    """A simple model of somebody else's, which remembers what it was shown and what it said."""

    def __init__(self, say: Callable[[str], str] = answer) -> None:
        super().__init__()
        self.say = say
        self.prompts: dict[str, list[str]] = {}
        self.pixels: dict[str, list[str]] = {}

    def respond(self, context: str, pictures: list[Image.Image]) -> str:
        return self.say(context)

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for request in requests:
            context, _, doc_to_visual, doc_id, task, split = request.args
            pictures = doc_to_visual(self.task_dict[task][split][doc_id])
            self.prompts.setdefault(task, []).append(context)
            self.pixels.setdefault(task, []).append(pixel_hash(np.asarray(pictures[0])))
            answers.append(self.respond(context, pictures))
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


class WithEnvelopes(Plain):
    """The same answers in envelopes, letters with their probabilities."""

    def respond(self, context: str, pictures: list[Image.Image]) -> str:
        probabilities = {"A": 0.1, "B": 0.6, "C": 0.2, "D": 0.1}
        return Envelope(text=self.say(context), confidence={"joint": 0.75}, option_probabilities=probabilities).encode()


@pytest.fixture
def family(tmp_path: Path) -> Callable[..., Path]:
    """A built-in family under another name, on (nearly) all rows; its expanded folder."""

    def expand(name: str, *changes: tuple[str, str]) -> Path:
        text = (BUILT_IN / name / "family.yaml").read_text().replace(f"family: {name}", f"family: my_{name}")
        for old, new in (*ALL_ROWS, *changes):
            assert old in text
            text = text.replace(old, new)
        folder = tmp_path / f"my_{name}"
        folder.mkdir()
        (folder / "family.yaml").write_text(text)
        for file, content in task_files(load_family(folder / "family.yaml")).items():
            if not file.endswith(".yaml") or file.removeprefix(f"my_{name}_") in KEPT:
                (folder / file).write_text(content)
        (folder / "family.yaml").unlink()
        return folder

    return expand


def run(folder: Path, tasks: list[str], model: Any) -> dict[str, Any]:
    manager = TaskManager(include_path=str(folder), include_defaults=False)
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, batch_size=1)
    assert results is not None
    return results  # type: ignore[no-any-return]


def records(results: dict[str, Any], task: str) -> list[SampleRecord]:
    return [SampleRecord.model_validate(line["bitquake"]) for line in results["samples"][task]]


@pytest.mark.parametrize(
    ("name", "stock", "metrics"),
    [
        ("pope", "pope", ["pope_accuracy", "pope_precision", "pope_recall", "pope_f1_score", "pope_yes_ratio"]),
        ("mmbench", "mmbench_en_dev_static", ["gpt_eval_score"]),
    ],
)
@pytest.mark.parametrize("model", [Plain, WithEnvelopes])
def test_the_clean_task_has_the_stock_task_s_prompts_pixels_and_scores(
    hub: None, family: Callable[..., Path], name: str, stock: str, metrics: list[str], model: type[Plain]
) -> None:
    theirs, ours = Plain(), model()
    expected = run(stock_task(stock).file.parent, [stock], theirs)
    found = run(family(name), [f"my_{name}_clean"], ours)
    assert ours.prompts[f"my_{name}_clean"] == theirs.prompts[stock] and len(theirs.prompts[stock]) == 6
    assert ours.pixels[f"my_{name}_clean"] == theirs.pixels[stock]
    for metric in metrics:
        mine = found["results"][f"my_{name}_clean"][f"{metric},none"]
        assert mine == pytest.approx(expected["results"][stock][f"{metric},none"]), metric
        values = [line[metric] for line in found["samples"][f"my_{name}_clean"]]
        assert values == [line[metric] for line in expected["samples"][stock]]
    assert found["results"][f"my_{name}_clean"]["failures,none"] == 0


def test_pope_s_score_is_the_stock_one_of_each_sample(hub: None, family: Callable[..., Path]) -> None:
    results = run(family("pope"), ["my_pope_clean"], WithEnvelopes(lambda prompt: "yes" if "boat" in prompt else "No."))
    found = records(results, "my_pope_clean")
    assert [record.score for record in found] == [1, 0, 1, 0, 1, 0]  # "No." is no "no" to this scorer
    assert results["results"]["my_pope_clean"]["accuracy,none"] == 0.5
    assert results["results"]["my_pope_clean"]["pope_accuracy,none"] == 0.5
    assert {record.protocol for record in found} == {"stock"}
    assert {record.dataset for record in found} == {"lmms-eval/pope"}
    assert {record.primary for record in found} == {0.75}
    assert [record.image_id for record in found][:2] == ["COCO_val2014_000000000001"] * 2
    assert len({record.sample_id for record in found}) == 6
    assert found[0].part == "test, pictures with hash in [0, 0.999999)"


def test_shifts_of_an_extended_family(hub: None, family: Callable[..., Path]) -> None:
    tasks = ["my_pope_random_objects", "my_pope_adversarial_objects"]
    results = run(family("pope"), tasks, Plain())
    first, second = (records(results, task) for task in tasks)
    assert {record.part.rpartition(", ")[2] for record in first} == {"rows where category is random"}
    assert len(first) == len(second) == 2
    assert {record.shift_from for record in first} == {""}
    assert {record.shift_from for record in second} == {"my_pope_random_objects"}


def test_mmbench_rows_are_scored_as_choices(hub: None, family: Callable[..., Path]) -> None:
    said = {"middle": "B", "sky": "(B)", "happen": "Nothing."}
    model = WithEnvelopes(lambda prompt: next(text for key, text in said.items() if key in prompt))
    results = run(family("mmbench"), ["my_mmbench_clean"], model)
    found = records(results, "my_mmbench_clean")
    assert [record.answer for record in found] == ["B", "B", "B", "B", "B", "C"]
    assert [record.score for record in found] == [1, 0, 0, 0, 1, 1]
    assert [record.scores["letter"] for record in found] == [1, 0, 0, 0, 1, 0]  # B is the likeliest letter everywhere
    assert [record.primary for record in found] == [0.6, 0.6, 0.6, 0.6, 0.6, 0.2]
    table = results["results"]["my_mmbench_clean"]
    assert table["lenient,none"] == table["accuracy,none"] == 0.5
    assert table["strict,none"] == pytest.approx(1 / 6)
    assert table["letter,none"] == pytest.approx(2 / 6)
    assert table["parse_failure_rate,none"] == 0
    # The stock metric is circular: of three questions, "Nothing." alone is right in all its rotations.
    assert table["gpt_eval_score,none"] == pytest.approx(100 / 3)


def test_where_our_reading_of_an_mmbench_answer_differs_from_the_stock_one(make_picture: Callable[..., bytes]) -> None:
    from lmms_eval.tasks.mmbench.en_utils import mmbench_evaluator

    from bitquake.tasks.scoring import score_choice

    row = fixture_rows("mmbench", make_picture)["dev"].remove_columns("image")[0]
    options = [row[letter] for letter in "ABCD"]

    def both(text: str) -> tuple[bool, bool]:
        theirs = mmbench_evaluator.eval_sub_data(
            __import__("pandas").DataFrame([row | {"prediction": text}]),
            {row["index"]: row["answer"]},
            static_only=True,
        )
        return bool(theirs), score_choice(text, options, 1).score == 1.0

    for text in (
        "B",
        "B.",
        "(B)",
        "square",
        "Square.",
        "B. square",
        "The answer is B",
        "A",
        "(C)",
        "star",
        "no idea",
        "",
    ):
        theirs, ours = both(text)
        assert theirs == ours, text
    intended = {
        "It is a square, I think.": (True, False),  # an option's text inside a sentence is no answer to us
        "b": (False, True),  # a small letter alone is one
    }
    assert {text: both(text) for text in intended} == intended


def test_pictures_and_questions_get_the_task_s_noise(
    hub: None, family: Callable[..., Path], make_picture: Callable[..., bytes]
) -> None:
    model = Plain()
    tasks = ["my_mmbench_clean", "my_mmbench_fog_5", "my_mmbench_keyboard_typos_5"]
    results = run(family("mmbench"), tasks, model)
    key = SampleKey("lmms-eval/mmbench_en_dev_static", "dev", "7")
    foggy = apply(load_rgb(make_picture(1)), "fog", severity=5, key=key)
    assert model.pixels["my_mmbench_fog_5"][0] == pixel_hash(foggy)
    assert model.pixels["my_mmbench_keyboard_typos_5"] == model.pixels["my_mmbench_clean"]
    assert model.prompts["my_mmbench_fog_5"] == model.prompts["my_mmbench_clean"]
    question = "Which shape is in the middle?"
    typed = apply_text(question, "keyboard_typos", severity=5, key=key)
    assert typed != question
    # Hint, options and instruction stay as they are.
    assert model.prompts["my_mmbench_keyboard_typos_5"][0] == model.prompts["my_mmbench_clean"][0].replace(
        question, typed
    )
    assert records(results, "my_mmbench_keyboard_typos_5")[0].noise["name"] == "keyboard_typos"  # type: ignore[index]


@pytest.fixture
def pope_task(hub: None, family: Callable[..., Path]) -> Any:
    return read_task(family("pope") / "my_pope_clean.yaml")


def prepared(task: Any, picture: Callable[..., bytes], name: str = "pope", **changes: Any) -> list[dict[str, Any]]:
    rows = fixture_rows(name, picture)[task.split]
    ready = task.process_docs(rows)
    return [dict(ready[i]) | changes for i in range(len(ready))]


def test_a_stock_function_that_raises_costs_one_counted_failure(
    pope_task: Any, make_picture: Callable[..., bytes]
) -> None:
    kwargs = {"noise": None, "pre_prompt": "", "post_prompt": ""}
    [doc, *_] = prepared(pope_task, make_picture, answer="perhaps")  # the stock scorer asserts yes or no
    values = pope_task.process_results(doc, ["yes"])
    record = SampleRecord.model_validate(values["bitquake"])
    assert record.failure == "target" and "AssertionError" in record.failure_detail
    assert "pope_accuracy" not in values and values["failures"] == [1]
    [doc, *_] = prepared(pope_task, make_picture, question=None)
    assert pope_task.doc_to_text(doc, kwargs) == ""
    assert pope_task.record(doc, "yes").failure == "question"
    for broken in (None, b"", type(doc["image"])(b"broken"), type(doc["image"])(make_picture(1)[:300])):
        with pytest.raises(ImageError, match="sample "):
            pope_task.doc_to_visual(doc | {"image": broken}, kwargs)


def test_damaged_envelopes_and_errors_reach_the_stock_scorer_as_no_answer(
    pope_task: Any, make_picture: Callable[..., bytes]
) -> None:
    [doc, *_] = prepared(pope_task, make_picture)
    for response, failure in (
        (Envelope(text="yes").encode()[:40], "envelope"),
        (Envelope(text="", error="image: broken").encode(), "image"),
    ):
        values = pope_task.process_results(doc, [response])
        assert values["bitquake"]["failure"] == failure
        assert values["pope_accuracy"]["score"] == 0.0


def test_a_stock_scorer_gets_a_copy_of_the_row_without_our_columns(
    pope_task: Any, make_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def greedy(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        assert not {IDS, OPTIONS} & set(doc)
        doc.clear()
        return {"pope_accuracy": {"score": 1.0}}

    [doc, *_] = prepared(pope_task, make_picture)
    before = dict(doc)
    monkeypatch.setitem(pope_task.stock, "process_results", greedy)
    assert pope_task.process_results(doc, ["yes"])["bitquake"]["score"] == 1.0
    assert doc == before


def test_a_sample_is_scored_once_by_the_stock_task(
    pope_task: Any, make_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[list[str]] = []

    def counting(doc: dict[str, Any], results: list[str]) -> dict[str, Any]:
        calls.append(results)
        return {"pope_accuracy": {"score": 1.0}}

    [doc, other, *_] = prepared(pope_task, make_picture)
    monkeypatch.setitem(pope_task.stock, "process_results", counting)
    assert pope_task.process_results(doc, ["yes"])["pope_accuracy"] == {"score": 1.0}
    failed = Envelope(text="", error="model: broken").encode()
    assert pope_task.process_results(other, [failed])["bitquake"]["failure"] == "model"
    assert calls == [["yes"], [""]]


def test_a_text_noise_on_a_column_that_no_prompt_is_made_from(
    hub: None, family: Callable[..., Path], make_picture: Callable[..., bytes]
) -> None:
    folder = family("mmbench", ("question: question", "question: category"))
    task: Any = read_task(folder / "my_mmbench_keyboard_typos_5.yaml")
    task.process_docs(fixture_rows("mmbench", make_picture)[task.split])
    assert "writes no prompt from the column 'category': with a text noise it would run clean" in task.problem
    clean: Any = read_task(folder / "my_mmbench_clean.yaml")
    clean.process_docs(fixture_rows("mmbench", make_picture)[clean.split])
    assert clean.problem == ""


@pytest.mark.parametrize(
    ("value", "score"),
    [
        (True, 1.0),
        (0, 0.0),
        (np.float32(0.5), 0.5),
        ({"score": 1.0}, None),
        ("1", None),
        (1.5, None),
        (float("nan"), None),
    ],
)
def test_a_stock_metric_must_be_a_number_between_0_and_its_scale(
    hub: None,
    family: Callable[..., Path],
    make_picture: Callable[..., bytes],
    monkeypatch: pytest.MonkeyPatch,
    value: Any,
    score: float | None,
) -> None:
    task: Any = read_task(family("pope", ("pope_accuracy.score", "pope_accuracy")) / "my_pope_clean.yaml")
    [doc, *_] = prepared(task, make_picture)
    monkeypatch.setitem(task.stock, "process_results", lambda doc, results: {"pope_accuracy": value})
    record = task.record(doc, "yes")
    if score is not None:
        assert (record.score, record.failure) == (score, None)
    else:
        assert record.failure == "target" and "should be a number from 0 to 1" in record.failure_detail
    if isinstance(value, dict):
        assert "it is a mapping with score" in record.failure_detail


def test_a_scale_and_a_task_of_several_pictures(
    hub: None, family: Callable[..., Path], make_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    folder = family("pope", ("pope_accuracy.score", "pope_accuracy, scale: 100"))
    clean: Any = read_task(folder / "my_pope_clean.yaml")
    foggy: Any = read_task(folder / "my_pope_fog_3.yaml")
    [doc, *_] = prepared(clean, make_picture)
    monkeypatch.setitem(clean.stock, "process_results", lambda doc, results: {"pope_accuracy": 73})
    assert clean.record(doc, "yes").score == 0.73
    monkeypatch.setitem(clean.stock, "doc_to_visual", lambda doc: [doc["image"], doc["image"]])
    one, two = foggy.doc_to_visual(doc, {"noise": foggy.noise_as_written})
    assert pixel_hash(one) != pixel_hash(two)  # a noise field of its own for each
    same, other = clean.doc_to_visual(doc, {"noise": None})
    assert pixel_hash(same) == pixel_hash(other) == pixel_hash(make_picture(1))
    monkeypatch.setitem(clean.stock, "doc_to_visual", lambda doc: ["clip.mp4"])
    with pytest.raises(ImageError, match="gives str, no picture"):
        foggy.doc_to_visual(doc, {"noise": foggy.noise_as_written})


def test_messages_of_a_stock_task_get_the_noise(
    pope_task: Any, make_picture: Callable[..., bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    def messages(doc: dict[str, Any]) -> list[dict[str, Any]]:
        picture = {"type": "image", "url": doc["image"]}
        return [
            {"role": "system", "content": "be brief"},
            {"role": "user", "content": [picture, {"type": "text", "text": doc["question"]}]},
        ]

    [doc, *_] = prepared(pope_task, make_picture)
    noisy: Any = read_task(Path(pope_task.file).with_name("my_pope_fog_3.yaml"))
    monkeypatch.setitem(pope_task.stock, "doc_to_messages", messages)
    for task in (pope_task, noisy):
        system, user = task.doc_to_messages(doc, {"noise": task.noise_as_written})
        assert system == {"role": "system", "content": "be brief"}
        assert user["content"][1] == {"type": "text", "text": doc["question"]}
        [seen] = task.doc_to_visual(doc, {"noise": task.noise_as_written})
        assert pixel_hash(user["content"][0]["url"]) == pixel_hash(seen)


def test_a_model_named_key_keeps_the_noise_and_the_stock_task_s_own_prompt(
    hub: None, family: Callable[..., Path], make_picture: Callable[..., bytes]
) -> None:
    folder = family("pope")
    for name, ending in (("plm", "Your response must be concise."), ("another", "using a single word or phrase.")):
        manager = TaskManager(include_path=str(folder), include_defaults=False, model_name=name)
        loaded = manager.load_task_or_group(["my_pope_fog_5"], "simple")["my_pope_fog_5"]
        doc = loaded.test_docs()[0]
        assert loaded.doc_to_text(doc).endswith(ending)
        foggy = apply(
            load_rgb(make_picture(1)), "fog", severity=5, key=SampleKey("lmms-eval/pope", "test", doc[IDS]["sample_id"])
        )
        assert pixel_hash(loaded.doc_to_visual(doc)[0]) == pixel_hash(foggy)


def test_options_columns_that_are_not_there(hub: None, family: Callable[..., Path]) -> None:
    folder = family("mmbench", ("[A, B, C, D]", "[A, B, C, Z]"))
    with pytest.raises(FamilyError, match=r"extends.options: the dataset has no column 'Z'; it has A, B, C, D, L2"):
        run(folder, ["my_mmbench_clean"], Plain())


def test_a_stock_module_that_cannot_be_imported_is_named(pope_task: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    from bitquake.tasks import extended

    def fails(file: str) -> Any:
        raise ImportError("no module 'exotic'")

    monkeypatch.setattr("lmms_eval.utils.load_yaml_config", fails)
    with pytest.raises(FamilyError, match=r"pope_adv.yaml: lmms-eval's task 'pope_adv' cannot be loaded .*exotic"):
        extended.stock_functions("pope_adv")
