"""Gold files against the records of real runs of lmms-eval, against the noise room, and against damage."""

from __future__ import annotations

import hashlib
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import zstandard
from hypothesis import example, given
from hypothesis import strategies as st

from bitquake.envelope import Envelope
from bitquake.noise import SampleKey, apply, apply_text, load_rgb, pixel_hash
from bitquake.records import SampleRecord, question_hash
from bitquake.tasks import families
from bitquake.tasks.families import FamilyError
from bitquake.tasks.gold import build_gold, collect_gold
from bitquake.tasks.scoring import gold as gold_module
from bitquake.tasks.scoring.gold import (
    Gold,
    GoldError,
    GoldHeader,
    GoldSample,
    Letters,
    gold_path,
    gold_text,
    read_gold,
    score_against_gold,
    short_pixels,
    short_question,
)
from bitquake.tasks.scoring.grounding import exact_box, read_exact_box
from bitquake.tasks.selection import fraction

lmms_eval_model = pytest.importorskip("lmms_eval.api.model")
from lmms_eval.evaluator import simple_evaluate  # noqa: E402
from lmms_eval.tasks import TaskManager  # noqa: E402

LIMIT = 40
TASKS = (
    "block_vqav2_dev",
    "block_vqav2_jpeg_compression_3",
    "block_vizwiz_keyboard_typos_5",
    "block_advqa_gaussian_noise_3",
    "block_scienceqa_texture_questions",
    "block_refcocoplus_clean",
    "block_refcocoplus_elastic_transform_5",
)
SAID = ("yes", "Two.", "the red -one-", "none", "(B)", "C", "B. it is", "I do not know", "", "[3, 7.1, 40.3, 63]")


class Chatty(lmms_eval_model.lmms):  # type: ignore[misc,name-defined]
    """Says all sorts of things in envelopes, and a good box often enough; it hashes the pictures that it is shown."""

    is_simple = False

    def generate_until(self, requests: list[Any]) -> list[str]:
        answers = []
        for number, request in enumerate(requests):
            _, doc_to_messages, _, doc_id, task, split = request.args
            doc = self.task_dict[task][split][doc_id]
            [message] = doc_to_messages(doc)
            shown = [pixel_hash(part["url"]) for part in message["content"] if part["type"] == "image"]
            text = SAID[number % len(SAID)]
            if "bbox" in doc and number % 3:
                x, y, w, h = (96 / 64 * value for value in doc["bbox"])  # in pixels of the resized picture
                moved = number % 9
                text = f"[{x + moved / 7:.6f}, {y + moved / 3:.6f}, {x + w + moved:.6f}, {y + h:.6f}]"
            elif "answers" in doc and number % 2:
                said = [one if isinstance(one, str) else one["answer"] for one in doc["answers"]]
                text = f" The {said[number % len(said)].upper()}. "
            error = "model: out of words" if number % 17 == 5 else None
            envelope = Envelope(
                text="" if error else text,
                confidence={"joint": 0.5},
                pixel_hash=shown,
                processed_sizes=[(96, 96)],
                model_type="idefics3",
                features=f"f{number}",
                error=error,
            )
            answers.append(envelope.encode())
        return answers

    def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
        raise NotImplementedError

    def generate_until_multi_round(self, requests: list[Any]) -> list[str]:
        raise NotImplementedError


@pytest.fixture(scope="module")
def records() -> dict[str, list[SampleRecord]]:
    """Task -> what a real run of lmms-eval recorded of its first documents."""
    results = simple_evaluate(
        model=Chatty(),
        tasks=list(TASKS),
        task_manager=TaskManager(include_defaults=False),
        batch_size=1,
        limit=LIMIT,
    )
    samples = results["samples"]
    return {task: [SampleRecord.model_validate(line["bitquake"]) for line in samples[task]] for task in TASKS}


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("gold")
    for task in TASKS:
        build_gold(task, folder, LIMIT)
    return folder


@pytest.mark.parametrize("task", TASKS)
def test_answers_scored_again_are_the_records_to_the_bit(
    task: str, records: dict[str, list[SampleRecord]], folder: Path
) -> None:
    gold = read_gold(gold_path(folder, task))
    assert gold.header.n == LIMIT and gold.samples.keys() == {record.sample_id for record in records[task]}
    again = {"choice": ["lenient"], "grounding": ["iou"], "vqa": []}[gold.header.protocol]
    for record in records[task]:
        failed = record.failure is not None
        found = score_against_gold(gold, record.sample_id, record.answer, failed=failed)
        assert (found.score, found.parse_failure) == (record.score, record.parse_failure), record
        assert found.scores == ({} if failed else {name: record.scores[name] for name in again})
        sample = gold.samples[record.sample_id]
        assert sample.image == record.image_id
        if record.failure in (None, "model"):
            expected = short_pixels(record.pixel_hash) if gold.header.exact_pixels else "00000000"
            assert sample.pixels == expected or (failed and not record.pixel_hash)
        assert sample.question == short_question(record.question_hash) != ""
        for name in ("family", "variant", "world", "dataset", "dataset_revision", "split", "part", "subset", "noise"):
            assert getattr(gold.header, name) == getattr(record, name), name
    scores = [record.score for record in records[task]]
    assert min(scores) == 0 < max(scores) and any(record.failure == "model" for record in records[task])
    assert any(record.parse_failure for record in records[task]) == (gold.header.protocol != "vqa")


def test_records_say_which_question_and_which_features(records: dict[str, list[SampleRecord]]) -> None:
    """The typos are the noise room's own; the features are the envelope's."""
    clean = collect_gold("block_vizwiz_clean", LIMIT)
    for record in records["block_vizwiz_keyboard_typos_5"]:
        assert len(record.question_hash) == 32 and record.features == f"f{record.features[1:]}" != "f"
    import pyarrow.parquet as pq

    from bitquake.tasks.world.build import data_file

    asked = pq.read_table(data_file("block_vizwiz", "test"), columns=["question", "sample_id"]).to_pylist()[:LIMIT]
    for row, record in zip(asked, records["block_vizwiz_keyboard_typos_5"], strict=True):
        key = SampleKey("block_vizwiz", "test", row["sample_id"])
        noisy = apply_text(row["question"], "keyboard_typos", severity=5, key=key)
        assert record.sample_id == row["sample_id"] and record.question_hash == question_hash(noisy)
        plain = hashlib.blake2b(row["question"].encode(), digest_size=16).hexdigest()
        assert clean.samples[record.sample_id].question == plain[:8]
    assert question_hash("") == "" and records["block_vqav2_dev"][0].variant == "dev"


def test_pixels_are_those_of_the_noise_and_say_whether_they_are_exact(folder: Path) -> None:
    import pyarrow.parquet as pq

    from bitquake.tasks.world.build import data_file

    for task, name, exact in (
        ("block_advqa_gaussian_noise_3", "gaussian_noise", True),
        ("block_vqav2_jpeg_compression_3", "jpeg_compression", False),
    ):
        gold = read_gold(gold_path(folder, task))
        family = gold.header.family
        for row in pq.read_table(data_file(family, "test")).slice(0, 5).to_pylist():
            key = SampleKey(family, "test", row["sample_id"])
            noisy = apply(load_rgb(row["image"]["bytes"]), name, severity=3, key=key, mode="scaled")
            assert gold.samples[row["sample_id"]].pixels == (pixel_hash(noisy)[:8] if exact else "00000000")
        assert gold.header.exact_pixels is exact


def test_a_second_build_has_the_same_text_and_a_smaller_one_the_first_documents(folder: Path, tmp_path: Path) -> None:
    task = "block_refcocoplus_elastic_transform_5"
    first, second = (build_gold(task, place, LIMIT) for place in (tmp_path / "a", tmp_path / "b"))
    texts = [zstandard.ZstdDecompressor().stream_reader(file.path.open("rb")).read() for file in (first, second)]
    assert texts[0] == texts[1] and first.sha256 == second.sha256 == hashlib.sha256(texts[0]).hexdigest()
    assert read_gold(first.path, first.sha256).sha256 == first.sha256
    assert [file.name for file in (tmp_path / "a").iterdir()] == [f"{task}.jsonl.zst"]
    assert (first.n, first.n_bytes) == (LIMIT, first.path.stat().st_size)
    fewer = collect_gold(task, 7)
    assert set(fewer.samples) == set(list(collect_gold(task, LIMIT).samples)[:7])


@pytest.fixture
def collect(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Gold]:
    """``collect_gold`` where only one family is registered: to expand all of them takes seconds."""

    def collect_alone(family: Path, task: str, limit: int | None = None) -> Gold:
        monkeypatch.setattr(families, "BUILT_IN", family)
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        return collect_gold(task, limit)

    return collect_alone


def test_rows_that_nothing_can_be_scored_against_have_no_target(
    make_family: Callable[..., Path], rows: Callable[..., list[dict[str, Any]]], collect: Callable[..., Gold]
) -> None:
    made = rows(10)
    made[0]["image"] = {"bytes": b"broken", "path": None}
    made[2]["image"] = None
    made[4]["question"] = "  "
    made[6]["answers"] = made[6]["answers"][:3]
    family = make_family("gaps", test=made, threshold=rows(4, start=500))
    gold = collect(family, "gaps_clean")
    assert [sample.target is None for sample in gold.samples.values()] == [i in (0, 2, 4, 6) for i in range(10)]
    assert [sample.pixels == "" for sample in gold.samples.values()] == [i in (0, 2) for i in range(10)]
    assert score_against_gold(gold, "6", "no") == (0.0, {}, False)
    assert score_against_gold(gold, "8", "no").score == 1.0 and not gold.header.shift_from


def test_families_with_pictures_of_a_lossy_format_are_not_exact(
    make_family: Callable[..., Path], rows: Callable[..., list[dict[str, Any]]], collect: Callable[..., Gold]
) -> None:
    import io

    from PIL import Image

    made = rows(4)
    for row in made[2:]:
        buffer = io.BytesIO()
        Image.fromarray(np.full((30, 40, 3), 90, np.uint8)).save(buffer, "JPEG")
        row["image"] = {"bytes": buffer.getvalue(), "path": None}
    family = make_family("lossy", test=made, threshold=rows(4, start=500))
    assert not collect(family, "lossy_clean").header.exact_pixels
    assert collect(family, "lossy_threshold").header.exact_pixels
    assert collect(family, "lossy_clean", 2).header.exact_pixels
    more = make_family("more")
    assert collect_gold("more_clean", families=[more]).header.n == 12
    with pytest.raises(FamilyError, match="no task 'more_clean'"):
        collect_gold("more_clean")


def test_a_dataset_of_the_hub_where_selectors_learn(
    collect: Callable[..., Gold], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows of the hub's form; the pictures are those of the dev part, and nothing else is asked of the hub."""
    import datasets

    file = str(Path(__file__).parent / "fixtures" / "vqav2" / "validation.parquet")
    original = datasets.load_dataset

    def load_dataset(path: str, name: str | None = None, *, split: str, cache_dir: str | None) -> Any:
        assert (path, name, split) == ("lmms-lab-encoder/VQAv2", None, "validation")
        return original("parquet", data_files={split: file}, split=split, cache_dir=cache_dir)

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    gold = collect(families.BUILT_IN / "vqav2", "vqav2_dev")
    rows = {str(row["question_id"]): row for row in original("parquet", data_files=file, split="train")}
    chosen = {key for key, row in rows.items() if 0.05 <= fraction("split", str(row["image_id"])) < 0.4}
    assert gold.samples.keys() == chosen and len(chosen) == 2 and len(rows) == 14
    for key, sample in gold.samples.items():
        assert sample.target == tuple(one["answer"] for one in rows[key]["answers"])
        assert sample.image == str(rows[key]["image_id"]) and sample.pixels == pixel_hash(rows[key]["image"])[:8]
    assert (gold.header.variant, gold.header.noise, gold.header.world) == ("dev", None, "real")
    assert gold.header.part == "validation, pictures with hash in [0.05, 0.4)"


@pytest.mark.parametrize(
    ("task", "limit", "message"),
    [
        ("block_vqav2_cleen", None, "no task 'block_vqav2_cleen'; did you mean block_vqav2_clean"),
        ("block_coco_caption_clean", None, "'caption' cannot be scored from parsed answers"),
        ("block_flickr_retrieval_clean", None, "'retrieval' cannot be scored from parsed answers"),
        ("block_vqav2_clean", 0, "expected 1 or more, got 0"),
    ],
)
def test_what_has_no_gold_is_refused_by_name(task: str, limit: int | None, message: str, tmp_path: Path) -> None:
    with pytest.raises(FamilyError, match=message):
        build_gold(task, tmp_path, limit)
    assert not list(tmp_path.iterdir())


# --- files of every protocol, made by hand --------------------------------------------------------

HEADER = GoldHeader(
    task="a_clean",
    family="a",
    variant="clean",
    world="real",
    protocol="choice",
    n=2,
    exact_pixels=True,
    annotators=0,
    dataset="a/b",
    dataset_revision="",
    split="test",
    part="",
    subset="",
    shift_from="",
    noise=None,
)
SAMPLES = {
    "2": GoldSample("i", Letters("B", 4), "0123abcd", "0123abcd"),
    "10": GoldSample("\udc80é", None, "", ""),
}


def written(path: Path, text: str | bytes) -> Path:
    path.write_bytes(zstandard.ZstdCompressor().compress(text.encode() if isinstance(text, str) else text))
    return path


TEXT = "".join(gold_text(HEADER, SAMPLES))


def test_what_was_written_is_read(tmp_path: Path) -> None:
    gold = read_gold(written(tmp_path / "a.zst", TEXT))
    assert gold == Gold(HEADER, {"10": SAMPLES["10"], "2": SAMPLES["2"]}, hashlib.sha256(TEXT.encode()).hexdigest())
    assert TEXT.isascii() and [json.loads(line)["id"] for line in TEXT.splitlines()[1:]] == ["10", "2"]


def changed(**header: Any) -> str:
    head = json.dumps(HEADER.model_dump() | header, sort_keys=True, separators=(",", ":"))
    return "\n".join([head, *TEXT.splitlines()[1:], ""])


def sample(**fields: Any) -> str:
    line = {"id": "2", "image": "i", "pixels": "", "question": "", "target": ["B", 4]} | fields
    one = json.dumps(line, sort_keys=True, separators=(",", ":"))
    return "\n".join([*TEXT.splitlines()[:2], one, ""])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "is empty"),
        ("\n", "no JSON"),
        ("[" * 60_000 + "\n", "no JSON"),
        ("null\n", "not written as gold files are"),
        ("NaN\n", "no JSON|not written"),
        ('{"version":' + "9" * 5000 + "}\n", "no JSON|version"),
        (changed(version=2), "version 2, this Bitquake reads 1"),
        (changed(n=3), "2 of 3 samples: cut short"),
        (changed(n=1), "more than the 1 samples"),
        (changed(n=0), "n: "),
        (changed(n=True), "n: "),
        (changed(n="2"), "n: "),
        (changed(task="../a"), "task: "),
        (changed(protocol="caption"), "protocol: "),
        (changed(annotators=10), "annotators: 10 with the protocol 'choice'"),
        (changed(more=1), "more: "),
        (TEXT[:-1], "ends within a line"),
        (TEXT + "x" * (1 << 17), "line of more than"),
        (TEXT + TEXT.splitlines()[-1] + "\n", "stands twice"),
        ("\n".join([TEXT.splitlines()[i] for i in (0, 2, 1)]) + "\n", "behind a later one"),
        (TEXT.replace('"id":"2"', '"id":"2","id":"2"'), "none twice"),
        (TEXT.replace('"id"', ' "id"'), "keys sorted"),
        (TEXT.replace("\\u00e9", "é"), "ASCII"),
        (sample(id=2), "id: expected a text"),
        (sample(extra=1), "expected the keys"),
        (sample(pixels="0123ABCD"), "pixels: expected 8 hex digits"),
        (sample(question="0123abc"), "question: expected 8 hex digits"),
        (sample(target=["E", 4]), "no reference of the protocol 'choice'"),
        (sample(target=["b", 4]), "no reference"),
        (sample(target=["", 4]), "no reference"),
        (sample(target=["A", 27]), "no reference"),
        (sample(target=["A", True]), "no reference"),
        (sample(target=["A"]), "no reference"),
        (sample(target="A"), "no reference"),
        (sample(target={"A": 4}), "no reference"),
    ],
)
def test_broken_files_are_refused_with_the_reason(text: str, message: str, tmp_path: Path) -> None:
    with pytest.raises(GoldError, match=message):
        read_gold(written(tmp_path / "a.zst", text))


@pytest.mark.parametrize(
    ("protocol", "target"),
    [
        ("vqa", ["yes"] * 9),
        ("vqa", ["yes"] * 9 + [1]),
        ("vqa", "yesyesyesy"),
        ("grounding", [0.0, 0.0, 1.0]),
        ("grounding", [0, 0, 1, 1]),
        ("grounding", [0.0, 0.0, 0.0, 1.0]),
        ("grounding", [5.0, 0.0, 1.0, 1.0]),
        ("grounding", [0.0, 0.0, "1", 1.0]),
    ],
)
def test_references_of_another_form_are_refused(protocol: str, target: Any, tmp_path: Path) -> None:
    header = changed(protocol=protocol, annotators=10 if protocol == "vqa" else 0).splitlines()[0]
    text = "\n".join([header, *sample(target=target).splitlines()[1:], ""])
    with pytest.raises(GoldError, match=r"a.zst:3: target: .* is no reference of the protocol"):
        read_gold(written(tmp_path / "a.zst", text))


def test_broken_compression_and_bombs_are_refused(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = gold_path(folder, TASKS[0]).read_bytes()
    for length in (0, 3, 20, len(whole) // 2, len(whole) - 20):
        (tmp_path / "cut.zst").write_bytes(whole[:length])
        with pytest.raises(GoldError):
            read_gold(tmp_path / "cut.zst")
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 0xFF
    (tmp_path / "damaged.zst").write_bytes(damaged)
    with pytest.raises(GoldError):
        read_gold(tmp_path / "damaged.zst")
    (tmp_path / "plain.zst").write_text(TEXT)
    with pytest.raises(GoldError, match="cannot be decompressed"):
        read_gold(tmp_path / "plain.zst")
    for missing in (tmp_path / "none.zst", tmp_path):
        with pytest.raises(GoldError, match="cannot be read"):
            read_gold(missing)
    written(tmp_path / "bomb.zst", TEXT + "x\n" * (1 << 22))
    monkeypatch.setattr(gold_module, "MAX_TEXT", 1000)
    with pytest.raises(GoldError, match="more than the 1,000 bytes"):
        read_gold(tmp_path / "bomb.zst")
    monkeypatch.setattr(gold_module, "MAX_FILE", len(whole) - 1)
    shutil.copy(gold_path(folder, TASKS[0]), tmp_path / "large.zst")
    with pytest.raises(GoldError, match=r"large.zst: more than the [0-9,]+ bytes that are read"):
        read_gold(tmp_path / "large.zst")


def test_a_text_with_another_hash_than_the_pinned_one_is_refused(tmp_path: Path) -> None:
    pinned = hashlib.sha256(TEXT.encode()).hexdigest()
    assert read_gold(written(tmp_path / "a.zst", TEXT), pinned).sha256 == pinned
    edited = written(tmp_path / "a.zst", TEXT.replace('["B",4]', '["A",4]'))
    assert read_gold(edited).samples["2"].target == Letters("A", 4)
    with pytest.raises(GoldError, match=f"expected {pinned}"):
        read_gold(edited, pinned)


@pytest.mark.parametrize(
    ("protocol", "target", "answer", "message"),
    [
        ("choice", Letters("B", 4), "E", "one of the letters A to D, got 'E'"),
        ("choice", Letters("B", 4), "", "one of the letters"),
        ("choice", Letters("B", 4), "b", "one of the letters"),
        ("choice", Letters("B", 4), "AB", "one of the letters"),
        ("grounding", (0.0, 0.0, 1.0, 1.0), "", "expected a box"),
        ("grounding", (0.0, 0.0, 1.0, 1.0), "[1, 2, 3]", "expected a box"),
        ("grounding", (0.0, 0.0, 1.0, 1.0), "[1, 2, 3, 4] or so", "expected a box"),
        ("grounding", (0.0, 0.0, 1.0, 1.0), "[nan, 2, 3, 4]", "expected a box"),
        ("grounding", (0.0, 0.0, 1.0, 1.0), "[1, 2, 3, 1e999]", "expected a box"),
        ("grounding", (0.0, 0.0, 1.0, 1.0), "[1, 2, 3, ٤]", "expected a box"),
        ("vqa", ("yes",) * 10, None, "no answer"),
    ],
)
def test_answers_that_no_record_can_hold_are_refused(
    protocol: Any, target: Any, answer: str | None, message: str
) -> None:
    header = HEADER.model_copy(update={"protocol": protocol})
    gold = Gold(header, {"1": GoldSample("i", target, "", "")}, "")
    with pytest.raises(GoldError, match=f"a_clean, sample '1': .*{message}"):
        score_against_gold(gold, "1", answer)
    assert score_against_gold(gold, "1", answer, failed=True) == (0.0, {}, False)
    with pytest.raises(GoldError, match="no sample '2'"):
        score_against_gold(gold, "2", answer)


_EDGE = st.floats(-1e13, 1e13, allow_nan=False)


@given(st.tuples(_EDGE, _EDGE, _EDGE, _EDGE))
@example((1e-12, 5e-5, 1e-4, 0.00012345678901234567))
@example((-0.0, 64 / 3, 1e12, 999999999999.9999))
def test_a_recorded_box_is_read_as_it_was(box: tuple[float, float, float, float]) -> None:
    if any(0 < abs(edge) < 1e-99 for edge in box):  # models write twelve digits after the point
        return
    assert read_exact_box(exact_box(box)) == box
