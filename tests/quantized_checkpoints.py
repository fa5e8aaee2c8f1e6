"""Small Llamas that are saved quantized, by the reference packages or by plain loops, with the weights they stand for."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import transformers as hf
from safetensors.torch import load_file, save_file
from torch import Tensor

HIDDEN, FEED, VOCAB = 64, 128, 96
Pack = Callable[[str, Tensor], tuple[dict[str, Tensor], Tensor]]


@dataclass
class Saved:
    """A folder, and the dense weights that its packed ones stand for, by their names in the model."""

    folder: Path
    dense: dict[str, Tensor]
    inputs: Tensor = field(default_factory=lambda: torch.arange(1, 13)[None] * 7 % VOCAB)

    def model(self, dtype: torch.dtype = torch.float32) -> Any:
        """The reference: a dense model with those weights."""
        config = llama_config()
        model = hf.LlamaForCausalLM._from_config(config, dtype=dtype).eval()
        state = load_file(self.folder / "model.safetensors")
        own = {k: v for k, v in state.items() if k in model.state_dict()}
        missing, _ = model.load_state_dict({**own, **self.dense}, strict=False)
        assert not missing
        return model.to(dtype)

    @torch.no_grad()
    def logits(self, dtype: torch.dtype = torch.float32) -> Tensor:
        return self.model(dtype)(self.inputs).logits.float()


def llama_config() -> Any:
    return hf.LlamaConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, intermediate_size=FEED, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip


def float_model() -> Any:
    """The same weights every time, large enough that layers matter."""
    model = hf.LlamaForCausalLM(llama_config()).eval()
    rng = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=rng) / p.shape[-1] ** 0.5 * 1.5 if p.dim() == 2 else p)
    return model


def save(folder: Path, pack: Pack, settings: Any, only: str = "proj", dtype: str = "float32") -> Saved:
    """Save the model with the linear layers whose name holds ``only`` packed: ``pack(name, weight)`` gives tensors
    named within the module, and what they stand for."""
    folder.mkdir(parents=True, exist_ok=True)
    state, dense = {}, {}
    for name, tensor in float_model().state_dict().items():
        if only in name and name.endswith(".weight"):
            parts, dense[name] = pack(name, tensor.detach())
            module = name.removesuffix("weight")
            state |= {module + key: part.contiguous() for key, part in parts.items()}
        else:
            state[name] = tensor.detach().contiguous()
    config = {**llama_config().to_dict(), "architectures": ["LlamaForCausalLM"], "dtype": dtype}
    (folder / "config.json").write_text(json.dumps({**config, "quantization_config": settings}))
    save_file(state, folder / "model.safetensors")
    return Saved(folder, dense)


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    """Save the folder's tensors again after ``change``."""
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file({k: v.contiguous() for k, v in tensors.items()}, folder / "model.safetensors")


def set_quantization(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Write the folder's config again after ``change`` of its quantization_config."""
    config = json.loads((folder / "config.json").read_text())
    change(config["quantization_config"])
    (folder / "config.json").write_text(json.dumps(config))


def blocks(weight: Tensor, group: int) -> Tensor:
    """``[N, K]`` -> ``[N, G, K / G]``."""
    return weight.reshape(len(weight), -1, group or weight.shape[1])


# ---- compressed-tensors ----------------------------------------------------------------------------------------------


def compressed(folder: Path, kind: str, scale_dtype: torch.dtype = torch.float32, activations: Any = None, **weights: Any
               ) -> Saved:  # fmt: skip
    """Saved by the package's own compressor; ``weights`` are its QuantizationArgs."""
    from compressed_tensors.compressors import BaseCompressor
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    args = QuantizationArgs(**weights)
    inputs = QuantizationArgs(**activations) if activations else None
    scheme = QuantizationScheme(targets=["Linear"], weights=args, input_activations=inputs)
    compressor = BaseCompressor.get_value_from_registry(kind)

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        scale, zero = parameters(weight, args)
        state = {"weight": weight, "weight_scale": scale.to(scale_dtype), "weight_zero_point": zero}
        packed = compressor.compress(state, scheme)
        return packed, compressor.decompress(packed, scheme)["weight"]

    settings = QuantizationConfig(config_groups={"group_0": scheme}, format=kind, quantization_status="compressed",
                                  ignore=["lm_head"])  # fmt: skip
    return save(folder, pack, json.loads(settings.model_dump_json()))


def parameters(weight: Tensor, args: Any) -> tuple[Tensor, Tensor]:
    """Scales and zero points by the extremes, in the shapes of the strategy."""
    if args.strategy == "block":
        rows, columns = args.block_structure
        cut = weight.reshape(len(weight) // rows, rows, -1, columns).permute(0, 2, 1, 3).flatten(2)
    elif args.strategy == "tensor":
        cut = weight.reshape(1, 1, -1)
    else:
        cut = blocks(weight, args.group_size if args.strategy == "group" else 0)
    low, high = cut.amin(-1).clamp(max=0), cut.amax(-1).clamp(min=0)
    most = 448.0 if args.type == "float" else 2 ** (args.num_bits - 1) - 1
    if args.symmetric:
        scale, zero = torch.maximum(-low, high) / most, torch.zeros_like(low)
    else:
        scale = (high - low) / (2**args.num_bits - 1)
        zero = torch.round(-low / scale) - 2 ** (args.num_bits - 1)
    flat = (lambda t: t.reshape(1)) if args.strategy == "tensor" else (lambda t: t)
    return flat(scale), flat(zero).to(torch.int8)


# ---- GPTQ and AWQ, by plain loops --------------------------------------------------------------------------------------


def rounded(weight: Tensor, bits: int, group: int, symmetric: bool) -> tuple[Tensor, Tensor, Tensor]:
    """Unsigned codes ``[N, K]``, scales (f16) and zero points ``[N, G]``."""
    cut, most = blocks(weight, group), 2**bits - 1
    if symmetric:
        scale = (cut.abs().amax(-1) / (2 ** (bits - 1) - 0.5)).half()
        zero = torch.full_like(scale, 2 ** (bits - 1))
    else:
        low, high = cut.amin(-1).clamp(max=0), cut.amax(-1).clamp(min=0)
        scale = ((high - low) / most).half()
        zero = torch.round(-low / scale.float()).clamp(0, most)
    codes = torch.round(cut / scale.float()[..., None] + zero.float()[..., None]).clamp(0, most)
    return codes.reshape(weight.shape).int(), scale, zero.int()


def into_words(codes: list[int], bits: int) -> list[int]:
    """Codes one after the other in i32 words, low bits first; one may lie across two words."""
    whole = sum(code << (i * bits) for i, code in enumerate(codes))
    count = -(-len(codes) * bits // 32)
    words = [(whole >> (32 * i)) & 0xFFFFFFFF for i in range(count)]
    return [word - (1 << 32) if word >> 31 else word for word in words]


def gptq(folder: Path, bits: int = 4, group: int = 32, symmetric: bool = True, version: int = 1, act_order: bool = False,
         only: str = "proj") -> Saved:  # fmt: skip
    """As AutoGPTQ and GPTQModel pack: codes along K, zero points along N (one less in version 1), a group a column."""
    rng = torch.Generator().manual_seed(5)

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        n, k = weight.shape
        size = group if group > 0 else k
        order = torch.randperm(k, generator=rng) if act_order else torch.arange(k)
        codes, scale, zero = rounded(weight[:, order], bits, size, symmetric)
        place = torch.argsort(order)
        codes, index = codes[:, place], (place // size).int()
        dense = (codes - zero[:, index.long()]).float() * scale[:, index.long()].float()
        kept = (zero - 1) % 2**bits if version == 1 else zero
        qweight = torch.tensor([into_words(codes[row].tolist(), bits) for row in range(n)], dtype=torch.int32)
        qzeros = torch.tensor([into_words(kept[:, g].tolist(), bits) for g in range(zero.shape[1])], dtype=torch.int32)
        return {"qweight": qweight.T, "qzeros": qzeros, "scales": scale.T, "g_idx": index}, dense

    settings = {"quant_method": "gptq", "bits": bits, "group_size": group, "sym": symmetric, "desc_act": act_order}
    return save(folder, pack, {**settings, "checkpoint_format": "gptq" if version == 1 else "gptq_v2"}, only)


def awq(folder: Path, group: int = 32) -> Saved:
    """As AutoAWQ's gemm packs: eight codes along N in a word, the even ones first."""
    order = [0, 2, 4, 6, 1, 3, 5, 7]

    def words(rows: Tensor) -> Tensor:
        def line(row: list[int]) -> list[int]:
            return [word for i in range(0, len(row), 8) for word in into_words([row[i + j] for j in order], 4)]

        return torch.tensor([line(row) for row in rows.tolist()], dtype=torch.int32)

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        codes, scale, zero = rounded(weight, 4, group, symmetric=False)
        numbers = blocks(codes - torch.repeat_interleave(zero, group, 1), group).float() * scale.float()[..., None]
        return {"qweight": words(codes.T), "qzeros": words(zero.T), "scales": scale.T}, numbers.reshape(weight.shape)

    settings = {"quant_method": "awq", "bits": 4, "group_size": group, "zero_point": True, "version": "gemm"}
    return save(folder, pack, settings)


# ---- GGUF --------------------------------------------------------------------------------------------------------------

BLOCK_BYTES = {"Q4_0": (32, 18), "Q8_0": (32, 34), "Q4_K": (256, 144), "Q6_K": (256, 210)}
_SUPER = {"Q4_0": (0,), "Q8_0": (0,), "Q4_K": (0, 2), "Q6_K": (208,)}  # where in a block its f16 numbers lie
GGUF_HIDDEN = 256  # blocks of K quants have 256 numbers
_GGUF_NAMES = {
    "model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output", "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm", "self_attn.q_proj": "attn_q", "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v", "self_attn.o_proj": "attn_output", "mlp.gate_proj": "ffn_gate", "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down", "self_attn.q_norm": "attn_q_norm", "self_attn.k_norm": "attn_k_norm",
}  # fmt: skip


def random_blocks(kind: str, rows: int, columns: int, seed: int) -> np.ndarray:
    """Bytes ``[rows, B]`` of blocks with any codes, and f16 numbers that make weights of a usual size."""
    size, octets = BLOCK_BYTES[kind]
    rng = np.random.default_rng(seed)
    blocks = rng.integers(0, 256, (rows * columns // size, octets), np.uint8)
    most = {"Q4_0": 0.02, "Q8_0": 0.001, "Q4_K": 3e-4, "Q6_K": 2e-5}[kind]
    for at in _SUPER[kind]:
        numbers = rng.uniform(most / 2, most, len(blocks)).astype(np.float16)
        blocks[:, at : at + 2] = numbers[:, None].view(np.uint8).reshape(-1, 2)
    return blocks.reshape(rows, -1)


def gguf_config(architecture: str = "llama", vocabulary: int = VOCAB) -> Any:
    kinds = {"llama": hf.LlamaConfig, "qwen2": hf.Qwen2Config, "qwen3": hf.Qwen3Config}
    return kinds[architecture](
        vocab_size=vocabulary, hidden_size=GGUF_HIDDEN, intermediate_size=512, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=64, max_position_embeddings=128, bos_token_id=1, eos_token_id=2,
        tie_word_embeddings=False, rms_norm_eps=1e-5,
    )  # fmt: skip


def side_by_side(tensor: Tensor, heads: int) -> Tensor:
    """Rows of queries and keys in llama.cpp's order: the two of a pair that rotate together are neighbours."""
    return tensor.reshape(heads, 2, -1, *tensor.shape[1:]).swapaxes(1, 2).reshape(tensor.shape)


def gguf_file(path: Path, kind: str = "Q4_0", architecture: str = "llama", add: Callable[[Any], Any] | None = None,
              vocabulary: int = VOCAB) -> Any:  # fmt: skip
    """A file whose matrices have the type ``kind``, and a dense model with the same weights."""
    import gguf

    config = gguf_config(architecture, vocabulary)
    model = hf.AutoModelForCausalLM.from_config(config, dtype=torch.float32).eval()
    writer = gguf.GGUFWriter(path, architecture)
    settings = {
        "context_length": 128, "embedding_length": GGUF_HIDDEN, "block_count": 2, "feed_forward_length": 512,
        "head_count": 4, "head_count_kv": 2, "key_length": 64, "value_length": 64, "layer_norm_rms_eps": 1e-5,
        "rope_dimension_count": 64, "rope_freq_base": 10000.0, "bos_token_id": 1, "eos_token_id": 2,
    }  # fmt: skip
    for name, value in settings.items():
        getattr(writer, f"add_{name}")(value)
    if add is not None:
        add(writer)
    rng = torch.Generator().manual_seed(4)
    with torch.no_grad():
        for seed, (name, p) in enumerate(model.named_parameters()):
            p.copy_(torch.randn(p.shape, generator=rng) * 0.1 + (1 if "norm" in name else 0))
            _add_tensor(writer, name, p, kind, seed, architecture)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return model


def _add_tensor(writer: Any, name: str, p: Tensor, kind: str, seed: int, architecture: str) -> None:
    import gguf

    module, _, suffix = name.rpartition(".")
    layer, _, inside = module.removeprefix("model.layers.").partition(".")
    own = _GGUF_NAMES[module] if module in _GGUF_NAMES else f"blk.{layer}.{_GGUF_NAMES[inside]}"
    heads = {"self_attn.q_proj": 4, "self_attn.k_proj": 2}.get(inside) if architecture == "llama" else None
    order = side_by_side(torch.arange(len(p)), heads) if heads else torch.arange(len(p))
    if p.dim() == 1 or kind in ("F32", "F16", "BF16"):
        stored = "F32" if p.dim() == 1 else kind
        p.copy_(p.to({"F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}[stored]))
        octets = p[order].to({"F16": torch.float16, "BF16": torch.bfloat16}.get(stored, torch.float32)).contiguous()
        array = octets.view(torch.int16).numpy().view(np.uint8) if stored == "BF16" else octets.numpy()
        writer.add_tensor(f"{own}.{suffix}", array, raw_dtype=gguf.GGMLQuantizationType[stored])
        return
    blocks = random_blocks(kind, *p.shape, seed)
    numbers = gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[kind])
    p[order] = torch.from_numpy(numbers)
    writer.add_tensor(f"{own}.{suffix}", blocks, raw_dtype=gguf.GGMLQuantizationType[kind])


# ---- sparse formats of compressed-tensors, by plain loops ----------------------------------------------------------------


def bitmasked(weight: Tensor, half: bool) -> dict[str, Tensor]:
    """``weight`` ``[N, K]`` as its numbers that are not 0 (with ``half``: two of four), eight bits a byte, and the rest."""
    n, k = weight.shape
    kept = [[bool(x != 0) for x in row] for row in weight.float()]
    if half:  # zeros that fill a four up are numbers like others
        for row, flags in zip(weight.float().abs().tolist(), kept):
            for i in range(0, k, 4):
                first = sorted(range(i, i + 4), key=lambda j: -row[j])[:2]
                flags[i : i + 4] = [j in first for j in range(i, i + 4)]
    numbers = torch.stack([weight[r, c] for r in range(n) for c in range(k) if kept[r][c]] or [weight.new_zeros(())])
    bits = [[sum(flags[c] << (c - i) for c in range(i, min(i + 8, k))) for i in range(0, k, 8)] for flags in kept]
    counts = torch.tensor([sum(flags) for flags in kept])
    parts = {"bitmask": torch.tensor(bits, dtype=torch.uint8), "shape": torch.tensor([n, k])}
    if half:
        return {**parts, "compressed": numbers.reshape(n, k // 2), "shape": torch.tensor([[n], [k]])}
    return {**parts, "compressed": numbers, "row_offsets": counts.cumsum(0) - counts}


def sparse(folder: Path, half: bool = False, dtype: torch.dtype = torch.float32, codes: bool = False) -> Saved:
    """Two of four weights; with ``codes`` those are 8-bit integers, a scale a row."""

    def pack(name: str, weight: Tensor) -> tuple[dict[str, Tensor], Tensor]:
        fours = weight.reshape(len(weight), -1, 4)
        small = fours.abs().argsort(-1).argsort(-1) < 2
        weight = torch.where(small, 0, fours).reshape(weight.shape).to(dtype)
        if not codes:
            return bitmasked(weight, half), weight
        scale = weight.abs().amax(1, keepdim=True) / 127
        whole = torch.round(weight / scale).to(torch.int8)
        return {**bitmasked(whole, half), "weight_scale": scale}, whole * scale

    kind = "sparse-24-bitmask" if half else "sparse-bitmask"
    settings: dict[str, Any] = {
        "quant_method": "compressed-tensors", "format": "dense", "config_groups": {},
        "sparsity_config": {"format": kind, "targets": ["Linear"], "ignore": ["lm_head"], "sparsity_structure": "2:4"},
    }  # fmt: skip
    if codes:
        weights = {"num_bits": 8, "type": "int", "symmetric": True, "strategy": "channel"}
        settings |= {"format": "int-quantized", "config_groups": {"group_0": {"targets": ["Linear"], "weights": weights}}}
    return save(folder, pack, settings)
