"""What compressing each layer alone does to the outputs of a model.

The pipeline runs up to its first pass that compresses; that module is the reference. Then each layer in turn is compressed
as the whole pipeline does it, the others stay, and the interpreter runs on a few samples. Time is the number of layers
times that of the interpreter on the samples.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, replace
from fnmatch import fnmatch
from glob import escape
from typing import Any

import numpy as np

from tilewright.bisect import copy_of
from tilewright.evaluation import scores
from tilewright.ir import Module, PassError, Weight, interpret, ops
from tilewright.passes.base import Pass, PassContext
from tilewright.passes.pipeline import Pipeline

Array = np.ndarray[Any, Any]
Inputs = Mapping[str, Array]
Row = dict[str, Any]
TOKENS = 1024
"""Of the samples, at most, unless told."""


@dataclass(frozen=True)
class Steps:
    """A pipeline in the parts that matter here: what comes before compressing, and what compresses."""

    before: tuple[Pass, ...]
    compressing: tuple[Pass, ...]

    @classmethod
    def of(cls, pipeline: Pipeline) -> Steps:
        """Raises PassError for a pipeline that compresses no layer."""
        at = [i for i, p in enumerate(pipeline.passes) if compresses(p)]
        if not at:
            raise PassError(f"the pipeline {pipeline} has no pass that compresses layers (quantize): no sensitivity to it")
        return cls(pipeline.passes[: at[0]], tuple(p for p in pipeline.passes[at[0] : at[-1] + 1] if compresses(p)))


def compresses(p: Pass) -> bool:
    """Whether ``p`` stores weights in another format, and can be told which ones."""
    return {"only", "scheme"} <= {f.name for f in fields(p)}


def sensitivity(module: Module, pipeline: Pipeline, samples: Sequence[Inputs], options: Mapping[str, Any] | None = None,
                progress: Callable[[int, int], None] | None = None) -> list[Row]:  # fmt: skip
    """One row a layer, the most sensitive first; ``module`` is left as it is.

    ``layer``: its module path; ``weights``: their names; ``error``: root mean square of what changes in the outputs,
    relative to theirs. Of a causal language model also ``kl``: KL(reference || model) in nats a token, and ``perplexity``:
    the share by which it grows. ``samples`` are inputs of ``@forward`` by name, ``options`` those of the passes.
    """
    steps = Steps.of(pipeline)
    base = copy_of(module)
    Pipeline(steps.before).run(base, ctx=PassContext(options or {}))
    whole = copy_of(base)
    Pipeline(steps.compressing).run(whole, ctx=PassContext(options or {}))
    want = [outputs(base, sample) for sample in samples]
    layers, rows = list(layers_of(base, whole)), []
    for done, (path, names) in enumerate(layers):
        got = [outputs(alone(base, whole, steps, names), sample) for sample in samples]
        rows.append({"layer": path or ", ".join(names), "weights": list(names), **change(module, samples, want, got)})
        if progress is not None:
            progress(done + 1, len(layers))
    return sorted(rows, key=lambda row: -row.get("kl", row["error"]))


def layers_of(base: Module, whole: Module) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Module path and weights of each layer that was compressed: a gated layer has two, a tied table counts once."""
    seen: set[str] = set()
    left = names_used(whole)
    for op in base.functions["forward"].walk(ops.Linear, ops.GatedLinear):
        weights = [getattr(op, field) for field in (("weight",) if isinstance(op, ops.Linear) else ("gate", "up"))]
        names = tuple(name for w in weights if (name := getattr(w, "name", None)) in base.weights)
        if set(names) - left and not seen & set(names):
            seen |= set(names)
            yield op.loc.module, names


def names_used(module: Module) -> set[str]:
    """Weights that some layer reads as they are."""
    layers = module.functions["forward"].walk(ops.Linear, ops.GatedLinear)
    return {v.name for op in layers for v in op.operands if isinstance(v, Weight)}


def alone(base: Module, whole: Module, steps: Steps, names: tuple[str, ...]) -> Module:
    """``base`` with the layer of the weights ``names`` compressed, with the numbers that the whole pipeline gave it."""
    module = copy_of(base)
    passes = [narrowed(p, names) for p in steps.compressing]
    Pipeline(tuple(p for p in passes if p is not None)).run(module)
    for name, weight in module.weights.items():
        if name in whole.weights:
            weight.source = whole.weights[name].source
    return module


def narrowed(p: Any, names: tuple[str, ...]) -> Pass | None:
    """``p`` for the weights ``names`` alone, None when it leaves them; without calibration: its layout is wanted only."""
    taken = tuple(escape(n) for n in names if not p.only or any(fnmatch(n, pattern) for pattern in p.only))
    method = {"method": "rtn"} if "method" in {f.name for f in fields(p)} else {}
    return replace(p, only=taken, **method) if taken else None


def outputs(module: Module, sample: Inputs) -> Array:
    """The logits of a language model, else the first output; f32."""
    results = interpret(module, "forward", sample)
    names = json.loads(module.meta.get("outputs", "[]"))
    wanted = names.index(module.meta["logits"]) if module.meta.get("logits") in names else 0
    return np.asarray(results[wanted], np.float32)


def change(module: Module, samples: Sequence[Inputs], want: Sequence[Array], got: Sequence[Array]) -> Row:
    """What of the outputs changed."""
    square = sum(float(((a - b).astype(np.float64) ** 2).sum()) for a, b in zip(want, got))
    row = {"error": math.sqrt(square / sum(float((a.astype(np.float64) ** 2).sum()) for a in want))}
    if module.meta.get("task") != "causal-lm":
        return row
    ids = [next(iter(sample.values())) for sample in samples]
    parts = [scores(g[:, :-1], w[:, :-1], i[:, 1:]) for g, w, i in zip(got, want, ids)]
    loss, before, kl = (np.concatenate([getattr(p, n) for p in parts]) for n in ("loss", "reference", "kl"))
    return row | {"kl": float(kl.mean()), "perplexity": math.exp(loss.mean() - before.mean()) - 1}


def few(batches: Sequence[Inputs], tokens: int = TOKENS) -> list[Inputs]:
    """The first rows of ``batches``, at most ``tokens`` tokens of them but one row at least."""
    found: list[Inputs] = []
    left = tokens
    for batch in batches:
        length = next(iter(batch.values())).shape[1] if next(iter(batch.values())).ndim > 1 else 1
        rows = max(left // length, 0 if found else 1)
        if not rows:
            break
        found.append({name: array[:rows] for name, array in batch.items()})
        left -= length * len(next(iter(found[-1].values())))
    return found
