"""Opening an artifact: manifest, host, files, native library, weights. The folder may lie anywhere and be moved."""

from __future__ import annotations

import mmap
import os
import re
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from tilewright.runtime.artifact import Folder
from tilewright.runtime.brought import Bring, BroughtWeights
from tilewright.runtime.caches import CacheSizes
from tilewright.runtime.errors import ArtifactError, DamagedArtifactError, InputError
from tilewright.runtime.host import check_host
from tilewright.runtime.manifest import DEVICE, KERNELS, WEIGHTS, Manifest
from tilewright.runtime.memory import advise
from tilewright.runtime.native import Library
from tilewright.runtime.session import Session
from tilewright.runtime.weights import data_offset, read_table

if TYPE_CHECKING:
    from tilewright.runtime.cuda import Device

_ATTEMPTS = 10


class Weights:
    """The mapped weights file, read-only. ``address``: of the data section, where tensor offsets count from; ``size``: its
    bytes, ``bytes`` those of the file. ``left_out``: the tensors of a file that is no more than a header."""

    def __init__(self, descriptor: int, where: str) -> None:
        size = os.fstat(descriptor).st_size
        offset = data_offset(os.pread(descriptor, 8, 0), size, where)
        self._mapping = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        advise(self._mapping, "MADV_HUGEPAGE")  # before anything is read: what is not in memory comes in large pages
        advise(self._mapping, "MADV_WILLNEED")
        self._view = np.frombuffer(self._mapping, np.uint8)
        self.address = self._view.ctypes.data + offset
        self.bytes, self.size = size, size - offset
        self.left_out = read_table(os.dup(descriptor)) if size == offset else {}


class Program:
    """A loaded artifact. Immutable and shared by any number of sessions; ``path`` is where it was loaded from."""

    def __init__(self, path: Path, manifest: Manifest, library: Library, weights: Weights | BroughtWeights,
                 threads: int | None = None) -> None:  # fmt: skip
        self.path = path
        self.manifest = manifest
        self.library = library
        self.weights = weights
        self.threads = threads

    @property
    def entries(self) -> list[str]:
        return list(self.manifest.entries)

    def session(self, threads: int | None = None, batch: int = 1, pages: int | None = None, memory: int | None = None
                ) -> Session:  # fmt: skip
        """Memory and threads to run the entries with; ``batch``: the most sequences at a time.

        Where the KV states are pages: ``pages`` of them, or as many as fit into ``memory`` bytes with all else of the
        states; default: enough for ``batch`` sequences at full length. Raises InputError.
        """
        return Session(self, threads, batch, pages, memory)

    def cache_bytes(self, tokens: int, sequences: int = 1) -> int:
        """Bytes of KV states that ``sequences`` sequences of ``tokens`` tokens each need: see ``CacheSizes.bytes``."""
        return CacheSizes.of(self.manifest.states).bytes(tokens, sequences)

    def __repr__(self) -> str:
        return f"Program({str(self.path)!r}, entries={self.entries}, target={self.manifest.target.text!r})"


def load(path: str | os.PathLike[str], threads: int | None = None, verify: bool = True, device: int = 0,
         weights: Bring | None = None) -> Program:  # fmt: skip
    """Opens the artifact folder ``path``.

    ``threads``: the default of its sessions. ``verify=False`` skips the checksums (sizes are always compared). ``device``:
    which GPU, of an artifact for one. ``weights``, of an artifact that was compiled without, writes them: it is given an
    array for each, by name, on the GPU where the artifact is for one.
    Raises a subclass of ArtifactError that says what is wrong, UnsupportedHostError before any code is mapped, and
    MemoryError when the weights do not fit a GPU.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError("threads", "an integer >= 1", repr(threads))
    for attempt in range(_ATTEMPTS):
        with Folder(path) as folder:
            try:
                return _load(folder, threads, verify, device, weights)
            except ArtifactError:
                # A save that replaced the artifact removes the old files: then the new ones are what was asked for.
                if attempt == _ATTEMPTS - 1 or not folder.replaced():
                    raise
    raise AssertionError("unreachable")


def _load(folder: Folder, threads: int | None, verify: bool, device: int, bring: Bring | None) -> Program:
    manifest = folder.manifest()
    check_host(manifest.target.features, str(folder.path), manifest.target.text)
    arch = cuda_arch(manifest.target.text)
    gpu = None if arch is None else _gpu(device, arch, str(folder.path))
    folder.verify(manifest.files, checksums=verify)
    kernels, weights = folder.open(KERNELS), -1
    try:
        weights = folder.open(WEIGHTS)
        library = Library(kernels, str(folder.path / KERNELS), list(manifest.entries))
        found = _weights(weights, str(folder.path / WEIGHTS), bring)
    finally:
        os.close(kernels)
        if weights >= 0:
            os.close(weights)
    if gpu is not None:
        return _on_gpu(folder, manifest, library, found, gpu)
    if isinstance(found, BroughtWeights):
        found.on_host()
    return Program(Path(folder.path), manifest, library, found, threads)


def _weights(descriptor: int, where: str, bring: Bring | None) -> Weights | BroughtWeights:
    found = Weights(descriptor, where)
    if bring is None and found.left_out:
        raise ArtifactError(f"{where}: the artifact was compiled without weights; bring them: load(..., weights=...)")
    if bring is not None and not found.left_out:
        raise InputError("weights", "an artifact that was compiled without weights", f"{where} with them")
    return found if bring is None else BroughtWeights(found.left_out, found.bytes, bring)


def cuda_arch(target: str) -> str | None:
    """The architecture of a GPU that ``target`` names, None for a CPU."""
    match = re.fullmatch(r"cuda\{arch=(\w+)\}", target)
    return match[1] if match else None


def _gpu(ordinal: int, arch: str, where: str) -> Device:
    from tilewright.runtime.cuda import Device

    found = Device(ordinal)
    found.check_arch(arch, where)
    return found


def _on_gpu(folder: Folder, manifest: Manifest, library: Library, weights: Weights | BroughtWeights, gpu: Device
            ) -> Program:  # fmt: skip
    from tilewright.runtime.device import DeviceProgram, read_functions

    functions = read_functions(_read(folder, DEVICE, manifest), str(folder.path / DEVICE))
    cubins = {f.kernel: _read(folder, f"{f.kernel}.cubin", manifest) for f in functions}
    return DeviceProgram(Path(folder.path), manifest, library, weights, gpu, functions, cubins)


def _read(folder: Folder, name: str, manifest: Manifest) -> bytes:
    if name not in manifest.files:
        raise DamagedArtifactError(f"{folder.path / name}: missing from the manifest; compile or copy the artifact again")
    with os.fdopen(folder.open(name), "rb") as file:
        return file.read()
