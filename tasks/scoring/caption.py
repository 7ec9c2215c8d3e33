"""CIDEr-D of a caption (Vedantam, Zitnick & Parikh 2015, arXiv 1411.5726), with a tokenizer that needs no Java.

For n = 1..4, captions become vectors of their n-grams, weighted by term frequency times inverse document frequency; a
document is one picture with all its references. With h the caption's vector, r a reference's, and l the number of
bigrams, the reference counts

    sim_n(h, r) = exp(-(l_h - l_r)^2 / (2 * 6^2)) * sum_w min(h_w, r_w) * r_w / (|h| |r|)

and CIDEr-D is ten times the mean of sim_n over references and n. It lies in [0, 10]; the score of a sample is a tenth
of it. Every picture of a split is in the document frequencies, so that a sample's score depends neither on ``--limit``
nor on the subset that noisy tasks run on.

Captions are read as lmms-eval's ``coco_cap`` and COCO's evaluation read them: the whole text, line ends as spaces.
"""

from __future__ import annotations

import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

from .targets import READ_CHARACTERS, TargetError

Ngram = tuple[str, ...]

LONGEST = 4
SIGMA = 6.0
SCALE = 10.0
"""CIDEr-D is this many times a mean of similarities, each in [0, 1]."""

# What follows was found by observation of COCO's PTBTokenizer (Stanford CoreNLP 3.4.1, -lowerCase): the words that keep
# their full stop always, when they begin with a capital, or before a number.
_ALWAYS = (
    "adj|adm|adv|al|ala|alex|apr|ariz|assn|assoc|asst|atty|aug|ave|bhd|bldg|blvd|brig|bros|calif|capt|cf|cie|"
    "cmdr|co|col|colo|conn|corp|cos|cpl|ct|dak|dec|dept|det|dr|drs|elec|ens|esq|est|etc|ext|feb|fla|fri|ft|ga|"
    "gen|gov|govs|hon|inc|ind|insp|intl|invt|jan|jos|jr|jul|jun|kan|kans|ky|lt|ltd|maj|mar|md|mfg|mich|minn|mlle|"
    "mme|mo|mon|mont|mr|mrs|ms|msgr|mt|mtg|natl|neb|nev|nov|oct|okla|penn|pfc|ph|plc|ppte|ppty|pres|prof|pte|"
    "ptes|pty|ptys|pvt|rd|rep|reps|rev|rt|sen|sens|sep|sept|seq|sfc|sgt|spc|sq|sr|st|ste|supt|sys|tel|tenn|thu|"
    "thurs|tue|tues|univ|va|vs|vt|wed|wis|wisc|wm|wyo"
)
_CAPITALISED = "Ark|Az|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash"
_BEFORE_NUMBER = "art|ca|fig|figs|no|nos|op|pp|prop"

_DROPPED = frozenset("'`\"?!,:;")
"""Tokens that COCO's evaluation drops, with runs of full stops or dashes. (It means to drop brackets too, but compares
them in capitals.)"""
_WRITTEN = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
_WRITTEN |= {"€": "$", "£": "#", "¢": "cents", "½": "1/2", "¼": "1/4", "¾": "3/4", "⅓": "1/3", "⅔": "2/3"}
_WRITTEN_MARK = re.compile("[" + re.escape("".join(_WRITTEN)) + "]")
_READ_AS = str.maketrans(
    {"’": "'", "‘": "`", "‛": "`", "“": '"', "”": '"', "«": '"', "»": '"', "‹": '"', "›": '"', "–": " -- ", "—": " -- "}
    | {"…": " ... ", "\u00a0": " ", "\u00ad": None, "\u200b": None, "\ufe0f": None}
)
_PICTOGRAM = re.compile("[\U00010000-\U0010ffff]")  # emoji
_ENTITIES = {"&amp;": "&", "&lt;": "<", "&gt;": ">", "&quot;": '"', "&apos;": "'"}
_ENTITY = re.compile("|".join(_ENTITIES), re.IGNORECASE)

_A = r"[^\W_¹²³½¼¾⅓⅔]"  # a letter or digit
_L = r"[^\W\d_¹²³½¼¾⅓⅔]"  # a letter
_WORD = rf"{_A}+(?:[-_/]{_A}+)*"
_TOKEN = re.compile(
    rf"""
      (?-i:(?!(?:cannot|gonna|wanna|gotta|gimme|lemme)\b)[a-z]+(?=[ ,]))  # nearly all words, first because it is fast
    | https?://[^\s"<>()]*[^\s"<>().,;:!?'] | www\.[^\s"<>()]*[^\s"<>().,;:!?']
    | [\w.+-]*\w@\w[\w-]*(?:\.\w+)+                                # addresses
    | </?{_L}[^\s<>]*>                                             # tags
    | (?<!\S)[:;=]-?[()DP](?![^\s.,!?])                            # smileys
    | \.{{3,}} | -{{2,}} | [?!]{{2,}} | \*{{2,}} | <{{2}} | >{{2}} | c\+\+ | c\# | us\$ | ph\.d\.
    | {_L}(?:\.{_L})+\.?(?!{_L})(?:-{_A}+)*                        # u.s., p.m., u.s.-based
    | (?:{_ALWAYS}|{_L})\.(?!\w)(?:-{_A}+)*              # mr., a single letter
    | (?:{_ALWAYS}|{_BEFORE_NUMBER})\.(?=\s*\d)
    | (?-i:{_CAPITALISED})\.(?!\w)
    | (?-i:[A-Z]+(?:&[A-Z]+)+)                                     # R&B
    | (?:can(?=not\b) | (?:gon|wan)(?=na\b) | got(?=ta\b) | (?:gim|lem)(?=me\b)) | y'(?=\w)
    | (?<!\w)'\d{{2}}s?(?!\w) | ol'(?!\w) | '(?:em|n|till?|cause)\b'? | 't(?=is\b|was\b)
    | {_L}+(?=n[''`]t(?!\w))                                       # do|n't
    | n['`]t(?!\w)
    | '(?:s|m|d|re|ve|ll)(?!\w)
    | (?-i:[A-HJ-XZ]|[dljno])'{_L}{{2,}}(?:-{_A}+)* | {_L}+[aeiouy]'[aeiou]{_L}* | c'mon | s'mores | [eo]'er
    | (?<![\w.,:])[-+]?\d+(?:[.,]\d+)*(?:-{_A}+)+                  # 1.5-inch
    | {_L}+(?:\.{_L}+)+(?:-{_A}+)*                                 # file names, a space forgotten
    | [.,:]?\d+(?:[.,:]\d+)+ | (?<!\w)[-+]\d+(?:[.,]\d+)*\b | [.,:]\d+\b
    | {_WORD}\.(?=,)
    | {_WORD}
    | [#@]{_L}{_A}*
    | \S
    """,
    re.VERBOSE | re.IGNORECASE,
)


class CaptionScore(NamedTuple):
    """score: CIDEr-D / 10, in [0, 1]; tokens: the caption as it was read, joined by spaces."""

    score: float
    tokens: str

    @property
    def parse_failure(self) -> bool:
        return not self.tokens


def tokenize(text: str) -> list[str]:
    """Lower-case words in the way of COCO's PTBTokenizer, punctuation dropped; differences are listed in the tests."""
    text = _ENTITY.sub(lambda match: _ENTITIES[match[0].lower()], text[:READ_CHARACTERS])
    text = _PICTOGRAM.sub(" ", text.translate(_READ_AS))
    tokens = (token for token in _TOKEN.findall(text) if token not in _DROPPED and token.strip(".-"))
    return [_WRITTEN_MARK.sub(lambda match: _WRITTEN[match[0]], token).lower() for token in tokens]


def ngrams(tokens: Sequence[str]) -> Counter[Ngram]:
    """How often each n-gram of 1 to 4 tokens occurs."""
    return Counter(
        tuple(tokens[start : start + n]) for n in range(1, LONGEST + 1) for start in range(len(tokens) - n + 1)
    )


@dataclass(frozen=True)
class Corpus:
    """documents: number of pictures; frequency: n-gram -> in how many pictures' references it occurs."""

    documents: int
    frequency: Mapping[Ngram, int]

    @classmethod
    def of(cls, references: Iterable[Any]) -> Corpus:
        """The corpus of a split: each picture's references; pictures that have none do not count."""
        documents = 0
        frequency: Counter[Ngram] = Counter()
        for texts in references:
            try:
                captions = reference_captions(texts)
            except TargetError:
                continue
            documents += 1
            frequency.update(set().union(*(ngrams(tokenize(caption)) for caption in captions)))
        return cls(documents, frequency)

    def weights(self, counts: Mapping[Ngram, int]) -> list[dict[Ngram, float]]:
        """For each n the n-grams' term frequency times ``log(documents / max(1, document frequency))``."""
        vectors: list[dict[Ngram, float]] = [{} for _ in range(LONGEST)]
        everywhere = math.log(self.documents) if self.documents else 0.0
        for ngram, count in counts.items():
            # A corpus that lacks this sample's references must not weigh them below nothing.
            rarity = max(0.0, everywhere - math.log(max(1, self.frequency.get(ngram, 0))))
            vectors[len(ngram) - 1][ngram] = count * rarity
        return vectors


def reference_captions(values: Any) -> list[str]:
    """The references of one picture, blank ones left out: a list of texts, or one text.

    Raises:
        TargetError: neither, or none that is not blank.
    """
    texts = [values] if isinstance(values, str) else values
    if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
        raise TargetError(f"captions: expected a list of texts, got {values!r}")
    captions = [text for text in texts if text.strip()]
    if not captions:
        raise TargetError(f"captions: the picture has no reference caption, got {values!r}")
    return captions


def cider_d(tokens: Sequence[str], references: Sequence[Sequence[str]], corpus: Corpus) -> float:
    """CIDEr-D of one caption, in [0, 10].

    Args:
        tokens: the caption's tokens.
        references: the tokens of each of the picture's reference captions, at least one.
        corpus: document frequencies.
    """
    caption = corpus.weights(ngrams(tokens))
    norms = [_norm(vector) for vector in caption]
    total = 0.0
    for reference in references:
        other = corpus.weights(ngrams(reference))
        longer = max(0, len(tokens) - 1) - max(0, len(reference) - 1)
        penalty = math.exp(-(longer**2) / (2 * SIGMA**2))
        for vector, norm, weights in zip(caption, norms, other, strict=True):
            product = norm * _norm(weights)
            if product:
                common = [(weight, weights[ngram]) for ngram, weight in vector.items() if ngram in weights]
                shared = sum(min(mine, theirs) * theirs for mine, theirs in common)
                total += penalty * shared / product
    return SCALE * total / (LONGEST * len(references))


def score_caption(text: str, references: Any, corpus: Corpus) -> CaptionScore:
    """Score a model's caption; a text without a word scores 0 and is a parse failure.

    Args:
        text: the model's answer, as it wrote it.
        references: the picture's reference captions, as the dataset holds them.
        corpus: document frequencies of the split's references.

    Raises:
        TargetError: see :func:`reference_captions`.
    """
    captions = [tokenize(caption) for caption in reference_captions(references)]
    tokens = tokenize(text)
    # Rounding can carry a perfect caption one unit past 1.
    return CaptionScore(min(1.0, cider_d(tokens, captions, corpus) / SCALE), " ".join(tokens))


def _norm(vector: Mapping[Ngram, float]) -> float:
    return math.sqrt(sum(weight * weight for weight in vector.values()))
