"""Values that are the first components of keys: turned out of their panels, a block and a panel of components at a time.

Vectors of keys hold one component (or two) of many keys, those of values many components of one key (or of two). Squares of
both are turned in registers into a small block on the stack, which all rows of a task then meet.
"""

from collections.abc import Callable, Sequence

from tilewright.codegen.cache import value_panels
from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.flash_rows import Shape
from tilewright.codegen.mlir.kv_blocks import transpose
from tilewright.codegen.mlir.microkernel import split_bf16
from tilewright.codegen.mlir.value import Val, constant, shuffle


class Turned:
    """One panel of the values of a block of ``keys``, in ``block``: bf16 pairs of keys with a dot product, else f32."""

    def __init__(self, kernel: Kernel, shape: Shape, keys: int, sizes: tuple[int, int], k: Buffer) -> None:
        """``sizes`` are those of a key and of a value in memory, ``k`` is the buffer (not offset) of keys."""
        self.kernel, self.shape, self.lanes = kernel, shape, kernel.lanes
        self.key_size, self.value_size = sizes
        self.key_panel = min(shape.panel, shape.run or shape.panel)
        self.pair = 2 if shape.dtype == "bf16" else 1
        self.block = kernel.scratch(keys * shape.panel, "bf16" if shape.dot else "f32")
        self.functions: dict[tuple[int, int], Function] = {}
        for start, width in value_panels(self.value_size, shape.panel):
            alike = width, min(width, self.key_size - start)
            if alike not in self.functions:
                self.functions[alike] = self._function(*alike, k)

    def panels(self) -> list[tuple[int, int, int]]:
        """Start, end and width of panels that are alike, from the first one on to the last."""
        found: list[tuple[int, int, int]] = []
        for start, width in value_panels(self.value_size, self.shape.panel):
            if found and found[-1][2] == width and start + width <= self.key_size:
                found[-1] = found[-1][0], start + width, width
            else:
                found.append((start, start + width, width))
        return found

    def fill(self, k: Buffer, start: Val, panel: tuple[int, int, int], count: Val, run: int,
             place: Callable[[Val], Val]) -> None:
        """The components from ``start`` on, of ``panel``, of ``count`` keys in runs, each of which begins at its place."""
        _, end, width = panel
        turn = self.functions[width, min(width, self.key_size - (end - width))]
        with self.kernel.loop(0, (count + (run - 1)) // run) as runs:
            done = runs.index * run
            turn((k, self.block), (place(runs.index) + start * self.key_panel, done * width, (count - done).min(run)))

    def _function(self, width: int, present: int, k: Buffer) -> Function:
        """Turns some keys of a run, from the place of their first component on; ``present`` of ``width`` are there."""
        kernel, lanes, panel = self.kernel, self.lanes, self.key_panel
        with kernel.function(f"turn{width}of{present}", (k, self.block), numbers=3) as turn:
            k, block = turn.buffers
            k_at, block_at, count = turn.numbers
            with kernel.loop(0, count, lanes) as slots:
                slot = slots.index
                source = k.at(k_at + slot // panel * (panel * self.key_size) + slot % panel * self.pair)
                target = block.at(block_at + slot * width)
                for start in range(0, width, 16):
                    rows = [source.load(c * panel, lanes * self.pair) if c < present else
                            constant(0, k.dtype, lanes * self.pair) for c in range(start, start + 16, self.pair)]
                    self._square(rows, start, width, target)
        return turn

    def _square(self, rows: Sequence[Val], start: int, width: int, target: Buffer) -> None:
        """``rows`` of 16 components from ``start`` on, one or two in each, as many keys as there are lanes."""
        if self.shape.dot:
            order = [place ^ 3 if place % 4 in (1, 2) else place for place in range(2 * self.lanes)]
            alike = [shuffle(row, row, order).bitcast("i64") for row in rows]  # of two keys each component side by side
            for step, column in enumerate(transpose(alike)):
                target.store(column.bitcast("bf16"), step * (2 * width) + 2 * start)
            return
        for part, square in enumerate(self._squares(rows)):
            for key, column in enumerate(transpose(square)):
                target.store(column, key * width + start + part * self.lanes)

    def _squares(self, rows: Sequence[Val]) -> list[list[Val]]:
        """f32, as many components as lanes."""
        single = [x for row in rows for x in (split_bf16(row) if self.pair == 2 else [row.to("f32")])]
        return [single[i:i + self.lanes] for i in range(0, len(single), self.lanes)]
