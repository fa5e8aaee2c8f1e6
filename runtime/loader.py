"""Opening an artifact: manifest, host, files, native library, weights. The folder may lie anywhere and be moved."""

from __future__ import annotations

import mmap
import os
from pathlib import Path

import numpy as np

from tilewright.runtime.artifact import Folder
from tilewright.runtime.errors import ArtifactError, InputError
from tilewright.runtime.host import check_host
from tilewright.runtime.manifest import KERNELS, WEIGHTS, Manifest
from tilewright.runtime.memory import advise
from tilewright.runtime.native import Library
from tilewright.runtime.session import Session
from tilewright.runtime.weights import data_offset

_ATTEMPTS = 10


class Weights:
    """The mapped weights file, read-only. ``address``: of the data section, where tensor offsets count from."""

    def __init__(self, descriptor: int, where: str) -> None:
        size = os.fstat(descriptor).st_size
        offset = data_offset(os.pread(descriptor, 8, 0), size, where)
        self._mapping = mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ)
        advise(self._mapping, "MADV_HUGEPAGE")  # before anything is read: what is not in memory comes in large pages
        advise(self._mapping, "MADV_WILLNEED")
        self._view = np.frombuffer(self._mapping, np.uint8)
        self.address = self._view.ctypes.data + offset
        self.bytes = size


class Program:
    """A loaded artifact. Immutable and shared by any number of sessions; ``path`` is where it was loaded from."""

    def __init__(
        self, path: Path, manifest: Manifest, library: Library, weights: Weights, threads: int | None = None
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.library = library
        self.weights = weights
        self.threads = threads

    @property
    def entries(self) -> list[str]:
        return list(self.manifest.entries)

    def session(self, threads: int | None = None, batch: int = 1) -> Session:
        """Memory and threads to run the entries with; ``batch``: the most sequences that the KV states hold."""
        return Session(self, threads, batch)

    def __repr__(self) -> str:
        return f"Program({str(self.path)!r}, entries={self.entries}, target={self.manifest.target.text!r})"


def load(path: str | os.PathLike[str], threads: int | None = None, verify: bool = True) -> Program:
    """Opens the artifact folder ``path``.

    ``threads``: the default of its sessions. ``verify=False`` skips the checksums (sizes are always compared).
    Raises a subclass of ArtifactError that says what is wrong, and UnsupportedHostError before any code is mapped.
    """
    if threads is not None and (not isinstance(threads, int) or threads < 1):
        raise InputError("threads", "an integer >= 1", repr(threads))
    for attempt in range(_ATTEMPTS):
        with Folder(path) as folder:
            try:
                return _load(folder, threads, verify)
            except ArtifactError:
                # A save that replaced the artifact removes the old files: then the new ones are what was asked for.
                if attempt == _ATTEMPTS - 1 or not folder.replaced():
                    raise
    raise AssertionError("unreachable")


def _load(folder: Folder, threads: int | None, verify: bool) -> Program:
    manifest = folder.manifest()
    check_host(manifest.target.features, str(folder.path), manifest.target.text)
    folder.verify(manifest, checksums=verify)
    kernels, weights = folder.open(KERNELS), -1
    try:
        weights = folder.open(WEIGHTS)
        library = Library(kernels, str(folder.path / KERNELS), list(manifest.entries))
        mapped = Weights(weights, str(folder.path / WEIGHTS))
    finally:
        os.close(kernels)
        if weights >= 0:
            os.close(weights)
    return Program(Path(folder.path), manifest, library, mapped, threads)
