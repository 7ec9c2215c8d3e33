"""Block by block through a model: what each block of its vision tower, connector and language model gets as input.

The inputs of a block are not computed from the last block's outputs by rules of our own. The module that loops over the
blocks (``Qwen2VLTextModel``, ``SiglipEncoder``, …) is run again with what it was given, blocks that are done answer
with what was computed for them, and the next block's arguments are caught as they come. So whatever a model does
between its blocks is exact: masks and windows that differ from layer to layer, Qwen3-VL's visual features added after
the first language layers, the Q-Former's two inputs.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, Literal

import torch
from torch import Tensor, nn

from bitquake.model_wrappers.components import ComponentMap, component_map

if TYPE_CHECKING:
    from bitquake.model_wrappers.calibration import CalibrationSet

_BEFORE_THE_BLOCKS = ("project_in",)
"""Linear modules beside a stack that run before it (OPT's); all others run after it."""


@dataclass(frozen=True)
class Block:
    """A module whose Linear layers are quantized together, from the same inputs.

    Attributes:
        name: full name of ``module``.
        module: a block of a stack; a connector's projector or merger; or a Linear that stands by itself.
        component: ``vision``, ``connector`` or ``language``.
        linears: full name -> target Linear in it. ``BlockRunner`` empties this when it goes on, so that a replaced
            layer's weight is freed.
        stack: path of the list that holds the block; "" for a module that stands by itself.
        index: place in that list.
    """

    name: str
    module: nn.Module
    component: str
    linears: dict[str, nn.Linear]
    stack: str = ""
    index: int = 0


@dataclass(frozen=True)
class BlockInput:
    """What one call of a block got, on the CPU; ``sample`` counts through the calibration set.

    Attributes:
        args, kwargs: of the block's ``forward``.
        vision, answer: bool, shape (tokens,), of the language model's sequence; None in other components.
    """

    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    vision: Tensor | None = None
    answer: Tensor | None = None
    sample: int = 0

    def run(self, module: nn.Module) -> Any:
        """Output of ``module`` for this input, on the module's device, without a gradient."""
        device = device_of(module)
        with torch.no_grad():
            return module(*moved(self.args, device), **moved(self.kwargs, device))


def device_of(module: nn.Module) -> torch.device:
    """Device of a module's first parameter or buffer; the CPU for a module without any."""
    for tensor in itertools.chain(module.parameters(), module.buffers()):
        return tensor.device
    return torch.device("cpu")


def moved(value: Any, device: torch.device | str) -> Any:
    """``value`` with every tensor in its tuples, lists and mappings on ``device``."""
    if isinstance(value, Tensor):
        return value.to(device)
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if type(value) in (tuple, list):
        return type(value)(moved(item, device) for item in value)
    return value


def ordered_blocks(model: nn.Module, targets: dict[str, nn.Linear]) -> list[Block]:
    """The blocks that hold ``targets``, in the order in which a forward pass runs them; each target is in one of them.

    Qwen3-VL's deepstack mergers, which read vision blocks half-way, come after the vision tower.

    Raises:
        ValueError: a target outside the vision tower, the connector and the language model.
        ComponentMapError: the architecture has no component map.
    """
    parts = component_map(model)
    blocks: list[Block] = []
    for component in ("vision", "connector", "language"):
        mine = {name: linear for name, linear in targets.items() if parts.component(name) == component}
        stacks = [s.path for part in parts.parts for s in part.stacks if part.component == component]
        stacked: list[Block] = []
        for path in stacks:
            for index in range(parts.depths.get(path, 0)):
                name = f"{path}.{index}"
                linears = {n: linear for n, linear in mine.items() if n.startswith(f"{name}.")}
                if linears:
                    stacked.append(Block(name, model.get_submodule(name), component, linears, path, index))
        held = {name for block in stacked for name in block.linears}
        alone: dict[str, dict[str, nn.Linear]] = {}
        for name, linear in mine.items():
            if name not in held:
                alone.setdefault(_unit(parts, model, component, name), {})[name] = linear
        single = [Block(name, model.get_submodule(name), component, linears) for name, linears in alone.items()]
        first = [block for block in single if block.name.rpartition(".")[2] in _BEFORE_THE_BLOCKS]
        blocks += [*first, *stacked, *(block for block in single if block not in first)]
    found = {name for block in blocks for name in block.linears}
    if missing := [name for name in targets if name not in found]:
        raise ValueError(
            f"{missing[0]}: no block of {type(model).__name__} holds it; only Linear modules of the vision tower, the "
            "connector and the language model can be calibrated"
        )
    return blocks


def _unit(parts: ComponentMap, model: nn.Module, component: str, name: str) -> str:
    """The module that is run for a Linear outside a stack: a whole connector (or one of a list), else the Linear."""
    if component == "connector":
        for path in (path for part in parts.parts if part.component == component for path in part.paths):
            if name.startswith(f"{path}."):
                if isinstance(model.get_submodule(path), nn.ModuleList):
                    return f"{path}.{name[len(path) + 1 :].split('.')[0]}"
                return path
    return name


class _Reached(Exception):
    """Ends a forward pass at the module that was waited for."""


@dataclass
class _Answer:
    """What blocks that are done return in place of running, while ``active``."""

    output: Any = None
    active: bool = False

    def instead_of(self, _: nn.Module, forward: Callable[..., Any]) -> Callable[..., Any]:
        return lambda *args, **kwargs: self.output if self.active else forward(*args, **kwargs)


@contextlib.contextmanager
def forwards_replaced(
    modules: Sequence[nn.Module], wrap: Callable[[nn.Module, Callable[..., Any]], Callable[..., Any]]
) -> Iterator[None]:
    """Each module's ``forward`` is ``wrap(module, forward)`` meanwhile; its hooks stay."""
    before = [module.__dict__.get("forward") for module in modules]  # accelerate puts its own there
    try:
        for module in modules:
            module.forward = wrap(module, module.forward)
        yield
    finally:
        for module, forward in zip(modules, before, strict=True):
            if forward is None:
                module.__dict__.pop("forward", None)
            else:
                module.forward = forward


@contextlib.contextmanager
def without_cache(model: nn.Module) -> Iterator[None]:
    """No key-value cache, by the configurations: a block that is called again would append to it."""
    every: list[Any] = [getattr(module, "config", None) for module in model.modules()]
    configs = {id(config): config for config in every if getattr(config, "use_cache", False)}
    try:
        for config in configs.values():
            config.use_cache = False
        yield
    finally:
        for config in configs.values():
            config.use_cache = True


class BlockRunner:
    """Iterates over blocks with all of their inputs; between two steps the caller quantizes the block.

    A stack costs one forward pass of the model over the calibration set (as far as the stack) and one more of the
    stack itself. In memory are, for each sample, what the looping module got, the inputs of the current block, and the
    inputs of the next one while they are made (``propagate="original"`` makes them before it hands the block out): up
    to three hidden states a sample, on the CPU. Samples are run one by one, so that none is padded.

    ``original`` inputs are those of a model in which nothing is quantized; to need no copy of it, the runner takes the
    stacks from the last to the first. ``quantized`` takes them in forward order, and each block sees what the blocks
    before it, as they then are, make of the samples.

    Args:
        model: in evaluation mode.
        blocks: of ``ordered_blocks``.
        calibration: the samples; iterated once for each stack.
        propagate: which weights the inputs come from.
    """

    def __init__(
        self,
        model: nn.Module,
        blocks: Sequence[Block],
        calibration: CalibrationSet,
        *,
        propagate: Literal["original", "quantized"],
    ) -> None:
        self.model, self.blocks, self.calibration, self.propagate = model, list(blocks), calibration, propagate
        parts = component_map(model)
        language = [s.path for part in parts.parts if part.component == "language" for s in part.stacks]
        self._language = [path.rpartition(".")[0] for path in language if path in parts.depths]

    def __len__(self) -> int:
        return len(self.blocks)

    def __iter__(self) -> Iterator[tuple[Block, list[BlockInput]]]:
        segments: list[list[Block]] = []
        for block in self.blocks:
            if block.stack and segments and segments[-1][0].stack == block.stack:
                segments[-1].append(block)
            else:
                segments.append([block])
        if self.propagate == "original":
            segments.reverse()
        with without_cache(self.model):
            for segment in segments:
                for block, inputs in self._stack(segment) if segment[0].stack else self._alone(segment[0]):
                    yield block, inputs
                    block.linears.clear()

    def _alone(self, block: Block) -> Iterator[tuple[Block, list[BlockInput]]]:
        yield block, self._calls(block.name, block.component)

    def _stack(self, segment: list[Block]) -> Iterator[tuple[Block, list[BlockInput]]]:
        owner = segment[0].stack.rpartition(".")[0]
        calls = self._calls(owner, segment[0].component)
        inputs = self._advance(owner, calls, None, [], segment[0])
        for block, following in zip(segment, [*segment[1:], None], strict=True):
            ahead: list[BlockInput] = []
            if following is not None and self.propagate == "original":
                ahead = self._advance(owner, calls, block, inputs, following)
            yield block, inputs
            if following is not None and self.propagate == "quantized":
                ahead = self._advance(owner, calls, block, inputs, following)
            inputs = ahead

    def _calls(self, name: str, component: str) -> list[BlockInput]:
        """All calls of the module ``name`` in a pass over the calibration set.

        A pass ends at the module itself in the language model, else where the language model begins.
        """
        found: list[BlockInput] = []
        of_sample: list[tuple[Any, Any]] = []

        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            of_sample.append((moved(args, "cpu"), moved(kwargs, "cpu")))
            if component == "language":
                raise _Reached

        def stop(*_: Any) -> None:
            raise _Reached

        watched, device = self.model.get_submodule(name), device_of(self.model)
        with contextlib.ExitStack() as hooks:
            hooks.callback(watched.register_forward_pre_hook(watch, with_kwargs=True).remove)
            for path in self._language if component != "language" else ():
                hooks.callback(self.model.get_submodule(path).register_forward_pre_hook(stop).remove)
            for number, sample in enumerate(self.calibration):
                of_sample.clear()
                with torch.no_grad(), contextlib.suppress(_Reached):
                    self.model(**moved(sample.inputs, device))
                vision, answer = (sample.vision, sample.answer) if component == "language" else (None, None)
                found += [BlockInput(args, kwargs, vision, answer, number) for args, kwargs in of_sample]
        return found

    def _advance(
        self, owner: str, calls: list[BlockInput], done: Block | None, inputs: list[BlockInput], block: Block
    ) -> list[BlockInput]:
        """Inputs of ``block``, where ``inputs`` are those of the last one ``done``; blocks between them are run."""
        loop, modules = self.model.get_submodule(owner), list(self.model.get_submodule(block.stack).children())
        caught: list[BlockInput] = []
        answer = _Answer()

        def watch(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            caught.append(replace(calls[len(caught)], args=moved(args, "cpu"), kwargs=moved(kwargs, "cpu")))
            raise _Reached

        hook = modules[block.index].register_forward_pre_hook(watch, with_kwargs=True)
        try:
            with forwards_replaced(modules[: done.index + 1] if done is not None else [], answer.instead_of):
                for number, call in enumerate(calls):
                    if done is not None:
                        answer.output, answer.active = inputs[number].run(done.module), True
                    with contextlib.suppress(_Reached):
                        call.run(loop)
                    answer.active = False
                    if len(caught) != number + 1:
                        raise RuntimeError(f"{owner} did not run its block {block.name}, which so has no input")
        finally:
            hook.remove()
        return caught
