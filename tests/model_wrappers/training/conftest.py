"""Small training data: pictures with conversations in LLaVA's form, in the words of the tiny models."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

MakeFolder = Callable[..., Path]


def conversation(*said: str) -> list[dict[str, str]]:
    return [{"from": "gpt" if i % 2 else "human", "value": text} for i, text in enumerate(said)]


@pytest.fixture(scope="session")
def conversations(tmp_path_factory: pytest.TempPathFactory) -> MakeFolder:
    """Writes a folder: ``conversations(n, words)``; ``texts`` examples have no picture, further entries go last."""

    def make(
        n: int, *, words: list[str], texts: int = 0, extra: list[dict[str, Any]] | None = None, per_picture: int = 1
    ) -> Path:
        folder = tmp_path_factory.mktemp("conversations")
        rng = np.random.default_rng(n)
        entries: list[dict[str, Any]] = []
        for i in range(n + texts):
            question, answer = (" ".join(rng.choice(words, rng.integers(1, most))) for most in (5, 4))
            if i >= n:
                entries.append({"id": i, "conversations": conversation(question, answer)})
                continue
            name = f"{i // per_picture}.png"
            if not (folder / name).exists():
                size = (int(rng.integers(20, 60)), int(rng.integers(20, 60)), 3)
                Image.fromarray(rng.integers(0, 256, size, dtype=np.uint8)).save(folder / name)
            entries.append({"id": i, "image": name, "conversations": conversation(f"<image>\n{question}", answer)})
        (folder / "mix.json").write_text(json.dumps(entries + (extra or [])))
        return folder

    return make
