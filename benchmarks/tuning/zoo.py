"""Kernels to learn from: of models with many shapes, none of which is a model of the benchmarks."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.peers.checkpoints import save_tokenizer
from benchmarks.peers.shapes import SHAPES
from tilewright.codegen.target import CpuTarget
from tilewright.costmodel.workload import Workload
from tilewright.ir import DType, Function, Module, Return, TensorType, ops
from tilewright.passes.pipeline import Pipeline
from tilewright.workloads import kernel_tasks

DECODER_RECIPES = (("O2", "bf16"), ("O2", "f32"), ("w8a8", "bf16"), ("w4a8", "bf16"), ("w8a16", "bf16"), ("w4a16", "bf16"))
ENCODER_RECIPES = (("O2", "bf16"), ("O2", "f32"), ("w8a8", "f32"))
HIDDEN = (256, 320, 384, 448, 512, 640, 768, 960, 1024, 1152, 1280, 1536, 1792, 2304, 2560, 3072)
TOKENS = (16, 48, 64, 128, 200, 256, 384, 512)
BATCHES = (1, 1, 1, 1, 4, 8)
SHARES = {"mlir.linear": 7, "mlir.attention": 2, "mlir.loops": 4, "tvm": 4}
"""How many kernels of a family are taken from one model."""


@dataclass(frozen=True)
class Source:
    """A model to take kernels from."""

    architecture: str
    config: dict[str, Any]
    recipe: tuple[str, str]
    max_length: int | None
    sizes: dict[str, int]

    def module(self) -> Module:
        """Traced, with all passes; weights are never read."""
        from tilewright.compiler import with_length
        from tilewright.frontend import trace_folder
        passes, dtype = self.recipe
        with tempfile.TemporaryDirectory() as folder:
            write_checkpoint(self.architecture, self.config, Path(folder))
            module = trace_folder(folder, dtype=dtype)
            with_length(Pipeline.parse(passes), self.max_length).run(module)
        return module


def sources(count: int, seed: int) -> Iterator[Source]:
    """``count`` models, always the same: three of four are decoders."""
    rng = np.random.default_rng(seed)
    known = {shape.config["hidden_size"] for shape in SHAPES.values()}
    for i in range(count):
        hidden = int(rng.choice([h for h in HIDDEN if h not in known]))
        head = int(rng.choice([size for size in (32, 64, 96, 128) if hidden % size == 0]))
        heads = hidden // head
        inner = int(hidden * rng.choice((2.667, 3.0, 3.5, 4.0, 5.333))) // 64 * 64
        shape = {"hidden_size": hidden, "num_attention_heads": heads, "intermediate_size": inner, "num_hidden_layers": 2}
        sizes = {"B": int(rng.choice(BATCHES)), "S": int(rng.choice(TOKENS))}
        if i % 4 == 3:
            recipe = ENCODER_RECIPES[int(rng.integers(len(ENCODER_RECIPES)))]
            yield Source("BertModel", {**shape, "vocab_size": 4096, "max_position_embeddings": 512}, recipe, None, sizes)
            continue
        groups = int(rng.choice([n for n in (1, 2, 3, 4, 6, 8) if heads % n == 0]))
        vocabulary = int(rng.choice((8192, 16384, 24576, 40960)))
        more = {"num_key_value_heads": heads // groups, "vocab_size": vocabulary, "max_position_embeddings": 8192}
        recipe = DECODER_RECIPES[int(rng.integers(len(DECODER_RECIPES)))]
        architecture = ("LlamaForCausalLM", "Qwen2ForCausalLM")[int(rng.integers(2))]
        yield Source(architecture, {**shape, **more}, recipe, int(rng.choice((512, 1024, 2048, 4096))), sizes)


def write_checkpoint(architecture: str, config: dict[str, Any], folder: Path) -> None:
    """A Hugging Face folder whose numbers are all equal: only shapes matter."""
    import torch
    import transformers

    kind = getattr(transformers, architecture)
    made = kind.config_class(**config, bos_token_id=None, eos_token_id=257, pad_token_id=257)
    made.architectures = [architecture]
    with torch.device("meta"):
        model = kind(made).to(torch.bfloat16)
    model.to_empty(device="cpu")
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.02)
    model.save_pretrained(folder)
    save_tokenizer(512, folder)


def workloads(target: CpuTarget, threads: int, count: int, seed: int) -> Iterator[Workload]:
    """Workloads of ``count`` models, each once, and of single operations."""
    seen: set[str] = set()
    rng = np.random.default_rng(seed)
    for source in sources(count, seed):
        found: dict[str, list[Workload]] = {}
        for task in kernel_tasks(source.module(), target, source.sizes):
            if len(task.space(target)) > 1:
                found.setdefault(task.emitter.name, []).append(task.workload(target, threads))
        for family, own in found.items():
            fresh = [w for w in own if w.key not in seen]
            chosen = rng.permutation(len(fresh))[: SHARES[family]]
            seen |= {fresh[i].key for i in chosen}
            yield from (fresh[i] for i in chosen)
    for module in single_operations(seed, 3 * count // 2):
        [task] = kernel_tasks(module, target)
        yield task.workload(target, threads)


def single_operations(seed: int, count: int) -> Iterator[Module]:
    """Convolutions, pooling, batched products: what TVM lowers."""
    rng = np.random.default_rng(seed)

    def pick(*values: int) -> int:
        return int(rng.choice(values))

    for _ in range(count):
        kind = pick(0, 0, 0, 1, 2)
        if kind == 2:
            batch, m, n, k = pick(4, 8, 12), pick(32, 64, 128, 200), pick(32, 64, 96, 128), pick(32, 64, 128)
            yield _one([(batch, m, k), (batch, k, n)], ops.Matmul)
            continue
        channels, size = pick(8, 16, 32, 48, 64, 96, 128), pick(7, 14, 28, 56)
        image = (1, channels, size, size)
        if kind == 1:
            yield _one([image], lambda x: ops.MaxPool(x, (3, 3), (1, 1), (1, 1), (1, 1)))
            continue
        width, stride = pick(1, 3, 3, 5), pick(1, 1, 2)
        groups = pick(1, 1, channels)
        outputs = channels if groups > 1 else pick(16, 32, 64, 96, 128)
        weight = (outputs, channels // groups, width, width)
        pad = width // 2
        more = {"stride": (stride, stride), "padding": (pad, pad), "dilation": (1, 1), "groups": groups}
        yield _one([image, weight], partial(ops.Conv, **more))


def _one(shapes: list[tuple[int, ...]], make: Any) -> Module:
    """A module of one operation, after all passes."""
    module = Module("one")
    entry = Function("forward")
    op = entry.append(make(*(entry.arg(f"x{i}", TensorType(shape, DType.f32)) for i, shape in enumerate(shapes))))
    entry.append(Return(op.results))
    module.add(entry)
    Pipeline.parse("O2").run(module)
    return module
