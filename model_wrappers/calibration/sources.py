"""Which samples a ``CalibrationSpec`` means, for a model: the defaults of each source, and refusals."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .families import FamilySource, Show, is_family, with_split
from .folders import PictureFolder, TextFolder
from .prompts import BLOCK_PREFIX
from .sample import CalibrationError, Source
from .synthetic import SIDE, NoisePictures, SyntheticPictures

if TYPE_CHECKING:
    from PIL.Image import Image

    from ..quantizers.spec import CalibrationSpec

DEFAULT_FAMILY = {"caption": "coco_caption", "text": "coco_caption"}
"""Source -> the family whose calibration split it takes where the spec names no data."""
BLOCK_FAMILY = {
    "caption": "block_coco_caption",
    "text": "block_vqav2",
    "in-domain": "block_vqav2",
    "corrupted-in-domain": "block_vqav2",
}
"""The same for the reference models, which only know the block world."""
_OWN_PICTURES = ("noise",)
_BLOCK_SIDE = 64


def find_source(
    spec: CalibrationSpec,
    config: Any,
    *,
    pretrained: str,
    processed: Callable[[Image], tuple[int, int] | None] = lambda picture: None,
) -> Source:
    """The samples of a spec.

    Args:
        config: the model's.
        pretrained: the model's name, which tells reference models.
        processed: see :class:`FamilySource`.

    Raises:
        CalibrationError: source ``none``, data that does not exist, has no calibration split, is not prepared on this
            machine, or does not hold what the source needs.
    """
    source, data, n, seed = spec.source, spec.data, spec.samples, spec.seed
    block = pretrained.startswith(BLOCK_PREFIX)
    model_type = str(config.model_type)
    if source == "none":
        raise CalibrationError(
            "calibration: source none holds no samples, and this method needs some; use source caption, or a "
            "data-free method (rtn, hqq)"
        )
    if data is not None and source in _OWN_PICTURES:
        raise CalibrationError(
            f"calibration: source {source} draws its own pictures and takes no data, got data={data!r}; leave it out"
        )
    if source == "noise":
        return NoisePictures(n, seed, side=_side(config, block), model_type=model_type, block=block)
    if source == "self" and data is None:
        return SyntheticPictures(n, seed, side=_side(config, block), model_type=model_type, block=block)
    data = data or (BLOCK_FAMILY if block else DEFAULT_FAMILY).get(source)
    if data is None:
        raise CalibrationError(
            f"calibration: source {source} of {pretrained!r} needs data: the domain in question. Give data= a family "
            f"with a calibration split ({', '.join(with_split('calibration'))}), or a folder of pictures with a "
            "metadata.jsonl"
        )
    noise = (spec.noise, spec.severity) if source == "corrupted-in-domain" else None
    folder = Path(data).expanduser()
    if folder.is_dir() and not is_family(data):
        found = _of_folder(folder, source, n=n, seed=seed, model_type=model_type, block=block, noise=noise)
        if not len(found):
            what = ".txt or .jsonl files" if source == "text" else "pictures (.png, .jpg, .jpeg, .webp)"
            raise CalibrationError(f"calibration: {folder} holds no {what}; put some into it, or name another folder")
        return found
    show: Show = "text" if source == "text" else "pictures" if source == "self" else "pictures and text"
    return FamilySource(
        data,
        model_type=model_type,
        seed=seed,
        show=show,
        captions=source == "caption",
        noise=noise,
        processed=processed,
    )


def _of_folder(
    folder: Path, source: str, *, n: int, seed: int, model_type: str, block: bool, noise: tuple[str, int] | None
) -> Source:
    if source == "text":
        return TextFolder(folder, seed=seed)
    return PictureFolder(
        folder,
        n=n,
        seed=seed,
        model_type=model_type,
        block=block,
        pictures_only=source == "self",
        needs={"caption": "answer", "in-domain": "prompt", "corrupted-in-domain": "prompt"}.get(source),
        noise=noise,
    )


def _side(config: Any, block: bool) -> int:
    """Side of drawn pictures in pixels: what the model's vision tower was made for, where its config says so."""
    size = getattr(getattr(config, "vision_config", None), "image_size", None)
    return _BLOCK_SIDE if block else size if isinstance(size, int) else SIDE
