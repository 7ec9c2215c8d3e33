"""lmms-eval's own task files, read without lmms-eval, against what lmms-eval itself makes of them."""

from __future__ import annotations

import inspect
import subprocess
import sys
from typing import Any

import pytest

from bitquake.tasks import stock
from bitquake.tasks.families import FamilyError

lmms_eval_tasks = pytest.importorskip("lmms_eval.tasks")


@pytest.fixture(scope="module")
def theirs() -> dict[str, Any]:
    """The index of lmms-eval's own TaskManager, without our wrapper."""
    manager = lmms_eval_tasks.TaskManager.__new__(lmms_eval_tasks.TaskManager)
    manager.logger = lmms_eval_tasks.eval_logger
    return dict(inspect.unwrap(lmms_eval_tasks.TaskManager.initialize_tasks)(manager))


def test_names_and_files_are_those_of_lmms_evals_own_index(theirs: dict[str, Any]) -> None:
    folder = stock.tasks_folder()
    assert folder is not None
    ours = stock.names(folder)
    tasks = {name: entry["yaml_path"] for name, entry in theirs.items() if entry["type"] in ("task", "python_task")}
    groups = {name: entry["yaml_path"] for name, entry in theirs.items() if entry["type"] == "group"}
    assert len(tasks) > 1000 and len(groups) > 100
    assert {name: str(file) for name, file in ours.tasks.items()} == tasks
    assert {name: str(file) for name, file in ours.groups.items()} == groups


@pytest.mark.parametrize("name", ["mmbench_en_dev", "pope", "vizwiz_vqa_val", "coco2017_cap_val"])
def test_a_config_is_the_one_that_lmms_eval_loads(name: str) -> None:
    """Its chain of includes, key for key; functions by the file and name that lmms-eval imports them from."""
    from lmms_eval.utils import load_yaml_config

    found = stock.stock_task(name)
    loaded = load_yaml_config(str(found.file), mode="full")
    assert set(found.config) == set(loaded)

    def compare(ours: Any, its: Any) -> None:
        if isinstance(ours, str) and ours.startswith(stock.FUNCTION):
            file, _, function = ours.removeprefix(stock.FUNCTION).rpartition(".")
            assert its.__name__ == function
            assert inspect.getsourcefile(its) == f"{file}.py"
        elif isinstance(ours, dict):
            assert ours.keys() == its.keys()
            for key in ours:
                compare(ours[key], its[key])
        elif isinstance(ours, list):
            assert len(ours) == len(its)
            for one, other in zip(ours, its, strict=True):
                compare(one, other)
        else:
            assert ours == its

    compare(found.config, loaded)


def test_most_tasks_on_pictures_can_be_extended_and_the_others_say_why_not() -> None:
    folder = stock.tasks_folder()
    assert folder is not None
    fit = 0
    for name in list(stock.names(folder).tasks)[::12]:
        try:
            fit += bool(stock.stock_task(name))
        except FamilyError as error:
            assert name in str(error) and len(str(error)) > len(name) + 20
    assert fit > 50


def test_nothing_of_lmms_eval_is_imported() -> None:
    code = "import sys; from bitquake.tasks import stock; stock.stock_task('pope'); print('lmms_eval' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "False"


NOISE = {"name": "fog", "severity": 3}


@pytest.mark.parametrize(
    "kwargs",
    [
        None,
        {},
        {"default": {"a": 1}, "qwen_vl": {"a": 2}, "dataset": {"b": 3}},
        {"qwen_vl": {"a": 2}},
        {"dataset": {"b": 3}},
        {"frames": 4},
        {"default": None, "gpt4v": {"noise": "theirs"}},
    ],
)
@pytest.mark.parametrize("model", [None, "qwen_vl", "gpt4v", "another"])
def test_whatever_mapping_a_model_gets_the_noise_is_in_it(kwargs: Any, model: str | None) -> None:
    """By the code of lmms-eval that chooses the mapping."""
    from lmms_eval.api.task import ConfigurableTask

    def given(to: Any) -> Any:
        class Task:
            model_name = model

            class config:
                lmms_eval_specific_kwargs = to
                model_specific_target_kwargs = model_specific_generation_kwargs = None

        task = Task()
        ConfigurableTask._prepare_model_specific_config(task)
        return task.lmms_eval_specific_kwargs  # type: ignore[attr-defined]

    with_it = given(stock.with_noise(kwargs, NOISE))
    assert with_it["noise"] == NOISE
    without = given({key: value or {} for key, value in kwargs.items()} if kwargs is not None else {})
    for key, value in without.items():  # what the stock task's own functions read is there, unchanged
        if not isinstance(value, dict) and key != "noise":
            assert with_it[key] == value
