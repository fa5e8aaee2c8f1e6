"""Limits of this machine, measured in the same run as what is compared with them."""

from __future__ import annotations

import ctypes
import subprocess
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

_SOURCE = """
#include <stdint.h>
#include <stddef.h>
typedef uint64_t v8 __attribute__((vector_size(64)));
uint64_t read_all(const v8 *p, size_t n) {
  v8 a = {0}, b = {0}, c = {0}, d = {0};
  for (size_t i = 0; i + 4 <= n; i += 4) {
    a ^= p[i]; b ^= p[i + 1]; c ^= p[i + 2]; d ^= p[i + 3];
  }
  a ^= b ^ c ^ d;
  uint64_t s = 0;
  for (int i = 0; i < 8; i++) s ^= a[i];
  return s;
}
"""


class ReadBandwidth:
    """Reads ``size`` bytes of memory with ``threads`` threads; each call gives bytes a second, the best of four reads."""

    def __init__(self, threads: int, size: int = 1 << 30) -> None:
        with tempfile.TemporaryDirectory() as folder:
            source, library = Path(folder, "read.c"), Path(folder, "read.so")
            source.write_text(_SOURCE)
            command = ["cc", "-O3", "-march=native", "-shared", "-fPIC", str(source), "-o", str(library)]
            subprocess.run(command, check=True)
            self.read = ctypes.CDLL(str(library)).read_all
        self.read.restype = ctypes.c_uint64
        raw = np.ones(size + 64, np.uint8)
        self.data = raw[-raw.ctypes.data % 64 :][:size]
        self.pool = ThreadPoolExecutor(threads)
        self.part = size // threads // 256 * 256
        self.threads = threads

    def __call__(self) -> float:
        return max(self._once() for _ in range(4))

    def _once(self) -> float:
        start = time.perf_counter()
        list(self.pool.map(self._read, range(self.threads)))
        return self.part * self.threads / (time.perf_counter() - start)

    def _read(self, i: int) -> int:
        address = ctypes.c_void_p(self.data.ctypes.data + i * self.part)
        return int(self.read(address, ctypes.c_size_t(self.part // 64)))
