"""Targets. Of a CPU: a name, the instruction sets it may use, and how wide its vectors are.

``parse_target("native")``, ``"x86-64-v3"`` and ``"cpu{arch=znver5}"`` all give a `CpuTarget`, ``"cuda{arch=sm_90a}"`` gives
a `CudaTarget`. Features are explicit:
kernels are compiled for plain x86-64 plus exactly these and merely *tuned* for ``arch``, so that an artifact can never
contain an instruction its manifest does not name.
"""

from collections.abc import Mapping
from dataclasses import dataclass

from tilewright.codegen.cuda.target import ARCHS as CUDA_ARCHS
from tilewright.codegen.cuda.target import CudaTarget
from tilewright.codegen.text import format_call, parse_call


def _set(names: str) -> frozenset[str]:
    return frozenset(names.split())


_V3 = _set("avx avx2 bmi bmi2 f16c fma lzcnt movbe popcnt sse3 sse4.1 sse4.2 ssse3")
_V4 = _V3 | _set("avx512f avx512bw avx512cd avx512dq avx512vl")
_WIDE = _set("avx512f avx512bw avx512dq avx512vl")
_ICELAKE = _V4 | _set("avx512bitalg avx512ifma avx512vbmi avx512vbmi2 avx512vnni avx512vpopcntdq gfni vaes vpclmulqdq")
_ZEN4 = _ICELAKE | {"avx512bf16"}
_SAPPHIRE = _ICELAKE | {"avx512bf16", "avx512fp16", "avxvnni"}

ARCHS: dict[str, frozenset[str]] = {
    "x86-64-v3": _V3,
    "x86-64-v4": _V4,
    "haswell": _V3,
    "broadwell": _V3,
    "skylake": _V3,
    "alderlake": _V3 | {"avxvnni"},
    "raptorlake": _V3 | {"avxvnni"},
    "skylake-avx512": _V4,
    "cascadelake": _V4 | {"avx512vnni"},
    "cooperlake": _V4 | {"avx512vnni", "avx512bf16"},
    "icelake-client": _ICELAKE,
    "icelake-server": _ICELAKE,
    "tigerlake": _ICELAKE,
    "rocketlake": _ICELAKE,
    "sapphirerapids": _SAPPHIRE,
    "emeraldrapids": _SAPPHIRE,
    "graniterapids": _SAPPHIRE,
    "znver1": _V3,
    "znver2": _V3,
    "znver3": _V3,
    "znver4": _ZEN4,
    "znver5": _ZEN4 | {"avxvnni"},
}
"""Features kernels may use on each architecture (LLVM's names), beyond plain x86-64."""

_EXTRAS = frozenset().union(*ARCHS.values()) - _V3


class TargetError(ValueError):
    """A target that does not exist or is not supported."""


@dataclass(frozen=True)
class CpuTarget:
    """An x86-64 CPU: ``arch`` names the LLVM processor to tune for, ``features`` what kernels may use."""

    arch: str
    features: frozenset[str]

    def __post_init__(self) -> None:
        if self.arch not in ARCHS:
            raise TargetError(f"unknown CPU architecture {self.arch!r}; known: native, {', '.join(ARCHS)}")
        missing = sorted(_V3 - self.features)
        if missing:
            raise TargetError(f"target {self.arch} lacks {', '.join(missing)}; the least supported is x86-64-v3 (AVX2)")

    @property
    def vector_bits(self) -> int:
        """Width of the vectors kernels use: 512 with the AVX-512 of x86-64-v4, otherwise 256."""
        return 512 if self.features >= _WIDE else 256

    @property
    def lanes(self) -> int:
        """f32 lanes of one vector: 16 or 8."""
        return self.vector_bits // 32

    @property
    def has_bf16_dot(self) -> bool:
        """Whether vdpbf16ps multiplies bf16 pairs (and vcvtneps2bf16 converts)."""
        return self.vector_bits == 512 and "avx512bf16" in self.features

    @property
    def has_vnni(self) -> bool:
        """Whether vpdpbusd multiplies quadruples of 8-bit integers, in vectors of the width that kernels use."""
        return ("avx512vnni" if self.vector_bits == 512 else "avxvnni") in self.features

    @property
    def facts(self) -> dict[str, float]:
        """What a cost model gets to see of the target."""
        return {"lanes": float(self.lanes), "vnni": float(self.has_vnni), "bf16_dot": float(self.has_bf16_dot)}

    @property
    def required_features(self) -> tuple[str, ...]:
        """What a host must have to run kernels of this target, sorted, in LLVM's names (``avx512vnni``, ``lzcnt``)."""
        return tuple(sorted(self.features))

    @property
    def text(self) -> str:
        """Canonical text; ``parse_target`` gives an equal target back."""
        extra = sorted(self.features - ARCHS[self.arch])
        fields = {"arch": self.arch} | ({"features": "+" + "+".join(extra)} if extra else {})
        return format_call("cpu", fields)

    def __str__(self) -> str:
        return self.text


Target = CpuTarget | CudaTarget


def parse_target(text: str) -> Target:
    """The target of ``text``: a CPU (``native``, ``x86-64-v3``, ``cpu{arch=... features=+a+b}``) or ``cuda{arch=...}``."""
    try:
        name, fields = parse_call(text)
    except ValueError as error:
        raise TargetError(str(error)) from None
    if name == "cuda":
        return _cuda(text, fields)
    if name == "native" and not fields:
        return host_target()
    if name != "cpu":
        if fields:
            raise TargetError(f"unknown target {name!r} in {text!r}; write cpu{{arch=...}}")
        return _named(name, "")
    unknown = sorted(fields.keys() - {"arch", "features"})
    if unknown:
        raise TargetError(f"unknown key {unknown[0]!r} in {text!r}; cpu takes arch and features")
    if fields.get("arch", "native") == "native":
        return host_target()
    return _named(fields["arch"], fields.get("features", ""))


def parse_cpu(text: str) -> CpuTarget:
    """As `parse_target`, for what is there for CPUs alone. Raises TargetError for another target."""
    target = parse_target(text)
    if not isinstance(target, CpuTarget):
        raise TargetError(f"{target} is no CPU")
    return target


def _cuda(text: str, fields: Mapping[str, str]) -> CudaTarget:
    if fields.keys() != {"arch"}:
        raise TargetError(f"{text!r}: cuda takes arch, as in cuda{{arch=sm_90a}}")
    if fields["arch"] not in CUDA_ARCHS:
        raise TargetError(f"unknown CUDA architecture {fields['arch']!r}; known: {', '.join(CUDA_ARCHS)}")
    return CudaTarget(fields["arch"])


def _named(arch: str, extra: str) -> CpuTarget:
    features = [item for item in extra.split("+") if item]
    for feature in features:
        if feature not in _EXTRAS:
            raise TargetError(f"unknown feature {feature!r} for {arch}; known: {', '.join(sorted(_EXTRAS))}")
    return CpuTarget(arch, ARCHS.get(arch, frozenset()) | frozenset(features))


def host_target() -> CpuTarget:
    """This machine: its own architecture, or the nearest level plus features when a hypervisor hides some of them."""
    from llvmlite import binding

    features = frozenset(name for name, present in binding.get_host_cpu_features().items() if present)
    return match_host(binding.get_host_cpu_name(), features)


def match_host(name: str, host: frozenset[str]) -> CpuTarget:
    """The best target for a processor called ``name`` that reports the features ``host``."""
    if name in ARCHS and ARCHS[name] <= host:
        return CpuTarget(name, ARCHS[name])
    if not host >= _V3:
        raise TargetError(f"host {name} lacks {', '.join(sorted(_V3 - host))}; the least supported is x86-64-v3 (AVX2)")
    arch = "x86-64-v4" if host >= _V4 else "x86-64-v3"
    usable = _EXTRAS & host if arch == "x86-64-v4" else frozenset(f for f in _EXTRAS & host if "512" not in f)
    return CpuTarget(arch, ARCHS[arch] | usable)
