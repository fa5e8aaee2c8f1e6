"""Named pipelines and recipes: plain text, so that an artifact can say exactly what was run.

An entry may name other entries; ``Pipeline.parse`` expands them.
"""

from __future__ import annotations

NAMED: dict[str, str] = {
    # the graph alone, with nothing fused
    "clean": "canonicalize,fold,canonicalize,cse,dce",
    # rope before attention: the heads' transposes around rope meet attention's own and cancel in canonicalize;
    # gate-up before qkv: qkv would take the pair for linears that share an input
    "fusions": (
        "fuse-norm,fuse-batch-norm,fuse-rope,fuse-attention,order-columns,canonicalize,cse,dce,"
        "fuse-gate-up,fuse-qkv,canonicalize,fold,cse,dce"
    ),
    # the cache comes before kernels are cut, since it rewrites attention, and after qkv, which it reads through
    "cache": "kv-layout,canonicalize,cse,dce",
    "kernels": "fuse,plan-memory",
    # every op its own kernel
    "O0": "canonicalize,dce,kv-layout,fuse{mode=single},plan-memory",
    "O1": "clean,cache,kernels",
    "O2": "clean,fusions,cache,kernels",
    "O3": "O2",
    # integer weights; a16 computes with them in floats, a8 in integers. Four bits keep eight for the head and the token
    # embeddings: quality is lost there first, and they are few
    "w8a16": "clean,fusions,quantize{scheme=w8a16},cache,kernels",
    "w8a8": "clean,fusions,quantize{scheme=w8a8},cache,kernels",
    "w4a16": (
        "clean,fusions,quantize{scheme=w8a16 layers=head},quantize{scheme=w4a16 group=32 layers=body},cache,kernels"
    ),
    "w4a8": "clean,fusions,quantize{scheme=w8a8 layers=head},quantize{scheme=w4a8 group=32 layers=body},cache,kernels",
    # bf16 weights in fewer bytes, without loss
    "compressed": "clean,fusions,compress,cache,kernels",
}

DEFAULT = "O2"
