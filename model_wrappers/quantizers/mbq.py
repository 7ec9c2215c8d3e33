"""MBQ (papers.md section 4; Li et al., 2025): AWQ's search with the modalities balanced by what they do to the answer.

Candidates are ``s = x^r``, at least 1e-4, over the geometric mean of their largest and smallest, with ``x`` the mean
magnitude of each input feature over all tokens and ``r`` = 0, 1/20, …, 19/20; the weights take no part, and no range is
clipped. The loss of a language layer is ``(sum_answer |D| + rho sum_vision |D|) / (n_answer + n_vision)``, D being the
error of the target's output and rho the ratio of the layer's attention or MLP (``ratios.py``); the squared form divides
each sum by its own count. Other positions (the prompt) do not count. With ``activation_bits`` (W4A8) the inputs of the
searched layers are rounded in the search, too.

Published MBQ quantizes the language model only. Linears of vision towers and connectors see no answer tokens, so there
is no ratio: every position counts alike. So it is for the language model where the calibration set lacks vision or
answer tokens (``noise``, ``text``); the caller is warned once.
"""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor

from bitquake.model_wrappers.quantizers.awq import awq_candidates, mean_magnitude
from bitquake.model_wrappers.quantizers.features import Features
from bitquake.model_wrappers.quantizers.options import MbqOptions
from bitquake.model_wrappers.quantizers.scale_groups import ScaleGroup
from bitquake.model_wrappers.quantizers.scale_search import Choice, best_scale
from bitquake.model_wrappers.quantizers.spec import QuantSpec


def token_weights(found: Features, ratio: float | None, options: MbqOptions) -> Tensor | None:
    """Weight of each token in the loss, up to a common factor; None: all alike.

    Args:
        ratio: rho; None where there is none to be had.
    """
    if ratio is None or found.vision is None or found.answer is None:
        return None
    answer, vision = found.answer.float(), found.vision.float()
    if options.loss == "mse":
        return answer / answer.sum().clamp(min=1) + ratio * vision / vision.sum().clamp(min=1)
    return answer + ratio * vision


def mbq_scale(
    group: ScaleGroup,
    found: Features,
    specs: Mapping[str, QuantSpec],
    options: MbqOptions,
    ratio: float | None,
    first: int | None = None,
) -> tuple[Tensor, Choice]:
    """The input scales of a group, float32 on the CPU, and the choice among the candidates."""
    candidates = awq_candidates(mean_magnitude(found.x), None, options.grid)
    power = 2 if options.loss == "mse" else 1
    weights = token_weights(found, ratio, options)
    choice = best_scale(group, found, candidates, specs, power=power, weights=weights, first=first)
    return candidates[choice.index], choice
