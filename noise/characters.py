"""Typing and reading errors: keyboard neighbours, letters swapped, inserted or left out, and OCR confusions.

Orientation for the rates: MM_Robustness (Qiu et al., 2022, arXiv 2212.08044) edits about a third of the letters of 5%
to 35% of the words, which is 1.5% to 10% of all letters.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Mapping

from .question import Question, reads_as_number
from .seeding import RandomStream
from .text import chosen, text_noise

RATES = (0.02, 0.04, 0.07, 0.10, 0.15)
LEAST_LETTERS = 2  # of a word: one letter alone could be taken for an option

WINDOW = 64  # letters on each side in which a number word is looked for; words are shorter, hostile text is not

_ROWS = (("qwertyuiop", 0), ("asdfghjkl", 1), ("zxcvbnm", 3))  # US keyboard; offset in quarters of a key


def _keyboard() -> dict[str, str]:
    """Each letter's neighbours: beside it, or less than a key's width to the left or right in the next row."""
    keys = {key: (4 * i + offset, row) for row, (letters, offset) in enumerate(_ROWS) for i, key in enumerate(letters)}
    near = {
        key: "".join(
            other
            for other, (x, y) in keys.items()
            if (y == keys[key][1] and abs(x - keys[key][0]) == 4)
            or (abs(y - keys[key][1]) == 1 and abs(x - keys[key][0]) < 4)
        )
        for key in keys
    }
    return near | {key.upper(): others.upper() for key, others in near.items()}


KEYBOARD = _keyboard()
_LONE_DIGIT = re.compile(r"(?<![A-Za-z])[0-9]|[0-9](?![A-Za-z])")
ALPHABET = "abcdefghijklmnopqrstuvwxyz"

OCR = {
    "l": ("I", "1", "i"), "I": ("l", "1"), "i": ("l", "j"), "j": ("i",), "O": ("Q", "D", "0"), "o": ("c", "0"),
    "Q": ("O",), "D": ("O",), "c": ("e", "o"), "e": ("c",), "C": ("G",), "G": ("C", "6"), "S": ("5",), "s": ("5",),
    "B": ("8", "R"), "R": ("B",), "Z": ("2",), "z": ("2",), "g": ("q", "9"), "q": ("g",), "h": ("b", "li"),
    "b": ("h", "6"), "u": ("v", "ii"), "v": ("u",), "n": ("ri",), "m": ("rn",), "w": ("vv",), "d": ("cl",),
    "f": ("t",), "t": ("f",), "E": ("F",), "F": ("E",), "P": ("F",), "T": ("I",), "U": ("V",), "V": ("U",),
    "K": ("X",), "X": ("K",), "rn": ("m",), "nn": ("m",), "ri": ("n",), "cl": ("d",),
    "vv": ("w",), "li": ("h",), "ii": ("u",),
}  # fmt: skip
"""What is printed -> what may be read; shapes that look alike in common typefaces."""


@text_noise(id=101, version=1, parameters={"rate": RATES})
def keyboard_typos(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """A neighbouring key of a US keyboard is hit: each letter a-z, A-Z becomes one of its neighbours, keeping its case.

    Parameters: rate, the probability per letter. Only letters come out, never digits or punctuation.
    """

    def propose(letters: list[str], roll: int) -> tuple[int, str] | None:
        near = KEYBOARD.get(letters[0])
        return (1, near[roll * len(near) >> 16]) if near else None

    return _edit(question, parameters["rate"], stream, propose)


@text_noise(id=102, version=1, parameters={"rate": RATES})
def character_swap(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """A letter changes places with the next letter of its word ("colro"); letters of any script, each with its marks.

    Parameters: rate, the probability per letter that it and the next are chosen. No letter moves twice, so a long word
    sees about (1 - exp(-2 rate)) / 2 swaps per letter; two equal letters stay.
    """

    def propose(letters: list[str], _: int) -> tuple[int, str] | None:
        return (2, letters[1] + letters[0]) if len(letters) > 1 and letters[0] != letters[1] else None

    return _edit(question, parameters["rate"], stream, propose)


@text_noise(id=103, version=1, parameters={"rate": RATES})
def character_insert(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """A random letter, a-z with equal probability, is put behind a letter a-z, A-Z; a capital one among capitals.

    Parameters: rate, the probability per letter. Nothing is put behind letters of other alphabets.
    """

    def propose(letters: list[str], roll: int) -> tuple[int, str] | None:
        letter = letters[0]
        if not letter.isascii():
            return None
        extra = ALPHABET[roll * len(ALPHABET) >> 16]
        return 1, letter + (extra.upper() if all(map(str.isupper, letters)) else extra)

    return _edit(question, parameters["rate"], stream, propose)


@text_noise(id=104, version=1, parameters={"rate": RATES})
def character_delete(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """A letter is left out; letters of any script, each with its marks. A word keeps at least two.

    Parameters: rate, the probability per letter.
    """
    return _edit(question, parameters["rate"], stream, lambda letters, _: (1, ""))


@text_noise(id=105, version=1, parameters={"rate": (0.03, 0.06, 0.10, 0.15, 0.22)})
def ocr_confusion(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """A letter or pair of letters a-z, A-Z is read as one that looks like it: l as I, rn as m, O as Q, d as cl, ...

    A digit (l as 1, O as 0) only ever comes out between two letters of a word, where it is no number; digits themselves
    are never changed. Parameters: rate, the probability per letter; higher than that of the other character noises,
    because letters that look like no other (a, k, p, x, y) stay.
    """

    def propose(letters: list[str], roll: int) -> tuple[int, str] | None:
        options = [(1, read) for read in OCR.get(letters[0], ())]
        options += [(2, read) for read in OCR.get("".join(letters), ()) if len(letters) > 1]
        return options[roll * len(options) >> 16] if options else None

    return _edit(question, parameters["rate"], stream, propose)


def _edit(
    question: Question,
    rate: float,
    stream: RandomStream,
    propose: Callable[[list[str], int], tuple[int, str] | None],
) -> str:
    """Edit each letter with probability ``rate``; none that touches a letter twice or harms a word.

    Args:
        propose: (the letter and, if one follows directly, the next; 16 random bits) -> (letters replaced, by what).
    """
    letters = question.letters
    uniform, rolls = stream.uint16(2 * len(letters)).reshape(2, -1)
    text = [question.text[letter.start : letter.end] for letter in letters]
    now = list(text)  # what stands for each letter; "" for the second of a pair that was replaced
    after = [""] * len(letters)  # an apostrophe that stands behind a letter in its word
    bounds: dict[int, tuple[int, int]] = {}
    for index, letter in enumerate(letters):
        first, _ = bounds.get(letter.run, (index, index))
        bounds[letter.run] = first, index + 1
        if index > first:
            after[index - 1] = question.text[letters[index - 1].end : letter.start]
    touched = bytearray(len(letters))
    for index in chosen(uniform, rate):
        first, end = bounds[letters[index].run]
        pair = index + 1 < end and not after[index]
        first, end = max(first, index - WINDOW), min(end, index + WINDOW)
        proposal = propose(text[index : index + 1 + pair], int(rolls[index]))
        if proposal is None or any(touched[index : index + proposal[0]]):
            continue
        count, replacement = proposal
        new = [replacement] + [""] * (count - 1)
        word = now[first:index] + new + now[index + count : end]
        if sum(map(bool, word)) < LEAST_LETTERS or not _is_word(map(str.__add__, word, after[first:end])):
            continue
        now[index : index + count] = new
        touched[index : index + count] = b"\x01" * count
    return question.replaced((letter.start, letter.end, now[i]) for i, letter in enumerate(letters) if touched[i])


def _is_word(parts: Iterable[str]) -> bool:
    """Neither a number word nor with a digit that does not stand between two letters."""
    word = "".join(parts)
    return not reads_as_number(word) and not _LONE_DIGIT.search(word)
