"""Which sizes of the inputs vary, and whether the traced graph holds for all of them.

The model is traced once, at one example size. torch notes every question that the code asked about a symbolic size (a
guard); :func:`check` asks them again at other sizes in the declared range. A size that would take another way through
the model is refused, with the line that asked.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import FrameType
from typing import Any

import sympy
import torch
from torch.fx.experimental.symbolic_shapes import ShapeEnv, uninteresting_files
from torch.utils import _pytree as pytree

from tilewright.frontend.locate import is_user_file, source_line
from tilewright.ir.core import Loc
from tilewright.ir.errors import TraceError

HIGH = 65536  # upper end of a range that nobody gave
_LAYOUT = ("contiguous", "stride", "dense", "overlap")  # guards about memory layout: the IR has none


@dataclass(frozen=True)
class DimSpec:
    """One varying size: its name and range.

    ``origin`` says who may narrow the range: of a ``given`` one nobody, of a ``named`` one (the user gave no range)
    what torch's ops need, of an ``auto`` one (the user gave nothing) the model's code as well.
    """

    name: str
    low: int = 1
    high: int = HIGH
    origin: str = "named"

    @classmethod
    def of(cls, given: Any, where: str) -> DimSpec:
        """Read ``"B"`` or ``("B", low, high)``."""
        if isinstance(given, DimSpec):
            return given
        name, *bounds = (given,) if isinstance(given, str) else tuple(given)
        if not isinstance(name, str) or not name.isidentifier() or name != name.upper() or len(bounds) not in (0, 2):
            raise TraceError(f'dynamic: {where} is {given!r}; expected an upper case name such as "B", or ("B", low, high)')
        return cls(name, *bounds, origin="given") if bounds else cls(name)


Axes = Mapping[int, DimSpec]


def leaf_specs(inputs: Mapping[str, Any], dynamic: Mapping[str, Any]) -> list[Axes]:
    """For each leaf of ``inputs`` (in pytree order) its varying axes.

    ``dynamic`` maps an input's name to ``{axis: "B"}``, or for a list or dict of tensors to a list or dict of those.
    """
    unknown = set(dynamic) - set(inputs)
    if unknown:
        raise TraceError(f"dynamic names {sorted(unknown)}, but the inputs are {sorted(inputs)}")
    out: list[Axes] = []
    for path, leaf in pytree.tree_flatten_with_path(dict(inputs))[0]:
        spec: Any = dynamic
        for key in path:
            spec = _child(spec, getattr(key, "key", getattr(key, "idx", getattr(key, "name", None))))
        out.append(_axes(leaf, spec or {}, pytree.keystr(path)))
    return out


def _child(spec: Any, key: Any) -> Any:
    if isinstance(spec, Mapping):
        return spec.get(key)
    return spec[key] if isinstance(spec, (list, tuple)) and isinstance(key, int) and key < len(spec) else None


def _axes(value: Any, spec: Mapping[int, Any], where: str) -> Axes:
    if spec and not isinstance(value, torch.Tensor):
        raise TraceError(f"dynamic: {where} is a {type(value).__name__}, only tensors have sizes that vary")
    rank = value.ndim if isinstance(value, torch.Tensor) else 0
    wrong = [a for a in spec if not isinstance(a, int) or not -rank <= a < rank]
    if wrong:
        raise TraceError(f"dynamic: {where} has rank {rank}, there is no axis {wrong[0]!r}")
    return {a % rank: DimSpec.of(d, f"{where}, axis {a}") for a, d in spec.items()}


def example(leaves: Sequence[Any], specs: Sequence[Axes]) -> list[Any]:
    """The inputs to trace with: varying sizes are made 2 or more, since torch takes 0 and 1 for constants.

    Values are not kept where a size changes; tracing never reads them. Raises TraceError when one name has two sizes.
    """
    sizes: dict[str, int] = {}
    for leaf, axes in zip(leaves, specs):
        for axis, spec in axes.items():
            size = leaf.shape[axis]
            if sizes.setdefault(spec.name, size) != size:
                raise TraceError(f"dimension {spec.name} is {sizes[spec.name]} in one input and {size} in another")
    grown = {name: size if size > 1 else 3 for name, size in sizes.items()}
    return [_resized(leaf, {a: grown[s.name] for a, s in axes.items()}) for leaf, axes in zip(leaves, specs)]


def _resized(leaf: Any, sizes: Mapping[int, int]) -> Any:
    if all(leaf.shape[a] == n for a, n in sizes.items()):
        return leaf
    return leaf.new_zeros([sizes.get(a, n) for a, n in enumerate(leaf.shape)])


def torch_dims(leaves: Sequence[Any], specs: Sequence[Axes]) -> list[Any]:
    """``specs`` in torch's words, one a leaf. AUTO: what the model asks is checked afterwards, by :func:`check`."""
    auto = torch.export.Dim.AUTO
    return [
        {a: auto(min=s.low, max=s.high) for a, s in axes.items()} if isinstance(leaf, torch.Tensor) else None
        for leaf, axes in zip(leaves, specs)
    ]


@dataclass(frozen=True)
class Question:
    """A guard: a condition on sizes that held at the example's sizes, and where it was asked."""

    condition: Any
    loc: Loc
    user: bool  # asked by a line of the user's, not inside of torch

    def renamed(self, names: Mapping[sympy.Symbol, sympy.Symbol]) -> Question:
        return replace(self, condition=self.condition.xreplace(dict(names)))

    def line(self) -> str:
        return source_line(self.loc)


class Questions:
    """Records who asks; torch notes only where in torch."""

    def __init__(self, here: Callable[[], Loc]) -> None:
        self.here = here
        self.asked_at: dict[int, tuple[Any, Loc, str, bool]] = {}

    def __enter__(self) -> Questions:
        original = self._original = ShapeEnv._get_stack_summary

        def record(env: ShapeEnv, *args: Any, **kwargs: Any) -> Any:
            sloc, extra = original(env, *args, **kwargs)
            function, user = _asker(sys._getframe(1))
            self.asked_at[id(sloc)] = (sloc, self.here(), function, user)  # with sloc, so that its id stays its own
            return sloc, extra

        ShapeEnv._get_stack_summary = record  # type: ignore[method-assign]
        return self

    def __exit__(self, *_: object) -> None:
        ShapeEnv._get_stack_summary = self._original  # type: ignore[method-assign]

    def asked(self, env: ShapeEnv) -> list[Question]:
        """The guards of ``env`` that are about values, not about memory layout."""
        out: dict[Any, Question] = {}
        for guard in env.guards:
            _, loc, function, user = self.asked_at.get(id(guard.sloc), (None, Loc(), "", False))
            layout = any(word in function for word in _LAYOUT) or (isinstance(guard.expr, sympy.Ne) and not user)
            if not layout:
                out.setdefault(guard.expr, Question(guard.expr, loc, user))
        return list(out.values())


def _asker(frame: FrameType | None) -> tuple[str, bool]:
    """The innermost function that is not torch's bookkeeping of symbols, and whether it is the user's."""
    while frame is not None and frame.f_code.co_filename in uninteresting_files():
        frame = frame.f_back
    return (frame.f_code.co_name, is_user_file(frame.f_code.co_filename)) if frame is not None else ("", False)


def check(specs: Mapping[str, DimSpec], questions: Iterable[Question]) -> dict[str, DimSpec]:
    """``specs`` by name, narrowed to where every question has the answer it had while tracing.

    Narrows only what nobody asked for (see :class:`DimSpec`); else raises TraceError with the line and a size for which
    the graph would be wrong.
    """
    out = dict(specs)
    for q in questions:
        names = sorted(map(str, q.condition.free_symbols))
        if not names or not set(names) <= set(out):
            continue
        broken = _first_broken(q.condition, names, out)
        while broken is not None:
            narrowed = _narrowed(q, out[names[0]], broken) if len(names) == 1 else None
            if narrowed is None:
                raise _refusal(q, broken)
            out[names[0]] = narrowed
            broken = _first_broken(q.condition, names, out)
    return out


def _holds(condition: Any, at: Mapping[str, int]) -> bool:
    return bool(condition.xreplace({s: sympy.Integer(at[str(s)]) for s in condition.free_symbols}) != sympy.false)


def _samples(spec: DimSpec) -> list[int]:
    known = {spec.low, spec.low + 1, 2, 3, 4, 5, 7, 8, 12, 17, 64, 100, 511, 1024, spec.high - 1, spec.high}
    return sorted(v for v in known if spec.low <= v <= spec.high)


def _first_broken(condition: Any, names: Sequence[str], specs: Mapping[str, DimSpec]) -> dict[str, int] | None:
    """Sizes in range at which the condition is false: all are tried as one, then each alone around three points."""
    grids = {n: _samples(specs[n]) for n in names}
    bases = [{n: g[len(g) * part // 3] for n, g in grids.items()} for part in range(3)]
    points = [
        {n: min(max(v, g[0]), g[-1]) for n, g in grids.items()} for v in sorted({v for g in grids.values() for v in g})
    ]
    points += [base | {n: v} for base in bases for n, grid in grids.items() for v in grid] if len(names) > 1 else []
    return next((at for at in points if not _holds(condition, at)), None)


def _narrowed(q: Question, spec: DimSpec, broken: Mapping[str, int]) -> DimSpec | None:
    """The range without the end at which the answer differs, or None when that is not ours to do."""
    if spec.origin == "given" or (q.user and spec.origin == "named"):
        return None
    good = [v for v in _samples(spec) if _holds(q.condition, {spec.name: v})]
    bad = broken[spec.name]
    if good and bad > good[-1]:
        return replace(spec, high=_edge(q, spec.name, good[-1], bad))
    if good and bad < good[0]:
        return replace(spec, low=_edge(q, spec.name, good[0], bad))
    return None


def _edge(q: Question, name: str, good: int, bad: int) -> int:
    """The last value from ``good`` towards ``bad`` for which the condition holds."""
    while abs(good - bad) > 1:
        middle = (good + bad) // 2
        good, bad = (middle, bad) if _holds(q.condition, {name: middle}) else (good, middle)
    return good


def _refusal(q: Question, broken: Mapping[str, int]) -> TraceError:
    sizes = ", ".join(f"{name} = {size}" for name, size in broken.items())
    line, name = q.line(), next(iter(broken))
    return TraceError(
        f"the graph holds only where {q.condition}, not for {sizes}{f', because of: {line}' if line else ''}"
        f'\n  remedy: write that line for every {name}, give a range where it holds ("{name}", low, high), '
        "or leave the axis static",
        q.loc,
    )
