"""Strict reading of JSON that comes from a file: every refusal names the field, what was expected and what is there."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

from tilewright.runtime.errors import DamagedArtifactError, ManifestError


def parse(text: str | bytes, where: str) -> dict[str, Any]:
    """The object in ``text``; refuses repeated keys, NaN, and anything that is not an object."""
    try:
        data = json.loads(text, object_pairs_hook=_no_repeats, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise DamagedArtifactError(f"{where}: not readable as JSON ({error}); it was edited or damaged after it was "
                                   "saved. Compile or copy the artifact again") from error
    if not isinstance(data, dict):
        raise ManifestError(f"{where}: expected an object, got {_kind(data)}")
    return data


def _no_repeats(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    data = dict(pairs)
    if len(data) != len(pairs):
        raise ValueError("a key is repeated")
    return data


def _no_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a JSON number")


def _kind(value: Any) -> str:
    names = {dict: "an object", list: "a list", bool: "a truth value", type(None): "null"}
    return names.get(type(value)) or repr(value)[:60]


@dataclass(frozen=True)
class Node:
    """A value of a JSON document and the path that leads to it."""

    value: Any
    where: str

    def error(self, why: str) -> ManifestError:
        return ManifestError(f"{self.where}: {why}")

    def __contains__(self, key: str) -> bool:
        return isinstance(self.value, dict) and key in self.value

    def __getitem__(self, key: str) -> Node:
        if key not in self._object():
            raise self.error(f'the field "{key}" is missing')
        return Node(self.value[key], f"{self.where}: {key}" if self.where.endswith(".json") else f"{self.where}.{key}")

    def _object(self) -> dict[str, Any]:
        if not isinstance(self.value, dict):
            raise self.error(f"expected an object, got {_kind(self.value)}")
        return self.value

    def fields(self, *names: str, optional: tuple[str, ...] = ()) -> None:
        """Requires the fields ``names``, allows ``optional``, refuses all others."""
        data = self._object()
        missing = [name for name in names if name not in data]
        unknown = [name for name in data if name not in (*names, *optional)]
        if missing:
            raise self.error(f"the fields {missing} are missing")
        if unknown:
            raise self.error(f"the fields {unknown} are unknown; known: {[*names, *optional]}")

    def members(self, pattern: re.Pattern[str] | None = None) -> Iterator[tuple[str, Node]]:
        for key in self._object():
            if pattern and not pattern.fullmatch(key):
                raise self.error(f"{key!r} is not a valid name")
            yield key, self[key]

    def items(self) -> list[Node]:
        if not isinstance(self.value, list):
            raise self.error(f"expected a list, got {_kind(self.value)}")
        return [Node(item, f"{self.where}[{i}]") for i, item in enumerate(self.value)]

    def integer(self, low: int, high: int) -> int:
        value = self.value
        if not isinstance(value, int) or isinstance(value, bool) or not low <= value <= high:
            raise self.error(f"expected an integer from {low} to {high}, got {_kind(value)}")
        return value

    def number(self) -> float:
        if not isinstance(self.value, int | float) or isinstance(self.value, bool) or not math.isfinite(self.value):
            raise self.error(f"expected a number, got {_kind(self.value)}")
        return float(self.value)

    def truth(self) -> bool:
        if not isinstance(self.value, bool):
            raise self.error(f"expected true or false, got {_kind(self.value)}")
        return self.value

    def string(self, pattern: re.Pattern[str] | None = None) -> str:
        if not isinstance(self.value, str):
            raise self.error(f"expected a string, got {_kind(self.value)}")
        if pattern and not pattern.fullmatch(self.value):
            raise self.error(f"{self.value!r} does not have the form {pattern.pattern}")
        return self.value

    def choice(self, options: Iterable[str]) -> str:
        known = list(options)
        if self.value not in known:
            raise self.error(f"expected one of {known}, got {_kind(self.value)}")
        return str(self.value)

    def unique(self, names: Iterable[str]) -> set[str]:
        """``names`` as a set; refuses a repeated one."""
        seen: set[str] = set()
        for name in names:
            if name in seen:
                raise self.error(f"the name {name!r} is there twice")
            seen.add(name)
        return seen
