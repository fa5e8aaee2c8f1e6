"""Files that are checked before use: xz around a line that names format, version and checksum, then the content."""

from __future__ import annotations

import hashlib
import json
import lzma
import os
import threading
from pathlib import Path

from tilewright.ir import TilewrightError

_LIMIT = 1 << 30  # of the content, in bytes: a small file can unpack to more than there is memory


class SealedFileError(TilewrightError):
    """A file that is damaged, of another version or not what it should be."""


def write_beside(path: str | Path, content: bytes) -> None:
    """Write ``path`` whole or not at all: a reader finds the old content or the new. Raises OSError."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.{os.getpid()}-{threading.get_ident()}")
    try:
        part.write_bytes(content)
        os.replace(part, target)
    finally:
        part.unlink(missing_ok=True)


def checksum(content: bytes) -> str:
    """SHA-256, in hexadecimal digits."""
    return hashlib.sha256(content).hexdigest()


def write(path: str | Path, kind: str, version: int, content: bytes, effort: int = 1) -> None:
    """Write ``content`` as a file of ``kind``; equal content gives equal files. ``effort``: xz's preset, 0 to 9."""
    head = {"format": kind, "version": version, "sha256": checksum(content)}
    write_beside(path, lzma.compress(json.dumps(head).encode() + b"\n" + content, preset=effort))


def read(path: str | Path, kind: str, version: int) -> bytes:
    """The content of a file of ``kind``; SealedFileError says why it is refused."""
    try:
        packed = Path(path).read_bytes()
    except OSError as error:
        raise SealedFileError(f"{path}: cannot be read: {error.strerror}") from None
    unpacker = lzma.LZMADecompressor()
    try:
        text = unpacker.decompress(packed, max_length=_LIMIT)
    except (lzma.LZMAError, EOFError) as error:
        raise SealedFileError(f"{path}: no {kind} file, or a damaged one: {error}; get it again") from None
    if not unpacker.eof:
        raise SealedFileError(f"{path}: incomplete, or larger than {_LIMIT >> 20} MiB; get it again")
    if unpacker.unused_data:
        raise SealedFileError(f"{path}: {len(unpacker.unused_data)} bytes follow the end; get it again")
    line, _, content = text.partition(b"\n")
    _check_head(path, line, kind, version)
    if json.loads(line).get("sha256") != checksum(content):
        raise SealedFileError(f"{path}: the checksum does not fit the content: damaged; get it again")
    return content


def _check_head(path: str | Path, line: bytes, kind: str, version: int) -> None:
    try:
        head = json.loads(line)
    except ValueError:
        head = None
    if not isinstance(head, dict) or head.get("format") != kind:
        raise SealedFileError(f"{path}: no {kind} file")
    if head.get("version") != version:
        raise SealedFileError(
            f"{path}: version {head.get('version')}, this tilewright reads version {version}: make it again with this one"
        )
