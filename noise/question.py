"""What a text noise may change in a question, and what it must leave as it is.

Characters are classified by Unicode 3.2, which every Python carries unchanged (``unicodedata.ucd_3_2_0``), so that the
same question is cut the same way under every Python; newer characters (most emoji) are never edited.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from typing import NamedTuple
from unicodedata import ucd_3_2_0 as unicode32

_UNITS = "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen"
_UNITS += " seventeen eighteen nineteen"
_TENS = "twenty thirty forty fourty fifty sixty seventy eighty ninety"
_SCALES = "hundred thousand million billion trillion dozen"
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth eleventh twelfth thirteenth fourteenth"
_ORDINALS += " fifteenth sixteenth seventeenth eighteenth nineteenth twentieth thirtieth fortieth fiftieth sixtieth"
_ORDINALS += " seventieth eightieth ninetieth hundredth thousandth millionth"
_OTHER = "half halves quarter once twice thrice single double triple pair couple both none nil"
_PLURALS = "ones twos threes fours fives sixes sevens eights nines tens twenties hundreds thousands millions billions"
_PLURALS += " dozens seconds thirds fourths fifths sixths sevenths eighths ninths tenths quarters pairs couples"

NUMBER_WORDS = frozenset(" ".join((_UNITS, _TENS, _SCALES, _ORDINALS, _OTHER, _PLURALS)).split())

_NUMBER_WORD = "(?:" + "|".join(sorted(NUMBER_WORDS, key=lambda word: (-len(word), word))) + ")"
_ROMAN = r"(?=[MDCLXVI]{2})M{0,3}(?:CM|CD|D?C{0,3})(?:XC|XL|L?X{0,3})(?:IX|IV|V?I{0,3})"
_READS_AS_NUMBER = re.compile(
    rf"(?<![A-Za-z])(?i:{_NUMBER_WORD}(?:(?:,? (?:and |point |a )?|-){_NUMBER_WORD})*)(?![A-Za-z])"
    rf"|(?<![A-Za-z]){_ROMAN}(?![A-Za-z])"
)
_FORM = r"(?:an?|one|two|three|(?:only|just) the)[ -](?:single |short |one[ -])?"  # of an answer
_FORM += r"(?:word|phrase|number|digit|letter|sentence|integer)s?"
_MARKER = r"(?:\([A-Z]\)|\[[A-Z]\]|[A-Z][.):])"

_PROTECTED = (
    re.compile(r"<[^<>\s]{1,80}>|\{[^{}\s]{0,80}\}|\[/?[A-Z][A-Z0-9_]{1,40}\]"),  # <image>, <|im_end|>, {x}, [INST]
    re.compile(r"(?i:https?|ftp)://\S+|(?i:www)\.\S+"),
    re.compile(r"(?<![A-Za-z0-9._%+-])[A-Za-z0-9._%+-]{1,64}@[A-Za-z0-9-]{1,63}(?:\.[A-Za-z0-9-]{1,63})+"),
    re.compile(
        r"\"[^\"\n]*\"|“[^“”\n]*”|„[^„“”\n]*[“”]|«[^«»\n]*»|`[^`\n]*`|「[^「」\n]*」|『[^『』\n]*』"
        r"|‘[^‘’\n]*’(?![A-Za-z])|(?<![A-Za-z0-9])'[^'\n]*'(?![A-Za-z0-9])"
    ),
    _READS_AS_NUMBER,
    re.compile(r"(?<![A-Za-z])(?i:options?|choices?|answers?|figures?|labels?) \(?[A-Z](?![A-Za-z'’])"),
    re.compile(rf"^[ \t]*{_MARKER}[ \t].*$", re.MULTILINE),  # a line of an option list: its text is no question
    re.compile(  # an instruction about the answer's format
        r"(?:(?<=[.!?:;])|^)[ \t]*(?i:(?:please,? |and |then |now )*"
        r"(?:answer|respond|reply|choose|select|pick|output))(?![A-Za-z])[^\n.!?]*[.!?]?",
        re.MULTILINE,
    ),
    re.compile(
        r"(?<![A-Za-z])(?i:(?:answer|respond|reply) (?:only |briefly |directly )?(?:with|using|in) )[^\n.!?]*[.!?]?"
    ),
    re.compile(  # the same in other words: "Keep your answer short.", "Give a one-word answer."
        rf"(?:(?<=[.!?:;])|^)[ \t]*(?i:(?:please,? |and |then |now |just )*"
        rf"(?:your|the final|give|provide|return|write|state|use|keep|limit)"
        rf"(?![A-Za-z])[^\n.!?]{{0,200}}(?<![A-Za-z])(?:answers?|response|reply|{_FORM}))(?![A-Za-z])[^\n.!?]*[.!?]?",
        re.MULTILINE,
    ),
    re.compile(rf"(?<![A-Za-z])(?i:(?:in|with|using|as) (?:only |just )?{_FORM})(?![A-Za-z])"),
)
_FIRST_OPTION, _SECOND_OPTION = (
    re.compile(rf"\({letter}\)|\[{letter}\]|(?<![A-Za-z]){letter}[.):]") for letter in "AB"
)
_DIGIT_RUN = re.compile(r"[A-Za-z0-9_.,:/%$€£¥°+\-−–×^']+|[^\s]")
_APOSTROPHES = "'’"


def reads_as_number(word: str) -> bool:
    """Whether a word is or holds a number word or a Roman numeral, so that no edit may lead to it."""
    return _READS_AS_NUMBER.search(word) is not None


class Letter(NamedTuple):
    """An editable letter with the marks that belong to it, ``text[start:end]``; ``run`` is the number of its word."""

    start: int
    end: int
    run: int


class Word(NamedTuple):
    """A word without the punctuation around it: ``text[start:end]``.

    ``place``: its number among ``chunks``; ``joined``: only one space lies between it and the word before it
    in its list, so that the two may change places.
    """

    start: int
    end: int
    place: int
    joined: bool


@dataclass(frozen=True)
class Question:
    """A question, cut into what noises may edit.

    Never edited: numbers (digits, numerals of any script, English number words, Roman numerals), letters that stand
    alone and option letters ("(A)", "option C"), lists of options, quoted strings, URLs and addresses, placeholders
    such as ``<image>``, what says how to answer ("Answer with ...", "in one word"), and all that is no letter: white
    space, line breaks, punctuation, emoji.
    """

    text: str

    @cached_property
    def protected(self) -> bytearray:
        """One byte per character: 1 where it is protected."""
        mask = bytearray(len(self.text))
        for start, end in _spans(self.text):
            mask[start:end] = b"\x01" * (end - start)
        return mask

    @cached_property
    def letters(self) -> list[Letter]:
        """The unprotected letters in order, of any script; a word goes on over an apostrophe between letters."""
        out: list[Letter] = []
        for run, letters in enumerate(_runs(self.text)):
            for start, end, known in letters:
                if known and not any(self.protected[start:end]):
                    out.append(Letter(start, end, run))
        return out

    @cached_property
    def chunks(self) -> list[tuple[int, int]]:
        """Start and end of everything that white space separates."""
        return [found.span() for found in re.finditer(r"\S+", self.text)]

    @cached_property
    def words(self) -> list[Word]:
        """The words with no protected character, in scripts that put spaces between words."""
        out: list[Word] = []
        last_place = last_end = -1
        for place, (start, end) in enumerate(self.chunks):
            chunk = self.text[start:end]
            letters = list(_letters(chunk))
            if not letters or not all(known for *_, known in letters) or _unspaced(chunk):
                continue
            if any(self.protected[start:end]):
                continue
            joined = place == last_place + 1 and self.text[last_end:start] == " "
            out.append(Word(start + letters[0][0], start + letters[-1][1], place, joined and bool(out)))
            last_place, last_end = place, end
        return out

    def replaced(self, edits: Iterable[tuple[int, int, str]]) -> str:
        """The text with ``text[start:end]`` replaced for each (start, end, replacement); none may overlap."""
        parts, done = [], 0
        for start, end, replacement in sorted(edits):
            parts += [self.text[done:start], replacement]
            done = end
        return "".join([*parts, self.text[done:]])


def _spans(text: str) -> Iterator[tuple[int, int]]:
    for pattern in _PROTECTED:
        for found in pattern.finditer(text):
            yield found.span()
    for found in _DIGIT_RUN.finditer(text):
        if any(_kind(character) == "number" for character in found.group()):
            yield found.span()
    for run in _runs(text):
        start, end, _ = run[0]
        if len(run) == 1 and text[start:end].isascii():
            yield start, end
    at = 0
    for line in text.split("\n"):  # "(A) red (B) blue"
        first = _FIRST_OPTION.search(line)
        if first and _SECOND_OPTION.search(line, first.end()):
            yield at + first.start(), at + len(line)
        at += len(line) + 1


def _letters(text: str) -> Iterator[tuple[int, int, bool]]:
    """Each letter with its combining marks: start, end, and whether all of it and what follows is known characters."""
    at = 0
    while at < len(text):
        end = at + 1
        if _kind(text[at]) == "letter":
            while end < len(text) and _kind(text[end]) == "mark":
                end += 1
            yield at, end, end == len(text) or _kind(text[end]) != "unknown"
        at = end


def _runs(text: str) -> list[list[tuple[int, int, bool]]]:
    """The letters of ``_letters`` by words; a word goes on over one apostrophe between letters."""
    out: list[list[tuple[int, int, bool]]] = []
    last = -2
    for letter in _letters(text):
        start = letter[0]
        if start == last or (start == last + 1 and text[last] in _APOSTROPHES):
            out[-1].append(letter)
        else:
            out.append([letter])
        last = letter[1]
    return out


@lru_cache(maxsize=4096)
def _kind(character: str) -> str:
    """``letter``, ``number``, ``mark`` (belongs to the letter before it), ``unknown`` or ``other``."""
    if unicode32.numeric(character, None) is not None:
        return "number"
    category = unicode32.category(character)
    if category in ("Lu", "Ll", "Lt", "Lo"):
        return "other" if "\u1100" <= character <= "\u11ff" else "letter"  # a lone jamo is a part of a syllable
    if category in ("Mn", "Mc", "Me", "Lm") or character in "\u200c\u200d":
        return "mark"
    return "unknown" if category == "Cn" else "other"


def _unspaced(word: str) -> bool:
    """Whether a word is of a script that puts no spaces between words (Thai, Khmer, Chinese, Japanese, ...)."""
    return any(
        0x0E00 <= code <= 0x109F or 0x1780 <= code <= 0x17FF or 0x2E80 <= code <= 0xA4CF or 0xF900 <= code <= 0xFAFF
        or 0xFF66 <= code <= 0xFF9F or 0x20000 <= code <= 0x3FFFF
        for code in map(ord, word)
    )  # fmt: skip
