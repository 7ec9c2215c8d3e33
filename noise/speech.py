"""Questions as they are spoken and then transcribed, as VizWiz's are."""

from __future__ import annotations

import re
from collections.abc import Mapping

from .question import Question, reads_as_number
from .seeding import RandomStream
from .text import chosen, text_noise

FILLERS = ("um", "uh", "er", "like", "well", "you know")

_SETS = """
there their they're|your you're|its it's|hear here|wear where ware|whose who's|right write|by buy bye|see sea|son sun
flour flower|red read|blue blew|bear bare|meat meet|tail tale|pear pare|plane plain|brake break|steal steel
stair stare|hair hare|deer dear|board bored|would wood|new knew|know no|which witch|weather whether|week weak
wait weight|way weigh|piece peace|rain reign rein|road rode|sail sale|scene seen|sell cell|sight site cite|some sum
soul sole|tea tee|toe tow|through threw|vein vain vane|waist waste|made maid|mail male|night knight|not knot|our hour
aisle isle|aunt ant|ball bawl|base bass|be bee|beach beech|berry bury|boy buoy|ceiling sealing|choose chews
coarse course|fair fare|feet feat|fur fir|great grate|hole whole|horse hoarse|in inn|key quay|led lead|loan lone
medal meddle|or oar ore|pane pain|past passed|peak peek|principal principle|root route|rose rows|role roll|stake steak
suite sweet|throne thrown|tide tied|wine whine|wrap rap|to too|for fore|allowed aloud|due dew|knows nose|sent scent
dye die|flea flee|heel heal|him hymn|high hi|idle idol|jeans genes|mane main|mist missed|pale pail|paws pause
poor pour|pray prey|sew so|shoot chute|sore soar|sees seas|buys byes|planes plains|tails tales|cells sells
sights sites|sails sales|knights nights|rolls roles|steaks stakes|rays raise
"""

HOMOPHONES: dict[str, tuple[str, ...]] = {
    word: tuple(other for other in group.split() if other != word)
    for group in _SETS.replace("\n", "|").split("|")
    for word in group.split()
}
"""Word -> words that sound like it; without those that are numbers, so that "to" never becomes "two"."""

_PLAIN = re.compile(r"[A-Za-z]{4,}")


@text_noise(
    id=109,
    version=1,
    parameters={
        "homophone": (0.10, 0.20, 0.35, 0.50, 0.70),
        "filler": (0.03, 0.06, 0.10, 0.15, 0.20),
        "false_start": (0.01, 0.02, 0.04, 0.07, 0.10),
    },
)
def spoken(question: Question, parameters: Mapping[str, float], stream: RandomStream) -> str:
    """Speech, recognised: homophones (their for there), fillers (um, uh), and words that are begun twice (wh- what).

    Parameters, each a probability: homophone, per word that has one (never a number: "to" becomes "too", not "two");
    filler, that one stands before a word; false_start, that a word of four or more letters a-z is broken off after two
    or three and said again. English only; words of other languages only get fillers.
    """
    words = question.words
    homophone, filler, false_start, rolls = stream.uint16(4 * len(words)).reshape(4, -1)
    said = {i: question.text[words[i].start : words[i].end] for i in range(len(words))}
    new = dict(said)
    for i in chosen(homophone, parameters["homophone"]):
        others = HOMOPHONES.get(said[i].lower().replace("’", "'"))
        if others:
            new[i] = _in_case_of(said[i], others[int(rolls[i]) % 256 * len(others) >> 8])
    for i in chosen(false_start, parameters["false_start"]):
        begun = said[i][: 2 + (int(rolls[i]) >> 8) % 2]
        if _PLAIN.fullmatch(said[i]) and not reads_as_number(begun):
            new[i] = f"{begun}- {new[i]}"
    for i in chosen(filler, parameters["filler"]):
        new[i] = f"{FILLERS[(int(rolls[i]) >> 9) * len(FILLERS) >> 7]} {new[i]}"
    return question.replaced((words[i].start, words[i].end, text) for i, text in new.items() if text != said[i])


def _in_case_of(word: str, other: str) -> str:
    if word.isupper():
        return other.upper()
    return other[0].upper() + other[1:] if word[0].isupper() else other
