"""What is compared with what, and how much faster it is to be."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from benchmarks.peers.peer import Variant

Rule = Callable[[Variant], bool]


def of_width(*widths: str, isa: str = "native") -> Rule:
    return lambda variant: variant.width in widths and variant.isa == isa


def with_int8_activations(variant: Variant) -> bool:
    return variant.a8 and variant.isa == "native"


def any_native(variant: Variant) -> bool:
    return variant.isa == "native"


def nothing(variant: Variant) -> bool:
    return False


@dataclass(frozen=True)
class Work:
    """A row of the goals. ``own`` and ``peers`` say which variants take part.

    ``goal``: own speed over the speed of the fastest peer at least; with ``below``, own latency over that of the
    fastest peer at most. ``share``: of the limit ``of`` to reach, on the model L.
    """

    name: str
    tasks: tuple[str, ...]
    models: str
    own: Rule
    peers: Rule
    goal: float | None = None
    below: bool = False
    share: float | None = None
    of: str = ""
    systems: tuple[str, ...] = field(default=())
    """The peers that count; empty: all."""


WORKS = (
    Work("decode-int4", ("decode",), "SML", of_width("int4"), of_width("int4"), 1.4, share=0.80, of="read"),
    Work("decode-int8", ("decode",), "SML", of_width("int8"), of_width("int8"), 1.2, share=0.85, of="read"),
    Work("decode-bf16", ("decode",), "SML", of_width("bf16"), of_width("bf16"), 1.2, share=0.85, of="read"),
    Work("decode-f32", ("decode",), "SM", of_width("f32"), of_width("f32")),
    Work("prefill-int8", ("prefill",), "SML", with_int8_activations, any_native, 1.3, share=0.60, of="int8"),
    Work("prefill-bf16", ("prefill",), "SML", of_width("bf16"), of_width("bf16"), 1.0),
    Work("prefill-f32", ("prefill",), "SML", of_width("f32"), of_width("f32"), 1.5, systems=("openvino",)),
    Work("encoder-f32", ("encode-1", "encode-32"), "E", of_width("f32"), of_width("f32"), 0.9, below=True),
    Work("encoder-bf16", ("encode-1", "encode-32"), "E", of_width("bf16"), of_width("bf16"), below=True),
    Work("encoder-int8", ("encode-1", "encode-32"), "E", of_width("int8"), of_width("int8"), 0.9, below=True),
    Work("context-4k", ("decode-4k",), "L", of_width("int4"), of_width("int4")),
    Work("attention-4k", ("attention",), "L", of_width("bf16"), nothing, share=0.75, of="read"),
    *(Work(f"avx2-{task}-{width}", (task,), "SM", of_width(width, isa="avx2"), of_width(width, isa="avx2"), 0.8)
      for task in ("decode", "prefill") for width in ("bf16", "int8", "int4")),
)  # fmt: skip
