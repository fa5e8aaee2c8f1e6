"""llama.cpp as the llama-cpp-python source distribution carries it, built here; measured with its own llama-bench."""

from __future__ import annotations

import json
import resource
import subprocess
from pathlib import Path
from time import perf_counter
from typing import ClassVar

from benchmarks.peers.peer import Engine, Peer, Variant, run_worker
from benchmarks.peers.shapes import Shape
from benchmarks.peers.workplace import Workplace

SOURCE = "llama-cpp-python==0.3.36"
COMMON = ("CMAKE_BUILD_TYPE=Release", "LLAMA_BUILD_TESTS=OFF", "LLAMA_BUILD_SERVER=OFF", "LLAMA_BUILD_EXAMPLES=OFF",
          "LLAMA_OPENSSL=OFF")  # fmt: skip
BUILDS = {
    "native": ("GGML_NATIVE=ON",),
    "avx2": ("GGML_NATIVE=OFF", "GGML_AVX2=ON", "GGML_FMA=ON", "GGML_F16C=ON", "GGML_BMI2=ON", "GGML_AVX512=OFF",
             "GGML_AVX512_VNNI=OFF", "GGML_AVX512_BF16=OFF", "GGML_AVX_VNNI=OFF"),
}  # fmt: skip
FORMATS = {"f32": "f32", "bf16": "bf16", "q8_0": "int8", "q4_0": "int4"}


class LlamaCpp(Peer):
    name: ClassVar[str] = "llama.cpp"
    title: ClassVar[str] = "llama.cpp"
    requirements: ClassVar[tuple[str, ...]] = ("gguf==0.19.0", "numpy==2.4.6")
    variants: ClassVar[tuple[Variant, ...]] = (
        *(Variant(name, width, "SM" if width == "f32" else "SML") for name, width in FORMATS.items()),
        *(Variant(f"{name}-avx2", FORMATS[name], rounds=3, isa="avx2") for name in ("bf16", "q8_0", "q4_0")),
    )

    def setup(self, place: Workplace) -> None:
        super().setup(place)
        folder = place.folder("llama.cpp")
        place.step("llama.cpp-source", SOURCE, lambda: self._unpack(place, folder))
        for build, flags in BUILDS.items():
            place.step(f"llama.cpp-build-{build}", " ".join((SOURCE, *COMMON, *flags)),
                       lambda build=build, flags=flags: self._build(place, folder, build, flags))  # fmt: skip

    def _unpack(self, place: Workplace, folder: Path) -> None:
        get = ["-m", "pip", "download", "--no-cache-dir", "--no-deps", "--no-binary", ":all:", SOURCE, "-d", folder]
        place.run([self.python(place), *get], "llama.cpp-source")
        [archive] = folder.glob("llama_cpp_python-*.tar.gz")
        inside = archive.name.removesuffix(".tar.gz") + "/vendor/llama.cpp"
        target = place.folder("llama.cpp", "src")
        place.run(["tar", "xzf", archive, "--strip-components=3", "-C", target, inside], "llama.cpp-source")

    @staticmethod
    def _build(place: Workplace, folder: Path, build: str, flags: tuple[str, ...]) -> None:
        log, at = f"llama.cpp-build-{build}", folder / f"build-{build}"
        options = [f"-D{flag}" for flag in (*COMMON, *flags)]
        place.run(["cmake", "-S", folder / "src", "-B", at, *options], log)
        place.run(["cmake", "--build", at, "--target", "llama-bench", "llama-quantize", "-j", "2"], log)

    def path(self, place: Workplace, shape: Shape, variant: Variant) -> Path:
        return place.model(shape.name) / f"{variant.name.removesuffix('-avx2')}.gguf"

    def step_name(self, shape: Shape, variant: Variant) -> str:
        return super().step_name(shape, variant).removesuffix("-avx2")

    def prepare(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        if variant.isa != "native":  # the same files
            return
        log = self.step_name(shape, variant)
        place.step(log, SOURCE, lambda: self._write(place, shape, variant, log))

    def _write(self, place: Workplace, shape: Shape, variant: Variant, log: str) -> None:
        if variant.name == "bf16":
            return run_worker(place, self, shape, variant, log)
        self.prepare(place, shape, self.variant("bf16"))
        files = [self.path(place, shape, self.variant("bf16")), self.path(place, shape, variant)]
        return place.run([self._tool(place, "native", "llama-quantize"), *files, variant.name.upper(), "2"], log)

    def convert(self, place: Workplace, shape: Shape, variant: Variant) -> None:
        """Write the bf16 file; in the worker."""
        from benchmarks.peers.gguf_file import write

        write(shape, place.model(shape.name) / "hf", self.path(place, shape, variant))

    def load(self, place: Workplace, shape: Shape, variant: Variant, threads: int) -> Engine:
        tool = self._tool(place, variant.isa, "llama-bench")
        return LlamaBench([str(tool), "-m", str(self.path(place, shape, variant)), "-t", str(threads), "-o", "json"])

    @staticmethod
    def _tool(place: Workplace, build: str, name: str) -> Path:
        return place.cache / "llama.cpp" / f"build-{build}" / "bin" / name

    def is_ready(self, place: Workplace, shape: Shape, variant: Variant) -> bool:
        return super().is_ready(place, shape, variant) and self._tool(place, variant.isa, "llama-bench").exists()


class LlamaBench(Engine):
    """Runs llama-bench for each measurement: weights mapped, after a warm-up of its own."""

    self_timed: ClassVar[bool] = True
    quiet: ClassVar[float] = 0.15  # it loads the model each time, and leaves a core to others meanwhile

    def __init__(self, command: list[str]) -> None:
        self.command = command
        start = perf_counter()
        first = self._seconds(["-p", "0", "-n", "1", "-r", "1", "--no-warmup"])
        self.load_seconds = perf_counter() - start - first

    def prefill(self, tokens: int) -> float:
        return self._seconds(["-r", "1", "-p", str(tokens), "-n", "0"])

    def decode(self, context: int, tokens: int) -> float:
        return self._seconds(["-r", "1", "-p", "0", "-n", str(tokens), "-d", str(context)])

    def _seconds(self, options: list[str]) -> float:
        done = subprocess.run([*self.command, *options], capture_output=True, text=True, check=False)
        if done.returncode:
            raise RuntimeError(f"llama-bench: {done.stderr[-500:]}")
        [row] = json.loads(done.stdout)
        return float(row["avg_ns"]) / 1e9

    def peak_bytes(self) -> int:
        return resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
