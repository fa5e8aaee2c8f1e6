"""PyTorch through transformers: eager, and torch.compile with its longest search."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from benchmarks.peers.peer import Engine, Peer, Variant, prompt
from benchmarks.peers.shapes import Shape
from benchmarks.peers.workplace import Workplace


class PyTorch(Peer):
    name: ClassVar[str] = "torch"
    title: ClassVar[str] = "PyTorch"
    requirements: ClassVar[tuple[str, ...]] = ("torch==2.13.0", "transformers==5.23.0", "numpy==2.4.6")
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("f32", "f32", models="SME", rounds=2),
        Variant("bf16", "bf16", models="SMLE", rounds=2),
        # compiling a decoder takes minutes, and what it makes is not among the fastest: encoders alone
        Variant("f32-compiled", "f32", models="E", rounds=1, options={"compile": True}),
        Variant("bf16-compiled", "bf16", models="E", rounds=1, options={"compile": True}),
    )

    def path(self, place: Workplace, shape: Shape, variant: Variant) -> Path:
        return place.model(shape.name) / "hf"

    def step_name(self, shape: Shape, variant: Variant) -> str:
        return f"checkpoint-{shape.name}"

    def load(self, place: Workplace, shape: Shape, variant: Variant, threads: int) -> Engine:
        os.environ["TORCHINDUCTOR_CACHE_DIR"] = str(place.folder("inductor"))
        os.environ["TORCHINDUCTOR_FREEZING"] = "1"
        import torch
        from transformers import AutoModel, AutoModelForCausalLM

        torch.set_num_threads(threads)
        torch.set_grad_enabled(False)
        kind = AutoModel if shape.is_encoder else AutoModelForCausalLM
        dtype = torch.float32 if variant.width == "f32" else torch.bfloat16
        model = kind.from_pretrained(self.path(place, shape, variant), dtype=dtype).eval()
        if not shape.is_encoder:
            return Decoder(model, shape)
        return Encoder(compiled(model) if variant.options.get("compile") else model, shape)


def compiled(model: Any) -> Any:
    """As fast as it gets, for each shape on its own; what was found is kept in a folder of ours."""
    import torch

    return torch.compile(model, mode="max-autotune", dynamic=False)


class Decoder(Engine):
    def __init__(self, model: Any, shape: Shape) -> None:
        self.model, self.shape, self.seeds = model, shape, count()

    def prefill(self, tokens: int) -> float:
        return self._generate(tokens, 1)

    def decode(self, context: int, tokens: int) -> float:
        return self._generate(context, tokens + 1) - self._generate(context, 1)

    def _generate(self, context: int, tokens: int) -> float:
        import torch

        ids = torch.tensor([prompt(self.shape, context, next(self.seeds))])
        start = perf_counter()
        self.model.generate(ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=tokens,
                            min_new_tokens=tokens)  # fmt: skip
        return perf_counter() - start


class Encoder(Engine):
    def __init__(self, model: Any, shape: Shape) -> None:
        self.model, self.shape = model, shape

    def encode(self, batch: int, length: int) -> float:
        import torch

        ids = torch.tensor([prompt(self.shape, length, i) for i in range(batch)])
        mask = torch.ones_like(ids)
        start = perf_counter()
        self.model(input_ids=ids, attention_mask=mask)
        return perf_counter() - start
