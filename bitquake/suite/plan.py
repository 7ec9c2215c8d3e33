"""From a suite to its cells: grids, calibration sources, seeds, exclusions, twins. Loads no model and no torch.

Of each model the control comes first: full precision, or of a trained model what its training made. Data-free
quantizations have one cell, calibrated ones one for each calibration source and seed, trained models one for each seed.
"""

from __future__ import annotations

import fnmatch
import itertools
import re
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from bitquake import __version__
from bitquake.model_wrappers.quantizers.spec import FULL_PRECISION, QuantSpec, QuantSpecError, load_spec
from bitquake.model_wrappers.training.config import (
    LoraConfig,
    QatConfig,
    TrainingConfigError,
    load_training,
)
from bitquake.suite.identity import cell_hashes, training_identity
from bitquake.suite.reader import LoadedSuite
from bitquake.suite.schema import AS_TRAINED, OWN, Calibration, Level, Model, Quantization, SuiteError
from bitquake.suite.task_list import ListedTask, calibrates, listed_tasks
from bitquake.suite_plan import PlannedCell, SuitePlan

_FULL_BITS = 16
_FACTOR = re.compile(r"\{([A-Za-z_]\w*)\}")
_DEV = "_dev"


class _Variant(NamedTuple):
    """A quantization with its grid's levels put in; spec: None for full precision and for as-trained."""

    name: str
    spec: QuantSpec | None
    levels: dict[str, Level]


class _Entry(NamedTuple):
    """A model entry with its grid's levels put in, and its place in the file."""

    place: int
    model: Model
    levels: dict[str, Level]


class _Draft(NamedTuple):
    """A cell, and what identical cells have in common."""

    cell: PlannedCell
    sameness: str


def plan_suite(loaded: LoadedSuite, *, limit: int | None = None) -> SuitePlan:
    """All cells of a suite.

    Args:
        limit: no task gets more samples, whatever the suite says: to try a suite out.

    Raises:
        SuiteError: an unknown task, quantization or component, an empty grid, cells that are the same or have one name,
            an exclusion that matches nothing, a twin that is not there.
    """
    suite = loaded.suite
    if limit is not None and limit < 1:
        raise SuiteError(f"--limit: give at least 1, got {limit}")
    drafts: list[_Draft] = []
    entries = _entries(loaded)
    for entry in entries.values():
        drafts += _cells_of(loaded, entry, limit)
    _check_names(loaded, drafts)
    kept = _without_excluded(loaded, [draft.cell for draft in drafts])
    names = {cell.name for cell in kept}
    _check_sameness(loaded, [draft for draft in drafts if draft.cell.name in names])
    _check_selectors(loaded, kept)
    return SuitePlan(
        bitquake=__version__,
        suite=suite.suite,
        title=suite.title,
        description=suite.description,
        world=loaded.world,
        page=suite.page,
        published=tuple(suite.published),
        selectors=tuple(suite.selectors),
        selector_mixture=tuple(suite.selector_mixture),
        minutes=suite.minutes,
        cells=tuple(_with_common_factors(_with_twins(loaded, entries, kept))),
    )


def _entries(loaded: LoadedSuite) -> dict[str, _Entry]:
    """The model entries by name, grids expanded."""
    found: dict[str, _Entry] = {}
    for place, model in enumerate(loaded.suite.models):
        for levels in _combinations(model.grid, model.factors):
            try:
                filled = {
                    key: str(_filled(getattr(model, key) or "", levels, textual=True)) for key in ("name", "twin")
                }
                training = None if model.training is None else _filled(model.training, levels)
            except SuiteError as error:
                raise loaded.problem(["models", place], str(error)) from error
            if filled["name"] in found:
                raise loaded.problem(
                    ["models", place, "name"],
                    f"two entries are called {filled['name']!r}; put every factor of a grid into its name",
                )
            one = model.model_copy(update={**filled, "twin": filled["twin"] or None, "training": training})
            found[one.name] = _Entry(place, one, levels)
    return found


def _combinations(
    grid: Mapping[str, Sequence[Level]] | None, factors: Mapping[str, Level]
) -> Iterator[dict[str, Level]]:
    axes = grid or {}
    for values in itertools.product(*axes.values()):
        yield {**dict(zip(axes, values, strict=True)), **factors}


def _cells_of(loaded: LoadedSuite, entry: _Entry, limit: int | None) -> Iterator[_Draft]:
    suite, place, model = loaded.suite, entry.place, entry.model
    own_tasks = model.tasks is not None
    at: list[str | int] = ["models", place, "tasks"] if own_tasks else ["tasks"]
    tasks = listed_tasks(
        suite.tasks if model.tasks is None else model.tasks,
        suite.limit,
        loaded.world,
        limit,
        lambda inside, message: loaded.problem([*at, *inside], message),
    )
    for variant in _variants(loaded, place, model):
        for calibration in _calibrations(loaded, variant):
            for seed in _seeds(loaded, model, calibration):
                yield _draft(loaded, entry, tasks, variant, calibration, seed)


def _variants(loaded: LoadedSuite, place: int, model: Model) -> list[_Variant]:
    """The model's quantizations, the control first."""
    if model.quantizations is not None:
        entries = list(enumerate(model.quantizations))
        at: list[str | int] = ["models", place, "quantizations"]
    elif model.training is not None:
        entries, at = [], []
    else:
        entries, at = list(enumerate(loaded.suite.quantizations)), ["quantizations"]
    control = FULL_PRECISION if model.training is None else AS_TRAINED
    found = [_Variant(control, None, {})]
    for i, entry in entries:
        if entry.name != control or entry.grid or entry.spec or entry.factors:
            found += _expanded(loaded, [*at, i], entry)
    return found


def _expanded(loaded: LoadedSuite, at: Sequence[str | int], entry: Quantization) -> Iterator[_Variant]:
    """An entry of the list of quantizations: one, or a grid of them."""
    for levels in _combinations(entry.grid, entry.factors):
        name = entry.name
        try:
            if levels:
                name = str(_filled(entry.name, levels, textual=True))
            asked = entry.spec if entry.spec is not None else name
            told = _filled(asked, levels) if levels else asked
            keys = _without_full_bits(told) if isinstance(told, dict) else told
            spec = None if keys is None else load_spec({**keys, "name": name} if isinstance(keys, dict) else keys)
        except (QuantSpecError, SuiteError) as error:
            raise loaded.problem(at, f"{name}: {error}") from error
        if spec is not None and entry.spec is None:
            name = spec.name  # of a YAML file, what it says
        yield _Variant(name, None if spec is None or spec.is_full_precision else spec, levels)


def _filled(value: Any, levels: Mapping[str, Level], *, textual: bool = False) -> Any:
    """A value with ``{factor}`` replaced in its texts; a text that is nothing else becomes the level itself."""
    if isinstance(value, dict):
        return {key: _filled(inside, levels) for key, inside in value.items()}
    if isinstance(value, list):
        return [_filled(inside, levels) for inside in value]
    if not isinstance(value, str):
        return value
    if unknown := [name for name in _FACTOR.findall(value) if name not in levels]:
        raise SuiteError(f"{value!r}: {{{unknown[0]}}} is no factor of the grid; it has {', '.join(levels)}")
    whole = _FACTOR.fullmatch(value)
    if whole and not textual:
        return levels[whole[1]]
    return _FACTOR.sub(lambda match: str(levels[match[1]]), value)


def _without_full_bits(keys: dict[str, Any]) -> dict[str, Any] | None:
    """A spec without what 16 bits leave as it is; None where nothing is left to quantize."""
    if "plan" not in keys:
        return None if keys.get("bits") == _FULL_BITS else keys
    if not isinstance(keys["plan"], list):
        return keys  # refused by the spec
    rules = [rule for rule in keys["plan"] if not (isinstance(rule, dict) and rule.get("bits") == _FULL_BITS)]
    return {**keys, "plan": rules} if rules or not keys["plan"] else None


class _Calibrated(NamedTuple):
    """A spec with its calibration decided; label: as the cell's name shows it, "" for the spec's own."""

    spec: QuantSpec | None
    label: str


def _calibrations(loaded: LoadedSuite, variant: _Variant) -> Iterator[_Calibrated]:
    if variant.spec is None or variant.spec.calibration is None:
        yield _Calibrated(variant.spec, "")
        return
    for i, source in enumerate(loaded.suite.calibration):
        if source.name == OWN:
            yield _Calibrated(variant.spec, "")
            continue
        try:
            spec = load_spec(_calibrated(variant.spec, source))
        except QuantSpecError as error:
            raise loaded.problem(["calibration", i], str(error)) from error
        if source.data is not None and not calibrates(source.data):
            raise loaded.problem(
                ["calibration", i, "data"], f"{source.data!r} is no folder and no family with a calibration split"
            )
        yield _Calibrated(spec, source.name)


def _calibrated(spec: QuantSpec, source: Calibration) -> dict[str, Any]:
    keys = spec.model_dump(mode="json", exclude_none=True)
    told = source.model_dump(exclude_none=True, exclude={"name"})
    before = {key: value for key, value in keys["calibration"].items() if key != "data"}
    return {**keys, "calibration": {**before, **told}}


def _seeds(loaded: LoadedSuite, model: Model, calibrated: _Calibrated) -> list[int | None]:
    """The seeds of a cell; None: whatever the spec and the training say."""
    matters = model.training is not None or (calibrated.spec is not None and calibrated.spec.calibration is not None)
    return list(loaded.suite.seeds) if matters and loaded.suite.seeds is not None else [None]


def _draft(
    loaded: LoadedSuite,
    entry: _Entry,
    tasks: Mapping[str, ListedTask],
    variant: _Variant,
    calibrated: _Calibrated,
    seed: int | None,
) -> _Draft:
    spec, place, model = calibrated.spec, entry.place, entry.model
    training = _training(loaded, place, model, seed)
    if training is not None and spec is not None and not _makes_full_precision(training):
        raise loaded.problem(
            ["models", place, "quantizations"],
            f"{variant.name} cannot be put on a model that is quantized by its training; leave {AS_TRAINED} alone",
        )
    if spec is not None and spec.calibration is not None and seed is not None:
        spec = spec.model_copy(update={"calibration": spec.calibration.model_copy(update={"seed": seed})})
    used = training.seed if training is not None else spec.calibration.seed if spec and spec.calibration else 0
    label = "/".join(
        [variant.name, *([calibrated.label] if calibrated.label else []), *([f"seed{used}"] if used else [])]
    )
    keys = {} if spec is None else spec.model_copy(update={"name": label}).options()
    arguments = {**loaded.suite.arguments, **model.arguments}
    trained = ""
    try:
        if training is not None:
            trained = training_identity(training)
        named, sameness = cell_hashes(
            pretrained=model.pretrained,
            revision=model.revision,
            spec=keys,
            training_hash=trained,
            arguments=arguments,
            tasks={name: task.limit for name, task in tasks.items()},
            versions={name: task.version for name, task in tasks.items()},
        )
    except ValueError as error:  # a reference model that does not ship
        raise loaded.problem(["models", place, "pretrained"], str(error)) from error
    cell = PlannedCell(
        name=f"{model.name}/{label}",
        hash=named,
        model=model.name,
        pretrained=model.pretrained,
        revision=model.revision,
        parameters=model.parameters,
        quantization=variant.name,
        spec=keys,
        calibration=(calibrated.label or spec.calibration.source) if spec and spec.calibration else "",
        seed=used,
        factors={**entry.levels, **variant.levels},
        training=None if training is None else training.model_dump(mode="json"),
        training_hash=trained,
        arguments=arguments,
        tasks={name: task.limit for name, task in tasks.items()},
        n={name: task.n for name, task in tasks.items() if task.n is not None}
        | {name: task.limit for name, task in tasks.items() if task.n is None and task.limit is not None},
    )
    return _Draft(cell, sameness)


def _training(loaded: LoadedSuite, place: int, model: Model, seed: int | None) -> QatConfig | LoraConfig | None:
    if model.training is None:
        return None
    at: list[str | int] = ["models", place, "training"]
    begin = {"pretrained": model.pretrained} | ({"revision": model.revision} if model.revision else {})
    for key, value in model.training.items():
        if key in ("pretrained", "revision") and value != begin.get(key):
            raise loaded.problem(
                [*at, key], f"{value!r} is not the entry's own {key} ({begin.get(key)!r}); leave it out"
            )
    for where, told in ((at, model.training), (["training"], loaded.suite.training)):
        if seed is not None and "seed" in told:
            raise loaded.problem([*where, "seed"], "the suite's `seeds` say it; leave it out here")
    try:
        return load_training(
            {**loaded.suite.training, **model.training, **begin, **({} if seed is None else {"seed": seed})}
        )
    except (TrainingConfigError, QuantSpecError) as error:
        raise loaded.problem(at, str(error)) from error


def _makes_full_precision(training: QatConfig | LoraConfig) -> bool:
    return training.is_full_precision if isinstance(training, QatConfig) else training.spec.is_full_precision


def _check_names(loaded: LoadedSuite, drafts: Sequence[_Draft]) -> None:
    seen: set[str] = set()
    for draft in drafts:
        if draft.cell.name in seen:
            raise loaded.problem(
                ["quantizations"],
                f"two cells are called {draft.cell.name!r}; put every factor of a grid into its name, name each "
                "quantization once",
            )
        seen.add(draft.cell.name)


def _check_sameness(loaded: LoadedSuite, drafts: Sequence[_Draft]) -> None:
    """Refuse cells that do the same under two names; only full precision may come back, as the corner of grids."""
    seen: dict[str, PlannedCell] = {}
    for draft in drafts:
        cell, first = draft.cell, seen.setdefault(draft.sameness, draft.cell)
        if first is cell or (not cell.spec and not cell.training and first.model == cell.model):
            continue
        raise loaded.problem(
            ["models"] if first.model != cell.model else ["quantizations"],
            f"{first.name!r} and {cell.name!r} are the same cell: checkpoint, quantization, calibration, arguments and "
            "tasks agree; remove or exclude one",
        )


def _without_excluded(loaded: LoadedSuite, cells: Sequence[PlannedCell]) -> list[PlannedCell]:
    out: set[str] = set()
    for i, rule in enumerate(loaded.suite.exclude):
        wanted = rule.model_dump(exclude_none=True)
        matched = [cell.name for cell in cells if _matches(cell, wanted)]
        if not matched:
            told = ", ".join(f"{key}: {value}" for key, value in wanted.items())
            raise loaded.problem(["exclude", i], f"matches no cell ({told}); correct or remove it")
        out.update(matched)
    kept = [cell for cell in cells if cell.name not in out]
    if not kept:
        raise loaded.problem(["exclude"], "leaves no cell; exclude less")
    return kept


def _matches(cell: PlannedCell, wanted: Mapping[str, Any]) -> bool:
    return all(
        cell.seed == pattern if key == "seed" else fnmatch.fnmatchcase(getattr(cell, key), pattern)
        for key, pattern in wanted.items()
    )


def _with_twins(
    loaded: LoadedSuite, entries: Mapping[str, _Entry], cells: Sequence[PlannedCell]
) -> Iterator[PlannedCell]:
    controls: dict[tuple[str, str], list[PlannedCell]] = {}
    for cell in cells:
        if not cell.spec:
            controls.setdefault((cell.model, cell.quantization), []).append(cell)
    for cell in cells:
        place, model, _ = entries[cell.model]
        if model.twin is not None and model.twin not in entries:
            known = ", ".join(name for name in entries if name != model.name)
            raise loaded.problem(
                ["models", place, "twin"], f"there is no model entry {model.twin!r}; entries are {known or 'no others'}"
            )
        owner = entries[model.twin].model if model.twin else model
        control = AS_TRAINED if owner.training is not None else FULL_PRECISION
        if owner is model and not cell.spec:
            yield cell  # it is the control, or full precision as the corner of a grid
            continue
        found = controls.get((owner.name, control), [])
        same_seed = [one for one in found if one.seed == cell.seed] or found[:1]
        if not same_seed:
            raise loaded.problem(
                ["exclude"],
                f"{cell.name!r} loses its control {owner.name}/{control}; keep that, or exclude this cell too",
            )
        yield cell.model_copy(update={"twin": same_seed[0].name})


def _with_common_factors(cells: Iterator[PlannedCell]) -> list[PlannedCell]:
    """Cells with the factors that every suite has, where they vary in it."""
    listed = list(cells)
    every: dict[str, list[Level]] = {
        "model": [cell.model for cell in listed],
        "quantization": [cell.quantization for cell in listed],
        "calibration": [cell.calibration or "none" for cell in listed],
        "seed": [cell.seed for cell in listed],
    }
    varying = {name: levels for name, levels in every.items() if len(set(levels)) > 1}
    return [
        cell.model_copy(update={"factors": cell.factors | {name: levels[i] for name, levels in varying.items()}})
        for i, cell in enumerate(listed)
    ]


def _check_selectors(loaded: LoadedSuite, cells: Sequence[PlannedCell]) -> None:
    suite = loaded.suite
    if not suite.selectors:
        return
    for cell in cells:
        if not any(task.endswith(_DEV) for task in cell.tasks):
            raise loaded.problem(
                ["selectors"], f"{cell.model}: Selectors learn from a *_dev task, and there is none among its tasks"
            )
        if cell.arguments.get("features") is not True:
            raise loaded.problem(["selectors"], f"{cell.model}: Selectors need `arguments: {{features: true}}`")
    names = {cell.quantization for cell in cells}
    for i, name in enumerate(suite.selector_mixture):
        if name not in names:
            raise loaded.problem(["selector_mixture", i], f"there is no quantization {name!r} in this suite")
