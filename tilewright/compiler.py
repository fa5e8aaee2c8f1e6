"""``tilewright.compile``: from a model to an artifact that runs."""

from __future__ import annotations

import json
import os
import resource
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from tilewright.bisect import copy_of, random_inputs
from tilewright.calibration_data import Calibration
from tilewright.codegen.build import Build
from tilewright.codegen.store import KernelStore, default_folder
from tilewright.codegen.target import Target, parse_cpu, parse_target
from tilewright.fallbacks import lower_refused
from tilewright.ir import CheckpointError, Module, PassError, TilewrightError
from tilewright.layer_costs import layer_costs
from tilewright.layer_errors import layer_errors, sample_of
from tilewright.passes.base import PassContext
from tilewright.passes.pipeline import Pipeline, PipelineReport
from tilewright.report import FILE, CompileReport
from tilewright.runtime import Program, Session, load
from tilewright.runtime.artifact import ArtifactWriter, refuse_foreign
from tilewright.runtime.caches import CacheSizes
from tilewright.schedules import SHIPPED, choose_schedules
from tilewright.sensitivity import Steps, few
from tilewright.sensitivity import sensitivity as table_of
from tilewright.stages import Holder, Progress, Stages
from tilewright.texts import TextError

_CARRIED = ("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json")


def compile(
    model: Any,
    args: Sequence[Any] = (),
    kwargs: Mapping[str, Any] | None = None,
    *,
    dynamic: Any = None,
    passes: str = "O2",
    target: str = "native",
    max_length: int | None = None,
    dtype: str | None = None,
    task: str | None = None,
    errors: bool = False,
    out: str | os.PathLike[str] | None = None,
    progress: Progress | None = None,
    db: str | os.PathLike[str] | None = None,
    cost_model: str | os.PathLike[str] | None = SHIPPED,
    sizes: Mapping[str, int] | None = None,
    calibration: Any = None,
    sensitivity: bool = False,
    weights: bool = True,
) -> Compiled:
    """Compile a model.

    ``model`` is an ``nn.Module`` (with example ``args`` and ``kwargs``, and ``dynamic`` axes such as
    ``{"x": {0: "B"}}``), the path of a Hugging Face folder or a GGUF file, or a module of our IR. ``passes`` is a pipeline
    (``"O2"``, ``"w8a16"``, or a list of passes), ``target`` a CPU (``"native"``, ``"cpu{arch=x86-64-v3}"``) or a GPU
    (``"cuda{arch=sm_90a}"``), which need not be there.
    ``max_length`` is the capacity of the KV cache in tokens, ``dtype`` the element type to load a folder's weights in.
    ``task="causal-lm"`` says that a module of your own maps token ids ``[B, S]`` to logits ``[B, S, V]`` causally, so that
    it gets a KV cache; Hugging Face models say so themselves.
    ``errors`` adds the error of each layer on a random sample to the report (slow: it runs the interpreter).
    Schedules of kernels are those that ``tilewright.tune`` left in the database ``db`` (a file or a URL), else what the
    ``cost_model`` predicts (a file, the one that comes with tilewright, or None), else their families' rules; the report
    says which. ``sizes`` gives symbolic dims (``{"S": 512}``) the values to choose for.
    The artifact is written to ``out``, or kept in a temporary folder until :meth:`Compiled.save`. With ``weights=False`` it
    has none: ``tilewright.load(out, weights=...)`` brings them.

    Raises a subclass of ``TilewrightError`` that names the module, the op and the line it is about.
    """
    started = Stages(progress)
    wanted = parse_cpu(target) if errors else parse_target(target)  # kernels run here to find their errors
    pipeline = with_length(Pipeline.parse(passes), max_length)
    folder = Path(model) if isinstance(model, (str, os.PathLike)) else None
    given = calibration_of(calibration, folder)
    if sensitivity:
        check_sensitivity(pipeline, given)
    if out is not None:  # now, and not after minutes of work
        refuse_foreign(Path(os.path.realpath(out)))
    with started("trace"):
        module, source = trace(model, args, kwargs, dynamic, dtype)
        module.meta |= {"task": task} if task else {}
    return lower(module, pipeline, wanted, source=source, out=out, stages=started, errors=errors, db=db, sizes=sizes,
                 cost_model=cost_model, calibration=given, sensitivity=sensitivity, weights=weights)  # fmt: skip


def check_sensitivity(pipeline: Pipeline, calibration: Calibration | None) -> None:
    """Raise PassError or TextError where no sensitivity table can be made."""
    Steps.of(pipeline)
    if calibration is None:
        raise TextError("a sensitivity table is measured on calibration data; give calibration, a text or token ids")


def calibration_of(given: Any, folder: Path | None) -> Calibration | None:
    """What ``compile(calibration=...)`` was given, checked as far as it can be without the model."""
    return given if given is None or isinstance(given, Calibration) else Calibration(given, folder)


def trace(model: Any, args: Sequence[Any], kwargs: Mapping[str, Any] | None, dynamic: Any, dtype: str | None
          ) -> tuple[Module, Path | None]:  # fmt: skip
    """The IR of ``model``, and the folder or file it came from if it came from one."""
    if isinstance(model, (str, os.PathLike)) and not (Path(model).is_dir() or is_gguf(model)):  # before torch is imported
        raise CheckpointError(f"{os.fspath(model)} is not a folder, and no GGUF file")
    from tilewright import frontend

    if isinstance(model, Module):
        return model, None
    if isinstance(model, (str, os.PathLike)):
        return frontend.trace_folder(os.fspath(model), dtype=dtype), Path(model)
    return frontend.trace(model, tuple(args), dict(kwargs or {}), dynamic=dynamic), None


def is_gguf(path: str | os.PathLike[str]) -> bool:
    """Whether ``path`` is a GGUF file, by its name."""
    return Path(path).suffix == ".gguf" and Path(path).is_file()


def with_length(pipeline: Pipeline, length: int | None) -> Pipeline:
    """The pipeline with the capacity of its KV caches set; raises PassError for one that cannot be."""
    if length is None:
        return pipeline
    try:
        return Pipeline(tuple(replace(p, length=length) if hasattr(p, "length") else p for p in pipeline.passes))
    except ValueError as error:
        raise PassError(f"max_length: {error}") from None


def lower(
    module: Module,
    pipeline: Pipeline,
    target: Target,
    *,
    source: Path | None = None,
    out: str | os.PathLike[str] | None = None,
    stages: Stages | None = None,
    errors: bool = False,
    db: str | os.PathLike[str] | None = None,
    cost_model: str | os.PathLike[str] | None = SHIPPED,
    sizes: Mapping[str, int] | None = None,
    calibration: Calibration | None = None,
    sensitivity: bool = False,
    weights: bool = True,
) -> Compiled:
    """Run the passes on ``module`` (in place), generate code and write the artifact."""
    stages = stages or Stages(None)
    before = copy_of(module) if errors else None
    inputs = None if calibration is None else calibration.inputs(module)
    options = {"layer_costs": partial(layer_costs, target)} | ({} if inputs is None else {"calibration": inputs})
    sensitive = []
    if sensitivity:
        with stages("sensitivity"):
            sensitive = table_of(module, pipeline, few(inputs or []), options)
    with stages("passes"):
        done, fallbacks = prepare(module, pipeline, target, options)
    with stages("schedules"):
        schedules = choose_schedules(module, target, db=db, cost_model=cost_model, sizes=sizes)
    report = CompileReport(module.name, target.text, str(pipeline), fallbacks=fallbacks)
    report.passes = [asdict(r) for r in done.rows]
    report.sensitivity = sensitive
    report.notes = [f"import: {line}" for line in json.loads(module.meta.get("notes", "[]"))]
    report.notes += [f"{where}: {line}" for where, line in done.ctx.notes] + schedules.notes
    if before is not None:
        with stages("errors"):
            report.layers = layer_errors(before, module, target, sample_of(inputs) or random_inputs(before, tokens=8))
    holder = None if out is not None else Holder()
    path = Path(out) if out is not None else holder.path  # type: ignore[union-attr]
    with stages("build"), ArtifactWriter(path) as writer:
        store = KernelStore(default_folder())
        build = Build(module, target, schedules.chosen, schedules.origins, stages.progress, store, weights)
        manifest = build.write(writer, {**module.meta, "pipeline": str(pipeline)})
        report.notes += carry(source, writer)
        report.kernels = [asdict(k) for k in build.report.kernels]
        report.weight_bytes = build.report.weight_bytes
        report.cache_bytes = CacheSizes.of(manifest.states).full
        report.seconds = stages.finished()
        report.peak_bytes = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        writer.add(FILE, report.to_json())
        writer.commit(manifest)
    return Compiled(path, report, holder)


def prepare(module: Module, pipeline: Pipeline, target: Target, options: Mapping[str, Any] | None = None
            ) -> tuple[PipelineReport, list[str]]:  # fmt: skip
    """Run the passes on ``module`` (in place), take apart what no kernel can do; gives what they did, and the fallbacks."""
    done = pipeline.run(module, ctx=PassContext(options or {}))
    return done, lower_refused(module, target)


def carry(source: Path | None, writer: ArtifactWriter) -> list[str]:
    """Copy the tokenizer and configuration of the model's folder as they are; those of a GGUF file are made of it.

    Gives what could not be made, for the report.
    """
    if source is None:
        return []
    with tempfile.TemporaryDirectory(prefix="tilewright-") as made:
        notes, folder = [], source
        if is_gguf(source):
            from tilewright.frontend.quantized.gguf_model import write_files

            folder = Path(made)
            notes = [f"import: {line}" for line in write_files(source, folder)]
        for name in _CARRIED:
            if (folder / name).is_file():
                writer.copy(name, folder / name)
    return notes


@dataclass
class Compiled:
    """A compiled model: call it, generate with it, save it.

    ``path`` is the artifact folder and ``report`` what the compilation did.
    """

    path: Path
    report: CompileReport
    _holder: Holder | None = None
    _session: Session | None = None
    _program: Program | None = None

    @property
    def program(self) -> Program:
        """The loaded artifact."""
        if self._program is None:
            self._program = load(self.path)
        return self._program

    def session(self, threads: int | None = None, batch: int = 1, **caches: int | None) -> Session:
        """A session of its own; ``caches``, and all of it, as ``Program.session`` says."""
        return self.program.session(threads, batch, **caches)

    @property
    def default_session(self) -> Session:
        """The session that calls of this object share."""
        if self._session is None:
            self._session = self.session()
        return self._session

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Run the entry ``forward``: arrays in, one array (or a tuple) out; torch tensors give torch tensors."""
        spec = self.default_session.entry("forward")
        if len(args) > len(spec.inputs):
            raise TilewrightError(f"forward takes {len(spec.inputs)} inputs, got {len(args)}")
        placed = dict(zip((t.name for t in spec.inputs), args))
        if twice := placed.keys() & kwargs.keys():
            raise TilewrightError(f"forward got {', '.join(sorted(twice))} twice, by position and by name")
        given = {**placed, **kwargs}
        back = torch_like(given.values())
        outputs = self.default_session("forward", **{k: to_numpy(v) for k, v in given.items()})
        values = tuple(back(v) for v in outputs.values())
        return values[0] if len(values) == 1 else values

    def generate(self, prompts: Any, max_new_tokens: int, **options: Any) -> list[list[int]]:
        """New tokens for each prompt (lists of token ids): see ``tilewright.runtime.generation.generate``."""
        with self.session(batch=len(prompts) * options.get("n", 1)) as session:
            return session.generate(prompts, max_new_tokens, **options)

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Copy the artifact to ``path``: whole or not at all. Raises ArtifactError when something else is there."""
        manifest = self.program.manifest
        with ArtifactWriter(path) as writer:
            for name in manifest.files:
                writer.copy(name, self.path / name)
            return writer.commit(replace(manifest, files={}))


def torch_like(values: Any) -> Callable[[np.ndarray[Any, Any]], Any]:
    """What turns outputs into the kind of the inputs: torch tensors when one of them is a tensor."""
    if not any(type(v).__module__.split(".")[0] == "torch" for v in values):
        return lambda array: array
    import torch

    def back(array: np.ndarray[Any, Any]) -> Any:
        if array.dtype.name == "bfloat16":
            return torch.from_numpy(array.view(np.int16)).view(torch.bfloat16)
        return torch.from_numpy(array)

    return back


def to_numpy(value: Any) -> Any:
    """A torch tensor as an array (bf16 through ml_dtypes); anything else as it is."""
    if type(value).__module__.split(".")[0] != "torch":
        return value
    import ml_dtypes
    import torch

    tensor = value.detach().contiguous()
    if tensor.dtype == torch.bfloat16:
        return tensor.view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    return tensor.numpy()
