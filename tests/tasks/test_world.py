"""The block world: exact pictures, right answers (against a literal reading of pixels and scenes), split hygiene."""

from __future__ import annotations

import hashlib
import io
import random
import re
import subprocess
import sys
from collections import Counter
from itertools import combinations, pairwise, permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from bitquake.tasks.world import build, captions, degradations, questions, scenes, splits
from bitquake.tasks.world.annotators import N_ANNOTATORS, perceive

SEEDS = st.integers(min_value=0, max_value=2**48)


def test_pictures_are_the_same_bytes_everywhere() -> None:
    digest = hashlib.blake2b(digest_size=16)
    for seed in range(40):
        digest.update(scenes.render(scenes.sample_scene(seed)).tobytes())
    assert digest.hexdigest() == "9e18e51ec8e574d654829e5fe47f6521"


def test_another_process_draws_the_same_pictures() -> None:
    code = (
        "import hashlib; from bitquake.tasks.world import scenes\n"
        "print(hashlib.blake2b(scenes.render(scenes.sample_scene(987654321)).tobytes()).hexdigest())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    here = scenes.render(scenes.sample_scene(987654321)).tobytes()
    assert done.stdout.strip() == hashlib.blake2b(here).hexdigest()


@given(SEEDS)
@settings(max_examples=60, deadline=None)
def test_boxes_are_tight_and_colours_are_drawn(seed: int) -> None:
    """Redraw each block alone on its own ground: the changed pixels span exactly its box."""
    scene = scenes.sample_scene(seed)
    assert len({block.cell for block in scene.blocks}) == len(scene.blocks)
    ground = scenes.render(scenes.Scene(scene.seed, ()))
    for block in scene.blocks:
        alone = scenes.render(scenes.Scene(scene.seed, (block,)))
        rows, columns = np.nonzero((alone.astype(int) != ground.astype(int)).any(axis=-1))
        x1, y1, x2, y2 = block.box
        assert rows.min() >= y1 and rows.max() < y2 and columns.min() >= x1 and columns.max() < x2
        # A drawn pixel may by chance equal the ground, so the box is met up to one pixel.
        assert rows.min() <= y1 + 1 and rows.max() >= y2 - 2 and columns.min() <= x1 + 1 and columns.max() >= x2 - 2
        if block.texture == "solid" and block.blend < 0.13:
            middle = alone[y1 + block.h // 2, x1 + block.w // 2].astype(int)
            distance = {name: np.abs(middle - rgb).sum() for name, rgb in scenes.COLORS.items()}
            assert min(distance, key=lambda name: distance[name]) == block.color


def _obey(block: scenes.Block, words: str) -> bool:
    """Literal reading of 'large striped red circle' or 'red object'."""
    own = {block.color, block.size, block.texture, block.shape, "object"}
    return all(word in own for word in words.split())


@given(SEEDS)
@settings(max_examples=80, deadline=None)
def test_answers_agree_with_a_literal_reading_of_the_question(seed: int) -> None:
    scene, rng = scenes.sample_scene(seed), random.Random(seed)
    singular = {questions.plural(shape): shape for shape in scenes.SHAPES}
    for question in questions.ask((*questions.VQA, *questions.ADVERSARIAL), scene, rng, 12):
        answer, text = question.program(scene), question.text.rstrip("?")
        blocks = scene.blocks
        if match := re.fullmatch(r"(?:is there a|are there any) (.+)", text):
            words = match[1].replace("objects", "object")
            assert answer == ("yes" if any(_obey(b, words) for b in blocks) else "no"), question
        elif match := re.fullmatch(r"how many objects are not (\w+)", text):
            assert answer == str(sum(b.color != match[1] for b in blocks)), question
        elif match := re.fullmatch(r"how many (.*?)(?: are there| are (solid|striped))", text):
            words = " ".join(singular.get(w, w).replace("objects", "object") for w in match[1].split())
            words += f" {match[2]}" if match[2] else ""
            assert answer == str(sum(_obey(b, words) for b in blocks)), question
        elif match := re.fullmatch(r"what (color|shape|size) is the ([a-z ]+)", text):
            if not re.search(r"left of|right of|above|below", match[2]):
                named = [b for b in blocks if _obey(b, match[2])]
                assert len(named) == 1 and answer == getattr(named[0], match[1]), question
        elif match := re.fullmatch(r"are there more (\w+)(?: objects)? than (\w+)(?: objects)?", text):
            first, second = (sum(_obey(b, singular.get(w, w)) for b in blocks) for w in match.groups())
            assert answer == ("yes" if first > second else "no"), question


@given(SEEDS)
@settings(max_examples=80, deadline=None)
def test_expressions_name_one_object_and_no_place(seed: int) -> None:
    scene = scenes.sample_scene(seed, 2, 6)
    for referral in questions.refer(scene, random.Random(seed), 4):
        named = [i for i, block in enumerate(scene.blocks) if _obey(block, referral.expression)]
        assert named == [referral.target]
        assert not re.search(r"left|right|top|above|below|middle", referral.expression)


@given(SEEDS)
@settings(max_examples=80, deadline=None)
def test_science_has_exactly_one_choice_that_obeys_the_rule(seed: int) -> None:
    scene = scenes.sample_scene(seed, 3, 6)
    question = questions.science(scene, random.Random(seed))
    if question is None:
        return
    (word,) = set(question.hint.replace(".", " ").split()) & {*scenes.COLORS, *scenes.SIZES, *scenes.TEXTURES}
    obeying = [
        i for i, choice in enumerate(question.choices) for b in scene.blocks if _obey(b, f"{word} {choice.split()[-1]}")
    ]
    assert obeying == [question.answer]


_RELATIONS = {"left of": (0, -1), "right of": (0, 1), "above": (1, -1), "below": (1, 1)}


@given(SEEDS, st.integers(0, N_ANNOTATORS - 1))
@settings(max_examples=300, deadline=None)
def test_captions_are_true_of_the_scene_as_the_annotator_sees_it(seed: int, annotator: int) -> None:
    """Literal reading: every named object exists, named objects differ, counts are exact, relations hold."""
    scene = scenes.sample_scene(seed, captions.MIN_OBJECTS, captions.MAX_OBJECTS)
    text, blocks = captions.caption(scene, annotator), perceive(scene, annotator).blocks
    assert 5 <= len(text.split()) <= 14 and re.fullmatch(r"[a-z ]+", text)
    body = re.sub(r"^(there is|a picture of) ", "", text)
    if match := re.fullmatch(r"(two|three) (.+?) (?:and|with) an? (.+)", body):
        singular = {questions.plural(shape): shape for shape in scenes.SHAPES} | {"objects": "object"}
        group = " ".join(singular.get(word, word) for word in match[2].split())
        counted = [block for block in blocks if _obey(block, group)]
        assert len(counted) == {"two": 2, "three": 3}[match[1]]
        assert any(_obey(block, match[3]) for block in blocks if block not in counted)
        return
    names = re.split(r" (?:and|with|left of|right of|above|below) ", body)
    assert len(names) in (2, 3) and all(re.fullmatch(r"(a (?![aeiou])|an [aeiou]).*", name) for name in names)
    relation = re.search("left of|right of|above|below", body)
    fits = []
    for chosen in permutations(blocks, len(names)):
        if all(_obey(block, name.split(maxsplit=1)[1]) for block, name in zip(chosen, names, strict=True)):
            axis, sign = _RELATIONS[relation[0]] if relation else (0, 0)
            middles = [((b.box[0] + b.box[2]) / 2, (b.box[1] + b.box[3]) / 2)[axis] for b in chosen]
            fits.append(not relation or sign * (middles[0] - middles[1]) > 5)
    assert any(fits), text


def test_annotators_word_captions_differently_and_captions_tell_pictures_apart() -> None:
    """Five captions of a picture are mostly different texts; another picture's caption is rarely true of it."""
    rows = [row for row, _ in zip(splits.rows("block_flickr_retrieval", "test"), range(200), strict=False)]
    assert np.mean([len(set(row["caption"])) for row in rows]) > 4
    texts = Counter(caption for row in rows for caption in set(row["caption"]))
    assert sum(count == 1 for count in texts.values()) > 0.9 * len(texts)
    assert len({row["img_id"] for row in rows}) == len({sentence for row in rows for sentence in row["sentids"]}) / 5


def test_a_scene_with_too_many_objects_has_no_caption() -> None:
    scene = next(s for s in map(scenes.sample_scene, range(100)) if len(s.blocks) == 6)
    with pytest.raises(ValueError, match="needs 2 to 4 objects, got 6"):
        captions.caption(scene, 0)


def test_near_colours_and_borderline_sizes_divide_the_annotators() -> None:
    """The clearer the object, the more annotators agree; and the share of confusions follows the stated logistic."""
    clear, vague, large = Counter[bool](), Counter[bool](), Counter[bool]()
    for seed in range(3000):
        scene = scenes.sample_scene(seed)
        seen = perceive(scene, seed % N_ANNOTATORS)
        for block, viewed in zip(scene.blocks, seen.blocks, strict=True):
            (clear if block.blend < 0.13 else vague)[viewed.color == block.color] += 1
            assert viewed.color in (block.color, scenes.NEAR_COLOR[block.color])
            if block.extent == scenes.SIZE_BOUNDARY:
                large[viewed.size == "large"] += 1
    assert clear[True] / clear.total() > 0.99
    assert 0.6 < vague[True] / vague.total() < 0.95
    assert large[True] / large.total() == pytest.approx(1 / (1 + np.exp(1.5)), abs=0.03)


def test_tokenizer_words_cover_every_text_and_answer() -> None:
    words = set(questions.words())
    for family in splits.FAMILIES:
        for row, _ in zip(splits.rows(family, "calibration"), range(60), strict=False):
            texts = [row.get("question", captions.PROMPT), row.get("hint", ""), *row.get("choices", [])]
            answers = [*row.get("answers", []), *row.get("caption", [])]
            answers += row["answer"] if family == "block_coco_caption" else []
            texts += [a if isinstance(a, str) else a["answer"] for a in answers]
            for text in texts:
                missing = set(re.findall(r"\w+|[^\w\s]", text)) - words
                assert not missing, (family, text)


def test_degradations_grow_with_harm_and_leave_the_input_alone() -> None:
    picture = scenes.render(scenes.sample_scene(5))
    before = picture.copy()
    harms: dict[str, list[tuple[float, float]]] = {}
    for seed in range(400):
        photo = degradations.degrade(picture, random.Random(seed))
        assert photo.pixels.shape == (64, 64, 3) and photo.pixels.dtype == np.uint8
        harms.setdefault(photo.kind, []).append((photo.harm, np.abs(photo.pixels.astype(int) - picture).mean()))
    assert (picture == before).all()
    for kind, pairs in harms.items():
        pairs.sort()
        half = len(pairs) // 2
        if kind not in ("none", "off centre"):  # a shift past the object changes little more
            assert np.mean([d for _, d in pairs[half:]]) > np.mean([d for _, d in pairs[:half]]), kind


def test_seed_ranges_of_all_splits_are_apart() -> None:
    ranges = []
    for family in splits.FAMILIES:
        for split in splits.SIZES[family]:
            ranges.append((splits.scene_seed(family, split, 0), splits.scene_seed(family, split, 9_999_999)))
    ranges.sort()
    assert all(first[1] < second[0] for first, second in pairwise(ranges))
    rng = random.Random(0)
    assert min(splits.train_seed(rng) for _ in range(1000)) > 0
    assert ranges[-1][1] < 1 << 44 or ranges[0][0] > (1 << 44) + (1 << 40)


@pytest.mark.parametrize("family", splits.FAMILIES)
def test_shipped_files_have_the_promised_sizes_and_are_what_the_generator_makes(family: str) -> None:
    import pyarrow.parquet as pq

    images: dict[str, set[str]] = {}
    for split, size in splits.SIZES[family].items():
        table = pq.read_table(build.data_file(family, split))
        assert table.num_rows == size.questions
        assert size.questions >= {"test": 1000 if size.per_image == 1 else 2000}.get(split, 1)
        assert len(set(table["sample_id"].to_pylist())) == table.num_rows
        shipped = table.slice(0, 12).to_pylist()
        for row, made in zip(shipped, splits.rows(family, split), strict=False):
            pixels = [np.asarray(Image.open(io.BytesIO(r["image"]["bytes"])).convert("RGB")) for r in (row, made)]
            assert (pixels[0] == pixels[1]).all()
            assert {k: v for k, v in row.items() if k != "image"} == {k: v for k, v in made.items() if k != "image"}
        images[split] = {hashlib.blake2b(cell["bytes"]).hexdigest() for cell in table["image"].to_pylist()}
    for one, other in combinations(images, 2):
        assert not images[one] & images[other], (one, other)
    assert splits.SIZES["block_vqav2"]["test"].questions == 10_000


def test_shipped_data_is_small() -> None:
    sizes = {family: sum(path.stat().st_size for path in (build.DATA / family).iterdir()) for family in splits.FAMILIES}
    assert sum(list(sizes.values())[:5]) <= 30e6 and sum(sizes.values()) <= 34e6
    assert {path.name for path in build.DATA.iterdir()} == set(splits.FAMILIES)


def test_datasets_decodes_the_image_column() -> None:
    datasets = pytest.importorskip("datasets")
    path = build.data_file("block_refcocoplus", "calibration")
    loaded = datasets.load_dataset("parquet", data_files={"calibration": str(path)}, split="calibration")
    first = next(iter(splits.rows("block_refcocoplus", "calibration")))
    assert loaded[0]["image"].size == (64, 64)
    x, y, w, h = loaded[0]["bbox"]
    assert [x, y, w, h] == first["bbox"] and 0 <= x < x + w <= 64 and 0 <= y < y + h <= 64


def test_unknown_family_or_split_is_named() -> None:
    with pytest.raises(ValueError, match=r"no shipped split 'train' of 'block_vqav2'"):
        next(splits.rows("block_vqav2", "train"))
    with pytest.raises(ValueError, match="block_gqa"):
        next(splits.rows("block_gqa", "test"))


def test_words_that_came_later_leave_the_token_ids_of_the_others() -> None:
    """The numbers 0 to 64 follow the sorted words and signs; words of captions only come behind them."""
    words = questions.words()
    assert len(words) == len(set(words))
    at = words.index("0")
    assert words[at : at + 65] == [str(n) for n in range(65)]
    assert words[:at] == sorted(words[:at]) and at == 90
    assert set(words[at + 65 :]) == {"and", "describe", "picture", "three", "two", "with"}
