"""A tiny artifact made without the compiler: a C file with the program ABI, and what it computes, in numpy.

Entries: ``scale(x[N,8]) -> y[N,8] = x * FACTOR + w`` and ``twice[2N]``, and a "language model" with prefill and decode
whose logits mix every token in the KV state with its position, so that any wrong slot shows.
"""

from __future__ import annotations

import functools
import subprocess
import tempfile
from pathlib import Path

import numpy as np

from tilewright.runtime.artifact import (
    ArtifactWriter,
    DimSpec,
    EntrySpec,
    Manifest,
    StateSpec,
    TargetSpec,
    TensorSpec,
    WeightSpec,
    native_sources,
    plan_weights,
)

VOCABULARY = 24
CAPACITY = 20
WEIGHT = np.arange(8, dtype=np.float32) / 4

SOURCE = r"""
#include <string.h>
#include "pool.h"
#ifndef FACTOR
#define FACTOR 2
#endif
#define V 24
#define L 20
typedef struct { const float *x; float *y; const float *w; } scale_args;
static void scale_task(int64_t begin, int64_t end, void *arg) {
    scale_args *a = arg;
    for (int64_t i = begin; i < end; i++)
        for (int j = 0; j < 8; j++) a->y[i * 8 + j] = a->x[i * 8 + j] * FACTOR + a->w[j];
}
TW_EXPORT void tw_scale_sizes(const int64_t *dims, int64_t *out) {
    out[0] = dims[0] * 32;
    out[1] = dims[0];
    out[2] = 8;
    out[3] = 2 * dims[0];
}
TW_EXPORT int32_t tw_scale(tw_pool *pool, const int64_t *dims, void *const *inputs, void *const *outputs,
                           void *const *states, const uint8_t *weights, uint8_t *arena) {
    (void)states;
    memcpy(arena, inputs[0], dims[0] * 32);
    scale_args a = {(const float *)arena, outputs[0], (const float *)(weights + W_OFFSET)};
    tw_pool_run(pool, scale_task, &a, dims[0], 1);
    for (int64_t i = 0; i < 2 * dims[0]; i++) ((int64_t *)outputs[1])[i] = i;
    return TW_OK;
}
static void logits_at(const float *k, const float *v, int64_t position, float *logits) {
    uint32_t mix = 0;
    for (int64_t j = 0; j <= position; j++) {
        uint32_t slot = (uint32_t)k[j] * 31u + (uint32_t)v[j] * 7u + 3u;
        mix += slot * (uint32_t)(j + 11) * 2654435761u;
    }
    for (uint32_t i = 0; i < V; i++) logits[i] = (float)(((mix ^ (i * 2246822519u)) * 3266489917u) >> 20) / 1024.0f;
}
static int32_t step(const int64_t *ids, const int64_t *start, const int64_t *last, int64_t B, int64_t S,
                    void *const *states, float *logits) {
    float *k = states[0], *v = states[1];
    for (int64_t b = 0; b < B; b++) {
        for (int64_t s = 0; s < S; s++) {
            int64_t id = ids[b * S + s], slot = start[b] + s;
            if (id < 0 || id >= V) return TW_ERROR_INDEX;
            if (slot < 0 || slot >= L) return TW_ERROR_CAPACITY;
            k[b * L + slot] = (float)id;
            v[b * L + slot] = (float)(id + 1);
        }
        logits_at(k + b * L, v + b * L, start[b] + (last ? last[b] : 0), logits + b * V);
    }
    return TW_OK;
}
TW_EXPORT void tw_prefill_sizes(const int64_t *dims, int64_t *out) { out[0] = 0; out[1] = dims[0]; out[2] = V; }
TW_EXPORT int32_t tw_prefill(tw_pool *pool, const int64_t *dims, void *const *inputs, void *const *outputs,
                             void *const *states, const uint8_t *weights, uint8_t *arena) {
    (void)pool; (void)weights; (void)arena;
    return step(inputs[0], inputs[1], inputs[2], dims[0], dims[1], states, outputs[0]);
}
TW_EXPORT void tw_decode_sizes(const int64_t *dims, int64_t *out) { out[0] = 0; out[1] = dims[0]; out[2] = V; }
TW_EXPORT int32_t tw_decode(tw_pool *pool, const int64_t *dims, void *const *inputs, void *const *outputs,
                            void *const *states, const uint8_t *weights, uint8_t *arena) {
    (void)pool; (void)weights; (void)arena;
    return step(inputs[0], inputs[1], 0, dims[0], 1, states, outputs[0]);
}
"""


def compile_c(text: str, *flags: str) -> bytes:
    """A shared library of ``text`` and the runtime's own C sources."""
    with tempfile.TemporaryDirectory() as folder:
        source, library = Path(folder, "program.c"), Path(folder, "out.so")
        source.write_text(text)
        include = native_sources()[0].parent
        command = ["cc", "-O3", "-Wall", "-Wextra", "-Werror", "-shared", "-fPIC", "-fvisibility=hidden", "-pthread"]
        subprocess.run(
            [*command, *flags, f"-I{include}", source, *native_sources(), "-o", library, "-lm"],
            check=True,
        )
        return library.read_bytes()


@functools.cache
def kernels(factor: int = 2) -> bytes:
    return compile_c(SOURCE, f"-DFACTOR={factor}", f"-DW_OFFSET={plan().offsets['w']}")


def plan():
    return plan_weights([WeightSpec("odd", "i8", (3,)), WeightSpec("w", "f32", (8,))])


def manifest(
    chunk: tuple[int, int] = (1, 16), batch: tuple[int, int] = (1, 4), features: tuple[str, ...] = ()
) -> Manifest:
    b, s = DimSpec("B", *batch), DimSpec("S", *chunk)
    ids = {"low": 0, "high": VOCABULARY - 1}
    start = TensorSpec("start", "i64", ("B",))
    logits = (TensorSpec("logits", "f32", ("B", VOCABULARY)),)
    scale = EntrySpec(
        (DimSpec("N", 1, 64),),
        (TensorSpec("x", "f32", ("N", 8)),),
        (TensorSpec("y", "f32", ("N", 8)), TensorSpec("twice", "i64", (None,))),
        batch=None,
    )
    prefill_inputs = (TensorSpec("ids", "i64", ("B", "S"), **ids), start, TensorSpec("last", "i64", ("B",)))
    decode_inputs = (TensorSpec("ids", "i64", ("B", 1), **ids), start)
    entries = {
        "scale": scale,
        "prefill": EntrySpec((b, s), prefill_inputs, logits, "B"),
        "decode": EntrySpec((b,), decode_inputs, logits, "B"),
    }
    state = StateSpec("kv.0", "f32", 4 * CAPACITY, 4 * CAPACITY, CAPACITY)
    return Manifest(TargetSpec("cpu{arch=x86-64}", features), entries, (state,), {"model": "toy"})


def save(path: Path, factor: int = 2, **options) -> Path:
    """Writes the toy artifact; ``options`` go to ``manifest``."""
    with ArtifactWriter(path) as writer:
        writer.add("kernels.so", kernels(factor))
        writer.add("program.c", SOURCE)
        writer.add("tokenizer/config.json", "{}")
        with writer.weights(plan()) as weights:
            weights.write("odd", np.array([1, 2, 3], np.int8))
            weights.write("w", WEIGHT)
        return writer.commit(manifest(**options))


def logits(tokens: list[int]) -> np.ndarray:
    """What the toy model says after ``tokens``: f32 [VOCABULARY]."""
    word = 2**32
    mix = 0
    for position, token in enumerate(tokens):
        mix = (mix + (token * 31 + (token + 1) * 7 + 3) * (position + 11) * 2654435761) % word
    values = [((mix ^ (i * 2246822519 % word)) * 3266489917 % word) >> 20 for i in range(VOCABULARY)]
    return np.array(values, np.float32) / np.float32(1024)
