"""Encoded samples on disk: one safetensors file each, atomically written, each with the hash of its own content."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..quantizers.hashing import tensor_hash
from .sample import CalibrationInputs

_META = "bitquake"
"""The only key of a file's metadata: safetensors writes several in no fixed order."""
_INPUT = "inputs."


class Entry(NamedTuple):
    """A sample as it lies on the disk."""

    inputs: CalibrationInputs
    image_ids: tuple[str, ...]


def write_entry(file: Path, inputs: CalibrationInputs, image_ids: Iterable[str]) -> None:
    """Write a sample; equal samples give equal bytes.

    Raises:
        OSError: the file cannot be written.
    """
    from safetensors.torch import save_file

    from bitquake.tasks.sources import replacing

    tensors = {_INPUT + name: value.contiguous() for name, value in inputs.inputs.items()}
    tensors |= {"vision": inputs.vision.contiguous(), "answer": inputs.answer.contiguous()}
    ids = sorted(image_ids)
    meta = {"image_ids": ids, "content": _content(tensors, ids)}
    with replacing(file) as new:
        save_file(tensors, str(new), metadata={_META: json.dumps(meta)})


def read_entry(file: Path, dtype: torch.dtype | None = None) -> Entry | None:
    """A sample, or None where there is none or its file is damaged.

    Args:
        dtype: of floating inputs; None leaves them as they are.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(file), framework="pt") as opened:
            meta = json.loads((opened.metadata() or {})[_META])
            tensors = {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118 (it is no mapping)
        if meta["content"] != _content(tensors, meta["image_ids"]):
            return None
        vision, answer = tensors.pop("vision"), tensors.pop("answer")
    except (OSError, SafetensorError, ValueError, KeyError, TypeError):
        return None
    inputs = {
        name.removeprefix(_INPUT): value.to(dtype) if dtype is not None and value.is_floating_point() else value
        for name, value in tensors.items()
    }
    return Entry(CalibrationInputs(inputs, vision, answer), tuple(meta["image_ids"]))


def _content(tensors: dict[str, Tensor], image_ids: list[str]) -> str:
    digest = hashlib.blake2b(digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)} {tensor_hash(tensor)}\n".encode())
    digest.update(json.dumps(image_ids).encode())
    return digest.hexdigest()
