"""The metrics' formulas as the page on the method shows them; definitions in words stand in `bitquake.metrics`."""

from __future__ import annotations

from markupsafe import Markup

from bitquake.metrics import METRICS
from bitquake.metrics.registry import COSTS, RISKS

_FORMULAS = {
    "accuracy": "1/<i>N</i> Σ<sub>i</sub> <i>a</i><sub>i</sub>",
    "ece_15": "Σ<sub>b</sub> <i>n</i><sub>b</sub>/<i>N</i> · |mean<sub>b</sub> <i>a</i> − mean<sub>b</sub> <i>c</i>|, "
    "15 bins (lo, hi] of equal width",
    "ece_mass_15": "as ECE, 15 bins of equal mass",
    "rmsce_debiased_15": "√ max(0, Σ<sub>b</sub> <i>n</i><sub>b</sub>/<i>N</i> · "
    "[(mean<sub>b</sub> <i>a</i> − mean<sub>b</sub> <i>c</i>)² − "
    "var<sub>b</sub>(<i>a</i> − <i>c</i>)/<i>n</i><sub>b</sub>])",
    "signed_miscalibration": "mean <i>c</i> − mean <i>a</i>",
    "brier": "1/<i>N</i> Σ<sub>i</sub> (<i>c</i><sub>i</sub> − <i>a</i><sub>i</sub>)²",
    "nll": "−1/<i>N</i> Σ<sub>i</sub> [<i>a</i><sub>i</sub> ln <i>c</i><sub>i</sub> + "
    "(1 − <i>a</i><sub>i</sub>) ln(1 − <i>c</i><sub>i</sub>)]",
    "auroc": "P(<i>c</i><sub>right</sub> &gt; <i>c</i><sub>wrong</sub>) + ½ P(equal)",
    "aurc": "∫ <i>R</i>(coverage) d coverage, with <i>R</i> = mean of <i>r</i><sub>i</sub> over what is answered",
    "excess_aurc": "AURC − AURC of withholding by <i>a</i><sub>i</sub>",
}


def formulas() -> dict[str, Markup]:
    """Metric key -> its formula.

    Raises:
        KeyError: a metric has none.
    """
    found = dict(_FORMULAS)
    for risk in RISKS:
        found[f"coverage_at_risk_{risk * 100:g}"] = (
            f"max <i>C</i>(<i>g</i>) over all <i>g</i> with <i>R</i>(<i>g</i>) ≤ {risk:g}; 0 if there is none"
        )
    for cost in COSTS:
        found[f"phi_{cost}"] = (
            f"1/<i>N</i> Σ<sub>answered</sub> (<i>a</i><sub>i</sub> if <i>a</i><sub>i</sub> &gt; 0, else −{cost}); "
            "<i>g</i> maximises it on the threshold split, where withholding everything is allowed"
        )
    return {key: Markup(found[key]) for key in METRICS}  # noqa: S704 - the constants above


FORMULAS = formulas()
