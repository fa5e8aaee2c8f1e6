"""An exported program as an IR module."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import fx
from torch.utils import _pytree as pytree

from tilewright.frontend import aten, aten_hooks
from tilewright.frontend.export import IGNORED, Exported
from tilewright.frontend.locate import source_line
from tilewright.frontend.symbols import FloatSize, NotADim, has_unbacked
from tilewright.frontend.table import LAZY, Context, source_of
from tilewright.ir.builder import Builder
from tilewright.ir.core import Function, Loc, Module, Return, Value, Weight
from tilewright.ir.errors import TilewrightError, TraceError, UnsupportedError, VerifyError
from tilewright.ir.sources import WeightSource

Sources = Mapping[str, WeightSource]
_Kind = torch.export.graph_signature.InputKind
_Out = torch.export.graph_signature.OutputKind
ENTRY = "forward"


def convert(exported: Exported, name: str, sources: Sources, keep: Sequence[str] = ()) -> Module:
    """The module ``name`` with one function ``forward``.

    ``sources`` has the numbers of parameters that are not in memory, by parameter name. ``keep`` names the outputs to
    keep (all when empty); ``meta["outputs"]`` lists the names of those that are returned.
    """
    return _Conversion(exported, name, sources).run(keep)


class _Conversion:
    def __init__(self, exported: Exported, name: str, sources: Sources) -> None:
        self.program, self.locator, self.sources = exported.program, exported.locator, sources
        self.module = Module(name, dims=dict(exported.dims))
        self.function = self.module.add(Function(ENTRY))
        self.names = exported.names
        self.c = Context(self.module, Builder(self.function), exported.symbols)
        self.values: dict[fx.Node, Any] = {}
        self.weights: dict[fx.Node, tuple[str, torch.Tensor]] = {}
        self.shared: dict[int, Weight] = {}

    def run(self, keep: Sequence[str]) -> Module:
        specs = iter(self.program.graph_signature.input_specs)
        for node in self.program.graph.nodes:
            with self.c.b.at(self.locator.node(node)):
                if node.op == "placeholder":
                    self.placeholder(node, next(specs))
                elif node.op == "call_function":
                    self.call(node)
                elif node.op == "get_attr":
                    continue  # a graph inside the graph; the op that runs it is refused
                elif node.op == "output":
                    self.output(node, keep)
                else:
                    raise UnsupportedError(f"a graph node of kind {node.op} ({node.target})", self.c.b.loc)
        drop_dead(self.module)
        return self.module

    # -- inputs ------------------------------------------------------------------------------------------------------

    def placeholder(self, node: fx.Node, spec: Any) -> None:
        value = node.meta.get("val")
        if not isinstance(value, torch.Tensor):
            self.values[node] = value
        elif spec.kind is _Kind.USER_INPUT:
            self.c.node = node
            self.values[node] = self.function.arg(node.name, self.c.type_of(value))
        elif spec.kind in (_Kind.PARAMETER, _Kind.BUFFER, _Kind.CONSTANT_TENSOR):
            self.weights[node] = (spec.target, self._tensor(spec.target))
        else:
            raise UnsupportedError(f"an input of kind {spec.kind.name}: {spec.target}", self.c.b.loc)

    def _tensor(self, target: str) -> torch.Tensor:
        constants = self.program.constants
        return constants[target] if target in constants else self.program.state_dict[target]

    def weight(self, node: fx.Node) -> Weight:
        """The weight of a placeholder, made when it is first used; tensors that are tied are one weight."""
        target, tensor = self.weights[node]
        if id(tensor) not in self.shared:
            self.c.node = node
            source = self.sources.get(target) or source_of(tensor)
            name = self.names.get(id(tensor), target)
            self.shared[id(tensor)] = self.module.weight(name, self.c.type_of(tensor), source)
        return self.shared[id(tensor)]

    # -- operations --------------------------------------------------------------------------------------------------

    def call(self, node: fx.Node) -> None:
        value = node.meta.get("val")
        if node.target in IGNORED or isinstance(value, (torch.SymBool, bool)) or not node.users:
            return
        if has_unbacked(value):
            self.refuse_unbacked(node)
        if isinstance(value, (torch.SymInt, int)):
            self.values[node] = self.size(value)
        elif isinstance(value, (torch.SymFloat, float)):
            self.values[node] = value if isinstance(value, float) else FloatSize(value.node.expr)
        elif getattr(node.target, "__name__", "") == "getitem":
            self.values[node] = self.values[node.args[0]][node.args[1]]
        else:
            self.values[node] = self.lower(node)

    def size(self, value: Any) -> Any:
        try:
            return self.c.symbols.dim(value)
        except NotADim as error:
            raise UnsupportedError(str(error), self.c.b.loc) from None

    def lower(self, node: fx.Node) -> Any:
        entry = aten.entry(node)
        if entry is None:
            self.refuse(node)
        args, kwargs = (pytree.tree_map(self.resolve, x) for x in (list(node.args), dict(node.kwargs)))
        self.c.node = node  # after the arguments: a weight is made when it is first used, in its own name
        if node.target not in LAZY:
            args = aten_hooks.build_lazy(self.c, args)
        try:
            result = entry(self.c, *args, **kwargs)
        except (VerifyError, NotADim) as error:
            self.c.fail(getattr(error, "message", str(error)))
        except TilewrightError:
            raise
        except Exception as error:
            self.c.fail(f"with these arguments is not supported ({type(error).__name__}: {error})")
        self.expect_type(node, result)
        return result

    def resolve(self, arg: Any) -> Any:
        if not isinstance(arg, fx.Node):
            return arg
        return self.weight(arg) if arg in self.weights else self.values[arg]

    def expect_type(self, node: fx.Node, result: Any) -> None:
        """The table must give what torch gives: a slip shows here, not as a wrong number later."""
        if not isinstance(result, Value):
            return
        want = self.c.out
        if result.tensor.rank != want.rank or result.dtype != want.dtype:
            raise UnsupportedError(f"{node.target}: expected {want}, got {result.type}", self.c.b.loc)

    # -- outputs -----------------------------------------------------------------------------------------------------

    def output(self, node: fx.Node, keep: Sequence[str]) -> None:
        names = _output_names(self.program.call_spec.out_spec)
        returned: dict[str, Value] = {}
        user = iter(names)
        for arg, spec in zip(node.args[0], self.program.graph_signature.output_specs):
            if spec.kind is _Out.BUFFER_MUTATION:
                self.refuse_mutation(spec.target, arg)
            if spec.kind is not _Out.USER_OUTPUT:
                continue
            name = next(user)
            value = self.resolve(arg)
            if isinstance(value, aten_hooks.LazyMask):
                value = value.build(self.c)
            if isinstance(value, Value) and (not keep or name in keep):
                while name in returned:  # {"a.b": x, "a": {"b": y}}
                    name += "_"
                returned[name] = value
        if not returned:
            raise TraceError(f"forward returns no tensor{f' named {keep}' if keep else ''}; it returns {names}")
        self.function.append(Return(tuple(returned.values()), loc=Loc(self.locator.root)))
        self.module.meta["outputs"] = json.dumps(list(returned))

    # -- refusals ----------------------------------------------------------------------------------------------------

    def refuse(self, node: fx.Node) -> None:
        loc, line = self.c.b.loc, source_line(self.c.b.loc)
        shown = f"\n  {line}" if line else ""
        if isinstance(node.target, torch._ops.HigherOrderOperator):
            message = f"{node.target} (control flow inside the graph) is not supported; use torch.where"
        elif torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ()):
            message = f"{node.target} draws random numbers; draw them outside of forward and pass them in"
        else:
            what = f"{node.target} on complex numbers" if aten.involves_complex(node) else node.target
            message = f"{what} is not supported; use other operations, or add it to the frontend's ATen table"
        raise UnsupportedError(message + shown, loc)

    def refuse_unbacked(self, node: fx.Node) -> None:
        line, tensor = source_line(self.c.b.loc), isinstance(node.meta["val"], torch.Tensor)
        what = "the result's shape depends on data" if tensor else "reads tensor values while tracing"
        remedy = "use torch.where or a mask, which keep the shape" if tensor else "keep them in tensors"
        raise UnsupportedError(f"{node.target}: {what}{f': {line}' if line else ''}\n  remedy: {remedy}", self.c.b.loc)

    def refuse_mutation(self, target: str, arg: Any) -> None:
        loc = self.locator.node(arg) if isinstance(arg, fx.Node) else Loc()
        line = source_line(loc)
        raise TraceError(
            f"forward writes the buffer {target}{f': {line}' if line else ''}; a compiled function keeps nothing "
            "between calls\n  remedy: return the new value and pass it in again",
            loc,
        )


def drop_dead(module: Module) -> None:
    """Leave out operations and weights that no result needs."""
    for op in reversed(module.functions[ENTRY].body[:-1]):
        if not any(r.users for r in op.results):
            op.drop()
    module.weights = {n: w for n, w in module.weights.items() if w.users}


def _output_names(spec: Any) -> list[str]:
    """Names of the leaves of what forward returns: fields and keys joined by dots, ``output`` for a single tensor."""
    leaves = pytree.tree_unflatten(list(range(spec.num_leaves)), spec)
    paths = [path for path, _ in pytree.tree_flatten_with_path(leaves)[0]]
    return [".".join(_key(k) for k in path) or "output" for path in paths]


def _key(key: Any) -> str:
    for attribute in ("key", "name", "idx"):
        if hasattr(key, attribute):
            found = getattr(key, attribute)
            return f"output_{found}" if attribute == "idx" else str(found)
    return str(key)
