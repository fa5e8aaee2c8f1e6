"""Module -> text. The inverse of :mod:`tilewright.ir.parser`."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable
from typing import Any

from tilewright.ir.core import UNKNOWN, Field, Function, Loc, Module, Op, State, Value, Weight
from tilewright.ir.types import DType, dim_text

_PLAIN = re.compile(r"[A-Za-z0-9_.$/-]+\Z")
_PLAIN_LOCAL = re.compile(r"[0-9]*[A-Za-z_.][A-Za-z0-9_.]*\Z")  # only digits would be a result's number


def print_module(module: Module, locations: bool = True) -> str:
    """The text of a module; it parses back to an equal one (data of weights apart)."""
    lines = [f"module {_global(module.name)} {{"]
    lines += [f"  dim {name} : {low}..{high}" for name, (low, high) in module.dims.items()]
    lines += [f"  meta {json.dumps(k)} = {json.dumps(v)}" for k, v in module.meta.items()]
    lines += [f"  weight {_global(w.name)} : {w.type}" for w in module.weights.values()]
    lines += [f"  state {_global(s.name)} : {s.type}" for s in module.states.values()]
    for function in module.functions.values():
        lines += [f"  {line}" for line in print_function(function, locations).splitlines()]
    return "\n".join([*lines, "}"]) + "\n"


def print_function(function: Function, locations: bool = True) -> str:
    """The text of one function."""
    names = Names(function)
    args = ", ".join(f"{names[a]}: {a.type}" for a in function.args)
    body = [f"  {print_op(op, names, locations)}" for op in function.body]
    return "\n".join([f"{function.kind} {_global(function.name)}({args}) {{", *body, "}"])


def canonical(kernel: Function) -> str:
    """The workload key of a kernel: its text with arguments numbered, its name and locations left out."""
    names = Names(kernel, arguments=False)
    args = ", ".join(f"{names[a]}: {a.type}" for a in kernel.args)
    return "\n".join([f"({args})", *(print_op(op, names, locations=False) for op in kernel.body)])


class Names:
    """Text names of the values of a function: arguments by name, results numbered in order."""

    def __init__(self, function: Function, arguments: bool = True) -> None:
        self.names: dict[Value, str] = {}
        for i, arg in enumerate(function.args):
            self.names[arg] = _local(arg.name or f"arg{i}") if arguments else f"%a{i}"
        results = (r for op in function.body for r in op.results)
        self.names |= {r: f"%{i}" for i, r in enumerate(results)}

    def __getitem__(self, value: Value | None) -> str:
        if value is None:
            return "none"
        if isinstance(value, (Weight, State)):
            return _global(value.name)
        return self.names.get(value) or f"%?{value.name or ''}"


def print_op(op: Op, names: Names, locations: bool = True) -> str:
    """One line for one operation."""
    parts = [f"{op.name}({_operands(op, names)})"]
    attrs = [f"{f.name}={attr_text(getattr(op, f.name))}" for f in op.fields if _shown(f, getattr(op, f.name, None))]
    if attrs:
        parts.append("{" + " ".join(attrs) + "}")
    if op.results:
        parts.append(": " + ", ".join(map(str, op.result_types)))
        parts[0] = ", ".join(names[r] for r in op.results) + " = " + parts[0]
    if locations and op.loc != UNKNOWN:
        parts.append(loc_text(op.loc))
    return " ".join(parts)


def _shown(field: Field, value: Any) -> bool:
    if field.is_operand or field.kind == "tuple[Type, ...]":
        return False
    return not (type(value) is type(field.default) and value == field.default)


def _operands(op: Op, names: Names) -> str:
    texts: list[str] = []
    for f in op.fields:
        value = getattr(op, f.name)
        if f.kind == "variadic":
            texts.append("[" + ", ".join(names[v] for v in value) + "]")
        elif f.is_operand:
            texts.append(names[value])
    while texts and texts[-1] == "none":
        texts.pop()
    return ", ".join(texts)


def attr_text(value: Any) -> str:
    """The text of an attribute's value."""
    if isinstance(value, bool):
        return "true" if value else "false"
    if isinstance(value, DType):
        return value.value
    if isinstance(value, str):
        return json.dumps(value)
    if isinstance(value, tuple):
        return "[" + ", ".join(map(attr_text, value)) + "]"
    if hasattr(value, "free_symbols"):
        text = dim_text(value)
        return text if value.is_Symbol else json.dumps(text)
    return repr(value)


def loc_text(loc: Loc) -> str:
    place = f" {json.dumps(loc.file)}:{loc.line or 0}" if loc.file is not None else ""
    return f"loc({json.dumps(loc.module)}{place})"


def _global(name: str) -> str:
    return f"@{name}" if _PLAIN.match(name) else "@" + json.dumps(name)


def _local(name: str) -> str:
    return f"%{name}" if _PLAIN_LOCAL.match(name) else "%" + json.dumps(name)


def around(function: Function, op: Op, context: int = 2) -> str:
    """The lines around ``op`` with the op's own marked, for error messages."""
    names, at = Names(function), function.body.index(op)
    rows: Iterable[tuple[int, Op]] = list(enumerate(function.body))[max(0, at - context) : at + context + 1]
    return "\n".join(f"  {'->' if i == at else '  '} {print_op(o, names)}" for i, o in rows)
