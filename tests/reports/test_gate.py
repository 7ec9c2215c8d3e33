"""The gate: its verdicts against a bootstrap written out by hand, what it refuses to judge, and what it writes."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from statistics import NormalDist
from typing import Any
from xml.etree import ElementTree

import jsonschema
import numpy as np
import pytest
import yaml
from run_folders import Model, Runs, Task, noisy
from scipy.stats import binomtest

from bitquake import cli
from bitquake.gate_command import gate, load_rules
from bitquake.metrics import Samples, flips, transfer
from bitquake.records import SampleRecord
from bitquake.reports.gate import Check, GateError, GateResult, GateRules, GateSettings, rules_schema, to_junit
from bitquake.reports.gate.judging import _first_verdict, _withdraw_failures, images_needed
from bitquake.reports.gate.measures import Asked, GateRuns, Measured
from bitquake.reports.runs import Inputs

ROOT = Path(__file__).parents[2]
FULL, INT4 = Model(), Model("rtn-int4-g64", 4, 0.3)
CLEAN = Task(n=900)
THRESHOLD = Task(variant="threshold", n=900)
FOG = noisy("fog", 3, n=300)
EASY = Task(family="block_vizwiz", difficulty=-1.0, n=450)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Runs:
    """Full precision and a lossy INT4 on clean, threshold and fog."""
    runs = Runs(tmp_path_factory.mktemp("gate"))
    runs.write(FULL, [CLEAN, THRESHOLD, FOG, EASY])
    runs.write(INT4, [CLEAN, THRESHOLD, FOG, EASY])
    return runs


def written(tmp_path: Path, *rules: dict[str, Any], **top: Any) -> Path:
    file = tmp_path / "gate.yaml"
    file.write_text(yaml.safe_dump({"rules": list(rules), **top}))
    return file


def judged(runs: Runs, tmp_path: Path, *rules: dict[str, Any], **options: Any) -> GateResult:
    top = {key: options.pop(key) for key in ("multiple_testing",) if key in options}
    candidate = options.pop("candidate", [runs.root / INT4.quant])
    baseline = options.pop("baseline", [runs.root / FULL.quant])
    return gate(
        candidate,
        baseline,
        written(tmp_path, *rules, **top),
        artifacts=runs.artifacts,
        **{"replicates": 1000, **options},
    )


def answers(runs: Runs, model: Model, task: Task) -> list[SampleRecord]:
    [file] = (runs.root / model.quant).rglob(f"*_samples_{task.name}.jsonl")
    return [SampleRecord.model_validate(json.loads(line)["bitquake"]) for line in file.open()]


def samples(runs: Runs, model: Model, task: Task) -> Samples:
    found = answers(runs, model, task)
    return Samples([r.score for r in found], [r.confidence["joint"] or 0.0 for r in found], [r.image_id for r in found])


def accuracy(score: np.ndarray, _: np.ndarray) -> float:
    return float(score.mean())


def coverage_at_5(score: np.ndarray, confidence: np.ndarray) -> float:
    best = 0.0
    for threshold in np.unique(confidence):
        answered = confidence >= threshold
        if (1 - score[answered]).mean() <= 0.05 + 1e-12:
            best = max(best, float(answered.mean()))
    return best


@pytest.mark.parametrize(
    ("metric", "compute", "replicates"), [("accuracy", accuracy, 1500), ("coverage_at_risk_5", coverage_at_5, 200)]
)
def test_bounds_and_verdicts_are_those_of_a_bootstrap_written_out(
    folders: Runs, tmp_path: Path, metric: str, compute: Callable[..., float], replicates: int
) -> None:
    task = CLEAN if metric == "accuracy" else EASY
    candidate, baseline = (answers(folders, model, task) for model in (INT4, FULL))
    images = sorted({record.image_id for record in candidate})
    rows = [[i for i, record in enumerate(candidate) if record.image_id == image] for image in images]
    arrays = [
        (np.array([r.score for r in run]), np.array([r.confidence["joint"] for r in run]))
        for run in (candidate, baseline)
    ]
    rng = np.random.default_rng(7)
    losses = []
    for _ in range(replicates):
        drawn = [row for image in rng.integers(len(images), size=len(images)) for row in rows[image]]
        of_candidate, of_baseline = (compute(score[drawn], confidence[drawn]) for score, confidence in arrays)
        losses.append(of_baseline - of_candidate)
    loss = compute(*arrays[1]) - compute(*arrays[0])
    low, high = np.quantile(losses, [0.05, 0.95])
    [found] = judged(
        folders, tmp_path, {"metric": metric, "may_fall": 1, "tasks": task.name, "minimum_n": 0}, replicates=4000
    ).checks
    assert found.value == pytest.approx(-loss, abs=1e-12)
    assert found.lo is not None and found.hi is not None
    spread = high - low
    assert -found.hi == pytest.approx(min(low, loss), abs=0.12 * spread)
    assert -found.lo == pytest.approx(max(high, loss), abs=0.12 * spread)
    # Limits well on either side of both bounds, and between them.
    for limit, verdict in ((high + 0.3 * spread, "pass"), (low - 0.3 * spread, "fail"), (loss, "cannot judge")):
        if limit <= 0:
            continue
        rule = {"metric": metric, "may_fall": round(100 * float(limit), 6), "tasks": task.name, "minimum_n": 0}
        [check] = judged(folders, tmp_path, rule).checks
        assert check.verdict == verdict, (limit, check)


@pytest.mark.parametrize(("n_flips", "verdict"), [(1, "cannot judge"), (0, "pass")])
def test_few_flips_are_held_to_the_exact_bound(n_flips: int, verdict: str) -> None:
    """1 flip in 100 excludes 4.66 %, not 3 % as its bootstrap says: a gate at 4 % would pass 9 % of those that have 4.

    With the bootstrap alone both pass.
    """
    right = np.ones(100)
    wrong = np.where(np.arange(100) < n_flips, 0.0, 1.0)
    rule = GateRules.model_validate({"rules": [{"flips": {"rate_at_most": 4}}]}).rules[0]
    asked = Asked(0, rule, CLEAN.name)
    images = [str(i) for i in range(100)]
    runs = GateRuns(Inputs([], [], []), None, False, 2000, 0)
    runs.flips([asked], Samples(wrong, None, images), Samples(right, None, images))
    check = _first_verdict(asked)
    assert check.verdict == verdict
    assert check.hi == pytest.approx(binomtest(n_flips, 100).proportion_ci(0.9).high, abs=1e-9)


def test_an_accuracy_that_only_falls_is_held_to_the_exact_bound() -> None:
    """3 losses in 600 and no gain: 1.29 % cannot be excluded, and a bootstrap excludes all above 1 %."""
    right, fallen = np.ones(600), np.where(np.arange(600) < 3, 0.0, 1.0)
    rule = GateRules.model_validate({"rules": [{"metric": "accuracy", "may_fall": 1}]}).rules[0]
    asked, images = Asked(0, rule, CLEAN.name), [str(i) for i in range(600)]
    runs = GateRuns(Inputs([], [], []), None, False, 2000, 0)
    pair = Samples(fallen, None, images), Samples(right, None, images)
    runs.metrics([asked], pair, [None, None], "")
    check = _first_verdict(asked)
    assert check.verdict == "cannot judge"
    assert check.lo == pytest.approx(-binomtest(3, 600).proportion_ci(0.9).high, abs=1e-9)
    many = np.where(np.arange(600) % 2, 0.0, 1.0)
    runs.metrics([asked], [Samples(many, None, images), Samples(1 - many, None, images)], [None, None], "")
    assert asked.measured is not None
    lo, hi, _ = asked.measured.bounds(0.05)
    assert -lo == pytest.approx(hi, rel=0.1) and hi == pytest.approx(1.645 / 600**0.5, rel=0.05), "bootstrap, wider"


def test_the_candidate_bears_the_burden_of_proof(folders: Runs, tmp_path: Path) -> None:
    """The same samples, limits and bounds; only the policy for the undecided differs."""
    [check] = judged(folders, tmp_path, {"metric": "accuracy", "may_fall": 1, "tasks": CLEAN.name}).checks
    assert check.value is not None
    rule = {"metric": "accuracy", "may_fall": round(-100 * check.value, 4), "tasks": CLEAN.name}
    for policy, code in (("cannot_judge", 2), ("pass", 0), ("fail", 1)):
        result = judged(folders, tmp_path, {**rule, "undecided": policy})
        assert result.exit_code == code and result.checks[0].undecided
        assert "the interval holds the limit" in result.checks[0].why


def test_rules_on_the_candidate_alone_need_no_baseline(folders: Runs, tmp_path: Path) -> None:
    rules = (
        {"metric": "accuracy", "at_least": 40, "tasks": CLEAN.name},
        {"metric": "accuracy", "at_least": "99 %", "tasks": CLEAN.name},
        {"metric": "brier", "at_most": 0.9, "tasks": CLEAN.name},
        {"metric": "phi_1", "at_least": -50, "tasks": CLEAN.name},
    )
    result = judged(folders, tmp_path, *rules, baseline=[])
    assert [check.verdict for check in result.checks] == ["pass", "fail", "pass", "pass"]
    assert result.checks[0].value == pytest.approx(np.mean(samples(folders, INT4, CLEAN).score))
    with pytest.raises(GateError, match="compares with a baseline; give --baseline"):
        judged(folders, tmp_path, {"metric": "accuracy", "may_fall": 2}, baseline=[])


def test_flips_and_transfer_are_those_of_the_metrics_room(folders: Runs, tmp_path: Path) -> None:
    result = judged(
        folders,
        tmp_path,
        {"flips": {"rate_at_most": 99}, "tasks": CLEAN.name},
        {"transfer": {"risk": 40, "realised_at_most": 90}, "tasks": FOG.name},
        {"transfer": {"risk": 40, "coverage_at_least": 1}, "tasks": FOG.name},
    )
    candidate, baseline = samples(folders, INT4, CLEAN), samples(folders, FULL, CLEAN)
    flipped = flips(candidate, baseline, replicates=1000, seed=0, level=0.9)
    exact = binomtest(flipped.right_to_wrong + flipped.wrong_to_right, flipped.n).proportion_ci(0.9)
    bounds = min(flipped.lo, exact.low), max(flipped.hi, exact.high)
    found = result.checks[0].value, result.checks[0].lo, result.checks[0].hi
    assert found == pytest.approx((flipped.rate, *bounds), abs=1e-9)
    taken = transfer(
        samples(folders, FULL, THRESHOLD), samples(folders, INT4, FOG), 0.4, replicates=1000, seed=0, level=0.9
    )
    assert (result.checks[1].value, result.checks[1].lo, result.checks[1].hi) == (
        taken.risk_taken,
        taken.risk_lo,
        taken.risk_hi,
    )
    assert (result.checks[2].value, result.checks[2].lo) == (taken.coverage, taken.coverage_lo)
    assert result.exit_code == 0
    nothing = judged(folders, tmp_path, {"transfer": {"risk": 0.1, "realised_at_most": 90}, "tasks": FOG.name})
    assert nothing.exit_code == 2
    assert nothing.checks[0].why == "nothing is answered: the threshold withholds every answer"


def test_images_needed_is_the_least_number_that_would_show_the_damage() -> None:
    for alpha in (0.05, 0.01):
        for share in (0.5, 0.1, 0.02, 0.005):
            n = 1
            while (1 - share) ** n > alpha:
                n += 1
            assert images_needed(share, alpha) == n
    assert images_needed(0.02, 0.05) == 149  # the rule of three: about 3 / 0.02
    assert images_needed(1.0, 0.05) == images_needed(3.0, 0.05) == 1


def all_right(_: str, records: list[SampleRecord]) -> list[SampleRecord]:
    return [record.model_copy(update={"score": 1.0}) for record in records]


@pytest.mark.parametrize(("images", "code"), [(148, 2), (149, 0)])
def test_runs_without_a_single_error_pass_only_with_enough_images(
    runs: Runs, tmp_path: Path, images: int, code: int
) -> None:
    """Every replicate of such runs shows a loss of exactly 0: a bootstrap by itself would pass with five samples.

    The number of images and the exact bound agree on where that ends.
    """
    task = Task(n=images, per_image=1)
    for model in (FULL, INT4):
        runs.write(model, [task], edit=all_right)
    result = judged(runs, tmp_path, {"metric": "accuracy", "may_fall": "2 points"})
    unseen = 1 - 0.05 ** (1 / images)
    assert (result.checks[0].lo, result.checks[0].hi) == pytest.approx((-unseen, unseen), abs=1e-9)
    assert result.exit_code == code, result.checks
    assert ("148 images cannot exclude" in result.checks[0].why) == (code == 2)


def test_a_candidate_that_is_the_baseline_passes(folders: Runs, tmp_path: Path) -> None:
    full = [folders.root / FULL.quant]
    rules = ({"metric": "accuracy", "may_fall": 1}, {"metric": "ece_15", "may_rise": 2}, {"flips": {"rate_at_most": 1}})
    result = judged(folders, tmp_path, *({**r, "tasks": CLEAN.name} for r in rules), candidate=full)
    assert result.exit_code == 0
    accuracy, error, flipped = result.checks
    assert error.value == error.lo == error.hi == accuracy.value == flipped.value == flipped.lo == 0
    unseen = 1 - 0.05 ** (1 / CLEAN.n)  # none seen is not none there
    assert [accuracy.lo, accuracy.hi, flipped.hi] == pytest.approx([-unseen, unseen, unseen], abs=1e-9)


def test_a_quantization_can_be_held_against_the_one_in_the_field(runs: Runs, tmp_path: Path) -> None:
    int8 = Model("rtn-int8-g64", 8, 0.02)
    for model in (int8, INT4):
        runs.write(model, [CLEAN])
    result = judged(runs, tmp_path, {"metric": "accuracy", "may_fall": 50}, baseline=[runs.root / int8.quant])
    assert result.exit_code == 0
    assert result.baseline.endswith(int8.quant)


def test_patterns_match_what_is_there_and_names_must_be_there(folders: Runs, tmp_path: Path) -> None:
    result = judged(
        folders,
        tmp_path,
        {"metric": "accuracy", "may_fall": 90, "tasks": ["block_vqav2_*"]},
        {"metric": "accuracy", "may_fall": 90, "tasks": ["block_vqav2_clean", "block_vqav2_frost_3"]},
        {"metric": "accuracy", "may_fall": 90, "tasks": ["nothing_*"]},
        {"metric": "accuracy", "may_fall": 90, "tasks": ["tag:block_vqav2_noise_3"]},
    )
    found = {(check.rule, check.task): check for check in result.checks}
    assert [task for rule, task in found if rule == 0] == ["block_vqav2_clean", "block_vqav2_fog_3"]
    assert found[1, "block_vqav2_clean"].verdict == "pass"
    assert found[1, "block_vqav2_frost_3"].why == "the candidate has no result for block_vqav2_frost_3"
    assert found[2, "nothing_*"].why == "no task of the runs has such a name"
    tagged = {task: check.verdict for (rule, task), check in found.items() if rule == 3}
    assert len(tagged) == 15 and tagged.pop("block_vqav2_fog_3") == "pass" and set(tagged.values()) == {"cannot judge"}
    with pytest.raises(GateError, match="there is no tag 'block_vqav2_nois'"):
        judged(folders, tmp_path, {"metric": "accuracy", "may_fall": 90, "tasks": "tag:block_vqav2_nois"})


def cut(folder: Path, task: str, keep: int) -> None:
    [file] = folder.rglob(f"*_samples_{task}.jsonl")
    file.write_text("".join(file.read_text().splitlines(keepends=True)[:keep]))


def test_samples_that_are_missing_cannot_be_judged(runs: Runs, tmp_path: Path) -> None:
    for model in (FULL, INT4):
        runs.write(model, [CLEAN, FOG])
    cut(runs.root / INT4.quant, CLEAN.name, 880)
    rules = [{"metric": "accuracy", "may_fall": 90}, {"metric": "accuracy", "at_least": 1}]
    result = judged(runs, tmp_path, *rules)
    verdicts = {(check.rule, check.task): check for check in result.checks}
    for rule in (0, 1):
        assert verdicts[rule, FOG.name].verdict == "pass"
        assert verdicts[rule, CLEAN.name].verdict == "cannot judge"
        assert "the candidate's block_vqav2_clean is incomplete: 880 of 900 samples" in verdicts[rule, CLEAN.name].why
    assert result.exit_code == 2
    shared = judged(runs, tmp_path, *rules, common_samples=True)
    assert shared.exit_code == 0
    assert [check.n for check in shared.checks if check.task == CLEAN.name] == [880, 880]


def test_a_file_that_is_gone_keeps_a_pattern_from_passing(runs: Runs, tmp_path: Path) -> None:
    """Both runs lost the same task's file: no cell is left that could be judged, or missed."""
    for model in (FULL, INT4):
        runs.write(model, [CLEAN, FOG])
        [file] = (runs.root / model.quant).rglob(f"*_samples_{FOG.name}.jsonl")
        file.unlink()
    result = judged(runs, tmp_path, {"metric": "accuracy", "may_fall": 90})
    assert [check.verdict for check in result.checks] == ["pass"]
    assert result.exit_code == 2
    assert any("no sample file for task 'block_vqav2_fog_3'" in problem for problem in result.problems)


def no_confidence(_: str, records: list[SampleRecord]) -> list[SampleRecord]:
    return [record.model_copy(update={"confidence": {}}) for record in records]


def seen_threshold_images(name: str, records: list[SampleRecord]) -> list[SampleRecord]:
    if not name.endswith("threshold"):
        return records
    return [record.model_copy(update={"image_id": f"block_vqav2-test-img{i}"}) for i, record in enumerate(records)]


CLEAN_RULE = {"metric": "accuracy", "may_fall": 99}
CAUSES: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any], str]] = [
    ("another batch size", CLEAN_RULE, {}, {"config": {"batch_size": "1", "model_args": "batch_size=1"}}, "batch size"),
    ("other pixels", CLEAN_RULE, {}, {"edit": lambda _, rs: [r.model_copy(update={"pixel_hash": ["0"]}) for r in rs]},
     "other pixels"),
    ("another model", CLEAN_RULE, {"pretrained": "bitquake/other"}, {}, "the candidate is made from bitquake/other"),
    ("another library", CLEAN_RULE, {"changes": {"libraries": {"torch": "1.0"}}}, {}, "torch 1.0 vs 2.15.0"),
    ("no confidences", {"metric": "aurc", "may_rise": 50}, {}, {"edit": no_confidence}, "no confidence"),
    ("no such confidence", {"metric": "aurc", "may_rise": 50, "confidence_name": "selector"}, {}, {},
     "no answer has the confidence selector"),
    ("no threshold split", {"metric": "phi_10", "may_fall": 50}, {}, {},
     "threshold split: the candidate has no result for block_vqav2_threshold"),
    ("no threshold split for transfer", {"transfer": {"risk": 5, "realised_at_most": 99}}, {}, {},
     "threshold split: the baseline has no result for block_vqav2_threshold"),
    ("threshold images are evaluated", {"metric": "phi_1", "may_fall": 99}, {}, {"edit": seen_threshold_images},
     "shares"),
    ("too few samples", {"metric": "coverage_at_risk_1", "may_fall": 99}, {}, {},
     "300 samples; C@1% needs 10,000 (minimum_n)"),
]  # fmt: skip


@pytest.mark.parametrize(("rule", "change", "options", "said"), [c[1:] for c in CAUSES], ids=[c[0] for c in CAUSES])
def test_what_cannot_be_judged_ends_with_code_2_and_the_reason(
    runs: Runs,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    rule: dict[str, Any],
    change: dict[str, Any],
    options: dict[str, Any],
    said: str,
) -> None:
    tasks = [Task(n=300), *([Task(variant="threshold", n=300)] if "seen" in repr(options) else [])]
    runs.write(FULL, tasks, edit=options.get("edit") if "seen" in repr(options) else None)
    runs.write(Model("rtn-int4-g64", 4, 0.3, **change), tasks, name="candidate", **options)
    file = written(tmp_path, {**rule, "tasks": "block_vqav2_clean"})
    junit, data = tmp_path / "gate.xml", tmp_path / "gate.json"
    code = cli.main(
        [
            *("gate", "--candidate", str(runs.root / "candidate"), "--baseline", str(runs.root / FULL.quant)),
            *("--rules", str(file), "--artifacts", str(runs.artifacts), "--replicates", "300"),
            *("--junit", str(junit), "--json", str(data)),
        ]
    )
    shown = capsys.readouterr().out
    assert code == 2, shown
    assert "CANNOT JUDGE: of 1 check 1 cannot be judged" in shown
    [check] = json.loads(data.read_text())["checks"]
    assert said in check["why"]
    [error] = ElementTree.parse(junit).getroot().iter("error")
    assert error.get("message") == check["why"]


def test_exit_codes_of_pass_and_fail(folders: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = ["--candidate", str(folders.root / INT4.quant), "--baseline", str(folders.root / FULL.quant)]
    common = [*runs, "--artifacts", str(folders.artifacts), "--replicates", "500"]
    easy = {"metric": "accuracy", "may_fall": "40 points", "tasks": CLEAN.name}
    assert cli.main(["gate", *common, "--rules", str(written(tmp_path, easy))]) == 0
    assert capsys.readouterr().out.rstrip().endswith("PASS: of 1 check 1 passed")
    hard = {"metric": "accuracy", "at_least": 99, "tasks": CLEAN.name}
    # A failure is certain whatever else cannot be judged.
    unknown = {"metric": "accuracy", "may_fall": 1, "tasks": "nothing"}
    assert cli.main(["gate", *common, "--rules", str(written(tmp_path, easy, hard, unknown))]) == 1
    shown = capsys.readouterr().out
    assert shown.rstrip().endswith("FAIL: of 3 checks 1 passed, 1 failed, 1 cannot be judged")
    assert "1. Accuracy may not fall by more than 40 points, with 95 % confidence" in shown


def test_folders_that_cannot_be_used(folders: Runs, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = judged(folders, tmp_path, {"metric": "accuracy", "may_fall": 1}, candidate=[folders.root])
    assert both.exit_code == 2
    assert "the candidate must be one model, the folders hold 2" in both.checks[0].why
    (tmp_path / "empty").mkdir()
    file = written(tmp_path, {"metric": "accuracy", "may_fall": 1}, {"flips": {"rate_at_most": 5}})
    junit = tmp_path / "gate.xml"
    for folder, said in ((tmp_path / "empty", "no complete result"), (tmp_path / "absent", "does not exist")):
        code = cli.main(
            [
                *("gate", "--candidate", str(folder), "--baseline", str(folders.root / FULL.quant)),
                *("--rules", str(file), "--junit", str(junit)),
            ]
        )
        assert code == 2
        assert said in capsys.readouterr().out
        assert len(list(ElementTree.parse(junit).getroot().iter("error"))) == 3


BAD_RULES = [
    ("rules: []", ":1: rules: List should have at least 1 item"),
    ("- 1", "expected a mapping with `rules:`"),
    ("rules:\n  - {metric: accuracy, may_fal: 1}", ":2: rules[1].may_fal: unknown key; remove it"),
    ("rules:\n  - {metric: acuracy, may_fall: 1}", "unknown metric 'acuracy'; known: accuracy,"),
    ("rules:\n  - {metric: accuracy}", ":2: rules[1]: give one of `may_fall`, `may_rise`"),
    ("rules:\n  - {metric: accuracy, may_fall: 1, at_least: 3}", "give one of `may_fall`"),
    ("rules:\n  - {metric: accuracy, may_rise: 1}", "higher is better of accuracy; did you mean `may_fall`?"),
    ("rules:\n  - {metric: ece_15, may_fall: 1}", "lower is better of ece_15; did you mean `may_rise`?"),
    ("rules:\n  - {metric: aurc, at_least: 1}", "did you mean `at_most`?"),
    ("rules:\n  - metric: accuracy\n    may_fall: two", ":3: rules[1].may_fall: expected a number, such as 2"),
    ("rules:\n  - metric: accuracy\n    may_fall: 0", ":3: rules[1].may_fall: Input should be greater than 0 (got 0)"),
    ("rules:\n  - {metric: accuracy, may_fall: .nan}", "finite number"),
    ("rules:\n  - {metric: accuracy, may_fall: true}", "expected a number"),
    ("rules:\n  - {metric: accuracy, at_least: 101}", "accuracy lies between 0 and 100"),
    ("rules:\n  - {metric: accuracy, may_fall: 1, confidence: 95}", "a share between 0.5 and 1 is expected"),
    ("rules:\n  - {metric: accuracy, may_fall: 1, tasks: []}", "rules[1].tasks: Value should have at least 1 item"),
    ("rules:\n  - {metric: accuracy, may_fall: 1, undecided: maybe}", "rules[1].undecided: Input should be"),
    ("rules:\n  - {transfer: {risk: 5}}", "give one of `realised_at_most` and `coverage_at_least`"),
    ("rules:\n  - {transfer: {risk: 0, realised_at_most: 1}}", "rules[1].transfer.risk"),
    ("rules:\n  - {flips: {rate_at_most: 3, rat: 1}}", "known here are rate_at_most"),
    ("rules:\n  - {flips: {rate_at_most: 3}, metric: accuracy, may_fall: 1}", "give one of `metric`, `transfer`"),
    ("rules:\n  - {flips: {rate_at_most: 3}, confidence_name: selector}", "flips have nothing to do with confidences"),
    ("rules:\n  - {metric: !!python/name:os.system x}", ":2: not plain YAML: tags"),
    ("rules: &a [*a]", "not plain YAML: aliases"),
    ("rules:\n  - {metric: accuracy, may_fall: 1, may_fall: 2}", "key 'may_fall' given twice"),
    ("version: 2\nrules:\n  - {metric: accuracy, may_fall: 1}", ":1: version: Input should be 1 (got 2)"),
    ("\x00", "not plain YAML"),
]


@pytest.mark.parametrize(("text", "said"), BAD_RULES)
def test_bad_rules_say_where_what_and_how_to_fix_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], text: str, said: str
) -> None:
    file = tmp_path / "gate.yaml"
    file.write_text(text)
    assert cli.main(["gate", "--candidate", "x", "--rules", str(file)]) == 2
    message = capsys.readouterr().err
    assert f"{file}" in message and said in message and "Traceback" not in message


def test_rules_files_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(GateError, match="cannot be read"):
        load_rules(tmp_path / "absent.yaml")
    (tmp_path / "latin.yaml").write_bytes("rules: # für\n".encode("latin-1"))
    with pytest.raises(GateError, match="no UTF-8 text"):
        load_rules(tmp_path / "latin.yaml")


def test_replicates_must_be_enough_for_the_confidence(folders: Runs, tmp_path: Path) -> None:
    rule = {"metric": "accuracy", "may_fall": 1, "confidence": 0.999}
    with pytest.raises(GateError, match=r"confidence 0.999 needs 10,000 replicates, got 2,000"):
        judged(folders, tmp_path, rule, replicates=2000)
    with pytest.raises(GateError, match="--replicates: expected 1 or more, got 0"):
        judged(folders, tmp_path, rule, replicates=0)


def test_the_published_schema_and_the_example_are_valid() -> None:
    text = (ROOT / "reports" / "gate" / "gate.schema.json").read_text()
    assert text == rules_schema(), "write reports/gate/gate.schema.json again from rules_schema()"
    schema = json.loads(text)
    jsonschema.Draft202012Validator.check_schema(schema)
    example = ROOT / "examples" / "gate.yaml"
    jsonschema.validate(yaml.safe_load(example.read_text()), schema)
    assert len(load_rules(example).rules) == 7
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({"rules": [{"metric": "acuracy", "may_fall": 1}]}, schema)


def test_holm_is_that_of_the_textbook() -> None:
    """Normal bounds, so that p-values are known; failing loses its evidence one check after the other."""
    rng = np.random.default_rng(3)
    normal = NormalDist()
    rules = GateRules.model_validate({"rules": [{"metric": "accuracy", "may_fall": 2, "tasks": "x"}]}).rules
    withdrawn = 0
    for _ in range(200):
        values = rng.normal(-0.02, 0.03, size=8)

        def measured(value: float) -> Measured:
            def bounds(alpha: float) -> tuple[float, float, str]:
                half = normal.inv_cdf(1 - alpha) * 0.01
                return value - half, value + half, ""

            return Measured(value, bounds, 10_000, 10_000)

        asked = [Asked(0, rules[0], f"task {i}", measured=measured(float(v))) for i, v in enumerate(values)]
        checks = [_first_verdict(one) for one in asked]
        p = [normal.cdf((v + 0.02) / 0.01) for v in values]  # the chance of this much loss if it were 2 points
        assert [check.verdict == "fail" for check in checks] == [one < 0.05 for one in p]
        expected = set()
        for rank, i in enumerate(np.argsort(p)):
            if p[i] >= 0.05 / (len(p) - rank):
                break
            expected.add(int(i))
        before = sum(check.verdict == "fail" for check in checks)
        _withdraw_failures(asked, checks)
        assert {i for i, check in enumerate(checks) if check.verdict == "fail"} == expected
        withdrawn += before - len(expected)
        assert sum("Holm's correction for 8 checks" in check.why for check in checks) == before - len(expected)
    assert withdrawn > 50


def test_holm_in_a_file_never_turns_a_failure_into_a_pass(folders: Runs, tmp_path: Path) -> None:
    hard = [{"metric": "accuracy", "at_least": x, "tasks": CLEAN.name} for x in (99, 98, 97)]
    assert judged(folders, tmp_path, *hard, multiple_testing="holm").exit_code == 1
    doubtful = []
    for points in np.arange(60, 99, 1.0):
        doubtful.append({"metric": "accuracy", "at_least": float(points), "tasks": CLEAN.name})
    alone = judged(folders, tmp_path, *doubtful)
    corrected = judged(folders, tmp_path, *doubtful, multiple_testing="holm")
    for one, other in zip(alone.checks, corrected.checks, strict=True):
        assert other.verdict == one.verdict or (one.verdict, other.verdict) == ("fail", "cannot judge")
    assert alone.count("fail") >= corrected.count("fail") > 0


# JUnit as build servers read it: elements, their attributes, and what may stand in them (Jenkins' junit-10.xsd).
ATTRIBUTES = {
    "testsuites": {"name", "time", "tests", "failures", "disabled", "errors"},
    "testsuite": {
        *("name", "tests", "failures", "errors", "time", "disabled", "skipped", "timestamp", "hostname", "id"),
        "package",
    },
    "properties": set(),
    "property": {"name", "value"},
    "testcase": {"name", "assertions", "time", "classname", "status"},
    "failure": {"type", "message"},
    "error": {"type", "message"},
    "system-out": set(),
}
CHILDREN = {
    "testsuites": {"testsuite"},
    "testsuite": {"properties", "testcase", "system-out", "system-err"},
    "properties": {"property"},
    "testcase": {"skipped", "error", "failure", "system-out", "system-err"},
}
REQUIRED = {
    "testsuite": {"name", "tests"},
    "testcase": {"name", "classname"},
    "property": {"name", "value"},
}


def check_junit(text: str) -> ElementTree.Element:
    root = ElementTree.fromstring(text)
    assert root.tag == "testsuites"
    for element in root.iter():
        assert set(element.attrib) <= ATTRIBUTES[element.tag], element.tag
        assert REQUIRED.get(element.tag, set()) <= set(element.attrib), element.tag
        assert {child.tag for child in element} <= CHILDREN.get(element.tag, set()), element.tag
        if CHILDREN.get(element.tag):
            assert not (element.text or "").strip()
    for element in [root, *root.iter("testsuite")]:
        cases = list(element.iter("testcase"))
        assert int(element.get("tests", "")) == len(cases)
        assert int(element.get("failures", "")) == sum(case.find("failure") is not None for case in cases)
        assert int(element.get("errors", "")) == sum(case.find("error") is not None for case in cases)
        float(element.get("time", ""))
    return root


def test_junit_is_what_build_servers_read(folders: Runs, tmp_path: Path) -> None:
    result = judged(
        folders,
        tmp_path,
        {"name": "A & B <fast>", "metric": "accuracy", "may_fall": 60, "tasks": ["*"]},
        {"metric": "accuracy", "at_least": 99, "tasks": [CLEAN.name, "absent"]},
    )
    text = to_junit(result)
    assert text == to_junit(result) and text.startswith('<?xml version="1.0" encoding="UTF-8"?>\n')
    root = check_junit(text)
    suites = root.findall("testsuite")
    assert [suite.get("name") for suite in suites] == result.rules == ["A & B <fast>", result.rules[1]]
    cases = [(case.get("name"), [child.tag for child in case]) for case in suites[1].findall("testcase")]
    assert cases == [(CLEAN.name, ["failure", "system-out"]), ("absent", ["error"])]
    properties = {p.get("name"): p.get("value") for p in suites[0].iter("property")}
    value = float((properties[f"{CLEAN.name}: value"] or "").removesuffix(" points")) / 100
    assert value == pytest.approx(next(c.value for c in result.checks if c.task == CLEAN.name), abs=5e-4)
    assert properties[f"{CLEAN.name}: samples"] == "900"


HOSTILE = [
    "]]></system-out><testcase name='x'/>",
    '"><script>alert(1)</script>',
    "\x1b[31m\x00\x08\ufffe\ud800 end",
    "\u202eright to left",
    "a\nb\tc & d < e",
    "x" * 10_000,
]


@pytest.mark.parametrize("hostile", HOSTILE, ids=range(len(HOSTILE)))
def test_hostile_names_stay_text(hostile: str) -> None:
    check = Check(rule=0, title=hostile, task=hostile, verdict="fail", limit=0.1, too="high", why=hostile, value=0.2)
    result = GateResult(
        candidate=hostile,
        baseline=hostile,
        settings=GateSettings(replicates=1, seed=0, common_samples=False, multiple_testing="none"),
        rules=[hostile],
        checks=[check, check.model_copy(update={"verdict": "cannot judge"})],
        problems=[hostile],
        verdict="fail",
    )
    text = to_junit(result)
    text.encode("utf-8")
    root = check_junit(text)
    assert len(list(root.iter("testcase"))) == 3
    kept = [name for case in root.iter("testcase") if (name := case.get("name")) != "files"]
    no_xml = {*map(chr, range(32)), "\ufffe", "\ud800"} - {"\t", "\n"}
    assert kept == ["".join("\ufffd" if sign in no_xml else sign for sign in hostile)] * 2


def test_the_json_holds_all_numbers(folders: Runs, tmp_path: Path) -> None:
    data = tmp_path / "gate.json"
    result = judged(folders, tmp_path, {"metric": "nll", "may_rise": 9, "tasks": CLEAN.name}, json_file=data)
    assert GateResult.model_validate_json(data.read_text()) == result
    [check] = result.checks
    assert check.candidate is not None and check.baseline is not None and check.value is not None
    assert math.isclose(check.candidate - check.baseline, check.value)
    assert check.unit == "nats" and check.limit == 9
