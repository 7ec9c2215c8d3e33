"""``selector=PATH``: the Selectors (``selector.model``) whose confidence a run gives with its answers."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from .features import Features
from .model import Selector, SelectorError, answer_scalars

if TYPE_CHECKING:
    from bitquake.quant_card import QuantCard

_SUFFIX = ".safetensors"


class Emitter(NamedTuple):
    """A Selector at work, and the file that it came from with its hash."""

    selector: Selector
    file: Path
    file_hash: str
    in_folder: bool


def load_selectors(paths: str) -> list[Emitter]:
    """The Selectors of ``selector=``.

    Args:
        paths: files, or folders of them (``*.safetensors``), joined with ``+``.

    Raises:
        SelectorError: nothing is there, or a file is no Selector.
    """
    found: list[Emitter] = []
    # a path may hold a plus itself
    for part in [paths] if Path(paths).expanduser().exists() else paths.split("+"):
        path = Path(part.strip()).expanduser()
        folder = path.is_dir()
        files = sorted(path.glob(f"*{_SUFFIX}")) if folder else [path]
        if not files:
            raise SelectorError(
                f"{path}: holds no *{_SUFFIX}; give a folder of files that `bitquake selector fit` wrote"
            )
        for file in files:
            selector = Selector.load(file)
            found.append(
                Emitter(selector, file, hashlib.blake2b(file.read_bytes(), digest_size=16).hexdigest(), folder)
            )
    return found


def fitting(emitters: Sequence[Emitter], card: QuantCard, hidden_size: int) -> tuple[list[Emitter], list[Emitter]]:
    """Those that judge this model, and those that a folder holds for other quantizations of it.

    Raises:
        SelectorError: a Selector is of another model, or was named and is another quantization's own; two would give
            one confidence on the same tasks; or none is left.
    """
    kept: list[Emitter] = []
    others: list[Emitter] = []
    files_of: dict[tuple[str, str], Path] = {}
    for one in emitters:
        try:
            one.selector.check_model(card, hidden_size)
        except SelectorError as error:
            if one.in_folder and not one.selector.is_for(card) and one.selector.card.subject == card.subject:
                others.append(one)
                continue
            raise SelectorError(f"selector={one.file}: {error}") from error
        what = one.selector.name, one.selector.card.joint
        if what in files_of:
            raise SelectorError(
                f"selector: {files_of[what]} and {one.file} both give the confidence {one.selector.name!r} of tasks "
                f"whose own is {one.selector.card.joint!r}; leave one of them out"
            )
        files_of[what] = one.file
        kept.append(one)
    if others and not kept:
        raise SelectorError(
            f"selector={others[0].file.parent}: its {len(others)} files are other quantizations' own Selectors, none "
            f"is for {card.spec_name} of {card.subject}: fit one, or give a selector_transfer or selector_mixture"
        )
    return kept, others


def refuse_fitted(emitters: Iterable[Emitter], image_ids: Iterable[str], where: str) -> None:
    """Raise when a Selector was fitted on one of a sample's pictures; see ``Selector.refuse_overlap``.

    Raises:
        OverlapError: it was.
    """
    ids = set(image_ids)
    for one in emitters:
        one.selector.refuse_overlap(ids, where)


def emitted(
    emitters: Iterable[Emitter],
    features: Features,
    confidences: Sequence[Mapping[str, float | None]],
    primary: str,
) -> dict[str, list[float | None]]:
    """Name -> the Selector's confidences in n answers, None where it has none; only of those that judge such a task.

    Args:
        features: of n samples, rounded as they are stored.
        confidences: n of an envelope or a record.
        primary: the confidence that the task declares.
    """
    found: dict[str, list[float | None]] = {}
    for selector in (one.selector for one in emitters if one.selector.card.joint == primary):
        scalars = [answer_scalars(confidence, selector.card.joint) for confidence in confidences]
        joint, mean = np.array(scalars, dtype=np.float64).reshape(-1, 2).T
        values = selector.predict(features, joint, mean)
        found[selector.name] = [float(value) if np.isfinite(value) else None for value in values]
    return found
