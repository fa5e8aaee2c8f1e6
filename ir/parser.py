"""Text -> module. Every error is a ParseError with line and column."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import lru_cache
from importlib import resources
from typing import Any

from lark import Lark, Token, Tree
from lark.exceptions import UnexpectedInput
from lark.lexer import PatternStr

from tilewright.ir.compare import same_type
from tilewright.ir.core import UNKNOWN, Function, Loc, Module, Op, Return, Value
from tilewright.ir.errors import ParseError, VerifyError
from tilewright.ir.kv_type import parse_kv_type
from tilewright.ir.types import DType, KVType, TensorType, Type, parse_dim, sym


@lru_cache(maxsize=1)
def _grammar() -> Lark:
    text = resources.files("tilewright.ir").joinpath("text.lark").read_text()
    return Lark(text, parser="lalr", maybe_placeholders=True)


def parse_module(text: str) -> Module:
    """Read a module; raises ParseError for text that is not well formed or breaks an operation's rules."""
    import tilewright.ir.ops  # noqa: F401  (fills the registry)

    try:
        tree = _grammar().parse(text)
    except UnexpectedInput as error:
        line, column = max(error.line, 1), max(error.column, 1)
        raise ParseError(_expected(error), line, column, text) from None
    return _Reader(text).module(tree)


def parse_type(text: str) -> Type:
    """Read one type; raises ValueError."""
    if text.startswith("tensor<") and text.endswith(">"):
        *parts, last = _split_dims(text[7:-1])
        dims = tuple(map(parse_dim, parts))
        if any(isinstance(d, int) and d < 0 for d in dims):
            raise ValueError(f"sizes are not negative, got {text}")
        return TensorType(dims, DType(last))
    if text.startswith("kv<") and text.endswith(">"):
        return parse_kv_type(text)
    raise ValueError(f"not a type: {text!r}")


def _split_dims(text: str) -> list[str]:
    """``BxSx(max(S, 2))xf32`` -> its parts: an ``x`` outside of parentheses separates."""
    parts, depth = [""], 0
    for char in text:
        depth += (char == "(") - (char == ")")
        if char == "x" and depth == 0:
            parts.append("")
        else:
            parts[-1] += char
    return parts


def _expected(error: UnexpectedInput) -> str:
    token = getattr(error, "token", None)
    found = repr(str(token)) if token is not None and token.type != "$END" else "the end of the text"
    if token is None:
        found = f"the character {getattr(error, 'char', '?')!r}"
    wanted = next((w for k in ("accepts", "expected", "allowed") if (w := getattr(error, k, None))), ())
    return f"did not expect {found}; expected one of {', '.join(sorted(map(_terminal, wanted)))}"


def _terminal(name: str) -> str:
    """``"{"`` for LBRACE, ``"func", "kernel"`` for FUNCTION, else the name."""
    pattern = next((t.pattern for t in _grammar().terminals if t.name == name), None)
    if isinstance(pattern, PatternStr):
        return json.dumps(pattern.value)
    return '"func", "kernel"' if name == "FUNCTION" else name


class _Reader:
    """Builds the module from the tree, keeping the text for messages."""

    def __init__(self, text: str) -> None:
        self.text = text
        self.result = Module("")

    def fail(self, message: str, token: Token) -> ParseError:
        return ParseError(message, token.line or 1, token.column or 1, self.text)

    def guarded(self, token: Token, make: Callable[[], Any]) -> Any:
        """Run ``make``; what it finds wrong becomes a ParseError at ``token``."""
        try:
            return make()
        except VerifyError as error:
            raise self.fail(error.message, token) from None
        except (ValueError, KeyError, TypeError, AttributeError, IndexError, OverflowError, ZeroDivisionError) as error:
            raise self.fail(str(error), token) from None

    def module(self, tree: Tree[Token]) -> Module:
        name, *items = tree.children
        self.result.name = self.name(_token(name))
        for item in items:
            assert isinstance(item, Tree)
            getattr(self, item.data)(*item.children)
        return self.result

    def name(self, token: Token) -> str:
        body = str(token)[1:]
        return str(self.guarded(token, lambda: json.loads(body))) if body.startswith('"') else body

    def string(self, token: Token) -> str:
        return str(self.guarded(token, lambda: json.loads(str(token))))

    def integer(self, token: Token) -> int:
        return int(self.guarded(token, lambda: int(token)))

    def read_type(self, token: Token) -> Type:
        found: Type = self.guarded(token, lambda: parse_type(str(token)))
        return found

    def dim(self, name: Token, low: Token, high: Token) -> None:
        self.guarded(name, lambda: sym(str(name)))
        bounds = self.integer(low), self.integer(high)
        if str(name) in self.result.dims or bounds[0] > bounds[1]:
            raise self.fail(f"dim {name} is declared twice or has no size in {low}..{high}", name)
        self.result.dims[str(name)] = bounds

    def meta(self, key: Token, value: Token) -> None:
        if self.string(key) in self.result.meta:
            raise self.fail(f"meta {key} is given twice", key)
        self.result.meta[self.string(key)] = self.string(value)

    def weight(self, name: Token, text: Token) -> None:
        t = self.read_type(text)
        if not isinstance(t, TensorType):
            raise self.fail("a weight is a tensor", text)
        self.guarded(name, lambda: self.result.weight(self.name(name), t))

    def state(self, name: Token, text: Token) -> None:
        t = self.read_type(text)
        if not isinstance(t, KVType):
            raise self.fail("a state is a kv cache", text)
        self.guarded(name, lambda: self.result.state(self.name(name), t))

    def function(self, kind: Token, name: Token, *rest: Any) -> None:
        function = Function(self.name(name), kind=str(kind))
        self.guarded(name, lambda: self.result.add(function))
        scope: dict[str, Value] = {}
        for item in rest:
            if item is None:
                continue
            if item.data == "argument":
                local, text = item.children
                if str(local) in scope:
                    raise self.fail(f"{local} is defined twice", local)
                scope[str(local)] = function.arg(self.name(local), self.read_type(text))
            else:
                self.op(function, scope, item)
        if not function.body or not isinstance(function.body[-1], Return):
            raise self.fail(f"function {name} does not end in a return", name)

    def op(self, function: Function, scope: dict[str, Value], tree: Tree[Token]) -> None:
        results, name, operands, attributes, types, loc = tree.children
        name = _token(name)
        kind = Op.registry.get(str(name))
        if kind is None:
            raise self.fail(f"unknown operation {name}; see the list of operations in docs/ir.md", name)
        if function.body and isinstance(function.body[-1], Return):
            raise self.fail("an operation after the return", name)
        stated = [self.read_type(_token(t)) for t in _children(types)]
        fields = self.operand_fields(kind, scope, operands, name) | self.attributes(kind, attributes, stated)
        made: Op = self.guarded(name, lambda: kind(loc=self.location(loc), **fields))
        self.check_types(made, stated, name)
        function.append(made)
        locals_ = [_token(t) for t in _children(results)]
        if len(locals_) != len(made.results):
            raise self.fail(f"{name} has {len(made.results)} results, {len(locals_)} are named", name)
        for local, value in zip(locals_, made.results):
            if str(local) in scope:
                raise self.fail(f"{local} is defined twice", local)
            scope[str(local)] = value

    def check_types(self, op: Op, stated: list[Type], name: Token) -> None:
        got = op.result_types
        if len(stated) != len(got) or not all(map(same_type, stated, got)):
            shown = ", ".join(map(str, got)) or "none"
            says = ", ".join(map(str, stated)) or "none"
            raise self.fail(f"{name} has result types {shown}; the text says {says}", name)

    def operand_fields(self, kind: type[Op], scope: dict[str, Value], tree: Any, at: Token) -> dict[str, Any]:
        given = list(_children(tree))
        declared = [f for f in kind.fields if f.is_operand]
        if len(given) > len(declared):
            raise self.fail(f"{kind.name} takes {len(declared)} operands, got {len(given)}", at)
        fields: dict[str, Any] = {}
        for f, item in zip(declared, given):
            if f.kind == "variadic":
                if not isinstance(item, Tree):
                    raise self.fail(f"{kind.name}: {f.name} is a list in [ ]", _token(item))
                inner = [c for t in _children(item) for c in _children(t)]
                if any(isinstance(c, Tree) for c in inner):
                    raise self.fail(f"{kind.name}: {f.name} is a list of values, not of lists", at)
                fields[f.name] = tuple(self.value(scope, c, optional=False) for c in inner)
            elif isinstance(item, Tree):
                raise self.fail(f"{kind.name}: {f.name} is one value, not a list", at)
            else:
                fields[f.name] = self.value(scope, item, optional=f.kind == "optional")
        return fields

    def value(self, scope: dict[str, Value], token: Token, optional: bool) -> Value | None:
        if token.type == "NONE":
            if not optional:
                raise self.fail("this operand is not optional", token)
            return None
        if token.type == "LOCAL":
            found = scope.get(str(token))
        else:
            name = self.name(token)
            found = self.result.weights.get(name) or self.result.states.get(name)
        if found is None:
            raise self.fail(f"{token} is not defined here", token)
        return found

    def attributes(self, kind: type[Op], tree: Any, types: list[Type]) -> dict[str, Any]:
        kinds = {f.name: f.kind for f in kind.fields if not f.is_operand}
        fields: dict[str, Any] = {n: tuple(types) for n, k in kinds.items() if k == "tuple[Type, ...]"}
        for item in _children(tree):
            key, value = item.children
            if str(key) not in kinds or str(key) in fields:
                raise self.fail(f"{kind.name} has no attribute {key} here; it has {', '.join(kinds) or 'none'}", key)
            fields[str(key)] = self.attribute(kinds[str(key)], value, key)
        return fields

    def attribute(self, kind: str, value: Any, at: Token) -> Any:
        if kind.startswith("tuple["):
            if not isinstance(value, Tree):
                raise self.fail(f"{at} is a list in [ ]", at)
            inner = kind[len("tuple[") : -len(", ...]")]
            return tuple(self.attribute(inner, v, at) for v in value.children if v is not None)
        if isinstance(value, Tree):
            raise self.fail(f"{at} is not a list", at)
        return self.guarded(value, lambda: _read(kind, value))

    def location(self, tree: Any) -> Loc:
        if tree is None:
            return UNKNOWN
        module, file, line = tree.children
        if file is None:
            return Loc(self.string(module))
        return Loc(self.string(module), self.string(file), self.integer(line) or None)


def _read(kind: str, token: Token) -> Any:
    text = str(token)
    if token.type == "STRING":
        if kind == "str":
            return json.loads(text)
        if kind == "Dim":
            return parse_dim(json.loads(text))
    if kind == "Dim" and token.type in ("INT", "NAME"):
        return parse_dim(text)
    if kind == "DType" and token.type == "NAME":
        return DType(text)
    if "bool" in kind and text in ("true", "false"):
        return text == "true"
    if "int" in kind and token.type == "INT":
        return int(text)
    if "float" in kind and token.type in ("INT", "FLOAT"):
        return float(text)
    raise ValueError(f"{text} is not a {kind}")


def _children(tree: Any) -> list[Any]:
    return [] if tree is None else [c for c in tree.children if c is not None]


def _token(item: Any) -> Token:
    assert isinstance(item, Token)
    return item
