"""``bitquake train``: quantization-aware training (GRACE) and LoRA adapters; run again to go on."""

from __future__ import annotations

import argparse
import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

if TYPE_CHECKING:
    from bitquake.model_wrappers.training.run import Trained

_OWN = ("command", "method", "config", "out", "set", "minutes", "threads")
"""Options that are no keys of a configuration."""


def add_parser(commands: argparse._SubParsersAction[argparse.ArgumentParser]) -> None:
    """Put ``train`` and its methods into the command line."""
    parser = commands.add_parser("train", help="train a quantized model (GRACE), or an adapter; run again to go on")
    methods = parser.add_subparsers(dest="method", required=True, metavar="METHOD")
    qat = methods.add_parser("qat", help="quantization-aware training, with a teacher as GRACE does it")
    lora = methods.add_parser("lora", help="a LoRA adapter, on a base at full precision or quantized")
    for one in (qat, lora):
        one.add_argument("--config", type=Path, metavar="FILE.yaml", help="keys of the training; options replace them")
        one.add_argument("--out", type=Path, required=True, metavar="DIR", help="folder of this training alone")
        one.add_argument("--pretrained", metavar="MODEL", help="what is trained: a hub name, a folder, bitquake/…")
        one.add_argument(
            "--data", nargs="+", metavar="NAME[=SHARE]",
            help="task families with a train split, or folders of pictures and conversations",
        )  # fmt: skip
    qat.add_argument("--teacher", metavar="MODEL", help="(default: the model itself, at full precision)")
    qat.add_argument("--bits", type=int, help="2 to 8, or 16: the full-precision twin")
    qat.add_argument("--group-size", metavar="N", help="a number, or channel (default 128)")
    lora.add_argument("--quant", metavar="SPEC", help="quantization of the base (default: full precision)")
    lora.add_argument("--rank", type=int, help="(default 16)")
    for one in (qat, lora):
        one.add_argument("--steps", type=int, help="of the optimiser")
        one.add_argument("--epochs", type=float, help="instead of --steps")
        one.add_argument("--batch-size", type=int, help="of one process (default 8)")
        one.add_argument("--rate", type=float, help="highest learning rate")
        one.add_argument("--precision", choices=("bf16", "fp32"), help="of the forward pass (default bf16)")
        one.add_argument("--seed", type=int, help="(default 0)")
        one.add_argument("--set", nargs="+", default=[], metavar="KEY=VALUE", help="any other key, its value as YAML")
        one.add_argument("--minutes", type=float, help="stop after this time; run again to go on")
        one.add_argument("--threads", type=int, help="torch threads (default: torch's)")


def run(options: argparse.Namespace) -> int:
    """Train; the exit code is 0, 1 (stopped before the end), or 2 (the input cannot be used)."""
    from bitquake.model_wrappers.training.config import load_training, read_values

    values, lines = read_values(options.config) if options.config is not None else ({}, {})
    if values.setdefault("method", options.method) != options.method:
        raise ValueError(f"{options.config}: method is {values['method']!r}; run `bitquake train {values['method']}`")
    given = _given(options)
    for one, other in (("steps", "epochs"), ("epochs", "steps")):
        if one in given:
            values.pop(other, None)
    kept = {place: line for place, line in lines.items() if place and place[0] not in given}
    where = str(options.config) if options.config is not None else f"train {options.method}"
    config = load_training({**values, **given}, where, kept)

    import torch

    from bitquake.model_wrappers.training.loop import TrainingError
    from bitquake.model_wrappers.training.run import run_training

    if options.threads:
        torch.set_num_threads(options.threads)
    try:
        done = run_training(config, options.out, minutes=options.minutes)
    except TrainingError as error:
        print(f"bitquake train: {error}", file=sys.stderr)
        return 1
    if int(os.environ.get("RANK", "0")) == 0:  # of the processes of `accelerate launch`
        print(summary(done))
    return 0


def summary(done: Trained) -> str:
    """What was made, and how it is evaluated."""
    arguments = {"pretrained": done.pretrained, "quant": done.quant, "adapter": done.adapter}
    written = ",".join(f"{key}={value}" for key, value in arguments.items() if value)
    return f"{done.adapter or done.pretrained}\nlmms-eval --model bitquake_hf --model_args {written} --tasks …"


def _given(options: argparse.Namespace) -> dict[str, Any]:
    """Keys of the configuration that the command line sets."""
    given = {key: value for key, value in vars(options).items() if key not in _OWN and value is not None}
    if "data" in given:
        given["data"] = [_share(text) for text in given["data"]]
    if str(given.get("group_size", "")).isdigit():
        given["group_size"] = int(given["group_size"])
    for text in options.set:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"--set: expected KEY=VALUE, got {text!r}")
        if key in given:
            raise ValueError(f"--set: {key} is given twice")
        try:
            given[key] = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise ValueError(f"--set: {text!r} has no readable value") from error
    return given


def _share(text: str) -> dict[str, Any]:
    name, equals, share = text.rpartition("=")
    return {"data": name, "share": share} if equals else {"data": text}
