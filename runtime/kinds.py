"""Kinds of folders that a manifest describes: how they are called in errors, and how their manifest is sealed."""

from __future__ import annotations

import json
import re
from dataclasses import dataclass
from typing import Any

import xxhash

from tilewright.runtime.errors import ArtifactVersionError, DamagedArtifactError
from tilewright.runtime.jsonread import Node, parse

_HEX = re.compile(r"[0-9a-f]{32}")
_LARGEST_VERSION = 2**31


@dataclass(frozen=True)
class Kind:
    """``version`` is that of the format; ``make`` and ``again`` say what to do about another one, and about a damaged one;
    ``maker`` is what writes such a folder."""

    format: str
    version: int
    what: str
    make: str
    again: str
    maker: str

    @property
    def a(self) -> str:
        return f"an {self.what}" if self.what[0] in "aeiou" else f"a {self.what}"

    @property
    def head(self) -> dict[str, Any]:
        """What every manifest begins with."""
        return {"format": self.format, "version": self.version}

    def seal(self, data: dict[str, Any]) -> str:
        """The text of a manifest, with the checksum of the rest in canonical form (sorted keys, no spaces)."""
        return json.dumps(data | {"checksum": _checksum(data)}, indent=1) + "\n"

    def unseal(self, text: str | bytes, where: str) -> Node:
        """What ``seal`` was given. Raises a subclass of ArtifactError."""
        data = parse(text, where)
        node = Node(data, where)
        if "format" not in node or node["format"].value != self.format:
            raise node.error(f'"format" must be "{self.format}"; this is not {self.a} made by tilewright')
        self._check_version(node["version"])
        stored = node["checksum"].string(_HEX)
        del data["checksum"]
        if _checksum(data) != stored:
            raise DamagedArtifactError(f"{where}: its contents do not have the checksum that it states; it was edited or "
                                       f"damaged after it was saved. {self.again}")  # fmt: skip
        return node

    def _check_version(self, node: Node) -> None:
        version = node.integer(1, _LARGEST_VERSION)
        if version == self.version:
            return
        remedy = f"use a newer tilewright, or {self.make}" if version > self.version else self.make
        raise ArtifactVersionError(f"{node.where}: the {self.what} has version {version} and this tilewright reads version "
                                   f"{self.version}; {remedy} again with this one")  # fmt: skip


def _checksum(data: dict[str, Any]) -> str:
    return str(xxhash.xxh3_128_hexdigest(json.dumps(data, sort_keys=True, separators=(",", ":")).encode()))
