"""What is measured, and what is hoped for."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

PLAN, TOOLS, ATTENTION, PRODUCT = "plan.json", "tools.cubin", "attention", "product"
_HEAD = "clean,fusions,quantize{scheme=w8a16 layers=head},"
FORMATS = {
    "bf16": "O2",
    "w8a16": "w8a16",
    "w4a16": f"{_HEAD}quantize{{scheme=w4a16 group=128 layers=body}},cache,kernels",
}
"""Pipelines by the name of the format; four bits have 128 weights a scale, and leave eight to the head."""
CACHES = {
    "": "dtype=bf16, layout=contiguous",
    " paged": "dtype=bf16, layout=paged<64>",
    " i8": "dtype=i8, layout=contiguous",
    " i4": "dtype=i4, layout=contiguous",
    " i4 paged": "dtype=i4, layout=paged<64>",
}
"""Caches that attention alone visits, by what stands behind its name."""
ROUNDS = 7


@dataclass(frozen=True)
class Sizes:
    """Tokens of a prompt and before the first decoded one, steps a round; keys of attention alone, and caches it visits in
    turn, so many that a call is long and they leave the L2 cache; elements of a side of the matrix product; bytes that are
    copied and read."""

    prompt: int = 2048
    context: int = 512
    steps: int = 32
    attention: int = 32768
    caches: int = 16
    product: int = 8192
    bandwidth: int = 2 << 30

    @property
    def capacity(self) -> int:
        """Slots of the models' caches."""
        return max(self.prompt, self.context + self.steps)


@dataclass(frozen=True)
class Heads:
    """Of attention alone."""

    queries: int
    keys: int
    dim: int


@dataclass(frozen=True)
class Model:
    """A shape that was compiled. ``config`` is that of the architecture; ``formats`` has bytes read a step by format."""

    name: str
    like: str
    config: dict[str, Any]
    parameters: int
    formats: dict[str, int]

    def folder(self, format: str) -> str:
        return f"{self.name}-{format}"


@dataclass(frozen=True)
class Plan:
    """All that was prepared; ``parameters`` of a model are those of its layers' products."""

    target: str
    commit: str
    sizes: Sizes
    heads: Heads
    models: tuple[Model, ...]

    def write(self, folder: Path) -> None:
        (folder / PLAN).write_text(json.dumps(asdict(self), indent=1) + "\n")

    @staticmethod
    def read(folder: Path) -> Plan:
        data = json.loads((folder / PLAN).read_text())
        models = tuple(Model(**model) for model in data["models"])
        return Plan(data["target"], data["commit"], Sizes(**data["sizes"]), Heads(**data["heads"]), models)


def prefill_flops(model: Model, tokens: int) -> float:
    """Operations of the layers' products for a prompt; its last token alone passes the head."""
    return 2.0 * model.parameters * tokens + 2.0 * model.config["hidden_size"] * model.config["vocab_size"]


def decode_bytes(model: Model, format: str, sizes: Sizes) -> int:
    """That a step reads: weights, and the keys and values so far."""
    filled = sizes.context + sizes.steps // 2
    return model.formats[format] + model.config["num_hidden_layers"] * attention_bytes(heads_of(model.config), filled)


def attention_folder(cache: str) -> str:
    """The artifact of attention over one of ``CACHES``."""
    return (ATTENTION + cache).replace(" ", "-")


def heads_of(config: Mapping[str, Any]) -> Heads:
    """Of a Llama."""
    queries = config["num_attention_heads"]
    return Heads(queries, config["num_key_value_heads"], config["hidden_size"] // queries)


def attention_bytes(heads: Heads, keys: int) -> int:
    """Of the keys and values, in bf16, that one token's attention reads."""
    return 2 * 2 * heads.keys * heads.dim * keys


@dataclass(frozen=True)
class Goal:
    """``what`` should be at least ``least``: the text is that of a row of the results."""

    what: str
    least: float


GOALS = (
    Goal("8B bf16 decode, of the bandwidth", 0.75),
    Goal("8B w4a16 decode, of the bandwidth", 0.60),
    Goal("8B bf16 decode, times torch.compile", 1.3),
    Goal("8B bf16 prefill, of the time by cuBLAS", 0.6),
    Goal("attention, of the bandwidth", 0.70),
)
