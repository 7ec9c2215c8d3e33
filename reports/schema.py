"""The report as data: what ``report.json`` holds and what the pages are made from.

All numbers are in the metric's own unit (fractions, never percentages; nats for NLL; a score of captions is a tenth of
their CIDEr-D). None: not available, and ``note`` says why.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 4

Effect = Literal["better", "worse", "tied", "changed"]
Unit = Literal["percent", "fraction", "nats", "tenths"]
"""How a number is shown: times 100, as it is, in nats, or times 10 (CIDEr-D)."""


class _Entry(BaseModel):
    model_config = ConfigDict(extra="forbid")


class MetricEntry(_Entry):
    """Definition of a metric."""

    key: str
    title: str
    unit: Unit
    higher_is_better: bool | None
    definition: str
    source: str


class ScoreEntry(_Entry):
    """Definition of a further score of a protocol: the mean over all samples, where a failed one scores 0."""

    key: str
    title: str
    higher_is_better: bool | None
    definition: str


class DifferenceEntry(_Entry):
    """Quantized minus full precision on the same samples, with its interval.

    verdict: ``higher``/``lower`` when the interval excludes 0, else ``tied``. effect: what that means for this metric;
    ``changed`` where neither direction is better.
    """

    delta: float
    lo: float
    hi: float
    verdict: Literal["tied", "higher", "lower"]
    effect: Effect


class ValueEntry(_Entry):
    """A metric of one cell. caution: why runs must not be ranked by it, or ""."""

    value: float | None
    lo: float | None
    hi: float | None
    note: str = ""
    caution: str = ""
    difference: DifferenceEntry | None = None


class CurvePoint(_Entry):
    """Operating point of the risk-coverage curve: answered iff confidence >= threshold."""

    coverage: float
    risk: float
    threshold: float


class BinEntry(_Entry):
    """A bin (lower, upper] of the reliability diagram that holds samples; ``lo``/``hi``: interval of the mean score."""

    lower: float
    upper: float
    count: int
    confidence: float
    score: float
    lo: float | None
    hi: float | None


class ConfidenceEntry(_Entry):
    """Another confidence of the same answers (``selector``, ``geometric_mean``, …) beside the primary one.

    metrics: ece_15, aurc, coverage_at_risk_1, coverage_at_risk_5, auroc, brier and phi_10; each ``difference`` is from
    the same confidence of the full-precision run. beside: metric -> this confidence minus the primary one of the same
    run on the same samples.
    """

    name: str
    n_missing: int
    metrics: dict[str, ValueEntry]
    beside: dict[str, DifferenceEntry]


class RecalibratedEntry(_Entry):
    """Calibration after the primary confidence was mapped through parameters fitted on a threshold split.

    method: ``temperature`` or ``platt``. source: ``own`` (this run's threshold split) or ``full-precision`` (its
    twin's, clean). metrics: ece_15, rmsce_debiased_15, signed_miscalibration, brier, nll, with the map held fixed in
    their intervals; each difference is from the same answers before the map.
    """

    method: Literal["temperature", "platt"]
    source: Literal["own", "full-precision"]
    parameters: dict[str, float]
    metrics: dict[str, ValueEntry]


class FlipBin(_Entry):
    """Flips among the samples whose full-precision confidence lies in (lower, upper]."""

    lower: float
    upper: float
    n: int
    rate: float
    lo: float | None
    hi: float | None
    right_to_wrong: int
    wrong_to_right: int


class FlipEntry(_Entry):
    """Answers that are right (score >= 0.5) in one run and wrong in the other, of ``n`` samples.

    p_value: exact McNemar test; p_adjusted: Benjamini-Hochberg over all such tests of the report's world; n_tests:
    their number. rate: share of flips, with its interval. odds_ratio: wrong_to_right / right_to_wrong; None where one
    is 0. effect: ``tied`` unless p_adjusted < 0.05.
    """

    n: int
    right_to_wrong: int
    wrong_to_right: int
    rate: float
    lo: float | None
    hi: float | None
    p_value: float
    p_adjusted: float
    n_tests: int
    odds_ratio: float | None
    effect: Effect
    by_confidence: list[FlipBin]


class CellEntry(_Entry):
    """One model on one task.

    dataset, dataset_revision, split, part: which rows; the revision is a commit of the hub, ``blake2b:`` and a file's
    hash, or "" where unknown; part is a text for people, "" for the whole split. shift_from: the task that is in
    distribution for this one, or "". threshold_task: the task whose samples fit the threshold of effective reliability.
    noise_group: ``imagenet_c``, ``imagenet_c_extra``, ``camera``, ``text``, or ``other`` for a noise that this release
    does not know. full: a noise on the whole split of a family whose other noisy tasks run on a subset.
    protocol: of scoring; headline, headline_unit: what ``metrics["accuracy"]`` is called there, and how it is shown.
    scores: the protocol's further scores by name. parse_failure_rate: share of answers without the expected form.
    pairing: ``twin`` (the full-precision run), ``paired`` with it, or ``unpaired`` with the ``reason``.
    common: what was left out when runs of different samples were compared on those they share.
    chance_ece: the ECE that a perfectly calibrated model with these confidences shows by chance.
    confidences: beside the primary one, those that this run gave. recalibrated: empty without a confidence or a
    threshold split. flips: against the full-precision run, None where the cell is not paired with it.
    """

    run: str
    world: Literal["block", "real"]
    family: str
    variant: str
    task: str
    kind: Literal["clean", "noise", "shift"]
    noise: str = ""
    noise_group: str = ""
    severity: int = 0
    full: bool = False
    dataset: str
    dataset_revision: str = ""
    split: str
    part: str = ""
    shift_from: str = ""
    threshold_task: str
    protocol: str
    headline: str
    headline_unit: Unit
    pairing: Literal["twin", "paired", "unpaired"]
    reason: str = ""
    common: str = ""
    n: int
    n_clusters: int
    n_missing_confidence: int
    confidence_name: str
    failures: dict[str, int]
    failure_details: dict[str, int]
    parse_failures: int
    truncated: int
    metrics: dict[str, ValueEntry]
    scores: dict[str, ValueEntry]
    parse_failure_rate: ValueEntry
    confidences: list[ConfidenceEntry] = []
    recalibrated: list[RecalibratedEntry] = []
    flips: FlipEntry | None = None
    chance_ece: float | None
    curve: list[CurvePoint]
    bins: list[BinEntry]
    source: str


class SummaryEntry(_Entry):
    """Mean difference over all conditions of a family, with interval, and the range of ranks by AURC.

    Ranks are among the quantized runs of one full-precision twin: in 95 % of the replicates the rank lay in this range.
    """

    run: str
    world: Literal["block", "real"]
    family: str
    n_conditions: int
    differences: dict[str, DifferenceEntry]
    rank_lo: int | None = None
    rank_hi: int | None = None


class TransferEntry(_Entry):
    """A threshold that was chosen on the full-precision run's clean threshold split, applied to a run on a task.

    risk_target: the risk that was tolerated when the threshold was chosen. threshold: None where no threshold reaches
    it (everything is withheld). risk, coverage: what is really taken, with intervals that include the luck of the
    threshold, and are no narrower than the exact binomial one. verdict: ``kept`` when the whole interval of the risk
    lies at or below the target, ``broken`` when it lies above, ``open`` when it holds the target, ``empty`` when
    nothing is answered. own_coverage: what the run's own threshold split would have allowed, risk taken with it in
    own_risk.
    """

    run: str
    task: str
    threshold_task: str
    confidence: str
    risk_target: float
    threshold: float | None
    n: int
    n_answered: int
    risk: ValueEntry
    coverage: ValueEntry
    own_risk: ValueEntry | None = None
    own_coverage: ValueEntry | None = None
    verdict: Literal["kept", "broken", "open", "empty"]


class InteractionEntry(_Entry):
    """Difference in differences: what the condition costs the quantized run more than it costs full precision.

    family: that of the clean task. task "": the mean over all noises (kind ``noise``) of the family, for runs that have
    all of them. differences: accuracy, aurc, ece_15,
    coverage_at_risk_1, each (q,c) - (q,clean) - [(b,c) - (b,clean)] on the samples that clean and condition share, or
    on both sets where they share none (``shared`` False: shifts).
    """

    run: str
    world: Literal["block", "real"]
    family: str
    task: str
    kind: Literal["noise", "shift"]
    shared: bool
    differences: dict[str, DifferenceEntry]


class RobustnessEntry(_Entry):
    """Robustness of one run under one noise; noise "": the mean over all noises (mqCE).

    relative: mean over severities of A(noise) / A(clean). quantization_error: sum over severities of the run's errors
    divided by that of full precision (1 for full precision itself). severities: those that were run.
    """

    run: str
    world: Literal["block", "real"]
    family: str
    noise: str
    severities: list[int]
    relative: ValueEntry
    quantization_error: ValueEntry


class MixturePoint(_Entry):
    """Expected figures when ``ood_share`` of the questions come from the shifted task."""

    ood_share: float
    metrics: dict[str, ValueEntry]
    """accuracy, coverage_at_risk_1, coverage_at_risk_5, aurc, and with the transferred threshold of each tolerated
    risk: transfer_risk_1, transfer_coverage_1, … of 1, 5 and 10 %."""


class MixtureEntry(_Entry):
    """ID:OOD mixtures of two tasks of one run, under its primary confidence and under a Selector's."""

    run: str
    id_task: str
    ood_task: str
    confidence: str
    points: list[MixturePoint]


class ModuleAudit(_Entry):
    """One quantized module. ``place``: component, third of its stack of blocks, attention or MLP. ``group``: weights
    that share a scale, or ``channel`` or ``tensor``. ``extras``: what else its format holds."""

    name: str
    place: str
    format: str
    bits: int
    group: str
    symmetric: bool
    activation_bits: int | None
    extras: list[str]
    shape: tuple[int, int]
    packed_bytes: int
    changed: bool
    hash_before: str
    hash_after: str


class PlaceAudit(_Entry):
    """The quantized modules of one place that were treated alike."""

    place: str
    format: str
    bits: int
    group: str
    symmetric: bool
    activation_bits: int | None
    extras: list[str]
    n_modules: int
    n_changed: int
    n_weights: int
    packed_bytes: int


class CardEntry(_Entry):
    """What the quant card says. n_bytes is None for simulated runs: their memory means nothing.

    self_declared: of an import: what somebody says of a model that answered elsewhere; bits per weight are unknown.

    Options of the spec have dotted names (``calibration.source``). ``kept``: Linear modules at full precision -> dtype.
    """

    pretrained: str
    base: str
    adapter: str
    adapter_hash: str
    checkpoint_format: str
    image_processor: str
    revision: str
    architecture: str
    dtype: str
    spec_name: str
    spec: dict[str, str]
    method: str
    execution: Literal["full-precision", "simulated", "packed", "unknown"]
    self_declared: bool = False
    kernel: str
    device: str
    nominal_bpw: float | None
    effective_bpw: float | None
    bits: str
    group_size: str
    n_quantized_modules: int
    n_changed_modules: int
    n_kept_modules: int
    quantized_share: float
    components: dict[str, dict[str, int]]
    n_bytes: int | None
    places: list[PlaceAudit]
    modules: list[ModuleAudit]
    kept: dict[str, str]
    calibration_source: str
    calibration_data: str
    calibration_samples: int
    calibration_hash: str
    weights_hash: str
    libraries: dict[str, str]


class RunEntry(_Entry):
    """One model; ``twin`` is the id of its full-precision run. refused: why it has none."""

    id: str
    name: str
    label: str
    quantization: str
    role: Literal["full-precision", "quantized", "unknown"]
    twin: str | None
    refused: str
    model_hash: str
    card_hash: str
    card: CardEntry | None
    commands: list[str]


class ProblemEntry(_Entry):
    level: Literal["error", "warning"]
    where: str
    what: str
    fix: str


class InputEntry(_Entry):
    path: str
    sha256: str
    n_bytes: int


class Settings(_Entry):
    replicates: int
    seed: int
    level: float
    common_samples: bool


class Report(_Entry):
    """Everything that a report shows."""

    schema_version: int = SCHEMA_VERSION
    generator: str
    title: str
    settings: Settings
    metrics: list[MetricEntry]
    scores: list[ScoreEntry]
    runs: list[RunEntry]
    cells: list[CellEntry]
    summaries: list[SummaryEntry]
    transfers: list[TransferEntry] = []
    interactions: list[InteractionEntry] = []
    robustness: list[RobustnessEntry] = []
    mixtures: list[MixtureEntry] = []
    problems: list[ProblemEntry]
    inputs: list[InputEntry]
    inputs_digest: str
