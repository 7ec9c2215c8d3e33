"""From a ``CalibrationSpec`` to encoded samples that stream from the disk.

Samples are made, encoded and written one by one; what an earlier or a killed run has written is taken up again. The
folder is named by a hash of everything that decides its content: the spec, the data, the model's processor.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..journal import digest
from .overlap import ids_hash, store_image_ids
from .sample import CalibrationError, CalibrationInputs, CalibrationSample, SampleError, Source

if TYPE_CHECKING:
    import torch

    from ..quantizers.spec import CalibrationSpec

VERSION = 1
"""Rises when the same spec gives other bytes."""
_SHOWN = 3


class CalibrationSet:
    """Encoded samples; each iteration reads them from the disk again, one at a time.

    Attributes:
        spec: what was asked for.
        source: where the samples come from.
        image_ids: names of all their pictures; see :class:`CalibrationSample`.
        ids_hash: blake2 hex of the sorted names, for the quant card.
        content_hash: of everything that decides the samples: two sets with the same one hold the same bytes.
    """

    def __init__(
        self, spec: CalibrationSpec, files: list[Path], image_ids: frozenset[str], dtype: torch.dtype | None
    ) -> None:
        self.spec, self.source = spec, spec.source
        self.content_hash = files[0].parent.name
        self.image_ids, self.ids_hash = image_ids, ids_hash(image_ids)
        self._files, self._dtype = files, dtype

    def __len__(self) -> int:
        return len(self._files)

    def __iter__(self) -> Iterator[CalibrationInputs]:
        """Each sample, on the CPU, floating inputs in the model's dtype.

        Raises:
            CalibrationError: a file was damaged or removed since the set was built.
        """
        from .cache import read_entry

        for file in self._files:
            entry = read_entry(file, self._dtype)
            if entry is None:
                raise CalibrationError(
                    f"calibration: {file} was damaged or removed while it was in use; run again, which builds it again"
                )
            yield entry.inputs

    def store_image_ids(self, artifacts: Path) -> str:
        """Keep the pictures' names in an artifacts folder, where evaluations look for them; returns ``ids_hash``."""
        return store_image_ids(self.image_ids, artifacts)


def build_calibration(
    spec: CalibrationSpec, model: Any, processor: Any, *, pretrained: str, cache: Path | None = None
) -> CalibrationSet:
    """The calibration set of a spec for a model, built or found in the cache.

    Args:
        model: at full precision, in evaluation mode; run only for source ``self``, else only its config is read.
        processor: from ``load_processor``.
        pretrained: the model's name; reference models have defaults of their own.
        cache: folder of the sets, default ``calibration`` in the user's cache folder of ``bitquake``.

    Raises:
        CalibrationError: see :func:`find_source` and :class:`Encoder`; or no sample at all can be used; or the cache
            cannot be written.
    """
    from .encoding import Encoder
    from .sources import find_source

    encoder = Encoder(model, processor)
    source = find_source(spec, model.config, pretrained=pretrained, processed=encoder.processed_size)
    relevant = spec.model_dump(mode="json", exclude={"data", "noise", "severity"})
    identity: dict[str, Any] = {"version": VERSION, "spec": relevant, "data": source.identity, "for": encoder.identity}
    encode = encoder.encode
    if spec.source == "self":
        from .captioning import Captioner
        from .prompts import BLOCK_PREFIX, describe

        asked = describe(encoder.model_type, block=pretrained.startswith(BLOCK_PREFIX))
        captioner = Captioner(model, processor.tokenizer, encoder, asked.max_new_tokens)
        identity["captions"] = captioner.identity

        def encode(sample: CalibrationSample) -> CalibrationInputs:
            return encoder.encode(captioner.caption(sample))

    files, image_ids = _fill((cache or default_cache()) / digest(identity), source, spec.samples, encode)
    return CalibrationSet(spec, files, image_ids, getattr(model, "dtype", None))


def default_cache() -> Path:
    """``calibration`` in the user's cache folder of ``bitquake``."""
    from platformdirs import user_cache_path

    return user_cache_path("bitquake", appauthor=False) / "calibration"


def _fill(
    folder: Path, source: Source, n: int, encode: Callable[[CalibrationSample], CalibrationInputs]
) -> tuple[list[Path], frozenset[str]]:
    """Write what the folder lacks of a source's first ``n`` samples that can be used.

    Returns:
        Their files, in order, and the names of their pictures.
    """
    from loguru import logger as eval_logger
    from tqdm import tqdm

    from .cache import read_entry, write_entry

    files: list[Path] = []
    image_ids: set[str] = set()
    left_out: list[str] = []
    # silent where nobody watches: a log needs no bar
    with tqdm(total=n, desc=f"calibration: {source.title}", unit="sample", disable=None) as bar:
        for index in range(len(source)):
            if len(files) == n:
                break
            file = folder / f"{index:06d}.safetensors"
            entry = read_entry(file)
            if entry is None:
                if file.exists():
                    eval_logger.warning(f"calibration: {file} is damaged; it is built again")
                try:
                    sample = source.sample(index)
                    inputs, names = encode(sample), sample.image_ids
                except SampleError as error:
                    left_out.append(str(error))
                    continue
                try:
                    write_entry(file, inputs, names)
                except OSError as error:
                    raise CalibrationError(
                        f"calibration: {file} cannot be written ({error}); make room there, or have the user's cache "
                        "elsewhere (XDG_CACHE_HOME)"
                    ) from error
                image_ids.update(names)
            else:
                image_ids.update(entry.image_ids)
            files.append(file)
            bar.update()
    why = f"{len(left_out)} cannot be used: {'; '.join(left_out[:_SHOWN])}" if left_out else ""
    if not files:
        raise CalibrationError(f"calibration: {source.title} holds no sample that can be used ({why or 'it is empty'})")
    if len(files) < n:
        eval_logger.warning(
            f"calibration: {n} samples were asked for, and {source.title} has {len(files)}; going on with these"
        )
    if left_out:
        eval_logger.warning(f"calibration: of {source.title} {why}")
    return files, frozenset(image_ids)
