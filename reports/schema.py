"""The report as data: what ``report.json`` holds and what the pages are made from.

All numbers are in the metric's own unit (fractions, never percentages; nats for NLL; a score of captions is a tenth of
their CIDEr-D). None: not available, and ``note`` says why.
"""

from __future__ import annotations

from typing import Literal

from pydantic import BaseModel, ConfigDict

SCHEMA_VERSION = 3

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
    execution: Literal["full-precision", "simulated", "packed"]
    kernel: str
    device: str
    nominal_bpw: float
    effective_bpw: float
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
    problems: list[ProblemEntry]
    inputs: list[InputEntry]
    inputs_digest: str
