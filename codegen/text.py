"""The ``name{key=value key=value}`` text that targets and schedules share with passes."""

import re
from collections.abc import Mapping

_CALL = re.compile(r"^\s*([A-Za-z_][\w.-]*)\s*(?:\{([^{}]*)\})?\s*$")


def parse_call(text: str) -> tuple[str, dict[str, str]]:
    """Split ``"cpu{arch=znver5}"`` into ``("cpu", {"arch": "znver5"})``; ValueError says what is malformed."""
    match = _CALL.match(text)
    if match is None:
        raise ValueError(f"malformed text {text!r}; expected name{{key=value key=value}}")
    fields: dict[str, str] = {}
    for item in (match.group(2) or "").split():
        key, equals, value = item.partition("=")
        if not equals or not key or not value:
            raise ValueError(f"malformed item {item!r} in {text!r}; expected key=value")
        if key in fields:
            raise ValueError(f"{key!r} is given twice in {text!r}")
        fields[key] = value
    return match.group(1), fields


def format_call(name: str, fields: Mapping[str, object]) -> str:
    """The text that ``parse_call`` splits into ``name`` and ``fields``; booleans print as ``true`` and ``false``."""
    if not fields:
        return name
    return f"{name}{{{' '.join(f'{key}={_format_value(value)}' for key, value in fields.items())}}}"


def _format_value(value: object) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)
