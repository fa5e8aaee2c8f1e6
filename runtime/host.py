"""What this host's CPU can do, in LLVM's names, and how many threads are worth starting on it."""

from __future__ import annotations

import functools
import os
import platform
from collections.abc import Iterable
from pathlib import Path

from tilewright.runtime.errors import UnsupportedHostError

_CPUINFO = Path("/proc/cpuinfo")
_CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
_TOPOLOGY = "/sys/devices/system/cpu/cpu{}/topology/thread_siblings_list"

_LLVM_NAMES: dict[str, tuple[str, ...]] = {
    "3dnowprefetch": ("prfchw",),
    "abm": ("lzcnt",),
    "amx_bf16": ("amx-bf16",),
    "amx_complex": ("amx-complex",),
    "amx_fp16": ("amx-fp16",),
    "amx_int8": ("amx-int8",),
    "amx_tile": ("amx-tile",),
    "avx512f": ("avx512f", "evex512"),
    "avx_ifma": ("avxifma",),
    "avx_ne_convert": ("avxneconvert",),
    "avx_vnni": ("avxvnni",),
    "avx_vnni_int16": ("avxvnniint16",),
    "avx_vnni_int8": ("avxvnniint8",),
    "bmi1": ("bmi",),
    "fpu": ("x87",),
    "lahf_lm": ("sahf",),
    "lm": ("64bit",),
    "pclmulqdq": ("pclmul",),
    "pni": ("sse3",),
    "rdrand": ("rdrnd",),
    "sha_ni": ("sha",),
    "sse4_1": ("sse4.1",),
    "sse4_2": ("sse4.2", "crc32"),
    "asimd": ("neon", "fp-armv8"),
    "asimddp": ("dotprod",),
    "fphp": ("fullfp16",),
}
"""Linux flag -> LLVM features, where more differs than the underscore of ``avx512_*``."""

_NUMPY_NAMES = {"fma3": "fma", "sse41": "sse4.1", "sse42": "sse4.2", "asimd": "neon"}


@functools.cache
def cpu_features() -> frozenset[str]:
    """The CPU features of this host, as LLVM spells them ("avx2", "fma", "avx512vnni", ...)."""
    try:
        return parse_cpuinfo(_CPUINFO.read_text())
    except OSError:
        return _numpy_features()


def parse_cpuinfo(text: str) -> frozenset[str]:
    """The features that every processor in the text of /proc/cpuinfo has (hybrid CPUs list several kinds)."""
    common: set[str] | None = None
    for line in text.splitlines():
        key, _, value = line.partition(":")
        if key.strip() not in ("flags", "Features"):
            continue
        flags = set(value.split())
        common = flags if common is None else common & flags
    return frozenset(name for flag in common or () for name in _llvm_names(flag))


def _llvm_names(flag: str) -> tuple[str, ...]:
    return _LLVM_NAMES.get(flag) or (flag.replace("avx512_", "avx512"),)


def _numpy_features() -> frozenset[str]:
    """Without /proc: what numpy found at import. Fewer names, none of them wrong."""
    try:
        from numpy._core._multiarray_umath import __cpu_features__ as found  # type: ignore[import-not-found]
    except ImportError:
        return frozenset()
    names = (name.lower() for name, present in found.items() if present)
    return frozenset(_NUMPY_NAMES.get(name, name.replace("avx512_", "avx512")) for name in names)


def check_host(features: Iterable[str], where: str, target: str) -> None:
    """Raises UnsupportedHostError, naming them, when this host lacks one of ``features``."""
    host = cpu_features()
    missing = tuple(name for name in features if name not in host)
    if not missing:
        return
    raise UnsupportedHostError(
        f"{where}: compiled for {target}, and this host ({platform.machine()}) lacks the CPU features "
        f"{', '.join(missing)}; compile for a target without them, such as cpu{{arch=x86-64-v3}} or cpu{{arch=native}} "
        "on this host",
        missing,
    )


def default_threads() -> int:
    """Physical cores that this process may use: its affinity, one thread a core, within the container's quota."""
    try:
        processors = os.sched_getaffinity(0)
    except AttributeError:
        return os.cpu_count() or 1
    cores = {_siblings(processor) for processor in processors}
    return max(1, min(len(cores), _quota()))


def _siblings(processor: int) -> str:
    try:
        return Path(_TOPOLOGY.format(processor)).read_text().strip()
    except OSError:
        return str(processor)


def _quota() -> int:
    try:
        quota, period = _CGROUP_QUOTA.read_text().split()
        return max(1, round(int(quota) / int(period)))
    except (OSError, ValueError):  # no cgroup v2, or the quota is "max"
        return 1 << 20
