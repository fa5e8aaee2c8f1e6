"""What is compared: a pipeline each. One more is one line."""

from __future__ import annotations

from dataclasses import dataclass

PLAIN, OUTLIERS = "as trained", "with outlier channels"
HEAD16, HEAD8 = "quantize{scheme=w8a16 layers=head}", "quantize{scheme=w8a8 layers=head}"
"""Below eight bits the head and the table of tokens keep eight, as in the named pipelines."""


@dataclass(frozen=True)
class Row:
    """``passes`` stand between the fusions and the kernels; ``model`` is the one as trained, or rescaled."""

    name: str
    passes: str = ""
    dtype: str = "f32"
    model: str = PLAIN

    @property
    def pipeline(self) -> str:
        """Up to the cutting of kernels, and without a cache: the logits of all positions are wanted."""
        return ",".join(filter(None, ["clean", "fusions", self.passes]))


def methods(scheme: str, group: int) -> list[Row]:
    """Methods side by side: 16-bit activations, in groups."""
    name, options = f"{scheme} g{group}", f"scheme={scheme} group={group}"
    body = f"{HEAD16},quantize{{{options} layers=body"
    return [
        Row(f"{name} rtn", f"{body}}}"),
        Row(f"{name} clip", f"{body} method=clip}}"),
        Row(f"{name} gptq", f"{body} method=gptq}}"),
        Row(f"{name} awq", f"awq{{{options}}},{body} method=clip}}"),
    ]


def eight_bits() -> list[Row]:
    return [Row(name, f"quantize{{scheme={name}}}") for name in ("w8a16", "w8a8", "fp8", "fp8-e5m2")]


def integers() -> list[Row]:
    """Four-bit weights, eight-bit activations."""
    body = f"{HEAD8},quantize{{scheme=w4a8 group=128 layers=body"
    two = f"{HEAD8},quantize{{scheme=two-level layers=body"
    return [
        *(Row(f"w4a8 g128 {m}", f"{body} method={m}}}") for m in ("rtn", "clip", "gptq")),
        Row("w4a8 two-level rtn", f"{two}}}"),
        Row("w4a8 two-level gptq", f"{two} method=gptq}}"),
    ]


def outliers() -> list[Row]:
    """Three bits, one column in a hundred apart but in the head; and codebooks, which need no groups."""
    columns = "outlier-columns{fraction=0.01 inputs=false skip=*embed_tokens*}"
    body = f"{HEAD16},quantize{{scheme=w3a16 group=128 layers=body"
    weights = "outlier-weights{fraction=0.01 skip=*embed_tokens*}"
    return [
        Row("w3a16 g128 outlier weights rtn", f"{weights},{body}}}"),
        Row("w3a16 g128 outlier weights gptq", f"{weights},{body} method=gptq}}"),
        Row("w3a16 g128 outlier columns rtn", f"{columns},{body}}}"),
        Row("w3a16 g128 outlier columns gptq", f"{columns},{body} method=gptq}}"),
        Row("codebook3", f"{HEAD16},quantize{{scheme=codebook3 layers=body}}"),
        Row("codebook3 outlier weights", f"{weights},{HEAD16},quantize{{scheme=codebook3 layers=body}}"),
    ]


def mixed() -> list[Row]:
    """Schemes chosen layer by layer, in the bytes that three bits in groups of 128 take."""
    candidates = ", ".join(f'"{scheme} group=128"' for scheme in ("w4a16", "w3a16", "w2a16"))
    head = f"{HEAD16},quantize-mixed{{bits=3.125 candidates=[{candidates}]"
    return [
        Row("mixed 3.125 bits greedy rtn", f"{head}}}"),
        Row("mixed 3.125 bits greedy gptq", f"{head} method=gptq}}"),
        Row("mixed 3.125 bits evolve rtn", f"{head} search=evolve}}"),
    ]


def other_formats() -> list[Row]:
    names = ("mxfp4", "nf4", "codebook4", "ternary-a16")
    return [Row(name, f"{HEAD16},quantize{{scheme={name} layers=body}}") for name in names]


def smoothing() -> list[Row]:
    """Eight-bit activations where a few channels are 32 times as large."""
    w8a8, columns = "quantize{scheme=w8a8}", "outlier-columns{fraction=0.02 skip=*embed_tokens*}"
    return [
        Row("outliers: f32", "", model=OUTLIERS),
        Row("outliers: w8a8 rtn", w8a8, model=OUTLIERS),
        Row("outliers: w8a8 smooth", f"smooth,{w8a8}", model=OUTLIERS),
        Row("outliers: w8a8 outlier columns", f"{columns},{w8a8}", model=OUTLIERS),
    ]


ROWS: tuple[Row, ...] = (
    Row("f32"),
    Row("bf16", dtype="bf16"),
    *eight_bits(),
    *integers(),
    *methods("w4a16", 128),
    *methods("w3a16", 128),
    *outliers(),
    *smoothing(),
    *mixed(),
    *other_formats(),
    *methods("w2a16", 64),
    *methods("w4a16", 64),
    *methods("w3a16", 64),
    *methods("w2a16", 128),
)
"""The first one is the reference of divergences, the second that of perplexities."""
REFERENCE, BASE = ROWS[0].name, ROWS[1].name

ENCODER: tuple[Row, ...] = (
    Row("w8a8", "quantize{scheme=w8a8}"),
    Row("w8a8 smooth", "smooth,quantize{scheme=w8a8}"),
    Row("w8a8 outlier columns", "outlier-columns{fraction=0.01},quantize{scheme=w8a8}"),
    Row("w8a8 smooth, outlier columns", "smooth,outlier-columns{fraction=0.01},quantize{scheme=w8a8}"),
    Row("w8a8 smooth, outlier columns, gptq", "smooth,outlier-columns{fraction=0.01},quantize{scheme=w8a8 method=gptq}"),
    Row("w8a16", "quantize{scheme=w8a16}"),
    Row("w4a16 g32", f"{HEAD16},quantize{{scheme=w4a16 group=32 layers=body}}"),
    Row("w4a16 g32 gptq", f"{HEAD16},quantize{{scheme=w4a16 group=32 layers=body method=gptq}}"),
    Row("w4a16 g128", f"{HEAD16},quantize{{scheme=w4a16 group=128 layers=body}}"),
    Row("w4a8 g32", f"{HEAD8},quantize{{scheme=w4a8 group=32 layers=body}}"),
    Row("w4a8 g32 smooth, gptq", f"smooth,{HEAD8},quantize{{scheme=w4a8 group=32 layers=body method=gptq}}"),
)
"""Rows of MiniLM, against f32."""
