"""The arrays of a bundle, read when they are asked for."""

from __future__ import annotations

import os
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.runtime.artifact import MANIFEST, Folder, read_table
from tilewright.runtime.bundle.format import BUNDLE, Bundle, ExpectedSpec
from tilewright.runtime.errors import DamagedArtifactError
from tilewright.runtime.manifest import DTYPES
from tilewright.runtime.tolerance import Expected

Array = np.ndarray[Any, Any]


def open_bundle(path: str | os.PathLike[str], verify: bool = True) -> Bundle:
    """The bundle in the folder ``path``; all its files are checked unless told otherwise. Raises ArtifactError."""
    with Folder(path, BUNDLE) as folder:
        found = Bundle.from_text(folder.manifest_text(), str(folder.path / MANIFEST))
        folder.verify(found.files, checksums=verify)
        return found


class Arrays:
    """The arrays of ``bundle``, which lies in ``folder``."""

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        self.folder, self.bundle = folder, bundle
        self._table = cache(lambda file: read_table(folder / file))

    def __getitem__(self, name: str) -> Array:
        """An array. Raises DamagedArtifactError when the file has another one under its name."""
        spec = self.bundle.arrays[name]
        dtype, shape, offset = self._table(spec.file).get(name, ("", (), 0))
        if dtype != spec.dtype or tuple(shape) != (spec.stored,):
            raise DamagedArtifactError(f"{self.folder / spec.file}: array {name} is not as the manifest lists it. "
                                       f"{BUNDLE.again}")  # fmt: skip
        stored = np.fromfile(self.folder / spec.file, DTYPES[dtype], spec.stored, offset=offset)
        return np.resize(stored, spec.shape)

    def expected(self, spec: ExpectedSpec) -> Expected:
        """A result as it should be."""
        features = None if spec.features is None else self[spec.features]
        found = Expected.of(self[spec.array], spec.narrow, spec.codes, spec.coded)
        return replace(found, shape=spec.shape, features=features)
