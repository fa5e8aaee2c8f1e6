"""What methods may ask about the inputs of a layer; each is computed once for all of its weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from tilewright.ir import PassError
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.gptq import Prepared, factored
from tilewright.passes.calibration.statistics import blocks, hessian, moments
from tilewright.passes.sparsity.alps import Spectrum


@dataclass(frozen=True)
class Inputs:
    """The inputs ``[..., K]`` of a layer, an array a micro-batch; ``name`` is that of its weight.

    Raises PassError that names the weight when they are not finite, or their Hessian cannot be factored.
    """

    arrays: Sequence[Array]
    damping: float = 0.01
    name: str = "weight"

    @cached_property
    def square(self) -> Array:
        """The mean square of each channel, f32 ``[K]``."""
        found = moments(self.arrays).square
        if not np.isfinite(found).all():
            raise PassError(f"the inputs of the layer with @{self.name} became NaN or infinite during calibration")
        return found

    @cached_property
    def mean(self) -> Array:
        """The mean of each channel, f32 ``[K]``."""
        sums = [(block.sum(0, dtype=np.float64), len(block)) for block in blocks(self.arrays)]
        found: Array = np.sum([s for s, _ in sums], axis=0) / sum(n for _, n in sums)
        return found.astype(np.float32)

    @cached_property
    def prepared(self) -> Prepared:
        """The factor of the inverse of the Hessian, columns in their own order."""
        return factored(hessian(self.arrays), self.damping, False, self.name)

    @cached_property
    def spectrum(self) -> Spectrum:
        """The Hessian and its eigenvectors."""
        assert self.square is not None  # all of it finite
        return Spectrum.of(hessian(self.arrays), self.damping)
