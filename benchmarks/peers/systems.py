"""The systems: a line each."""

from __future__ import annotations

from benchmarks.peers.llama_cpp import LlamaCpp
from benchmarks.peers.onnx_runtime import OnnxRuntime
from benchmarks.peers.openvino import OpenVino
from benchmarks.peers.own import Tilewright
from benchmarks.peers.peer import Peer
from benchmarks.peers.pytorch import PyTorch

OWN = Tilewright.name
PEERS: dict[str, Peer] = {peer.name: peer for peer in (Tilewright(), LlamaCpp(), OnnxRuntime(), OpenVino(), PyTorch())}
