"""A Llama in plain PyTorch on the GPU: eager, and compiled with ``max-autotune``. Lines of JSON as results.

    python -m benchmarks.gpu.torch_peer        # reads a request from its input

Weights are random; caches have fixed places, as ``torch.compile`` wants them.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import rms_norm, scaled_dot_product_attention, silu

from benchmarks.gpu.plan import ROUNDS, Model, Plan, heads_of

Say = Callable[[dict[str, Any]], None]
_WARM = 3


class Attention(nn.Module):
    """With a cache of ``capacity`` slots."""

    def __init__(self, config: Mapping[str, Any], capacity: int) -> None:
        super().__init__()
        heads, hidden = heads_of(config), config["hidden_size"]
        self.heads = heads
        self.qkv = nn.Linear(hidden, (heads.queries + 2 * heads.keys) * heads.dim, bias=False)
        self.out = nn.Linear(heads.queries * heads.dim, hidden, bias=False)
        self.register_buffer("cache", torch.zeros(2, 1, heads.keys, capacity, heads.dim))

    def forward(self, x: Tensor, at: Tensor, turn: Tensor, mask: Tensor | None) -> Tensor:
        """``mask`` says which slots are visible, None that x is all there is."""
        h = self.heads
        parts = self.qkv(x).view(1, -1, h.queries + 2 * h.keys, h.dim).transpose(1, 2)
        q, k, v = parts.split([h.queries, h.keys, h.keys], 1)
        q, k = rotate(q, turn), rotate(k, turn)
        self.cache[0].index_copy_(2, at, k)
        self.cache[1].index_copy_(2, at, v)
        if mask is None:
            y = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        else:
            y = scaled_dot_product_attention(q, self.cache[0], self.cache[1], mask, enable_gqa=True)
        return self.out(y.transpose(1, 2).reshape(1, x.shape[1], -1))


class Block(nn.Module):
    def __init__(self, config: Mapping[str, Any], capacity: int) -> None:
        super().__init__()
        hidden, inner = config["hidden_size"], config["intermediate_size"]
        self.attention = Attention(config, capacity)
        self.up, self.down = nn.Linear(hidden, 2 * inner, bias=False), nn.Linear(inner, hidden, bias=False)
        self.norms = nn.ParameterList([nn.Parameter(torch.ones(hidden)) for _ in range(2)])

    def forward(self, x: Tensor, at: Tensor, turn: Tensor, mask: Tensor | None) -> Tensor:
        x = x + self.attention(rms_norm(x, x.shape[-1:], self.norms[0]), at, turn, mask)
        gate, up = self.up(rms_norm(x, x.shape[-1:], self.norms[1])).chunk(2, -1)
        return x + self.down(silu(gate) * up)


class Llama(nn.Module):
    def __init__(self, config: Mapping[str, Any], capacity: int) -> None:
        super().__init__()
        hidden, words, dim = config["hidden_size"], config["vocab_size"], heads_of(config).dim
        self.table, self.head = nn.Embedding(words, hidden), nn.Linear(hidden, words, bias=False)
        self.blocks = nn.ModuleList(Block(config, capacity) for _ in range(config["num_hidden_layers"]))
        self.norm = nn.Parameter(torch.ones(hidden))
        self.register_buffer("turns", torch.zeros(capacity, dim // 2, 2))
        self.capacity = capacity

    def forward(self, ids: Tensor, at: Tensor, whole: bool) -> Tensor:
        """The logits of the last of ``ids``, which are at the places ``at``; ``whole``: nothing comes before them."""
        slots = torch.arange(self.capacity, device=ids.device)
        mask = None if whole else slots[None, None, None] <= at[None, None, :, None]
        x, turn = self.table(ids), self.turns[at]
        for block in self.blocks:
            x = block(x, at, turn, mask)
        return self.head(rms_norm(x[:, -1], x.shape[-1:], self.norm))


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotary embedding of pairs that lie apart by half a head."""
    a, b = x.chunk(2, -1)
    cos, sin = turn[..., 0], turn[..., 1]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], -1)


def made(model: Model, capacity: int, device: str = "cuda") -> Llama:
    """With random weights."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device("meta"):
        net = Llama(model.config, capacity)
    net = net.to_empty(device=device).eval()
    for tensor in (*net.parameters(), *net.buffers()):
        tensor.normal_(0, 0.02)
    return net


def rounds(run: Callable[[], object], calls: int = 1) -> list[float]:
    """Seconds of a call, round by round."""
    found = []
    for _ in range(_WARM + ROUNDS):
        torch.cuda.synchronize()
        start = time.perf_counter()
        run()
        torch.cuda.synchronize()
        found.append((time.perf_counter() - start) / calls)
    return found[_WARM:]


def model(plan: Plan, say: Say, name: str, what: str, compiled: bool) -> None:
    """Decoding or prefill of a model."""
    sizes = plan.sizes
    (shape,) = (m for m in plan.models if m.name == name)
    net = made(shape, sizes.prompt if what == "prefill" else sizes.context + sizes.steps)
    call = torch.compile(net, mode="max-autotune", fullgraph=True) if compiled else net
    ids = torch.randint(0, shape.config["vocab_size"], (1, sizes.prompt), device="cuda")
    places = torch.arange(sizes.prompt, device="cuda")
    one = ids[:, :1].clone()
    steps = [torch.tensor([sizes.context + i], device="cuda") for i in range(sizes.steps)]
    if what == "prefill":
        say({what: rounds(lambda: call(ids, places, True))})
    else:
        say({what: rounds(lambda: [call(one, at, False) for at in steps], sizes.steps)})


def products(plan: Plan, say: Say) -> None:
    """The peak of a large product, and the products of each model's prompt alone: what cuBLAS takes for them."""
    size = plan.sizes.product
    say({"product": [2 * size**3 / s for s in multiplied([(size, size, size)])]})
    for shape in plan.models:
        layers = shape.config["num_hidden_layers"]
        say({f"{shape.name} products": multiplied(layer_products(shape, plan.sizes.prompt) * layers)})


def layer_products(model: Model, tokens: int) -> list[tuple[int, int, int]]:
    """Rows, columns and depth of the products of a layer."""
    h, hidden, inner = heads_of(model.config), model.config["hidden_size"], model.config["intermediate_size"]
    layer = [((h.queries + 2 * h.keys) * h.dim, hidden), (hidden, h.queries * h.dim), (2 * inner, hidden), (hidden, inner)]
    return [(tokens, n, k) for n, k in layer]


def multiplied(sizes: Sequence[tuple[int, int, int]]) -> list[float]:
    """Seconds of all these products one after the other."""
    operands = {size: (weight(size[0], size[2]), weight(size[1], size[2])) for size in set(sizes)}

    def run() -> None:
        for size in sizes:
            x, w = operands[size]
            torch.mm(x, w.t())

    return rounds(run)


def weight(*shape: int) -> Tensor:
    return torch.randn(shape, device="cuda", dtype=torch.bfloat16)


def attention(plan: Plan, say: Say) -> None:
    """One token's attention to many keys, in a CUDA graph: seconds for each of the caches that it visits in turn."""
    h, length = plan.heads, plan.sizes.attention
    q = weight(1, h.queries, 1, h.dim)
    caches = [(weight(1, h.keys, length, h.dim), weight(1, h.keys, length, h.dim)) for _ in range(plan.sizes.caches)]

    def visit() -> None:
        for k, v in caches:
            scaled_dot_product_attention(q, k, v, enable_gqa=True)

    stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
    with torch.cuda.stream(stream):
        visit()
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        visit()
    say({"attention": rounds(graph.replay, len(caches))})


PARTS: dict[str, Callable[..., None]] = {"model": model, "products": products, "attention": attention}


def main() -> None:
    """Serves one request: ``{"part", "folder", "device", ...}``."""
    request = json.loads(sys.stdin.readline())
    plan, part = Plan.read(Path(request.pop("folder"))), PARTS[request.pop("part")]
    torch.cuda.set_device(request.pop("device"))

    def say(what: dict[str, Any]) -> None:
        print(json.dumps(what), flush=True)

    say({"torch": torch.__version__})
    with torch.no_grad():
        part(plan, say, **request)


if __name__ == "__main__":
    main()
