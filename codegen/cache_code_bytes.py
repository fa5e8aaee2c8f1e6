"""Codes of keys and values to the bytes of a run of `CodeLayout`, and back, in NumPy."""

import numpy as np

from tilewright.codegen.packing import code_pair


def pack_keys(codes: np.ndarray, bits: int, panel: int) -> np.ndarray:
    """Unsigned codes ``[..., run, size]`` -> bytes."""
    *first, run, _ = codes.shape
    words = _words(codes.reshape(*first, run // panel, panel, -1, code_pair(bits)), bits)
    return np.swapaxes(words, -3, -2).reshape(*first, -1)


def unpack_keys(packed: np.ndarray, bits: int, panel: int, run: int) -> np.ndarray:
    words = packed.reshape(*packed.shape[:-1], run // panel, -1, panel, 4)
    return _parts(np.swapaxes(words, -3, -2), bits).reshape(*packed.shape[:-1], run, -1)


def pack_values(codes: np.ndarray, bits: int, panel: int) -> np.ndarray:
    """Codes ``[..., run, size]`` -> bytes."""
    *first, _, size = codes.shape
    pairs = np.swapaxes(codes.reshape(*first, -1, code_pair(bits), size), -1, -2)
    words = _words(pairs, bits)
    return np.concatenate([words[..., at:at + panel, :].reshape(*first, -1) for at in range(0, size, panel)], -1)


def unpack_values(packed: np.ndarray, bits: int, panel: int, run: int) -> np.ndarray:
    first, each = packed.shape[:-1], run * bits // 8  # bytes of one component
    size = packed.shape[-1] // each
    panels = [packed[..., at * each:min(at + panel, size) * each] for at in range(0, size, panel)]
    words = [x.reshape(*first, run // code_pair(bits), -1, 4) for x in panels]
    return np.swapaxes(_parts(np.concatenate(words, -2), bits), -1, -2).reshape(*first, run, size)


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[..., pair]`` -> ``[..., 4]`` bytes."""
    quads = codes.reshape(*codes.shape[:-1], -1, 4) << (bits * np.arange(8 // bits, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(quads, -2)


def _parts(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of ``_words``."""
    quads = words[..., None, :] >> (bits * np.arange(8 // bits, dtype=np.uint8))[:, None]
    return (quads & np.uint8((1 << bits) - 1)).reshape(*words.shape[:-1], -1)
