"""A 1.1B-parameter Llama (TinyLlama's shape, random bf16 weights): compile, load, decode and prefill, in one run.

    python benchmarks/llama_1b.py --work /tmp/tilewright-bench --out benchmarks/results/llama_1b.json

Goals: compile under 60 s with a peak resident size of at most 1.3x the checkpoint; load under 1 s; decode at 70 % or
more of the read bandwidth measured here; prefill of 512 tokens at 1.2x torch eager bf16 or more. Everything is a ratio
to a limit or a peer measured in the same run, interleaved; medians over repeats with the spread.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from limits import ReadBandwidth

SHAPE = {"hidden_size": 2048, "num_hidden_layers": 22, "num_attention_heads": 32, "num_key_value_heads": 4,
         "intermediate_size": 5632, "vocab_size": 32000, "max_position_embeddings": 2048}  # fmt: skip
PROMPT, CONTEXT, DECODED = 512, 128, 32


def make_checkpoint(folder: Path) -> None:
    """A Hugging Face folder with random weights; kept between runs."""
    if (folder / "config.json").is_file():
        return
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    torch.set_default_dtype(torch.bfloat16)
    model = LlamaForCausalLM(LlamaConfig(**SHAPE, tie_word_embeddings=False))
    model.save_pretrained(folder)


def compile_once(folder: str, out: str) -> None:
    """Compile in this process and print time and peak resident size (of this process alone)."""
    import tilewright

    start = time.perf_counter()
    report = tilewright.compile(folder, out=out, max_length=2048).report
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    print(json.dumps({"seconds": time.perf_counter() - start, "peak_bytes": peak, "stages": report.seconds}))


def spread(values: list[float]) -> dict[str, float]:
    return {"median": statistics.median(values), "min": min(values), "max": max(values)}


def environment() -> dict[str, str]:
    """What ran, and on what."""
    import llvmlite
    import torch
    import transformers

    import tilewright
    from tilewright.codegen.target import host_target

    model = next((x for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")), "")
    tools = {m.__name__: m.__version__ for m in (tilewright, torch, transformers, llvmlite)}
    return {"cpu": model.partition(":")[2].strip(), "target": host_target().text, **tools}


def run(work: Path, threads: int, repeats: int) -> dict[str, Any]:
    """All measurements."""
    import torch
    from transformers import AutoModelForCausalLM

    import tilewright
    from tilewright.runtime.sampling import Sampling

    checkpoint, artifact = work / "llama-1b", work / "llama-1b.tw"
    make_checkpoint(checkpoint)
    bytes_on_disk = sum(p.stat().st_size for p in checkpoint.glob("*.safetensors"))
    command = [sys.executable, __file__, "--compile", str(checkpoint), str(artifact)]
    compiled = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout.splitlines()[-1])
    start = time.perf_counter()
    program = tilewright.load(artifact)
    load_seconds = time.perf_counter() - start
    session = program.session(threads)
    torch.set_num_threads(threads)
    peer = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.bfloat16).eval()
    random = np.random.default_rng(0)
    ids = random.integers(0, SHAPE["vocab_size"], (1, PROMPT))
    zero = np.zeros(1, np.int64)
    step, greedy = session.bind("decode", ids=ids[:, :1], start=zero), session.sampler(Sampling())
    read_bandwidth = ReadBandwidth(threads)

    def ours_prefill() -> float:
        start = time.perf_counter()
        session("prefill", ids=ids, start=zero, last=zero + PROMPT - 1)
        return PROMPT / (time.perf_counter() - start)

    def torch_prefill() -> float:
        start = time.perf_counter()
        with torch.no_grad():
            peer(torch.from_numpy(ids), logits_to_keep=1)
        return PROMPT / (time.perf_counter() - start)

    def ours_decode() -> float:
        start = time.perf_counter()
        for i in range(DECODED):
            step.inputs["start"][...] = CONTEXT + i
            step.inputs["ids"][...] = greedy.choose(step()["logits"][0], random)
        return DECODED / (time.perf_counter() - start)

    rows: dict[str, list[float]] = {}
    for i in range(repeats + 1):
        for name, measure in (("read_bandwidth", read_bandwidth), ("ours_decode", ours_decode),
                              ("ours_prefill", ours_prefill), ("torch_prefill", torch_prefill)):  # fmt: skip
            value = measure()
            if i:  # the first round warms up
                rows.setdefault(name, []).append(value)
    token_bytes = bytes_on_disk - 2 * SHAPE["vocab_size"] * SHAPE["hidden_size"]  # the embedding is not streamed
    decode_share = [s * token_bytes / b for s, b in zip(rows["ours_decode"], rows["read_bandwidth"])]
    prefill_ratio = [a / b for a, b in zip(rows["ours_prefill"], rows["torch_prefill"])]
    return {
        "environment": environment(),
        "threads": threads,
        "checkpoint_bytes": bytes_on_disk,
        "compile": compiled,
        "compile_peak_over_checkpoint": compiled["peak_bytes"] / bytes_on_disk,
        "load_seconds": load_seconds,
        **{name: spread(values) for name, values in rows.items()},
        "decode_share_of_bandwidth": spread(decode_share),
        "prefill_over_torch": spread(prefill_ratio),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work", type=Path, default=Path("out/bench"))
    parser.add_argument("--out", type=Path)
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--compile", nargs=2, metavar=("FOLDER", "ARTIFACT"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.compile:
        compile_once(*options.compile)
        return
    options.work.mkdir(parents=True, exist_ok=True)
    text = json.dumps(run(options.work, options.threads, options.repeats), indent=1) + "\n"
    print(text, end="")
    if options.out:
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(text)


if __name__ == "__main__":
    main()
