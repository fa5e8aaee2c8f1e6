"""The tokenizer that came with a model (``tokenizer.json``), and text from tokens as they come."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tilewright.runtime.errors import ArtifactError, MissingExtraError

_UNFINISHED = "\N{REPLACEMENT CHARACTER}"
"""What a decoder gives for bytes that are not (yet) whole characters."""


class Tokenizer:
    """Text to token ids and back. ``stop_tokens``: the ids that end a text, from the model's own configuration."""

    def __init__(self, path: str | os.PathLike[str]) -> None:
        """``path``: an artifact or model folder, or a tokenizer.json. Raises ArtifactError or MissingExtraError."""
        path = Path(path)
        file = path / "tokenizer.json" if path.is_dir() else path
        if not file.is_file():
            raise ArtifactError(f"{file}: no such file; the model came without a tokenizer.json, so give token ids "
                                "instead of text, or put the model's tokenizer.json there")
        self._tokenizer = _tokenizers().Tokenizer.from_file(str(file))
        self._tokenizer.no_padding()  # an encoder's file may ask for both; they would change a text unasked
        self._tokenizer.no_truncation()
        self.stop_tokens = _stop_tokens(file.parent)

    @property
    def size(self) -> int:
        """Token ids, the added ones included."""
        return int(self._tokenizer.get_vocab_size())

    def encode(self, text: str, special: bool = True) -> list[int]:
        """The token ids of ``text``; ``special``: with what the model expects around a text (such as its first)."""
        return list(self._tokenizer.encode(text, add_special_tokens=special).ids)

    def decode(self, tokens: Sequence[int], skip_special: bool = True) -> str:
        return str(self._tokenizer.decode([int(token) for token in tokens], skip_special_tokens=skip_special))

    def stream(self, skip_special: bool = True) -> Detokenizer:
        return Detokenizer(self, skip_special)


class Detokenizer:
    """Text from one sequence's tokens as they come: ``put`` each token, then ``end``; the pieces join to the whole.

    A token may hold a part of a character, and its text may depend on the one before (a leading space). So a window
    of the newest tokens is decoded with and without the new one; what is not yet a whole character is held back.
    """

    _LONGEST = 8
    """Tokens held back at most, for texts with bytes that never become a character (one takes at most 4 bytes)."""

    def __init__(self, tokenizer: Tokenizer, skip_special: bool = True) -> None:
        self._tokenizer = tokenizer
        self._skip_special = skip_special
        self._window: list[int] = []
        self._given = 0
        """Tokens of the window whose text was given."""

    def put(self, token: int) -> str:
        """The text that ``token`` completes; may be empty."""
        self._window.append(token)
        text = self._decode(self._window)
        waiting = len(self._window) - self._given
        if text.endswith(_UNFINISHED) and waiting < self._LONGEST:
            return ""
        return self._give(text)

    def end(self) -> str:
        """The text still held back, incomplete characters as they are; begins anew."""
        piece = self._give(self._decode(self._window))
        self._window, self._given = [], 0
        return piece

    def _give(self, text: str) -> str:
        before = self._decode(self._window[: self._given])
        if len(text) <= len(before):
            return ""
        self._window = self._window[self._given :]
        self._given = len(self._window)
        return text[len(before) :]

    def _decode(self, tokens: Sequence[int]) -> str:
        return self._tokenizer.decode(tokens, self._skip_special)


def _tokenizers() -> Any:
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("reading tokenizer.json needs the package tokenizers; pip install tilewright[text]"
                                ) from error
    return tokenizers


def _stop_tokens(folder: Path) -> tuple[int, ...]:
    for name in ("generation_config.json", "config.json"):
        try:
            found = json.loads((folder / name).read_text()).get("eos_token_id")
        except (OSError, ValueError, AttributeError):
            continue
        if found is not None:
            return tuple(found) if isinstance(found, list) else (int(found),)
    return ()
