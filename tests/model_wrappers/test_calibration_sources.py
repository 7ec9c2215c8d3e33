"""Where calibration samples come from: task families, folders, drawn pictures; each against the raw data."""

from __future__ import annotations

import functools
import io
import json
import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from bitquake.model_wrappers.calibration.families import FamilySource, write_box
from bitquake.model_wrappers.calibration.sample import CalibrationError, CalibrationSample, SampleError, Source
from bitquake.model_wrappers.calibration.sources import find_source
from bitquake.model_wrappers.quantizers.spec import CalibrationSpec
from bitquake.noise import SampleKey, apply, apply_text, pixel_hash
from bitquake.tasks.scoring.grounding import iou, score_box
from bitquake.tasks.world import scenes, splits

BLOCK = "bitquake/block-idefics3"


def found(pretrained: str = BLOCK, model_type: str = "idefics3", image_size: Any = 64, **spec: Any) -> Source:
    config = SimpleNamespace(model_type=model_type, vision_config=SimpleNamespace(image_size=image_size))
    return find_source(CalibrationSpec(**spec), config, pretrained=pretrained)


def samples(source: Source, n: int | None = None) -> list[CalibrationSample]:
    return [source.sample(i) for i in range(len(source) if n is None else n)]


@functools.cache
def raw(family: str) -> dict[str, dict[str, Any]]:
    """Question on a picture -> the row of the block world's calibration split."""
    rows = {}
    for row in splits.rows(family, "calibration"):
        pixels = np.asarray(Image.open(io.BytesIO(row["image"]["bytes"])).convert("RGB"))
        asked = " ".join(row[key] for key in ("question", "hint") if key in row)
        rows[f"pixels:{pixel_hash(pixels)} {asked}"] = row | {"pixels": pixels}
    return rows


def own(sample: CalibrationSample) -> str:
    (name,) = (one for one in sample.image_ids if one.startswith("pixels:"))
    return name


# families


def test_in_domain_is_questions_with_the_commonest_answer_on_distinct_pictures() -> None:
    got, rows = samples(found(source="in-domain"), 128), raw("block_vqav2")
    assert len({own(one) for one in got}) == 128  # one question on each picture before a second one on any
    answers = Counter()
    for one in got:
        row = rows[f"{own(one)} {one.prompt}"]
        assert one.answer == row["multiple_choice_answer"]
        assert np.array_equal(np.asarray(one.images[0]), row["pixels"])
        assert set(one.image_ids) == {own(one), f"block_vqav2:{row['image_id']}"}
        answers[one.answer] += 1
    assert len(answers) > 10


def test_every_question_comes_once_and_the_seed_decides_the_order() -> None:
    a, b, c = (found(source="in-domain", seed=seed) for seed in (0, 0, 1))
    keys = [[(own(one), one.prompt) for one in samples(source)] for source in (a, b, c)]
    assert keys[0] == keys[1] != keys[2]
    assert sorted(keys[0]) == sorted(keys[2]) and len(set(keys[0])) == len(keys[0]) == len(raw("block_vqav2"))


def test_captions_are_the_pictures_own() -> None:
    rows = raw("block_coco_caption")
    for one in samples(found(source="caption"), 40):
        assert one.prompt == "describe the picture."
        assert one.answer == rows[f"{own(one)} {one.prompt}"]["answer"][0]


def test_text_has_no_pictures() -> None:
    with_pictures = samples(found(source="in-domain"), 30)
    text = samples(found(source="text"), 30)
    assert [(one.images, one.image_ids) for one in text] == [((), ())] * 30
    assert [(one.prompt, one.answer) for one in text] == [(one.prompt, one.answer) for one in with_pictures]


def test_choice_answers_with_the_letter_and_grounding_with_the_box() -> None:
    science = raw("block_scienceqa")
    for one in samples(found(source="in-domain", data="block_scienceqa"), 30):
        row = next(row for key, row in science.items() if key.startswith(own(one)) and row["hint"] in one.prompt)
        letters = "ABCDE"[: len(row["choices"])]
        options = " ".join(f"({x}) {choice}" for x, choice in zip(letters, row["choices"], strict=True))
        assert (one.prompt, one.answer) == (f"{row['hint']} {row['question']} {options}", "ABCDE"[row["answer"]])
    boxes = raw("block_refcocoplus")
    pixels = FamilySource("block_refcocoplus", model_type="qwen2_vl", seed=0)  # whose space is the picture's pixels
    halved = FamilySource("block_refcocoplus", model_type="idefics3", seed=0, processed=lambda picture: (32, 32))
    for one, small in zip(samples(pixels, 30), samples(halved, 30), strict=True):
        x, y, w, h = boxes[f"{own(one)} {one.prompt}"]["bbox"]
        assert json.loads(one.answer or "") == [x, y, x + w, y + h]
        assert score_box(small.answer or "", (x, y, x + w, y + h), "processed", (64, 64), (32, 32)).score == 1


def test_corrupted_pictures_are_the_noise_room_s_under_their_clean_names() -> None:
    noisy = samples(found(source="corrupted-in-domain", noise="fog", severity=5, seed=3), 12)
    for clean, one in zip(samples(found(source="in-domain", seed=3), 12), noisy, strict=True):
        assert (one.prompt, one.answer, one.image_ids) == (clean.prompt, clean.answer, clean.image_ids)
        row = raw_sample_id(clean)
        key = SampleKey("block_vqav2", "calibration", row)
        wanted = apply(np.asarray(clean.images[0]), "fog", severity=5, key=key, mode="scaled", seed=3)
        assert np.array_equal(np.asarray(one.images[0]), wanted)
        assert not np.array_equal(np.asarray(one.images[0]), np.asarray(clean.images[0]))


def raw_sample_id(sample: CalibrationSample) -> str:
    return str(raw("block_vqav2")[f"{own(sample)} {sample.prompt}"]["sample_id"])


def test_a_text_noise_changes_the_question_only() -> None:
    spec = {"source": "corrupted-in-domain", "noise": "keyboard_typos", "severity": 5}
    changed = 0
    for clean, one in zip(samples(found(source="in-domain"), 12), samples(found(**spec), 12), strict=True):
        key = SampleKey("block_vqav2", "calibration", raw_sample_id(clean))
        assert one.prompt == apply_text(clean.prompt, "keyboard_typos", severity=5, key=key)
        assert np.array_equal(np.asarray(one.images[0]), np.asarray(clean.images[0]))
        changed += one.prompt != clean.prompt
    assert changed > 5


def test_a_moving_noise_moves_the_box() -> None:
    clean = FamilySource("block_refcocoplus", model_type="qwen2_vl", seed=0)
    turned = FamilySource("block_refcocoplus", model_type="qwen2_vl", seed=0, noise=("rotation", 5))
    moved, gone = [], 0
    for i in range(20):
        try:
            moved.append((json.loads(clean.sample(i).answer or ""), json.loads(turned.sample(i).answer or "")))
        except SampleError:  # too little of the object is left
            gone += 1
    assert sum(a != b for a, b in moved) > 10 and gone < 10


BOXES = st.tuples(*[st.floats(0, 0.7)] * 2, *[st.floats(0.15, 0.3)] * 2)


@given(BOXES, st.tuples(*[st.integers(64, 4000)] * 2), st.tuples(*[st.integers(64, 2000)] * 2))
def test_written_boxes_are_read_back_by_the_scorer(
    box: tuple[float, ...], size: tuple[int, int], processed: tuple[int, int]
) -> None:
    x, y, w, h = box
    edges = (x * size[0], y * size[1], (x + w) * size[0], (y + h) * size[1])
    for space in ("unit", "thousand", "pixels", "processed", "location_tokens"):
        read = score_box(write_box(edges, space, size, processed), edges, space, size, processed)
        assert read.box is not None and iou(read.box, edges) > 0.7


def test_the_size_that_a_box_counts_from_must_be_known() -> None:
    source = FamilySource("block_refcocoplus", model_type="idefics3", seed=0)
    with pytest.raises(SampleError, match="does not tell"):
        source.sample(0)


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"source": "none"}, "source none holds no samples.*data-free"),
        ({"source": "in-domain", "data": "block_vqa"}, "neither a folder nor a task family.*mean 'block_vqav2'"),
        ({"source": "in-domain", "data": "vizwiz"}, "'vizwiz' has no calibration split.*block_vqav2"),
        ({"source": "in-domain", "data": "vqav2"}, "lmms-lab-encoder/VQAv2.*cannot be loaded.*hf download"),
        ({"source": "caption", "data": "block_vqav2"}, "has none; use source in-domain"),
        ({"source": "noise", "data": "block_vqav2"}, "takes no data"),
        ({"source": "corrupted-in-domain", "noise": "fogg"}, "unknown noise 'fogg'.*Did you mean 'fog'"),
    ],
)
def test_refusals(spec: dict[str, Any], message: str) -> None:
    with pytest.raises(CalibrationError, match=f"(?s){message}"):
        found(**spec)


def test_another_model_has_no_domain_of_its_own() -> None:
    with pytest.raises(CalibrationError, match=r"(?s)source in-domain of 'org/model' needs data.*block_vqav2.*vqav2"):
        found("org/model", source="in-domain")
    with pytest.raises(CalibrationError, match="COCO-Caption2017"):  # it would be fetched, and tests are offline
        found("org/model", source="caption")


FAMILY = """
family: {name}
world: block
dataset: {{files: {{test: rows.jsonl, threshold: rows.jsonl, calibration: rows.jsonl}}, image: "{{picture}}"}}
splits:
  test: {{split: test}}
  threshold: {{split: threshold}}
  calibration: {{split: calibration, part: [0.0, 0.5]}}
columns: {{answers: answers, sample_id: id, image_id: picture}}
protocol: vqa
annotators: 2
prompts: {{default: {{pre_prompt: "Q: "}}, qwen2_vl: {{pre_prompt: "Say: ", post_prompt: " Now."}}}}
"""


@pytest.fixture(scope="module")
def own_family(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A contributor's family of 60 pictures as JSON lines, a third of them damaged, registered by a configuration."""
    root = tmp_path_factory.mktemp("own")
    folder = root / "families" / "holiday"
    folder.mkdir(parents=True)
    (folder / "family.yaml").write_text(FAMILY.format(name="holiday"))
    lines = []
    for i in range(60):
        pixels = np.random.default_rng(i).integers(0, 256, (20, 30, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / f"{i}.png")
        if i % 3 == 0:
            (folder / f"{i}.png").write_bytes((folder / f"{i}.png").read_bytes()[:200])
        answers = ["unclear", "unclear"] if i % 2 else ["yes", "no"]
        lines.append(json.dumps({"id": i, "picture": f"{i}.png", "question": f"is it {i}?", "answers": answers}))
    (folder / "rows.jsonl").write_text("\n".join(lines))
    unbuilt = folder.with_name("unbuilt")
    unbuilt.mkdir()
    table = next(line for line in FAMILY.splitlines() if line.startswith("dataset"))
    text = FAMILY.replace(table, "dataset: {{prepared: nobody_has_built_this}}").format(name="unbuilt")
    (unbuilt / "family.yaml").write_text(text)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CONFIG_HOME", str(root / "config"))
        (root / "config" / "bitquake").mkdir(parents=True)
        (root / "config" / "bitquake" / "config.yaml").write_text(f"families: ['{root / 'families'}']\n")
        yield folder


def test_a_contributed_family_with_damaged_pictures(own_family: Path) -> None:
    source = found("org/model", "qwen2_vl", source="in-domain", data="holiday")
    good, damaged = [], []
    for i in range(len(source)):
        try:
            good.append(source.sample(i))
        except SampleError as error:
            damaged.append(str(error))
    assert 15 < len(source) < 45  # its part: half of the pictures
    assert len(damaged) > 3 and all("the calibration split of holiday: image:" in text for text in damaged)
    for one in good:
        number = int(one.prompt.removeprefix("Say: is it ").removesuffix("? Now."))
        assert number % 3 and one.answer == ("unclear" if number % 2 else "yes")  # of equally common answers the first
        assert f"holiday:{number}.png" in one.image_ids
    before = source.identity
    assert before == found("org/model", "qwen2_vl", source="in-domain", data="holiday").identity
    rows = (own_family / "rows.jsonl").read_text()
    (own_family / "rows.jsonl").write_text(rows.replace("unclear", "unsharp"))
    assert before["revision"] != found("org/model", "qwen2_vl", source="in-domain", data="holiday").identity["revision"]


def test_a_dataset_that_was_not_built_here_says_how_to_build_it(own_family: Path) -> None:
    with pytest.raises(CalibrationError, match=r"unbuilt: .*`bitquake data prepare nobody_has_built_this`"):
        found(source="in-domain", data="unbuilt")


# folders


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    (tmp_path / "deep").mkdir()
    for i, name in enumerate(("a.png", "b.jpg", "deep/c.webp")):
        pixels = np.random.default_rng(i).integers(0, 256, (24, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / name, lossless=True)
    rows = [
        {"file_name": "a.png", "text": "a dog"},
        {"file_name": "a.png", "prompt": "who?", "answer": "a dog", "text": "unused"},
        {"file_name": "deep/c.webp", "text": " a cat "},
    ]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


def test_a_folder_is_read_as_an_image_folder(photos: Path) -> None:
    got = samples(found("org/model", source="caption", data=str(photos)))
    ask = "Provide a one-sentence caption for the provided image."
    assert {(one.prompt, one.answer) for one in got} == {(ask, "a dog"), ("who?", "a dog"), (ask, "a cat")}
    names = {f"pixels:{pixel_hash(Image.open(photos / name))}" for name in ("a.png", "deep/c.webp")}
    assert {own(one) for one in got} == names


def test_pictures_of_a_folder_without_a_word_are_for_the_model_to_describe(photos: Path) -> None:
    (photos / "metadata.jsonl").unlink()
    got = samples(found("org/model", source="self", data=str(photos)))
    assert len(got) == 3 and all(one.answer is None for one in got)
    with pytest.raises(CalibrationError, match=r"(?s)nothing says.*metadata.jsonl.*source self"):
        found("org/model", source="caption", data=str(photos))


def test_a_folder_s_pictures_are_corrupted_alike_wherever_it_lies(photos: Path, tmp_path_factory: Any) -> None:
    rows = [{"file_name": name, "prompt": "what?"} for name in ("a.png", "b.jpg")]
    (photos / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    moved = tmp_path_factory.mktemp("elsewhere") / "copy"
    shutil.copytree(photos, moved)
    spec = {"source": "corrupted-in-domain", "noise": "shot_noise", "severity": 2}
    here, there = (found("org/model", data=str(folder), **spec) for folder in (photos, moved))
    assert here.identity == there.identity
    for a, b in zip(samples(here), samples(there), strict=True):
        assert np.array_equal(np.asarray(a.images[0]), np.asarray(b.images[0])) and a.image_ids == b.image_ids
        clean = next(x for x in ("a.png", "b.jpg") if f"pixels:{pixel_hash(Image.open(photos / x))}" == own(a))
        key = SampleKey("folder", "calibration", clean)
        wanted = apply(Image.open(photos / clean), "shot_noise", severity=2, key=key)
        assert np.array_equal(np.asarray(a.images[0]), np.asarray(wanted))


@pytest.mark.parametrize(
    ("line", "source", "message"),
    [
        ({"file_name": "a.png"}, "caption", r'metadata.jsonl: row 1: "text" \(or "answer"\) is missing'),
        ({"file_name": "a.png", "text": "x"}, "in-domain", r'row 1: "prompt" is missing; it has file_name, text'),
        ({"file": "a.png", "text": "x"}, "caption", "row 1: no value for .file_name."),
        ({"file_name": "../a.png", "text": "x"}, "caption", "leads out of the folder"),
        ({"file_name": "z.png", "text": "x"}, "caption", r"z.png cannot be read.*row 1"),
        ({"file_name": "torn.png", "text": "x"}, "caption", r"(?s)torn.png: image: .*take it out of the folder"),
    ],
)
def test_bad_folders(photos: Path, line: dict[str, str], source: str, message: str) -> None:
    (photos / "torn.png").write_bytes((photos / "a.png").read_bytes()[:300])
    (photos / "metadata.jsonl").write_text(json.dumps(line))
    with pytest.raises(CalibrationError, match=message):
        samples(found("org/model", source=source, data=str(photos)))


def test_texts_of_a_folder(tmp_path: Path) -> None:
    (tmp_path / "one.txt").write_text("ä" * 40_000, encoding="utf-8")  # longer than what is read of it
    (tmp_path / "more.jsonl").write_text('{"text": "two"}\n{"prompt": "q", "answer": "three"}\n')
    got = {one.prompt: one.answer for one in samples(found("org/model", source="text", data=str(tmp_path)))}
    assert got == {"ä" * 32_768: None, "two": None, "q": "three"}
    (tmp_path / "latin.txt").write_bytes("ä".encode("latin-1"))
    with pytest.raises(CalibrationError, match=r"latin\.txt: not UTF-8"):
        found("org/model", source="text", data=str(tmp_path))


def test_an_empty_folder_is_named(tmp_path: Path) -> None:
    for source, what in (("text", ".txt or .jsonl"), ("self", "pictures")):
        with pytest.raises(CalibrationError, match=f"holds no {what}"):
            found("org/model", source=source, data=str(tmp_path))


# drawn pictures


def test_noise_is_gaussian_and_asked_generic_questions() -> None:
    got = samples(found("org/model", "llava", 336, source="noise", samples=15))
    assert {one.images[0].size for one in got} == {(336, 336)} and {one.answer for one in got} == {None}
    assert len({one.prompt for one in got}) > 6 and len({own(one) for one in got}) == 15
    pixels = np.asarray(got[0].images[0]).astype(float)
    inner = pixels[(pixels > 0) & (pixels < 255)]
    assert abs(inner.mean() - 128) < 1 and abs(np.percentile(pixels, 84.134) - 128 - 0.26 * 255) < 1.5
    assert abs(np.corrcoef(pixels[:, :-1].ravel(), pixels[:, 1:].ravel())[0, 1]) < 0.01
    other = found("org/model", "llava", 336, source="noise", samples=15, seed=1).sample(0)
    assert own(other) != own(got[0])
    assert found("org/model", "qwen2_vl", None, source="noise").sample(0).images[0].size == (448, 448)


def test_the_reference_model_knows_every_word_of_its_generic_prompts() -> None:
    from bitquake.model_wrappers.loading import load_processor, resolve_pretrained

    tokenizer = load_processor(resolve_pretrained(BLOCK), revision=None, trust_remote_code=False).tokenizer
    for one in samples(found(source="noise", samples=20)):
        assert one.images[0].size == (64, 64)
        assert tokenizer.unk_token_id not in tokenizer(one.prompt)["input_ids"]


def test_scenes_for_self_come_from_no_split() -> None:
    got = {own(one) for one in samples(found(source="self", samples=200))}
    assert len(got) == 200
    assert not got & {key.split()[0] for family in ("block_vqav2", "block_coco_caption") for key in raw(family)}
    shipped = [splits.scene_seed(family, split, 0) for family in splits.FAMILIES for split in splits.SPLITS]
    from bitquake.model_wrappers.calibration import synthetic

    # every split draws its scenes from seeds below these
    assert max(shipped) + 10_000_000 < synthetic._SCENE_BASE and splits._TRAIN_BASE + splits._SPAN < 1 << 45
    scene = scenes.sample_scene((1 << 45) + (7 << 32) + 5, 2, 4)
    assert np.array_equal(scenes.render(scene), np.asarray(found(source="self", seed=7).sample(5).images[0]))


def test_synthetic_pictures_vary_and_never_change() -> None:
    got = samples(found("org/model", "llava", 96, source="self", samples=30))
    assert len({own(one) for one in got}) == 30
    assert all(8 < np.asarray(one.images[0]).std() < 130 for one in got)
    # bytes that any machine makes: integers only
    assert own(got[0]) == "pixels:6e1681fcdc323acff70ff87269aaf6cd"
