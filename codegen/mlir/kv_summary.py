"""The summary of a page: the least and the greatest of each component of its keys, written when its last token is.

So it says nothing of padding, which may have lain in the page for a while.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from tilewright.codegen.cache import CacheLayout
from tilewright.codegen.cache_codes import CodeLayout
from tilewright.codegen.mlir.builder import Buffer, Kernel
from tilewright.codegen.mlir.kv_codes_recent import Typed
from tilewright.codegen.mlir.kv_places import key_place
from tilewright.codegen.mlir.value import Val

Halves = Buffer | Typed
"""The least, then the greatest components of a page: elements of a cache of floats, or bytes of one of codes."""


def halves(cache: CacheLayout | CodeLayout, k: Buffer, run: Val) -> Halves:
    """The summary of a run of keys in memory."""
    page, head = run // cache.heads, run % cache.heads
    keys, each = cache.heads * cache.k_run, cache.k_summaries // cache.heads
    place = page * (keys + cache.k_summaries) + (head * each + keys)
    return Typed(k, cache.full).at(place) if isinstance(cache, CodeLayout) else k.at(place)


def summarize(kernel: Kernel, cache: CacheLayout | CodeLayout, k: Buffer, run: Val) -> None:
    """Write the summary of a page of one head, all of whose keys are there."""
    into, keys = halves(cache, k, run), k.at(key_place(cache, run))
    if isinstance(cache, CodeLayout):
        _of_codes(kernel, cache, keys, into)
    else:
        _of_floats(kernel, cache, keys, into)


def _of_floats(kernel: Kernel, cache: CacheLayout, k: Buffer, into: Halves) -> None:
    lanes, pair, panel = kernel.lanes, cache.pair, cache.key_panel
    places = [(first, vector) for first in range(0, cache.run, panel) for vector in range(0, panel, lanes)]
    with kernel.loop(0, cache.key_size, pair) as loop:
        at = [loop.index * panel + (first * cache.key_size + vector * pair) for first, vector in places]
        loaded = [k.load(place, lanes * pair) for place in at]
        for number in range(pair):
            _store(into, cache.summary_row, loop.index + number, [_part(x, number, pair) for x in loaded])


def _part(vector: Val, number: int, pair: int) -> Val:
    """Of pairs of components, those with this number, f32."""
    if pair == 1:
        return vector.to("f32")
    words = vector.bitcast("i32")
    return (words << 16 if number == 0 else words & -65536).bitcast("f32")


def _of_codes(kernel: Kernel, cache: CodeLayout, k: Buffer, into: Halves) -> None:
    """Tokens in lanes: each has a scale of its own."""
    lanes, panel, size = kernel.lanes, cache.key_panel, cache.scale_size
    per_word = cache.pair
    parts = [k.at(cache.k_codes + part * cache.run * size) for part in range(1 + cache.has_zeros)]
    scales = [[_scales(part, cache, token, lanes) for part in parts] for token in range(0, cache.run, lanes)]

    def decoded(word: Val, number: int, held: Sequence[Val]) -> Val:
        shift = number % 4 * 8 + number // 4 * cache.bits
        code = ((word.shift_right_logical(shift) & ((1 << cache.bits) - 1)) - cache.bias).to("f32")
        return code * held[0] + held[1] if cache.has_zeros else code * held[0]

    with kernel.loop(0, cache.key_size // per_word) as loop:
        words = []
        for token in range(0, cache.run, lanes):
            start = token // panel * (panel * cache.key_size * cache.bits // 8) + token % panel * 4
            words.append(k.load(loop.index * (4 * panel) + start, 4 * lanes).bitcast("i32"))
        for number in range(per_word):
            component = loop.index * per_word + number
            with kernel.when(component < cache.dim):
                _store(into, cache.summary_row, component, [decoded(w, number, s) for w, s in zip(words, scales)])


def _scales(memory: Buffer, cache: CodeLayout, token: int, lanes: int) -> Val:
    return memory.load(token * cache.scale_size, lanes * cache.scale_size).bitcast(cache.scales).to("f32")


def _store(into: Halves, row: int, component: Val, numbers: Sequence[Val]) -> None:
    """One component of all tokens, in lanes, into both halves."""
    for half, fn in enumerate(("min", "max")):
        combine: Callable[[Val, Val], Val] = getattr(Val, fn)
        best = numbers[0]
        for other in numbers[1:]:
            best = combine(best, other)
        into.store(best.reduce(fn).splat(1).to(into.dtype), component + half * row)
