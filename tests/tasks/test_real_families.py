"""The families of real datasets, unchanged, on rows of the hub's form: the whole way through lmms-eval.

The hub is replaced where lmms-eval asks for a dataset, so that our families and lmms-eval's stock tasks read the same
rows (``fixtures/build.py`` makes them). Where a stock task exists, prompts must be equal to the letter and scores must
be equal, or a test names the difference and shows both values.
"""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest

from bitquake.envelope import Envelope
from bitquake.noise import SampleKey, apply, apply_text, load_rgb, pixel_hash
from bitquake.records import SampleRecord
from bitquake.tasks.contract import CANDIDATES
from bitquake.tasks.documents import IDS
from bitquake.tasks.families import BUILT_IN, load_family, prepared_file
from bitquake.tasks.scoring import score_box

lmms_eval_model = pytest.importorskip("lmms_eval.api.model")
import lmms_eval.api.task  # noqa: E402
import lmms_eval.models  # noqa: E402  (registers bitquake, as the command line does)
import lmms_eval.tasks  # noqa: E402
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

FIXTURES = Path(__file__).parent / "fixtures"
HUB = {
    ("lmms-lab-encoder/VQAv2", None): "vqav2",
    ("lmms-lab-encoder/VizWiz-VQA", None): "vizwiz",
    ("lmms-lab-encoder/RefCOCOplus", None): "refcocoplus",
    ("lmms-lab-encoder/ScienceQA", "ScienceQA-IMG"): "scienceqa",
    ("lmms-lab-encoder/ScienceQA", "ScienceQA-FULL"): "scienceqa_full",
    ("lmms-lab-encoder/COCO-Caption2017", None): "coco_caption",
    ("lmms-lab-encoder/flickr30k", None): "flickr_retrieval",
}
"""(path, name) as lmms-eval 0.7.3's own tasks say -> folder of fixtures."""
FAMILIES = ["advqa", *HUB.values()]
Say = Callable[[str, Mapping[str, Any]], str]


@pytest.fixture(scope="module")
def build() -> ModuleType:
    spec = importlib.util.spec_from_file_location("fixtures_build", FIXTURES / "build.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def patch() -> Iterator[pytest.MonkeyPatch]:
    with pytest.MonkeyPatch.context() as patch:
        yield patch


@pytest.fixture(scope="module")
def manager(patch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory) -> TaskManager:
    """Our tasks as the plugin registers them, the stock tasks of the same datasets, and a hub that serves the fixtures.

    (lmms-eval's other tasks are left out, because reading them all takes many seconds.)
    """
    folder = tmp_path_factory.mktemp("real")
    patch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    patch.setenv("XDG_DATA_HOME", str(folder / "data"))
    patch.chdir(folder)  # stock aggregations write files where they are
    prepared = prepared_file("advqa", "validation")
    prepared.parent.mkdir(parents=True)
    shutil.copy(FIXTURES / "advqa" / "validation.parquet", prepared)
    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, **kwargs: Any) -> Any:
        if (path, name) not in HUB:
            return original(path, name, **{key: value for key, value in kwargs.items() if key != "token"})
        files = {file.stem: str(file) for file in (FIXTURES / HUB[path, name]).glob("*.parquet")}
        return original("parquet", data_files=files, cache_dir=kwargs["cache_dir"])

    patch.setattr(lmms_eval.api.task.datasets, "load_dataset", load_dataset)
    stock = Path(lmms_eval.tasks.__file__).parent
    folders = ("vqav2", "vizwiz_vqa", "refcoco+", "scienceqa", "coco_cap", "flickr30k")
    return TaskManager(include_path=[str(stock / folder) for folder in folders], include_defaults=False)


class Model(lmms_eval_model.lmms):  # type: ignore[misc,name-defined]
    """A model of somebody else's, which remembers what it was shown; ``say`` knows what it answers to a row."""

    is_simple = False

    def __init__(self, say: Say) -> None:
        super().__init__()
        self.say = say
        self.docs: dict[str, list[dict[str, Any]]] = {}
        self.prompts: dict[str, list[str]] = {}
        self.pixels: dict[str, list[str]] = {}
        self.texts: dict[str, list[str]] = {}

    def generate_until(self, requests: list[Any]) -> list[str]:
        said = []
        for request in requests:
            _, doc_to_messages, _, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            [message] = doc_to_messages(doc)
            pictures = [part["url"] for part in message["content"] if part["type"] == "image"]
            said.append(self.say(task, doc))
            for kept, value in (
                (self.docs, doc),
                (self.prompts, message["content"][-1]["text"]),
                (self.pixels, " ".join(map(pixel_hash, pictures))),
                (self.texts, said[-1]),
            ):
                kept.setdefault(task, []).append(value)  # type: ignore[attr-defined]
        return said

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


def evaluate(manager: TaskManager, tasks: list[str], model: Any, **kwargs: Any) -> dict[str, Any]:
    results = simple_evaluate(model=model, tasks=tasks, task_manager=manager, batch_size=1, **kwargs)
    assert results is not None
    return results  # type: ignore[no-any-return]


def records(results: Mapping[str, Any], task: str) -> list[SampleRecord]:
    return [SampleRecord.model_validate(line["bitquake"]) for line in results["samples"][task]]


# --- the fixtures are of the hub's form -----------------------------------------------------------


def test_fixture_files_are_what_the_script_writes(build: ModuleType) -> None:
    made = build.fixtures()
    assert {name for name, _ in made} == set(FAMILIES)
    for (name, split), rows in made.items():
        file = FIXTURES / name / f"{split}.parquet"
        kept = datasets.Dataset.from_parquet(str(file), cache_dir=None, keep_in_memory=True)
        assert kept.features == datasets.Features(build.FEATURES[name])
        for column in kept.column_names:
            if column != "image":
                assert kept[:][column] == [row[column] for row in rows], (file, column)


# --- the whole way --------------------------------------------------------------------------------

SHIFTS = {
    "refcocoplus": ["testA", "testB"],
    "scienceqa": ["natural_science", "natural_science_threshold", "language_science"],
    "scienceqa_full": ["grades_7_12"],
}
TEXT_NOISE = {name: "keyboard_typos_5" for name in FAMILIES if name not in ("coco_caption", "flickr_retrieval")}
ROWS = {
    "vqav2": (8, 2),
    "advqa": (8, 2),
    "vizwiz": (6, 2),
    "refcocoplus": (11, 3),
    "scienceqa": (11, 3),
    "scienceqa_full": (10, 2),
    "coco_caption": (6, 2),
    "flickr_retrieval": (100, 100),
}
"""Rows of the test part and of the threshold part, of those that ``build.py`` makes."""


def reference(task: str, doc: Mapping[str, Any]) -> str:
    """The right answer, in each family's own form."""
    if "captions" in doc or CANDIDATES in doc:
        return Envelope(
            text="", candidate_scores=[-float(i != doc[IDS]["target"]) for i in range(100)], candidate_kind="matching"
        ).encode()
    if "bbox" in doc:
        return "[" + ", ".join(f"{edge:.6f}" for edge in unit_box(doc)) + "]"
    if "choices" in doc:
        return "ABCDE"[doc["answer"]]
    if "answers" in doc:
        answers = [answer if isinstance(answer, str) else answer["answer"] for answer in doc["answers"]]
        return max(answers, key=answers.count)
    return str(doc["answer"][0])


def unit_box(doc: Mapping[str, Any]) -> tuple[float, float, float, float]:
    """The annotated box (xywh, pixels) as two corners between 0 and 1."""
    x, y, w, h = doc["bbox"]
    width, height = doc[IDS]["width"], doc[IDS]["height"]
    return x / width, y / height, (x + w) / width, (y + h) / height


def variants(name: str) -> list[str]:
    """Clean, threshold, one noise, the shifts, one text noise, one task without the subset: those that there are."""
    family = load_family(BUILT_IN / name / "family.yaml").family
    tasks = ["clean", "threshold", "impulse_noise_5", *SHIFTS.get(name, [])]
    if name in TEXT_NOISE:
        tasks.append(TEXT_NOISE[name])
    if family.variants.noise is not None and family.variants.noise.subset is not None:
        tasks.append("impulse_noise_5_full")
    return [f"{name}_{task}" for task in tasks]


@pytest.fixture(scope="module")
def whole(manager: TaskManager) -> tuple[dict[str, Any], Model]:
    """Every kind of variant of every family, in one run of lmms-eval; each right answer is known."""
    model = Model(reference)
    return evaluate(manager, [task for name in FAMILIES for task in variants(name)], model), model


@pytest.mark.parametrize("name", FAMILIES)
def test_every_kind_of_variant_runs_and_says_what_it_is(whole: tuple[dict[str, Any], Model], name: str) -> None:
    family = load_family(BUILT_IN / name / "family.yaml").family
    results, model = whole
    clean, threshold, noisy = f"{name}_clean", f"{name}_threshold", f"{name}_impulse_noise_5"
    tasks = variants(name)
    found = {task: records(results, task) for task in tasks}
    assert (len(found[clean]), len(found[threshold])) == ROWS[name]
    for task, made in found.items():
        assert made and [record.failure for record in made] == [None] * len(made), task
        assert not any(record.parse_failure for record in made), task
        assert {record.dataset for record in made} == {family.dataset_id}
        assert len({record.sample_id for record in made}) == len(made)
        assert results["results"][task]["bitquake,none"] == len(made)
        if name != "coco_caption":  # CIDEr of a reference against all five is below 1
            assert results["results"][task]["accuracy,none"] == pytest.approx(
                sum(record.score for record in made) / len(made)
            )
    # Thresholds are fitted on other pictures, and every record says what it was drawn from.
    assert not {record.image_id for record in found[clean]} & {record.image_id for record in found[threshold]}
    assert {record.part for record in found[clean]} != {record.part for record in found[threshold]}
    assert all(record.part for task in (clean, threshold) for record in found[task])
    assert {record.shift_from for record in found[clean]} == {family.shift_from}
    for shift in SHIFTS.get(name, []):
        declared = family.variants.shifts.get(shift)
        origin = declared.shift_from if declared is not None else None
        assert {record.shift_from for record in found[f"{name}_{shift}"]} == {f"{name}_{origin}" if origin else ""}
    # Noise: the same rows, other pixels and the same words, or the reverse; made by the noise room from the row's id.
    assert [record.sample_id for record in found[noisy]] == [record.sample_id for record in found[clean]]
    assert model.prompts[noisy] == model.prompts[clean]
    assert found[noisy][0].noise is not None and found[clean][0].noise is None
    for doc, shown, before in zip(model.docs[noisy], model.pixels[noisy], model.pixels[clean], strict=True):
        if not shown:
            assert not before and name == "scienceqa_full"
            continue
        key = SampleKey(family.dataset_id, family.splits.test.split, doc[IDS]["sample_id"])
        pixels = apply(load_rgb(doc["image"]), "impulse_noise", severity=5, key=key)
        assert shown == pixel_hash(pixels) != before
    if name in TEXT_NOISE:
        task = f"{name}_{TEXT_NOISE[name]}"
        assert model.pixels[task] == model.pixels[clean]
        changed = [a != b for a, b in zip(model.prompts[task], model.prompts[clean], strict=True)]
        assert any(changed)
        for doc, prompt in zip(model.docs[task], model.prompts[task], strict=True):
            key = SampleKey(family.dataset_id, family.splits.test.split, doc[IDS]["sample_id"])
            question = doc[family.columns.question]
            question = question.capitalize() if family.text.case == "capitalize" else question
            assert apply_text(question, "keyboard_typos", severity=5, key=key) in prompt
            assert prompt.endswith(family.prompts["default"].post_prompt)


def test_tags_collect_the_reliable_vqa_study(manager: TaskManager) -> None:
    names = {f"{family}_{part}" for family in ("vqav2", "advqa", "vizwiz") for part in ("clean", "threshold")}
    assert set(manager.task_index["reliable_vqa_shift"]["task"]) == names
    blocks = {f"block_{name}" for name in names}
    assert set(manager.task_index["block_reliable_vqa_shift"]["task"]) == blocks
    assert len(manager.task_index["vqav2_noise"]["task"]) == 15 * 5
    # Boxes cannot follow zoom_blur, which shows a thing at many sizes at once.
    noises = {name.removeprefix("refcocoplus_") for name in manager.task_index["refcocoplus_noise_3"]["task"]}
    assert len(noises) == 14 and "zoom_blur_3" not in noises


def test_no_picture_of_the_shifted_families_is_one_that_thresholds_are_fitted_on() -> None:
    """AdVQA's and COCO Captions' pictures are VQA-v2's, under the same ids, and parts go by the id."""
    splits = {name: load_family(BUILT_IN / name / "family.yaml").family.splits for name in FAMILIES}
    for name in ("advqa", "coco_caption"):
        for role, split in splits[name].roles():
            assert split.part == getattr(splits["vqav2"], role).part


def test_rows_of_one_picture_are_one_cluster(whole: tuple[dict[str, Any], Model]) -> None:
    boxes = records(whole[0], "refcocoplus_clean")
    # Two objects with three expressions each on the first picture; then three and two.
    per_picture = [sum(a.image_id == b.image_id for b in boxes) for a in boxes]
    assert sorted(per_picture) == [2, 2, 3, 3, 3, 6, 6, 6, 6, 6, 6]
    assert sorted(record.sample_id.rsplit("-", 1)[1] for record in boxes) == sorted("012" * 3 + "01")
    assert len({record.image_id for record in records(whole[0], "vqav2_clean")}) == 4
    pixels = whole[1].pixels["scienceqa_full_clean"]
    text_only = [
        record.image_id
        for record, shown in zip(records(whole[0], "scienceqa_full_clean"), pixels, strict=True)
        if not shown
    ]
    assert len(text_only) == len(set(text_only)) == 3


def score(task: Any, text: str) -> dict[str, SampleRecord]:
    """Sample id -> record, of one answer to every row of one of our tasks."""
    made = [SampleRecord.model_validate(task.process_results(doc, [text])["bitquake"]) for doc in task.test_docs()]
    return {record.sample_id: record for record in made}


def test_unanswerable_is_an_answer_in_vizwiz(manager: TaskManager) -> None:
    by_id = score(task_named(manager, "vizwiz_clean"), "Unanswerable")
    found = [by_id[f"VizWiz_val_{number:08d}.jpg"] for number in (0, 1, 2, 5)]
    # 7, 0, 2 and 4 of the ten annotators said so.
    assert [record.score for record in found] == pytest.approx([1.0, 0.0, 0.6, 1.0])
    assert not any(record.parse_failure or record.failure for record in found)


# --- against lmms-eval's own tasks ----------------------------------------------------------------

BESIDE = {
    "vqav2_clean": "vqav2_val",
    "vizwiz_clean": "vizwiz_vqa_val",
    "scienceqa_clean": "scienceqa_img",
    "scienceqa_full_clean": "scienceqa",
}
"""Our task -> the stock task that runs in the same run of lmms-eval."""


@pytest.fixture(scope="module")
def beside(manager: TaskManager) -> tuple[dict[str, Any], Model]:
    """Our clean tasks and the stock ones, with answers of all kinds, decided by the row."""

    says = {
        "refcocoplus_clean": box_say,
        "coco_caption_clean": caption_say,
        "flickr_retrieval_clean": rank_say,
        **dict.fromkeys(("scienceqa_clean", "scienceqa_full_clean", "scienceqa_img", "scienceqa"), choice_say),
    }
    model = Model(lambda task, doc: says.get(task, vqa_say)(doc))
    return evaluate(manager, [*BESIDE, *BESIDE.values(), *list(says)[:3]], model), model


def vqa_say(doc: Mapping[str, Any]) -> str:
    said = {
        "pattern": "black and white striped",
        "colour is the rectangle": "Dark red",
        "behind": "a grey wall.",
        "how many": "one",
        "red?": "Yes.",
        "mug": "Mom's",
        "number on": "1000-2000",
        "what is this": "unsuitable",
    }
    asked = str(doc["question"]).lower()
    return next((answer for part, answer in said.items() if part in asked), "no")


@pytest.mark.parametrize("task", ["vqav2_clean", "vizwiz_clean"])
def test_vqa_prompts_and_scores_are_those_of_the_stock_task(beside: tuple[dict[str, Any], Model], task: str) -> None:
    """The one difference in ``lmms_eval``: the stock VizWiz task drops commas before it looks at other punctuation.

    So "1,000-2,000" is "1000 2000" there; VQA-v2's rules, which we use for all three sets, make it "10002000".
    """
    results, model = beside
    stock = BESIDE[task]
    theirs = {
        str(doc["question_id"]): (prompt, line["exact_match"])
        for doc, prompt, line in zip(model.docs[stock], model.prompts[stock], results["samples"][stock], strict=True)
    }
    ours = records(results, task)
    assert len(theirs) > len(ours)
    assert len({record.scores["lmms_eval"] for record in ours}) >= 3
    for record, prompt in zip(ours, model.prompts[task], strict=True):
        assert prompt == theirs[record.sample_id][0]
        if task == "vizwiz_clean" and "number" in prompt:
            assert (record.scores["lmms_eval"], theirs[record.sample_id][1]) == (0.0, 1.0)
        else:
            assert record.scores["lmms_eval"] == pytest.approx(theirs[record.sample_id][1]), record.text


def test_the_headline_of_vqa_is_reliable_vqas_score(manager: TaskManager) -> None:
    """Two named differences: a hyphen beside a space in lmms-eval, and all ten annotators agreed in reliable_vqa."""
    task = task_named(manager, "vqav2_clean")
    hyphens, unanimous = score(task, "black and white striped")["116001"], score(task, "Yes.")["42000"]
    assert (hyphens.score, hyphens.scores["reliable_vqa"], hyphens.scores["lmms_eval"]) == (1.0, 1.0, 0.0)
    assert (unanimous.score, unanimous.scores["reliable_vqa"], unanimous.scores["lmms_eval"]) == (1.0, 0.0, 1.0)


CHOICE_FORMS = ("{}", "{}. the one", "({})", "it is {} I think", "The answer is {}.")


def choice_say(doc: Mapping[str, Any]) -> str:
    grade = int(str(doc["grade"]).removeprefix("grade"))
    return CHOICE_FORMS[grade % len(CHOICE_FORMS)].format("ABCDE"[doc["answer"]])


@pytest.mark.parametrize("task", ["scienceqa_clean", "scienceqa_full_clean"])
def test_choice_prompts_and_strict_scores_are_those_of_the_stock_task(
    beside: tuple[dict[str, Any], Model], task: str
) -> None:
    """The headline differs by design: it also reads the letter in other forms, which the stock task calls wrong."""
    results, model = beside
    stock = BESIDE[task]
    scores = [line["exact_match"] for line in results["samples"][stock]]
    theirs = dict(zip(model.prompts[stock], scores, strict=True))
    assert len(theirs) == 12  # every row has a prompt of its own
    ours = records(results, task)
    seen = set()
    for record, doc, prompt in zip(ours, model.docs[task], model.prompts[task], strict=True):
        assert record.scores["strict"] == theirs[prompt]
        form = CHOICE_FORMS[int(doc["grade"].removeprefix("grade")) % len(CHOICE_FORMS)]
        seen.add(form)
        strict, lenient, failed = {
            "({})": (0.0, 1.0, False),
            "The answer is {}.": (0.0, 1.0, False),
            "it is {} I think": (0.0, 0.0, True),
        }.get(form, (1.0, 1.0, False))
        assert (record.scores["strict"], record.score, record.parse_failure) == (strict, lenient, failed), record.text
    assert seen == set(CHOICE_FORMS)
    rate = results["results"][task]["parse_failure_rate,none"]
    assert rate == pytest.approx(sum(record.parse_failure for record in ours) / len(ours))


BOX_FORMS: dict[str, Callable[[float, float, float, float], str]] = {
    "exact": lambda x1, y1, x2, y2: f"[{x1:.3f}, {y1:.3f}, {x2:.3f}, {y2:.3f}]",
    "beside": lambda x1, y1, x2, y2: f"The box is [{x1 + 0.05:.3f}, {y1:.3f}, {x2 + 0.05:.3f}, {y2:.3f}].",
    "quarter": lambda x1, y1, x2, y2: f"[{x1:.3f},{y1:.3f},{(x1 + x2) / 2:.3f},{(y1 + y2) / 2:.3f}]",
    "none": lambda x1, y1, x2, y2: "I cannot see it",
    "pairs": lambda x1, y1, x2, y2: f"({x1:.3f},{y1:.3f}),({x2:.3f},{y2:.3f})",
    "outside": lambda x1, y1, x2, y2: f"[{x1:.3f}, {y1:.3f}, {x2 + 1:.3f}, {y2:.3f}]",
    "inside out": lambda x1, y1, x2, y2: f"[{x2:.3f}, {y2:.3f}, {x1:.3f}, {y1:.3f}]",
}


def box_form(doc: Mapping[str, Any]) -> str:
    """Each row's own way to answer."""
    return list(BOX_FORMS)[sum(map(ord, doc["question_id"] + doc["answer"])) % len(BOX_FORMS)]


def box_say(doc: Mapping[str, Any]) -> str:
    return BOX_FORMS[box_form(doc)](*unit_box(doc))


def test_grounding_prompts_and_boxes_are_those_of_the_stock_task(
    manager: TaskManager, beside: tuple[dict[str, Any], Model]
) -> None:
    """Named differences: other ways to write a box are read (the stock task calls them [0, 0, 0, 0]), and what lies
    outside the picture is cut off.
    """
    results, model = beside
    task = "refcocoplus_clean"
    ours = records(results, task)
    stock = task_named(manager, "refcoco+_bbox_rec_val")
    theirs = {(doc["question_id"], doc["answer"]): doc for doc in stock.test_docs()}
    assert len(theirs) == 14  # ours and the threshold part's, one for each expression there too
    utils = stock_utils(stock)
    kinds = set()
    for record, doc, prompt in zip(ours, model.docs[task], model.prompts[task], strict=True):
        kind = box_form(doc)
        kinds.add(kind)
        other = theirs[doc["question_id"], doc["answer"]]
        assert prompt == stock.doc_to_text(other)
        scored = stock.process_results(other, [record.text])
        iou = utils.refcoco_bbox_rec_iou([scored["refcoco_IoU"]])
        assert record.score == float(record.scores["iou"] >= 0.5)
        assert record.parse_failure == (kind == "none")
        if kind == "pairs":
            assert record.scores["iou"] > 0.9 and iou == 0.0
        elif kind == "outside":
            assert 0 < iou < record.scores["iou"]
        else:
            assert record.scores["iou"] == pytest.approx(iou, abs=1e-6)
            assert record.score == utils.refcoco_bbox_rec_acc05([scored["refcoco_ACC@0.5"]])
    assert kinds == set(BOX_FORMS)


def task_named(manager: TaskManager, name: str) -> Any:
    return next(iter(manager.load_task_or_group([name], "chat").values()))


def stock_utils(task: Any) -> Any:
    """The names in the module of a stock task's scorer."""
    return SimpleNamespace(**task.config.process_results.__globals__)


def caption_say(doc: Mapping[str, Any]) -> str:
    """Nearly a reference, words of one, and nothing of any."""
    said = (doc["answer"][4].replace(".", "!"), f"It's a {doc['answer'][0].split()[1]} block, I think", "two dogs")
    return str(said[int(doc["id"]) % len(said)])


def test_captions_have_the_stock_tasks_prompt_and_cider(
    manager: TaskManager, beside: tuple[dict[str, Any], Model], monkeypatch: pytest.MonkeyPatch
) -> None:
    """CIDEr by the stock task's own aggregation, which needs Java for its tokenizer, on the rows of our part.

    Named difference: document frequencies are those of the part that a task evaluates, not of the whole validation
    split; on the same rows they are equal.
    """
    results, model = beside
    ours = records(results, "coco_caption_clean")
    stock = task_named(manager, "coco2017_cap_val")
    theirs = {doc["question_id"]: doc for doc in stock.test_docs()}
    for record, prompt in zip(ours, model.prompts["coco_caption_clean"], strict=True):
        assert prompt == stock.doc_to_text(theirs[record.sample_id])
    assert len({record.score for record in ours}) >= 3
    scored = [stock.process_results(theirs[one.sample_id], [one.text])["coco_CIDEr"] for one in ours]
    mean = sum(10 * record.scores["cider"] for record in ours) / len(ours)
    assert results["results"]["coco_caption_clean"]["cider,none"] == pytest.approx(mean)
    names = stock.config.process_results.__globals__
    if shutil.which("java") is None:
        # Whoever has no Java checks the formula on our tokens, by the same library.
        from bitquake.tasks.scoring.caption import tokenize

        class Tokenizer:
            def tokenize(self, captions: Mapping[int, list[dict[str, str]]]) -> dict[int, list[str]]:
                return {i: [" ".join(tokenize(one["caption"])) for one in texts] for i, texts in captions.items()}

        monkeypatch.setitem(names, "PTBTokenizer", Tokenizer)
    monkeypatch.setitem(names, "generate_submission_file", lambda name, args: str(Path.cwd() / name))
    assert mean == pytest.approx(names["coco_cider"](scored, None), abs=1e-9)


def rank_say(doc: Mapping[str, Any]) -> str:
    """The own caption comes first for every second picture, and sixth for the others."""
    target, better = doc[IDS]["target"], 0 if int(doc["img_id"]) % 2 else 5
    others = [i for i in range(100) if i != target]
    scores = [-50.0] * 100
    for rank, i in enumerate([*others[:better], target]):
        scores[i] = -float(rank)
    return Envelope(text="", candidate_scores=scores, candidate_kind="log_probability").encode()


def test_retrieval_has_the_stock_prompt_and_its_own_question(
    manager: TaskManager, beside: tuple[dict[str, Any], Model]
) -> None:
    """lmms-eval's ``flickr30k_test`` is captioning: only rows and prompt are the same. Ours ranks 100 captions."""
    results, model = beside
    ours = records(results, "flickr_retrieval_clean")
    stock = task_named(manager, "flickr30k_test")
    prompts = {stock.doc_to_text(doc) for doc in stock.test_docs()}
    assert prompts == set(model.prompts["flickr_retrieval_clean"])
    captions = {doc["img_id"]: doc["caption"] for doc in model.docs["flickr_retrieval_clean"]}
    for record, doc in zip(ours, model.docs["flickr_retrieval_clean"], strict=True):
        candidates = doc[CANDIDATES]
        assert len(set(candidates)) == 100 and candidates[doc[IDS]["target"]] in doc["caption"]
        # The other 99 are captions of 99 other pictures of the part.
        owners = {img_id for img_id, texts in captions.items() for text in texts if text in candidates}
        assert len(owners) == 100
        first = float(int(doc["img_id"]) % 2)
        expected = {"recall_1_of_100": first, "recall_5_of_100": first, "recall_10_of_100": 1.0}
        assert {key: record.scores[key] for key in expected} == expected and record.score == first
        assert record.scores["reciprocal_rank"] == (1.0 if first else pytest.approx(1 / 6))
    table = results["results"]["flickr_retrieval_clean"]
    assert table["recall_10_of_100,none"] == 1.0
    assert not any("1k" in key.lower() for key in table)


def test_a_model_that_answers_captions_with_text_cannot_be_ranked(manager: TaskManager) -> None:
    for record in score(task_named(manager, "flickr_retrieval_clean"), "a dog").values():
        assert record.score == 0.0 and record.parse_failure and "candidate_scores" in record.failure_detail


# --- a real (small) model -------------------------------------------------------------------------


def test_the_reference_checkpoint_answers_in_envelopes(manager: TaskManager, tmp_path: Path) -> None:
    """The whole path with a real model: architecture's prompt, letters, box tokens, candidates, confidences."""
    tasks = ["vizwiz_clean", "scienceqa_full_clean", "refcocoplus_clean", "flickr_retrieval_clean"]
    results = evaluate(
        manager,
        tasks,
        "bitquake_hf",
        model_args=f"pretrained=bitquake/block-idefics3,artifacts={tmp_path},dtype=float32,device=cpu",
        limit=2,
    )
    for task in tasks:
        for record in records(results, task):
            assert record.failure is None, record.failure_detail
            assert record.model_hash and record.card and record.prompt_hash
            assert bool(record.pixel_hash) != record.image_id.startswith("none-")
            if record.protocol != "retrieval":  # there nothing is generated
                assert record.confidence["joint"] is not None and record.n_tokens >= 1
            # It was not taught these prompts: an answer that cannot be read has no confidence of its own.
            assert (record.primary is None) == (record.parse_failure and record.protocol in ("choice", "grounding"))
            assert record.primary is None or 0 <= record.primary <= 1
            assert (record.protocol == "choice") == ("letter" in record.scores)


def test_paligemmas_location_tokens_survive_decoding_and_carry_the_confidence() -> None:
    """They are ordinary added tokens, which ``skip_special_tokens`` leaves in the text."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast
    from transformers.models.paligemma.processing_paligemma import EXTRA_TOKENS

    from bitquake.model_wrappers.confidence import box_confidences, read_answer

    raw = Tokenizer(models.WordLevel({"<eos>": 0, "the": 1, "dog": 2}, unk_token="<eos>"))
    raw.pre_tokenizer = pre_tokenizers.Whitespace()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=raw, eos_token="<eos>")
    tokenizer.add_tokens(EXTRA_TOKENS)
    tokens = tokenizer.convert_tokens_to_ids(
        ["<loc0256>", "<loc0128>", "<loc0768>", "<loc0512>", "the", "dog", "<eos>"]
    )
    answer = read_answer(tokenizer, tokens, frozenset({0}), with_ends=True)
    scored = score_box(answer.text, (80, 120, 320, 360), "location_tokens", (640, 480))
    assert (scored.iou, answer.n_answer) == (pytest.approx(1.0), 6)
    p = np.array([0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3])
    found = box_confidences(answer.text, answer.ends, np.log(p))
    assert found["box_joint"] == pytest.approx(0.9 * 0.8 * 0.7 * 0.6)
    assert found["box_minimum"] == pytest.approx(0.6)
