"""Which line of the user's code, and which module of the model, something comes from."""

from __future__ import annotations

import re
import site
import sys
import traceback
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

import torch
from torch import fx, nn
from torch.fx.proxy import TracerBase

from tilewright.ir.core import Loc

_FRAME = re.compile(r'File "(?P<file>[^"]+)", line (?P<line>\d+), in ')
_OURS = str(Path(__file__).resolve().parent)
_TORCH = str(Path(torch.__file__).resolve().parent)
_STDLIB = str(Path(re.__file__).resolve().parents[1])
_PACKAGES = sorted({p for p in (*sys.path, *site.getsitepackages()) if p.endswith("-packages")}, key=len, reverse=True)


def is_user_file(file: str) -> bool:
    """Whether ``file`` is neither torch, nor Python's library, nor this package, nor generated code."""
    if file.startswith("<") or (not file.startswith("/") and file.startswith("torch")):
        return False
    inside_library = file.startswith(_STDLIB) and "-packages" not in file
    return not (inside_library or file.startswith((_OURS, _TORCH)) or "/sympy/" in file)


def short(file: str) -> str:
    """``file`` without what only says where Python packages, or the working folder, are on this machine."""
    for prefix in (*_PACKAGES, str(Path.cwd())):
        if file.startswith(prefix + "/"):
            return file[len(prefix) + 1 :]
    return file


class Locator:
    """Finds locations for a model: in a stack, in an exception, in a node of a traced graph."""

    def __init__(self, model: nn.Module) -> None:
        self.root = type(model).__name__
        self.paths = {id(m): name or self.root for name, m in model.named_modules()}

    def here(self) -> Loc:
        """The location that runs now: frames of the caller, up to the start of tracing."""
        return self._of_frames(_callers(sys._getframe(1)))

    def error(self, error: BaseException) -> Loc:
        """The location that raised ``error``."""
        return self._of_frames(reversed(list(_frames(error.__traceback__))))

    def _of_frames(self, frames: Iterable[tuple[FrameType, int]]) -> Loc:
        """The first user line and the first module among ``frames``, innermost first."""
        module, file, line = "", None, None
        for frame, number in frames:
            name = frame.f_code.co_filename
            if file is None and is_user_file(name):
                file, line = short(name), number
            owner = frame.f_locals.get("self")
            if isinstance(owner, nn.Module) and id(owner) in self.paths:
                module = self.paths[id(owner)]
                break
        return Loc(module, file, line) if module else Loc(self.root)

    def node(self, node: fx.Node) -> Loc:
        """The location of a node, from what torch.export noted on it."""
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        path = str(stack[-1][0]) if stack and not str(stack[-1][0]).startswith("_empty") else ""
        for file, line in reversed(_FRAME.findall(node.meta.get("stack_trace") or "")):
            if is_user_file(file):
                return Loc(path or self.root, short(file), int(line))
        return Loc(path or self.root)


@contextmanager
def whole_stacks() -> Iterator[None]:
    """Have torch note on each node the user's whole stack, not only the lines inside of ``forward`` methods."""
    original = TracerBase._filter_traceback_frames

    def keep(_: TracerBase, stack: traceback.StackSummary) -> traceback.StackSummary:
        start = next((i for i, f in enumerate(stack) if f.name == "forward"), len(stack))
        return traceback.StackSummary.from_list([f for f in stack[start:] if is_user_file(f.filename)])

    TracerBase._filter_traceback_frames = keep  # type: ignore[method-assign]
    try:
        yield
    finally:
        TracerBase._filter_traceback_frames = original  # type: ignore[method-assign]


def _frames(trace: TracebackType | None) -> Iterator[tuple[FrameType, int]]:
    while trace is not None:
        yield trace.tb_frame, trace.tb_lineno
        trace = trace.tb_next


def _callers(frame: FrameType | None) -> Iterator[tuple[FrameType, int]]:
    while frame is not None:
        yield frame, frame.f_lineno
        frame = frame.f_back


def source_line(loc: Loc) -> str:
    """The text of the line ``loc`` points at, or nothing when it cannot be read."""
    import linecache

    if loc.file is None or loc.line is None:
        return ""
    for folder in ("", f"{Path.cwd()}/", *(p + "/" for p in _PACKAGES)):
        text = linecache.getline(folder + loc.file, loc.line).strip()
        if text:
            return text
    return ""


def describe_value(value: Any) -> str:
    """The kind of an attribute's value, for a message."""
    return "tensor" if isinstance(value, torch.Tensor) else type(value).__name__
