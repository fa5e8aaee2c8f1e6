"""How a cache of codes lies in memory on CPUs: units of tokens, each one piece of bytes: codes, then scales, then zeros.

A unit of keys has panels of tokens, ``[unit / panel][steps][panel][4 bytes]``; the four bytes hold as many components as
fit, in the order of `Packing`: the first four in the lowest bits of the bytes, the next four above them. A unit of values
has panels of components, ``[vdim / panel][unit / pair][panel][4 bytes]``; the bytes hold neighbouring tokens in the same
order. So four 8-bit integers that belong together lie side by side, as vpdpbusd wants them, and of narrower codes a shift
and a mask give four. Keys are stored unsigned (i8 plus 128), values signed. Scales and zeros of tokens are vectors
``[unit]``; those of channels are ``[unit / group][dim]``.
"""

from __future__ import annotations

from dataclasses import dataclass

import ml_dtypes
import numpy as np

from tilewright.codegen.packing import code_pair
from tilewright.ir import DType
from tilewright.ir.ops.kv_codes import encode

UNIT = 64
"""Tokens of a unit where no page says otherwise."""
VALUE_STEP = 16
_SCALES = {"f16": np.dtype("f2"), "f32": np.dtype("f4")}
_FULL = {"bf16": np.dtype(ml_dtypes.bfloat16), "f32": np.dtype("f4")}
_BITS = {"i8": 8, "i4": 4, "i2": 2}


def _round_up(number: int, step: int) -> int:
    return -(-number // step) * step


@dataclass(frozen=True)
class CodeLayout:
    """Layout of one layer's cache of codes (``dtype`` i8, i4, i2), ``length`` slots for each head; see `KVType`."""

    heads: int
    dim: int
    vdim: int
    length: int
    dtype: str
    panel: int = 32
    page: int = 0
    keys: str = "token"
    group: int = 32
    recent: int = 0
    scales: str = "f16"
    full: str = "bf16"

    @property
    def stored(self) -> str:
        """Element type of the memory."""
        return "u8"

    @property
    def bits(self) -> int:
        """Of a code."""
        return _BITS[self.dtype]

    @property
    def bias(self) -> int:
        """What the codes of keys are stored with, on top."""
        return 128 if self.bits == 8 else 0

    @property
    def pair(self) -> int:
        """Codes in four bytes."""
        return code_pair(self.bits)

    @property
    def has_zeros(self) -> bool:
        return self.bits < 8

    @property
    def channels(self) -> bool:
        """Whether the scales of keys are those of channels."""
        return self.keys == "channel"

    @property
    def unit(self) -> int:
        """Tokens of a unit."""
        return self.page or (max(UNIT, self.group) if self.channels else UNIT)

    @property
    def key_panel(self) -> int:
        """Tokens of a panel of keys."""
        return min(self.panel, self.unit)

    @property
    def units(self) -> int:
        """Units of a sequence."""
        return -(-self.length // self.unit)

    @property
    def slots(self) -> int:
        """Slots in memory."""
        return self.units * self.unit

    @property
    def key_size(self) -> int:
        """Components of a key in memory."""
        return _round_up(self.dim, self.pair)

    @property
    def value_size(self) -> int:
        """Components of a value in memory."""
        return _round_up(self.vdim, VALUE_STEP)

    @property
    def scale_size(self) -> int:
        """Bytes of a scale."""
        return _SCALES[self.scales].itemsize

    @property
    def k_codes(self) -> int:
        """Bytes of the codes of a unit of keys: where its scales begin."""
        return self.unit * self.key_size * self.bits // 8

    @property
    def k_scales(self) -> int:
        """Scales of a unit of keys."""
        return self.unit // self.group * self.key_size if self.channels else self.unit

    @property
    def k_unit(self) -> int:
        """Bytes of a unit of keys."""
        return self.k_codes + self.k_scales * self.scale_size * (1 + self.has_zeros)

    @property
    def v_codes(self) -> int:
        """Bytes of the codes of a unit of values: where its scales begin."""
        return self.unit * self.value_size * self.bits // 8

    @property
    def v_unit(self) -> int:
        """Bytes of a unit of values."""
        return self.v_codes + self.unit * self.scale_size * (1 + self.has_zeros)

    @property
    def k_shape(self) -> tuple[int, ...]:
        """Of one sequence, or of one page: heads, units, bytes."""
        return self.heads, 1 if self.page else self.units, self.k_unit

    @property
    def v_shape(self) -> tuple[int, ...]:
        """As ``k_shape``, of values."""
        return self.heads, 1 if self.page else self.units, self.v_unit

    @property
    def k_bytes(self) -> int:
        """Bytes of K of one sequence, or of one page."""
        return int(np.prod(self.k_shape))

    @property
    def v_bytes(self) -> int:
        """Bytes of V of one sequence, or of one page."""
        return int(np.prod(self.v_shape))

    def empty(self, batch: int) -> tuple[np.ndarray, np.ndarray]:
        """A fresh cache, zero: K ``[batch, *k_shape]`` and V ``[batch, *v_shape]``, bytes."""
        return np.zeros((batch, *self.k_shape), np.uint8), np.zeros((batch, *self.v_shape), np.uint8)

    def write(self, keys: np.ndarray, values: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """A cache whose first slots hold ``keys`` [B, T, heads, dim] and ``values`` [B, T, heads, vdim], as codes."""
        codes, scales = self._encode(keys, self.channels, self.key_size)
        k = np.concatenate([_pack_keys(codes + np.uint8(self.bias), self.bits, self.key_panel), *scales], -1)
        codes, scales = self._encode(values, False, self.value_size)
        return k, np.concatenate([_pack_values(codes, self.bits, self.panel), *scales], -1)

    def read(self, k: np.ndarray, v: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """What the slots decode to, f32: K ``[B, length, heads, dim]`` and V ``[B, length, heads, vdim]``."""
        codes = _unpack_keys(k[..., :self.k_codes], self.bits, self.key_panel, self.unit) - np.uint8(self.bias)
        keys = self._decode(codes, k[..., self.k_codes:], self.channels)[..., :self.dim]
        codes = _unpack_values(v[..., :self.v_codes], self.bits, self.panel, self.unit)
        values = self._decode(codes, v[..., self.v_codes:], False)[..., :self.vdim]
        return self._rows(keys), self._rows(values)

    def _encode(self, rows: np.ndarray, channels: bool, size: int) -> tuple[np.ndarray, list[np.ndarray]]:
        """Codes ``[B, heads, units, unit, size]``, and the bytes of the scales and zeros of each unit."""
        batch, tokens, heads, given = rows.shape
        wide = np.zeros((batch, self.slots, heads, given), np.float32)
        wide[:, :tokens] = rows
        units = wide.reshape(batch, self.units, self.unit, heads, given).transpose(0, 3, 1, 2, 4)
        grouped = units.reshape(*units.shape[:3], -1, self.group if channels else 1, given)
        coded = encode(grouped, DType(self.dtype), 4 if channels else 5, DType(self.scales))
        pad = [(0, 0)] * 5 + [(0, size - given)]
        codes = np.pad(coded.codes.view(np.uint8), pad).reshape(*units.shape[:4], size)
        parts = [np.pad(x, pad) if channels else x for x in (coded.scale, coded.zero) if x is not None]
        return codes, [np.ascontiguousarray(x).reshape(*units.shape[:3], -1).view(np.uint8) for x in parts]

    def _decode(self, codes: np.ndarray, scales: np.ndarray, channels: bool) -> np.ndarray:
        """The inverse of ``_encode``."""
        numbers = (codes.view(np.int8) if self.bits == 8 else codes).astype(np.float32)
        grouped = numbers.reshape(*codes.shape[:3], -1, self.group if channels else 1, codes.shape[-1])
        held = np.ascontiguousarray(scales).view(_SCALES[self.scales]).astype(np.float32)
        held = held.reshape(*codes.shape[:3], 1 + self.has_zeros, *grouped.shape[3:4], 1, -1)
        decoded = grouped * held[:, :, :, 0] + (held[:, :, :, 1] if self.has_zeros else 0)
        return decoded.reshape(codes.shape)

    def _rows(self, units: np.ndarray) -> np.ndarray:
        """Units ``[B, heads, units, unit, size]`` -> rows ``[B, length, heads, size]``."""
        rows = units.transpose(0, 2, 3, 1, 4)
        return rows.reshape(len(rows), self.slots, self.heads, -1)[:, :self.length]


def _pack_keys(codes: np.ndarray, bits: int, panel: int) -> np.ndarray:
    """Unsigned codes ``[..., unit, size]`` -> bytes."""
    *first, unit, _ = codes.shape
    words = _words(codes.reshape(*first, unit // panel, panel, -1, code_pair(bits)), bits)
    return np.swapaxes(words, -3, -2).reshape(*first, -1)


def _unpack_keys(packed: np.ndarray, bits: int, panel: int, unit: int) -> np.ndarray:
    words = packed.reshape(*packed.shape[:-1], unit // panel, -1, panel, 4)
    return _parts(np.swapaxes(words, -3, -2), bits).reshape(*packed.shape[:-1], unit, -1)


def _pack_values(codes: np.ndarray, bits: int, panel: int) -> np.ndarray:
    """Codes ``[..., unit, size]`` -> bytes."""
    *first, _, size = codes.shape
    pairs = np.swapaxes(codes.reshape(*first, -1, code_pair(bits), size), -1, -2)
    words = _words(pairs, bits)
    return np.concatenate([words[..., at:at + panel, :].reshape(*first, -1) for at in range(0, size, panel)], -1)


def _unpack_values(packed: np.ndarray, bits: int, panel: int, unit: int) -> np.ndarray:
    first, each = packed.shape[:-1], unit * bits // 8  # bytes of one component
    size = packed.shape[-1] // each
    panels = [packed[..., at * each:min(at + panel, size) * each] for at in range(0, size, panel)]
    words = [x.reshape(*first, unit // code_pair(bits), -1, 4) for x in panels]
    return np.swapaxes(_parts(np.concatenate(words, -2), bits), -1, -2).reshape(*first, unit, size)


def _words(codes: np.ndarray, bits: int) -> np.ndarray:
    """Codes ``[..., pair]`` -> ``[..., 4]`` bytes."""
    quads = codes.reshape(*codes.shape[:-1], -1, 4) << (bits * np.arange(8 // bits, dtype=np.uint8))[:, None]
    return np.bitwise_or.reduce(quads, -2)


def _parts(words: np.ndarray, bits: int) -> np.ndarray:
    """The inverse of ``_words``."""
    quads = words[..., None, :] >> (bits * np.arange(8 // bits, dtype=np.uint8))[:, None]
    return (quads & np.uint8((1 << bits) - 1)).reshape(*words.shape[:-1], -1)
