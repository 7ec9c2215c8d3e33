"""Scoring protocols: from a model's text and a reference answer to a score in [0, 1].

Pure functions of text and numbers; they import neither torch, lmms-eval nor datasets. Every scorer is total in the
model's text: no output of a model raises. What is wrong with a *reference* raises ``TargetError``.
"""

from __future__ import annotations

from .caption import CaptionScore, score_caption
from .choice import ChoiceScore, score_choice
from .grounding import BoxScore, iou, score_box
from .retrieval import CandidateError, RetrievalScore, score_retrieval
from .targets import TargetError
from .vqa import VqaScore, normalise, score_vqa

__all__ = [
    "BoxScore",
    "CandidateError",
    "CaptionScore",
    "ChoiceScore",
    "RetrievalScore",
    "TargetError",
    "VqaScore",
    "iou",
    "normalise",
    "score_box",
    "score_caption",
    "score_choice",
    "score_retrieval",
    "score_vqa",
]
