"""CUDA targets: the architecture that cubins are compiled for."""

from __future__ import annotations

from dataclasses import dataclass

from tilewright.codegen.text import format_call

ARCHS = ("sm_80", "sm_86", "sm_89", "sm_90", "sm_90a", "sm_100", "sm_120")
"""Ampere to Blackwell: all multiply bf16 in tensor cores and copy to shared memory asynchronously."""
_SHARED = {"sm_80": 163, "sm_86": 99, "sm_89": 99, "sm_90": 227, "sm_90a": 227, "sm_100": 227, "sm_120": 99}
_MULTIPROCESSORS = {"sm_80": 108, "sm_86": 84, "sm_89": 128, "sm_90": 132, "sm_90a": 132, "sm_100": 148, "sm_120": 170}


@dataclass(frozen=True)
class CudaTarget:
    """An NVIDIA GPU architecture, ``sm_80`` or later. The host side of a program is compiled for any x86-64."""

    arch: str

    @property
    def shared_bytes(self) -> int:
        """Shared memory that a block may ask for."""
        return _SHARED[self.arch] << 10

    @property
    def multiprocessors(self) -> int:
        """How many the GPUs of this architecture that serve models have."""
        return _MULTIPROCESSORS[self.arch]

    @property
    def facts(self) -> dict[str, float]:
        """What a cost model gets to see of the target."""
        return {"arch": float(self.arch.strip("sm_abf")), "shared_bytes": float(self.shared_bytes)}

    @property
    def required_features(self) -> tuple[str, ...]:
        """CPU features that a host must have: none beyond x86-64."""
        return ()

    @property
    def text(self) -> str:
        """Canonical text; ``parse_target`` gives an equal target back."""
        return format_call("cuda", {"arch": self.arch})

    def __str__(self) -> str:
        return self.text
