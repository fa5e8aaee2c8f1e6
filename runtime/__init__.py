"""Loads and runs compiled artifacts: numpy and ctypes only, none of the compiler."""

from tilewright.runtime.batch import Batch
from tilewright.runtime.errors import (
    ArtifactError,
    ArtifactVersionError,
    DamagedArtifactError,
    InputError,
    ManifestError,
    MissingExtraError,
    OutOfPages,
    ProgramError,
    SessionError,
    TruncatedArtifactError,
    UnsupportedHostError,
)
from tilewright.runtime.generation import generate, stream
from tilewright.runtime.loader import Program, load
from tilewright.runtime.session import Session
from tilewright.runtime.tokenizer import Detokenizer, Tokenizer

__all__ = [
    "ArtifactError", "ArtifactVersionError", "Batch", "DamagedArtifactError", "Detokenizer", "InputError", "ManifestError",
    "MissingExtraError", "OutOfPages", "Program", "ProgramError", "Session", "SessionError", "Tokenizer",
    "TruncatedArtifactError", "UnsupportedHostError", "generate", "load", "stream",
]  # fmt: skip
