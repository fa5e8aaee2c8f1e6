"""Values that are the first components of keys: turned out of their panels, a block and a panel of components at a time.

Vectors of keys hold one component (or two) of many keys, those of values many components of one key (or of two). Squares of
both are turned in registers into a small block on the stack, which all rows of a task then meet.
"""

from collections.abc import Callable

from tilewright.codegen.cache import value_panels
from tilewright.codegen.cache_slots import VALUE_STEP
from tilewright.codegen.mlir.builder import Buffer, Function, Kernel
from tilewright.codegen.mlir.flash_rows import Shape
from tilewright.codegen.mlir.kv_blocks import transpose
from tilewright.codegen.mlir.microkernel import split_bf16
from tilewright.codegen.mlir.value import Val, constant, shuffle

Load = Callable[[int, int, int], Val]

# Of rows i and i + 4, and of i + 1 and i + 5, the same two of four pairs of keys, each component's two keys side by side.
_SIDE_BY_SIDE = [[32 * row + 16 * (lane // 2) + 4 * (2 * part + lane % 2) + word
                  for lane in range(4) for row in range(2) for word in (0, 2, 1, 3)] for part in range(2)]  # fmt: skip
# Of two such the one pair of keys, and the other.
_IN_ORDER = [[8 * row + 2 * (pair + 2 * half) + word for half in range(2) for row in range(2) for word in range(2)]
             for pair in range(2)]  # fmt: skip


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

                def load(component: int, first: int, count: int) -> Val:
                    """So many elements of the keys, from the ``first`` on."""
                    if component >= present:
                        return constant(0, k.dtype, count)
                    return source.load(component * panel + first, count)

                for start in range(0, width, VALUE_STEP):
                    if self.shape.dot:
                        self._pairs(load, start, width, target)
                    else:
                        self._floats(load, start, width, target)
        return turn

    def _floats(self, load: Load, start: int, width: int, target: Buffer) -> None:
        """VALUE_STEP components from ``start`` on, of as many keys as there are lanes, as f32."""
        lanes = self.lanes
        rows = [load(start + c, 0, lanes * self.pair) for c in range(0, VALUE_STEP, self.pair)]
        single = [x for row in rows for x in (split_bf16(row) if self.pair == 2 else [row.to("f32")])]
        for column in range(0, VALUE_STEP, lanes):
            for key, found in enumerate(transpose(single[column:column + lanes])):
                target.store(found, key * width + start + column)

    def _pairs(self, load: Load, start: int, width: int, target: Buffer) -> None:
        """16 components from ``start`` on, of 16 keys, as pairs of keys: 8 rows of two components become 8 of two keys.

        What lies in halves of registers is put together by loads: shuffles are what this waits for.
        """
        for half in range(2):
            rows = [shuffle(*(load(start + 2 * row, 16 * half, 16) for row in (first, first + 4)), range(32))
                    for first in range(4)]
            for part in range(2):
                near, far = (shuffle(rows[i], rows[i + 1], _SIDE_BY_SIDE[part]).bitcast("i64") for i in (0, 2))
                for step, order in enumerate(_IN_ORDER):
                    pair = 4 * half + 2 * part + step
                    target.store(shuffle(near, far, order).bitcast("bf16"), pair * (2 * width) + 2 * start)
