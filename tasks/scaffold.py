"""A new family file, commented, that is valid as it stands: ``bitquake tasks new NAME``."""

from __future__ import annotations

import os
import re
from pathlib import Path

from .families import BUILT_IN, FAMILY_FILE, PACKAGE, FamilyError

SCHEMA = PACKAGE / "family.schema.json"
PROTOCOLS = ("vqa", "choice", "grounding", "caption", "retrieval")

_COLUMNS = {
    "vqa": """\
  question: question
  answers: answers            # list of texts, or of mappings with the key `answer`, as many as `annotators` says
""",
    "choice": """\
  question: question
  choices: choices            # list of texts
  answer: answer              # index of the right one, from 0
  # hint: hint                # text before the question; put {hint} into text.template
""",
    "grounding": """\
  question: expression        # what is looked for, as text
  box: bbox                   # four numbers, see box_format
""",
    "caption": """\
  captions: captions          # list of texts
""",
    "retrieval": """\
  captions: captions          # list of texts, all about the picture; one of them, drawn by hash, is to be found
""",
}
_PROTOCOL = {
    "vqa": """\
annotators: 10                # reference answers of each row; the score is VQA's soft accuracy
""",
    "choice": """\
max_choices: 5                # the most options that a row has
text:
  template: "{question}\\n{choices}"
  option: "{letter}. {choice}"
  separator: "\\n"
""",
    "grounding": """\
box_format: xywh              # how the dataset writes boxes: xywh or xyxy
coordinates: {default: pixels}  # in what a model answers: pixels, unit, thousand, processed; also by model_type
""",
    "caption": """\
text: {template: "Describe the picture in one sentence."}
max_new_tokens: 48
""",
    "retrieval": """\
text: {template: "Describe the picture in one sentence."}
candidates: {n: 100, seed: 0}  # the picture's own caption among n - 1 others
""",
}
_PROMPT = {
    "vqa": '"\\nAnswer the question using a single word or phrase."',
    "choice": '"\\nAnswer with the option\'s letter from the given choices directly."',
    "grounding": '"\\nAnswer with the box of what is described: [x1, y1, x2, y2]."',
}


def new_family(
    name: str,
    protocol: str = "vqa",
    *,
    extends: str | None = None,
    prepared: str | None = None,
    out: Path | None = None,
) -> Path:
    """Write ``<out>/family.yaml`` for a new family; returns the file.

    Args:
        name: the family's name; tasks will be called ``<name>_clean`` and so on.
        protocol: one of ``PROTOCOLS``.
        extends: a stock task of lmms-eval whose dataset, prompt and scorer are taken, instead of a protocol.
        prepared: the split of the dataset ``name`` that ``bitquake data prepare`` has built, and which it is for.
        out: the folder, default ``./<name>``.

    Raises:
        FamilyError: a name that cannot be one or is a built-in family's, an unknown protocol, a stock task that cannot
            be extended, or a file that exists.
    """
    if not re.fullmatch(r"[a-z][a-z0-9_]*", name):
        raise FamilyError(f"{name!r} cannot be a family's name: expected small letters, digits and _, a letter first")
    if (BUILT_IN / name / FAMILY_FILE).is_file():
        raise FamilyError(f"{name!r} is the name of a built-in family; choose another name")
    if protocol not in PROTOCOLS:
        raise FamilyError(f"unknown protocol {protocol!r}; known: {', '.join(PROTOCOLS)}")
    text = _own(name, protocol, prepared) if extends is None else _extending(name, extends)
    file = (Path(name) if out is None else out) / FAMILY_FILE
    text = f"# yaml-language-server: $schema={_schema(file.parent)}\n{text}"
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("x", encoding="utf-8") as stream:
            stream.write(text)
    except FileExistsError as error:
        raise FamilyError(f"{file}: exists; name another folder with --out, or edit that file") from error
    except OSError as error:
        raise FamilyError(f"{file}: cannot be written ({error.strerror or error})") from error
    return file


def _own(name: str, protocol: str, prepared: str | None) -> str:
    prompt = _PROMPT.get(protocol)
    prompts = "" if prompt is None else f"prompts:\n  default: {{post_prompt: {prompt}}}\n"
    split = prepared or "test"
    dataset = f"""\
dataset: {{path: someone/{name}}}  # on the hub (add `revision`); or `files: {{test: test.parquet, …}}` beside this file
"""
    ids = """\
  # sample_id: question_id    # default: a hash of the row
  # image_id: image_id        # default: a hash of the pixels
"""
    if prepared is not None:
        dataset = f"dataset: {{prepared: {name}}}    # built by `bitquake data prepare {name}`\n"
        ids = "  sample_id: question_id\n  image_id: image_id\n"
    return f"""{_head(name)}
{dataset}\
splits:                       # by picture, never by question; the three must not share one
  test: {{split: {split}, part: [0.5, 1.0]}}         # what is reported
  threshold: {{split: {split}, part: [0.25, 0.5]}}   # where abstention thresholds are fitted
  calibration: {{split: {split}, part: [0.0, 0.25]}} # what quantizers may see
columns:                      # the dataset's names for:
  image: image
{_COLUMNS[protocol]}{ids}protocol: {protocol}
{_PROTOCOL[protocol]}{prompts}{_VARIANTS}"""


def _extending(name: str, task: str) -> str:
    from .stock import stock_task

    found = stock_task(task)
    metrics = [str(metric["metric"]) for metric in found.config.get("metric_list") or [] if metric]
    split = found.config.get("test_split") or found.config.get("validation_split") or "test"
    return f"""{_head(name)}
extends:                      # dataset, prompt and scorer are lmms-eval's
  task: {task}
  score: {metrics[0]}         # of its metrics ({", ".join(metrics)}), the one that scores a sample
  scale: 1                    # what that metric calls a perfect sample
  # options: [A, B, C, D]     # instead of score, where no metric has a number for one sample: the options' columns
splits:                       # by picture; the three must not share one
  test: {{split: {split}, part: [0.5, 1.0]}}
  threshold: {{split: {split}, part: [0.25, 0.5]}}
  calibration: {{split: {split}, part: [0.0, 0.25]}}
columns:
  image: image                # where pictures are told apart; the stock task decides what a model is shown
  # question: question        # set it to have the noises on the text as well
protocol: stock
{_VARIANTS}"""


_VARIANTS = """\
variants:
  noise:
    names: [imagenet_c]       # groups: imagenet_c, imagenet_c_extra, camera, text; single noises; or: all
    severities: [1, 2, 3, 4, 5]
    mode: native              # scaled: for pictures far from 224 pixels
    subset: {n: 5000, seed: 0}  # what noisy tasks run on; <task>_full runs on everything
  # shifts:                   # other rows of the same dataset, as tasks of their own
  #   hard: {split: test, part: [0.5, 1.0], where: {level: [4, 5]}}
"""


def _head(name: str) -> str:
    return f"""\
family: {name}  # tasks: {name}_clean, {name}_threshold, {name}_fog_3, …
title: What it asks, and which published set-up it matches
source: where the data comes from
license: its licence
version: 1                    # raise it when prompts, splits or scoring change
world: real"""


def _schema(folder: Path) -> str:
    """Where an editor finds the schema, from a file in ``folder``: a relative path inside the repository."""
    folder = folder.resolve()
    return os.path.relpath(SCHEMA, folder) if folder.is_relative_to(PACKAGE) else SCHEMA.as_uri()
