"""A trained language model, compiled from its folder: the tokens of transformers, quantised weights, sampling."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

import tilewright
from tilewright import Compiled, Tokenizer
from tilewright.frontend import trace_folder
from tilewright.ir import Module, empty_states, interpret

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "tests" / "models" / "small-lm"
HELD_OUT = ROOT / "tests" / "zoo.py"  # a text that the model was not trained on
LENGTH, NEW = 256, 64
WINDOWS, WINDOW = 8, 256  # tokens that the perplexity is measured on
COUNTS = (3, 11, 29, 100)  # lengths of the prompts, five of each
BF16_ERROR = 2e-2  # of the largest logit
NO_CACHE = "clean,fusions,kernels"  # leaves forward(ids) -> logits at every position

Array = np.ndarray[Any, Any]


@pytest.fixture(scope="module")
def tokens() -> list[int]:
    return Tokenizer(FOLDER).encode(HELD_OUT.read_text())


@pytest.fixture(scope="module")
def prompts(tokens: list[int]) -> list[list[int]]:
    """Twenty pieces of the held-out text."""
    lengths = [count for count in COUNTS for _ in range(5)]
    return [tokens[150 * i : 150 * i + length] for i, length in enumerate(lengths)]


@pytest.fixture(scope="module")
def reference() -> Any:
    """transformers, in f32 arithmetic on the weights as saved (bf16)."""
    return AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.float32, attn_implementation="eager").eval()


@pytest.fixture(scope="module")
def expected(reference: Any, prompts: list[list[int]]) -> list[list[int]]:
    """transformers' greedy tokens after each prompt."""
    rows: list[list[int]] = []
    for count in COUNTS:
        ids = torch.tensor([prompt for prompt in prompts if len(prompt) == count])
        made = reference.generate(
            ids, attention_mask=torch.ones_like(ids), do_sample=False, max_new_tokens=NEW, min_new_tokens=NEW,
            eos_token_id=None,
        )  # fmt: skip
        rows += made[:, count:].tolist()
    return rows


@pytest.fixture(scope="module")
def compiled() -> Compiled:
    return tilewright.compile(FOLDER, dtype="f32", max_length=LENGTH)


@pytest.fixture(scope="module")
def compiled_bf16() -> Compiled:
    return tilewright.compile(FOLDER, max_length=LENGTH)


@pytest.fixture(scope="module")
def quantised() -> tuple[Module, Compiled]:
    """Eight-bit weights in f32 arithmetic: the module after its passes, and the artifact."""
    module = trace_folder(FOLDER, dtype="f32")
    return module, tilewright.compile(module, passes="w8a16", max_length=LENGTH)


def last_logits(run: Compiled, ids: Array) -> Array:
    """Logits after the last token of each row of ids [B, S], the last two of them fed by decode."""
    count, length = ids.shape
    at = np.full(count, length - 2)
    with run.session(batch=count) as session:
        session("prefill", ids=ids[:, :-2], start=0 * at, last=at - 1)
        session("decode", ids=ids[:, -2:-1], start=at)
        return session("decode", ids=ids[:, -1:], start=at + 1)["logits"].astype(np.float32)


def relative_error(got: Array, want: Array) -> float:
    assert got.shape == want.shape
    return float(np.abs(got - want).max() / np.abs(want).max())


def windows(tokens: list[int]) -> Array:
    assert len(tokens) > WINDOWS * WINDOW
    return np.array(tokens[: WINDOWS * WINDOW]).reshape(WINDOWS, WINDOW)


def perplexity(logits: Array, ids: Array) -> float:
    """Of each token given those before it in its row: logits [B, S, V], ids [B, S]."""
    losses = torch.nn.functional.cross_entropy(
        torch.from_numpy(logits)[:, :-1].double().flatten(0, 1), torch.from_numpy(ids)[:, 1:].flatten()
    )
    return float(losses.exp())


# ---- f32 ---------------------------------------------------------------------------------------------------------


def test_greedy_tokens_are_those_of_transformers(
    compiled: Compiled, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    with compiled.session() as session:
        got = [session.generate([prompt], NEW)[0] for prompt in prompts]
    assert got == expected
    assert len({token for row in expected for token in row}) > 100, "the tokens say nothing"


def test_a_ragged_batch_is_its_prompts_one_by_one(
    compiled: Compiled, prompts: list[list[int]], expected: list[list[int]]
) -> None:
    chosen = [12, 0, 19, 7]  # 29, 3, 100 and 11 tokens
    batch = [prompts[i] for i in chosen]
    assert len({len(prompt) for prompt in batch}) == 4
    assert compiled.generate(batch, NEW) == [expected[i] for i in chosen]
    assert compiled.generate(batch, NEW, chunk=16) == [expected[i] for i in chosen]


@torch.no_grad()
def test_perplexity_of_a_held_out_text(reference: Any, tokens: list[int]) -> None:
    run = tilewright.compile(FOLDER, dtype="f32", passes=NO_CACHE)
    ids = windows(tokens)
    want, got = reference(torch.from_numpy(ids)).logits.numpy(), run(ids)
    assert relative_error(got, want) <= 1e-4
    assert perplexity(got, ids) == pytest.approx(perplexity(want, ids), rel=1e-3)
    shuffled = np.random.default_rng(0).permuted(ids, axis=1)
    assert 4 * perplexity(got, ids) < perplexity(run(shuffled), shuffled), "the model knows the language"


def test_logits_do_not_depend_on_threads(compiled: Compiled, prompts: list[list[int]]) -> None:
    results = []
    for threads in (1, 2, 3):
        with compiled.session(threads=threads) as session:
            zero, last = np.zeros(1, np.int64), np.array([len(prompts[-1]) - 1])
            results.append(session("prefill", ids=np.array(prompts[-1:]), start=zero, last=last)["logits"])
    assert (results[0] == results[1]).all()
    assert (results[0] == results[2]).all()


# ---- bf16, as the folder says ------------------------------------------------------------------------------------


@torch.no_grad()
def test_bf16_is_close_to_f32(compiled_bf16: Compiled, reference: Any, tokens: list[int]) -> None:
    """The reference is f32 arithmetic on the same weights: torch's own bf16 has an error of the same size."""
    ids = windows(tokens)[:, :64]
    want = reference(torch.from_numpy(ids)).logits[:, -1].numpy()
    assert relative_error(last_logits(compiled_bf16, ids), want) <= BF16_ERROR
    entry = compiled_bf16.program.manifest.entries["decode"]
    assert entry.outputs[0].dtype == "bf16"
    assert compiled_bf16.program.manifest.states[0].dtype == "bf16"


@torch.no_grad()
def test_bf16_is_not_worse_than_torch(compiled_bf16: Compiled, reference: Any, tokens: list[int]) -> None:
    eager = AutoModelForCausalLM.from_pretrained(FOLDER, dtype=torch.bfloat16, attn_implementation="eager").eval()
    ids = windows(tokens)[:, :64]
    want = reference(torch.from_numpy(ids)).logits[:, -1].numpy()
    theirs = eager(torch.from_numpy(ids)).logits[:, -1].float().numpy()
    ours = last_logits(compiled_bf16, ids)

    def typical(got: Array) -> float:
        return float(np.sqrt(((got - want) ** 2).mean()))

    assert typical(ours) <= 1.25 * typical(theirs)


# ---- eight-bit weights -------------------------------------------------------------------------------------------


def test_quantised_weights_mean_what_the_interpreter_says(
    quantised: tuple[Module, Compiled], prompts: list[list[int]]
) -> None:
    module, run = quantised
    ids, states = np.array(prompts[5:8]), empty_states(module, 3)
    zero, ones = np.zeros(3, np.int64), np.ones(3, np.int64)
    with run.session(batch=3) as session:
        want = interpret(module, "prefill", [ids[:, :-1], zero, 9 * ones], states)[0]
        got = session("prefill", ids=ids[:, :-1], start=zero, last=9 * ones)["logits"]
        assert relative_error(got, want) <= 1e-4
        want = interpret(module, "decode", [ids[:, -1:], 10 * ones], states)[0]
        got = session("decode", ids=ids[:, -1:], start=10 * ones)["logits"]
        assert relative_error(got, want) <= 1e-4


def test_quantised_weights_are_small_and_close(
    quantised: tuple[Module, Compiled], compiled: Compiled, prompts: list[list[int]]
) -> None:
    _, run = quantised
    whole, small = (sum(c.report.weight_bytes.values()) for c in (compiled, run))
    table = 4096 * 256  # lies there a second time, row by row, for the embedding
    assert small - table <= 0.27 * whole
    ids = np.array(prompts[15:])
    error = relative_error(last_logits(run, ids), last_logits(compiled, ids))
    assert 1e-4 < error < 5e-2


def test_quantised_model_continues_a_text(quantised: tuple[Module, Compiled], expected: list[list[int]],
                                          prompts: list[list[int]]) -> None:  # fmt: skip
    got = quantised[1].generate(prompts[15:], NEW)
    first = [row[0] for row in got]
    assert [len(row) for row in got] == [NEW] * 5
    assert sum(a == b[0] for a, b in zip(first, expected[15:])) >= 4, "rounding may turn a close call, not most of them"


# ---- sampling ----------------------------------------------------------------------------------------------------

SAMPLING = {"temperature": 0.9, "top_k": 50, "top_p": 0.95}


def test_the_seed_decides_what_is_sampled(compiled: Compiled, prompts: list[list[int]]) -> None:
    batch = prompts[3:7]
    first = compiled.generate(batch, 24, seed=11, **SAMPLING)
    assert compiled.generate(batch, 24, seed=11, **SAMPLING) == first
    assert compiled.generate(batch, 24, seed=12, **SAMPLING) != first
    assert compiled.generate(batch, 24) != first


def test_a_seed_a_prompt_makes_it_independent_of_the_batch(compiled: Compiled, prompts: list[list[int]]) -> None:
    batch = prompts[3:7]
    together = compiled.generate(batch, 24, seed=[5, 6, 7, 8], **SAMPLING)
    assert compiled.generate(batch[2:3], 24, seed=[7], **SAMPLING) == together[2:3]
    assert compiled.generate(batch[::-1], 24, seed=[8, 7, 6, 5], **SAMPLING) == together[::-1]
    assert compiled.generate(batch[2:3], 24, seed=3, **SAMPLING) == compiled.generate(batch, 24, seed=3, **SAMPLING)[2:3]


def test_sampling_follows_the_probabilities(compiled: Compiled, prompts: list[list[int]]) -> None:
    """A hundred first tokens of one prompt: those of top-k alone, and the likeliest most often."""
    prompt = prompts[12]
    zero, last = np.zeros(1, np.int64), np.array([len(prompt) - 1])
    logits = compiled.default_session("prefill", ids=np.array([prompt]), start=zero, last=last)["logits"][0]
    best = np.argsort(-logits)[:3]
    drawn = [row[0] for row in compiled.generate([prompt] * 100, 1, temperature=1.0, top_k=3, seed=list(range(100)))]
    odds = np.exp(logits[best].astype(np.float64) - logits.max())
    counts = np.array([drawn.count(token) for token in best])
    assert counts.sum() == 100
    assert np.abs(counts / 100 - odds / odds.sum()).max() < 0.15


# ---- refusals before anything runs ---------------------------------------------------------------------------------


def test_a_generation_that_does_not_fit_is_refused(compiled: Compiled, prompts: list[list[int]]) -> None:
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected .* within the 256 positions.*compile with a larger"):
        compiled.generate(prompts[-1:], 158)
    assert len(compiled.generate(prompts[-1:], 157)[0]) == 157
    with pytest.raises(ValueError, match=r"prompts\[0\]: expected token ids from 0 to 4095"):
        compiled.generate([[4096]], 1)


@pytest.mark.parametrize(
    "change",
    [{"start": np.array([251])}, {"start": np.array([-1])}, {"last": np.array([6])}, {"last": np.array([-1])}],
    ids=str,
)
def test_positions_outside_the_cache_are_refused(compiled: Compiled, change: dict[str, Array]) -> None:
    inputs = {"ids": np.zeros((1, 6), np.int64), "start": np.array([250]), "last": np.array([5])}
    compiled.default_session("prefill", **inputs)
    with pytest.raises(ValueError, match=rf"prefill\({next(iter(change))}\): expected"):
        compiled.default_session("prefill", **(inputs | change))


def test_weights_are_the_saved_ones(compiled_bf16: Compiled) -> None:
    """No detour through another type: the table of the artifact is the checkpoint's, bit by bit."""
    from safetensors import safe_open

    name = "model.embed_tokens.weight"
    with safe_open(FOLDER / "model.safetensors", "pt") as file:
        want = file.get_tensor(name).view(torch.int16).numpy().view(ml_dtypes.bfloat16)
    with safe_open(compiled_bf16.path / "weights.safetensors", "pt") as file:
        tables = [file.get_tensor(key) for key in file.keys()]  # noqa: SIM118
    same = [t for t in tables if t.dtype == torch.bfloat16 and tuple(t.shape) == want.shape]
    assert any((t.view(torch.int16).numpy().view(ml_dtypes.bfloat16) == want).all() for t in same)
