"""English sentences that every Python installation carries: from the documentation strings of its library."""

from __future__ import annotations

import ast
import hashlib
import re
import sysconfig
from functools import cache
from pathlib import Path

from examples.train_small_lm import library_files

_SENTENCE = re.compile(r"[A-Z][a-z]+ (?:[\w,'-]+ ){5,24}[\w'-]+\.")


def sentences(count: int, skip: int = 0) -> list[str]:
    """``count`` sentences in the order of their hashes, after the first ``skip``."""
    return all_sentences()[skip : skip + count]


@cache
def all_sentences() -> list[str]:
    """All there are, in the order of their hashes."""
    found: set[str] = set()
    for _, contents in library_files(Path(sysconfig.get_path("stdlib"))):
        tree = ast.parse(contents)
        for node in ast.walk(tree):
            if isinstance(node, (ast.FunctionDef, ast.ClassDef, ast.Module)):
                text = " ".join((ast.get_docstring(node) or "").split())
                found.update(_SENTENCE.findall(text))
    return sorted(found, key=lambda s: hashlib.sha256(s.encode()).digest())
