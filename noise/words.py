"""Words left out, exchanged or said twice.

Orientation for the rates: MM_Robustness (Qiu et al., 2022, arXiv 2212.08044), which changes 5% to 35% of the words.
"""

from __future__ import annotations

from collections.abc import Mapping

from .question import Question
from .seeding import RandomStream
from .text import chosen, text_noise

RATES = (0.05, 0.10, 0.15, 0.25, 0.35)


@text_noise(id=106, version=1, parameters={"rate": RATES})
def word_drop(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """A word and the space before it (at the beginning, behind it) are left out; punctuation stays.

    At least one unprotected word remains. A word stays where its going would bring two protected pieces together
    ("twenty big one"), or a mark and a letter standing alone ("is that a dog?" must not end in "a?").
    Parameters: rate, the probability per word.
    """
    words, text, chunks = question.words, question.text, question.chunks
    uniform = stream.uint16(len(words))
    candidates = {word.place for word in words}
    gone: set[int] = set()
    for index in chosen(uniform, parameters["rate"]):
        word = words[index]
        left = next((i for i in range(word.place - 1, -1, -1) if i not in gone), None)
        right = next((i for i in range(word.place + 1, len(chunks)) if i not in gone), None)
        bare = chunks[word.place] == (word.start, word.end)
        held = left is not None and left not in candidates
        if len(gone) + 1 < len(words) and (not held or (bare and right in candidates)):
            gone.add(word.place)
    edits = []
    done = 0
    for word in words:
        if word.place in gone:
            start, end = word.start, word.end
            if start > done and text[start - 1] == " ":
                start -= 1
            elif text[end : end + 1] == " ":  # at the beginning of a line, or of what is left of it
                end += 1
            edits.append((start, end, ""))
            done = end
    return question.replaced(edits)


@text_noise(id=107, version=1, parameters={"rate": RATES})
def word_swap(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """A word changes places with the next one; punctuation stays where it is, and capital letters go with their words.

    Both must be unprotected and parted by one space. Parameters: rate, the probability per word that it and the next
    are chosen. No word moves twice, so a long text sees about (1 - exp(-2 rate)) / 2 swaps per word.
    """
    words, text = question.words, question.text
    uniform = stream.uint16(len(words))
    moved: set[int] = set()
    edits = []
    for index in chosen(uniform, parameters["rate"]):
        if index + 1 == len(words) or not words[index + 1].joined or moved & {index, index + 1}:
            continue
        one, two = words[index], words[index + 1]
        moved |= {index, index + 1}
        edits += [(one.start, one.end, text[two.start : two.end]), (two.start, two.end, text[one.start : one.end])]
    return question.replaced(edits)


@text_noise(id=108, version=1, parameters={"rate": RATES})
def word_duplicate(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """A word is written twice ("what what colour"); punctuation stays around the two.

    Parameters: rate, the probability per word.
    """
    words = question.words
    uniform = stream.uint16(len(words))
    written = [(words[i], question.text[words[i].start : words[i].end]) for i in chosen(uniform, parameters["rate"])]
    return question.replaced((word.start, word.end, f"{text} {text}") for word, text in written)
