"""What a protocol's scores are called on a page: the headline that ``accuracy`` stands for, and the further ones."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import NamedTuple

from bitquake.reports.schema import ScoreEntry, Unit


class Headline(NamedTuple):
    """A protocol's own name for its score; caution: what its scores do to the metrics of confidence, or ""."""

    title: str
    unit: Unit
    definition: str
    caution: str = ""


_ACCURACY = "Accuracy"
_HEADLINES = {
    "vqa": Headline(
        _ACCURACY,
        "percent",
        "mean VQA accuracy: an answer's agreement with the annotators, 1 where at least four of ten gave it",
    ),
    "choice": Headline(_ACCURACY, "percent", "share of right choices, read leniently from the text"),
    "grounding": Headline("Acc@0.5", "percent", "share of boxes with IoU >= 0.5; no box is a wrong one"),
    "caption": Headline(
        "CIDEr-D",
        "tenths",
        "mean CIDEr-D of the captions, as published (about 0 to 2)",
        "An answer's score is a tenth of its CIDEr-D, no share of right answers: risk is 1 − CIDEr-D / 10, and ECE, "
        "Brier and Φ compare confidences with that. Rankings by AURC stand.",
    ),
    "retrieval": Headline("Recall@1", "percent", "share of pictures whose own caption is ranked first"),
    "scored": Headline("Score", "percent", "mean of the scores that the imported table brought"),
    "stock": Headline("Score", "percent", "mean score that the extended lmms-eval task gives"),
}
_RECALL = re.compile(r"recall_(\d{1,6})_of_(\d{1,6})")
_FURTHER = {
    "strict": ("Strict", "the letter alone, as lmms-eval's scienceqa reads it"),
    "lenient": ("Lenient", "the letter in any form that people write, or the option's own text"),
    "letter": ("Letter logit", "the option letter with the largest probability at the first answer position"),
    "reliable_vqa": ("reliable_vqa", "VQA accuracy as the reliable-VQA scorer computes it"),
    "lmms_eval": ("lmms-eval", "VQA accuracy as lmms-eval computes it"),
    "iou": ("Mean IoU", "mean intersection over union with the annotated box; 0 without a box"),
    "reciprocal_rank": ("Reciprocal rank", "mean of 1 / rank of the picture's own caption"),
}
_SAME_AS_HEADLINE = re.compile(r"cider|recall_1_of_\d+")


def headline(protocol: str, names: Iterable[str]) -> Headline:
    """What ``accuracy`` is called under a protocol; names: of the further scores, which tell n of a Recall@1-of-n."""
    found = _HEADLINES.get(protocol, Headline(_ACCURACY, "percent", "mean score"))
    if protocol == "retrieval":
        recalls = [match for name in names if (match := _RECALL.fullmatch(name))]
        return found._replace(title=f"Recall@1-of-{recalls[0][2]}") if recalls else found
    return found


def further(names: Iterable[str]) -> list[str]:
    """The further scores worth a column, in the order of the columns: not those that repeat the headline."""
    known = list(_FURTHER)

    def order(name: str) -> tuple[int, int, str]:
        match = _RECALL.fullmatch(name)
        if match:
            return (0, int(match[1]), name)
        return (1, known.index(name), name) if name in _FURTHER else (2, 0, name)

    return sorted((name for name in set(names) if not _SAME_AS_HEADLINE.fullmatch(name)), key=order)


def describe(name: str) -> ScoreEntry:
    """Title and definition of a further score; one that this release does not know goes by its name."""
    if match := _RECALL.fullmatch(name):
        k, n = match.groups()
        title, definition = f"Recall@{k}-of-{n}", f"own caption among the first {k} of {n} candidates"
    else:
        title, definition = _FURTHER.get(name, (name.replace("_", " "), "mean over all samples"))
    return ScoreEntry(
        key=name, title=title, higher_is_better=True if name in _FURTHER or match else None, definition=definition
    )
