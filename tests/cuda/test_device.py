"""Artifacts for a GPU: what is in them, and how they run through a driver, which here is that of the emulated device."""

from __future__ import annotations

import ctypes
import gc
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

import tilewright
import tilewright.runtime.cuda as cuda
from tests.cuda.driver import fake_driver
from tilewright.runtime import dlpack
from tilewright.runtime.dlpack import DeviceArray
from tilewright.runtime.errors import (
    ArtifactError,
    DamagedArtifactError,
    DeviceError,
    InputError,
    SessionError,
    UnsupportedHostError,
)

TARGET = "cuda{arch=sm_90a}"
X = np.linspace(-2, 3, 5 * 48, dtype=np.float32).reshape(5, 48)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(48)
        self.scale = torch.nn.Parameter(torch.randn(48))

    def forward(self, x):
        y = torch.nn.functional.silu(self.norm(x) * self.scale)
        return torch.softmax(y, -1), torch.cumsum(y, 0), x


@pytest.fixture(scope="module")
def artifact(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("cuda") / "net"
    tilewright.compile(Net(), (torch.from_numpy(X[:2]),), dynamic={"x": {0: "B"}}, target=TARGET, out=out)
    return out


@pytest.fixture(scope="module")
def library(artifact, tmp_path_factory) -> ctypes.CDLL:
    return ctypes.CDLL(str(fake_driver(artifact, tmp_path_factory.mktemp("driver"))))


@pytest.fixture
def gpu(library, monkeypatch):
    """A GPU with 4 GiB, on which all kernels work, unless the test says otherwise."""

    def has(total: int = 4 << 30, count: int = 1, capability: tuple[int, int] = (9, 0), broken: str | None = None) -> None:
        library.fake_set(ctypes.c_size_t(total), count, *capability, ctypes.c_char_p(broken.encode() if broken else None))

    has()
    monkeypatch.setattr(cuda, "LIBRARY", library._name)
    yield has
    has()


def test_it_computes_what_torch_does_one_by_one_and_as_a_graph(artifact, gpu, library) -> None:
    with tilewright.load(artifact).session() as session, torch.no_grad():
        call = session.bind("forward", x=X)
        for i in range(3):
            call.inputs["x"][...] = X + i
            for got, want in zip(call().values(), Net()(torch.from_numpy(X + i))):
                np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-5)
        assert library.fake_asked(1) >= 2, "graphs were launched"
        small, *_ = session("forward", x=X[:1]).values()
        np.testing.assert_allclose(small, Net()(torch.from_numpy(X[:1]))[0], atol=1e-6)


def test_a_graph_is_recorded_again_when_the_arena_moves(artifact, gpu) -> None:
    with tilewright.load(artifact).session() as session, torch.no_grad():
        call = session.bind("forward", x=X[:1])
        want = [[v.copy() for v in call().values()] for _ in range(2)][-1]
        session("forward", x=np.repeat(X, 9, 0))  # needs a larger arena
        for got, before in zip(call().values(), want):
            np.testing.assert_array_equal(got, before)


def test_memory_is_given_back(artifact, gpu, library) -> None:
    before = library.fake_asked(2)
    program = tilewright.load(artifact)
    session = program.session()
    session("forward", x=X)
    assert session.memory["arena"] > 0
    assert library.fake_asked(2) > before
    session.close()
    with pytest.raises(SessionError, match="closed"):
        session("forward", x=X)
    del session, program
    assert library.fake_asked(2) == before


def test_arrays_on_the_gpu_are_read_and_given_without_a_copy(artifact, gpu, library) -> None:
    with tilewright.load(artifact).session() as session, torch.no_grad():
        _, _, x = session.on_device("forward", x=X).values()
        assert x.__dlpack_device__() == (2, 0)
        np.testing.assert_array_equal(np.asarray(x), X)
        other = Foreign(x)  # as another library would hand it on
        again = session.on_device("forward", x=other)
        assert other.asked
        for got, want in zip(again.values(), Net()(torch.from_numpy(X))):
            np.testing.assert_allclose(got.numpy(), want, rtol=1e-5, atol=1e-5)
        with pytest.raises(InputError, match="shape"):
            session("forward", x=Foreign(DeviceArray(x.address, (5, 47), x.dtype, 0, x, x.copy)))
        with pytest.raises(InputError, match="float16"):
            session("forward", x=Foreign(DeviceArray(x.address, (5, 48), np.dtype(np.float16), 0, x, x.copy)))
    before = library.fake_asked(2)
    del x, other, again, session
    gc.collect()
    assert library.fake_asked(2) < before


def test_a_strided_array_is_refused(artifact, gpu) -> None:
    with tilewright.load(artifact).session() as session, pytest.raises(InputError, match=r"row-major.*strides \[1, 5\]"):
        session("forward", x=Strided())


class Foreign:
    """An array on the GPU of another library."""

    def __init__(self, array: DeviceArray) -> None:
        self.array, self.asked = array, False

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.array.__dlpack_device__()

    def __dlpack__(self, stream: int | None = None) -> object:
        self.asked = stream is not None
        return self.array.__dlpack__(stream)


class Strided(Foreign):
    """One whose columns are contiguous."""

    def __init__(self) -> None:
        super().__init__(DeviceArray(0, (5, 48), X.dtype, 0, None, DeviceArray.numpy))

    def __dlpack__(self, stream: int | None = None) -> object:
        capsule = super().__dlpack__(stream)
        (managed, *rest), self.strides = dlpack._given.popitem()[1], (ctypes.c_int64 * 2)(1, 5)
        managed.tensor.strides = ctypes.cast(self.strides, ctypes.POINTER(ctypes.c_int64))
        dlpack._given[ctypes.addressof(managed)] = (managed, *rest)
        return capsule


def test_the_report_has_what_kernels_use(artifact) -> None:
    report = json.loads((artifact / "report.json").read_text())
    used = [row for kernel in report["kernels"] for row in kernel["resources"].values()]
    assert used
    assert all(row["registers"] > 0 and row["spills"] == 0 for row in used)
    assert {kernel["backend"] for kernel in report["kernels"]} == {"cuda.loops", "cuda.tvm"}


def test_the_files_are_listed_and_read_strictly(artifact, gpu, tmp_path) -> None:
    functions = json.loads((artifact / "device.json").read_text())["functions"]
    assert all((artifact / f"{f['kernel']}.cubin").read_bytes()[:4] == b"\x7fELF" for f in functions)
    assert "tw_launch(device, 0," in (artifact / "program.c").read_text()
    broken = shutil.copytree(artifact, tmp_path / "broken")
    cubin = broken / f"{functions[0]['kernel']}.cubin"
    cubin.write_bytes(cubin.read_bytes()[:-1] + b"x")
    with pytest.raises(DamagedArtifactError, match="cubin"):
        tilewright.load(broken)


def test_without_a_driver(artifact, monkeypatch) -> None:
    monkeypatch.setattr(cuda, "LIBRARY", "libcuda-that-is-not-there.so")
    with pytest.raises(UnsupportedHostError, match=r"no CUDA driver.*compile for a CPU"):
        tilewright.load(artifact)


def test_without_a_gpu(artifact, gpu) -> None:
    gpu(count=0)
    with pytest.raises(UnsupportedHostError, match="there is no GPU 0; the driver sees 0"):
        tilewright.load(artifact)
    with pytest.raises(UnsupportedHostError, match="no GPU 3"):
        tilewright.load(artifact, device=3)


@pytest.mark.parametrize("capability", [(8, 0), (10, 0), (8, 9)])
def test_another_architecture(artifact, gpu, capability) -> None:
    gpu(capability=capability)
    with pytest.raises(ArtifactError, match=f"compiled for sm_90a.*capability {capability[0]}.{capability[1]}; compile for "
                                            f"cuda{{arch=sm_{capability[0]}{capability[1]}}}"):  # fmt: skip
        tilewright.load(artifact)


def test_out_of_memory(artifact, gpu, library) -> None:
    gpu(total=library.fake_asked(2) + 8)
    with pytest.raises(MemoryError, match="the weights of"):
        tilewright.load(artifact)
    gpu(total=library.fake_asked(2) + 4096)
    program = tilewright.load(artifact)
    with program.session() as session, pytest.raises(MemoryError, match="bytes on emulated GPU"):
        session("forward", x=np.repeat(X, 100, 0))


def test_a_kernel_that_fails_is_named(artifact, gpu, monkeypatch) -> None:
    first = json.loads((artifact / "device.json").read_text())["functions"][0]
    gpu(broken=first["symbol"])
    with tilewright.load(artifact).session() as session, pytest.raises(DeviceError, match="TILEWRIGHT_CUDA_SYNC=1"):
        session("forward", x=X)
    gpu(broken=first["symbol"])
    monkeypatch.setenv("TILEWRIGHT_CUDA_SYNC", "1")
    with tilewright.load(artifact).session() as session, pytest.raises(DeviceError, match=first["operations"]):
        session("forward", x=X)
