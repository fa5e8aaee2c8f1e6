"""What ``smooth`` and ``awq`` share: scales of channels, chosen while data stream past, folded into the weights."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from fnmatch import fnmatch

import numpy as np

from tilewright.ir import Module, PassError, Rewriter
from tilewright.passes.base import PassContext
from tilewright.passes.calibration.data import Array, calibration
from tilewright.passes.calibration.sites import Site, find_sites, fold
from tilewright.passes.calibration.stream import Layer, stream

Choose = Callable[[Site, Sequence[Array]], Array]
"""The scales f32 ``[count]`` of a site whose layers get these inputs, an array a micro-batch."""


def scale_channels(module: Module, ctx: PassContext, name: str, skip: Sequence[str], choose: Choose) -> int:
    """Choose scales for every site of ``@forward`` and fold them; gives how many sites there were.

    Weights that match a pattern of ``skip`` keep their columns. Raises PassError for missing data and for inputs that are
    not finite.
    """
    function, batches = calibration(module, ctx, name)
    rw = Rewriter(module, pattern=name)
    sites: dict[Layer, Site] = {}
    for site in find_sites(function, rw.skip):
        named = [w.name for w in site.weights() if any(fnmatch(w.name, pattern) for pattern in skip)]
        if named:
            rw.skip(site.layers[0], f"the option skip names @{named[0]}")
        else:
            sites[site.layers[0]] = site
    scales: dict[Layer, Array] = {}

    def visit(op: Layer, inputs: Sequence[Array]) -> None:
        with np.errstate(invalid="ignore"):  # what is not finite is refused below
            scales[op] = choose(sites[op], inputs).astype(np.float32)
        if not np.isfinite(scales[op]).all():
            raise PassError(f"{name}: inputs or weights of the layer are NaN or infinite", op.loc)

    if sites:
        stream(function, batches, visit, list(sites))
    for op, site in sites.items():
        fold(module, site, scales[op])
        rw.changed += 1
    ctx.take(rw)
    reasons: dict[str, list[str]] = {}
    for left in rw.skips:
        reasons.setdefault(left.reason, []).append(left.loc.module or left.op)
    for reason, places in reasons.items():
        ctx.note(f"{len(places)} stay as they are, {places[0]} first: {reason}")
    return len(sites)
