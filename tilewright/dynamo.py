"""``torch.compile(model, backend="tilewright")``: found through the ``torch_dynamo_backends`` entry point.

Inference only. Parameters are compiled in as constants; sizes that torch makes symbolic become dynamic axes.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import sympy
import torch
from torch import fx, nn

from tilewright.compiler import Compiled, compile, to_numpy
from tilewright.ir import TilewrightError, TraceError


def backend(
    graph: fx.GraphModule, example_inputs: Sequence[Any], options: Mapping[str, Any] | None = None
) -> Callable[..., Any]:
    """Compile a graph that TorchDynamo captured; torch.compile's ``options`` go to :func:`tilewright.compile`.

    Raises TraceError when gradients are asked for, and whatever ``tilewright.compile`` raises.
    """
    if torch.is_grad_enabled() and any(isinstance(x, torch.Tensor) and x.requires_grad for x in example_inputs):
        raise TraceError('backend="tilewright" is for inference; call the model under torch.no_grad()')
    fix_floats(graph)
    signature = Signature(graph, example_inputs)
    try:
        compiled = build(graph, signature, options or {})
    except TilewrightError:
        if not signature.fix_sizes():
            raise
        signature = Signature(graph, example_inputs)
        compiled = build(graph, signature, options or {})
    session = compiled.default_session
    names = [spec.name for spec in session.entry("forward").inputs]

    def run(*args: Any) -> Any:
        tensors = [args[i] for i in signature.tensor_places]
        given = dict(zip(names, map(to_numpy, tensors)))
        outputs = session("forward", **given)
        return tuple(map(to_torch, outputs.values()))

    run.compiled = compiled  # type: ignore[attr-defined]  # keeps the artifact alive
    return run


def build(graph: fx.GraphModule, signature: Signature, options: Mapping[str, Any]) -> Compiled:
    """The graph compiled, its symbolic sizes as dynamic axes."""
    frozen = Frozen(graph, signature)
    with torch._guards.tracing(None):  # our own export must not add guards to the frame that is being compiled
        return compile(frozen, tuple(signature.tensors), dynamic=signature.dynamic or None, **options)


def fix_floats(graph: fx.GraphModule) -> None:
    """Have torch trace once more with the Python floats as constants that ``dynamic=True`` made inputs (a norm's eps)."""
    from torch._dynamo.exc import TensorifyScalarRestartAnalysis
    from torch._dynamo.symbolic_convert import TensorifyState

    numbers = (getattr(n.meta.get("example_value"), "item_memo", None) for n in graph.graph.nodes)
    names = [getattr(number.node._expr, "name", "") for number in numbers if number is not None]
    new = [name for name in names if name and not TensorifyState.should_specialize(name)]
    for name in new:
        TensorifyState.specialize(name)
    if new:
        raise TensorifyScalarRestartAnalysis


def to_torch(array: Any) -> torch.Tensor:
    """An output as a tensor over the same memory."""
    if array.dtype.name == "bfloat16":
        return torch.from_numpy(array.view("int16")).view(torch.bfloat16)
    return torch.from_numpy(array)


class Signature:
    """Which inputs of a captured graph are parameters, which are sizes, and which are tensors of the call."""

    def __init__(self, graph: fx.GraphModule, example_inputs: Sequence[Any]) -> None:
        self.nodes = [n for n in graph.graph.nodes if n.op == "placeholder"]
        self.constants: dict[int, torch.Tensor] = {}
        self.sizes: dict[int, tuple[int, int]] = {}
        self.tensor_places: list[int] = []
        self.tensors: list[torch.Tensor] = []
        for i, value in enumerate(example_inputs):
            if isinstance(value, nn.Parameter) or "_buffers_" in self.nodes[i].name:
                self.constants[i] = value.detach()
            elif isinstance(value, torch.Tensor):
                self.tensor_places.append(i)
                self.tensors.append(value.detach())
        self.dynamic: dict[str, dict[int, str]] = {}
        for i, value in enumerate(example_inputs):
            if not isinstance(value, torch.Tensor):
                self.sizes[i] = self.find_size(i)
        self.name_axes()

    def find_size(self, place: int) -> tuple[int, int]:
        """The (tensor, axis) whose size the integer input ``place`` is."""
        size = self.nodes[place].meta.get("example_value")
        for t, i in enumerate(self.tensor_places):
            for axis, d in enumerate(self.nodes[i].meta["example_value"].shape):
                if isinstance(size, torch.SymInt) and str(d) == str(size):
                    return t, axis
        raise TraceError(f"the graph input {self.nodes[place].name} is a number that no tensor's size gives; pass a tensor")

    def fix_sizes(self) -> bool:
        """Have torch guard on the sizes that must satisfy an equation (``32 * (H // 4)**2 == 512``); False if none do."""
        shapes = [self.nodes[i].meta["example_value"].shape for i in self.tensor_places]
        found = [d for shape in shapes for d in shape if isinstance(d, torch.SymInt) and not d.node.expr.is_number]
        equations = [g.expr for d in found[:1] for g in d.node.shape_env.guards if isinstance(g.expr, sympy.Eq)]
        bound = {symbol for equation in equations for symbol in equation.free_symbols}
        fixed = [int(d) for d in found if d.node.expr.free_symbols & bound]
        return len(fixed) > 0

    def name_axes(self) -> None:
        """Name the symbolic axes of the tensors: equal symbols get one name."""
        names: dict[str, str] = {}
        for t, i in enumerate(self.tensor_places):
            for axis, d in enumerate(self.nodes[i].meta["example_value"].shape):
                if isinstance(d, torch.SymInt) and not d.node.expr.is_number:  # a number: what the model itself asks for
                    name = names.setdefault(str(d), f"D{len(names)}")
                    self.dynamic.setdefault(f"x{t}", {})[axis] = name


class Frozen(nn.Module):
    """The captured graph as a module of its tensor inputs ``x0, x1, ...`` alone."""

    def __init__(self, graph: fx.GraphModule, signature: Signature) -> None:
        super().__init__()
        self.signature = signature
        object.__setattr__(self, "graph", graph)  # no submodule: it compiles its own code when it is first called
        for i, tensor in signature.constants.items():
            self.register_buffer(f"constant{i}", tensor)
        arguments = ", ".join(f"x{t}" for t in range(len(signature.tensors)))
        # torch.export names inputs after forward's parameters, so each call signature needs its own forward.
        space: dict[str, Any] = {}
        exec(f"def forward(self, {arguments}):\n    return self.call([{arguments}])", space)
        self.forward = space["forward"].__get__(self)

    def call(self, tensors: list[torch.Tensor]) -> Any:
        s = self.signature
        places = {i: tensors[t] for t, i in enumerate(s.tensor_places)}
        sizes = {i: tensors[t].shape[axis] for i, (t, axis) in s.sizes.items()}
        constants = {i: getattr(self, f"constant{i}") for i in s.constants}
        every = places | sizes | constants
        return self.graph(*(every[i] for i in range(len(every))))
