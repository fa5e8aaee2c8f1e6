"""``linear(norm(x) * w, @a)`` -> ``linear(norm(x) * (w / s), @a * s)``: outliers of activations move into weights."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from tilewright.ir import Module, PassError
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import Array
from tilewright.passes.calibration.scaling import scale_channels
from tilewright.passes.calibration.sites import Site
from tilewright.passes.calibration.statistics import moments


@dataclass(frozen=True)
class Smooth(Pass):
    """SmoothQuant (Xiao et al., arXiv:2211.10438): channels of activations that reach far are made smaller.

    Each input channel of a layer is divided by ``s = max|x|^alpha / max|w|^(1 - alpha)`` and its column multiplied by
    it, so that one scale a token fits all channels. The division goes into what makes the channel: see
    ``calibration/sites.py``. ``skip`` are patterns of weight names to leave alone. Needs calibration data.
    """

    name: ClassVar[str] = "smooth"
    alpha: float = 0.5
    skip: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for an alpha outside of 0..1."""
        if not 0 <= self.alpha <= 1:
            raise PassError(f"alpha is a share of 0 to 1; got {self.alpha}")

    def run(self, module: Module, ctx: PassContext) -> bool:
        count = scale_channels(module, ctx, self.name, self.skip, self.scales)
        ctx.note(f"the inputs of {count} groups of layers were scaled")
        return count > 0

    def scales(self, site: Site, inputs: Sequence[Array]) -> Array:
        """``s``; 1 where an input channel, or its columns, are all zeros."""
        x = site.shared(moments(inputs).top)
        w = np.zeros_like(x)
        for weight in site.weights():
            np.maximum(w, site.shared(np.abs(weight.load().astype(np.float32)).max(0)), out=w)
            weight.release()
        dead = (x == 0) | (w == 0)
        scale: Array = np.where(dead, 1, x) ** self.alpha / np.where(dead, 1, w) ** (1 - self.alpha)
        return np.clip(scale, 1e-5, 1e5)
