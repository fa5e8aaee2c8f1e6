"""The files of a bundle: ``manifest.json``, strictly read, cubins and their CUDA C, and arrays as safetensors.

    {"format": "tilewright-bundle", "version": 2, "target": "cuda{arch=sm_90a}", "compiler": ..., "arrays": {...},
     "workloads": [...], "files": {...}, "checksum": ...}

An array is named by the hash of its content, so that equal ones are there once. A large one may hold its beginning alone,
which it then repeats.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Any

from tilewright.runtime.coded import BITS, SCALES, CodedRows
from tilewright.runtime.jsonread import Node
from tilewright.runtime.kinds import Kind
from tilewright.runtime.manifest import DTYPES, FileSpec, check_file_name
from tilewright.runtime.tolerance import NARROW

BUNDLE = Kind("tilewright-bundle", 2, "bundle", "emit the bundle", "Emit or copy the bundle again",
              "`tilewright tune MODEL --emit-bundle`")  # fmt: skip
_HEX = re.compile(r"[0-9a-f]{32}")
_MOST = 2**53
_GRID = 2**31 - 1
_THREADS, _SHARED = 1024, 1 << 20


@dataclass(frozen=True)
class ArraySpec:
    """Where an array is: ``stored`` elements in the file's tensor, which are repeated until the shape is full."""

    file: str
    dtype: str
    shape: tuple[int, ...]
    stored: int

    @property
    def size(self) -> int:
        """Elements."""
        return math.prod(self.shape)

    @property
    def bytes(self) -> int:
        return self.size * DTYPES[self.dtype].itemsize

    @staticmethod
    def read(node: Node) -> ArraySpec:
        node.fields("file", "dtype", "shape", "stored")
        shape = tuple(n.integer(0, _MOST) for n in node["shape"].items())
        stored = node["stored"].integer(0 if 0 in shape else 1, max(math.prod(shape), 0))
        return ArraySpec(node["file"].string(), node["dtype"].choice(DTYPES), shape, stored)


@dataclass(frozen=True)
class LaunchSpec:
    """One grid of a candidate, for the workload's sizes."""

    symbol: str
    grid: tuple[int, int, int]
    block: int
    shared: int

    @staticmethod
    def read(node: Node) -> LaunchSpec:
        node.fields("symbol", "grid", "block", "shared")
        grid = [n.integer(1, _GRID) for n in node["grid"].items()]
        if len(grid) != 3:
            raise node["grid"].error(f"expected three sizes, got {len(grid)}")
        block = node["block"].integer(1, _THREADS)
        return LaunchSpec(node["symbol"].string(), (grid[0], grid[1], grid[2]), block, node["shared"].integer(0, _SHARED))


@dataclass(frozen=True)
class CandidateSpec:
    """The kernel under one schedule: compiled, or ``refused`` and why.

    Each launch takes ``numbers`` (the sizes), then the pointers of arguments, results and ``scratch`` (bytes). ``packed``
    has the arrays of those arguments that the kernel wants in a layout of its own.
    """

    schedule: str
    refused: str = ""
    cubin: str = ""
    numbers: tuple[int, ...] = ()
    launches: tuple[LaunchSpec, ...] = ()
    scratch: tuple[int, ...] = ()
    packed: dict[int, str] = field(default_factory=dict)
    metrics: dict[str, float] = field(default_factory=dict)

    @staticmethod
    def read(node: Node) -> CandidateSpec:
        if "refused" in node:
            node.fields("schedule", "refused")
            return CandidateSpec(node["schedule"].string(), node["refused"].string())
        node.fields("schedule", "cubin", "numbers", "launches", "scratch", "packed", "metrics")
        return CandidateSpec(
            node["schedule"].string(),
            "",
            node["cubin"].string(),
            tuple(n.integer(0, _MOST) for n in node["numbers"].items()),
            tuple(map(LaunchSpec.read, node["launches"].items())),
            tuple(n.integer(0, _MOST) for n in node["scratch"].items()),
            {int(key): item.string(_HEX) for key, item in node["packed"].members(re.compile(r"\d{1,4}"))},
            {key: item.number() for key, item in node["metrics"].members()},
        )

    def json(self) -> dict[str, Any]:
        if self.refused:
            return {"schedule": self.schedule, "refused": self.refused}
        return {key: value for key, value in asdict(self).items() if key != "refused"} | {
            "packed": {str(i): name for i, name in self.packed.items()}
        }


@dataclass(frozen=True)
class ExpectedSpec:
    """An array that a kernel leaves: ``shape`` in memory, and ``features``, the places along its last axis where it is
    known, when that is not everywhere. ``narrow``, ``codes`` and ``coded`` are those of `tolerance.Expected`."""

    array: str
    shape: tuple[int, ...]
    narrow: str
    codes: bool
    features: str | None
    coded: CodedRows | None = None

    @staticmethod
    def read(node: Node) -> ExpectedSpec:
        node.fields("array", "shape", "narrow", "codes", "features", "coded")
        shape = tuple(n.integer(0, _MOST) for n in node["shape"].items())
        features = None if node["features"].value is None else node["features"].string(_HEX)
        narrow, codes = node["narrow"].choice(NARROW), node["codes"].truth()
        coded = None if node["coded"].value is None else _coded(node["coded"])
        if coded is not None and math.prod(shape) % coded.bytes:
            raise node["shape"].error(f"not a whole number of regions of {coded.bytes} bytes")
        return ExpectedSpec(node["array"].string(_HEX), shape, narrow, codes, features, coded)


def _coded(node: Node) -> CodedRows:
    node.fields("size", "bits", "scales", "heads", "slots")
    size, heads, slots = (node[name].integer(1, _MOST) for name in ("size", "heads", "slots"))
    bits = node["bits"].integer(min(BITS), max(BITS))
    if bits not in BITS:
        raise node["bits"].error(f"expected one of {BITS}, got {bits}")
    return CodedRows(size, bits, node["scales"].choice(SCALES), heads, slots)


@dataclass(frozen=True)
class ResultSpec:
    """What should be there after a call: a tensor of its own, or K and V of the cache that is the ``argument``."""

    argument: int | None
    expected: tuple[ExpectedSpec, ...]

    @staticmethod
    def read(node: Node, arguments: int) -> ResultSpec:
        node.fields("argument", "expected")
        given = None if node["argument"].value is None else node["argument"].integer(0, arguments - 1)
        expected = tuple(map(ExpectedSpec.read, node["expected"].items()))
        if len(expected) != (1 if given is None else 2):
            raise node["expected"].error(f"{len(expected)} arrays; a tensor has one, a cache two")
        return ResultSpec(given, expected)


@dataclass(frozen=True)
class WorkloadSpec:
    """A kernel at one size. ``record`` is what a file of measurements says of it; ``weight`` how often its time counts.

    ``arguments`` names the array of each argument, or K and V of a cache. The first candidate is the baseline.
    """

    name: str
    record: dict[str, Any]
    weight: float
    bytes_moved: float
    flops: float
    arguments: tuple[tuple[str, ...], ...]
    results: tuple[ResultSpec, ...]
    candidates: tuple[CandidateSpec, ...]

    @property
    def key(self) -> str:
        return str(self.record["key"])

    @staticmethod
    def read(node: Node) -> WorkloadSpec:
        node.fields("name", "record", "weight", "bytes_moved", "flops", "arguments", "results", "candidates")
        arguments = tuple(tuple(n.string(_HEX) for n in item.items()) for item in node["arguments"].items())
        return WorkloadSpec(
            node["name"].string(),
            _record(node["record"]),
            node["weight"].number(),
            node["bytes_moved"].number(),
            node["flops"].number(),
            arguments,
            tuple(ResultSpec.read(item, len(arguments)) for item in node["results"].items()),
            tuple(map(CandidateSpec.read, node["candidates"].items())),
        )

    def json(self) -> dict[str, Any]:
        return asdict(self) | {"candidates": [c.json() for c in self.candidates]}


def _record(node: Node) -> dict[str, Any]:
    node.fields("key", "family", "kernel", "sizes", "target", "threads", "host")
    texts = {key: node[key].string() for key in ("family", "kernel", "target", "host")}
    sizes = []
    for item in node["sizes"].items():
        name, value = item.items()
        sizes.append([name.string(), value.integer(0, _MOST)])
    return {"key": node["key"].string(_HEX), "sizes": sizes, "threads": node["threads"].integer(1, 1 << 20), **texts}


@dataclass(frozen=True)
class Bundle:
    """All of ``manifest.json``; ``compiler`` is the version that made the kernels. The writer adds ``files``."""

    target: str
    compiler: str
    arrays: dict[str, ArraySpec]
    workloads: tuple[WorkloadSpec, ...]
    files: Mapping[str, FileSpec] = field(default_factory=dict)

    def json(self) -> dict[str, Any]:
        return {
            **BUNDLE.head,
            "target": self.target,
            "compiler": self.compiler,
            "arrays": {name: asdict(array) for name, array in self.arrays.items()},
            "workloads": [workload.json() for workload in self.workloads],
            "files": {name: file.json() for name, file in self.files.items()},
        }

    def to_text(self) -> str:
        """The text of ``manifest.json``. Raises ManifestError where ``from_text`` would refuse it."""
        text = BUNDLE.seal(self.json())
        Bundle.from_text(text, "the manifest to save")
        return text

    @staticmethod
    def from_text(text: str | bytes, where: str) -> Bundle:
        """Reads and checks a manifest. Raises a subclass of ArtifactError."""
        node = BUNDLE.unseal(text, where)
        node.fields("format", "version", "target", "compiler", "arrays", "workloads", "files")
        found = Bundle(
            node["target"].string(),
            node["compiler"].string(),
            {key: ArraySpec.read(item) for key, item in node["arrays"].members(_HEX)},
            tuple(map(WorkloadSpec.read, node["workloads"].items())),
            {key: FileSpec.read(item) for key, item in node["files"].members()},
        )
        found._check(node)
        return found

    def _check(self, node: Node) -> None:
        for name in self.files:
            check_file_name(name, node["files"])
        files = {array.file for array in self.arrays.values()}
        files |= {c.cubin for w in self.workloads for c in w.candidates if not c.refused}
        if missing := sorted(files - self.files.keys()):
            raise node["files"].error(f"the files {missing} are not listed")
        if missing := sorted(self.named_arrays() - self.arrays.keys()):
            raise node["arrays"].error(f"the arrays {missing} are not listed")

    def named_arrays(self) -> set[str]:
        """The arrays that workloads name."""
        found: set[str] = set()
        for workload in self.workloads:
            found |= {name for argument in workload.arguments for name in argument}
            found |= {name for c in workload.candidates for name in c.packed.values()}
            for expected in (e for result in workload.results for e in result.expected):
                found |= {expected.array} | ({expected.features} if expected.features else set())
        return found
