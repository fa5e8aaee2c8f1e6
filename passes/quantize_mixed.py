"""``nn.linear(x, @a)``, ``nn.linear(y, @b)`` -> each with the scheme that its harm to the results is worth in bytes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from glob import escape
from typing import ClassVar, Literal

from tilewright.ir import (
    Builder,
    DType,
    Function,
    Module,
    Op,
    PassError,
    Return,
    Rewriter,
    TensorType,
    Value,
    Weight,
    interpret,
)
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.budget import Choice, Evolution, Unit, greedy, size
from tilewright.passes.calibration.data import Array, Batch, calibration
from tilewright.passes.calibration.outputs import Outputs, first
from tilewright.passes.calibration.spill import Spill, SpilledSource
from tilewright.passes.calibration.stream import LAYERS, Stream
from tilewright.passes.formats import Format
from tilewright.passes.quantize import Quantize
from tilewright.passes.selection import check_patterns
from tilewright.passes.weights import place

KEEP = "keep"
CANDIDATES = ("w8a16", "w4a16 group=32", "w3a16 group=32")


@dataclass(frozen=True)
class QuantizeMixed(Pass):
    """A scheme for each linear layer, so that all of them together take no more than ``bytes``, or ``bits`` a weight.

    ``candidates`` are texts such as ``w8a16``, ``"w4a16 group=32"`` or ``keep``, which leaves a weight as it is; without
    any they are eight, four and three bits, the latter two in groups of 32. Each layer is given each candidate alone, and
    the harm to the results on ``tokens`` tokens of the calibration data is measured: the KL divergence of a language
    model's next tokens, the squared error of others. ``greedy`` then takes the steps that gain most for each byte;
    ``evolve`` (EvoPress, arXiv:2410.14649) goes on from there with ``generations`` of ``offspring``, whole models measured
    on growing parts of the data. What is chosen depends on ``seed`` alone and stands in the report's notes. ``method`` is
    that of ``quantize``; ``skip`` and ``only`` are patterns of weight names.
    """

    name: ClassVar[str] = "quantize-mixed"
    bytes: int | None = None
    bits: float | None = None
    candidates: tuple[str, ...] = ()
    search: Literal["greedy", "evolve"] = "greedy"
    method: Literal["rtn", "clip", "gptq"] = "rtn"
    tokens: int = 1024
    generations: int = 20
    offspring: int = 16
    seed: int = 0
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for candidates that do not exist, and for counts and budgets that make no sense."""
        assert self.ways
        given = [b for b in (self.bytes, self.bits) if b is not None]
        if len(given) > 1 or any(not b > 0 for b in given):
            raise PassError(f"{self.name} takes a budget above 0: bytes or bits, got bytes={self.bytes} bits={self.bits}")
        if min(self.tokens, self.generations, self.offspring) < 1:
            raise PassError(f"{self.name}: tokens, generations and offspring are 1 or more")

    @property
    def texts(self) -> tuple[str, ...]:
        """The candidates."""
        return self.candidates or CANDIDATES

    @property
    def ways(self) -> list[Quantize | None]:
        """The pass that each candidate stands for; None keeps the weight."""
        return [None if text == KEEP else self.way(text) for text in self.texts]

    def way(self, text: str) -> Quantize:
        from tilewright.passes.text import parse_pass

        found = parse_pass(f"quantize{{scheme={text} method={self.method}}}")
        assert isinstance(found, Quantize)
        return replace(found, skip=self.skip, only=self.only)

    def run(self, module: Module, ctx: PassContext) -> bool:
        check_patterns(self.name, module, self.skip, self.only)
        function, batches = calibration(module, ctx, self.name)
        if self.bytes is None and self.bits is None:
            raise PassError(f"{self.name} needs a budget: bytes=..., of all its layers, or bits=... a weight")
        layers = self.layers(module, function, ctx)
        if not layers:
            ctx.note("there is no layer to quantize")
            return False
        work = _Mixing(self, module, function, first(function, batches, self.tokens), layers)
        budget = self.budget(work)
        units = work.units()
        choice, harm = work.search(units, budget)
        self.report(ctx, work, units, choice, harm, budget)
        for i, way in enumerate(self.ways):
            names = tuple(escape(w.name) for ws, c in zip(work.weights, choice) if c == i for w in ws)
            if way is not None and names:
                replace(way, only=names, skip=()).run(module, ctx)
        return True

    def layers(self, module: Module, function: Function, ctx: PassContext) -> dict[tuple[Weight, ...], Op]:
        """The weights that are to be quantized together, and the first layer that has them."""
        rw = Rewriter(module, pattern=self.name)
        found: dict[tuple[Weight, ...], Op] = {}
        for op in function.walk(*LAYERS):
            weights = Quantize(skip=self.skip, only=self.only).chosen(op, rw)
            if weights is not None:
                found.setdefault(tuple(weights.values()), op)
        ctx.take(rw)
        return found

    def budget(self, work: _Mixing) -> int:
        """Bytes of all layers. Raises PassError when the smallest candidates take more."""
        elements = sum(int(w.tensor.elements) for ws in work.weights for w in ws)
        budget = self.bytes if self.bytes is not None else int((self.bits or 0) * elements / 8)
        least = sum(min(sizes.values()) for sizes in work.sizes)
        if least > budget:
            raise PassError(
                f"{self.name}: {budget} bytes are too few: with the smallest of {', '.join(self.texts)} the layers "
                f"take {least} bytes, {8 * least / elements:.2f} bits a weight"
            )
        return budget

    def report(
        self, ctx: PassContext, work: _Mixing, units: Sequence[Unit], choice: Choice, harm: float | None, budget: int
    ) -> None:
        for weights, unit, way in zip(work.weights, units, choice):
            names = " and ".join(f"@{w.name}" for w in weights)
            ctx.note(f"{names}: {self.texts[way]}, {unit.bytes[way]} bytes, {work.outputs.unit} {unit.harm[way]:.3g}")
        whole = f"; of all together: {harm:.3g}" if harm is not None else ""
        ctx.note(f"{size(units, choice)} bytes of {budget}; sum of {work.outputs.unit} a layer "
                 f"{sum(u.harm[w] for u, w in zip(units, choice)):.3g}{whole}")  # fmt: skip


@dataclass
class _Mixing:
    """The measurements of one module. ``sizes``: for each unit the bytes of each candidate that fits it."""

    mixed: QuantizeMixed
    module: Module
    function: Function
    batches: Sequence[Batch]
    layers: Mapping[tuple[Weight, ...], Op]
    stored: dict[tuple[Weight, int], list[SpilledSource]] = field(default_factory=dict)
    spill: Spill = field(default_factory=Spill)

    def __post_init__(self) -> None:
        self.weights = list(self.layers)
        self.formats = [None if way is None else way.format for way in self.mixed.ways]
        self.sizes = [self.fitting(weights) for weights in self.weights]

    def fitting(self, weights: Sequence[Weight]) -> dict[int, int]:
        """Bytes of each candidate that fits; raises PassError when none does."""
        found: dict[int, int] = {}
        for i, format in enumerate(self.formats):
            if format is None:
                found[i] = sum(int(w.tensor.bytes) for w in weights)
            elif not any(format.unfit(*map(int, w.shape)) for w in weights):
                found[i] = sum(int(t.bytes) for w in weights for t in kinds(format, w).values())
        if not found:
            names = ", ".join(f"@{w.name} {w.type}" for w in weights)
            raise PassError(f"no candidate of {self.mixed.name} fits {names}; add keep, or name it in skip")
        return found

    def units(self) -> list[Unit]:
        """Bytes and harm of each candidate for each unit, measured in one run of the function as it is and its forks."""
        self.outputs = Outputs.of(self.module, self.function, self.batches)
        harms: list[dict[int, float]] = [{} for _ in self.weights]
        where = {op: i for i, op in enumerate(self.layers.values())}
        run = Stream(self.function, self.batches, [*where, self.function.terminator])
        for layer in run:
            unit = where[layer]
            for i in self.sizes[unit]:
                harms[unit][i] = self.harm(run, unit, i, run.values(layer.x))
        return [Unit(sizes, harm) for sizes, harm in zip(self.sizes, harms)]

    def harm(self, run: Stream, unit: int, i: int, inputs: Sequence[Array]) -> float:
        """What happens to the results when a unit has candidate ``i``; its numbers are kept for later."""
        way = self.mixed.ways[i]
        if way is None:
            return 0.0
        for weight in self.weights[unit]:
            arrays = way.chooser.arrays(weight.load(), inputs, weight.name)
            self.stored[weight, i] = self.spill.put_all(arrays, list(kinds(way.format, weight).values()))
            weight.release()
        return self.outputs.distance(run.fork(self.replaced({unit: i})))

    def replaced(self, ways: Mapping[int, int]) -> dict[Value, partial[Array]]:
        """What the weights of units are with the candidates ``ways``."""
        return {
            weight: partial(meaning, format, weight, self.stored[weight, i])
            for unit, i in ways.items()
            for weight in self.weights[unit]
            if (format := self.formats[i]) is not None
        }

    def search(self, units: Sequence[Unit], budget: int) -> tuple[Choice, float | None]:
        """The choice, and its harm where it was measured."""
        start = greedy(units, budget)
        if self.mixed.search == "greedy":
            return start, None
        parts = [first(self.function, self.batches, self.mixed.tokens // 4), self.batches]
        outputs = [Outputs.of(self.module, self.function, part) for part in parts]
        known: dict[tuple[Choice, int], float] = {}

        def judge(choice: Choice, stage: int) -> float:
            if (choice, stage) not in known:
                run = Stream(self.function, parts[stage], replaced=self.replaced(dict(enumerate(choice))))
                known[choice, stage] = outputs[stage].distance(run)
            return known[choice, stage]

        evolution = Evolution(units, budget, judge, len(parts), self.mixed.offspring, self.mixed.seed)
        return evolution.run(start, self.mixed.generations)


def kinds(format: Format, weight: Weight) -> dict[str, TensorType]:
    """What is stored for ``weight``."""
    return format.parts(weight.name, *map(int, weight.shape))


def meaning(format: Format, weight: Weight, sources: Sequence[SpilledSource]) -> Array:
    """The numbers, f32, that the stored parts of a weight mean."""
    module = Module("weight")
    function = module.add(Function("forward"))
    parts = place(module, kinds(format, weight), sources)
    function.append(Return((format.value(Builder(function).add, parts, DType.f32),)))
    found: Array = interpret(module, "forward", [])[0]
    return found
