"""VQA accuracy: an answer's agreement with ten annotators, after the benchmark's own text normalisation.

``Acc(p) = mean_i min(1, |{j != i : a_j = p}| / 3)`` over annotators i (Antol et al. 2015, arXiv 1505.00468), so with
ten annotators 0, 1, 2, 3, 4 or more matches give 0, 0.3, 0.6, 0.9, 1.
Normalisation follows reliable_vqa (Whitehead et al. 2022, arXiv 2204.13631). That scorer leaves everything as it is
when all ten annotators agree, which gives a generative model's "Yes" no credit against ten times "yes". Here the
normalised answer counts there too; ``reliable_vqa`` among the scores is the original's number.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import NamedTuple

from .targets import READ_CHARACTERS, TargetError

_NUMBER_WORDS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(number) for number, word in enumerate(_NUMBER_WORDS)}
ARTICLES = frozenset({"a", "an", "the"})


def _contractions() -> dict[str, str]:
    """Contractions without (some of) their apostrophes -> as the benchmark writes them.

    Built from the word lists behind the public VQA evaluation table; its quirks are kept, because they are the
    benchmark: "wed", "well", "were", "ill", "id", "its" stay words of their own, "somebody'd" loses its apostrophe.
    """
    table: dict[str, str] = {}
    negated = "ai are ca could did does do had has have is might must need ought sha should was were wo would"
    for stem in negated.split():
        table[f"{stem}nt"] = f"{stem}n't"
    for stem in ("could", "had", "might", "should", "would"):
        table[f"{stem}nt've"] = table[f"{stem}n'tve"] = f"{stem}n't've"
    endings = {
        "d": "he how it someone something there they where who you",
        "ll": "how it somebody someone something they what who why you",
        "s": "he how somebody someone that there what when where who why",
        "re": "there they what why you",
        "ve": "could might must not should they we what where who would you",
    }
    for ending, words in endings.items():
        for stem in words.split():
            table[f"{stem}{ending}"] = f"{stem}'{ending}"
    stems = "he it she somebody someone something there they we who you"
    for stem in stems.split():
        table[f"{stem}d've"] = table[f"{stem}'dve"] = f"{stem}'d've"
    table |= dict.fromkeys(("yall'll", "y'allll"), "y'all'll")
    table |= dict.fromkeys(("yall'd've", "y'alld've", "y'all'dve"), "y'all'd've")
    table |= dict.fromkeys(("ow's'at", "'ows'at", "'ow'sat"), "'ow's'at")
    table |= {"yall": "y'all", "maam": "ma'am", "oclock": "o'clock", "twas": "'twas", "somebody'd": "somebodyd"}
    return table


CONTRACTIONS = _contractions()

# Everything below: 21 marks, and what surrounds one decides whether it goes or becomes a space. No full stop, no colon.
_MARK = r"""\\;/"`\[\](){}<>@=+_\-,?!"""
_LEADING = re.compile(rf"\A[ {_MARK}]+(?=[a-zA-Z0-9 ])")
_TRAILING = re.compile(rf"(?<=[a-zA-Z0-9 ])[ {_MARK}]+\Z")
_DIGIT_COMMAS = re.compile(r"(?<=\d),+(?=\d)")
_BESIDE_MARK_OR_SPACE = re.compile(rf"(?<=[ {_MARK}])[{_MARK}]|[{_MARK}](?=[ {_MARK}])")
_SPACES = re.compile(r" +")
_BETWEEN_LETTERS = re.compile(rf"(?<=[a-zA-Z])[{_MARK}](?=[a-zA-Z])")
_FULL_STOP = re.compile(r"\.(?!\d)")
# The original passes a regular expression's flag where `count` stands: 32 full stops go, later ones stay.
_FULL_STOPS_REMOVED = 32


def strip_blanks(text: str) -> str:
    """Line ends and tabs become spaces; spaces at both ends go."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def normalise_punctuation(text: str) -> str:
    """Punctuation rules of reliable_vqa: marks at the ends go, commas between digits go, others become a space."""
    text = _LEADING.sub("", text)
    text = _TRAILING.sub("", text)
    text = _DIGIT_COMMAS.sub("", text)
    text = _BESIDE_MARK_OR_SPACE.sub(" ", text)
    text = _SPACES.sub(" ", text)
    text = _BETWEEN_LETTERS.sub(" ", text)
    return _FULL_STOP.sub("", text, count=_FULL_STOPS_REMOVED)


def normalise_words(text: str) -> str:
    """Lower case, number words to digits, articles dropped, contractions given their apostrophes."""
    numbered = (NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(CONTRACTIONS.get(word, word) for word in numbered if word not in ARTICLES)


def normalise(text: str) -> str:
    """The whole normalisation of one answer."""
    return normalise_words(normalise_punctuation(strip_blanks(text)))


_UPSTREAM_MARKS = ';/[]"{}()=+\\_-><@`,?!'


def normalise_upstream(text: str) -> str:
    """lmms-eval's normalisation for ``vqav2``: a mark goes if it ever stands next to a space, else becomes a space."""
    text = strip_blanks(text)
    out = text
    commas = _DIGIT_COMMAS.search(text) is not None
    for mark in _UPSTREAM_MARKS:
        out = out.replace(mark, "" if commas or f"{mark} " in text or f" {mark}" in text else " ")
    return normalise_words(_FULL_STOP.sub("", out, count=_FULL_STOPS_REMOVED))


def soft_accuracy(answer: str, references: Sequence[str]) -> float:
    """``mean_i min(1, |{j != i : a_j = answer}| / 3)``; with a single reference 1 if equal, else 0."""
    n = len(references)
    matches = sum(reference == answer for reference in references)
    if n == 1:
        return float(matches)
    # Annotators who said the same are left out once each (matches - 1 others agree), the rest see all matches.
    return (matches * min(1.0, (matches - 1) / 3) + (n - matches) * min(1.0, matches / 3)) / n if matches else 0.0


class VqaScore(NamedTuple):
    """score, reliable_vqa, lmms_eval: soft accuracies in [0, 1]; answer: the normalised answer."""

    score: float
    reliable_vqa: float
    lmms_eval: float
    answer: str


def score_vqa(text: str, references: Sequence[str], annotators: int = 10) -> VqaScore:
    """Soft accuracy of a model's text against the annotators' answers.

    Args:
        text: the model's answer, as it wrote it.
        references: the annotators' answers, one each.
        annotators: how many there must be.

    Raises:
        TargetError: no list of ``annotators`` texts.
    """
    if isinstance(references, str) or not isinstance(references, Sequence) or len(references) != annotators:
        got = f"{len(references)} of them" if isinstance(references, list | tuple) else repr(references)
        raise TargetError(f"answers: expected the answers of {annotators} annotators, got {got}")
    if wrong := [reference for reference in references if not isinstance(reference, str)]:
        raise TargetError(f"answers: expected texts, got {wrong[0]!r}")
    text = text[:READ_CHARACTERS]
    plain = [strip_blanks(reference) for reference in references]
    answer = normalise(text)
    score = soft_accuracy(answer, [normalise(reference) for reference in plain])
    unanimous = len(set(plain)) == 1
    upstream = soft_accuracy(normalise_upstream(text), [normalise_upstream(reference) for reference in plain])
    return VqaScore(score, soft_accuracy(strip_blanks(text), plain) if unanimous else score, upstream, answer)
