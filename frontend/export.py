"""``nn.Module`` + inputs -> a functional ATen graph with named sizes, or a refusal that says why."""

from __future__ import annotations

import inspect
import io
import logging
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from dataclasses import dataclass
from typing import Any

import sympy
import torch
from torch import fx, nn
from torch.utils import _pytree as pytree

from tilewright.frontend import dynamic as dyn
from tilewright.frontend.aten import KNOWN
from tilewright.frontend.explain import explain
from tilewright.frontend.inplace import make_plain_writes_functional
from tilewright.frontend.locate import Locator, whole_stacks
from tilewright.frontend.pretrained import is_pretrained
from tilewright.frontend.symbols import SymbolTable
from tilewright.frontend.watch import AttributeWatch
from tilewright.ir.core import Loc
from tilewright.ir.errors import TilewrightError, TraceError
from tilewright.ir.types import sym

aten = torch.ops.aten
IGNORED = {  # checks and hints; what they say is in the shapes already
    aten._assert_tensor_metadata.default,
    aten._assert_scalar.default,
    aten._assert_async.msg,
    aten.sym_constrain_range.default,
    aten.sym_constrain_range_for_size.default,
}


@dataclass
class Exported:
    """A traced model: the program, its sizes' names and ranges, and where its nodes come from."""

    program: torch.export.ExportedProgram
    symbols: SymbolTable
    dims: dict[str, tuple[int, int]]
    locator: Locator
    names: dict[int, str]  # the first name of each parameter, by its identity: tied ones have several


def bind(model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """``kwargs`` in the order of forward's signature, and all inputs by name; raises TraceError if they don't fit."""
    signature = inspect.signature(model.forward)
    try:
        bound = signature.bind(*args, **kwargs).arguments
    except TypeError as error:
        raise TraceError(f"{type(model).__name__}.forward{signature}: {error}", Loc(type(model).__name__)) from None
    named: dict[str, Any] = {}
    for name, value in bound.items():
        if signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD:
            named |= value
        else:
            named[name] = value
    return {k: v for k, v in named.items() if k in kwargs}, named


def export(
    model: nn.Module, args: Sequence[Any], kwargs: Mapping[str, Any], dynamic: Mapping[str, Any] | None = None
) -> Exported:
    """Trace ``model`` in eval mode. ``dynamic``: see :func:`tilewright.frontend.dynamic.leaf_specs`.

    Raises TraceError for a model that cannot be traced faithfully.
    """
    locator = Locator(model)
    kwargs, named = bind(model, args, kwargs)
    specs = dyn.leaf_specs(named, dynamic or {})
    leaves, tree = pytree.tree_flatten((tuple(args), dict(kwargs)))
    leaves = _distinct(dyn.example(leaves, specs))
    names, name_tree = pytree.tree_flatten(named)
    sizes = pytree.tree_unflatten(dyn.torch_dims(names, specs), name_tree)
    args, kwargs = pytree.tree_unflatten(leaves, tree)

    watch = AttributeWatch(model, locator)
    questions = dyn.Questions(locator.here)
    hooks = _hooks(model, packed="position_ids" in named)
    try:
        with _evaluating(model), _quiet(), torch.no_grad(), hooks, whole_stacks(), questions, watch:
            program = torch.export.export(model, args, kwargs, dynamic_shapes=sizes, strict=False)
            program = _functional(program)
    except Exception as error:
        watch.check()
        raise explain(error, locator) from (None if isinstance(error, TilewrightError) else error)
    watch.check()
    names = {id(p): name for name, p in model.named_parameters()}
    return Exported(program, *_name_sizes(program, specs, questions), locator, names)


def _distinct(leaves: Sequence[Any]) -> list[Any]:
    """The leaves with a tensor that is given twice copied: torch.export would take both arguments for one."""
    seen: set[int] = set()
    out = []
    for leaf in leaves:
        repeated = isinstance(leaf, torch.Tensor) and id(leaf) in seen
        seen.add(id(leaf))
        out.append(leaf.clone() if repeated else leaf)
    return out


def _hooks(model: nn.Module, packed: bool) -> Any:
    """The hooks for transformers' models; other models must not pay for importing transformers."""
    if not any(map(is_pretrained, model.modules())):
        return nullcontext()
    from tilewright.frontend import hooks

    return hooks.installed(model, packed)


@contextmanager
def _evaluating(model: nn.Module) -> Iterator[None]:
    """Eval mode, and afterwards each module's own mode."""
    before = [(m, m.training) for m in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in before:
            module.training = training


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what torch logs, warns of, and prints to stderr when it fails: its cause is in the error already."""
    level = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stderr(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)


def _functional(program: torch.export.ExportedProgram) -> torch.export.ExportedProgram:
    """Without writes in place, and without ops that the table lacks but torch can take apart.

    The pass that does this traces again, so it is skipped where there is nothing to do.
    """
    make_plain_writes_functional(program.graph)
    if not any(map(_needs_work, program.graph.nodes)):
        return program
    parts = {op: f for op, f in torch.export.default_decompositions().items() if op not in KNOWN}
    return program.run_decompositions(parts)


def _needs_work(node: fx.Node) -> bool:
    if node.op == "get_attr":
        return True
    if node.op != "call_function" or node.target in IGNORED or node.target in KNOWN:
        return False
    if isinstance(node.meta.get("val"), (torch.SymInt, torch.SymFloat, torch.SymBool, int, float)):
        return False
    return isinstance(node.target, (torch._ops.OpOverload, torch._ops.HigherOrderOperator))


def _inputs(program: torch.export.ExportedProgram) -> list[fx.Node]:
    """The placeholders of the user's inputs, in order."""
    kinds = torch.export.graph_signature.InputKind
    nodes = [n for n in program.graph.nodes if n.op == "placeholder"]
    return [n for n, s in zip(nodes, program.graph_signature.input_specs) if s.kind is kinds.USER_INPUT]


def _name_sizes(
    program: torch.export.ExportedProgram, specs: Sequence[dyn.Axes], questions: dyn.Questions
) -> tuple[SymbolTable, dict[str, tuple[int, int]]]:
    """The user's names for torch's symbols, and their ranges, checked."""
    names: dict[sympy.Symbol, sympy.Symbol] = {}
    found: dict[str, dyn.DimSpec] = {}
    asked: list[dyn.Question] = []
    for node, axes in zip(_inputs(program), specs):
        for axis, spec in axes.items():
            size = node.meta["val"].shape[axis]
            asked = asked or questions.asked(node.meta["val"].fake_mode.shape_env)
            expr = size.node.expr if isinstance(size, torch.SymInt) else sympy.Integer(size)
            if not expr.is_Symbol:
                raise _fixed(spec, node.name, axis, expr, asked)
            if str(names.setdefault(expr, sym(spec.name))) != spec.name:
                raise TraceError(f"dimensions {names[expr]} and {spec.name} are always equal: give them one name")
            found[spec.name] = _tighter(found.get(spec.name), spec)
    named = [q.renamed(names) for q in asked]
    checked = dyn.check(found, named)
    ranges = {n: (s.low, s.high) for n, s in checked.items()}
    return SymbolTable(names, ranges), ranges


def _tighter(a: dyn.DimSpec | None, b: dyn.DimSpec) -> dyn.DimSpec:
    """The range that both inputs of one name allow."""
    if a is None:
        return b
    given = "given" if "given" in (a.origin, b.origin) else a.origin
    return dyn.DimSpec(a.name, max(a.low, b.low), min(a.high, b.high), given)


def _fixed(spec: dyn.DimSpec, name: str, axis: int, size: Any, asked: Sequence[dyn.Question]) -> TraceError:
    """Why a size that should vary came out as a number, or tied to another."""
    cause = next((q for q in asked if isinstance(q.condition, sympy.Eq)), None)
    line = cause.line() if cause else ""
    return TraceError(
        f"dimension {spec.name} ({name}, axis {axis}) can only be {size}{f', because of: {line}' if line else ''}"
        f"\n  remedy: write that line for every {spec.name}, or leave the axis static",
        cause.loc if cause else None,
    )
