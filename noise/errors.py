"""The two errors that this room raises; both are ``ValueError``s and name what, where, what was got, and the fix."""

from __future__ import annotations


class NoiseError(ValueError):
    """A noise was asked for in a way that cannot be honoured: name, severity, seed, mode, version or key."""


class ImageError(ValueError):
    """An image is missing, empty, or does not decode to pixels."""
