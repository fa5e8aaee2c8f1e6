"""Compiles what is measured; no GPU is needed, and no weights are made."""

from __future__ import annotations

import json
import math
import re
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tilewright
from benchmarks.gpu.plan import CACHES, FORMATS, PRODUCT, TOOLS, Heads, Model, Plan, Sizes, attention_folder, heads_of
from benchmarks.peers.environment import commit
from benchmarks.peers.shapes import Shape
from tilewright.codegen.cuda.compile import compile_source
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.target import parse_target
from tilewright.ir import parse_module
from tilewright.runtime.artifact import read_table
from tilewright.runtime.manifest import DTYPES, WEIGHTS

SOURCE = Path(__file__).with_name("tools.cu")


def prepare(out: Path, shapes: Sequence[Shape], formats: Sequence[str], target: str, sizes: Sizes, db: Path | None) -> int:
    """Compile ``shapes`` in ``formats``, attention and a product alone into ``out``; gives bytes of all files.

    Attention has the heads of the last shape.
    """
    out.mkdir(parents=True, exist_ok=True)
    how: dict[str, Any] = {"target": target, "weights": False, "db": db}
    models = []
    for shape in shapes:
        with tempfile.TemporaryDirectory(prefix="tilewright-shape-") as work:
            sparse_checkpoint(shape, Path(work))
            models.append(compiled(Path(work), shape, formats, sizes, out, how))
    plan = Plan(target, commit(), sizes, heads_of(shapes[-1].config), tuple(models))
    for name, cache in CACHES.items():
        module = parse_module(attention(plan.heads, sizes, cache))
        tilewright.compile(module, passes="kernels", out=out / attention_folder(name), **how)
    tilewright.compile(parse_module(product(sizes.product)), passes="kernels", out=out / PRODUCT, **how)
    gpu = parse_target(target)
    assert isinstance(gpu, CudaTarget)
    (out / TOOLS).write_bytes(compile_source(SOURCE.read_text(), gpu).image)
    plan.write(out)
    return sum(path.stat().st_size for path in out.rglob("*") if path.is_file())


def compiled(folder: Path, shape: Shape, formats: Sequence[str], sizes: Sizes, out: Path, how: Mapping[str, Any]) -> Model:
    """A shape in all formats."""
    made = Model(shape.name, shape.like, dict(shape.config), shape.layer_parameters, {})
    for name in formats:
        path = out / made.folder(name)
        options = {"dtype": "bf16", "max_length": sizes.capacity, "sizes": {"S": sizes.prompt}}
        tilewright.compile(folder, passes=FORMATS[name], out=path, **options, **how)
        made.formats[name] = step_bytes(path, shape)
    return made


def step_bytes(artifact: Path, shape: Shape) -> int:
    """Bytes of weights that decoding a token reads: of an embedding table that is nothing else, only a row."""
    rows = read_table(artifact / WEIGHTS)
    tables = () if shape.config["tie_word_embeddings"] else ("embed_tokens",)
    kept = [row for name, row in rows.items() if not any(table in name for table in tables)]
    return sum(math.prod(extents) * DTYPES[dtype].itemsize for dtype, extents, _ in kept)


def sparse_checkpoint(shape: Shape, folder: Path) -> None:
    """A Hugging Face folder whose weights take no room: a file with a hole where they would be."""
    import torch
    import transformers

    architecture = getattr(transformers, shape.architecture)
    config = architecture.config_class(**shape.config, dtype=shape.dtype)
    config.architectures = [shape.architecture]
    config.save_pretrained(folder)
    with torch.device("meta"):
        state = architecture(config).state_dict()
    header, end = {}, 0
    for name, tensor in state.items():
        if name.startswith("lm_head") and shape.config["tie_word_embeddings"]:
            continue
        size = 2 * tensor.numel()
        header[name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


def attention(heads: Heads, sizes: Sizes, stored: str = CACHES[""]) -> str:
    """A module whose entry ``step`` attends to several caches in turn, which ``fill`` writes."""
    length, dim = sizes.attention, heads.dim
    cache = f"kv<heads={heads.keys}, dim={dim}, vdim={dim}, length={length}, {stored}>"
    table, given = "", ""
    if pages := pages_of(stored, length):
        table, given = ", %table", f", %table: tensor<1x{pages}xi32>"
    new, row, scale = f"tensor<1x{length}x{heads.keys}x{dim}xbf16>", f"tensor<1x1x{heads.queries}x{dim}xbf16>", dim**-0.5
    each = range(sizes.caches)
    lines = [f"  state @kv.{i} : {cache}" for i in each]
    lines += [f"  func @fill(%k: {new}, %v: {new}, %start: tensor<1xi64>{given}) {{"]
    lines += [f"    %{i} = kv.append(@kv.{i}, %k, %v, %start{table}) : {cache}" for i in each]
    lines += ["    return([%start])", "  }", f"  func @step(%q: {row}, %start: tensor<1xi64>{given}) {{"]
    more = table and f", none, none{table}"
    lines += [f"    %{i} = kv.attend(%q, @kv.{i}, %start{more}) {{scale={scale}}} : {row}" for i in each]
    lines += [f"    return([{', '.join(f'%{i}' for i in each)}])", "  }"]
    return "\n".join(["module @attention {", *lines, "}"])


def pages_of(stored: str, length: int) -> int:
    """Pages of a sequence in a cache of ``CACHES``, 0 if it has none."""
    found = re.search(r"paged<(\d+)>", stored)
    return -(-length // int(found[1])) if found else 0


def product(size: int) -> str:
    """A module with one matrix product in bf16."""
    square = f"tensor<{size}x{size}xbf16>"
    return f"""module @product {{
  weight @w : {square}
  func @forward(%x: {square}) {{
    %0 = nn.linear(%x, @w) : {square}
    return([%0])
  }}
}}"""
