"""``tilewright export``: a model that our passes quantized, as a Hugging Face folder that others read."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tilewright import compiler, export_compressed
from tilewright.export_layers import Stored, constants, originals, stored
from tilewright.ir import CheckpointError, UnsupportedError
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline

FORMATS = ("compressed-tensors",)
_LATER = ("kv-layout", "fuse", "plan-memory")  # from here on a pipeline is about kernels
_KEPT = (".json", ".txt", ".model", ".jinja")
_REPLACED = ("config.json", "quantize_config.json", "quant_config.json", "model.safetensors.index.json")
_BLOCK = 64 << 20  # bytes that are written at a time


def export(
    model: str | os.PathLike[str],
    out: str | os.PathLike[str],
    *,
    format: str = "compressed-tensors",
    passes: str = "w4a16",
    dtype: str | None = None,
    calibration: Any = None,
) -> Path:
    """Quantize the model in a Hugging Face folder or GGUF file by the ``passes`` of a pipeline, and write it to ``out``.

    Passes about caches and kernels are left out. A checkpoint that is quantized already keeps its codes, so that with
    ``passes=""`` one format becomes the other. Weights are computed and written one at a time.

    Raises UnsupportedError naming the weight that the format does not carry, CheckpointError when ``out`` is there.
    """
    source, target = Path(model), Path(out)
    if format not in FORMATS:
        raise UnsupportedError(f"unknown format {format!r}; there are {', '.join(FORMATS)}")
    if (source / "manifest.json").is_file():
        raise UnsupportedError(
            f"{source} is an artifact, whose weights lie as its kernels want them\n"
            "  remedy: export the model that it was compiled from, with the same passes"
        )
    if target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise CheckpointError(f"{target} is there already and not empty; give another folder")
    pipeline = before_kernels(Pipeline.parse(passes) if passes else Pipeline(()))
    samples = compiler.calibration_of(calibration, source)
    module, _ = compiler.trace(source, (), None, None, dtype)
    shapes, given = originals(module), constants(module)
    expect_names(source, shapes)
    options = {} if samples is None else {"calibration": samples.inputs(module)}
    pipeline.run(module, ctx=PassContext(options))
    items = stored(module, shapes, given)
    for item in items:
        export_compressed.check(item)
    if not any(item.scale is not None for item in items):
        raise UnsupportedError(f"no weight is quantized after the passes {passes!r}; name a scheme, such as w4a16")
    write(source, target, items, json.loads(module.meta["config"]))
    return target


def expect_names(source: Path, names: Iterable[str]) -> None:
    """Raises UnsupportedError for a model whose weights are put together of several of its folder's tensors."""
    if source.is_file():
        return
    from tilewright.frontend.checkpoint import Checkpoint

    modules = {key.rpartition(".")[0] for key in Checkpoint(source).where}
    for name in names:
        if name.rpartition(".")[0] not in modules:
            raise UnsupportedError(f"{source}: no tensor is @{name}; models whose weights are converted are not exported")


def before_kernels(pipeline: Pipeline) -> Pipeline:
    """The passes that are about the model alone."""
    names = [p.name for p in pipeline.passes]
    ends = [i for i, name in enumerate(names) if name in _LATER]
    return Pipeline(pipeline.passes[: ends[0] if ends else None])


def write(source: Path, target: Path, items: Sequence[Stored], traced: dict[str, Any]) -> None:
    """Write the folder: beside, then renamed."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{target.name}-", dir=target.parent) as made:
        folder = Path(made) / "folder"
        folder.mkdir()
        config = _carry(source, folder)
        settings = export_compressed.settings(items)
        settings["ignore"] += ["lm_head"] if traced.get("tie_word_embeddings") else []
        config |= {"quantization_config": settings}
        config |= {name: traced[name] for name in ("architectures", "dtype") if traced.get(name)}
        (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
        tensors = [t for item in items for t in export_compressed.tensors(item)]
        arrays = (array for item in items for array in export_compressed.arrays(item))
        write_safetensors(folder / "model.safetensors", tensors, arrays)
        if target.exists():
            target.rmdir()  # it is empty
        os.replace(folder, target)


def _carry(source: Path, folder: Path) -> dict[str, Any]:
    """Copy what belongs to the model but its weights; gives its config."""
    if source.is_file():
        from tilewright.frontend.quantized.gguf_model import write_files

        write_files(source, folder)
        return dict(json.loads((folder / "config.json").read_text()))
    for file in source.iterdir():
        if file.suffix in _KEPT and file.name not in _REPLACED:
            shutil.copyfile(file, folder / file.name)
    return dict(json.loads((source / "config.json").read_text()))


def write_safetensors(path: Path, tensors: Sequence[export_compressed.Tensor], arrays: Iterable[np.ndarray]) -> None:
    """Write tensors to a file, one after the other as ``arrays`` gives them."""
    table, end = {}, 0
    for tensor in tensors:
        size = _SIZES[tensor.dtype] * int(np.prod(tensor.shape, dtype=np.int64))
        table[tensor.name] = {"dtype": tensor.dtype, "shape": list(tensor.shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps({"__metadata__": {"format": "pt"}, **table}, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for tensor, array in zip(tensors, arrays, strict=True):
            if array.shape != tensor.shape or array.itemsize != _SIZES[tensor.dtype]:
                raise CheckpointError(f"{tensor.name}: expected {tensor}, got {array.dtype}{list(array.shape)}")
            for block in _blocks(array):
                file.write(block)


_SIZES = {"F64": 8, "F32": 4, "F16": 2, "BF16": 2, "F8_E4M3": 1, "I64": 8, "I32": 4, "I8": 1}


def _blocks(array: np.ndarray) -> Iterator[memoryview]:
    """The bytes of an array, a bounded part at a time."""
    flat = np.ascontiguousarray(array).reshape(-1)
    step = max(1, _BLOCK // array.itemsize)
    for start in range(0, flat.size, step):
        yield memoryview(flat[start : start + step].view(np.uint8))
