"""Bitquake: what quantization does to the accuracy and the reliability of vision-language models."""

from __future__ import annotations

__version__ = "0.1.0"
