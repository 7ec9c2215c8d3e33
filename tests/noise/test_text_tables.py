"""The tables behind the text noises, against facts written down independently, and what single edits look like."""

from __future__ import annotations

import re
from functools import lru_cache

import pytest

from bitquake.noise import SampleKey, apply_text
from bitquake.noise.characters import KEYBOARD, OCR
from bitquake.noise.question import NUMBER_WORDS, reads_as_number
from bitquake.noise.speech import FILLERS, HOMOPHONES

# Read off a US keyboard, row by row: the keys that touch the key.
TOUCHING = {
    "q": "wa", "w": "qeas", "e": "wrsd", "r": "etdf", "t": "ryfg", "y": "tugh", "u": "yihj", "i": "uojk", "o": "ipkl",
    "p": "ol", "a": "qwsz", "s": "awedxz", "d": "serfcx", "f": "drtgvc", "g": "ftyhbv", "h": "gyujnb", "j": "huikmn",
    "k": "jiolm", "l": "kop", "z": "asx", "x": "zsdc", "c": "xdfv", "v": "cfgb", "b": "vghn", "n": "bhjm", "m": "njk",
}  # fmt: skip


@lru_cache
def variants(word: str, name: str) -> frozenset[str]:
    """What a word becomes in a thousand samples: an edit of probability 1 % is missed once in 20,000."""
    return frozenset(
        apply_text(f"the {word} there", name, severity=5, key=SampleKey("d", "s", str(i))).split(" ")[1]
        for i in range(1000)
    )


def test_keyboard_neighbours_touch() -> None:
    assert {key: set(near) for key, near in KEYBOARD.items() if key.islower()} == {
        k: set(v) for k, v in TOUCHING.items()
    }
    assert {key.lower(): near.lower() for key, near in KEYBOARD.items() if key.isupper()} == {
        key: near for key, near in KEYBOARD.items() if key.islower()
    }


def test_ocr_reads_letters_never_digits_and_digits_only_inside_words() -> None:
    assert all(re.fullmatch("[A-Za-z]{1,2}", printed) for printed in OCR)
    assert all(re.fullmatch("[A-Za-z]{1,2}|[0-9]", read) and read != p for p, reads in OCR.items() for read in reads)
    seen = variants("solo", "ocr_confusion")
    assert {"so1o", "s0lo", "soIo", "sclo"} <= seen
    assert not [word for word in seen if re.search(r"(?<![A-Za-z])\d|\d(?![A-Za-z])", word)]
    assert {"bum", "burri", "burrn", "bunn"} & variants("burn", "ocr_confusion") == {"bum", "burri"}
    assert variants("rn", "ocr_confusion") >= {"rri"} and "m" not in variants("rn", "ocr_confusion")


def test_single_edits() -> None:
    assert {"colro", "oclor", "cloor", "coolr"} <= variants("color", "character_swap")
    assert {"olor", "clor", "coor", "colr", "colo"} <= variants("color", "character_delete")
    assert all(sum(map(str.isalpha, word)) >= 2 for word in variants("dog", "character_delete"))
    assert {len(word) for word in variants("dog", "character_insert")} >= {3, 4, 5}
    assert all(word[0] == "d" for word in variants("dog", "character_insert"))
    assert {"fog", "dig", "dpg", "doh"} <= variants("dog", "keyboard_typos")
    assert all(word.isupper() for word in variants("ATM", "character_insert") | variants("ATM", "keyboard_typos"))
    assert "one" not in variants("tone", "character_delete") and "tne" in variants("tone", "character_delete")
    assert "two" not in variants("tow", "character_swap") and "otw" in variants("tow", "character_swap")


def test_letters_do_not_cross_an_apostrophe() -> None:
    seen = variants("dog's", "character_swap")
    assert {"odg's", "dgo's"} <= seen and "dos'g" not in seen
    assert "we'Il" in variants("we'll", "ocr_confusion") and "we'II" not in variants(
        "we'll", "ocr_confusion"
    )  # II is 2


def outs(text: str, name: str) -> set[str]:
    return {apply_text(text, name, severity=5, key=SampleKey("d", "s", str(i))) for i in range(600)}


def test_words_are_dropped_only_where_nothing_is_brought_together() -> None:
    assert outs("big dog", "word_drop") == {"big dog", "big", "dog"}
    assert outs("twenty big one", "word_drop") == {"twenty big one"}
    assert outs("Is that a dog?", "word_drop") == {"Is that a dog?", "Is a dog?", "that a dog?", "a dog?"}
    assert outs("see the dog, now", "word_drop") >= {"see the, now", "the dog, now", "see dog, now"}
    assert outs("big\ndog", "word_drop") == {"big\ndog", "\ndog", "big\n"}


def test_words_are_swapped_only_with_a_neighbour() -> None:
    assert outs("big dog", "word_swap") == {"big dog", "dog big"}
    for text in ("left\nright", "dogs 3 cats", "left  right", "dogs <image> cats"):
        assert outs(text, "word_swap") == {text}
    assert "(dog big)?" in outs("(big dog)?", "word_swap")


def test_homophones_are_other_words_and_no_numbers() -> None:
    for word, others in HOMOPHONES.items():
        assert others and word not in others and len({word, *others}) == len(others) + 1
        assert all(word in HOMOPHONES[other] for other in others)
        assert re.fullmatch(r"[a-z']{2,}", word) and not reads_as_number(word)
    assert not {"two", "four", "one", "eight"} & set(HOMOPHONES)
    assert not any(reads_as_number(filler) for filler in FILLERS)


@pytest.mark.parametrize(
    ("word", "expected"),
    [("their", {"there", "they're"}), ("THEIR", {"THERE", "THEY'RE"}), ("Where", {"Wear", "Ware"})],
)
def test_homophones_keep_case(word: str, expected: set[str]) -> None:
    seen = variants(word, "spoken")
    assert {other for other in seen if other.lower() in HOMOPHONES} >= expected
    assert {f"{word[:2]}-", f"{word[:3]}-"} <= seen  # begun twice
    assert "te-" in variants("tennis", "spoken") and "ten-" not in variants("tennis", "spoken")


def test_number_words_are_told_from_words_that_hold_one() -> None:
    assert all(reads_as_number(word) and reads_as_number(word.title()) for word in NUMBER_WORDS)
    assert all(reads_as_number(word) for word in ("twenty-one", "II", "MCMXCIX", "one's", "two-storey"))
    assert not any(reads_as_number(word) for word in ("phone", "tone", "someone", "weight", "I", "CIVIC", "xii", "no"))
