"""Finished modules of a quantization that is still going on: one file each, so that a killed run loses none of them."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from loguru import logger
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from bitquake.model_wrappers.journal import digest
from bitquake.model_wrappers.quantizers.linear import STORED, LinearLayout
from bitquake.model_wrappers.quantizers.packing import pack, unpack
from bitquake.model_wrappers.quantizers.weight import QuantizedWeight
from bitquake.tasks.sources import replacing

IDENTITY = "identity.json"
"""What decides the result of the quantization, as ``PartialQuantization`` was given it."""
_SUFFIX = ".safetensors"


class PartialError(ValueError):
    """Finished modules that belong to another quantization."""


class PartialQuantization(Mapping[str, QuantizedWeight]):
    """The modules finished so far, by name, read from disk when they are asked for.

    A file is whole or absent. One that cannot be read counts as absent and is made anew.

    Args:
        folder: made when it is not there.
        identity: what decides the result besides a module's own weight: model, spec, dtype, calibration.

    Raises:
        PartialError: the folder holds modules of another identity.
    """

    def __init__(self, folder: Path, identity: Mapping[str, Any]) -> None:
        self.folder = folder
        self._identity = digest(dict(identity))
        known = folder / IDENTITY
        if known.is_file():
            try:
                old = json.loads(known.read_text(encoding="utf-8"))
            except (OSError, ValueError) as error:
                raise PartialError(f"{known}: cannot be read ({error}); give another --out, or --overwrite") from error
            if digest(old) != self._identity:
                odd = [key for key in {**old, **identity} if old.get(key) != identity.get(key)]
                told = ", ".join(f"{key} {_short(old.get(key))}, not {_short(identity.get(key))}" for key in odd)
                raise PartialError(
                    f"{folder}: holds finished modules of another quantization ({told}). Finish that one with its own "
                    "command, give another --out, or start anew with --overwrite"
                )
        else:
            folder.mkdir(parents=True, exist_ok=True)
            with replacing(known) as new:
                new.write_text(json.dumps(dict(identity), indent=2) + "\n", encoding="utf-8")
        # a name with a dot in front is what a killed process was writing
        files = [file for file in folder.glob(f"*{_SUFFIX}") if not file.name.startswith(".")]
        self._names = {file.name.removesuffix(_SUFFIX) for file in files if _is_whole(file)}

    def __getitem__(self, name: str) -> QuantizedWeight:
        if name not in self._names:
            raise KeyError(name)
        weight, _ = self._read(name)
        return weight

    def __contains__(self, name: object) -> bool:
        return name in self._names

    def __iter__(self) -> Iterator[str]:
        return iter(sorted(self._names))

    def __len__(self) -> int:
        return len(self._names)

    def find(self, name: str, before: str) -> QuantizedWeight | None:
        """A finished module, or None.

        Args:
            before: hash of the weight that it was made from.

        Raises:
            PartialError: it was made from another weight.
        """
        if name not in self._names:
            return None
        weight, made_from = self._read(name)
        if made_from != before:
            raise PartialError(
                f"{self.folder}: {name} was finished from another weight than it has now: the model was changed in "
                "between; give another --out, or start anew with --overwrite"
            )
        return weight

    def _read(self, name: str) -> tuple[QuantizedWeight, str]:
        with safe_open(self.folder / f"{name}{_SUFFIX}", framework="pt") as opened:
            told = opened.metadata() or {}
            tensors = {key: opened.get_tensor(key).clone() for key in opened.keys()}  # noqa: SIM118  # no mapping
        if told.get("identity") != self._identity or told.get("module") != name:
            raise PartialError(
                f"{self.folder}: {name} belongs to another quantization; give another --out, or start anew with "
                "--overwrite"
            )
        layout = LinearLayout.from_dict(json.loads(told["layout"]))
        return _unpacked(tensors, layout, int(told["in_features"])), told["before"]

    def put(self, name: str, before: str, weight: QuantizedWeight) -> None:
        """Keep a finished module: from now on a kill does not lose it."""
        stored = {"codes": pack(weight.codes, weight.bits)}
        stored |= {leaf: t for leaf in STORED[1:] if (t := getattr(weight, leaf)) is not None}
        told = {
            "identity": self._identity, "module": name, "before": before,
            "layout": json.dumps(LinearLayout.of(weight).to_dict()), "in_features": str(weight.codes.shape[1]),
        }  # fmt: skip
        with replacing(self.folder / f"{name}{_SUFFIX}") as new:
            save_file({leaf: t.detach().cpu().contiguous() for leaf, t in stored.items()}, new, metadata=told)
        self._names.add(name)


def _is_whole(file: Path) -> bool:
    try:
        with safe_open(file, framework="pt"):
            return True
    except (OSError, SafetensorError) as error:
        logger.warning(f"{file}: cannot be read ({error}); its module is quantized again")
        return False


def _unpacked(tensors: Mapping[str, Tensor], layout: LinearLayout, in_features: int) -> QuantizedWeight:
    return QuantizedWeight(
        unpack(tensors["codes"], layout.bits, in_features), tensors["scale"], tensors.get("zero"), layout.bits,
        layout.group_size, tensors.get("input_scale"), tensors.get("order"),
    )  # fmt: skip


def _short(value: object) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else f"{text[:57]}..."
