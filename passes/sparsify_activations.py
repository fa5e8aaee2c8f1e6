"""``nn.linear(x, @w)`` -> ``nn.linear(sparse.threshold(x, @w.limits), @w)``: columns of small inputs need no reading."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from tilewright.ir import Function, Module, PassError, Rewriter, ops
from tilewright.passes.activations.allocation import MOST, by_blocks, by_results
from tilewright.passes.activations.limits import Choose, Reached, by_shares, fill, one_limit
from tilewright.passes.activations.methods import METHODS, Method
from tilewright.passes.activations.places import Place
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.calibration.data import Batch, calibration, rows
from tilewright.passes.calibration.outputs import first
from tilewright.passes.calibration.stream import LAYERS, Layer
from tilewright.passes.match import made_by
from tilewright.passes.outlier_columns import is_outliers
from tilewright.passes.quantize import makes_results
from tilewright.passes.selection import check_patterns, left_alone
from tilewright.passes.weights import weights_of


@dataclass(frozen=True)
class SparsifyActivations(Pass):
    """Inputs of linear layers below limits become zero; kernels leave out what belongs to zeros when rows are few.

    ``method`` is one of ``activations/methods.py``; ``sparsity`` the share of the inputs of each layer that become zero on
    the calibration data. Layers may divide them: with ``allocation=greedy`` it is the share of the bytes of weights in
    each block, and what changes a block's result least is taken (TEAL, arXiv:2408.14690); with ``global`` it is that of
    all bytes, and what harms the results of the model least is taken. Both try on ``tokens`` tokens. ``r-sparse`` lets what
    falls below go through products of rank ``rank``, whose bytes more zeros make up for. ``layers``: ``body`` are all
    linear layers but those that make the function's results. ``skip`` and ``only`` are patterns of weight names.

    To stand behind the fusions and before ``quantize``. Needs calibration data.
    """

    name: ClassVar[str] = "sparsify-activations"
    method: Literal["plain", "teal", "wina", "cats", "chess", "r-sparse"] = "wina"
    sparsity: float = 0.5
    allocation: Literal["uniform", "greedy", "global"] = "uniform"
    tokens: int = 1024
    rank: int = 32
    layers: Literal["all", "body"] = "body"
    skip: tuple[str, ...] = ()
    only: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        """Raises PassError for options that make no sense, alone or together."""
        if not 0 < self.sparsity <= MOST:
            raise PassError(f"{self.name}: sparsity is a share of zeros, above 0, at most {MOST}; got {self.sparsity}")
        if min(self.tokens, self.rank) < 1:
            raise PassError(f"{self.name}: tokens and rank are 1 or more; got {self.tokens} and {self.rank}")
        if self.allocation != "uniform" and (self.row.has_one_limit or self.row.is_low_rank):
            raise PassError(f"{self.name}: method={self.method} goes with allocation=uniform alone")

    @property
    def row(self) -> Method:
        return METHODS[self.method]

    def run(self, module: Module, ctx: PassContext) -> bool:
        check_patterns(self.name, module, self.skip, self.only)
        function, batches = calibration(module, ctx, self.name)
        rw = Rewriter(module, pattern=self.name)
        layers = self.chosen(function, rw)
        places = self.row.find(rw, layers, self.rank)
        ctx.take(rw)
        if not places:
            given = f"none of {len(layers)} layers is gated" if layers else "there is no linear layer"
            reason = rw.skips[0].reason if rw.skips and not layers else given
            raise PassError(f"{self}: no layer can have sparse inputs: {reason}")
        self.report(fill(function, batches, places, self.choose(module, function, batches, places)), ctx)
        ctx.note(f"limits are those of {sum(map(rows, batches))} tokens")
        return True

    def chosen(self, function: Function, rw: Rewriter) -> list[Layer]:
        """The layers that may have sparse inputs."""
        found: list[Layer] = []
        for op in function.walk(*LAYERS):
            assert isinstance(op, LAYERS)
            if self.layers == "body" and makes_results(op):
                continue
            reason = self.reason(op)
            if reason is None:
                found.append(op)
            else:
                rw.skip(op, reason)
        return found

    def reason(self, op: Layer) -> str | None:
        """Why the inputs of a layer stay as they are."""
        if made_by(op.x, ops.Threshold) is not None:
            return "its inputs have a threshold already"
        if is_outliers(op):
            return "it holds the outliers of another layer"
        reasons = (left_alone(weight, self.skip, self.only) for weight in weights_of(op).values())
        return next((reason for reason in reasons if reason is not None), None)

    def choose(self, module: Module, function: Function, batches: Sequence[Batch], places: Sequence[Place]) -> Choose:
        """What gives the limits. Raises PassError for a rank that costs all that zeros save."""
        if self.row.has_one_limit:
            return one_limit(function, batches, places, self.sparsity)
        some = first(function, batches, self.tokens)
        if self.allocation == "greedy":
            return by_shares(by_blocks(function, some, places, self.sparsity))
        if self.allocation == "global":
            return by_shares(by_results(module, function, some, places, self.sparsity))
        shares = {place: self.sparsity + place.extra / place.bytes for place in places}
        for place, share in shares.items():
            if share > MOST:
                raise PassError(
                    f"{self}: rank {self.rank} takes {place.extra / place.bytes:.0%} of the bytes of @{place.name}, so "
                    f"that {share:.0%} of its inputs would have to be zero; take a smaller rank or sparsity"
                )
        return by_shares(shares)

    def report(self, found: Sequence[Reached], ctx: PassContext) -> None:
        """What was reached: for each place, and in sum."""
        for reached in found:
            place = reached.place
            extra = f", of which rank {self.rank} takes {place.extra} back" if place.extra else ""
            ctx.note(f"@{place.name}: {reached.zeros:.1%} zeros, {reached.saved:.0f} of {place.bytes} bytes{extra}")
        inputs = sum(int(r.place.threshold.x.shape[-1]) for r in found)
        zeros = sum(r.zeros * int(r.place.threshold.x.shape[-1]) for r in found)
        saved, whole = sum(r.saved for r in found), sum(r.place.bytes for r in found)
        ctx.note(f"{zeros / inputs:.1%} of the inputs at {len(found)} places are zero; they save {saved / whole:.1%} "
                 f"of the {whole} bytes of weights behind them")  # fmt: skip
