"""Promises about every text noise: same text everywhere, protected parts untouched, harder with severity.

``python tests/noise/test_text.py`` prints the texts and hashes; text_goldens.json holds them, and changes only together
with a noise's version.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from bitquake.noise import SEVERITIES, NoiseError, SampleKey, TextNoise, apply_text, image_noises, text_noises
from bitquake.noise.question import Question
from bitquake.noise.text import FIRST_ID, text_noise

NOISES = list(text_noises())
GOLDENS = Path(__file__).with_name("text_goldens.json")
any_noise = pytest.mark.parametrize("name", NOISES)
SHOWN = (
    "What color is the cat's collar?",
    "How many people in the picture are wearing red hats, and is one of them sitting on the wooden bench?",
    'Which option C is right: what does the "STOP" sign say at 10:30 on page 4?\n(A) turn left\n(B) stop here',
    "Où est le café à côté de la gare, et à quelle heure ouvre-t-il le matin ?",
)
SUBJECTS = ("man", "two dogs", "woman in the blue coat", "3 children", "café", "children's bus", "собака", "猫")
FRAMES = (
    "What is the {} doing?",
    "Is there a {} left of the table, or right of it?",
    "What would the {} wear?\nAnswer the question using a single word or phrase.",
    "Why do you think the {} knows where their weather report came through, 20 minutes ago?",
)
CORPUS = [frame.format(subject) for frame, subject in product(FRAMES, SUBJECTS)]
WORDY = "Please look around the corner of that building and tell me which colour their larger umbrellas have"


def key(sample: object) -> SampleKey:
    return SampleKey("goldens", "test", str(sample))


def noisy(text: str, name: str, severity: int, sample: object = 0, seed: int = 1) -> str:
    return apply_text(text, name, severity=severity, key=key(sample), seed=seed)


def observed() -> dict[str, Any]:
    """name@version -> the shown questions at each severity, and for each severity a hash over a corpus of 96 texts."""
    out: dict[str, Any] = {}
    for noise in text_noises().values():
        hashes = []
        for severity in SEVERITIES:
            texts = [noisy(text, noise.name, severity, f"{i}-{k}") for i, text in enumerate(CORPUS) for k in range(3)]
            hashes.append(hashlib.blake2b("\x00".join(texts).encode(), digest_size=16).hexdigest())
        shown = [[noisy(text, noise.name, severity, i) for severity in SEVERITIES] for i, text in enumerate(SHOWN)]
        out[f"{noise.name}@{noise.version}"] = {"texts": shown, "hashes": hashes}
    return out


def test_text_noises_give_the_golden_texts() -> None:
    assert observed() == json.loads(GOLDENS.read_text(encoding="utf-8"))


# ---------------------------------------------------------------------------------------------- what must stay

PROTECTED = (
    "3", "3.5", "1,000", "50%", "$5", "10:30", "2nd", "A4", "twenty-one", "two", "One", "seventh", "a hundred", "½",
    "٣", "XIV", "(A)", "B.", "C)", "option C", "choice (B)", '"turn left"', "“no exit”", "'late show'",
    "https://a.org/b?c=dog", "me@some.org", "<image>", "<|image_pad|>", "{question}", "[IMG]",
)  # fmt: skip
ORDINARY = (
    "the", "tone", "often", "bone", "stone", "anyone", "to", "for", "Won", "throne", "is", "dog,", "cat?", "there",
    "their", "sixty-ish", "no", "what's", "café", "собака", "猫在哪里", "مرحبا", "नमस्ते", "👩‍🔬", "dog😀", "(big)",
    "and", "ill", "civic", "tent", "of", "on", "ton", "eleve", "wo", "tow", "fourt", "ix", "MI", "CLI",
)  # fmt: skip
pieces = st.lists(st.sampled_from(PROTECTED + ORDINARY), min_size=1, max_size=12)
separators = st.sampled_from((" ", " ", " ", "  ", "\n", "\t"))


CARDINALS = """zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen
seventeen eighteen nineteen twenty thirty forty fifty sixty seventy eighty ninety hundred"""
ORDINALS = """first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth
fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth fortieth fiftieth sixtieth seventieth
eightieth ninetieth hundredth"""


def numbers(text: str) -> list[str]:
    """Every number in a text, in order: runs of digits outside words, and the words of the numbers 0 to 100."""
    words = set(CARDINALS.split()) | set(ORDINALS.split())
    found = re.finditer(r"(?<![A-Za-z0-9])[A-Za-z]+(?![A-Za-z0-9])|(?<![A-Za-z])[0-9][0-9.,:]*(?![A-Za-z])", text)
    return [m.group() for m in found if m.group().lower() in words or m.group()[0].isdigit()]


@settings(max_examples=300, deadline=None)
@given(pieces, st.data(), st.sampled_from(NOISES), st.integers(0, 10**6))
def test_protected_parts_and_numbers_stay(parts: list[str], data: Any, name: str, sample: int) -> None:
    text = parts[0] + "".join(data.draw(separators) + part for part in parts[1:])
    out = noisy(text, name, 5, sample)
    at = 0
    for part in parts:
        if part in PROTECTED:
            at = out.find(part, at)
            assert at >= 0, (text, out, part)
            at += len(part)
    assert numbers(out) == numbers(text)
    assert [c for c in out if c in "\n\t"] == [c for c in text if c in "\n\t"]
    assert re.findall(r"[?,()]", out) == re.findall(r"[?,()]", text)
    lone = re.compile(r"(?<![\w'’])[A-Za-z](?![\w'’])")
    assert lone.findall(out) == lone.findall(text)


@any_noise
def test_no_number_is_made_even_where_one_edit_would_do(name: str) -> None:
    """Words that are one edit from a number word, among them most of those that this noise's own edits reach."""
    near = (
        "tone fone bone tow wto tew te threee fve ive fiv seix si tn ten's often eigh nie niine zro hafl nnoe eno 1 won"
    )
    near += " fuor to too for fore won ate tth Il lI XX1 fifht siix fivve oen ixs vlx hal sxi netn wot"
    text = " ".join(near.split())
    for sample in range(200):
        for severity in (3, 5):
            assert numbers(noisy(text, name, severity, sample)) == numbers(text)


@any_noise
@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "\n\n",
        "<image>",
        "3 + 4 = 7?",
        "(A) red (B) blue",
        "A. cat\nB. dog\nC. bird",
        '"What does the sign say?"',
        "Answer the question using a single word or phrase.",
        "https://example.org/what-is-this",
        "😀 👩‍🔬 ❤️",
        "twenty-one",
        "?!",
    ],
)
def test_a_question_of_protected_text_only_stays(name: str, text: str) -> None:
    assert {noisy(text, name, severity, sample) for severity in SEVERITIES for sample in range(30)} == {text}


def test_the_answer_format_stays_where_it_stands_in_the_question() -> None:
    question = "What is the large animal near the window eating right now?"
    for asked in (
        "\nAnswer the question using a single word or phrase.",
        " Please answer with yes or no.",
        "\nAnswer with the option's letter from the given choices directly.",
        " Give a one-word answer.",
        " Use a single word.",
        " Return only the letter of the right choice.",
        " Your answer should be yes or no.",
        "\nPlease keep your answer short.",
        "\nWhen the provided information is insufficient, respond with 'Unanswerable'.",
        "\nA. a small horse\nB. a large cow",
        "\n(A) grass (B) nothing at all",
        " (A) grass (B) nothing at all (C) hay",
        " A. grass B. nothing at all",
    ):
        kept = asked.partition("insufficient, ")[2] or asked
        outs = {noisy(question + asked, name, 5, sample) for name in NOISES for sample in range(20)}
        assert all(out.endswith(kept) for out in outs) and len(outs) > 100


def test_what_is_protected_is_what_is_documented() -> None:
    cases = {
        "Is it twenty-one or one hundred and five?": "______twenty-one____one hundred and five_",
        "Is plan B or option C better?": "________B____option C________",
        "Louis XIV saw 3 mixed hats": "______XIV_____3___________",
        "it's 'this one' dogs' toys": "_____'this one'___________",
        "I'd say a dog": "________a____",
        "State the number of red dogs.": "_" * 29,
        "What is this, in a single word?": "______________in a single word_",
        "三只猫": "三__",
    }
    for text, expected in cases.items():
        mask = Question(text).protected
        assert "".join(c if m else "_" for c, m in zip(text, mask, strict=True)) == expected


# ------------------------------------------------------------------------------------------------- any text at all


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=60), st.sampled_from(NOISES), st.sampled_from(SEVERITIES), st.integers(0, 2**64))
@example("\ud800 dog \udfff", "character_swap", 5, 0)
@example("e\u0301" * 30, "character_delete", 5, 0)
def test_any_text_gives_text(text: str, name: str, severity: int, seed: int) -> None:
    out = apply_text(text, name, severity=severity, key=key(0), seed=seed)
    assert isinstance(out, str) and out == apply_text(text, name, severity=severity, key=key(0), seed=seed)
    if not any("\ud800" <= character <= "\udfff" for character in text):
        out.encode()


SCRIPTS = (
    "Où e\u0301tait-il de\u0301ja\u0300 alle\u0301 hier apre\u0300s-midi avec sa petite sœur ?",  # decomposed accents
    "Con me\u0300o na\u0300y co\u0301 ma\u0300u gi\u0300 va\u0323\u0302y ba\u0323n o\u031bi",
    "مَا هٰذَا الحَيَوَانُ الَّذِي يَجْلِسُ عَلَى الطَّاوِلَةِ",
    "מַה הַצֶּבַע שֶׁל הַכֶּלֶב הַגָּדוֹל",
    "Какого цвета большая собака на этой фотографии",
    "图片里的那个女人手里拿着什么东西",
    "ภาพนี้มีสัตว์อะไรอยู่บ้าง",
    "그림에는 어떤 동물이 있습니까 그리고 무엇을 합니까",
    "wh\u1ab0a\u1ab0t is th\u1ab0e co\u1ab0lour of\u1ab0 thi\u1ab0s",  # a mark younger than Unicode 3.2
    "what👩‍🔬is 🏳️‍🌈 this❤️thing 👍🏽 here",
)


@pytest.mark.parametrize("text", SCRIPTS)
@any_noise
def test_no_grapheme_is_split(name: str, text: str) -> None:
    """User-perceived characters by the Unicode rule (the library ``regex``): none but ASCII ones is ever new."""
    import regex

    before = regex.findall(r"\X", text)
    changed = 0
    for sample in range(30):
        out = noisy(text, name, 5, sample)
        changed += out != text
        after = regex.findall(r"\X", out)
        assert {cluster for cluster in after if not cluster.isascii()} <= set(before)
        if name == "character_swap":
            assert sorted(after) == sorted(before)
        if name in ("keyboard_typos", "character_insert", "ocr_confusion"):
            assert [c for c in after if not c.isascii()] == [c for c in before if not c.isascii()]
        if name == "character_delete":
            rest = iter(before)
            assert all(cluster in rest for cluster in after)  # a subsequence
    if name in ("character_swap", "character_delete") and text not in SCRIPTS[-2:]:
        assert changed > 20


# ---------------------------------------------------------------------------------------------------- severity


def edit_distance(one: str, two: str) -> int:
    """Levenshtein's, by the textbook's table."""
    row = list(range(len(two) + 1))
    for i, a in enumerate(one, 1):
        last, row[0] = row[0], i
        for j, b in enumerate(two, 1):
            last, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, last + (a != b))
    return row[-1]


@any_noise
def test_the_expected_edit_distance_rises_with_severity(name: str) -> None:
    means = [
        sum(edit_distance(text, noisy(text, name, s, i)) for i, text in enumerate(CORPUS)) / len(CORPUS)
        for s in SEVERITIES
    ]
    assert means[0] > 0.1 and all(b > 1.1 * a for a, b in pairwise(means)), means
    assert means[4] < 0.75 * sum(map(len, CORPUS)) / len(CORPUS)


def is_subsequence(short: list[Any], long: list[Any]) -> bool:
    rest = iter(long)
    return all(item in rest for item in short)


@any_noise
def test_a_severity_keeps_what_the_one_below_changed(name: str) -> None:
    text = " ".join(WORDY.split() * 3)
    for sample in range(40):
        outs = [text, *(noisy(text, name, severity, sample) for severity in SEVERITIES)]
        for mild, hard in pairwise(outs):
            if name in ("character_insert", "word_duplicate"):
                assert is_subsequence(list(mild), list(hard))
            elif name in ("character_delete", "word_drop"):
                assert is_subsequence(list(hard), list(mild))
            elif name in ("keyboard_typos", "character_swap"):
                assert len(mild) == len(hard) == len(text)
                assert all(h == m for t, m, h in zip(text, mild, hard, strict=True) if m != t)
            elif name == "word_swap":
                words = zip(text.split(" "), mild.split(" "), hard.split(" "), strict=True)
                assert all(h == m for t, m, h in words if m != t)
            elif name == "spoken":
                fillers = re.compile(r"\b(um|uh|er|like|well|you know|\w+-) ")
                assert is_subsequence(fillers.findall(mild), fillers.findall(hard))
            else:
                assert name == "ocr_confusion"  # replacements differ in length: count words that are not as they were
                changed = [
                    {i for i, (t, o) in enumerate(zip(text.split(), out.split(), strict=True)) if t != o}
                    for out in (mild, hard)
                ]
                assert changed[0] <= changed[1]


LONG = " ".join(WORDY.split() * 80)  # without a repeated letter at a word's seam that a swap could hide in


def test_the_rates_are_those_documented() -> None:
    """Shares of letters and words changed, within five standard deviations of a binomial distribution."""
    letters, words = len(WORDY.replace(" ", "")) * 80, len(WORDY.split()) * 80
    for severity in SEVERITIES:
        rate = text_noises()["keyboard_typos"].parameters[severity - 1]["rate"]
        out = noisy(LONG, "keyboard_typos", severity)
        share(sum(a != b for a, b in zip(LONG, out, strict=True)), letters, rate)
        share(len(noisy(LONG, "character_insert", severity)) - len(LONG), letters, rate)
        share(len(LONG) - len(noisy(LONG, "character_delete", severity)), letters, rate, slack=0.02)
        rate = text_noises()["word_drop"].parameters[severity - 1]["rate"]
        share(len(LONG.split()) - len(noisy(LONG, "word_drop", severity).split()), words, rate)
        share(len(noisy(LONG, "word_duplicate", severity).split()) - words, words, rate)
        swapped = zip(LONG.split(), noisy(LONG, "word_swap", severity).split(), strict=True)
        share(sum(a != b for a, b in swapped) // 2, words, (1 - math.exp(-2 * rate)) / 2)
        filler = text_noises()["spoken"].parameters[severity - 1]["filler"]
        share(len(re.findall(r"\b(?:um|uh|er|like|well|you know) ", noisy(LONG, "spoken", severity))), words, filler)


def share(count: int, of: int, rate: float, slack: float = 0.0) -> None:
    assert abs(count - of * rate) <= 5 * math.sqrt(of * rate * (1 - rate)) + slack * of * rate, (count, of, rate)


def test_samples_seeds_and_noises_are_independent() -> None:
    text = " ".join(WORDY.split() * 2)
    outs = {noisy(text, "keyboard_typos", 5, sample, seed) for sample in range(30) for seed in range(3)}
    assert len(outs) == 90
    hits = [
        {i for i, (a, b) in enumerate(zip(LONG, noisy(LONG, name, 5, s), strict=True)) if a != b}
        for name, s in (("keyboard_typos", 0), ("keyboard_typos", 1), ("character_swap", 0))
    ]
    for one, two in ((0, 1), (0, 2)):
        expected = len(hits[one]) * len(hits[two]) / len(LONG.replace(" ", ""))
        assert abs(len(hits[one] & hits[two]) - expected) < 6 * math.sqrt(expected)


# ------------------------------------------------------------------------------------------------ registry, requests


def test_every_text_noise_declares_itself() -> None:
    noises = text_noises()
    assert [noise.id for noise in noises.values()] == list(range(101, 110))  # ids are part of the seeds
    for name, noise in noises.items():
        assert isinstance(noise, TextNoise) and noise.name == name
        assert (noise.group, noise.exactness, noise.geometry) == ("text", "exact", "preserved")
        assert len(noise.parameters) == 5
        for word in ("Parameters", *noise.parameters[0]):
            assert word in noise.documentation
        for row in zip(*(tuple(parameters.values()) for parameters in noise.parameters), strict=True):
            assert list(row) == sorted(set(row)) and row[0] > 0 and row[-1] < 1
    noises.clear()
    assert len(text_noises()) == 9


def test_names_and_ids_stand_for_one_noise_only() -> None:
    assert not set(image_noises()) & set(text_noises())
    assert max(noise.id for noise in image_noises().values()) < FIRST_ID

    def fog(question: Any, parameters: Any, stream: Any) -> str:
        return ""

    def mumble(question: Any, parameters: Any, stream: Any) -> str:
        return ""

    rates = {"rate": (0.1, 0.2, 0.3, 0.4, 0.5)}
    for corrupt, number, table in ((fog, 200, rates), (mumble, 101, rates), (mumble, 99, rates), (mumble, 200, {})):
        with pytest.raises(ValueError, match=corrupt.__name__):
            text_noise(id=number, version=1, parameters=table)(corrupt)
    assert list(text_noises()) == NOISES


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"name": "keyboard_typo"}, "unknown noise 'keyboard_typo'. Did you mean 'keyboard_typos'"),
        ({"name": "fog"}, "fog is an image noise. Use apply"),
        ({"severity": 6}, "got 6"),
        ({"seed": -1}, "at least 0, got -1"),
        ({"version": 2}, "implements keyboard_typos version 1, got 2"),
        ({"key": "42"}, "three strings"),
        ({"text": None}, "text: expected a string, got NoneType"),
        ({"text": b"what"}, "got bytes"),
    ],
)
def test_mistakes_are_explained(change: dict[str, Any], message: str) -> None:
    request: dict[str, Any] = {"text": "What is this?", "name": "keyboard_typos", "severity": 1, "key": key(0)} | change
    with pytest.raises(NoiseError, match=re.escape(message)):
        apply_text(request.pop("text"), request.pop("name"), **request)


def test_hostile_length_is_no_trap() -> None:
    """Patterns that a backtracking matcher could take for ever; each has 20,000 characters."""
    for unit in ("a", '"', "(A) ", "one, and ", ", ", "'", "<", "answer ", "M", "a@", "-", "“", "e\u0301"):
        text = unit * (20_000 // len(unit))
        for name in ("character_swap", "word_drop", "spoken"):
            assert isinstance(noisy(text, name, 5), str)


if __name__ == "__main__":
    print(json.dumps(observed(), indent=1, ensure_ascii=False))
