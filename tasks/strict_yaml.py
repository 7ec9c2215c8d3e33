"""YAML that holds data and nothing else: no tags that run code, no aliases, no key given twice."""

from __future__ import annotations

from typing import Any

import yaml


class _StrictLoader(yaml.SafeLoader):
    """SafeLoader that refuses aliases (they can explode) and repeated keys (the last would win silently)."""

    def compose_node(self, parent: yaml.nodes.Node | None, index: Any) -> yaml.nodes.Node | None:
        if self.check_event(yaml.events.AliasEvent):
            event = self.peek_event()  # type: ignore[no-untyped-call]
            raise yaml.constructor.ConstructorError(None, None, "aliases (*name) are not allowed", event.start_mark)
        return super().compose_node(parent, index)

    def construct_mapping(self, node: yaml.nodes.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen: set[str] = set()
        for key, _ in node.value:
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} given twice", key.start_mark)
            if isinstance(key.value, str):
                seen.add(key.value)
        return super().construct_mapping(node, deep=deep)


def load_strict(text: str) -> Any:
    """The data in a YAML text.

    Raises:
        yaml.YAMLError: not YAML, a tag (``!function``, ``!!python/…``), an alias or a repeated key; the message names
            line and column where there is one.
    """
    return yaml.load(text, Loader=_StrictLoader)  # noqa: S506 - a SafeLoader


class _TaskLoader(yaml.SafeLoader):
    """Reads an expanded task file without importing what its ``!function`` tags name: they become their text."""


def _as_text(loader: yaml.SafeLoader, node: yaml.nodes.ScalarNode) -> Any:
    return loader.construct_scalar(node)


_TaskLoader.add_constructor("!function", _as_text)


def load_task_yaml(text: str) -> Any:
    """The data in an lmms-eval task file; ``!function a.b`` reads as the text ``a.b``."""
    return yaml.load(text, Loader=_TaskLoader)  # noqa: S506 - a SafeLoader
