"""All passes by name. A pass is imported when it is first asked for."""

from __future__ import annotations

from importlib import import_module

from tilewright.ir import PassError
from tilewright.passes.base import Pass

PASSES: dict[str, str] = {
    "awq": "awq:Awq",
    "canonicalize": "canonicalize:Canonicalize",
    "compress": "compress:Compress",
    "cse": "cse:Cse",
    "dce": "dce:Dce",
    "fold": "fold:Fold",
    "fuse": "fuse:Fuse",
    "fuse-attention": "fuse_attention:FuseAttention",
    "fuse-batch-norm": "fuse_batch_norm:FuseBatchNorm",
    "fuse-gate-up": "fuse_gate_up:FuseGateUp",
    "fuse-norm": "fuse_norm:FuseNorm",
    "fuse-qkv": "fuse_qkv:FuseQkv",
    "fuse-rope": "fuse_rope:FuseRope",
    "kv-layout": "kv_layout:KvLayout",
    "latent-cache": "latent_cache:LatentCache",
    "order-columns": "order_columns:OrderColumns",
    "outlier-columns": "outlier_columns:OutlierColumns",
    "outlier-weights": "outlier_weights:OutlierWeights",
    "plan-memory": "plan_memory:PlanMemory",
    "prune": "prune:Prune",
    "prune-keys": "prune_keys:PruneKeys",
    "prune-layers": "prune_layers:PruneLayers",
    "prune-structured": "prune_structured:PruneStructured",
    "quantize": "quantize:Quantize",
    "quantize-mixed": "quantize_mixed:QuantizeMixed",
    "smooth": "smooth:Smooth",
    "sparse-prefill": "sparse_prefill:SparsePrefill",
    "sparse-store": "sparse_store:SparseStore",
    "sparsify-activations": "sparsify_activations:SparsifyActivations",
    "split-heads": "split_heads:SplitHeads",
}
"""name -> ``file:class`` in this package."""

_known: dict[str, type[Pass]] = {}


def register(cls: type[Pass]) -> type[Pass]:
    """Make a pass of the user's own available by its name; raises PassError when the name is taken."""
    if cls.name in PASSES or _known.setdefault(cls.name, cls) is not cls:
        raise PassError(f"there is already a pass named {cls.name!r}")
    return cls


def names() -> list[str]:
    """Names of all passes, sorted."""
    return sorted({*PASSES, *_known})


def find(name: str) -> type[Pass]:
    """The class of the pass ``name``; raises PassError with the list of those that exist."""
    if name not in _known:
        if name not in PASSES:
            raise PassError(f"there is no pass named {name!r}; there are {', '.join(names())}")
        file, _, cls = PASSES[name].partition(":")
        _known[name] = getattr(import_module(f"tilewright.passes.{file}"), cls)
    return _known[name]
