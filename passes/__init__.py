"""Passes: rewrites of the IR, one a file, composed into pipelines by text."""

from tilewright.passes.base import Pass, PassContext
from tilewright.passes.pipeline import PassReport, Pipeline, PipelineReport
from tilewright.passes.registry import find, names, register
from tilewright.passes.text import parse_pass, print_pass

__all__ = [
    "Pass",
    "PassContext",
    "PassReport",
    "Pipeline",
    "PipelineReport",
    "find",
    "names",
    "parse_pass",
    "print_pass",
    "register",
]
