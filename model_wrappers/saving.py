"""Writes checkpoints so that a folder never holds a part of one: aside first, ``config.json`` moved in last."""

from __future__ import annotations

import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from bitquake.model_wrappers.loading import without_progress_bars


def save_aside(
    model: Any, aside: Path, *, source: str, max_shard_size: str = "5GB", revision: str | None = None,
    trust_remote_code: bool = False,
) -> None:  # fmt: skip
    """Write a model, and the processor of the model that it comes from, into an empty folder.

    Args:
        aside: made anew; on the file system of the folder that it will be moved into.
        source: folder or hub name of the processor, with its ``revision``.
        max_shard_size: of a file: a number and KB, MB, GB or TB.
    """
    from transformers import AutoProcessor

    shutil.rmtree(aside, ignore_errors=True)
    with without_progress_bars():
        model.save_pretrained(aside, max_shard_size=max_shard_size)
    # as it was published: what load_processor changes for the evaluation is no part of the model
    processor = AutoProcessor.from_pretrained(source, revision=revision, trust_remote_code=trust_remote_code)
    processor.save_pretrained(aside)


def move_in(aside: Path, out: Path, *, texts: Mapping[str, str]) -> None:
    """Move a checkpoint from ``aside`` into ``out``, in place of one that is there.

    Args:
        texts: further files by name: the quant card, README.md.
    """
    for name, text in texts.items():
        (aside / name).write_text(text, encoding="utf-8")
    (out / "config.json").unlink(missing_ok=True)
    for old in (*out.glob("*.safetensors"), *out.glob("*.safetensors.index.json")):
        old.unlink()
    for file in sorted(aside.iterdir(), key=lambda path: path.name == "config.json"):
        if file.is_file():
            file.chmod(0o644)  # safetensors writes for the owner only
        if (out / file.name).is_dir():
            shutil.rmtree(out / file.name)
        file.replace(out / file.name)
