"""What can go wrong while saving, loading and running. Each message says what, where, why and the remedy."""

from __future__ import annotations


class ArtifactError(Exception):
    """An artifact that cannot be used. Subclasses say why."""


class ManifestError(ArtifactError):
    """``manifest.json`` is there, but a field of it is missing, unknown or has a value that cannot be right."""


class ArtifactVersionError(ArtifactError):
    """The artifact's format is not one that this version of tilewright reads."""


class DamagedArtifactError(ArtifactError):
    """A file of the artifact is missing, or its bytes are not those that were saved."""


class TruncatedArtifactError(DamagedArtifactError):
    """A file of the artifact is shorter or longer than when it was saved."""


class UnsupportedHostError(ArtifactError):
    """This host cannot run the artifact's code. ``missing``: the CPU features that it lacks."""

    def __init__(self, message: str, missing: tuple[str, ...] = ()) -> None:
        super().__init__(message)
        self.missing = missing


class InputError(ValueError):
    """An argument of a call is wrong; nothing was run.

    ``argument`` names it, ``expected`` and ``got`` are short texts.
    """

    def __init__(self, argument: str, expected: str, got: str, remedy: str = "") -> None:
        tail = f"; {remedy}" if remedy else ""
        super().__init__(f"{argument}: expected {expected}, got {got}{tail}")
        self.argument = argument
        self.expected = expected
        self.got = got


class SessionError(RuntimeError):
    """A session is used after ``close``, or for two generations at once in one thread."""


class OutOfPages(SessionError):
    """A sequence needs a page of the KV caches and none is free. The other sequences are as they were."""


class ProgramError(RuntimeError):
    """The program ran and failed. ``code`` is what it returned (the codes of ``pool.h``), 0 when it did not say."""

    def __init__(self, message: str, code: int = 0) -> None:
        super().__init__(message)
        self.code = code


class DeviceError(ProgramError):
    """A GPU's driver or a kernel on it failed; the message names the entry and, where it is known, the kernel."""


class MissingExtraError(ImportError):
    """A feature needs an optional dependency that is not installed."""


PROGRAM_CODES = {
    1: "an index (a token id, a gather index) is outside its table; check the values of the integer inputs",
    2: "a position goes past the capacity of a KV state; shorten the prompt or compile with a larger capacity",
    3: "an allocation failed; free memory, or use a smaller batch or chunk",
}


def program_failure(entry: str, code: int) -> ProgramError:
    """The error for a program that returned ``code``, with what is known about the code."""
    return ProgramError(f"entry {entry!r} failed with code {code}: {PROGRAM_CODES.get(code, 'unknown code')}", code)
