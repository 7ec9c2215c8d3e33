"""A family tried out: a few samples of its clean task and of one noisy task through lmms-eval, on the CPU.

``bitquake tasks check FILE`` runs this with the reference checkpoint: what it answers on a benchmark of photographs is
worth nothing, but every step from the dataset's row to the scored record is the one that a 7B model will take.
"""

from __future__ import annotations

import contextlib
import io
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from bitquake.records import RECORD_KEY, SampleRecord
from bitquake.tasks.expand import task_files
from bitquake.tasks.families import FamilyError, Loaded, load_family
from bitquake.tasks.split_ids import with_ids
from bitquake.tasks.variants import CLEAN


class Answered(NamedTuple):
    """One sample of a dry run: what was asked, what is right, and what was made of the answer."""

    task: str
    prompt: str
    target: str
    record: SampleRecord


def tasks_to_try(loaded: Loaded) -> list[str]:
    """The clean task, and one with noise where the family has any: the middle severity of its first noise."""
    family = loaded.family
    tasks = [f"{family.family}_{CLEAN}"]
    if family.variants.noise is not None:
        severities = sorted(family.variants.noise.severities)
        tasks.append(f"{family.family}_{family.noises()[0].name}_{severities[len(severities) // 2]}")
    return tasks


def missing_data(loaded: Loaded) -> str | None:
    """Why a family's rows cannot be read here without a download, or None where they can."""
    if loaded.family.extends is not None:
        from bitquake.tasks.stock import stock_task

        config = stock_task(loaded.family.extends.task).config
        kwargs = config.get("dataset_kwargs") or {}
        return _missing(str(config.get("dataset_path")), kwargs.get("revision"), bool(kwargs.get("data_files")))
    dataset = loaded.family.dataset
    assert dataset is not None  # the schema sees to it
    if dataset.path is not None:
        return _missing(dataset.path, dataset.revision, False)
    file = loaded.split_file(loaded.family.splits.test.split)
    if file.is_file():
        return None
    return f"there is no {file}" + (f"; `bitquake data prepare {dataset.prepared}`" if dataset.prepared else "")


def run(file: Path, *, pretrained: str, samples: int) -> list[Answered]:
    """Evaluate ``samples`` samples of each of :func:`tasks_to_try` and return them, in order.

    Args:
        file: a valid family file.
        pretrained: as in ``--model_args pretrained=…`` of ``bitquake_hf``.

    Raises:
        FamilyError: lmms-eval ended without samples; the message ends with the last lines that it printed.
    """
    loaded = with_ids(load_family(file))
    tasks = tasks_to_try(loaded)
    with tempfile.TemporaryDirectory(prefix="bitquake-check-") as name:
        folder = Path(name)
        wanted = {f"{task}.yaml" for task in tasks}
        for written, text in task_files(loaded).items():
            if not written.endswith(".yaml") or written in wanted:
                (folder / written).write_text(text, encoding="utf-8")
        printed = io.StringIO()
        try:
            results = _evaluate(
                tasks, folder, f"pretrained={pretrained},artifacts={folder / 'artifacts'}", samples, printed
            )
        except Exception as error:  # lmms-eval's and the datasets' own, whatever their kind
            raise FamilyError(f"{file}: the dry run failed: {type(error).__name__}: {error}{_last(printed)}") from error
    found = [_answered(task, line) for task in tasks for line in results["samples"].get(task, [])]
    if not found:
        raise FamilyError(f"{file}: the dry run ended without samples{_last(printed)}")
    return found


def _evaluate(
    tasks: Sequence[str], folder: Path, model_args: str, samples: int, printed: io.StringIO
) -> dict[str, Any]:
    from lmms_eval.evaluator import simple_evaluate
    from lmms_eval.tasks import TaskManager

    with _quiet(printed):
        manager = TaskManager(include_path=str(folder), include_defaults=False, model_name="bitquake_hf")
        results = simple_evaluate(
            model="bitquake_hf",
            model_args=f"{model_args},dtype=float32",
            tasks=list(tasks),
            task_manager=manager,
            limit=samples,
            batch_size=1,
            device="cpu",
            log_samples=True,
        )
    return results or {"samples": {}}


@contextlib.contextmanager
def _quiet(printed: io.StringIO) -> Iterator[None]:
    """lmms-eval's log and progress bars go into a text, of which an error shows the end."""
    from loguru import logger

    with contextlib.redirect_stdout(printed), contextlib.redirect_stderr(printed):
        logger.remove()
        sink = logger.add(printed, level="INFO", format="{message}")
        try:
            yield
        finally:
            logger.remove(sink)


def _answered(task: str, line: dict[str, Any]) -> Answered:
    # A request begins with the prompt; what follows it is settings.
    prompt = next((part for part in line["arguments"] if isinstance(part, str)), "")
    target = line["target"]
    if isinstance(target, list) and len(target) > 1 and all(one == target[0] for one in target):
        target = f"{target[0]!r}, {len(target)} times"
    return Answered(task, prompt, str(target), SampleRecord.model_validate(line[RECORD_KEY]))


def _missing(path: str, revision: str | None, files: bool) -> str | None:
    if Path(path).is_dir() or files:
        return None
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        snapshot_download(path, repo_type="dataset", revision=revision, local_files_only=True)
    except (LocalEntryNotFoundError, HFValidationError):
        return (
            f"the dataset {path!r} is not in this machine's cache of the hub; `hf download --repo-type dataset {path}`"
        )
    return None


def _last(printed: io.StringIO) -> str:
    lines = [line for line in printed.getvalue().splitlines() if line.strip()]
    return "".join(f"\n  {line}" for line in lines[-5:])
