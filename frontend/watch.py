"""Notices what a forward writes to its modules: torch.export drops such writes without a word."""

from __future__ import annotations

from typing import Any

from torch import nn

from tilewright.frontend.locate import Locator, describe_value, source_line
from tilewright.ir.core import Loc
from tilewright.ir.errors import TraceError

_TABLES = ("_parameters", "_buffers", "_modules", "training", "_forward_hooks", "_forward_pre_hooks")
_TORCH_OWN = ("_flat_weights", "_flat_weight_refs")  # a recurrent layer's other names for its parameters


def _mark(value: Any) -> Any:
    """Something that differs when ``value`` was exchanged, or when a container lost, gained or exchanged an element.

    torch.export puts equal copies of containers in place of the attributes, so a container is what it holds.
    """
    if isinstance(value, dict):
        return tuple((k, _mark(v)) for k, v in value.items())
    if isinstance(value, (list, tuple)):
        return tuple(map(_mark, value))
    return value if isinstance(value, (int, float, str, bool)) else id(value)


def _marks(module: nn.Module) -> dict[str, Any]:
    return {k: _mark(v) for k, v in module.__dict__.items() if k not in _TABLES + _TORCH_OWN}


class AttributeWatch:
    """Within the block, compares the attributes below ``model`` before and after its forward.

    :meth:`check` afterwards raises TraceError if one was written. (torch.export itself puts them back.)
    """

    def __init__(self, model: nn.Module, locator: Locator) -> None:
        self.model, self.modules, self.locator = model, list(model.modules()), locator
        self.written: dict[tuple[int, str], Loc] = {}
        self.changed: list[TraceError] = []

    def __enter__(self) -> AttributeWatch:
        original = self._original = nn.Module.__setattr__
        self._hooks = (
            self.model.register_forward_pre_hook(self._before),
            self.model.register_forward_hook(self._after),
        )

        def record(module: nn.Module, name: str, value: Any) -> None:
            self.written.setdefault((id(module), name), self.locator.here())
            original(module, name, value)

        nn.Module.__setattr__ = record  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        nn.Module.__setattr__ = self._original  # type: ignore[method-assign]
        for hook in self._hooks:
            hook.remove()

    def _before(self, *_: Any) -> None:
        self.written.clear()
        self.values = [dict(m.__dict__) for m in self.modules]  # keeps what ids stand for alive
        self.marks = [_marks(m) for m in self.modules]

    def _after(self, *_: Any) -> None:
        for module, before in zip(self.modules, self.marks):
            now = _marks(module)
            for name in {**before, **now}:
                if before.get(name, ()) != now.get(name, ()):
                    self.changed.append(self._refusal(module, name))

    def _refusal(self, module: nn.Module, name: str) -> TraceError:
        path = self.locator.paths.get(id(module), "")
        loc = self.written.get((id(module), name), Loc(path))
        line, what = source_line(loc), describe_value(getattr(module, name, None))
        return TraceError(
            f"forward writes the attribute {name} of {path} ({what}){f': {line}' if line else ''}; a compiled function "
            "keeps nothing between calls\n  remedy: return the value, or compute it in __init__",
            loc,
        )

    def check(self) -> None:
        """Raise TraceError if an attribute was written."""
        if self.changed:
            raise self.changed[0]
