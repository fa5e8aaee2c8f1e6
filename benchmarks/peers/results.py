"""Samples in a JSON file: appended one at a time, never half written, so that a run goes on where it stopped."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

Sample = dict[str, Any]
Key = tuple[str, str, str, str, int]


class ResultsError(RuntimeError):
    """The file holds results of another machine or with other settings."""


def key(sample: Sample) -> Key:
    """What a sample is of: model, system, variant, task, round."""
    return sample["model"], sample["system"], sample["variant"], sample["task"], sample["round"]


class Results:
    """The results in ``path``: ``settings`` (what must be equal within a file), ``environment`` and ``samples``."""

    def __init__(self, path: Path) -> None:
        self.path = path
        content = json.loads(path.read_text()) if path.is_file() else {}
        self.settings: dict[str, Any] = content.get("settings", {})
        self.environment: dict[str, Any] = content.get("environment", {})
        self.samples: list[Sample] = content.get("samples", [])

    def begin(self, settings: dict[str, Any], environment: dict[str, Any]) -> None:
        """Go on with ``settings``; raises ResultsError when there are samples taken with others."""
        if self.samples and self.settings != settings:
            raise ResultsError(f"{self.path} holds results with {self.settings}, not {settings}; use another --out")
        self.settings, self.environment = settings, environment

    def has(self, at: Key) -> bool:
        """Whether there is a figure; what failed is tried again."""
        return any(key(sample) == at and "error" not in sample for sample in self.samples)

    def append(self, sample: Sample) -> None:
        """Add a sample and write the file. It takes the place of an earlier one that failed."""
        self.samples = [old for old in self.samples if key(old) != key(sample) or "error" not in old]
        self.samples.append(sample)
        self.write()

    def drop(self, which: Callable[[Sample], bool]) -> None:
        """Forget samples."""
        self.samples = [sample for sample in self.samples if not which(sample)]

    def write(self) -> None:
        """Write the file whole, beside, and rename it: one line a sample."""
        head = {"settings": self.settings, "environment": self.environment}
        lines = ",\n".join("  " + json.dumps(sample) for sample in self.samples)
        text = json.dumps(head, indent=1).removesuffix("\n}") + f',\n "samples": [\n{lines}\n ]\n}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_name(f".{self.path.name}.{os.getpid()}")
        beside.write_text(text)
        os.replace(beside, self.path)
