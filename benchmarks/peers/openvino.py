"""OpenVINO: exported by optimum-intel, run by openvino-genai (decoders) or openvino itself (encoders)."""

from __future__ import annotations

from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from benchmarks.peers.peer import Engine, Peer, Variant, prompt, run_worker
from benchmarks.peers.shapes import Shape
from benchmarks.peers.workplace import Workplace

EXPORTS = {
    "f32": ("--weight-format", "fp32"),
    "bf16": ("--weight-format", "fp16"),  # it stores f16 and computes in bf16
    "int8": ("--weight-format", "int8"),
    "int4": ("--weight-format", "int4", "--sym", "--group-size", "128", "--group-size-fallback", "adjust"),
}
CALIBRATION = 16
"""Random texts for the post-training quantization of an encoder."""


class OpenVino(Peer):
    """Attention in two ways, paged (``-pa``) and plain (``-sdpa``): neither is always the faster one."""

    name: ClassVar[str] = "openvino"
    title: ClassVar[str] = "OpenVINO"
    requirements: ClassVar[tuple[str, ...]] = (
        "torch==2.13.0", "openvino==2026.4.1", "openvino-genai==2026.4.1.0", "openvino-tokenizers==2026.4.1.0",
        "nncf==3.4.0", "optimum-intel==2.2.0", "transformers==5.5.4",
    )  # fmt: skip
    variants: ClassVar[tuple[Variant, ...]] = (
        *(Variant(f"{width}-{backend.lower()}", width, options={"family": width, "file": width, "backend": backend})
          for width in EXPORTS for backend in ("PA", "SDPA")),
        Variant("f32", "f32", models="E", options={"file": "f32"}),
        Variant("bf16", "bf16", models="E", options={"file": "f32"}),
        Variant("int8", "int8", models="E", options={"file": "int8"}),
    )  # fmt: skip

    def setup(self, place: Workplace) -> None:
        super().setup(place)
        # asked for by optimum-intel for images alone; built for another torch, it would break every import
        place.step("openvino-without-torchvision", "1", lambda: place.run(
            [self.python(place), "-m", "pip", "uninstall", "-y", "-q", "torchvision"], "venv-openvino"))  # fmt: skip

    def path(self, place: Workplace, shape: Shape, variant: Variant) -> Path:
        return place.model(shape.name) / f"openvino-{variant.options['file']}"

    def step_name(self, shape: Shape, variant: Variant) -> str:
        return f"{self.name}-{shape.name}-{variant.options['file']}"

    def prepare(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        file = variant.options["file"]
        log = self.step_name(shape, variant)
        made_from = " ".join((*self.requirements, *EXPORTS[file]))
        if shape.is_encoder and file == "int8":
            self.prepare(place, shape, self.variant("f32"))
            place.step(log, made_from, lambda: run_worker(place, self, shape, variant, log))
            return
        task = "feature-extraction" if shape.is_encoder else "text-generation-with-past"
        command = [self.python(place).with_name("optimum-cli"), "export", "openvino", "--task", task,
                   "--model", place.model(shape.name) / "hf", *EXPORTS[file], self.path(place, shape, variant)]  # fmt: skip
        place.step(log, made_from, lambda: place.run(command, log))

    def convert(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        """Quantize an encoder after training, weights and activations, on random ids; in the worker."""
        import nncf
        import openvino

        model = openvino.Core().read_model(self.path(place, shape, self.variant("f32")) / "openvino_model.xml")
        samples = [encoder_inputs(model, shape, 1, 128, seed) for seed in range(CALIBRATION)]
        made = nncf.quantize(model, nncf.Dataset(samples), model_type=nncf.ModelType.TRANSFORMER,
                             preset=nncf.QuantizationPreset.MIXED, subset_size=CALIBRATION)  # fmt: skip
        openvino.save_model(made, self.path(place, shape, variant) / "openvino_model.xml", compress_to_fp16=False)

    def load(self, place: Workplace, shape: Shape, variant: Variant, threads: int) -> Engine:
        path = self.path(place, shape, variant)
        precision = "f32" if variant.width == "f32" else "bf16"
        settings = {"INFERENCE_NUM_THREADS": threads, "INFERENCE_PRECISION_HINT": precision, "PERFORMANCE_HINT": "LATENCY"}
        if shape.is_encoder:
            return Encoder(path, shape, settings)
        return Decoder(path, shape, {**settings, "ATTENTION_BACKEND": variant.options["backend"]})


def encoder_inputs(model: Any, shape: Shape, batch: int, length: int, seed: int = 0) -> dict[str, Any]:
    """Random ids and full masks for all inputs that the model has."""
    import numpy as np

    ids = np.array([prompt(shape, length, seed + i) for i in range(batch)], np.int64)
    known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
    return {name: known[name] for item in model.inputs for name in item.get_names() if name in known}


class Decoder(Engine):
    def __init__(self, path: Path, shape: Shape, settings: dict[str, Any]) -> None:
        import openvino_genai

        self.shape, self.seeds = shape, count()
        self.config = openvino_genai.GenerationConfig(ignore_eos=True, do_sample=False)
        self.pipeline = openvino_genai.LLMPipeline(path, "CPU", **settings)

    def prefill(self, tokens: int) -> float:
        return self._run(tokens, 1).get_ttft().mean / 1e3

    def decode(self, context: int, tokens: int) -> float:
        return tokens * self._run(context, tokens + 1).get_tpot().mean / 1e3

    def _run(self, context: int, tokens: int) -> Any:
        import numpy as np
        import openvino

        self.config.max_new_tokens = tokens
        # a new prompt each time: it keeps what it knows of a common start
        ids = np.array([prompt(self.shape, context, next(self.seeds))], np.int64)
        result = self.pipeline.generate(openvino.Tensor(ids), self.config).perf_metrics
        if result.get_num_generated_tokens() != tokens:
            raise RuntimeError(f"{result.get_num_generated_tokens()} tokens instead of {tokens}")
        return result


class Encoder(Engine):
    def __init__(self, path: Path, shape: Shape, settings: dict[str, Any]) -> None:
        import openvino

        self.shape = shape
        self.model = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", settings)

    def encode(self, batch: int, length: int) -> float:
        inputs = encoder_inputs(self.model, self.shape, batch, length)
        start = perf_counter()
        self.model(inputs, share_inputs=True, share_outputs=True)
        return perf_counter() - start
