"""What is evaluated: an artifact, a folder that is compiled for it, a module; and how each gives its logits."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from tilewright.ir import Module
from tilewright.texts import TextError

if TYPE_CHECKING:
    from tilewright.passes.pipeline import Pipeline
    from tilewright.runtime import Program, Session

Array = np.ndarray[Any, Any]


@dataclass
class Subject(ABC):
    """A model to evaluate, before any long work. ``vocabulary`` and ``longest`` (tokens) are None where nothing says."""

    name: str
    task: str
    vocabulary: int | None
    longest: int | None
    folder: Path | None
    """Where its tokenizer lies."""

    @abstractmethod
    def start(self) -> Run:
        """Compile or load; gives what runs."""


class Run(ABC):
    """A model that runs. Close it when done."""

    @abstractmethod
    def logits(self, ids: Array, first: int) -> Array:
        """Logits f32 ``[B, W - first, V]`` of the tokens from ``first`` on, for windows of tokens ``[B, W]``.

        ``[:, i]`` is what the model expects at ``first + i``, given all tokens of the window before that.
        """

    @abstractmethod
    def embeddings(self, ids: Array, mask: Array) -> Array:
        """One vector a sentence, f32 ``[B, H]``; ids and mask ``[B, S]``, padded on the right."""

    def close(self) -> None:  # noqa: B027  an interpreter holds nothing
        """Give back threads and memory."""


# ---- compiled --------------------------------------------------------------------------------------------------------


@dataclass
class Artifact(Subject):
    """A compiled program: its entry ``forward``, or ``prefill`` and ``decode`` over the cache."""

    program: Program
    threads: int | None = None

    def start(self) -> Run:
        return CompiledRun(self.program, self.threads)


def artifact(program: Program, threads: int | None = None) -> Artifact:
    """The subject that an artifact is."""
    manifest = program.manifest
    meta, entry = manifest.meta, manifest.entries.get("forward") or manifest.entries.get("prefill")
    if entry is None:
        raise TextError(f"{program.path}: has no entry forward or prefill; there are {', '.join(manifest.entries)}")
    high = entry.inputs[0].high
    size = int(meta["vocab_size"]) if "vocab_size" in meta else None if high is None else high + 1
    lengths = [s.length for s in manifest.states]
    lengths += [d.max for d in entry.dims if d.name in entry.inputs[0].shape[1:]]
    task = meta.get("task", "causal-lm" if manifest.states else "encoder")
    return Artifact(Path(program.path).name, task, size, min(lengths, default=None), Path(program.path), program, threads)


class CompiledRun(Run):
    """Runs a program. ``keep`` is what must live as long (a temporary folder)."""

    def __init__(self, program: Program, threads: int | None = None, keep: Any = None) -> None:
        self.program, self.threads, self.keep = program, threads, keep
        self.session: Session | None = None

    def opened(self, batch: int) -> Session:
        """A session for at least ``batch`` sequences."""
        if self.session is None or self.session.batch < batch:
            self.close()
            self.session = self.program.session(self.threads, batch)
        return self.session

    def logits(self, ids: Array, first: int) -> Array:
        if "forward" not in self.program.manifest.entries:
            return self.decoded(ids, first)
        session = self.opened(1)
        outputs = session("forward", **{session.entry("forward").inputs[0].name: ids})
        every = outputs.get("logits", next(iter(outputs.values())))
        return np.asarray(every[:, first - 1 : -1], np.float32)

    def decoded(self, ids: Array, first: int) -> Array:
        """Logits from the cache: the context in chunks, the rest token by token, all windows side by side."""
        from tilewright.runtime.following import follow

        steps = follow(self.opened(len(ids)), ids, first)
        return np.stack([np.asarray(step, np.float32) for step in steps], axis=1)

    def embeddings(self, ids: Array, mask: Array) -> Array:
        session = self.opened(1)
        names = [t.name for t in session.entry("forward").inputs]
        given = inputs_by_name(names, ids, mask)
        return pooled(next(iter(session("forward", **given).values())), mask)

    def close(self) -> None:
        if self.session is not None:
            self.session.close()
            self.session = None


# ---- compiled on the way ---------------------------------------------------------------------------------------


@dataclass
class Traced(Subject):
    """A module that is compiled when its turn comes; a language model without its cache, so that all logits are had."""

    module: Module
    compile: Callable[[Module], Any]

    def start(self) -> Run:
        done = self.compile(self.module)
        return CompiledRun(done.program, keep=done)


def described(module: Module, folder: Path | None) -> tuple[str, str, int | None, int | None, Path | None]:
    """The first fields of a subject, by what a traced module says of itself."""
    size, longest = module.meta.get("vocab_size"), None
    forward = module.functions.get("forward")
    if forward is not None and forward.args:
        bounds = [module.dims.get(str(d)) for d in forward.args[0].shape[1:2]]
        longest = bounds[0][1] if bounds and bounds[0] else None
    name = module.name if folder is None else folder.name
    return name, module.meta.get("task", "encoder"), int(size) if size else None, longest, folder


def without_cache(pipeline: Pipeline) -> Pipeline:
    """The pipeline without the passes that make prefill and decode of forward."""
    from tilewright.passes.pipeline import Pipeline

    return Pipeline(tuple(p for p in pipeline.passes if p.name != "kv-layout"))


class InterpretedRun(Run):
    """Runs ``@forward`` of a module in the interpreter."""

    def __init__(self, module: Module) -> None:
        self.module = module

    def outputs(self, ids: Array, mask: Array) -> Array:
        from tilewright.ir import interpret

        names = [a.name or "" for a in self.module.functions["forward"].args]
        return interpret(self.module, "forward", inputs_by_name(names, ids, mask))[0]

    def logits(self, ids: Array, first: int) -> Array:
        return np.asarray(self.outputs(ids, np.ones_like(ids))[:, first - 1 : -1], np.float32)

    def embeddings(self, ids: Array, mask: Array) -> Array:
        return pooled(self.outputs(ids, mask), mask)


def inputs_by_name(names: list[str], ids: Array, mask: Array) -> dict[str, Array]:
    """Inputs of a text model: masks by their name, token types are zeros, the tokens are the remaining one.

    Raises TextError for a model that takes something else.
    """
    known: dict[str, Array] = {}
    for name in names:
        if "mask" in name:
            known[name] = mask
        elif "type" in name:
            known[name] = np.zeros_like(ids)
        else:
            known[name] = ids
    if len([n for n in names if known[n] is ids]) != 1:
        raise TextError(f"the model takes {', '.join(names)}: a text gives tokens and a mask alone")
    return known


def pooled(hidden: Array, mask: Array) -> Array:
    """The mean over the kept tokens of ``[B, S, H]``; ``[B, H]`` as it is."""
    hidden = np.asarray(hidden, np.float32)
    if hidden.ndim == 2:
        return hidden
    kept = mask[..., None].astype(np.float32)
    return np.asarray((hidden * kept).sum(1) / kept.sum(1))
