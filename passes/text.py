"""Pass text: ``name{key=value key=value}``, in comma lists. Options are the fields of the pass, typed by them."""

from __future__ import annotations

import dataclasses
import json
import re
import types
import typing
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NoReturn

from tilewright.ir import ParseError, PassError
from tilewright.passes.base import Pass
from tilewright.passes.named import NAMED
from tilewright.passes.registry import find

_TOKEN = re.compile(r'\s*(?:(?P<word>[^\s{}\[\],="]+)|(?P<string>"(?:[^"\\]|\\.)*")|(?P<mark>[{}\[\],=]))')
_PLAIN = re.compile(r'[^\s{}\[\],="]+\Z')


@dataclass
class _Token:
    kind: str
    text: str
    at: int


@dataclass
class Item:
    """One entry of a list: a name, its options (text, or a list of texts) with where they stand, where it stands."""

    name: str
    options: dict[str, tuple[str | list[str], int]]
    column: int


class _Reader:
    def __init__(self, text: str) -> None:
        self.text = text
        self.tokens = list(self.split())
        self.at = 0

    def split(self) -> Iterator[_Token]:
        at, end = 0, len(self.text.rstrip())
        while at < end:
            match = _TOKEN.match(self.text, at)
            if match is None or match.lastgroup is None:
                self.fail("unexpected character", at)
            yield _Token(match.lastgroup, match[match.lastgroup], match.start(match.lastgroup))
            at = match.end()

    def fail(self, message: str, at: int) -> NoReturn:
        line = self.text.count("\n", 0, at) + 1
        raise ParseError(message, line, at - (self.text.rfind("\n", 0, at) + 1) + 1, self.text)

    def take(self, *wanted: str) -> _Token:
        """The next token, which must be one of the marks in ``wanted`` (or "word", "string")."""
        token = self.tokens[self.at] if self.at < len(self.tokens) else _Token("end", "", len(self.text))
        if token.kind not in wanted and token.text not in wanted:
            shown = repr(token.text) if token.text else "the end"
            self.fail(f"expected {' or '.join(wanted)}, got {shown}", token.at)
        self.at += 1
        return token

    def sees(self, mark: str) -> bool:
        return self.at < len(self.tokens) and self.tokens[self.at].text == mark

    def items(self) -> list[Item]:
        found = [self.item()]
        while self.at < len(self.tokens):
            self.take(",")
            found.append(self.item())
        return found

    def item(self) -> Item:
        name = self.take("word")
        item = Item(name.text, {}, name.at)
        if self.sees("{"):
            self.take("{")
            while not self.sees("}"):
                key = self.take("word", "}")
                if key.text in item.options:
                    self.fail(f"{key.text!r} is given twice", key.at)
                self.take("=")
                item.options[key.text] = (self.value(), key.at)
            self.take("}")
        return item

    def value(self) -> str | list[str]:
        if not self.sees("["):
            return _unquote(self.take("word", "string"))
        self.take("[")
        found: list[str] = []
        while not self.sees("]"):
            found.append(_unquote(self.take("word", "string")))
            if not self.sees("]"):
                self.take(",")
        self.take("]")
        return found


def _unquote(token: _Token) -> str:
    return str(json.loads(token.text)) if token.kind == "string" else token.text


def parse_items(text: str) -> list[Item]:
    """Split a comma list into names and raw options; raises ParseError with the column."""
    if not text.strip():
        raise ParseError("a pipeline names at least one pass", 1, 1, text)
    return _Reader(text).items()


def make_pass(item: Item, text: str) -> Pass:
    """The pass that an item of ``text`` names; raises PassError for an unknown name, ParseError for a wrong option."""
    reader = _Reader(text)
    try:
        cls = find(item.name)
    except PassError as error:
        raise PassError(f"column {item.column + 1}: {error.message}, {', '.join(NAMED)}") from None
    hints = typing.get_type_hints(cls)
    fields = {f.name: hints[f.name] for f in dataclasses.fields(cls)}
    given: dict[str, Any] = {}
    for key, (raw, at) in item.options.items():
        if key not in fields:
            reader.fail(f"{item.name} has no option {key!r}; it has {', '.join(fields) or 'none'}", at)
        try:
            given[key] = _convert(raw, fields[key])
        except ValueError as error:
            reader.fail(f"option {key} of {item.name}: {error}", at)
    try:
        return cls(**given)
    except (TypeError, ValueError) as error:
        reader.fail(f"{item.name}: {error}", item.column)


def parse_pass(text: str) -> Pass:
    """Read one pass."""
    items = parse_items(text)
    if len(items) != 1:
        raise ParseError("expected one pass", 1, items[1].column + 1, text)
    return make_pass(items[0], text)


def _convert(raw: str | list[str], hint: Any) -> Any:
    """``raw`` as the type of an option; raises ValueError."""
    if isinstance(hint, types.UnionType):
        some = next(a for a in typing.get_args(hint) if a is not type(None))
        return None if raw == "none" else _convert(raw, some)
    if typing.get_origin(hint) is tuple:
        element = typing.get_args(hint)[0]
        return tuple(_convert(r, element) for r in ([raw] if isinstance(raw, str) else raw))
    if isinstance(raw, list):
        raise ValueError("takes one value, got a list")
    if typing.get_origin(hint) is typing.Literal:
        if raw not in typing.get_args(hint):
            raise ValueError(f"expected one of {', '.join(typing.get_args(hint))}, got {raw!r}")
        return raw
    if hint is bool:
        if raw not in ("true", "false"):
            raise ValueError(f"expected true or false, got {raw!r}")
        return raw == "true"
    if hint in (int, float):
        try:
            return hint(raw)
        except ValueError:
            raise ValueError(f"expected {'an integer' if hint is int else 'a number'}, got {raw!r}") from None
    return raw


def print_pass(p: Pass) -> str:
    """The text of a pass; options at their default are left out."""
    shown = [
        f"{f.name}={_value_text(getattr(p, f.name))}" for f in dataclasses.fields(p) if getattr(p, f.name) != f.default
    ]
    return f"{p.name}{{{' '.join(shown)}}}" if shown else p.name


def _value_text(value: Any) -> str:
    if value is None:
        return "none"
    if isinstance(value, tuple):
        return "[" + ",".join(map(_value_text, value)) + "]"
    text = str(value).lower() if isinstance(value, bool) else str(value)
    return text if _PLAIN.match(text) else json.dumps(text)
