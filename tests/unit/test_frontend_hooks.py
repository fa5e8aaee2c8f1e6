"""Attention, masks and experts of transformers' models: what the hooks record means what eager attention computes."""

import numpy as np
import pytest
import torch
import transformers as hf
from torch import nn

from tests.zoo import GROUPED, WINDOW, ZOO, randomize
from tilewright.frontend import trace
from tilewright.ir import interpret, ops

CONFIGS = {
    "llama4": lambda: hf.Llama4TextConfig(
        **GROUPED, head_dim=16, num_local_experts=2, attention_chunk_size=WINDOW, intermediate_size_mlp=64
    ),
    "gpt_oss": lambda: hf.GptOssConfig(
        **GROUPED, head_dim=16, num_local_experts=2, num_experts_per_tok=1, sliding_window=WINDOW
    ),
    "falcon": lambda: hf.FalconConfig(vocab_size=128, hidden_size=64, num_hidden_layers=2, num_attention_heads=4),
    "bloom": lambda: hf.BloomConfig(vocab_size=128, hidden_size=64, n_layer=2, n_head=4),
    "gptj": lambda: hf.GPTJConfig(vocab_size=128, n_embd=64, n_layer=2, n_head=4, rotary_dim=8, n_positions=256),
    "mpt": lambda: hf.MptConfig(vocab_size=128, d_model=64, n_heads=4, n_layers=2, max_seq_len=256),
}


def build(name):
    torch.manual_seed(0)
    return randomize(hf.AutoModelForCausalLM.from_config(CONFIGS[name]()).eval(), 0)


def numbers(inputs):
    return {k: v.numpy() for k, v in inputs.items()}


@torch.no_grad()
def check(module, model, inputs, keep=slice(None), **extra):
    want = model(**inputs, use_cache=False, **extra).logits.numpy()
    got = interpret(module, "forward", numbers(inputs))[0]
    np.testing.assert_allclose(got[keep], want[keep], atol=1e-4 * np.abs(want).max())


@pytest.mark.parametrize("name", CONFIGS)
def test_models_with_attention_of_their_own(name):
    """Chunks, sinks, and the four families that ignore the interface (a silent error if it is registered for them)."""
    model = build(name)
    module = trace(model)
    if type(model)._can_set_attn_implementation():
        model.set_attn_implementation("eager")
    for shape in ((2, 19), (1, 1)):
        check(module, model, {"input_ids": torch.randint(3, 128, shape)})
    kinds = [(a.causal, a.window, a.chunk, a.sinks is not None) for a in module.ops(ops.Attention)]
    expected = {
        "llama4": [(True, -1, WINDOW, False)] * 2,
        "gpt_oss": [(True, WINDOW, 0, True), (True, -1, 0, True)],
        "falcon": [(True, -1, 0, False)] * 2,
    }
    assert kinds == expected.get(name, [])


def test_a_bidirectional_window_and_padding():
    config = hf.ModernBertConfig(**ZOO_COMMON, local_attention=WINDOW, global_attn_every_n_layers=2)
    model = randomize(hf.ModernBertModel(config).eval(), 0)
    module = trace(model)
    mask = torch.tensor([[1] * 17, [1] * 9 + [0] * 8])
    inputs = {"input_ids": torch.randint(3, 128, (2, 17)), "attention_mask": mask}
    model.set_attn_implementation("eager")
    with torch.no_grad():
        want = model(**inputs).last_hidden_state.numpy()
    kept = mask.numpy() > 0
    got = interpret(module, "forward", numbers(inputs))[0]
    np.testing.assert_allclose(got[kept], want[kept], atol=1e-4)
    windows = [(a.window, a.window_right) for a in module.ops(ops.Attention)]
    assert windows == [(-1, -1), (WINDOW // 2 + 1, WINDOW // 2 + 1)]
    assert all(a.padding is not None for a in module.ops(ops.Attention))


ZOO_COMMON = {k: v for k, v in GROUPED.items() if k not in ("num_key_value_heads", "use_cache")}


def test_padding_that_is_given_to_a_causal_model_is_an_operand():
    model = ZOO["llama"].model()
    mask = torch.tensor([[1] * 9, [1] * 5 + [0] * 4])
    inputs = {"input_ids": torch.randint(3, 128, (2, 9)), "attention_mask": mask}
    module = trace(model, (), inputs)
    assert module.dims == {"B": (1, 256), "S": (1, 256)}
    assert all(a.causal and a.padding is not None and a.mask is None for a in module.ops(ops.Attention))
    check(module, model, inputs, mask.numpy() > 0)


def test_positions_that_are_given_may_pack_sequences():
    model = ZOO["llama"].model()
    inputs = {
        "input_ids": torch.randint(3, 128, (1, 9)),
        "position_ids": torch.tensor([[0, 1, 2, 3, 0, 1, 2, 3, 4]]),
    }
    module = trace(model, (), inputs)
    assert all(a.mask is not None and not a.causal for a in module.ops(ops.Attention))
    check(module, model, inputs)


def test_a_ready_made_mask_is_kept():
    model = ZOO["llama"].model()
    mask = torch.zeros(1, 1, 6, 6).masked_fill(torch.rand(1, 1, 6, 6) < 0.3, -1e9)
    inputs = {"input_ids": torch.randint(3, 128, (1, 6)), "attention_mask": mask}
    module = trace(model, (), inputs, dynamic={})
    assert all(a.bias is not None and not a.causal for a in module.ops(ops.Attention))
    check(module, model, inputs)


def test_a_model_of_transformers_inside_of_another_module():
    class Embedder(nn.Module):
        def __init__(self):
            super().__init__()
            self.bert = ZOO["bert"].model()

        def forward(self, input_ids, attention_mask):
            hidden = self.bert(input_ids, attention_mask=attention_mask).last_hidden_state
            kept = attention_mask[..., None].to(hidden.dtype)
            return nn.functional.normalize((hidden * kept).sum(1) / kept.sum(1), dim=1)

    model, inputs = Embedder().eval(), ZOO["bert"].inputs((3, 13))
    axes = {0: ("B", 1, 8), 1: ("S", 1, 64)}
    module = trace(model, (), inputs, {"input_ids": axes, "attention_mask": axes})
    assert len(list(module.ops(ops.Attention))) == 2
    with torch.no_grad():
        want = model(**inputs).numpy()
    np.testing.assert_allclose(interpret(module, "forward", numbers(inputs))[0], want, atol=1e-5)


def test_a_language_model_inside_of_another_module_is_not_cached():
    class Scores(nn.Module):
        def __init__(self):
            super().__init__()
            self.lm = build("falcon")
            self.lm.config.use_cache = True

        def forward(self, ids):
            return self.lm(ids).logits.log_softmax(-1)

    model, ids = Scores().eval(), torch.randint(3, 128, (2, 9))
    module = trace(model, (ids,), dynamic={"ids": {0: ("B", 1, 8), 1: ("S", 1, 64)}})
    assert [(a.causal, str(a.k.shape[1])) for a in module.ops(ops.Attention)] == [(True, "S")] * 2
    assert model.lm.config.use_cache
    with torch.no_grad():
        want = model(ids).numpy()
    np.testing.assert_allclose(interpret(module, "forward", [ids.numpy()])[0], want, atol=1e-4)


def test_the_model_and_transformers_are_left_as_they_were():
    from transformers.masking_utils import AttentionMaskInterface

    before = dict(AttentionMaskInterface._global_mapping)
    for model in (ZOO["mixtral"].model(), build("bloom")):
        config, inputs = model.config, {"input_ids": torch.randint(3, 128, (2, 9))}
        kinds = (config._attn_implementation, config._experts_implementation)
        with torch.no_grad():
            want = model(**inputs).logits
            trace(model.train())
            assert model.training
            assert all(m.training for m in model.modules())
            torch.testing.assert_close(model.eval()(**inputs).logits, want)
        assert (config._attn_implementation, config._experts_implementation) == kinds
    after = AttentionMaskInterface._global_mapping
    assert {k: after[k] for k in ("sdpa", "eager")} == {k: before[k] for k in ("sdpa", "eager")}


def test_unknown_masks_are_built():
    """A mask function that is not one of transformers' own keeps its meaning as a tensor."""
    from transformers import masking_utils as m

    from tilewright.frontend.hooks import MaskSpec, read_mask_function

    assert read_mask_function(m.sliding_window_causal_mask_function(7)) == MaskSpec(True, 7)
    assert read_mask_function(m.sliding_window_bidirectional_mask_function(3)) == MaskSpec(False, 4, 4)
    assert read_mask_function(m.chunked_causal_mask_function(5, torch.zeros(1))) == MaskSpec(True, -1, -1, 5)
    assert read_mask_function(m.or_masks(m.causal_mask_function, m.bidirectional_mask_function)) is None
    assert read_mask_function(lambda b, h, q, k: k <= q) is None
