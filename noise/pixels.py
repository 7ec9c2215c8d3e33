"""From any image to RGB pixels, and the hash that names them."""

from __future__ import annotations

import contextlib
import hashlib
import io
import threading
from collections.abc import Iterator
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageFile, ImageOps

from .errors import ImageError

RGB = npt.NDArray[np.uint8]
_DIGEST = "_bitquake_pixel_hash"


def load_rgb(image: Any) -> RGB:
    """Any image as ``uint8`` RGB pixels, shape (H, W, 3), contiguous; it may share memory with an array given.

    Accepts a PIL image of any mode, the bytes of an image file, or an array: ``uint8`` of shape (H, W), (H, W, 1),
    (H, W, 3) or (H, W, 4), or ``uint16`` of shape (H, W).

    - EXIF orientation is applied (an unreadable EXIF block counts as none).
    - Transparent pixels (RGBA, LA, a palette's or a file's transparency entry) are composited on white.
    - 16-bit grey (``I;16``, ``I``, ``uint16``) is divided by 257 and rounded; ``I`` is first clipped to 0..65535.
    - Float grey (``F``) is taken as 0..255, rounded and clipped; NaN becomes 0.
    - Grey, palette, CMYK, YCbCr and HSV go through Pillow's own conversion, without colour management.
    - Of an animation, the current frame is taken.

    Raises:
        ImageError: nothing there, an empty image, a file that is corrupt or cut short, or a form not listed above.
    """
    if image is None:
        raise ImageError(
            "image: nothing there (None). Check that the row has an image and that its column is named right."
        )
    if isinstance(image, (bytes, bytearray, memoryview)):
        image = _open(bytes(image))
    if isinstance(image, Image.Image):
        return _from_pil(image)
    if isinstance(image, np.ndarray):
        return _from_array(image)
    raise ImageError(
        f"image: expected a PIL image, the bytes of an image file or a uint8 array, got {type(image).__name__}. "
        "Open it first, for example with PIL.Image.open."
    )


def pixel_hash(image: Any) -> str:
    """Hex blake2b (128 bits) of an image's height, width and RGB bytes: equal exactly when the RGB pixels are.

    Args:
        image: anything that :func:`load_rgb` takes.

    Raises:
        ImageError: as :func:`load_rgb`.
    """
    rgb = load_rgb(image)
    digest = hashlib.blake2b(digest_size=16)
    digest.update(f"{rgb.shape[0]}x{rgb.shape[1]}:".encode())
    digest.update(rgb.data)
    return digest.hexdigest()


def as_picture(pixels: RGB, digest: str = "") -> Image.Image:
    """A PIL image of an array's pixels, which it copies, that carries their :func:`pixel_hash` where that is known.

    What Pillow makes from it (a copy, a part, another size) carries none. It must not be drawn on.
    """
    image = Image.fromarray(pixels)
    if digest:
        setattr(image, _DIGEST, digest)
    return image


def known_pixel_hash(image: Image.Image) -> str:
    """The hash that :func:`as_picture` was given; "" where there was none."""
    digest: str = getattr(image, _DIGEST, "")
    return digest


def _open(data: bytes) -> Image.Image:
    if not data:
        raise ImageError("image: the file is empty (0 bytes). Fetch it again.")
    try:
        return Image.open(io.BytesIO(data))
    except Image.DecompressionBombError as error:
        raise ImageError(
            f"image: {len(data)} bytes claim to hold more pixels than Pillow opens ({error}). If the picture is really "
            "that large, scale it down; else remove the row."
        ) from error
    except Exception as error:  # Pillow's decoders raise a dozen unrelated types on hostile bytes
        raise ImageError(
            f"image: {len(data)} bytes that begin with {data[:8]!r} are no image Pillow can open ({error})."
        ) from error


class _Decoding:
    """How many threads decode now, and what ``LOAD_TRUNCATED_IMAGES`` was before the first of them began."""

    lock = threading.Lock()
    threads = 0
    before = False


@contextlib.contextmanager
def _whole_images_only() -> Iterator[None]:
    """Some programs (lmms-eval) tell Pillow to fill up files cut short with grey; here they are errors again."""
    with _Decoding.lock:
        if _Decoding.threads == 0:
            _Decoding.before = ImageFile.LOAD_TRUNCATED_IMAGES
            ImageFile.LOAD_TRUNCATED_IMAGES = False
        _Decoding.threads += 1
    try:
        yield
    finally:
        with _Decoding.lock:
            _Decoding.threads -= 1
            if _Decoding.threads == 0:
                ImageFile.LOAD_TRUNCATED_IMAGES = _Decoding.before


def _from_pil(image: Image.Image) -> RGB:
    what = f"image: {image.format or 'PIL'} image, mode {image.mode}, {image.width}x{image.height} pixels"
    if image.width == 0 or image.height == 0:
        raise ImageError(f"{what}, is empty. Remove the row or fetch the image again.")
    try:
        with _whole_images_only():
            image.load()
    except Exception as error:  # as above: OSError, SyntaxError, struct.error, zlib.error, ...
        raise ImageError(
            f"{what}, does not decode ({error}): the file is corrupt or cut short. Fetch it again."
        ) from error
    with contextlib.suppress(Exception):  # a damaged EXIF block must not cost a picture whose pixels are fine
        image = ImageOps.exif_transpose(image)
    try:
        if image.mode == "F":
            grey = np.nan_to_num(np.asarray(image), nan=0.0, posinf=255.0, neginf=0.0)
            return _grey_to_rgb(np.rint(grey.clip(0, 255)).astype(np.uint8))
        if image.mode == "I" or image.mode.startswith("I;16"):
            return _grey_to_rgb(_from_16_bit(np.asarray(image).astype(np.int64)))
        if image.has_transparency_data:
            image = image.convert("RGBA")
            return _on_white(np.asarray(image))
        return np.array(image.convert("RGB"))
    except (ValueError, OSError) as error:
        raise ImageError(f"{what}, cannot be turned into RGB ({error}). Convert it to RGB first.") from error


def _from_array(array: npt.NDArray[Any]) -> RGB:
    if array.size == 0:
        raise ImageError(f"image: the array is empty, shape {array.shape}.")
    if array.dtype == np.uint16 and array.ndim == 2:
        return _grey_to_rgb(_from_16_bit(array.astype(np.int64)))
    if array.dtype == np.uint8:
        if array.ndim == 2:
            return _grey_to_rgb(array)
        if array.ndim == 3 and array.shape[2] == 1:
            return _grey_to_rgb(array[:, :, 0])
        if array.ndim == 3 and array.shape[2] == 3:
            return np.ascontiguousarray(array)
        if array.ndim == 3 and array.shape[2] == 4:
            return _on_white(array)
    raise ImageError(
        f"image: expected a uint8 array of shape (H, W, 3), got {array.dtype} of shape {array.shape}. "
        "Scale floats to 0..255 and put channels last."
    )


def _grey_to_rgb(grey: npt.NDArray[np.uint8]) -> RGB:
    return np.repeat(grey[:, :, None], 3, axis=2)


def _from_16_bit(grey: npt.NDArray[np.int64]) -> npt.NDArray[np.uint8]:
    return ((grey.clip(0, 65535) + 128) // 257).astype(np.uint8)  # 65535 = 255 * 257


def _on_white(rgba: npt.NDArray[np.uint8]) -> RGB:
    """out = round((rgb * a + 255 * (255 - a)) / 255), in integers."""
    alpha = rgba[:, :, 3:].astype(np.uint32)
    return ((rgba[:, :, :3] * alpha + 255 * (255 - alpha) + 127) // 255).astype(np.uint8)
