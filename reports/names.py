"""What confidences are called on a page."""

from __future__ import annotations

_CONFIDENCES = {
    "joint": "MaxProb",
    "options": "MaxProb",
    "box_joint": "MaxProb",
    "geometric_mean": "Mean token probability",
    "selector": "Selector",
    "selector_transfer": "Selector trained on full precision",
    "selector_mixture": "Selector trained on several bit widths",
}
DEFINITIONS = {
    "MaxProb": "probability of the whole answer (of the option, of the box) by the model itself",
    "Mean token probability": "geometric mean of the answer tokens' probabilities",
    "Selector": "learned confidence, trained on this very quantization's answers to other images",
    "Selector trained on full precision": "learned confidence, trained on full precision and carried over",
    "Selector trained on several bit widths": "learned confidence, trained on answers of several quantizations",
}


def confidence_title(name: str) -> str:
    """``MaxProb`` for the model's own probability, and so on; an unknown name as it is."""
    return _CONFIDENCES.get(name, name.replace("_", " "))
