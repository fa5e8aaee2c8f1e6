"""Notices what a forward writes to its modules: torch.export drops such writes without a word."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewright.frontend.locate import Locator, describe_value
from tilewright.ir.core import Loc
from tilewright.ir.errors import TraceError

_TABLES = ("_parameters", "_buffers", "_modules", "training")


def _mark(value: Any) -> Any:
    """Something that differs when ``value`` was exchanged, or when a container lost, gained or exchanged an element.

    torch.export puts equal copies of containers in place of the attributes, so a container is what it holds.
    """
    if isinstance(value, dict):
        return tuple((k, _mark(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_mark, value))
    return value if isinstance(value, (int, float, str, bool)) else id(value)


def _snapshot(module: nn.Module) -> dict[str, Any]:
    return {k: v for k, v in module.__dict__.items() if k not in _TABLES}


def _contents(values: dict[str, Any]) -> dict[str, Any]:
    return {k: list(v) if isinstance(v, list) else dict(v) for k, v in values.items() if isinstance(v, (list, dict))}


class AttributeWatch:
    """Within the block, records attribute writes below ``model``; puts the attributes back at the end.

    :meth:`check` afterwards raises TraceError for the first one.
    """

    def __init__(self, model: nn.Module, locator: Locator) -> None:
        self.modules, self.locator = list(model.modules()), locator
        self.written: dict[tuple[int, str], Loc] = {}
        self.changed: list[tuple[str, str, Any, Loc]] = []

    def __enter__(self) -> AttributeWatch:
        self.before = [_snapshot(m) for m in self.modules]
        self.contents = [_contents(values) for values in self.before]
        self.marks = [{k: _mark(v) for k, v in values.items()} for values in self.before]
        original = self._original = nn.Module.__setattr__

        def record(module: nn.Module, name: str, value: Any) -> None:
            self.written.setdefault((id(module), name), self.locator.here())
            original(module, name, value)

        nn.Module.__setattr__ = record  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        nn.Module.__setattr__ = self._original  # type: ignore[method-assign]
        for module, before, contents, marks in zip(self.modules, self.before, self.contents, self.marks):
            now = _snapshot(module)
            for name in [n for n in {**before, **now} if _mark(now.get(n)) != marks.get(n, _mark(None))]:
                self._note(module, name, now.get(name))
                self._restore(module, name, before, contents)

    def _note(self, module: nn.Module, name: str, value: Any) -> None:
        path = self.locator.paths.get(id(module), "")
        loc = self.written.get((id(module), name), Loc(path))
        self.changed.append((path, name, value, loc))

    @staticmethod
    def _restore(module: nn.Module, name: str, before: dict[str, Any], contents: dict[str, Any]) -> None:
        if name not in before:
            module.__dict__.pop(name, None)
            return
        module.__dict__[name] = before[name]
        if isinstance(before[name], list):
            before[name][:] = contents[name]
        elif isinstance(before[name], dict):
            before[name].clear()
            before[name].update(contents[name])

    def check(self) -> None:
        """Raise TraceError if an attribute was written."""
        for path, name, value, loc in self.changed:
            what = describe_value(value)
            raise TraceError(
                f"forward writes the attribute {path}.{name} ({what}); a compiled function keeps nothing between calls"
                "\n  remedy: return the value, or compute it in __init__",
                loc,
            )
