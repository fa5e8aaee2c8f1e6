"""``linear(norm(x) * w, @a)`` -> ``linear(norm(x) * (w / s), @a * s)``: columns that matter get finer steps."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import ClassVar

import numpy as np

from tilewright.ir import Module, PassError
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.scaling import scale_channels
from tilewright.passes.calibration.sites import Site
from tilewright.passes.calibration.statistics import moments, sample
from tilewright.passes.formats import Format, find_scheme

_AT_ONCE = 1 << 22  # elements of a weight that are tried at a time


@dataclass(frozen=True)
class Awq(Pass):
    """Activation-aware scaling (Lin et al., arXiv:2306.00978): input channels that are large on average are multiplied
    in the weight and divided where they are made, so that their columns are rounded to finer steps.

    ``s = rms(x)^a / rms(w)^b``: first ``a``, then ``b``, of 0 to 1 in ``steps`` steps, where the outputs of the layers,
    rounded to the nearest with ``scheme``, ``group`` and ``zero``, differ least over ``rows`` sampled rows of the inputs.
    ``quantize`` with the same options must follow, best with ``method=clip``. ``skip`` are patterns of weight names to
    leave alone. Needs calibration data.
    """

    name: ClassVar[str] = "awq"
    scheme: str = "w4a16"
    group: int | None = None
    zero: bool | None = None
    steps: int = 10
    rows: int = 512
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for a scheme that does not exist or has no such options, and for counts below 1."""
        assert self.format
        if self.steps < 1 or self.rows < 1:
            raise PassError(f"steps and rows are 1 or more; got {self.steps} and {self.rows}")

    @property
    def format(self) -> Format:
        return find_scheme(self.scheme).with_options(self.scheme, group=self.group, zero=self.zero)

    def run(self, module: Module, ctx: PassContext) -> bool:
        search = _Search(self)
        count = scale_channels(module, ctx, self.name, self.skip, search.scales)
        gain = f"; errors of their outputs fell to {np.mean(search.gains):.0%} on average" if search.gains else ""
        ctx.note(f"the inputs of {count} groups of layers were scaled{gain}")
        return count > 0


@dataclass
class _Search:
    awq: Awq
    gains: list[float] = field(default_factory=list)

    def scales(self, site: Site, inputs: Sequence[Array]) -> Array:
        """The best of the scales tried; ones when the format cannot hold the weights."""
        weights = [w.load() for w in site.weights()]
        if any(self.awq.format.unfit(*w.shape) for w in weights):
            return np.ones(site.count, np.float32)
        x = sample(inputs, self.awq.rows)
        size, rows = mean_of(site, moments(inputs).square), columns(site, weights)
        powers = [i / self.awq.steps for i in range(self.awq.steps + 1)]
        first = [self.errors(weights, scale(size, p, rows, 0), site, x) for p in powers]
        a = powers[int(np.argmin(first))]
        second = [min(first)] + [self.errors(weights, scale(size, a, rows, p), site, x) for p in powers[1:]]
        b = powers[int(np.argmin(second))]
        self.gains.append(min(second) / first[0] if first[0] else 1.0)
        for weight in site.weights():
            weight.release()
        return scale(size, a, rows, b)

    def errors(self, weights: Sequence[Array], scales: Array, site: Site, x: Array) -> float:
        return sum(self.error(w, scales[site.index], x) for w in weights)

    def error(self, weight: Array, scales: Array, x: Array) -> float:
        """``|x (weight - rounded)^T|^2`` when columns are rounded times ``scales``."""
        format, k = self.awq.format, weight.shape[1]
        groups, total = format.groups(k), 0.0
        step = max(1, _AT_ONCE // k)
        for start in range(0, len(weight), step):
            rows = weight[start : start + step].astype(np.float32)
            scaled = (rows * scales).reshape(len(rows), groups, -1)
            params = format.fit(scaled, shared=format.shared(scaled))
            got = format.decode(format.encode(scaled, params), params).reshape(rows.shape) / scales
            total += float(np.square(x @ (rows - got).T).sum())
        return total


def mean_of(site: Site, squares: Array) -> Array:
    """Root of the mean of ``squares`` ``[K]`` over the channels that share a scale: ``[count]``."""
    out: Array = np.sqrt(site.shared(squares, np.add) / np.bincount(site.index))
    return out


def columns(site: Site, weights: Sequence[Array]) -> Array:
    """The root mean square of the columns that each scale of the site reaches, ``[count]``."""
    squares = [np.square(w, dtype=np.float32) for w in weights]
    return mean_of(site, np.mean([s.mean(0) for s in squares], axis=0))


def scale(size: Array, a: float, rows: Array, b: float) -> Array:
    """``size ** a / rows ** b`` around 1: the largest times the smallest is 1. Channels of zeros count as tiny ones."""
    found = floored(size) ** a / floored(rows) ** b
    out: Array = (found / np.sqrt(found.max() * found.min())).astype(np.float32)
    return out


def floored(size: Array) -> Array:
    out: Array = np.maximum(size, 1e-4 * max(float(size.max()), 1e-30))
    return out
