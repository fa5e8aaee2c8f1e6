"""What calibration says about the inputs of all layers, by the names of their weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilewright.ir import Module, Weight, ops
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.data import OPTION, Array, calibration
from tilewright.passes.calibration.statistics import Moments, moments
from tilewright.passes.calibration.stream import Layer, stream


def channel_statistics(module: Module, ctx: PassContext, why: str, of: Callable[[Moments], Array]) -> dict[str, Array]:
    """``of`` the moments of each linear layer's inputs, for each of its weights; nothing without calibration data.

    ``why`` says what asks for them. Raises PassError when there are data that cannot be used.
    """
    if ctx.options.get(OPTION) is None:
        return {}
    function, batches = calibration(module, ctx, why)
    found: dict[str, Array] = {}

    def visit(op: Layer, inputs: Sequence[Array]) -> None:
        names = [value.name for value in op.operands if isinstance(value, Weight)]
        found.update(dict.fromkeys(names, of(moments(inputs))))

    stream(function, batches, visit, list(function.walk(ops.Linear, ops.GatedLinear)))
    return found
