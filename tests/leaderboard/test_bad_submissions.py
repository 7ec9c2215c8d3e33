"""The corpus of bad submissions: each is refused, with the reason that fits, and its neighbour is not harmed."""

from __future__ import annotations

import random
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from bad_submissions import ADVQA, CARD, MANIFEST, NOISE, RECORDS, Case, Draft, cases

from bitquake.leaderboard.boards import load_board
from bitquake.leaderboard.validate import Verdict, all_submissions, validate
from bitquake.tasks.scoring.gold import gold_path, read_gold

INT4, FULL = "acme__block-idefics3__rtn-int4-g64", "acme__block-idefics3__bf16"


@pytest.fixture(scope="module")
def base(corpus: Path) -> Draft:
    return Draft.of(corpus / INT4)


@pytest.fixture(scope="module")
def found(corpus: Path, gold: Path) -> list[Case]:
    answers = {task: read_gold(gold_path(gold, task)).samples for task in (ADVQA, NOISE)}
    return list(cases(Draft.of(corpus / INT4), Draft.of(corpus / FULL), answers))


def place(case: Case, corpus: Path, root: Path) -> Path:
    """The bad submission beside its full-precision twin."""
    shutil.copytree(corpus / FULL, root / FULL)
    draft = Draft.of(corpus / INT4)
    case.edit(draft)
    folder = draft.write(root)
    if case.after is not None:
        case.after(folder)
    return folder


def judge(root: Path, gold: Path, boards: Path) -> dict[str, Verdict]:
    return {verdict.name: verdict for verdict in validate(all_submissions(root), gold=gold, boards=boards)}


def test_the_base_of_the_corpus_is_valid(corpus: Path, base: Draft, gold: Path, boards: Path, tmp_path: Path) -> None:
    """Taken apart and put together again it is valid: so every case is refused for its edit."""
    place(Case("none", ()), corpus, tmp_path / "submissions")
    verdicts = judge(tmp_path / "submissions", gold, boards)
    assert {name: verdict.level for name, verdict in verdicts.items()} == {INT4: "recomputed", FULL: "recomputed"}
    assert not [finding for verdict in verdicts.values() for finding in verdict.findings]


def test_the_corpus_is_large_and_its_cases_are_distinct(found: list[Case], corpus: Path) -> None:
    assert len({case.name for case in found}) == len(found) >= 300
    assert len({code for case in found for code in case.codes}) >= 50


def test_each_bad_submission_is_refused_for_its_reason(
    found: list[Case], corpus: Path, gold: Path, boards: Path, tmp_path: Path
) -> None:
    wrong = []
    for i, case in enumerate(found):
        root = tmp_path / f"{i}" / "submissions"
        place(case, corpus, root)
        verdicts = judge(root, gold, boards)
        neighbour = verdicts.pop(FULL)
        if neighbour.level != "recomputed" or neighbour.findings:
            wrong.append(f"{case.name}: its neighbour is {neighbour.level}")
        bad = [verdict for verdict in verdicts.values() if not verdict.ok]
        if len(bad) != 1 or bad[0].submission is not None or any(v.submission for v in verdicts.values()):
            wrong.append(f"{case.name}: {[(v.name, v.level) for v in verdicts.values()]}")
            continue
        reasons = [f for f in bad[0].findings if f.code in case.codes and case.where in f.where]
        if not reasons:
            wrong.append(f"{case.name}: expected {case.codes} at {case.where!r}, got {list(map(str, bad[0].findings))}")
        for finding in bad[0].findings:
            text = str(finding)
            if not text.isprintable() or "<script" in finding.what or len(text) > 1500:
                wrong.append(f"{case.name}: a message that acts or never ends: {text[:200]!a}")
        shutil.rmtree(tmp_path / f"{i}", ignore_errors=True)
    assert not wrong, f"{len(wrong)} of {len(found)}:\n" + "\n".join(wrong[:40])


def test_html_in_an_answer_is_a_models_own_text(corpus: Path, gold: Path, boards: Path, tmp_path: Path) -> None:
    """Models may say anything; their answers are scored, and no page shows them."""

    def edit(draft: Draft) -> None:
        for row in draft.rows[:30]:
            row["answer"] = '<script>alert(1)</script> javascript:"<img src=x onerror=alert(1)>'

    place(Case("html", (), edit), corpus, tmp_path / "submissions")
    assert judge(tmp_path / "submissions", gold, boards)[INT4].level == "recomputed"


def flips(size: int, seed: int, n: int) -> Iterator[tuple[int, int]]:
    numbers = random.Random(seed)
    for _ in range(n):
        yield numbers.randrange(size), 1 << numbers.randrange(8)


@pytest.mark.parametrize("file", [MANIFEST, CARD, RECORDS])
def test_flipped_bits_raise_nothing(
    file: str, base: Draft, corpus: Path, gold: Path, boards: Path, tmp_path: Path
) -> None:
    """Whatever byte is damaged: a verdict, and for card and records (which the manifest hashes) a refusal."""
    data = base.content()[file]
    root = tmp_path / "submissions"
    folder = place(Case("none", ()), corpus, root)
    good = (folder / file).read_bytes() if file != MANIFEST else data
    for at, bit in flips(len(good), seed=len(file), n=40):
        (folder / file).write_bytes(good[:at] + bytes([good[at] ^ bit]) + good[at + 1 :])
        verdicts = judge(root, gold, boards)
        assert verdicts[FULL].level == "recomputed"
        assert file == MANIFEST or not verdicts[INT4].ok


def test_boards_of_the_corpus_are_pinned(boards: Path) -> None:
    assert all(task.gold for name in ("tiny", "corpus") for task in load_board(name, boards).tasks)
