"""tilewright: compiled from the checkpoint, run as a user runs it."""

from __future__ import annotations

import hashlib
import json
import struct
import subprocess
from itertools import count
from pathlib import Path
from statistics import median
from time import perf_counter
from typing import Any, ClassVar

from benchmarks.peers.peer import Engine, Peer, Variant, prompt, run_worker
from benchmarks.peers.shapes import Shape
from benchmarks.peers.workplace import StepError, Workplace

CAPACITY = {"L": 4224}
"""Tokens in the KV cache; 1024 for other models."""
FINGERPRINT = """
import hashlib, pathlib, tilewright.codegen, tilewright.frontend, tilewright.ir, tilewright.passes, tilewright.runtime
digest = hashlib.sha256()
for part in ("", ".codegen", ".frontend", ".ir", ".passes", ".runtime"):
    for path in sorted(pathlib.Path(__import__("sys").modules["tilewright" + part].__file__).parent.rglob("*")):
        if path.suffix in (".py", ".c", ".h", ".lark"):
            digest.update(path.read_bytes())
print(digest.hexdigest()[:16])
"""


def _recipe(name: str, width: str, passes: str, dtype: str, a8: bool = False, models: str = "SML") -> tuple[Variant, ...]:
    """A recipe for this machine, and one held to AVX2."""
    options = {"passes": passes, "dtype": dtype, "target": "native"}
    held = {**options, "target": "x86-64-v3"}
    return (Variant(name, width, models, a8=a8, options=options),
            Variant(f"{name}-avx2", width, models, rounds=3, isa="avx2", a8=a8, options=held))  # fmt: skip


class Tilewright(Peer):
    name: ClassVar[str] = "tilewright"
    title: ClassVar[str] = "tilewright"
    variants: ClassVar[tuple[Variant, ...]] = (
        *_recipe("f32", "f32", "O2", "f32", models="SMLE"),
        *_recipe("bf16", "bf16", "O2", "bf16", models="SMLE"),
        *_recipe("w8a16", "int8", "w8a16", "bf16", models="S"),
        *_recipe("w8a8", "int8", "w8a8", "bf16", a8=True, models="SMLE"),
        *_recipe("w4a16", "int4", "w4a16", "bf16", models="S"),
        *_recipe("w4a8", "int4", "w4a8", "bf16", a8=True),
        Variant("w8a8-f32", "int8", "E", a8=True, options={"passes": "w8a8", "dtype": "f32", "target": "native"}),
    )

    def path(self, place: Workplace, shape: Shape, variant: Variant) -> Path:
        return place.model(shape.name) / f"tilewright-{variant.name}"

    def prepare(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        log = self.step_name(shape, variant)
        made_from = f"{fingerprint(place)} {sorted(variant.options.items())}"
        place.step(log, made_from, lambda: run_worker(place, self, shape, variant, log))

    def convert(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        import tilewright

        compile_options: dict[str, Any] = dict(variant.options)
        if not shape.is_encoder:
            compile_options["max_length"] = CAPACITY.get(shape.name, 1024)
        tilewright.compile(place.model(shape.name) / "hf", out=self.path(place, shape, variant), **compile_options)

    def load(self, place: Workplace, shape: Shape, variant: Variant, threads: int) -> Engine:
        return Model(self.path(place, shape, variant), shape, threads)


def fingerprint(place: Workplace) -> str:
    """A hash of the sources of the tilewright that ``place`` measures."""
    command = [place.own_python, "-c", FINGERPRINT]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=place.cache)
    if done.returncode:
        raise StepError(f"{place.own_python} cannot import tilewright: {done.stderr[-500:]}")
    return done.stdout.strip()


class Model(Engine):
    def __init__(self, path: Path, shape: Shape, threads: int) -> None:
        import tilewright

        self.path, self.shape, self.seeds = path, shape, count()
        self.session = tilewright.load(path).session(threads)

    def prefill(self, tokens: int) -> float:
        return self._times(tokens, 1)[0]

    def decode(self, context: int, tokens: int) -> float:
        times = self._times(context, tokens + 1)
        return times[-1] - times[0]

    def _times(self, context: int, tokens: int) -> list[float]:
        """When each new token was there, from the start."""
        times: list[float] = []
        ids = prompt(self.shape, context, next(self.seeds))
        start = perf_counter()
        self.session.generate([ids], tokens, callback=lambda step, new: times.append(perf_counter() - start))
        return times

    def encode(self, batch: int, length: int) -> float:
        import numpy as np

        ids = np.array([prompt(self.shape, length, i) for i in range(batch)], np.int64)
        inputs = {"input_ids": ids, "attention_mask": np.ones_like(ids)}
        start = perf_counter()
        self.session("forward", **inputs)
        return perf_counter() - start

    def attention(self, near: int, far: int) -> float:
        """Seconds that a decode step at position ``far`` takes longer than one at ``near``; steps alternate."""
        import numpy as np

        def step(position: int) -> float:
            start = perf_counter()
            self.session("decode", ids=np.array([[300]]), start=np.array([position]))
            return perf_counter() - start

        pairs = [(step(near), step(far)) for _ in range(24)]
        return median(b - a for a, b in pairs[4:])

    def facts(self) -> dict[str, Any]:
        with (self.path / "weights.safetensors").open("rb") as file:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(length))
        return {
            "artifact": hashlib.sha256((self.path / "manifest.json").read_bytes()).hexdigest()[:16],
            **weight_bytes(header),
            "cache_bytes": self.session.sizes.full,
            "capacity": self.session.capacity,
        }


def weight_bytes(header: dict[str, Any]) -> dict[str, int]:
    """Bytes of all weights, and of those that a decode step reads: all but tables of which it takes a row."""
    total = read = 0
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        start, end = entry["data_offsets"]
        total += end - start
        is_table = "|" not in name and ("embed_tokens" in name or name.startswith("position_table"))
        read += 0 if is_table else end - start
    return {"weight_bytes": total, "step_bytes": read}
