"""A folder of compiled kernels: what was compiled once for a workload, schedule, target and compiler is not again.

One file a kernel: a line of JSON, then the object code. Files are written beside and renamed, so that several processes
may share the folder; what does not check is compiled again.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from dataclasses import asdict, dataclass
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any

from tilewright.codegen.kernel import DeviceCode, Emitter, KernelCode, Launch
from tilewright.codegen.schedule import Schedule
from tilewright.codegen.target import Target
from tilewright.ir import Function, canonical, dim_text, parse_dim

_TOOLS = ("torch-mlir", "llvmlite", "apache-tvm", "numpy")
_LIMIT = 512 << 20


def default_folder() -> Path:
    """``$XDG_CACHE_HOME/tilewright/kernels``, by default below ``~/.cache``."""
    root = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(root) / "tilewright" / "kernels"


@cache
def compiler_version() -> str:
    """A hash of the code that makes kernels: of this package, of the IR, and the versions of the tools."""
    digest = hashlib.sha256()
    here = Path(__file__).parent
    for folder in (here, here.parent / "ir"):
        for path in sorted([*folder.rglob("*.py"), *folder.rglob("*.cuh")]):
            digest.update(path.name.encode() + path.read_bytes())
    digest.update(" ".join(f"{name}={version(name)}" for name in _TOOLS).encode())
    return digest.hexdigest()


def kernel_key(kernel: Function, emitter: Emitter, schedule: Schedule, target: Target) -> str:
    """The name under which the code of a kernel is kept."""
    parts = (canonical(kernel), emitter.name, str(schedule), target.text, compiler_version())
    return hashlib.sha256("\0".join(parts).encode()).hexdigest()


@dataclass(frozen=True)
class KernelStore:
    """Compiled kernels in ``folder``; about ``limit`` bytes are kept, those used last."""

    folder: Path
    limit: int = _LIMIT

    def get(self, key: str) -> KernelCode | None:
        """The code kept under ``key``, or None when there is none that checks."""
        path = self.folder / key
        try:
            head, _, code = path.read_bytes().partition(b"\n")
            os.utime(path)
            return decode(json.loads(head), code)
        except (OSError, ValueError, KeyError, TypeError, AttributeError):
            return None

    def put(self, key: str, code: KernelCode) -> None:
        """Keep ``code``; a folder that cannot be written keeps nothing."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile(dir=self.folder, prefix=".", delete=False) as file:
                file.write(json.dumps(encode(code)).encode() + b"\n" + code.object)
            os.replace(file.name, self.folder / key)
        except OSError:
            return

    def prune(self) -> None:
        """Remove the kernels used longest ago until the rest fits the limit."""
        try:
            found = sorted(((p.stat().st_mtime, p.stat().st_size, p) for p in self.folder.iterdir()), reverse=True)
        except OSError:
            return
        total = 0
        for _, size, path in found:
            total += size
            if total > self.limit:
                path.unlink(missing_ok=True)


def encode(code: KernelCode) -> dict[str, object]:
    return {
        "symbol": code.symbol,
        "sha256": hashlib.sha256(code.object).hexdigest(),
        "dims": list(code.dims),
        "tasks": dim_text(code.tasks),
        "grain": dim_text(code.grain),
        "packing": {str(i): text for i, text in code.packing.items()},
        "scratch": [dim_text(d) for d in code.scratch],
        "last": dim_text(code.last),
        "device": None if code.device is None else encode_device(code.device),
    }


def encode_device(code: DeviceCode) -> dict[str, object]:
    launches = [
        {**asdict(x), "grid": [dim_text(d) for d in x.grid], "when": x.when and [dim_text(x.when[0]), *x.when[1:]]}
        for x in code.launches
    ]
    return {"launches": launches, "source": code.source, "resources": {k: dict(v) for k, v in code.resources.items()}}


def decode(head: dict[str, object], code: bytes) -> KernelCode:
    """Raises ValueError when the code is not what was kept."""
    if hashlib.sha256(code).hexdigest() != head["sha256"]:
        raise ValueError("the object code is damaged")
    return KernelCode(
        str(head["symbol"]),
        code,
        tuple(map(str, head["dims"])),  # type: ignore[call-overload]
        parse_dim(str(head["tasks"])),
        parse_dim(str(head["grain"])),
        {int(i): str(text) for i, text in head["packing"].items()},  # type: ignore[attr-defined]
        tuple(parse_dim(str(d)) for d in head["scratch"]),  # type: ignore[attr-defined]
        parse_dim(str(head["last"])),
        None if head["device"] is None else decode_device(head["device"]),  # type: ignore[arg-type]
    )


def decode_device(head: dict[str, Any]) -> DeviceCode:
    launches = []
    for item in head["launches"]:
        x, y, z = map(parse_dim, item["grid"])
        when = item["when"] and (parse_dim(item["when"][0]), int(item["when"][1]), int(item["when"][2]))
        launches.append(Launch(str(item["symbol"]), (x, y, z), int(item["block"]), int(item["shared"]), when))
    resources = {str(k): {str(a): int(b) for a, b in row.items()} for k, row in head["resources"].items()}
    return DeviceCode(tuple(launches), str(head["source"]), resources)
