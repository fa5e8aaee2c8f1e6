"""The artifact folder: saved whole or not at all, and verified before it is used.

A save goes into a hidden sibling folder, is synced, and takes the target's name in one step. Killed at any moment it
leaves the old artifact, the new one, or none; what it left besides is removed by the next save to the same target.
"""

from __future__ import annotations

import ctypes
import dataclasses
import errno
import fcntl
import mmap
import os
import re
import secrets
import shutil
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

from tilewright.runtime.errors import ArtifactError, DamagedArtifactError, TruncatedArtifactError
from tilewright.runtime.kinds import Kind
from tilewright.runtime.manifest import (
    ARTIFACT,
    DEVICE,
    DTYPES,
    KERNELS,
    WEIGHTS,
    DimSpec,
    EntrySpec,
    Extent,
    FileSpec,
    Manifest,
    StateSpec,
    TargetSpec,
    TensorSpec,
)
from tilewright.runtime.memory import advise
from tilewright.runtime.native import native_sources
from tilewright.runtime.weights import (
    ALIGNMENT,
    BLOCK,
    WeightSpec,
    WeightsPlan,
    WeightsWriter,
    plan_weights,
    read_table,
    write_all,
)

if TYPE_CHECKING:
    from tilewright.runtime.bundle.format import Bundle

MANIFEST = "manifest.json"
_MANIFEST_LIMIT = 64 << 20
_AT_FDCWD = -100
_RENAME_EXCHANGE = 2


class Folder:
    """An artifact folder (or one of another kind) held open: all reads go to the same folder, even when a save replaces it
    meanwhile."""

    def __init__(self, path: str | os.PathLike[str], kind: Kind = ARTIFACT) -> None:
        self.path, self.kind = Path(path), kind
        try:
            self._fd = os.open(self.path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError as error:
            raise ArtifactError(f"{self.path}: not a folder that can be opened ({error.strerror}); "
                                f"give the folder that {kind.maker} wrote") from error

    def __enter__(self) -> Folder:
        return self

    def __exit__(self, *error: object) -> None:
        os.close(self._fd)

    def open(self, name: str) -> int:
        """A descriptor to read the file ``name``."""
        try:
            return os.open(name, os.O_RDONLY | os.O_CLOEXEC, dir_fd=self._fd)
        except OSError as error:
            raise DamagedArtifactError(f"{self.path / name}: cannot be opened ({error.strerror}); the "
                                       f"{self.kind.what} is incomplete. {self.kind.again}") from error

    def replaced(self) -> bool:
        """Whether the path now leads to another folder than the one held open."""
        try:
            now, then = os.stat(self.path), os.fstat(self._fd)
        except OSError:
            return False
        return (now.st_dev, now.st_ino) != (then.st_dev, then.st_ino)

    def manifest(self) -> Manifest:
        return Manifest.from_text(self.manifest_text(), str(self.path / MANIFEST))

    def manifest_text(self) -> bytes:
        with open(self.open(MANIFEST), "rb") as stream:
            return stream.read(_MANIFEST_LIMIT)

    def verify(self, files: Mapping[str, FileSpec], checksums: bool = True) -> None:
        """Compares each file with what the manifest lists: all sizes, then (unless told otherwise) all checksums."""
        for name, file in files.items():
            self._verify_size(name, file)
        if not checksums:
            return
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            list(pool.map(self._verify_checksum, files, files.values()))

    def _verify_size(self, name: str, file: FileSpec) -> None:
        descriptor = self.open(name)
        size = os.fstat(descriptor).st_size
        os.close(descriptor)
        if size != file.bytes:
            raise TruncatedArtifactError(f"{self.path / name}: has {size} bytes and was saved with {file.bytes}; "
                                         f"a copy was cut short or the file was changed. {self.kind.again}")

    def _verify_checksum(self, name: str, file: FileSpec) -> None:
        descriptor = self.open(name)
        try:
            found = checksum(descriptor)
        finally:
            os.close(descriptor)
        if found != file.xxh3_128:
            raise DamagedArtifactError(f"{self.path / name}: its checksum is {found} and was {file.xxh3_128} when it "
                                       f"was saved; the file is damaged. {self.kind.again}")


def checksum(descriptor: int) -> str:
    """xxh3_128 of a file, in hex, over a mapping of it."""
    size = os.fstat(descriptor).st_size
    if size == 0:
        return str(xxhash.xxh3_128_hexdigest(b""))
    with mmap.mmap(descriptor, size, flags=mmap.MAP_PRIVATE, prot=mmap.PROT_READ) as mapping:
        advise(mapping, "MADV_HUGEPAGE")  # what is read from the disk now stays in memory for the kernels: in large pages
        advise(mapping, "MADV_SEQUENTIAL")
        return str(xxhash.xxh3_128_hexdigest(mapping))


def read_manifest(path: str | os.PathLike[str]) -> Manifest:
    """The manifest of the artifact folder ``path``, checked. Raises a subclass of ArtifactError."""
    with Folder(path) as folder:
        return folder.manifest()


def verify_files(path: str | os.PathLike[str], manifest: Manifest | None = None) -> None:
    """Compares the files of the artifact with its manifest: sizes first, then checksums. Raises ArtifactError."""
    with Folder(path) as folder:
        folder.verify((manifest or folder.manifest()).files)


class ArtifactWriter:
    """Saves an artifact: ``with ArtifactWriter(path) as w: w.add(...); w.weights(plan) ...; w.commit(manifest)``.

    ``folder`` is where files may also be put directly (a linker's output). Leaving the block without ``commit``
    removes everything. Raises ArtifactError when ``path`` holds something that is not an artifact, or of the ``kind`` told.
    """

    def __init__(self, path: str | os.PathLike[str], kind: Kind = ARTIFACT) -> None:
        self.target, self.kind = Path(os.path.realpath(path)), kind
        refuse_foreign(self.target, kind)
        self.target.parent.mkdir(parents=True, exist_ok=True)
        _remove_stale(self.target)
        self.folder, self._lock = _make_temporary(self.target)
        self._known: dict[str, Callable[[], FileSpec | None]] = {}
        self._open = True

    def path(self, name: str) -> Path:
        """Where the file ``name`` goes, its folders made."""
        self._known.pop(name, None)  # it is about to be written
        path = self.folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        return path

    def add(self, name: str, data: str | bytes) -> None:
        self.path(name).write_bytes(data.encode() if isinstance(data, str) else data)

    def copy(self, name: str, source: str | os.PathLike[str]) -> None:
        """Puts a copy of the file ``source`` in, in large blocks as ``WeightsWriter`` writes them."""
        digest, size = xxhash.xxh3_128(), 0
        with open(source, "rb", buffering=0) as old, open(self.path(name), "wb", buffering=0) as new:
            block = memoryview(bytearray(min(BLOCK, max(1, os.fstat(old.fileno()).st_size))))
            while count := old.readinto(block):
                digest.update(block[:count])
                write_all(new, block[:count])
                size += count
        file = FileSpec(size, digest.hexdigest())
        self._known[name] = lambda: file

    def weights(self, plan: WeightsPlan, name: str = WEIGHTS) -> WeightsWriter:
        """The stream into a file of tensors; a context manager."""
        writer = WeightsWriter(self.path(name), plan)
        self._known[name] = lambda: writer.file
        return writer

    def commit(self, manifest: Manifest | Bundle) -> Path:
        """Lists and syncs all files, writes the manifest and gives the folder its name. Returns the target."""
        names = sorted(str(p.relative_to(self.folder)) for p in self.folder.rglob("*") if p.is_file())
        files = {name: self._sync(name) for name in names}
        self.add(MANIFEST, dataclasses.replace(manifest, files=files).to_text())
        self._sync(MANIFEST)
        for folder in [self.folder, *(p for p in self.folder.rglob("*") if p.is_dir())]:
            _sync_folder(folder)
        refuse_foreign(self.target, self.kind)
        _publish(self.folder, self.target)
        _sync_folder(self.target.parent)
        self._close()
        return self.target

    def abort(self) -> None:
        """Removes what was written; nothing after ``commit``."""
        if self._open:
            shutil.rmtree(self.folder, ignore_errors=True)
            self._close()

    def _close(self) -> None:
        os.close(self._lock)
        self._open = False

    def __enter__(self) -> ArtifactWriter:
        return self

    def __exit__(self, *error: object) -> None:
        self.abort()

    def _sync(self, name: str) -> FileSpec:
        known = self._known[name]() if name in self._known else None
        descriptor = os.open(self.folder / name, os.O_RDONLY)
        try:
            os.fsync(descriptor)
            return known or FileSpec(os.fstat(descriptor).st_size, checksum(descriptor))
        finally:
            os.close(descriptor)


def refuse_foreign(target: Path, kind: Kind = ARTIFACT) -> None:
    """Raises ArtifactError when ``target`` holds something that is not of this kind, which a save would not replace."""
    if not os.path.lexists(target):
        return
    if target.is_dir() and (not any(target.iterdir()) or _is(kind, target)):
        return
    raise ArtifactError(f"{target}: exists and is not {kind.a}, so it is not replaced; give another path or "
                        "remove it first")


def _is(kind: Kind, folder: Path) -> bool:
    """Whether this module wrote the folder; a damaged one or one of another version counts, it may be replaced."""
    if kind is ARTIFACT and all((folder / name).is_file() for name in (MANIFEST, KERNELS, WEIGHTS)):
        return True
    try:
        return kind.format.encode() in (folder / MANIFEST).read_bytes()
    except OSError:
        return False


def _make_temporary(target: Path) -> tuple[Path, int]:
    """A new folder beside the target and a descriptor whose lock says that its writer lives."""
    while True:
        folder = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        folder.mkdir()
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except FileNotFoundError:
            continue
        _lock(descriptor, wait=True)
        if folder.exists():
            return folder, descriptor
        os.close(descriptor)  # another writer took it for stale before it was locked


def _lock(descriptor: int, wait: bool) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
    except OSError:
        return False  # held by a live writer, or a file system without locks: then nothing is ever taken for stale
    return True


def _remove_stale(target: Path) -> None:
    pattern = re.compile(re.escape(f".{target.name}.tmp-") + r"\d+-[0-9a-f]{8}")
    for folder in target.parent.iterdir():
        if not pattern.fullmatch(folder.name) or not folder.is_dir():
            continue
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        except OSError:
            continue
        if _lock(descriptor, wait=False):
            shutil.rmtree(folder, ignore_errors=True)
        os.close(descriptor)


def _publish(folder: Path, target: Path) -> None:
    try:
        os.rename(folder, target)
        return
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
    old = folder
    if not _exchange(folder, target):
        # Two steps where the file system has no exchange: killed between them, there is no artifact at the target.
        old = target.with_name(f".{target.name}.tmp-{os.getpid()}-{secrets.token_hex(4)}")
        os.rename(target, old)
        os.rename(folder, target)
    shutil.rmtree(old, ignore_errors=True)


def _exchange(first: Path, second: Path) -> bool:
    """Swaps two names in one step; False where the system cannot."""
    renameat2 = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    if renameat2 is None:
        return False
    if renameat2(_AT_FDCWD, os.fsencode(first), _AT_FDCWD, os.fsencode(second), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.EINVAL, errno.ENOSYS):
        return False
    raise OSError(code, os.strerror(code), str(first), None, str(second))


def _sync_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


__all__ = [
    "ALIGNMENT", "DEVICE", "DTYPES", "KERNELS", "MANIFEST", "WEIGHTS", "ArtifactWriter", "DimSpec", "EntrySpec", "Extent",
    "FileSpec", "Folder", "Manifest", "StateSpec", "TargetSpec", "TensorSpec", "WeightSpec", "WeightsPlan",
    "WeightsWriter", "checksum", "native_sources", "plan_weights", "read_manifest", "read_table", "refuse_foreign",
    "verify_files",
]  # fmt: skip
