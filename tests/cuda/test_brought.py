"""Artifacts that were compiled without weights: whoever loads them writes these, on the host or on a GPU."""

from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest
import torch

import tilewright
import tilewright.runtime.cuda as cuda
from tests.cuda.driver import fake_driver
from tilewright.runtime.artifact import read_table, verify_files
from tilewright.runtime.dlpack import DeviceArray
from tilewright.runtime.errors import ArtifactError, InputError

X = np.linspace(-2, 3, 3 * 16, dtype=np.float32).reshape(3, 16)


class Net(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.norm = torch.nn.LayerNorm(16)
        self.scale = torch.nn.Parameter(torch.randn(16))

    def forward(self, x):
        return torch.tanh(self.norm(x) * self.scale)


def compiled(out: Path, target: str) -> Path:
    return tilewright.compile(Net(), (torch.from_numpy(X),), target=target, weights=False, out=out).path


def numbers(name: str, shape: tuple[int, ...]) -> np.ndarray:
    state = {name.split(".")[-1]: value for name, value in Net().state_dict().items()}
    found = state[name.split("|")[0].split(".")[-1]].numpy()
    assert found.shape == shape
    return found


def check(program) -> None:
    with program.session() as session, torch.no_grad():
        (got,) = session("forward", x=X).values()
        want = Net()(torch.from_numpy(X)).numpy()
    np.testing.assert_allclose(got, want, rtol=1e-5, atol=1e-6)


def write(arrays) -> None:
    for name, array in arrays.items():
        array[...] = numbers(name, array.shape)


def test_on_the_host(tmp_path) -> None:
    path = compiled(tmp_path / "net", "native")
    verify_files(path)
    table = read_table(path / "weights.safetensors")
    assert len(table) == 3
    assert (path / "weights.safetensors").stat().st_size == min(at for _, _, at in table.values())
    check(tilewright.load(path, weights=write))
    with pytest.raises(ArtifactError, match=r"compiled without weights; bring them: load\(\.\.\., weights=\.\.\.\)"):
        tilewright.load(path)
    whole = tilewright.compile(Net(), (torch.from_numpy(X),), out=tmp_path / "whole").path
    with pytest.raises(InputError, match="expected an artifact that was compiled without weights"):
        tilewright.load(whole, weights=write)


def test_on_a_gpu(tmp_path, monkeypatch) -> None:
    path = compiled(tmp_path / "net", "cuda{arch=sm_90a}")
    monkeypatch.setattr(cuda, "LIBRARY", str(fake_driver(path, tmp_path)))
    kept: dict[str, DeviceArray] = {}

    def upload(arrays) -> None:
        kept.update(arrays)
        for name, array in arrays.items():
            source = numbers(name, array.shape)
            ctypes.memmove(array.address, source.ctypes.data, source.nbytes)  # the emulated GPU's memory is the host's

    program = tilewright.load(path, weights=upload)
    check(program)
    for name, array in kept.items():
        np.testing.assert_array_equal(array.numpy(), numbers(name, array.shape))
