"""Which kept tokens stay (``kv.retain``): what attention gave each becomes its worth, then the least worthy go.

Attention leaves, for each row (one query of one head), the weights of slots relative to the row's top score so far, and
that top for each run of slots; with the final top and total they are the weights of the softmax. One task does all that is
to do for a head.
"""

from collections.abc import Callable

from tilewright.codegen.cache import CacheLayout
from tilewright.codegen.cache_slots import SLOT_STEP
from tilewright.codegen.mlir import math
from tilewright.codegen.mlir.builder import Kernel
from tilewright.codegen.mlir.flash_rows import LOG2E
from tilewright.codegen.mlir.kv_choice import Choice
from tilewright.codegen.mlir.kv_merge import Merging
from tilewright.codegen.mlir.kv_notes import POSITION, WORTH, Head
from tilewright.codegen.mlir.kv_spec import AttendBuffers, AttendSpec
from tilewright.codegen.mlir.value import Val, constant, iota
from tilewright.ir.ops.kv_policies import POLICIES

Gain = Callable[[Val, Val, Val], Val]
"""``(worth, weights, mean) -> worth``: what slots are worth after a query, as a `Policy` has it."""
GAINS: dict[str, Gain] = dict.fromkeys(POLICIES, lambda worth, weights, mean: worth + weights)
GAINS["scissorhands"] = lambda worth, weights, mean: worth + (weights > mean).select(constant(1.0, "f32"), 0.0)


class Chooser:
    """Chooses for one head after the other, in one kernel."""

    def __init__(self, kernel: Kernel, spec: AttendSpec, buffers: AttendBuffers) -> None:
        assert isinstance(spec.cache, CacheLayout)
        assert spec.rule is not None
        assert buffers.weights is not None
        assert buffers.tops is not None
        self.kernel, self.spec, self.cache, self.rule, self.buffers = kernel, spec, spec.cache, spec.rule, buffers
        self.weights, self.tops = buffers.weights, buffers.tops
        self.first = constant(0)
        """The first row of the task at hand."""
        self.merging = Merging(kernel, self.cache.key_size) if self.rule.merge else None

    # --- what attention leaves ----------------------------------------------------------------------------------------

    def put(self, weights: Val, row: Val, slot: Val) -> None:
        """The weights of some slots, relative to the top at hand."""
        # In decoding they are read when all keys have gone by: lines fetched to be written would be gone again.
        self.weights.store(weights, (self.first + row) * self.cache.slots + slot, stream=self.spec.s == 1)

    def top(self, top: Val, row: Val, slot: Val, slots: Val) -> None:
        """The top that the weights of so many slots are relative to."""
        first = (self.first + row) * self.spec.runs + slot // SLOT_STEP
        with self.kernel.loop(0, slots // SLOT_STEP) as runs:
            self.tops.store(top, first + runs.index)

    # --- worths -------------------------------------------------------------------------------------------------------

    def begin(self, head: Head, start: Val, live: Val, count: Val) -> None:
        """New notes on the call's tokens; what old ones are worth fades."""
        lanes, observe = self.kernel.lanes, self.rule.observe
        if self.merging is not None:
            self.merging.begin(head, start)
        first = constant(0) if observe else live // lanes * lanes
        left = (1.0 - count.to("i32").to("f32") / float(max(observe, 1))).max(constant(0.0, "f32"))
        with self.kernel.loop(first, live + count, lanes) as loop:
            slots = iota(lanes) + loop.index.to("i32")
            is_new = slots >= live.to("i32")
            worth = head.load(WORTH, loop.index, lanes)
            worth = is_new.select(constant(0.0, "f32", lanes), worth * left if observe else worth)
            position = (slots + (start - live).to("i32")).to("f32")
            head.store(WORTH, worth, loop.index)
            head.store(POSITION, is_new.select(position, head.load(POSITION, loop.index, lanes)), loop.index)

    def settle(self, row: Val, top: Val, total: Val, sink: Val | None, high: Val) -> None:
        """Turn the tops of a row into factors that make its weights those of the softmax, over the slots below ``high``."""
        first, lanes, cooled = (self.first + row) * self.spec.runs, self.kernel.lanes, 1 / self.spec.temperature
        for run in range(0, self.spec.runs, lanes):
            share = math.exp2_of_negative((self.tops.load(first + run, lanes) - top) * cooled)
            self.tops.store(share, first + run)
        if self.spec.temperature != 1:
            total = self._temper(row, high)
            total = total if sink is None else total + math.exp2_of_negative((sink * LOG2E - top) * cooled)
        factor = (total > 0.0).select(1.0 / total, constant(0.0, "f32"))
        for run in range(0, self.spec.runs, lanes):
            self.tops.store(self.tops.load(first + run, lanes) * factor, first + run)

    def _temper(self, row: Val, high: Val) -> Val:
        """Bring the weights of a row to the temperature: their sum."""
        kernel, lanes, none = self.kernel, self.kernel.lanes, constant(0.0, "f32", self.kernel.lanes)
        first, factors = (self.first + row) * self.cache.slots, (self.first + row) * self.spec.runs
        with kernel.loop(0, high, SLOT_STEP, carry=[none]) as runs:
            (total,) = runs.values
            factor = self.tops.load(factors + runs.index // SLOT_STEP).splat(lanes)
            for at in range(0, SLOT_STEP, lanes):
                place = first + runs.index + at
                weights = self._root(self.weights.load(place, lanes))
                self.weights.store(weights, place)
                total = weights.fma(factor, total)
            runs.next(total)
        return runs.results[0].reduce("sum")

    def _root(self, weights: Val) -> Val:
        """Weights to the power of one by the temperature."""
        if self.spec.temperature == 2:
            return weights.sqrt()
        powers = math.exp2_of_negative(math.log(weights).min(constant(0.0, "f32")) * (LOG2E / self.spec.temperature))
        return (weights > 0.0).select(powers, constant(0.0, "f32", weights.lanes))

    def gain(self, head: Head, queries: Val, first: Val, high: Val) -> None:
        """Worths grow by ``queries`` queries, of which the first sees ``first`` slots, the last ``high``."""
        kernel, group, lanes = self.kernel, self.spec.group, self.kernel.lanes
        none = [constant(0.0, "f32", lanes)] * (SLOT_STEP // lanes)
        with kernel.loop(0, high, SLOT_STEP) as runs:
            run, starts = runs.index // SLOT_STEP, [runs.index + at for at in range(0, SLOT_STEP, lanes)]
            with kernel.loop(0, queries, carry=[head.load(WORTH, start, lanes) for start in starts]) as each:
                with kernel.loop(0, group, carry=none) as members:
                    row = self.first + each.index * group + members.index
                    factor = self.tops.load(row * self.spec.runs + run).splat(lanes)
                    found = [self.weights.load(row * self.cache.slots + start, lanes) for start in starts]
                    members.next(*[x.fma(factor, total) for x, total in zip(found, members.values)])
                mean = (float(group) / (first + each.index).to("i32").to("f32")).splat(lanes)
                gain = GAINS[self.rule.policy]
                each.next(*[gain(worth, x, mean) for worth, x in zip(each.values, members.results)])
            for start, worth in zip(starts, each.results):
                head.store(WORTH, worth, start)

    def close(self, head: Head, start: Val, live: Val, count: Val) -> None:
        """Let the least worthy go, when there are more than the budget."""
        end = live + count
        choice = Choice(self.kernel, self.rule, head, self.buffers.choice, start + count, end, self.merging)
        leaving = end - self.cache.budget
        if self.spec.s == 1:
            with self.kernel.when(leaving > 0):
                choice.drop_one()
            return
        with self.kernel.when(leaving > 0):
            self.kernel.branch(leaving.eq(1), choice.drop_one, lambda: choice.drop(leaving))
