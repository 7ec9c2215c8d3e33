"""Family files: where they are, how one is read, and errors that say file, line, what was got and how to fix it.

A task family is one YAML file that names a dataset, its columns, a scoring protocol and the variants it wants. It holds
data only: ``bitquake.tasks.schema`` says what may stand in it, and ``bitquake.tasks.expand`` turns families into
ordinary lmms-eval task files.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from .schema import (
    Candidates,
    Columns,
    Dataset,
    Extends,
    Family,
    FamilyError,
    NoiseVariants,
    Prompt,
    QuestionText,
    Shift,
    Split,
    Splits,
    Subset,
    Train,
    Variants,
    fill,
    json_schema,
)
from .sources import Source, prepared_folder
from .strict_yaml import Place, line_of, load_mapping

__all__ = [
    "BUILT_IN",
    "FAMILY_FILE",
    "PACKAGE",
    "Candidates",
    "Columns",
    "Dataset",
    "Extends",
    "Family",
    "FamilyError",
    "Loaded",
    "Prompt",
    "QuestionText",
    "Shift",
    "Split",
    "Splits",
    "Subset",
    "family_files",
    "fill",
    "is_built_in",
    "json_schema",
    "load_families",
    "load_family",
    "prepared_file",
    "read_families",
]

FAMILY_FILE = "family.yaml"
PACKAGE = Path(__file__).parent
BUILT_IN = PACKAGE / "families"

_PLACE = re.compile(r"^([a-z_]+(?:\.\w+)*): ")


class Loaded(NamedTuple):
    """A family, the file it was read from, on which line of it each of its values stands, and lists of sample ids.

    ids: name of a JSON file, as ``ids`` of a split says -> its text.
    """

    family: Family
    file: Path
    lines: Mapping[Place, int] = {}
    ids: Mapping[str, str] = {}

    def data_file(self, name: str) -> Path:
        """A path of ``dataset.files``: relative ones count from the family file's folder; of ours, from the package."""
        beside = self.file.parent / name
        ours = is_built_in(self.file) and not beside.exists()
        return (PACKAGE / name if ours else beside).resolve()

    def source(self, split: str) -> Source | None:
        """The table of a split, where it is one that is converted; see ``bitquake.tasks.sources``."""
        dataset = self.family.dataset
        if dataset is None or dataset.files is None or dataset.files[split].lower().endswith(".parquet"):
            return None
        name = dataset.files[split]
        file = str(self.data_file(name)) if dataset.package is None else name
        return Source(file=file, package=dataset.package, fields=dataset.fields, image=dataset.image)

    def split_file(self, split: str) -> Path:
        """The parquet file of a split, of a dataset that is not the hub's."""
        dataset = self.family.dataset
        assert dataset is not None and dataset.path is None  # there is none for the hub's, and for stock tasks'
        if dataset.prepared is not None:
            return prepared_file(dataset.prepared, split)
        assert dataset.files is not None
        source = self.source(split)
        return self.data_file(dataset.files[split]) if source is None else source.converted()

    def problem(self, place: str, message: str) -> FamilyError:
        """An error about a value of the file (``splits.test``), with its line."""
        return FamilyError(f"{_at(self.file, self.lines, place.split('.'))}: {place}: {message}")


def is_built_in(file: Path) -> bool:
    """Whether a family file is one of the package's own."""
    return BUILT_IN in file.resolve().parents


def prepared_file(dataset: str, split: str) -> Path:
    """The file of a split of a dataset that ``bitquake data prepare`` builds."""
    return prepared_folder(dataset) / f"{split}.parquet"


def load_family(file: Path) -> Loaded:
    """Read one family file.

    Raises:
        FamilyError: not readable, not plain YAML, or not a family; every problem in it is named, one a line, each with
            the file and, where there is one, the line.
    """
    data, lines = load_mapping(file, "that begins with `family: name`", FamilyError)
    try:
        return Loaded(Family.model_validate(data), file, lines)
    except ValidationError as error:
        raise FamilyError("\n".join(_problems(error, file, lines))) from error


def family_files(folders: Iterable[Path] = (), *, built_in: bool = True) -> list[Path]:
    """The family files of the package, then of the given folders (``FOLDER/family.yaml``, ``FOLDER/*/family.yaml``).

    Args:
        built_in: whether those of the package are wanted.

    Raises:
        FamilyError: a folder does not exist, or holds no family file.
    """
    found: list[Path] = []
    for folder in (*([BUILT_IN] if built_in else []), *folders):
        here = [file for file in (folder / FAMILY_FILE, *sorted(folder.glob(f"*/{FAMILY_FILE}"))) if file.is_file()]
        if not here:
            what = f"holds no {FAMILY_FILE}, nor does a folder in it" if folder.is_dir() else "is no folder"
            raise FamilyError(f"{folder}: {what}; name the folder of a family, or one that holds such folders")
        found += here
    return found


def load_families(folders: Iterable[Path] = ()) -> tuple[list[Loaded], list[str]]:
    """All families of :func:`family_files`, and what is wrong with the others; one broken file never hides the rest."""
    return read_families(family_files(folders))


def read_families(files: Iterable[Path]) -> tuple[list[Loaded], list[str]]:
    """The families of these files, and what is wrong with those that are none or whose name is taken."""
    loaded: dict[str, Loaded] = {}
    problems: list[str] = []
    for file in files:
        try:
            one = load_family(file)
        except FamilyError as error:
            problems += str(error).splitlines()
            continue
        first = loaded.setdefault(one.family.family, one)
        if first is not one:
            whose = "a built-in family's" if is_built_in(first.file) else "taken"
            problem = one.problem("family", f"the name {one.family.family!r} is {whose} ({first.file}); choose another")
            problems.append(str(problem))
    return list(loaded.values()), problems


def _problems(error: ValidationError, file: Path, lines: Mapping[Place, int]) -> list[str]:
    out = []
    for problem in error.errors(include_url=False):
        place = [part for part in problem["loc"] if part not in ("literal['all']", "list[str]", "[key]")]
        where = ".".join(str(part) for part in place)
        what = problem["msg"].removeprefix("Value error, ")
        got = problem["input"]
        shown = "" if isinstance(got, dict | BaseModel) else f" (got {_short(got)})"
        if problem["type"] == "extra_forbidden":
            what, shown = _unknown_key(str(place[-1])), ""
        elif problem["type"] == "missing":
            what, shown = "this key is missing; add it", ""
        elif not place and (named := _PLACE.match(what)):
            place = list(named[1].split("."))  # a check of the whole file that says which of its keys it is about
        message = f"{where}: {what}{shown}" if where else f"{what}{shown}"
        if (line := f"{_at(file, lines, place)}: {message}") not in out:
            out.append(line)
    return out


def _at(file: Path, lines: Mapping[Place, int], place: Iterable[str | int]) -> str:
    """``file:line`` of a place, the file alone where no line is known."""
    line = line_of(lines, list(place))
    return str(file) if line is None else f"{file}:{line}"


def _unknown_key(key: str) -> str:
    if key in ("lmms_eval_specific_kwargs", "model_specific_prompt_kwargs"):
        return (
            "a key named after a model would replace the noise and give a silently clean run; write what a model wants "
            "under `prompts`, by its model_type"
        )
    models = (
        Family,
        Dataset,
        Split,
        Shift,
        Splits,
        Train,
        Columns,
        QuestionText,
        Prompt,
        Subset,
        NoiseVariants,
        Variants,
    )
    known = {name for model in models for name in model.model_fields}
    close = difflib.get_close_matches(key, sorted(known - {key}), n=1)
    return "unknown key; remove it" + (f", or did you mean {close[0]!r}?" if close else " or check its place")


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
