"""A tiny artifact made without the compiler: a C file with the program ABI, and what it computes, in numpy.

Entries: ``scale(x[N,8]) -> y[N,8] = x * FACTOR + w`` and ``twice[2N]``, and a "language model" with prefill and decode
whose logits mix every token in the KV state with its position, so that any wrong slot shows. Its state may be pages of
``page`` tokens, or a ring: then logits mix the last WINDOW tokens.
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
WINDOW, CHUNK = 5, 4
"""Of rings."""
WEIGHT = np.arange(8, dtype=np.float32) / 4

SOURCE = r"""
#include <string.h>
#include "pool.h"
#ifndef FACTOR
#define FACTOR 2
#endif
#define V 24
#ifdef RING
#define WINDOW 5
#define L 9
#define LONGEST 1000000
#else
#define L 20
#define WINDOW L
#define LONGEST L
#endif
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
typedef struct { float *k, *v; const int32_t *table; } cache;
#ifdef PAGE
static int64_t slot_of(const cache *c, int64_t position) { return c->table[position / PAGE] * PAGE + position % PAGE; }
#else
static int64_t slot_of(const cache *c, int64_t position) { (void)c; return position % L; }
#endif
static void logits_at(const cache *c, int64_t position, float *logits) {
    uint32_t mix = 0;
    for (int64_t j = position < WINDOW ? 0 : position - WINDOW + 1; j <= position; j++) {
        int64_t at = slot_of(c, j);
        uint32_t slot = (uint32_t)c->k[at] * 31u + (uint32_t)c->v[at] * 7u + 3u;
        mix += slot * (uint32_t)(j + 11) * 2654435761u;
    }
    for (uint32_t i = 0; i < V; i++) logits[i] = (float)(((mix ^ (i * 2246822519u)) * 3266489917u) >> 20) / 1024.0f;
}
static int32_t step(const int64_t *ids, const int64_t *start, const int64_t *last, const int32_t *table,
                    int64_t B, int64_t S, int64_t T, void *const *states, float *logits) {
    for (int64_t b = 0; b < B; b++) {
        cache c = {states[0], states[1], table ? table + b * T : 0};
        if (!table) c.k += b * L, c.v += b * L;
        for (int64_t s = 0; s < S; s++) {
            int64_t id = ids[b * S + s], at = start[b] + s;
            if (id < 0 || id >= V) return TW_ERROR_INDEX;
            if (at < 0 || at >= LONGEST) return TW_ERROR_CAPACITY;
            c.k[slot_of(&c, at)] = (float)id;
            c.v[slot_of(&c, at)] = (float)(id + 1);
        }
    }
    for (int64_t b = 0; b < B; b++) {
        cache c = {states[0], states[1], table ? table + b * T : 0};
        if (!table) c.k += b * L, c.v += b * L;
        logits_at(&c, start[b] + (last ? last[b] : 0), logits + b * V);
    }
    return TW_OK;
}
TW_EXPORT void tw_prefill_sizes(const int64_t *dims, int64_t *out) { out[0] = 0; out[1] = dims[0]; out[2] = V; }
TW_EXPORT int32_t tw_prefill(tw_pool *pool, const int64_t *dims, void *const *inputs, void *const *outputs,
                             void *const *states, const uint8_t *weights, uint8_t *arena) {
    (void)pool; (void)weights; (void)arena;
#ifdef PAGE
    return step(inputs[0], inputs[1], inputs[2], inputs[3], dims[0], dims[1], dims[2], states, outputs[0]);
#else
    return step(inputs[0], inputs[1], inputs[2], 0, dims[0], dims[1], 0, states, outputs[0]);
#endif
}
TW_EXPORT void tw_decode_sizes(const int64_t *dims, int64_t *out) { out[0] = 0; out[1] = dims[0]; out[2] = V; }
TW_EXPORT int32_t tw_decode(tw_pool *pool, const int64_t *dims, void *const *inputs, void *const *outputs,
                            void *const *states, const uint8_t *weights, uint8_t *arena) {
    (void)pool; (void)weights; (void)arena;
#ifdef PAGE
    return step(inputs[0], inputs[1], 0, inputs[2], dims[0], 1, dims[1], states, outputs[0]);
#else
    return step(inputs[0], inputs[1], 0, 0, dims[0], 1, 0, states, outputs[0]);
#endif
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
def kernels(factor: int = 2, page: int = 0, ring: bool = False) -> bytes:
    layout = ["-DRING"] * ring + [f"-DPAGE={page}"] * (page > 0)
    return compile_c(SOURCE, f"-DFACTOR={factor}", f"-DW_OFFSET={plan().offsets['w']}", *layout)


def plan():
    return plan_weights([WeightSpec("odd", "i8", (3,)), WeightSpec("w", "f32", (8,))])


def manifest(
    chunk: tuple[int, int] = (1, 16), batch: tuple[int, int] = (1, 4), features: tuple[str, ...] = (), page: int = 0,
    ring: bool = False,
) -> Manifest:  # fmt: skip
    b, s = DimSpec("B", *batch), DimSpec("S", *chunk)
    t = (DimSpec("T", 1, -(-CAPACITY // page)),) if page else ()
    table = (TensorSpec("table", "i32", ("B", "T")),) if page else ()
    ids = {"low": 0, "high": VOCABULARY - 1}
    start = TensorSpec("start", "i64", ("B",))
    logits = (TensorSpec("logits", "f32", ("B", VOCABULARY)),)
    scale = EntrySpec(
        (DimSpec("N", 1, 64),),
        (TensorSpec("x", "f32", ("N", 8)),),
        (TensorSpec("y", "f32", ("N", 8)), TensorSpec("twice", "i64", (None,))),
        batch=None,
    )
    prefill_inputs = (TensorSpec("ids", "i64", ("B", "S"), **ids), start, TensorSpec("last", "i64", ("B",)), *table)
    decode_inputs = (TensorSpec("ids", "i64", ("B", 1), **ids), start, *table)
    entries = {
        "scale": scale,
        "prefill": EntrySpec((b, s, *t), prefill_inputs, logits, "B"),
        "decode": EntrySpec((b, *t), decode_inputs, logits, "B"),
    }
    state = StateSpec("kv.0", "f32", 4 * CAPACITY, 4 * CAPACITY, CAPACITY)
    if page:
        state = StateSpec("kv.0", "f32", 4 * page, 4 * page, CAPACITY, f"paged<{page}>", page)
    elif ring:
        held = 4 * (WINDOW + CHUNK)
        state = StateSpec("kv.0", "f32", held, held, 1_000_000, f"ring<{WINDOW}, {CHUNK}>", chunk=CHUNK)
    return Manifest(TargetSpec("cpu{arch=x86-64}", features), entries, (state,), {"model": "toy"})


def save(path: Path, factor: int = 2, **options) -> Path:
    """Writes the toy artifact; ``options`` go to ``manifest``."""
    layout = {key: options[key] for key in ("page", "ring") if key in options}
    with ArtifactWriter(path) as writer:
        writer.add("kernels.so", kernels(factor, **layout))
        writer.add("program.c", SOURCE)
        writer.add("tokenizer/config.json", "{}")
        with writer.weights(plan()) as weights:
            weights.write("odd", np.array([1, 2, 3], np.int8))
            weights.write("w", WEIGHT)
        return writer.commit(manifest(**options))


def logits(tokens: list[int], window: int = CAPACITY) -> np.ndarray:
    """What the toy model says after ``tokens``, of which it sees the last ``window``: f32 [VOCABULARY]."""
    word = 2**32
    mix = 0
    for position, token in list(enumerate(tokens))[-window:]:
        mix = (mix + (token * 31 + (token + 1) * 7 + 3) * (position + 11) * 2654435761) % word
    values = [((mix ^ (i * 2246822519 % word)) * 3266489917 % word) >> 20 for i in range(VOCABULARY)]
    return np.array(values, np.float32) / np.float32(1024)
