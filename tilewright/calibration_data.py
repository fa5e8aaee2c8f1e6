"""What ``compile(calibration=...)`` takes: a text, token ids, or the inputs of the model themselves."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.eval_subjects import inputs_by_name
from tilewright.ir import Module
from tilewright.texts import TextError, check_vocabulary, read_text, sentences, token_ids, tokenizer_of, windows

Array = np.ndarray[Any, Any]
Batch = dict[str, Array]
TOKENS, WINDOW = 16384, 256
"""How much of a text is used, and in pieces of how many tokens, unless told."""
_BATCH_TOKENS = 2048


@dataclass(frozen=True)
class Calibration:
    """Calibration data before the model is traced. Of a text, at most ``tokens`` are used, ``window`` at a time."""

    given: Any
    folder: Path | None
    tokens: int = TOKENS
    window: int = WINDOW

    def __post_init__(self) -> None:
        """Reads a text, so that one that cannot be used is refused before any work. Raises TextError, ArtifactError."""
        if self.tokens < 1 or self.window < 2:
            raise TextError(f"calibration takes 1 token or more, 2 or more a window; got {self.tokens} and {self.window}")
        if self.is_text:
            read_text(self.given)
            tokenizer_of(self.folder)
        elif not isinstance(self.given, (Sequence, np.ndarray)):
            kind = type(self.given).__name__
            raise TextError(f"calibration is the path of a text, token ids, or a list of inputs by name; got {kind}")
        elif not len(self.given):
            raise TextError("the calibration data are empty; give a text of some thousand tokens")

    @property
    def is_text(self) -> bool:
        return isinstance(self.given, (str, os.PathLike))

    def inputs(self, module: Module) -> list[Batch]:
        """Inputs of ``@forward`` of the traced module, a mapping a micro-batch. Raises TextError for what does not fit."""
        names = [a.name or "" for a in module.functions["forward"].args]
        if not self.is_text and isinstance(self.given[0], Mapping):
            return [batch_of(batch, module, i) for i, batch in enumerate(self.given)]
        if module.meta.get("task") == "causal-lm" or not self.is_text:
            return self.token_batches(names, module)
        return self.sentence_batches(names)

    def token_batches(self, names: list[str], module: Module) -> list[Batch]:
        """Windows that follow each other, about 2,048 tokens a batch."""
        ids = token_ids(self.given, self.folder) if self.is_text else np.asarray(self.given)
        longest = module.dims.get(str(module.functions["forward"].args[0].shape[-1]), (1, self.window))[1]
        if ids.ndim == 1:
            count = min(self.window, longest)
            ids = windows(np.append(token_ids(ids, None), 0), count + 1, count, max(count, self.tokens))[:, :-1]
        if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
            got = f"{ids.dtype}{list(ids.shape)}"
            raise TextError(f"token ids to calibrate on are a row, or rows [B, S], of integers; got {got}")
        size = module.meta.get("vocab_size")
        check_vocabulary(ids, int(size) if size else None, "calibration")
        rows = max(1, _BATCH_TOKENS // ids.shape[1])
        parts = [np.ascontiguousarray(ids[i : i + rows], np.int64) for i in range(0, len(ids), rows)]
        return [inputs_by_name(names, part, np.ones_like(part)) for part in parts]

    def sentence_batches(self, names: list[str]) -> list[Batch]:
        """The lines of a text, those of equal length together: padding would count as data."""
        lines = sentences(read_text(self.given), tokenizer_of(self.folder), self.window)
        taken = np.cumsum([len(line) for line in lines])
        groups: dict[int, list[list[int]]] = {}
        for line, end in zip(lines, taken):
            if end - len(line) < self.tokens:
                groups.setdefault(len(line), []).append(line)
        arrays = [np.array(rows, np.int64) for _, rows in sorted(groups.items())]
        return [inputs_by_name(names, ids, np.ones_like(ids)) for ids in arrays]


def batch_of(batch: Any, module: Module, index: int) -> Batch:
    """One mapping of the user's, with arrays of the function's types. Raises TextError for other names."""
    args = {a.name or "": a for a in module.functions["forward"].args}
    if not isinstance(batch, Mapping) or set(batch) != set(args):
        has = sorted(batch) if isinstance(batch, Mapping) else type(batch).__name__
        raise TextError(f"calibration[{index}] has {has}; the model takes {', '.join(args)}")
    found = {}
    for name, arg in args.items():
        array = np.asarray(batch[name])
        if array.ndim != arg.tensor.rank or array.dtype.kind not in ("f" if arg.dtype.is_float else "iub"):
            got = f"{array.dtype}{list(array.shape)}"
            raise TextError(f"calibration[{index}][{name!r}] is {got}; the model takes {arg.type}")
        found[name] = np.ascontiguousarray(array.astype(arg.dtype.np))
    return found
