"""Questions about scenes, in five families. A question is a text and a program that any viewer's scene answers.

``VQA`` questions look one thing up; ``ADVERSARIAL`` ones compose what the former taught (relations, negation, near
misses), as AdVQA's authors did by hand; ``refer`` names one object without location words, as RefCOCO+; ``science``
states a rule and asks for its consequence; ``SPOKEN`` asks about the thing in front of the camera, as VizWiz.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from itertools import combinations
from typing import NamedTuple

from .scenes import COLORS, SHAPES, SIZES, TEXTURES, Block, Scene

Program = Callable[[Scene], str]
UNANSWERABLE = "unanswerable"


class Question(NamedTuple):
    """A question text, its kind (``question_type``), VQA answer type, and the program that answers it."""

    text: str
    kind: str
    answer_type: str
    program: Program


class Referral(NamedTuple):
    """A referring expression and the place of the object it names among the scene's blocks."""

    expression: str
    target: int


class ScienceQuestion(NamedTuple):
    """A hint (the rule), a question, its choices, the index of the right one, and topic words."""

    hint: str
    text: str
    choices: tuple[str, ...]
    answer: int
    topic: str
    skill: str


Maker = Callable[[Scene, random.Random], "Question | None"]


def _pick(rng: random.Random, items: Sequence[int]) -> int | None:
    return rng.choice(items) if items else None


def plural(word: str) -> str:
    """English plural of a shape word."""
    return word + ("es" if word.endswith("s") else "s")


def _matching(scene: Scene, **words: str) -> list[int]:
    return [i for i, b in enumerate(scene.blocks) if all(getattr(b, key) == word for key, word in words.items())]


def _unique(scene: Scene, *keys: str) -> list[int]:
    """Objects that no other object equals in all of ``keys``."""
    seen: dict[tuple[str, ...], list[int]] = {}
    for i, block in enumerate(scene.blocks):
        seen.setdefault(tuple(getattr(block, key) for key in keys), []).append(i)
    return [found[0] for found in seen.values() if len(found) == 1]


def _yes(truth: bool) -> str:
    return "yes" if truth else "no"


def _attribute(i: int, name: str) -> Program:
    return lambda s: str(getattr(s.blocks[i], name))


def _lookup(target: str, *keys: str, text: str) -> Maker:
    """Ask for one attribute of the object that ``keys`` identify."""

    def make(scene: Scene, rng: random.Random) -> Question | None:
        i = _pick(rng, _unique(scene, *keys))
        if i is None:
            return None
        asked = text.format(**{key: getattr(scene.blocks[i], key) for key in keys})
        return Question(asked, f"{target} of {' '.join(keys)}", "other", _attribute(i, target))

    return make


def _this(target: str, text: str) -> Maker:
    def make(scene: Scene, rng: random.Random) -> Question | None:
        if len(scene.blocks) != 1:
            return None
        return Question(text, f"{target} of this", "other", _attribute(0, target))

    return make


def _exists(scene: Scene, rng: random.Random, keys: Sequence[str], text: str, kind: str) -> Question:
    """Ask whether an object exists; half the time one does, else one attribute of a real one is changed."""
    pools = {"color": list(COLORS), "shape": list(SHAPES), "size": list(SIZES), "texture": list(TEXTURES)}
    block = rng.choice(scene.blocks)
    words = {key: str(getattr(block, key)) for key in keys}
    if rng.random() < 0.5:
        for _ in range(8):
            changed = rng.choice(keys)
            words[changed] = rng.choice(pools[changed])
            if not _matching(scene, **words):
                break
    return Question(text.format(**words), kind, "yes/no", lambda s: _yes(bool(_matching(s, **words))))


def _exists_maker(*keys: str, text: str, kind: str) -> Maker:
    return lambda scene, rng: _exists(scene, rng, keys, text, kind)


def _verify(target: str, pool: Sequence[str], *keys: str, text: str) -> Maker:
    """Ask whether the identified object has an attribute; half the time it has."""

    def make(scene: Scene, rng: random.Random) -> Question | None:
        i = _pick(rng, _unique(scene, *keys))
        if i is None:
            return None
        word = str(getattr(scene.blocks[i], target)) if rng.random() < 0.5 else rng.choice(list(pool))
        asked = text.format(word=word, **{key: getattr(scene.blocks[i], key) for key in keys})
        return Question(asked, f"is {target}", "yes/no", lambda s: _yes(getattr(s.blocks[i], target) == word))

    return make


def _count(key: str | None, text: str) -> Maker:
    def make(scene: Scene, rng: random.Random) -> Question | None:
        if key is None:
            return Question(text, "count all", "number", lambda s: str(len(s.blocks)))
        pool: Sequence[str] = list(COLORS) if key == "color" else SHAPES if key == "shape" else TEXTURES
        word = str(getattr(rng.choice(scene.blocks), key)) if rng.random() < 0.8 else rng.choice(list(pool))
        asked = text.format(word=plural(word) if key == "shape" else word)
        return Question(asked, f"count {key}", "number", lambda s: str(len(_matching(s, **{key: word}))))

    return make


def _centre(block: Block) -> tuple[float, float]:
    return block.x + block.w / 2, block.y + block.h / 2


SIDES: dict[str, Callable[[Block, Block], float]] = {
    "left of": lambda a, b: _centre(b)[0] - _centre(a)[0],
    "right of": lambda a, b: _centre(a)[0] - _centre(b)[0],
    "above": lambda a, b: _centre(b)[1] - _centre(a)[1],
    "below": lambda a, b: _centre(a)[1] - _centre(b)[1],
}
CLEAR = 5.0
"""How far apart, in pixels, centres must lie before a relation is asked about."""


def _beside(scene: Scene, rng: random.Random) -> Question | None:
    candidates = _unique(scene, "shape")
    if len(candidates) < 2:
        return None
    i, j = rng.sample(candidates, 2)
    side = rng.choice(list(SIDES))
    distance = SIDES[side](scene.blocks[i], scene.blocks[j])
    if abs(distance) < CLEAR:
        return None
    text = f"is the {scene.blocks[i].shape} {side} the {scene.blocks[j].shape}?"
    return Question(text, "relation", "yes/no", lambda s: _yes(SIDES[side](s.blocks[i], s.blocks[j]) > 0))


def _same(key: str, *, by: tuple[str, ...]) -> Maker:
    def make(scene: Scene, rng: random.Random) -> Question | None:
        candidates = _unique(scene, *by)
        if len(candidates) < 2:
            return None
        i, j = rng.sample(candidates, 2)
        first, second = (" ".join(str(getattr(scene.blocks[k], word)) for word in by) for k in (i, j))
        text = f"is the {first} the same {key} as the {second}?"
        return Question(
            text, f"same {key}", "yes/no", lambda s: _yes(getattr(s.blocks[i], key) == getattr(s.blocks[j], key))
        )

    return make


def _more_colors(scene: Scene, rng: random.Random) -> Question | None:
    first = rng.choice(scene.blocks).color
    second = rng.choice(list(COLORS))
    if first == second:
        return None
    if rng.random() < 0.5:
        first, second = second, first
    text = f"are there more {first} objects than {second} objects?"
    return Question(
        text, "more", "yes/no", lambda s: _yes(len(_matching(s, color=first)) > len(_matching(s, color=second)))
    )


def _count_not(scene: Scene, rng: random.Random) -> Question | None:
    word = rng.choice(scene.blocks).color
    text = f"how many objects are not {word}?"
    return Question(text, "count not", "number", lambda s: str(len(s.blocks) - len(_matching(s, color=word))))


VQA: tuple[tuple[float, Maker], ...] = (
    (16, _lookup("color", "shape", text="what color is the {shape}?")),
    (4, _lookup("color", "size", "shape", text="what color is the {size} {shape}?")),
    (3, _lookup("color", "texture", "shape", text="what color is the {texture} {shape}?")),
    (13, _lookup("shape", "color", text="what shape is the {color} object?")),
    (3, _lookup("shape", "size", "color", text="what shape is the {size} {color} object?")),
    (5, _lookup("size", "shape", text="what size is the {shape}?")),
    (4, _lookup("size", "color", "shape", text="what size is the {color} {shape}?")),
    (5, _lookup("texture", "shape", text="what pattern is on the {shape}?")),
    (4, _lookup("texture", "color", "shape", text="what pattern is on the {color} {shape}?")),
    (2, _this("shape", "what is this?")),
    (2, _this("color", "what color is this?")),
    (10, _exists_maker("color", "shape", text="is there a {color} {shape}?", kind="exists")),
    (4, _exists_maker("color", text="are there any {color} objects?", kind="exists")),
    (4, _exists_maker("shape", text="is there a {shape}?", kind="exists")),
    (6, _verify("color", list(COLORS), "shape", text="is the {shape} {word}?")),
    (3, _verify("texture", TEXTURES, "color", "shape", text="is the {color} {shape} {word}?")),
    (4, _count(None, "how many objects are there?")),
    (2, _count("color", "how many {word} objects are there?")),
    (2, _count("shape", "how many {word} are there?")),
    (1.2, _beside),
    (1.2, _same("color", by=("shape",))),
    (0.8, _more_colors),
    (0.8, _count_not),
)
"""(weight, maker) of the in-distribution questions: look-ups, existence, counts, and a few comparisons."""


def _related(target: str) -> Maker:
    """'what color is the circle left of the red square?' with another circle on the other side."""

    def make(scene: Scene, rng: random.Random) -> Question | None:
        anchors = _unique(scene, "color", "shape")
        rng.shuffle(anchors)
        sides = list(SIDES)
        rng.shuffle(sides)
        for j in anchors:
            anchor = scene.blocks[j]
            for side in sides:
                on_side = [i for i, b in enumerate(scene.blocks) if i != j and SIDES[side](b, anchor) > CLEAR]
                shapes = [scene.blocks[i].shape for i in on_side]
                for i in on_side:
                    shape = scene.blocks[i].shape
                    if shapes.count(shape) == 1 and len(_matching(scene, shape=shape)) > 1:
                        asked = {"texture": "pattern"}.get(target, target)
                        text = f"what {asked} is the {shape} {side} the {anchor.color} {anchor.shape}?"
                        return Question(text, f"related {target}", "other", _attribute(i, target))
        return None

    return make


def _near_miss(scene: Scene, rng: random.Random) -> Question | None:
    keys = ("size", "texture", "color", "shape")
    return _exists(scene, rng, keys, "is there a {size} {texture} {color} {shape}?", "near miss")


def _count_two(scene: Scene, rng: random.Random) -> Question | None:
    block = rng.choice(scene.blocks)
    words = {"texture": block.texture, "color": block.color}
    text = f"how many {block.color} objects are {block.texture}?"
    return Question(text, "count two", "number", lambda s: str(len(_matching(s, **words))))


def _all_are(scene: Scene, rng: random.Random) -> Question | None:
    word = rng.choice(scene.blocks).texture
    text = f"are all objects {word}?"
    return Question(text, "all", "yes/no", lambda s: _yes(len(_matching(s, texture=word)) == len(s.blocks)))


def _more_shapes(scene: Scene, rng: random.Random) -> Question | None:
    first, second = rng.sample(SHAPES, 2)
    if not (_matching(scene, shape=first) or _matching(scene, shape=second)):
        return None
    text = f"are there more {plural(first)} than {plural(second)}?"
    return Question(
        text, "more", "yes/no", lambda s: _yes(len(_matching(s, shape=first)) > len(_matching(s, shape=second)))
    )


ADVERSARIAL: tuple[tuple[float, Maker], ...] = (
    (18, _related("color")),
    (8, _related("texture")),
    (18, _near_miss),
    (10, _count_two),
    (8, _count_not),
    (8, _all_are),
    (8, _more_shapes),
    (6, _more_colors),
    (8, _same("size", by=("color", "shape"))),
    (8, _same("color", by=("texture", "shape"))),
    (8, _beside),
    (6, _lookup("color", "size", "texture", "shape", text="what color is the {size} {texture} {shape}?")),
)
"""(weight, maker) of the language-side shift: compositions, negation, near misses."""


def ask(makers: Sequence[tuple[float, Maker]], scene: Scene, rng: random.Random, n: int) -> list[Question]:
    """Up to ``n`` different questions about a scene (fewer when it does not allow so many)."""
    weights = [weight for weight, _ in makers]
    found: dict[str, Question] = {}
    for _ in range(12 * n):
        if len(found) == n:
            break
        question = rng.choices(makers, weights)[0][1](scene, rng)
        if question is not None:
            found.setdefault(question.text, question)
    return list(found.values())


SPOKEN_FORMS = ("{}?", "hi {} please?", "can you tell me {}?", "{} thank you", "please tell me {}?", "hey {}?")
_SPOKEN: tuple[tuple[float, str, str], ...] = (
    (30, "what color is this", "color"),
    (30, "what is this", "shape"),
    (12, "what pattern is this", "texture"),
    (10, "is this {word}", "verify"),
    (18, "what does it say on this", "absent"),
)


def ask_aloud(scene: Scene, visible: bool, rng: random.Random) -> Question:
    """A spoken question about the first object of a photo; ``visible`` says whether the photo still shows it."""
    _, words, target = rng.choices(_SPOKEN, [weight for weight, _, _ in _SPOKEN])[0]
    form = rng.choice(SPOKEN_FORMS)
    word = scene.blocks[0].color if rng.random() < 0.5 else rng.choice(list(COLORS))
    text = form.format(words.format(word=word))
    if not visible or target == "absent":
        return Question(text, "unanswerable", UNANSWERABLE, lambda _: UNANSWERABLE)
    if target == "verify":
        return Question(text, "verify", "yes/no", lambda s: _yes(s.blocks[0].color == word))
    return Question(text, target, "other", _attribute(0, target))


_REFER_ORDER = ("size", "texture", "color", "shape")


def refer(scene: Scene, rng: random.Random, n: int) -> list[Referral]:
    """Up to ``n`` referring expressions for different objects: attributes that name exactly one, no location words."""
    order = list(range(len(scene.blocks)))
    rng.shuffle(order)
    found = []
    for i in order[:n]:
        block = scene.blocks[i]
        options = []
        for size in range(1, 5):
            for keys in combinations(_REFER_ORDER, size):
                if _matching(scene, **{key: getattr(block, key) for key in keys}) == [i]:
                    options.append(keys)
            if options and size >= 2:
                break
        if not options:
            continue
        keys = rng.choice(options)
        words = " ".join(str(getattr(block, key)) for key in keys)
        found.append(Referral(words if "shape" in keys else f"{words} object", i))
    return found


_RULES: tuple[tuple[str, str, str, str], ...] = (
    ("color", "{word} objects are hot.", "which object is hot?", "heat"),
    ("color", "a magnet pulls {word} objects.", "which object does the magnet pull?", "magnets"),
    ("color", "{word} objects float.", "which object floats?", "buoyancy"),
    ("texture", "{word} objects are alive.", "which object is alive?", "living things"),
    ("size", "{word} objects are heavy.", "which object is heavy?", "weight"),
)
LETTERS = "ABCDE"


def science(scene: Scene, rng: random.Random) -> ScienceQuestion | None:
    """A rule about one attribute and a choice among objects named by their (unique) shapes; one choice obeys it."""
    names = _unique(scene, "shape")
    if len(names) < 2:
        return None
    rules = list(_RULES)
    rng.shuffle(rules)
    for key, rule, text, topic in rules:
        values = [getattr(scene.blocks[i], key) for i in names]
        singles = [i for i, value in zip(names, values, strict=True) if values.count(value) == 1]
        others_max = 3
        if singles:
            right = rng.choice(singles)
            others = [i for i in names if i != right]
        else:
            right = rng.choice(names)
            others = [i for i in names if getattr(scene.blocks[i], key) != getattr(scene.blocks[right], key)]
        if not others:
            continue
        chosen = [*rng.sample(others, min(len(others), rng.randint(1, others_max))), right]
        rng.shuffle(chosen)
        choices = tuple(f"the {scene.blocks[i].shape}" for i in chosen)
        hint = rule.format(word=getattr(scene.blocks[right], key))
        return ScienceQuestion(hint, text, choices, chosen.index(right), topic, f"find the {key}")
    return None


def is_clear(question: ScienceQuestion, scene: Scene) -> bool:
    """Whether the rule alone, without the choices, singles out one object of the scene."""
    key = question.skill.removeprefix("find the ")
    return sum(str(getattr(block, key)) in question.hint.split() for block in scene.blocks) == 1


def lettered(choices: Sequence[str]) -> str:
    """The choices behind their letters: ``(A) the circle (B) the star``."""
    return " ".join(f"({LETTERS[i]}) {choice}" for i, choice in enumerate(choices))


def science_prompt(question: ScienceQuestion) -> str:
    """The question as the families' template writes it: hint, question, lettered choices."""
    return f"{question.hint} {question.text} {lettered(question.choices)}"


_CAPTION_WORDS = ("and", "describe", "picture", "three", "two", "with")
"""Words that only captions use, which came later: at the end, so that the others keep their token ids."""


def words() -> list[str]:
    """Every word and sign that a block-world prompt or answer can contain: words, the numbers, words of captions."""
    texts = [*COLORS, *SHAPES, *map(plural, SHAPES), *SIZES, *TEXTURES, "object objects"]
    texts += [
        "what",
        "color",
        "shape",
        "size",
        "pattern",
        "is",
        "are",
        "the",
        "a",
        "an",
        "on",
        "this",
        "there",
        "any",
        "how",
        "many",
        "of",
    ]
    texts += [
        "left",
        "right",
        "above",
        "below",
        "same",
        "as",
        "more",
        "than",
        "not",
        "all",
        "yes",
        "no",
        "find",
        "which",
        "does",
        "it",
        "say",
    ]
    texts += ["hi", "hey", "please", "can", "you", "tell", "me", "thank", "unanswerable"]
    texts += [rule.replace("{word}", "") + " " + text for _, rule, text, _ in _RULES]
    signs = [*"?.,:()[]", *LETTERS]
    tokens = {word for text in texts for word in text.replace("?", " ").replace(".", " ").split()}
    return [*sorted(tokens | set(signs)), *map(str, range(65)), *_CAPTION_WORDS]
