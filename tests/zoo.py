"""Tiny random models, one for each architecture family, for tests that compare with eager PyTorch.

    entry = ZOO["llama"]
    model = entry.model()                                 # f32, eval mode, the same weights every time
    for shape in entry.shapes:
        inputs = entry.inputs(shape)                      # keyword arguments of forward
        expected = entry.reference(model, shape)          # one tensor
    torch.export.export(model, (), entry.example(), dynamic_shapes=entry.dynamic_shapes(), strict=False)

Nothing is downloaded. transformers' models use eager attention, so that the reference is the plain formula. Weights
are drawn anew, larger than the usual initialisation, so that attention, windows and softcaps show in the output.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as hf
from torch import Tensor, nn
from torch.export import Dim
from torch.nn import functional as F

VOCAB, HIDDEN, LAYERS, HEADS, KV_HEADS, LONGEST = 128, 64, 2, 4, 2, 256
WINDOW = 8  # shorter than most of the sequences that are compared
BATCH, TEXT, TOKENS = {"B": (1, 64)}, {"B": (1, 64), "S": (1, LONGEST)}, {0: "B", 1: "S"}
TEXT_SHAPES = ((2, 13), (1, 5), (3, 29), (2, 100), (1, 1))
BATCHES, IMAGES = ((2,), (1,), (3,), (7,)), ((2, 32, 32), (1, 32, 48), (3, 37, 29), (1, 64, 64))
Shape = tuple[int, ...]


@dataclass(frozen=True)
class ZooModel:
    """How to build one model, its inputs, and which output to compare.

    ``dims`` names each size in a shape with its bounds; ``axes`` says, for each input, which of its axes is which dim.
    ``is_causal``: a decoder-only language model [B, S] -> logits [B, S, vocabulary], so a KV cache applies to it.
    """

    name: str
    build: Callable[[], nn.Module]
    make_inputs: Callable[..., dict[str, Tensor]]
    dims: dict[str, tuple[int, int]]
    axes: dict[str, dict[int, str]]
    shapes: tuple[Shape, ...]
    output: Callable[[Any], Tensor] = lambda result: result
    is_causal: bool = False

    def model(self, seed: int = 0) -> nn.Module:
        return randomize(self.build().eval(), seed)

    def inputs(self, shape: Shape, seed: int = 1) -> dict[str, Tensor]:
        """Inputs with the sizes ``shape``, in the order of ``dims``."""
        return self.make_inputs(*shape, torch.Generator().manual_seed(seed))

    def example(self) -> dict[str, Tensor]:
        """Inputs to trace with: every dynamic size is at least two, since torch.export specialises ones."""
        return self.inputs(self.shapes[0])

    def dynamic_shapes(self) -> dict[str, dict[int, Any]]:
        dims = {name: Dim(name, min=low, max=high) for name, (low, high) in self.dims.items()}
        return {name: {axis: dims[dim] for axis, dim in axes.items()} for name, axes in self.axes.items()}

    @torch.no_grad()
    def reference(self, model: nn.Module, shape: Shape) -> Tensor:
        return self.output(model(**self.inputs(shape)))


def randomize(model: nn.Module, seed: int) -> nn.Module:
    """Draw all weights anew: matrices with a gain of 1.5, biases near zero, norms near their initial value."""
    rng = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in model.named_parameters():
            noise = torch.randn(p.shape, generator=rng)
            if p.dim() == 1:
                p.add_(noise, alpha=0.1) if "bias" not in name else p.copy_(0.1 * noise)
                continue
            fan_in = p[0].numel() if p.dim() in (2, 4) else p.shape[-1]
            p.copy_(noise * (1.5 / fan_in**0.5))
        for name, b in model.named_buffers():
            if "running_" in name:
                b.add_(torch.rand(b.shape, generator=rng) - 0.5)
    return model.requires_grad_(False)


def token_ids(batch: int, length: int, rng: torch.Generator) -> Tensor:
    return torch.randint(3, VOCAB, (batch, length), generator=rng)


def text_inputs(batch: int, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": token_ids(batch, length, rng)}


# ---- transformers' language models -------------------------------------------------------------------------------

COMMON = {
    "vocab_size": VOCAB, "hidden_size": HIDDEN, "intermediate_size": 128, "num_hidden_layers": LAYERS,
    "num_attention_heads": HEADS, "max_position_embeddings": LONGEST, "use_cache": False,
    "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2,
}
GROUPED = {**COMMON, "num_key_value_heads": KV_HEADS}
CAUSAL_CONFIGS: dict[str, Callable[[], hf.PretrainedConfig]] = {
    "llama": lambda: hf.LlamaConfig(**GROUPED),
    "qwen2": lambda: hf.Qwen2Config(**GROUPED, tie_word_embeddings=True),
    "qwen3": lambda: hf.Qwen3Config(**GROUPED, head_dim=32),
    "mistral": lambda: hf.MistralConfig(**GROUPED, sliding_window=WINDOW),
    "gemma2": lambda: hf.Gemma2Config(
        **GROUPED, head_dim=32, sliding_window=WINDOW, query_pre_attn_scalar=24, attn_logit_softcapping=5.0,
        final_logit_softcapping=10.0, tie_word_embeddings=False,  # tied, greedy decoding repeats one token
    ),
    "phi3": lambda: hf.Phi3Config(**GROUPED),
    "gpt2": lambda: hf.GPT2Config(
        vocab_size=VOCAB, n_embd=HIDDEN, n_layer=LAYERS, n_head=HEADS, n_positions=LONGEST, use_cache=False,
        bos_token_id=1, eos_token_id=2,
    ),
    "gpt-neox": lambda: hf.GPTNeoXConfig(**COMMON),
    "opt": lambda: hf.OPTConfig(
        vocab_size=VOCAB, hidden_size=HIDDEN, word_embed_proj_dim=HIDDEN, ffn_dim=128, num_hidden_layers=LAYERS,
        num_attention_heads=HEADS, max_position_embeddings=LONGEST, use_cache=False, pad_token_id=0,
    ),
    "mixtral": lambda: hf.MixtralConfig(**GROUPED, num_local_experts=4, num_experts_per_tok=2),
}


def causal(name: str) -> ZooModel:
    def build() -> nn.Module:
        model = hf.AutoModelForCausalLM.from_config(CAUSAL_CONFIGS[name](), attn_implementation="eager")
        if name == "mixtral":
            model.set_experts_implementation("batched_mm")  # the eager loop branches on data: it cannot be traced
        return model

    return ZooModel(
        name, build, text_inputs, TEXT, {"input_ids": TOKENS}, TEXT_SHAPES,
        lambda result: result.logits, is_causal=True,
    )


# ---- encoders and encoder-decoders -------------------------------------------------------------------------------


def build_bert() -> nn.Module:
    return hf.BertModel(hf.BertConfig(**COMMON, attn_implementation="eager"))


def bert_inputs(batch: int, length: int, rng: torch.Generator) -> dict[str, Tensor]:
    """Row r is two tokens shorter than row r - 1, padded on the right."""
    kept = (length - 2 * torch.arange(batch)).clamp(min=1)
    mask = (torch.arange(length) < kept[:, None]).to(torch.int64)
    return {"input_ids": token_ids(batch, length, rng) * mask, "attention_mask": mask}


def build_t5() -> nn.Module:
    config = hf.T5Config(
        vocab_size=VOCAB, d_model=HIDDEN, d_kv=16, d_ff=128, num_layers=LAYERS, num_heads=HEADS, use_cache=False,
        pad_token_id=0, decoder_start_token_id=0, attn_implementation="eager",
    )
    return hf.T5ForConditionalGeneration(config)


def t5_inputs(batch: int, length: int, target: int, rng: torch.Generator) -> dict[str, Tensor]:
    return {"input_ids": token_ids(batch, length, rng), "decoder_input_ids": token_ids(batch, target, rng)}


def build_vit() -> nn.Module:
    config = hf.ViTConfig(
        hidden_size=HIDDEN, intermediate_size=128, num_hidden_layers=LAYERS, num_attention_heads=HEADS, image_size=32,
        patch_size=8, num_labels=10, attn_implementation="eager",
    )
    return hf.ViTForImageClassification(config)


# ---- modules that are not from transformers ----------------------------------------------------------------------


class NanoBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(HIDDEN), nn.LayerNorm(HIDDEN)
        self.qkv, self.out = nn.Linear(HIDDEN, 3 * HIDDEN), nn.Linear(HIDDEN, HIDDEN)
        self.mlp = nn.Sequential(nn.Linear(HIDDEN, 4 * HIDDEN), nn.GELU(), nn.Linear(4 * HIDDEN, HIDDEN))

    def forward(self, x: Tensor) -> Tensor:
        b, s, h = x.shape
        q, k, v = (t.view(b, s, HEADS, h // HEADS).transpose(1, 2) for t in self.qkv(self.norm1(x)).split(h, dim=2))
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.out(y.transpose(1, 2).contiguous().view(b, s, h))
        return x + self.mlp(self.norm2(x))


class NanoGPT(nn.Module):
    """A decoder as people write it by hand: learned positions, fused qkv, torch's attention, tied head."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens, self.positions = nn.Embedding(VOCAB, HIDDEN), nn.Embedding(LONGEST, HIDDEN)
        self.blocks = nn.ModuleList(NanoBlock() for _ in range(LAYERS))
        self.norm, self.head = nn.LayerNorm(HIDDEN), nn.Linear(HIDDEN, VOCAB, bias=False)
        self.head.weight = self.tokens.weight

    def forward(self, input_ids: Tensor) -> Tensor:
        positions = torch.arange(input_ids.shape[1], device=input_ids.device)
        x = self.tokens(input_ids) + self.positions(positions)
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


class ResidualBlock(nn.Module):
    def __init__(self, channels: int, out: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(channels, out, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(out, out, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(out), nn.BatchNorm2d(out)
        self.short = nn.Sequential(nn.Conv2d(channels, out, 1, stride, bias=False), nn.BatchNorm2d(out))

    def forward(self, x: Tensor) -> Tensor:
        y = F.relu(self.bn1(self.conv1(x)))
        return F.relu(self.bn2(self.conv2(y)) + self.short(x))


def build_resnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 7, 2, 3, bias=False), nn.BatchNorm2d(16), nn.ReLU(), nn.MaxPool2d(3, 2, 1),
        ResidualBlock(16, 16, 1), ResidualBlock(16, 32, 2), nn.AdaptiveAvgPool2d((1, 1)), nn.Flatten(),
        nn.Linear(32, 10),
    )


def build_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(32, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, HIDDEN), nn.Tanh(), nn.Linear(HIDDEN, 10))


def build_convnet() -> nn.Module:
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1, groups=2),
        nn.SiLU(), nn.AvgPool2d(2), nn.Flatten(), nn.Linear(32 * 4 * 4, 10),
    )


def floats(name: str, *sizes: int | None) -> Callable[..., dict[str, Tensor]]:
    """One input of the given sizes; a None is taken from the shape asked for."""

    def make(*shape_and_rng: Any) -> dict[str, Tensor]:
        *shape, rng = shape_and_rng
        left = iter(shape)
        return {name: torch.randn([next(left) if n is None else n for n in sizes], generator=rng)}

    return make


ENTRIES = (
    *(causal(name) for name in CAUSAL_CONFIGS),
    ZooModel("nanogpt", NanoGPT, text_inputs, TEXT, {"input_ids": TOKENS}, TEXT_SHAPES, is_causal=True),
    ZooModel("bert", build_bert, bert_inputs, TEXT, {"input_ids": TOKENS, "attention_mask": TOKENS}, TEXT_SHAPES,
             lambda result: result.last_hidden_state),
    ZooModel("t5", build_t5, t5_inputs, {**TEXT, "T": (1, LONGEST)},
             {"input_ids": TOKENS, "decoder_input_ids": {0: "B", 1: "T"}},
             ((2, 13, 7), (1, 5, 13), (3, 29, 2), (2, 100, 29)), lambda result: result.logits),
    ZooModel("vit", build_vit, floats("pixel_values", None, 3, 32, 32), BATCH, {"pixel_values": {0: "B"}},
             BATCHES, lambda result: result.logits),
    ZooModel("resnet", build_resnet, floats("input", None, 3, None, None), {**BATCH, "H": (24, 96), "W": (24, 96)},
             {"input": {0: "B", 2: "H", 3: "W"}}, IMAGES),
    ZooModel("mlp", build_mlp, floats("input", None, None, 32), TEXT, {"input": TOKENS}, TEXT_SHAPES),
    ZooModel("convnet", build_convnet, floats("input", None, 3, 16, 16), BATCH, {"input": {0: "B"}}, BATCHES),
)
ZOO = {entry.name: entry for entry in ENTRIES}
