"""ONNX Runtime: onnxruntime-genai with its own model builder (decoders), onnxruntime itself (encoders)."""

from __future__ import annotations

import json
from itertools import count
from pathlib import Path
from time import perf_counter
from typing import Any, ClassVar

from benchmarks.peers.peer import Engine, Peer, Variant, prompt, run_worker
from benchmarks.peers.shapes import Shape
from benchmarks.peers.workplace import Workplace

PRECISIONS = {"f32": "fp32", "int8": "int8", "int4": "int4"}


class OnnxRuntime(Peer):
    name: ClassVar[str] = "onnxruntime"
    title: ClassVar[str] = "ONNX Runtime"
    requirements: ClassVar[tuple[str, ...]] = (
        "torch==2.13.0", "onnxruntime==1.31.1", "onnxruntime-genai==0.18.0", "onnx==1.23.2", "onnxscript==0.7.2",
        "onnx-ir==1.1.0", "transformers==5.23.0",
    )  # fmt: skip
    variants: ClassVar[tuple[Variant, ...]] = (
        Variant("f32", "f32", models="SMLE"),
        Variant("int8", "int8", models="SMLE"),
        Variant("int4", "int4"),
    )

    def path(self, place: Workplace, shape: Shape, variant: Variant) -> Path:
        name = f"onnxruntime-{variant.name}"
        return place.model(shape.name) / (f"{name}.onnx" if shape.is_encoder else name)

    def prepare(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        log = self.step_name(shape, variant)
        made_from = " ".join(self.requirements)
        if shape.is_encoder:
            if variant.name != "f32":
                self.prepare(place, shape, self.variant("f32"))
            place.step(log, made_from, lambda: run_worker(place, self, shape, variant, log))
            return
        command = [self.python(place), "-m", "onnxruntime_genai.models.builder", "-m", place.model(shape.name) / "hf",
                   "-o", self.path(place, shape, variant), "-p", PRECISIONS[variant.name], "-e", "cpu",
                   "-c", place.folder("models", shape.name, "builder")]  # fmt: skip
        place.step(log, made_from, lambda: place.run(command, log))

    def convert(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        """Export an encoder and fuse it, or quantize the exported one dynamically; in the worker."""
        path = self.path(place, shape, variant)
        if variant.name == "f32":
            return export(place.model(shape.name) / "hf", shape, path)
        import onnx
        from onnxruntime.quantization import QuantType, quantize_dynamic

        source = self.path(place, shape, self.variant("f32"))
        options = {"DefaultTensorType": onnx.TensorProto.FLOAT}  # of results of fused operations, which it does not know
        return quantize_dynamic(source, path, weight_type=QuantType.QInt8, per_channel=True, extra_options=options)

    def load(self, place: Workplace, shape: Shape, variant: Variant, threads: int) -> Engine:
        path = self.path(place, shape, variant)
        return Encoder(path, shape, threads) if shape.is_encoder else Decoder(path, shape, threads)


def export(folder: Path, shape: Shape, path: Path) -> None:
    """An ONNX file with the fusions that onnxruntime's optimizer has for BERT."""
    import torch
    from onnxruntime.transformers import optimizer
    from transformers import AutoModel

    class Hidden(torch.nn.Module):
        """Tensors in, one tensor out: what the exporter can follow."""

        def __init__(self) -> None:
            super().__init__()
            self.model = AutoModel.from_pretrained(folder, attn_implementation="eager").eval()

        def forward(self, input_ids: Any, attention_mask: Any, token_type_ids: Any) -> Any:
            inputs = {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}
            return self.model(**inputs).last_hidden_state

    ids = torch.tensor([prompt(shape, 128), prompt(shape, 128, 1)])
    names = ["input_ids", "attention_mask", "token_type_ids"]
    raw = path.with_suffix(".raw.onnx")
    axes = {name: {0: "batch", 1: "length"} for name in (*names, "hidden")}
    torch.onnx.export(Hidden(), (ids, torch.ones_like(ids), torch.zeros_like(ids)), raw, input_names=names,
                      output_names=["hidden"], dynamic_axes=axes, opset_version=17, dynamo=False)  # fmt: skip
    config = shape.config
    made = optimizer.optimize_model(str(raw), "bert", num_heads=config["num_attention_heads"],
                                    hidden_size=config["hidden_size"], opt_level=1)  # fmt: skip
    made.save_model_to_file(str(path))
    raw.unlink()


class Decoder(Engine):
    def __init__(self, path: Path, shape: Shape, threads: int) -> None:
        import onnxruntime_genai

        self.library, self.shape, self.seeds = onnxruntime_genai, shape, count()
        config = onnxruntime_genai.Config(str(path))
        config.overlay(json.dumps({"model": {"decoder": {"session_options": {"intra_op_num_threads": threads}}}}))
        self.model = onnxruntime_genai.Model(config)

    def prefill(self, tokens: int) -> float:
        return self._times(tokens, 1)[0]

    def decode(self, context: int, tokens: int) -> float:
        times = self._times(context, tokens + 1)
        return times[-1] - times[0]

    def _times(self, context: int, tokens: int) -> list[float]:
        """When each new token was there, from the start."""
        params = self.library.GeneratorParams(self.model)
        length = context + tokens
        params.set_search_options(do_sample=False, max_length=length, min_length=length)
        generator = self.library.Generator(self.model, params)
        times, start = [], perf_counter()
        generator.append_tokens(prompt(self.shape, context, next(self.seeds)))
        for _ in range(tokens):
            generator.generate_next_token()
            times.append(perf_counter() - start)
        return times


class Encoder(Engine):
    def __init__(self, path: Path, shape: Shape, threads: int) -> None:
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = threads
        self.shape = shape
        self.session = onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"])

    def encode(self, batch: int, length: int) -> float:
        import numpy as np

        ids = np.array([prompt(self.shape, length, i) for i in range(batch)], np.int64)
        known = {"input_ids": ids, "attention_mask": np.ones_like(ids), "token_type_ids": np.zeros_like(ids)}
        inputs = {item.name: known[item.name] for item in self.session.get_inputs()}
        start = perf_counter()
        self.session.run(None, inputs)
        return perf_counter() - start
