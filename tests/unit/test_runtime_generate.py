"""Generation over the toy model: padding, chunks and batches change no token; streams, stops and limits."""

from __future__ import annotations

import dataclasses
import threading

import numpy as np
import pytest

from tests.toy_artifact import CAPACITY, logits, manifest, save
from tilewright.runtime import InputError, SessionError, generate, load, stream
from tilewright.runtime.artifact import ArtifactWriter

PROMPTS = [[3], [1, 4, 1, 5, 9, 2, 6, 5, 3, 5], [8, 9, 7], [3, 2, 3, 8, 4, 6, 2]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("generate")


@pytest.fixture(scope="module", params=[0, 4], ids=["contiguous", "paged"])
def program(folder, request):
    return load(save(folder / f"toy-{request.param}", page=request.param), threads=1)


@pytest.fixture(scope="module")
def session(program):
    with program.session(batch=4) as session:
        yield session


def greedy(prompt, count):
    """The definition: all tokens before, the most likely next one."""
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logits(tokens))))
    return tokens[len(prompt) :]


def test_greedy_is_the_definition(session):
    assert generate(session, PROMPTS, 8) == [greedy(prompt, 8) for prompt in PROMPTS]
    assert session.generate(PROMPTS, 8) == generate(session, PROMPTS, 8)


@pytest.mark.parametrize("chunk", [1, 2, 3, 4, 9, 10, 16, 500])
def test_chunks_change_nothing(session, chunk):
    assert generate(session, PROMPTS, 5, chunk=chunk) == [greedy(prompt, 5) for prompt in PROMPTS]


SHAPES = [((1, 16), (1, 4)), ((2, 16), (1, 4)), ((3, 4), (1, 4)), ((4, 4), (1, 4)), ((7, 7), (4, 4)), ((1, 3), (2, 4)),
          ((20, 20), (3, 4))]  # fmt: skip


@pytest.mark.parametrize(("chunk", "batch"), SHAPES)
def test_programs_with_narrow_or_fixed_dims(folder, chunk, batch):
    program = load(save(folder / f"{chunk}-{batch}", chunk=chunk, batch=batch))
    with program.session(threads=1, batch=4) as session:
        for size in (1, 3, 16):
            assert generate(session, PROMPTS, 5, chunk=size) == [greedy(prompt, 5) for prompt in PROMPTS]
        for prompt in PROMPTS:
            assert generate(session, [prompt], 5) == [greedy(prompt, 5)]


WAYS = [{}, {"temperature": 1.0}, {"temperature": 0.8, "top_k": 5, "top_p": 0.9, "seed": 3}]


def test_fixed_chunks_reach_the_last_position(folder):
    """Capacity 20 is no multiple of 7: the last chunk begins earlier."""
    prompt = [int(t) for t in np.random.default_rng(1).integers(0, 24, CAPACITY)]
    with load(save(folder / "seven", chunk=(7, 7))).session(threads=1, batch=2) as session:
        assert generate(session, [prompt, prompt[:15]], 1) == [greedy(prompt, 1), greedy(prompt[:15], 1)]


@pytest.mark.parametrize("options", WAYS)
def test_ragged_equals_one_by_one(session, options):
    together = generate(session, PROMPTS, 6, **options)
    assert together == [generate(session, [prompt], 6, **options)[0] for prompt in PROMPTS]
    assert together[::-1] == generate(session, PROMPTS[::-1], 6, **options)


def test_seeds(session):
    hot = {"temperature": 5.0}
    assert generate(session, PROMPTS, 8, **hot) == generate(session, PROMPTS, 8, **hot, seed=0)
    assert generate(session, PROMPTS, 8, **hot) != generate(session, PROMPTS, 8, **hot, seed=1)
    first, second, third = generate(session, [PROMPTS[0]] * 3, 8, **hot)
    assert first != second != third != first
    (alone,) = generate(session, [PROMPTS[0]], 8, **hot, seed=[4])
    assert generate(session, [PROMPTS[0]] * 2, 8, **hot, seed=[4, 4]) == [alone, alone]


def test_sampled_tokens_follow_the_definition(session):
    """top_k=1 is greedy; a top_p that only the best token reaches is too."""
    want = [greedy(prompt, 6) for prompt in PROMPTS]
    assert generate(session, PROMPTS, 6, temperature=1.0, top_k=1) == want
    assert generate(session, PROMPTS, 6, temperature=1.0, top_p=1e-9) == want


def test_stream_equals_batch(session):
    steps = list(stream(session, PROMPTS, 7, temperature=1.0, seed=5))
    assert [step for step, _ in steps] == list(range(7))
    assert [list(tokens) for tokens in zip(*(tokens for _, tokens in steps))] == generate(
        session, PROMPTS, 7, temperature=1.0, seed=5
    )


def test_callback_gets_what_the_stream_yields(session):
    seen = []
    generate(session, PROMPTS, 4, callback=lambda step, tokens: seen.append((step, tokens)))
    assert seen == list(session.stream(PROMPTS, 4))


def test_raising_callback_gives_the_session_back(session):
    def refuse(step, tokens):
        raise ValueError("enough")

    try:
        generate(session, PROMPTS, 4, callback=refuse)
    except ValueError:
        assert generate(session, PROMPTS, 4) == [greedy(prompt, 4) for prompt in PROMPTS]
    else:
        pytest.fail("the callback's error was lost")


def test_stop_tokens_end_each_sequence_on_its_own(session):
    free = [greedy(prompt, 10) for prompt in PROMPTS]
    stops = [free[0][2], free[2][5]]
    want = [tokens[: 1 + min((tokens.index(s) for s in stops if s in tokens), default=9)] for tokens in free]
    assert len({len(tokens) for tokens in want}) > 1
    assert generate(session, PROMPTS, 10, stop_tokens=stops) == want
    steps = list(stream(session, PROMPTS, 10, stop_tokens=stops))
    assert len(steps) == max(map(len, want))
    for prompt, tokens in enumerate(want):
        column = [row[prompt] for _, row in steps]
        assert column == tokens + [None] * (len(steps) - len(tokens))


def test_stop_sequences(session):
    free = greedy(PROMPTS[1], 10)
    assert generate(session, [PROMPTS[1]], 10, stop_sequences=[free[3:6], [99, 98]]) == [free[:6]]
    assert generate(session, [PROMPTS[1]], 10, stop_sequences=[free[3:6][::-1] * 2]) == [free]


def test_ended_sequences_disturb_nobody(session):
    """The longest prompt, whose row is the first, ends at once; the others go on."""
    free = [greedy(prompt, 10) for prompt in PROMPTS]
    for ender in range(4):
        stop = [free[ender][0]]
        want = [t[: t.index(stop[0]) + 1] if stop[0] in t else t for t in free]
        assert generate(session, PROMPTS, 10, stop_tokens=stop) == want


def test_capacity_is_used_to_the_last_position(session):
    prompt = [int(t) for t in np.random.default_rng(0).integers(0, 24, CAPACITY)]
    assert generate(session, [prompt], 1) == [greedy(prompt, 1)]
    assert generate(session, [prompt[:10], prompt[:15]], 6) == [greedy(prompt[:10], 6), greedy(prompt[:15], 6)]
    assert generate(session, [[1]], CAPACITY) == [greedy([1], CAPACITY)]


@pytest.mark.parametrize(("index", "length", "new"), [(0, 20, 2), (1, 20, 2), (1, 21, 1), (0, 1, 21), (0, 3, 500)])
def test_overflow_is_refused_before_anything_runs(program, index, length, new):
    with program.session(batch=2) as session:
        with pytest.raises(InputError, match="expected prompt and new tokens within the 20 positions") as caught:
            generate(session, [[1]] * index + [[1] * length], new)
        assert session.memory["states"] == 0
    assert caught.value.argument == f"prompts[{index}]"


WRONG = [
    ([], {}, "prompts: expected at least one list"),
    ([[]], {}, r"prompts\[0\]: expected a list of at least one token id"),
    ([[1], [1.5]], {}, r"prompts\[1\]: expected a list of .* one token id, got list of shape \[1\] and dtype float64"),
    ([[1], [[2]]], {}, r"prompts\[1\]: .*shape \[1, 1\]"),
    ([[1], [24]], {}, r"prompts\[1\]: expected token ids from 0 to 23, got 24 to 24; use the tokenizer"),
    ([[-1]], {}, r"prompts\[0\]: expected token ids from 0 to 23"),
    ([[1]] * 4, {}, "prompts: expected at most 3, the session's batch, got 4; make the session with batch=4"),
    ([[1]] * 5, {}, "prompts: expected at most 4, what the program was compiled for, got 5; give fewer"),
    ([[1]], {"max_new_tokens": 0}, "max_new_tokens: expected an integer >= 1, got 0"),
    ([[1]], {"max_new_tokens": 2.0}, "max_new_tokens"),
    ([[1]], {"chunk": 0}, "chunk: expected an integer >= 1"),
    ([[1]], {"temperature": -1}, "temperature"),
    ([[1]], {"stop_sequences": [[]]}, "stop_sequences: expected sequences of at least one token"),
    ([[1]], {"seed": [1, 2]}, "seed: expected one integer, or one for each of the 1 prompts"),
]


@pytest.mark.parametrize(("prompts", "options", "message"), WRONG)
def test_wrong_arguments_are_refused_by_the_call(program, prompts, options, message):
    with program.session(batch=3) as session, pytest.raises(InputError, match=message):
        stream(session, prompts, **{"max_new_tokens": 3, **options})


def test_arrays_are_prompts_too(session):
    prompts = np.array([[1, 2, 3], [4, 5, 6]], np.int32)
    assert generate(session, prompts, 4) == [greedy(row.tolist(), 4) for row in prompts]


def test_two_generations_in_one_thread_are_refused(session):
    first = stream(session, PROMPTS, 5)
    next(first)
    with pytest.raises(SessionError, match="has not ended on this session; close its iterator"):
        generate(session, PROMPTS, 5)
    first.close()
    assert generate(session, PROMPTS, 5) == [greedy(prompt, 5) for prompt in PROMPTS]


def test_generations_of_several_threads_take_turns(session):
    results = {}

    def run(index):
        results[index] = generate(session, [PROMPTS[index]], 8)

    threads = [threading.Thread(target=run, args=(index,)) for index in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results == {index: [greedy(prompt, 8)] for index, prompt in enumerate(PROMPTS)}


def test_program_without_generation_entries(folder, program):
    with ArtifactWriter(folder / "plain") as writer:
        for name in ("kernels.so", "weights.safetensors"):
            writer.copy(name, program.path / name)
        entries = {"scale": manifest().entries["scale"]}
        writer.commit(dataclasses.replace(manifest(), entries=entries, states=()))
    message = r"a program with the entry 'prefill', got \['scale'\]; compile .*kv-layout"
    with load(folder / "plain").session() as session, pytest.raises(InputError, match=message):
        generate(session, PROMPTS, 4)
