"""Models and prompts of the benchmark beside peers, and what systems call their parts."""

from __future__ import annotations

from benchmarks.peers import gguf_file
from benchmarks.peers.checkpoints import tokens
from benchmarks.peers.own import weight_bytes
from benchmarks.peers.peer import Peer, prompt
from benchmarks.peers.shapes import SHAPES
from benchmarks.peers.systems import PEERS


def test_prompts_differ_by_seed_and_are_in_the_vocabulary() -> None:
    a, b = (prompt(SHAPES["S"], 512, seed) for seed in (0, 1))
    assert a[0] != b[0], "systems remember prompts with the same start"
    assert a == prompt(SHAPES["S"], 512)
    assert all(300 <= token < SHAPES["S"].vocabulary for token in a + b)


def test_tokens_are_all_different() -> None:
    made = tokens(1000)
    assert len(set(made)) == len(made) == 1000
    assert made.index("<|end|>") == 257


def test_gguf_names() -> None:
    assert gguf_file.gguf_name("model.layers.3.mlp.up_proj.weight") == "blk.3.ffn_up.weight"
    assert gguf_file.gguf_name("model.layers.0.self_attn.q_proj.bias") == "blk.0.attn_q.bias"
    assert gguf_file.gguf_name("model.embed_tokens.weight") == "token_embd.weight"
    assert gguf_file.gguf_name("lm_head.weight") == "output.weight"


def test_bytes_of_a_step_leave_tables_out() -> None:
    header = {
        "__metadata__": {},
        "model.embed_tokens.weight": {"data_offsets": [0, 100]},
        "model.embed_tokens.weight|panels{n=4}": {"data_offsets": [100, 180]},
        "position_table": {"data_offsets": [180, 190]},
        "model.norm.weight": {"data_offsets": [192, 196]},
    }
    assert weight_bytes(header) == {"weight_bytes": 194, "step_bytes": 84}


def test_peers_are_pinned() -> None:
    for peer in PEERS.values():
        assert isinstance(peer, Peer)
        assert all("==" in item for item in peer.requirements)
