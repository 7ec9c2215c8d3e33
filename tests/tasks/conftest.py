"""Small datasets made on the spot, and a model of nobody's making, for tests that go through the real lmms-eval."""

from __future__ import annotations

import io
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image


@pytest.fixture(scope="session", autouse=True)
def datasets_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """lmms-eval keeps its arrow copies of our datasets in a folder of this test run."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LMMS_EVAL_DATASETS_CACHE", str(tmp_path_factory.mktemp("datasets")))
        yield


def picture(seed: int, width: int = 40, height: int = 30) -> bytes:
    """A PNG of random pixels."""
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    buffer = io.BytesIO()
    Image.fromarray(pixels).save(buffer, "PNG")
    return buffer.getvalue()


def vqa_rows(n: int = 12, start: int = 0) -> list[dict[str, Any]]:
    """Rows in VQA-v2's columns: two questions on each picture; "yes" is right for odd ones, "no" for even ones."""
    return [
        {
            "question_id": start + i,
            "image_id": 1000 + start + i // 2,
            "question": f"is it {i}?",
            "answers": [
                {"answer": "yes" if i % 2 else "no", "answer_confidence": "yes", "answer_id": k + 1} for k in range(10)
            ],
            "image": {"bytes": picture(start + i // 2), "path": None},
        }
        for i in range(n)
    ]


FAMILY = """
family: {name}
world: block
dataset: {{files: {{test: test.parquet, threshold: threshold.parquet}}}}
splits: {{test: test, threshold: threshold}}
columns: {{answers: answers, sample_id: question_id, image_id: image_id}}
protocol: vqa
prompts: {{default: {{pre_prompt: "Q: ", post_prompt: " A:"}}}}
variants: {{noise: {{names: [gaussian_noise, fog], severities: [1, 5], mode: scaled}}}}
"""


def write_parquet(rows: list[dict[str, Any]], file: Path) -> None:
    """Rows with an ``image`` of {bytes, path} as a parquet file whose column is an image to ``datasets``."""
    import datasets

    dataset = datasets.Dataset.from_list(rows)
    dataset.cast_column("image", datasets.Image()).to_parquet(str(file))


MakeFamily = Callable[..., Path]


@pytest.fixture
def make_family(tmp_path: Path) -> MakeFamily:
    """Writes a family folder: its YAML and its parquet files."""

    def make(name: str = "tiny", yaml: str = FAMILY, **splits: list[dict[str, Any]]) -> Path:
        folder = tmp_path / name
        folder.mkdir()
        (folder / "family.yaml").write_text(yaml.replace("{name}", name).replace("{{", "{").replace("}}", "}"))
        for split, rows in (splits or {"test": vqa_rows(), "threshold": vqa_rows(8, start=500)}).items():
            write_parquet(rows, folder / f"{split}.parquet")
        return folder

    return make


@pytest.fixture
def rows() -> Callable[..., list[dict[str, Any]]]:
    return vqa_rows


@pytest.fixture
def make_picture() -> Callable[..., bytes]:
    return picture
