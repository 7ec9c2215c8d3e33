"""The block families and the parquet files that the package ships for them fit together."""

from __future__ import annotations

import pyarrow.parquet as pq
import pytest

from bitquake.tasks import catalog
from bitquake.tasks.families import BUILT_IN, Loaded, load_families
from bitquake.tasks.scoring import score_choice, score_vqa
from bitquake.tasks.scoring.grounding import target_box

BLOCK = [one for one in load_families()[0] if one.family.world == "block"]
IDS = [one.family.family for one in BLOCK]


@pytest.mark.parametrize("one", BLOCK, ids=IDS)
def test_files_are_there_with_the_declared_columns(one: Loaded) -> None:
    assert catalog.validate(BUILT_IN / one.family.family) == []


@pytest.mark.parametrize("one", BLOCK, ids=IDS)
def test_no_image_id_is_in_two_splits_and_no_sample_id_twice(one: Loaded) -> None:
    columns = one.family.columns
    assert columns.image_id is not None and columns.sample_id is not None
    seen: dict[str, str] = {}
    for split, name in (one.family.dataset.files or {}).items():
        table = pq.read_table(one.data_file(name), columns=[columns.image_id, columns.sample_id])
        samples = table[columns.sample_id].to_pylist()
        assert len(samples) == len(set(samples))
        for image in {str(value) for value in table[columns.image_id].to_pylist()}:
            assert seen.setdefault(image, split) == split, f"image id {image} is in {seen[image]} and in {split}"


@pytest.mark.parametrize("one", BLOCK, ids=IDS)
def test_every_reference_can_be_scored_and_the_best_answer_scores_well(one: Loaded) -> None:
    family, columns = one.family, one.family.columns
    assert family.dataset.files is not None
    declared = (columns.answers, columns.choices, columns.answer, columns.box, columns.captions)
    names = [name for name in declared if name]
    for row in pq.read_table(one.data_file(family.dataset.files["test"]), columns=names).to_pylist():
        if family.protocol == "vqa":
            answers = [a["answer"] if isinstance(a, dict) else a for a in row[columns.answers]]
            best = max(answers, key=answers.count)
            score = score_vqa(best, answers)
            assert score.score == score.lmms_eval >= 0.3
        elif family.protocol == "choice":
            assert score_choice(
                row[columns.choices][row[columns.answer]], row[columns.choices], row[columns.answer]
            ).score
        elif columns.captions:
            assert len(row[columns.captions]) == 5 and all(len(text.split()) >= 5 for text in row[columns.captions])
        else:
            box = target_box(row[columns.box], family.box_format, (64, 64))
            assert 0 <= box[0] < box[2] <= 64 and 0 <= box[1] < box[3] <= 64
