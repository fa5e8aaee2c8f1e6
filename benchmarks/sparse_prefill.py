"""Speed of attention to chosen blocks of keys beside attention to all, of a prompt in chunks; choosing included.

    python benchmarks/sparse_prefill.py [--threads 2] [--target native] [--length 16384] [--chunk 512] [--shape L ...]

For each pattern, of the chunks at a quarter, half, three quarters and the end of the prompt: milliseconds of a layer's
attention kernel and of the kernel that chooses, times faster than dense (of the sums of medians, interleaved; then the last
chunk alone), the share of the blocks that is walked, and the share of dense attention's weight that lies there. Keys are
random with directions that stretches of the text share, so that attention has something to find. Lists of ``tokens`` are of
one length, whatever the pattern; the last row has heads of all three patterns beside each other.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from attention_bench import SHAPES, Bench, Heads, call_all, copied, function, head, measure, opened, parser, row

from tilewright.codegen.cache import CacheLayout, cache_layout
from tilewright.codegen.mlir.native import aligned
from tilewright.ir import DType, KVType, TensorType, as_dim, ops

BLOCK = QUERIES = 64
PATTERNS: dict[str, dict[str, Any]] = {
    "a-shape local=2048": {"patterns": ("a-shape",), "local": 2048},
    "vertical-slash 1024 + 1024": {"patterns": ("vertical-slash",)},
    "block-sparse share=0.25": {"patterns": ("block-sparse",), "share": 0.25},
    "flex gamma=0.9": {"patterns": ("flex",), "gamma": 0.9},
}
ALIKE = ("a-shape", "vertical-slash", "block-sparse")
LISTS = {"tokens": 2048, "columns": 960, "slashes": 960}
STRETCH, STRENGTH = 256, 2.0


class Prompt:
    """Queries and a full cache of one layer."""

    def __init__(self, bench: Bench, heads: Heads, length: int, chunk: int) -> None:
        self.bench, self.heads, self.length, self.chunk = bench, heads, length, chunk
        self.type = KVType(heads.kv, heads.dim, heads.dim, length, DType.bf16)
        rng = np.random.default_rng(0)
        directions = rng.standard_normal((8, heads.kv, heads.dim)).astype(np.float32) * STRENGTH
        topics = np.repeat(rng.integers(0, 8, -(-length // STRETCH)), STRETCH)[:length]
        keys = rng.standard_normal((1, length, heads.kv, heads.dim)).astype(np.float32) + directions[topics]
        values = rng.standard_normal((1, length, heads.kv, heads.dim)).astype(np.float32)
        queries = rng.standard_normal((1, length, heads.q, heads.dim)).astype(np.float32)
        queries += np.repeat(directions[topics], heads.q // heads.kv, 1)
        self.keys, self.queries = keys.astype(DType.bf16.np), queries.astype(DType.bf16.np)
        layout = cache_layout(self.type, bench.target)
        assert isinstance(layout, CacheLayout)
        self.cache = copied(layout.write(self.keys, values.astype(DType.bf16.np)), "bf16")
        self.lists = aligned((1, heads.kv, chunk // QUERIES, 1 + length // BLOCK), "i32")
        self.q, self.out = (aligned((1, chunk, heads.q, heads.dim), "bf16") for _ in range(2))
        self.start = aligned(1, "i64", 0)

    def turn_to(self, start: int) -> None:
        """The chunk from ``start`` on is what kernels get from now on."""
        self.q[...], self.start[...] = self.queries[:, start:start + self.chunk], start

    def runs(self, given: dict[str, Any] | None) -> dict[str, Callable[[], None]]:
        """The kernel that chooses, and attention."""
        heads, scale = self.heads, self.heads.dim**-0.5
        types = [TensorType(("B", "S", heads.q, heads.dim), DType.bf16), self.type, TensorType(("B",), DType.i64)]
        lists = TensorType(("B", heads.kv, as_dim("-(-S // 64)"), self.lists.shape[3]), DType.i32)
        dims, arrays = {"B": 1, "S": self.chunk}, (self.q, *self.cache, self.start)
        if given is None:
            kernel = function(types, lambda k, *a: k.append(ops.Attend(*a, scale=scale)))
            return {"attend": call_all(self.bench, kernel, dims, [(*arrays, self.out)])}
        kernel = function([*types, lists], lambda k, *a: k.append(ops.Attend(*a[:3], blocks=a[3], scale=scale)))
        choose = function(types, lambda k, *a: k.append(ops.Choose(*a, scale=scale, **given)))
        return {"choose": call_all(self.bench, choose, dims, [(*arrays, self.lists)]),
                "attend": call_all(self.bench, kernel, dims, [(*arrays, self.lists, self.out)])}  # fmt: skip

    def kept(self, start: int) -> tuple[float, float]:
        """The share of the blocks of the lists, and of the weight that lies there for a query of each list's heads."""
        shares, weights, group = [], [], self.heads.q // self.heads.kv
        for h, i in np.ndindex(*self.lists.shape[1:3]):
            position = start + (i + 1) * QUERIES - 1
            there = self.lists[0, h, i, 1:1 + self.lists[0, h, i, 0]]
            shares.append(len(there) / (position // BLOCK + 1))
            query = self.queries[0, position, h * group:(h + 1) * group].astype(np.float32)
            scores = query @ self.keys[0, :position + 1, h].astype(np.float32).T * self.heads.dim**-0.5
            p = np.exp(scores - scores.max(-1, keepdims=True))
            weights.append((np.add.reduceat(p, range(0, position + 1, BLOCK), -1)[:, there].sum(-1) / p.sum(-1)).mean())
        return float(np.mean(shares)), float(np.mean(weights))


def patterns(heads: Heads) -> dict[str, dict[str, Any]]:
    """Each for all heads; then those that have lists of one length, and all of them in turn, as `auto` may choose."""
    alike = {f"{kind} tokens=2048": (kind,) for kind in ALIKE}
    alike["in turn tokens=2048"] = tuple(ALIKE[head % len(ALIKE)] for head in range(heads.kv))
    return PATTERNS | {name: {"patterns": kinds, **LISTS} for name, kinds in alike.items()}


def compare(bench: Bench, heads: Heads, length: int, chunk: int) -> None:
    head(f"{heads.name} {heads.q}/{heads.kv}x{heads.dim}, {length} by {chunk}", "attend ms", "choose ms", "x dense",
         "last chunk", "blocks", "weight")  # fmt: skip
    prompt = Prompt(bench, heads, length, chunk)
    totals: dict[str, list[dict[str, float]]] = {}
    dense = prompt.runs(None)["attend"]
    made = {name: prompt.runs(given) for name, given in patterns(heads).items()}
    kept: dict[str, list[tuple[float, float]]] = {name: [] for name in made}
    for start in [length * part // 4 - chunk for part in (1, 2, 3, 4)]:
        prompt.turn_to(start)
        for name, runs in made.items():
            t = measure({"choose": runs["choose"], "dense": dense, "attend": runs["attend"]}, 3)
            totals.setdefault(name, []).append({key: median for key, (median, _) in t.items()})
            kept[name].append(prompt.kept(start))
    for name, found in totals.items():
        ms = {key: sum(f[key] for f in found) * 1e3 / len(found) for key in found[0]}
        last = found[-1]["dense"] / (found[-1]["attend"] + found[-1]["choose"])
        share, weight = np.mean(kept[name], 0)
        row(name, f"{ms['attend']:.1f}", f"{ms['choose']:.1f}", f"{ms['dense'] / (ms['attend'] + ms['choose']):.2f}",
            f"{last:.2f}", f"{share:.0%}", f"{weight:.1%}")  # fmt: skip
    row("dense", f"{ms['dense']:.1f}", "", "", "", "", "")


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--length", type=int, default=16384)
    options.add_argument("--chunk", type=int, default=512)
    given = options.parse_args()
    bench = opened(given)
    for name in given.shape or ("L", "8B"):
        compare(bench, SHAPES[name], given.length, given.chunk)


if __name__ == "__main__":
    main()
