"""Cells: which there are, what they are called, which are the same, and what is refused."""

from __future__ import annotations

import itertools
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bitquake.config import Config
from bitquake.model_wrappers.quantizers.spec import load_spec
from bitquake.suite import task_list
from bitquake.suite.identity import _folder_hash, checkpoint_identity
from bitquake.suite.plan import plan_suite
from bitquake.suite.reader import LoadedSuite, load_suite, suite_names
from bitquake.suite.schema import SuiteError
from bitquake.suite_plan import SuitePlan

Load = Callable[..., LoadedSuite]
Plan = Callable[..., SuitePlan]
MODEL = {"name": "m", "pretrained": "bitquake/block-idefics3"}
PARTS = {
    "name": "{method}-v{vision}-c{connector}-l{language}",
    "grid": {"vision": [16, 4], "connector": [16, 4, 3], "language": [16, 2]},
    "factors": {"method": "gptq"},
    "spec": {
        "method": "{method}",
        "bits": 8,
        "group_size": 64,
        "plan": [
            {"components": ["vision"], "bits": "{vision}"},
            {"components": ["connector"], "bits": "{connector}"},
            {"components": ["language"], "bits": "{language}"},
        ],
    },
}
TRAINING = {"method": "qat", "bits": 3, "group_size": 64, "data": ["block_vqav2"], "steps": 5}


def _names(plan: SuitePlan) -> list[str]:
    return [cell.name for cell in plan.cells]


@pytest.mark.parametrize("name", suite_names())
@pytest.mark.parametrize("world", ["real", "block"])
def test_every_suite_that_ships_plans_in_both_worlds(name: str, world: Any) -> None:
    plan = plan_suite(load_suite(name, world))
    names = _names(plan)
    assert len(set(names)) == len(names)
    for cell in plan.cells:
        assert cell.twin == "" or cell.twin in names
        assert not cell.twin or plan.cell(cell.twin).model or cell.model
        if cell.spec:
            assert load_spec(cell.spec).options() == cell.spec  # what a worker reads is what was planned
    assert SuitePlan.model_validate_json(plan.model_dump_json()) == plan


def test_a_grid_is_every_combination_and_16_bits_leave_a_part_alone(plan: Plan) -> None:
    made = plan(models=[MODEL], quantizations=[PARTS])
    by_name = {cell.quantization: cell for cell in made.cells}
    wanted = [f"gptq-v{v}-c{c}-l{lang}" for v, c, lang in itertools.product([16, 4], [16, 4, 3], [16, 2])]
    assert list(by_name) == ["full-precision", *wanted]
    one = by_name["gptq-v16-c3-l2"]
    assert [(rule["components"], rule["bits"]) for rule in one.spec["plan"]] == [(["connector"], 3), (["language"], 2)]
    levels = {"vision": 16, "connector": 3, "language": 2, "method": "gptq"}
    assert one.factors == {**levels, "quantization": "gptq-v16-c3-l2", "calibration": "caption"}
    assert one.twin == "m/full-precision"
    corner, full = by_name["gptq-v16-c16-l16"], by_name["full-precision"]
    assert corner.hash == full.hash and corner.spec == {} and corner.twin == "" and corner.factors["vision"] == 16
    assert len({cell.hash for cell in made.cells}) == len(made.cells) - 1


def test_calibration_and_seeds_multiply_only_what_they_matter_to(plan: Plan) -> None:
    made = plan(
        models=[MODEL],
        quantizations=["rtn-int4-g64", "awq-int4-g64"],
        calibration=["own", "text", {"source": "in-domain", "data": "block_refcocoplus", "samples": 7}],
        seeds=[0, 3],
    )
    sources = ["", "/text", "/in-domain"]
    assert _names(made) == [
        "m/full-precision",
        "m/rtn-int4-g64",
        *(f"m/awq-int4-g64{source}{seed}" for source in sources for seed in ("", "/seed3")),
    ]
    one = made.cell("m/awq-int4-g64/in-domain/seed3")
    assert one.spec["calibration"] == {"source": "in-domain", "samples": 7, "seed": 3, "data": "block_refcocoplus"}
    assert one.spec["name"] == "awq-int4-g64/in-domain/seed3"
    assert (one.calibration, one.seed) == ("in-domain", 3)
    assert one.factors == {"quantization": "awq-int4-g64", "calibration": "in-domain", "seed": 3}
    assert made.cell("m/rtn-int4-g64").factors["calibration"] == "none"
    assert made.cell("m/awq-int4-g64").calibration == "caption"  # what the spec itself says
    data = {"method": "awq", "bits": 4, "group_size": 64, "calibration": {"source": "caption", "data": "my_family"}}
    other = plan(models=[MODEL], quantizations=[{"name": "x", "spec": data}], calibration=["text"])
    assert "data" not in other.cells[1].spec["calibration"]  # data belong to the source


def test_what_is_equal_is_one_cell_and_what_differs_is_another(plan: Plan) -> None:
    def hash_of(**changes: Any) -> str:
        base = {"models": [MODEL], "quantizations": ["awq-int4-g64"], "tasks": ["block_vqav2_clean"], "arguments": {}}
        return plan(**{**base, **changes}).cells[1].hash

    known = hash_of()
    assert hash_of(title="Another", models=[{**MODEL, "name": "other"}]) == known
    assert hash_of(arguments={"workers": 3, "device_map": "auto"}) == known
    different = [
        hash_of(models=[{**MODEL, "pretrained": "bitquake/block-qwen2vl"}]),
        hash_of(quantizations=["awq-int3-g64"]),
        hash_of(quantizations=[{"name": "mine", "spec": "awq-int4-g64"}]),  # the name stands in every record
        hash_of(calibration=["text"]),
        hash_of(seeds=[5]),
        hash_of(tasks=["block_vqav2_clean", "block_vqav2_threshold"]),
        hash_of(limit=7),
        hash_of(arguments={"batch_size": 4}),
        hash_of(arguments={"dtype": "float32"}),
        hash_of(arguments={"features": True}),
    ]
    assert len({known, *different}) == 1 + len(different)


def test_a_checkpoint_in_a_folder_is_known_by_its_bytes(plan: Plan, tmp_path: Path) -> None:
    def hash_of(folder: Path) -> str:
        return plan(models=[{"name": "m", "pretrained": str(folder)}], quantizations=["rtn-int4-g64"]).cells[0].hash

    for name, weights in (("a", b"1" * 100), ("b", b"1" * 100), ("c", b"1" * 99 + b"2")):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "model.safetensors").write_bytes(weights)
        (folder / "README.md").write_text(name)
    assert hash_of(tmp_path / "a") == hash_of(tmp_path / "b") != hash_of(tmp_path / "c")


def test_what_a_checkpoints_identity_is_made_of(tmp_path: Path) -> None:
    def identity(*path: str, **files: str) -> list[str]:
        folder = tmp_path.joinpath(*path)
        folder.mkdir(parents=True)
        for name, data in files.items():
            (folder / name.replace("_", ".")).write_text(data)
        return checkpoint_identity(str(folder))

    one = identity("one", merges_txt="a b", model_safetensors="1")
    assert identity("two", merges_txt="a c", model_safetensors="1") != one  # other tokens are other answers
    assert identity("three", merges_txt="a b", model_safetensors="1", README_md="x") == one
    # a folder in the hub's cache is no part of the cache
    assert identity(".cache", "one", merges_txt="a b", model_safetensors="1") == one
    assert identity(".cache", "two", merges_txt="a b", model_safetensors="2") != one
    known = identity("four", merges_txt="a b", model_safetensors="1")
    (tmp_path / "four" / ".cache").mkdir()
    (tmp_path / "four" / ".cache" / "download.lock").touch()
    _folder_hash.cache_clear()
    assert checkpoint_identity(str(tmp_path / "four")) == known


def test_the_users_lists_of_ids_are_in_the_hash(plan: Plan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def hash_with(ids: list[str] | None) -> str:
        lists = tmp_path / "ids.json"
        lists.write_text(json.dumps({"test": ids, "threshold": ["threshold-1"]}))
        config = Config(file=tmp_path / "config.yaml", split_ids={} if ids is None else {"block_vqav2": lists})
        monkeypatch.setattr(task_list, "load_config", lambda: config)
        task_list._family.cache_clear()
        return plan(quantizations=["full-precision"], limit=5, tasks=["block_vqav2_clean"]).cells[0].hash

    hashes = [hash_with(ids) for ids in (None, ["test-1", "test-2"], ["test-1", "test-3"], None)]
    task_list._family.cache_clear()
    assert hashes[0] == hashes[3] and len(set(hashes)) == 3


@pytest.mark.parametrize("name", suite_names())
def test_suites_that_ship_tell_their_whole_size(name: str) -> None:
    for cell in plan_suite(load_suite(name)).cells:
        assert cell.n.keys() == cell.tasks.keys(), cell.name


def test_the_data_of_a_training_is_in_its_hash(plan: Plan, tmp_path: Path) -> None:
    data = tmp_path / "pictures"
    data.mkdir()

    def hashes(text: str, name: str = "rows.jsonl") -> tuple[str, str]:
        (data / name).write_text(text)
        _folder_hash.cache_clear()
        (cell,) = plan(models=[{**MODEL, "training": {**TRAINING, "data": [str(data)]}}]).cells
        return cell.training_hash, cell.hash

    one, other = hashes("a"), hashes("b")
    assert one[0] != other[0] and one[1] != other[1] and hashes("a") == one
    assert len({hashes("red", "picture.png"), hashes("ink", "picture.png"), one}) == 3


def test_the_versions_of_bitquake_and_of_the_plan_are_not_in_the_hash(
    load: Load, monkeypatch: pytest.MonkeyPatch
) -> None:
    before = [cell.hash for cell in plan_suite(load()).cells]
    monkeypatch.setattr("bitquake.__version__", "9.9.9")
    monkeypatch.setattr("bitquake.suite.plan.__version__", "9.9.9")
    assert [cell.hash for cell in plan_suite(load()).cells] == before


def test_tags_limits_and_sizes(plan: Plan) -> None:
    made = plan(
        tasks=[
            "block_vqav2_noise_3",
            {"name": "block_vqav2_fog_3", "limit": 9},
            {"name": "block_vqav2_clean", "limit": "all"},
        ],
        limit=50,
        block={"title": "Twin"},
    )
    tasks = made.cells[0].tasks
    assert len(tasks) == 15 + 1 and set(tasks.values()) == {50, 9, None}
    assert tasks["block_vqav2_fog_3"] == 9 and tasks["block_vqav2_clean"] is None
    import pyarrow.parquet as pq

    from bitquake.tasks.families import PACKAGE

    rows = pq.read_metadata(PACKAGE / "world/data/block_vqav2/test.parquet").num_rows
    assert made.cells[0].n == {**dict.fromkeys(tasks, 50), "block_vqav2_fog_3": 9, "block_vqav2_clean": rows}
    large = plan(tasks=["block_vqav2_clean"], limit=10**6)
    assert large.cells[0].n == {"block_vqav2_clean": rows}


def test_a_run_to_try_a_suite_out_is_cut_everywhere(load: Load) -> None:
    made = plan_suite(load(tasks=[{"name": "block_vqav2_clean", "limit": 5}, "block_vqav2_threshold"]), limit=8)
    assert made.cells[0].tasks == {"block_vqav2_clean": 5, "block_vqav2_threshold": 8}
    with pytest.raises(SuiteError, match="--limit"):
        plan_suite(load(), limit=0)


def test_exclusions(plan: Plan) -> None:
    made = plan(
        quantizations=[{"name": "{method}-int{bits}-g64", "grid": {"method": ["rtn", "awq"], "bits": [4, 3]}}],
        calibration=["own", "text"],
        exclude=[
            {"quantization": "*-int3-*", "calibration": "text"},
            {"model": "block-*", "quantization": "rtn-int3-*"},
        ],
    )
    assert [name.partition("/")[2] for name in _names(made)] == [
        *("full-precision", "rtn-int4-g64", "awq-int4-g64", "awq-int4-g64/text", "awq-int3-g64"),
    ]


def test_trained_models(plan: Plan) -> None:
    made = plan(
        models=[
            MODEL,
            {**MODEL, "name": "twin", "training": {**TRAINING, "bits": 16}, "quantizations": ["rtn-int3-g64"]},
            {**MODEL, "name": "int3", "training": TRAINING, "twin": "twin"},
            {**MODEL, "name": "alone", "training": {**TRAINING, "steps": 6}},
        ],
        quantizations=["full-precision"],
        seeds=[0, 1],
    )
    assert {cell.name: cell.twin for cell in made.cells} == {
        "m/full-precision": "",
        "twin/as-trained": "",
        "twin/as-trained/seed1": "",
        "twin/rtn-int3-g64": "twin/as-trained",
        "twin/rtn-int3-g64/seed1": "twin/as-trained/seed1",
        "int3/as-trained": "twin/as-trained",
        "int3/as-trained/seed1": "twin/as-trained/seed1",
        "alone/as-trained": "",
        "alone/as-trained/seed1": "",
    }
    same = [cell for cell in made.cells if cell.model == "twin" and cell.seed == 1]
    assert len({cell.training_hash for cell in same}) == 1  # a training is shared by the cells that need it
    assert len({cell.training_hash for cell in made.cells if cell.training}) == 6
    training = made.cell("int3/as-trained/seed1").training
    assert training is not None and training["seed"] == 1 and training["pretrained"] == MODEL["pretrained"]


REFUSED: list[tuple[dict[str, Any], str]] = [
    (
        {"tasks": ["block_vqav2_claen"]},
        "there is no task and no tag 'block_vqav2_claen'; did you mean block_vqav2_clean",
    ),
    ({"tasks": ["vqav2_clean"]}, "is a task of the real world, the suite runs in the block one"),
    ({"tasks": ["mmlu"]}, "is a group of lmms-eval's own tasks"),
    ({"tasks": ["vqav2_val"]}, "is a task of real pictures"),
    ({"tasks": ["block_vqav2_clean", "block_vqav2_clean"]}, "is named twice"),
    (
        {"tasks": [{"name": "block_vqav2_noise", "limit": 5}, {"name": "block_vqav2_noise_3", "limit": 6}]},
        "name the task itself",
    ),
    ({"quantizations": ["rtn-int44-g64"]}, "unknown quantization spec 'rtn-int44-g64' (did you mean 'rtn-int4-g64'"),
    (
        {
            "quantizations": [
                {"name": "x", "spec": {"method": "rtn", "bits": 4, "group_size": 64, "components": ["eyes"]}}
            ]
        },
        "'vision', 'connector' or 'language'",
    ),
    ({"quantizations": [{"name": "x-{bit}", "grid": {"bits": [4]}}]}, "{bit} is no factor of the grid; it has bits"),
    ({"quantizations": [{"name": "rtn-int4-g64", "grid": {"b": [1, 2]}}]}, "two cells are called"),
    ({"quantizations": ["rtn-int4-g64", {"name": "x", "spec": "rtn-int4-g64"}]}, "are the same cell"),
    ({"models": [MODEL, {**MODEL, "name": "n"}]}, "are the same cell"),
    ({"models": [{**MODEL, "twin": "nobody"}]}, "there is no model entry 'nobody'"),
    ({"models": [{**MODEL, "pretrained": "bitquake/block-llava"}]}, "no such reference checkpoint"),
    ({"exclude": [{"quantization": "rtn-int9*"}]}, "matches no cell (quantization: rtn-int9*)"),
    ({"exclude": [{"quantization": "full-precision"}]}, "loses its control"),
    ({"exclude": [{"model": "*"}]}, "leaves no cell"),
    ({"calibration": ["own", "caption"], "quantizations": ["awq-int4-g64"]}, "are the same cell"),
    ({"models": [{**MODEL, "training": {**TRAINING, "bitts": 3}}]}, "did you mean 'bits'"),
    ({"models": [{**MODEL, "training": {**TRAINING, "pretrained": "other"}}]}, "is not the entry's own pretrained"),
    ({"models": [{**MODEL, "training": {**TRAINING, "seed": 1}}], "seeds": [0]}, "the suite's `seeds` say it"),
    (
        {"models": [{**MODEL, "training": TRAINING}], "training": {"seed": 1}, "seeds": [0]},
        "training.seed: the suite's `seeds` say it",
    ),
    (
        {"models": [{**MODEL, "training": TRAINING, "quantizations": ["rtn-int3-g64"]}]},
        "cannot be put on a model that is quantized by its training",
    ),
    ({"selectors": ["own"]}, "Selectors learn from a *_dev task"),
    ({"selectors": ["own"], "tasks": ["block_vqav2_dev"]}, "Selectors need `arguments: {features: true}`"),
    (
        {
            "selectors": ["mixture"],
            "selector_mixture": ["rtn-int8-g64"],
            "tasks": ["block_vqav2_dev"],
            "arguments": {"features": True},
        },
        "there is no quantization 'rtn-int8-g64' in this suite",
    ),
]


@pytest.mark.parametrize(("changes", "message"), REFUSED, ids=[message[:40] for _, message in REFUSED])
def test_what_cannot_be_planned_is_refused_with_its_place(load: Load, changes: dict[str, Any], message: str) -> None:
    loaded = load(**changes)
    with pytest.raises(SuiteError) as caught:
        plan_suite(loaded)
    assert message in str(caught.value)
    assert str(caught.value).startswith(f"{loaded.file}:")


def test_planning_needs_neither_torch_nor_lmms_eval() -> None:
    code = (
        "import sys, bitquake.suite.run\n"
        "from bitquake.suite.plan import plan_suite; from bitquake.suite.reader import load_suite\n"
        "plan_suite(load_suite('qat_scienceqa', 'block'))\n"
        "seen = {name.split('.')[0] for name in sys.modules}\n"
        "sys.exit(str(found) if (found := seen & {'torch', 'lmms_eval', 'transformers', 'datasets'}) else 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.stderr == "" and done.returncode == 0
