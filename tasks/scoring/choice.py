"""Lettered choices, scored three ways, because a quantized model often changes its format before its mind.

strict: the letter alone, or text that begins like "B." (what lmms-eval's ``scienceqa`` accepts); lenient: the letter in
the other forms that people write, or the option's own text; letter: the option letter with the most probability at the
first answer position, which needs no parsing at all.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

from .targets import TargetError, readable

LETTERS = "ABCDEFGHIJKLMNOPQRSTUVWXYZ"

_OPEN, _CLOSE = r"[\(\[\{\*\"'`]*\s*", r"\s*[\)\]\}\*\"'`]*"
_LEAD_IN = (
    r"(?:(?:so|thus|therefore|hence)\s*,?\s*)?(?:the\s+)?(?:correct\s+|right\s+|best\s+|final\s+)?"
    r"(?:answer|option|choice)\s*(?:is|:|=|-)?\s*(?::\s*)?(?:(?:the\s+)?(?:option|choice|letter)\s*)?"
)
# A letter counts when it stands alone: "(B)", "B)", "B: blue", "**B**", "Answer: B", "The answer is (B)."
_BARE = re.compile(rf"\A{_OPEN}([A-Z]){_CLOSE}\s*(?:[.:,;!\-–—].*)?\Z", re.DOTALL)
_BRACKETED = re.compile(r"\A\s*[\(\[\{]\s*([A-Za-z])\s*[\)\]\}]", re.DOTALL)
_CLOSED = re.compile(r"\A\s*([A-Za-z])\s*\)", re.DOTALL)
_ANNOUNCED = re.compile(
    rf"\A\s*[\*\"'`]*{_LEAD_IN}{_OPEN}(?P<letter>[A-Za-z])(?![A-Za-z'’])", re.DOTALL | re.IGNORECASE
)
_EDGES = " \t\r\n.,:;!?\"'`*()[]{}"


class ChoiceScore(NamedTuple):
    """score: lenient 0/1 (the headline); strict, lenient, letter: 0/1, letter None without option probabilities.

    answer: the letter that the lenient reading found, or None (then ``parse_failure``: scored 0 and counted).
    """

    score: float
    strict: float
    lenient: float
    letter: float | None
    answer: str | None

    @property
    def parse_failure(self) -> bool:
        return self.answer is None


def strict_letter(text: str) -> str | None:
    """The letter that lmms-eval's ``scienceqa`` reads: the letter alone in either case, or "B." with a capital."""
    text = text.strip()
    if len(text) == 1 and text.upper() in LETTERS:
        return text.upper()
    if len(text) >= 2 and text[0] in LETTERS and text[1] == ".":
        return text[0]
    return None


def lenient_letter(text: str, options: Sequence[str]) -> str | None:
    """The option letter that a text means, or None; only letters of existing options count.

    Tried in this order: the strict forms; the letter alone between quotes, brackets or stars, with or without something
    after a full stop, colon, comma or dash; "(B) …" and "B) …"; "answer: B", "the answer is B", "option B";
    the text of exactly one option, by itself or after "the answer is". Anything else is no answer: a letter somewhere
    in a sentence is as often the article "a".
    """
    letters = LETTERS[: len(options)]
    text = readable(text)
    found = strict_letter(text)
    if found is None:
        for pattern in (_BARE, _BRACKETED, _CLOSED):
            match = pattern.search(text)
            if match:
                found = match.group(1).upper()
                break
    if found is None:
        found = _option_by_text(text, options)
    if found is None:
        match = _ANNOUNCED.search(text)
        # "The answer is a dog" names no option A.
        if match and (match["letter"].isupper() or not text[match.end() :].strip(_EDGES)):
            found = match["letter"].upper()
    return found if found is not None and found in letters else None


def correct_letter(options: Sequence[str], correct: int) -> str:
    """The letter of the right option.

    Raises:
        TargetError: fewer than two options, more than 26, an option that is no text, or ``correct`` not among them.
    """
    if isinstance(options, str) or not isinstance(options, Sequence) or not 2 <= len(options) <= len(LETTERS):
        raise TargetError(f"choices: expected 2 to {len(LETTERS)} options, got {options!r}")
    if not all(isinstance(option, str) for option in options):
        raise TargetError(f"choices: expected texts, got {list(options)!r}")
    if not isinstance(correct, int) or isinstance(correct, bool) or not 0 <= correct < len(options):
        raise TargetError(f"answer: expected the index of one of {len(options)} options, from 0, got {correct!r}")
    return LETTERS[correct]


def score_choice(
    text: str, options: Sequence[str], correct: int, option_probabilities: Mapping[str, float] | None = None
) -> ChoiceScore:
    """Score a model's text for a question with lettered options.

    Args:
        text: the model's answer, as it wrote it.
        options: the options' texts; option i has letter ``LETTERS[i]``.
        correct: index of the right one.
        option_probabilities: letter -> probability at the first answer position (other letters are ignored; of equal
            probabilities the earlier letter counts).

    Raises:
        TargetError: see :func:`correct_letter`.
    """
    target = correct_letter(options, correct)
    answer = lenient_letter(text, options)
    lenient = float(answer == target)
    likeliest: float | None = None
    given = {letter: (option_probabilities or {}).get(letter) for letter in LETTERS[: len(options)]}
    known = {letter: p for letter, p in given.items() if p is not None and p == p}
    if known:
        likeliest = float(max(known, key=lambda letter: known[letter]) == target)
    return ChoiceScore(lenient, float(strict_letter(readable(text)) == target), lenient, likeliest, answer)


def _option_by_text(text: str, options: Sequence[str]) -> str | None:
    """The letter of the one option whose text this is, apart from case, spaces, marks at the ends and a lead-in."""
    said = {_plain(text), _plain(re.sub(rf"\A\s*{_LEAD_IN}", "", text, count=1, flags=re.IGNORECASE))}
    plain = [_plain(option) for option in options]
    hits = [letter for letter, option in zip(LETTERS, plain, strict=False) if option and option in said]
    return hits[0] if len(hits) == 1 else None


def _plain(text: str) -> str:
    return " ".join(text.lower().split()).strip(_EDGES)
