"""The table of methods: who chooses the numbers of a quantized weight. One more method is one file and one row.

A method gives, for each weight, sources of the arrays that its format stores. What needs data runs ``@forward`` over them
once (see ``stream.py``); layers it does not reach, such as tables of embeddings, fall back to what needs none.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import ClassVar

import numpy as np

from tilewright.ir import Computation, Module, Op, PartSource, Value, Weight, WeightSource
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.clip import clipped
from tilewright.passes.calibration.data import OPTION, Array, calibration, rows
from tilewright.passes.calibration.gptq import Gptq
from tilewright.passes.calibration.spill import Spill
from tilewright.passes.calibration.statistics import hessian, moments, sample
from tilewright.passes.calibration.stream import Layer, stream
from tilewright.passes.formats import Format, round_to_nearest

Layers = Mapping[Op, Sequence[Weight]]
"""The linear layers that are to be quantized and their weights, all of one format."""
Sources = dict[Weight, list[WeightSource]]
Make = Callable[[Array], Sequence[Array]]


@dataclass(frozen=True)
class Settings:
    """What the text of the pass may say about methods."""

    damping: float = 0.01
    order: bool = True
    clip: bool = False


@dataclass(frozen=True)
class Method(ABC):
    """Chooses the numbers of weights of one ``format``."""

    format: Format
    settings: Settings = Settings()
    needs_data: ClassVar[bool] = False
    paper: ClassVar[str] = ""

    @abstractmethod
    def make(self, name: str) -> Make:
        """How the arrays of a weight that no calibration reached are computed, when the artifact is written."""

    def arrays(self, weight: Array, inputs: Sequence[Array], name: str) -> Sequence[Array]:
        """The arrays of one weight ``[N, K]`` whose layer gets ``inputs``, now."""
        return self.make(name)(weight)

    def sources(self, module: Module, ctx: PassContext, layers: Layers) -> Sources:
        """Where the arrays of each weight come from that calibration reached. Raises PassError for missing data."""
        return {}


class Nearest(Method):
    """The nearest code, in ranges that hold every number. No data."""

    def make(self, name: str) -> Make:
        return partial(round_to_nearest, self.format, name=name)


class Clip(Method):
    """Ranges that clip the largest numbers where that lowers the error. With data, errors count as inputs are large."""

    paper = "arXiv:2308.13137"

    def make(self, name: str) -> Make:
        return partial(clipped, self.format, name=name)

    def arrays(self, weight: Array, inputs: Sequence[Array], name: str) -> Sequence[Array]:
        return clipped(self.format, weight, moments(inputs).square, name)

    def sources(self, module: Module, ctx: PassContext, layers: Layers) -> Sources:
        if ctx.options.get(OPTION) is None:
            ctx.note("clip without calibration data: all inputs count the same")
            return {}
        function, batches = calibration(module, ctx, "clip")
        found: Sources = {}

        def visit(op: Layer, inputs: Sequence[Array]) -> None:
            matters = moments(inputs).square
            for weight in layers[op]:
                found.setdefault(weight, self.later(weight, matters))

        stream(function, batches, visit, [op for op in layers if op.parent is function])
        return found

    def later(self, weight: Weight, importance: Array) -> list[WeightSource]:
        """The arrays, computed when the artifact is written."""
        assert weight.source is not None, "it was loaded during calibration"
        n, k = map(int, weight.shape)
        work = Computation(weight.source, partial(clipped, self.format, importance=importance, name=weight.name))
        return [PartSource(work, i) for i in range(len(self.format.parts(weight.name, n, k)))]


class Compensated(Method):
    """Rounds column by column; later columns make up for the errors of earlier ones."""

    needs_data = True
    paper = "arXiv:2210.17323"

    def make(self, name: str) -> Make:
        return partial(round_to_nearest, self.format, name=name)

    @property
    def gptq(self) -> Gptq:
        return Gptq(self.format, self.settings.damping, self.settings.order, self.settings.clip)

    def arrays(self, weight: Array, inputs: Sequence[Array], name: str) -> Sequence[Array]:
        return self.gptq.round(weight, self.gptq.prepare(hessian(inputs), name), name)[0]

    def sources(self, module: Module, ctx: PassContext, layers: Layers) -> Sources:
        function, batches = calibration(module, ctx, "gptq")
        work = _Compensation(self.gptq, layers)
        stream(function, batches, work.visit, [op for op in layers if op.parent is function])
        if work.errors:
            worst = max(work.errors, key=lambda name: work.errors[name])
            ctx.note(
                f"gptq over {sum(map(rows, batches))} tokens: outputs of layers differ by "
                f"{np.mean(list(work.errors.values())):.2%}, most at @{worst}: {work.errors[worst]:.2%}"
            )
        return work.found


class _Compensation:
    """Quantizes the weights of layers as the stream comes to them; the stream goes on with what came out."""

    def __init__(self, method: Gptq, layers: Layers) -> None:
        self.method, self.layers, self.spill = method, layers, Spill()
        self.found: Sources = {}
        self.errors: dict[str, float] = {}

    def visit(self, op: Layer, inputs: Sequence[Array]) -> dict[Value, Array]:
        weights = [w for w in self.layers[op] if w not in self.found]  # one that layers share is the first one's
        prepared = self.method.prepare(hessian(inputs), weights[0].name) if weights else None
        changes: dict[Value, Array] = {}
        for weight in weights:
            assert prepared is not None
            n, k = map(int, weight.shape)
            array = weight.load()
            arrays, changes[weight] = self.method.round(array, prepared, weight.name)
            self.errors[weight.name] = relative_error(array, changes[weight], sample(inputs, 256))
            types = list(self.method.format.parts(weight.name, n, k).values())
            self.found[weight] = list(self.spill.put_all(arrays, types))
            weight.release()
        return changes


def relative_error(weight: Array, other: Array, x: Array) -> float:
    """``|x (weight - other)^T| / |x weight^T|`` over the rows of x f32 ``[rows, K]``; a block of the weight at a time."""
    error = size = 0.0
    step = max(1, (1 << 22) // weight.shape[1])
    for start in range(0, len(weight), step):
        a = weight[start : start + step].astype(np.float32)
        error += float(np.square(x @ (a - other[start : start + step]).T).sum())
        size += float(np.square(x @ a.T).sum())
    return float(np.sqrt(error / size)) if size else 0.0


METHODS: dict[str, type[Method]] = {"rtn": Nearest, "clip": Clip, "gptq": Compensated}
"""What the option ``method`` of the pass ``quantize`` may be."""
