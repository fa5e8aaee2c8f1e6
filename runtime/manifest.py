"""``manifest.json``: what an artifact holds and how its entries are called. Frozen dataclasses, strictly read.

    {"format": "tilewright-artifact", "version": 2, "checksum": ..., "target": {...}, "entries": {...},
     "states": [...], "meta": {...}, "files": {"kernels.so": {"bytes": n, "xxh3_128": hex}, ...}}

``checksum`` is the xxh3_128 of the rest in canonical form (sorted keys, no spaces).
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from typing import Any

import ml_dtypes
import numpy as np

from tilewright.runtime.errors import ManifestError
from tilewright.runtime.jsonread import Node
from tilewright.runtime.kinds import Kind

ARTIFACT = Kind("tilewright-artifact", 2, "artifact", "compile the model", "Compile or copy the artifact again",
                "tilewright.compile(...).save")  # fmt: skip
"""Version, of the format and of what kernels.so offers: 1 had programs and the thread pool, 2 has sampling too."""
KERNELS = "kernels.so"
WEIGHTS = "weights.safetensors"
DEVICE = "device.json"
"""Of an artifact for a GPU: the functions that its program launches, each with the kernel whose cubin has it."""
REQUIRED_FILES = (KERNELS, WEIGHTS)

DTYPES: dict[str, np.dtype[Any]] = {
    "f64": np.dtype(np.float64),
    "f32": np.dtype(np.float32),
    "f16": np.dtype(np.float16),
    "bf16": np.dtype(ml_dtypes.bfloat16),
    "i64": np.dtype(np.int64),
    "i32": np.dtype(np.int32),
    "i16": np.dtype(np.int16),
    "i8": np.dtype(np.int8),
    "u8": np.dtype(np.uint8),
    "bool": np.dtype(np.bool_),
}

CACHED = (*DTYPES, "i4", "i2")
"""Element types of caches."""

Extent = int | str | None
"""One item of a shape: a number, the name of a dim, or None (an expression, known only when the program says)."""

_IDENTIFIER = re.compile(r"[A-Za-z_][A-Za-z0-9_]*")
_FEATURE = re.compile(r"[a-z0-9][a-z0-9.\-_]*")
_HEX = re.compile(r"[0-9a-f]{32}")
_LARGEST = 2**53
"""Numbers beyond this are not exact in every JSON reader; no size comes near it."""


@dataclass(frozen=True)
class DimSpec:
    """A symbolic dim of an entry and the sizes (both included) that it was compiled for."""

    name: str
    min: int
    max: int

    @staticmethod
    def read(node: Node) -> DimSpec:
        node.fields("name", "min", "max")
        low = node["min"].integer(1, _LARGEST)
        return DimSpec(node["name"].string(_IDENTIFIER), low, node["max"].integer(low, _LARGEST))

    def json(self) -> dict[str, Any]:
        return {"name": self.name, "min": self.min, "max": self.max}


@dataclass(frozen=True)
class TensorSpec:
    """An input or output: ``low`` and ``high`` (both included) bound the values of an integer input, when given."""

    name: str
    dtype: str
    shape: tuple[Extent, ...]
    low: int | None = None
    high: int | None = None

    @staticmethod
    def read(node: Node) -> TensorSpec:
        node.fields("name", "dtype", "shape", optional=("low", "high"))
        dtype = node["dtype"].choice(DTYPES)
        shape = tuple(_read_extent(item) for item in node["shape"].items())
        low, high = (node[key].integer(-_LARGEST, _LARGEST) if key in node else None for key in ("low", "high"))
        return TensorSpec(node["name"].string(_IDENTIFIER), dtype, shape, low, high)

    def json(self) -> dict[str, Any]:
        bounds = {"low": self.low, "high": self.high}
        return {"name": self.name, "dtype": self.dtype, "shape": list(self.shape)} | {
            key: value for key, value in bounds.items() if value is not None
        }


@dataclass(frozen=True)
class EntrySpec:
    """An entry point. ``batch`` is the extent (a dim or a number) that counts the sequences of the states which the
    entry reads and writes, or None when it touches no state."""

    dims: tuple[DimSpec, ...]
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    batch: int | str | None

    @staticmethod
    def read(node: Node) -> EntrySpec:
        node.fields("dims", "inputs", "outputs", "batch")
        entry = EntrySpec(
            tuple(DimSpec.read(item) for item in node["dims"].items()),
            tuple(TensorSpec.read(item) for item in node["inputs"].items()),
            tuple(TensorSpec.read(item) for item in node["outputs"].items()),
            _read_extent(node["batch"]),
        )
        entry._check(node)
        return entry

    def _check(self, node: Node) -> None:
        dims = node["dims"].unique(d.name for d in self.dims)
        node["inputs"].unique(t.name for t in self.inputs)
        node["outputs"].unique(t.name for t in self.outputs)
        bound = {extent for tensor in self.inputs for extent in tensor.shape if isinstance(extent, str)}
        used = bound | {extent for tensor in self.outputs for extent in tensor.shape if isinstance(extent, str)}
        if isinstance(self.batch, str):
            used.add(self.batch)
        if used - dims:
            raise node.error(f"the dims {sorted(used - dims)} are used and not declared; declared: {sorted(dims)}")
        if dims - bound:
            raise node["dims"].error(f"no input has the dims {sorted(dims - bound)}, so no call can bind them")
        if any(extent is None for tensor in self.inputs for extent in tensor.shape):
            raise node["inputs"].error("null in the shape of an input; only outputs may have it")

    def json(self) -> dict[str, Any]:
        return {
            "dims": [d.json() for d in self.dims],
            "inputs": [t.json() for t in self.inputs],
            "outputs": [t.json() for t in self.outputs],
            "batch": self.batch,
        }


@dataclass(frozen=True)
class StateSpec:
    """A KV cache: bytes of K and of V for one sequence, and how many positions a sequence may have.

    With ``page`` the cache is a pool of pages of so many tokens, and bytes are those of one page; entries then take a table
    of pages, and a sequence may have ``k_beside`` and ``v_beside`` bytes. A call appends at most ``chunk`` tokens,
    when given; with ``unpadded`` only tokens of the text, no padding. ``layout`` is for people.
    """

    name: str
    dtype: str
    k_bytes: int
    v_bytes: int
    length: int
    layout: str = "contiguous"
    page: int = 0
    chunk: int = 0
    unpadded: bool = False
    k_beside: int = 0
    v_beside: int = 0

    @staticmethod
    def read(node: Node) -> StateSpec:
        unit = "page" if "page" in node else "sequence"
        of_k, of_v = (f"{part}_shape_bytes_per_{unit}" for part in "kv")
        optional = ("layout", "page", "chunk", "unpadded", "k_beside", "v_beside")
        node.fields("name", "dtype", of_k, of_v, "length", optional=optional)
        return StateSpec(
            node["name"].string(),
            node["dtype"].choice(CACHED),
            node[of_k].integer(0, _LARGEST),
            node[of_v].integer(0, _LARGEST),
            node["length"].integer(1, _LARGEST),
            node["layout"].string() if "layout" in node else "contiguous",
            node["page"].integer(1, _LARGEST) if "page" in node else 0,
            node["chunk"].integer(1, _LARGEST) if "chunk" in node else 0,
            node["unpadded"].truth() if "unpadded" in node else False,
            *(node[part].integer(0, _LARGEST) if part in node else 0 for part in ("k_beside", "v_beside")),
        )

    def json(self) -> dict[str, Any]:
        unit = "page" if self.page else "sequence"
        more = {"layout": self.layout, "page": self.page, "chunk": self.chunk, "unpadded": self.unpadded,
                "k_beside": self.k_beside, "v_beside": self.v_beside}  # fmt: skip
        return {
            "name": self.name,
            "dtype": self.dtype,
            f"k_shape_bytes_per_{unit}": self.k_bytes,
            f"v_shape_bytes_per_{unit}": self.v_bytes,
            "length": self.length,
        } | {key: value for key, value in more.items() if value and value != "contiguous"}


@dataclass(frozen=True)
class TargetSpec:
    """What the code was compiled for: the target's text and the CPU features (LLVM spelling) that it may use."""

    text: str
    features: tuple[str, ...] = ()

    @staticmethod
    def read(node: Node) -> TargetSpec:
        node.fields("text", "features")
        return TargetSpec(node["text"].string(), tuple(f.string(_FEATURE) for f in node["features"].items()))

    def json(self) -> dict[str, Any]:
        return {"text": self.text, "features": list(self.features)}


@dataclass(frozen=True)
class FileSpec:
    """A file of the artifact: its size and the xxh3_128 of its bytes."""

    bytes: int
    xxh3_128: str

    @staticmethod
    def read(node: Node) -> FileSpec:
        node.fields("bytes", "xxh3_128")
        return FileSpec(node["bytes"].integer(0, _LARGEST), node["xxh3_128"].string(_HEX))

    def json(self) -> dict[str, Any]:
        return {"bytes": self.bytes, "xxh3_128": self.xxh3_128}


@dataclass(frozen=True)
class Manifest:
    """All of ``manifest.json``. Codegen fills everything but ``files``, which the writer adds."""

    target: TargetSpec
    entries: dict[str, EntrySpec]
    states: tuple[StateSpec, ...] = ()
    meta: dict[str, str] = field(default_factory=dict)
    files: dict[str, FileSpec] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return {
            **ARTIFACT.head,
            "target": self.target.json(),
            "entries": {name: entry.json() for name, entry in self.entries.items()},
            "states": [state.json() for state in self.states],
            "meta": dict(self.meta),
            "files": {name: file.json() for name, file in self.files.items()},
        }

    def to_text(self) -> str:
        """The text of ``manifest.json``. Raises ManifestError where ``from_text`` would refuse it."""
        text = ARTIFACT.seal(self.json())
        Manifest.from_text(text, "the manifest to save")
        return text

    @staticmethod
    def from_text(text: str | bytes, where: str = "manifest.json") -> Manifest:
        """Reads and checks a manifest. Raises ArtifactVersionError, DamagedArtifactError or ManifestError."""
        return _read_manifest(ARTIFACT.unseal(text, where))


def _read_extent(node: Node) -> Extent:
    if node.value is None:
        return None
    if isinstance(node.value, str):
        return node.string(_IDENTIFIER)
    return node.integer(0, _LARGEST)


def _read_manifest(node: Node) -> Manifest:
    node.fields("format", "version", "target", "entries", "states", "meta", "files")
    entries = {key: EntrySpec.read(item) for key, item in node["entries"].members(_IDENTIFIER)}
    states = tuple(StateSpec.read(item) for item in node["states"].items())
    node["states"].unique(state.name for state in states)
    sizes = sorted({state.page for state in states if state.page})
    if len(sizes) > 1:
        raise node["states"].error(f"pages of {sizes} tokens; states share a table of pages, so all pages have one size")
    for name, entry in entries.items():
        if entry.batch is not None and not states:
            raise node["entries"][name]["batch"].error("set, but the artifact has no states; use null")
    files = {key: FileSpec.read(item) for key, item in node["files"].members()}
    for name in files:
        check_file_name(name, node["files"])
    missing = [name for name in REQUIRED_FILES if name not in files]
    if missing:
        raise node["files"].error(f"the files {missing} are not listed; every artifact has them")
    meta = {key: item.string() for key, item in node["meta"].members()}
    return Manifest(TargetSpec.read(node["target"]), entries, states, meta, files)


def check_file_name(name: str, node: Node) -> None:
    """Raises ManifestError for a name that leads out of the folder."""
    parts = name.split("/")
    if not name or "\\" in name or "\0" in name or any(part in ("", ".", "..") for part in parts):
        raise node.error(f"{name!r} is not a relative path inside the artifact")


__all__ = [
    "ARTIFACT", "DEVICE", "DTYPES", "KERNELS", "WEIGHTS", "DimSpec", "EntrySpec", "Extent", "FileSpec", "Manifest",
    "ManifestError", "StateSpec", "TargetSpec", "TensorSpec", "check_file_name",
]  # fmt: skip
