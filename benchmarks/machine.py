"""What a benchmark says about the machine it ran on."""

from __future__ import annotations

import platform
from importlib import metadata
from pathlib import Path

import torch


def machine(*packages: str) -> dict[str, str | int]:
    """Processor, torch threads, and the versions of Python and of the packages named."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    if info.exists():
        names = [
            line.split(":", 1)[1].strip() for line in info.read_text().splitlines() if line.startswith("model name")
        ]
        cpu = names[0] if names else cpu
    versions = {name: metadata.version(name) for name in packages}
    return {"cpu": cpu, "threads": torch.get_num_threads(), "python": platform.python_version(), **versions}
