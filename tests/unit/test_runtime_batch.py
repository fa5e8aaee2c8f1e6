"""Sequences that join and leave over the toy model, with contiguous states, pages and rings: each gets the tokens that it
gets alone, whatever the others do; pages are shared, copied on write and given back."""

from __future__ import annotations

import re
import threading

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tests.toy_artifact import CAPACITY, CHUNK, WINDOW, logits, save
from tilewright.runtime import Batch, InputError, OutOfPages, SessionError, generate, load
from tilewright.runtime.following import follow
from tilewright.runtime.sampling import Sampling

PAGE = 4
LAYOUTS = {"contiguous": {}, "paged": {"page": PAGE}, "ring": {"ring": True}}
LONG = [5, 3, 1, 2, 2, 0, 7, 9, 1, 1, 4]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("batch")


@pytest.fixture(scope="module")
def programs(folder):
    return {name: load(save(folder / name, **how), threads=1) for name, how in LAYOUTS.items()}


@pytest.fixture
def paged(programs):
    with programs["paged"].session(batch=4) as session:
        yield session


def refused(message):
    """An InputError that says so."""
    return pytest.raises(InputError, match=re.escape(message))


def greedy(prompt, count, window=CAPACITY):
    tokens = list(prompt)
    for _ in range(count):
        tokens.append(int(np.argmax(logits(tokens, window))))
    return tokens[len(prompt):]


def run(batch, made=None):
    """All tokens of the sequences of a batch, by id, to the end."""
    made = {} if made is None else made
    while batch.pending or batch.running:
        for identity, event in batch.step().items():
            assert event.error is None
            made.setdefault(identity, []).append(event.token)
    return made


STEPS = st.lists(st.one_of(
    st.tuples(st.just("add"), st.lists(st.integers(0, 2), min_size=1, max_size=11), st.integers(1, 9)),
    st.tuples(st.just("fork"), st.integers(0, 5), st.integers(0, 9)),
    st.tuples(st.just("remove"), st.integers(0, 5), st.just(0)),
    st.tuples(st.just("step"), st.just(0), st.just(0)),
), max_size=25)  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
@settings(max_examples=60)
@given(steps=STEPS, chunk=st.sampled_from([1, 3, 4, 16]), share=st.booleans())
def test_each_gets_the_tokens_that_it_gets_alone(programs, layout, steps, chunk, share):
    """Sequences join, fork and leave at random steps."""
    with programs[layout].session(batch=3) as session:
        prompts, made, alive = {}, {}, []
        with Batch(session, chunk, share) as batch:
            for what, value, number in steps:
                ids = sorted(made)
                if what == "add":
                    identity = batch.add(value, number)
                    prompts[identity], made[identity] = (value, number), []
                    alive.append(identity)
                elif what == "fork" and batch.running and len(batch.running) < 3 and not batch.pending:
                    parent = sorted(batch.running)[value % len(batch.running)]
                    identity = batch.fork(parent)
                    prompts[identity], made[identity] = prompts[parent], list(made[parent])
                elif what == "remove" and ids:
                    identity = ids[value % len(ids)]
                    ended = len(made[identity]) == prompts[identity][1]
                    if not ended and identity in prompts:
                        batch.remove(identity)
                        del prompts[identity], made[identity]
                elif what == "step":
                    for identity, event in batch.step().items():
                        made[identity].append(event.token)
            run(batch, made)
        window = WINDOW if layout == "ring" else CAPACITY
        assert made == {identity: greedy(prompt, count, window) for identity, (prompt, count) in prompts.items()}
        if session.pages is not None:
            assert session.pages.available == session.pages.count


@pytest.mark.parametrize("layout", LAYOUTS)
def test_generate_is_the_same_over_all_layouts(programs, layout):
    prompts = [[3], LONG, [8, 9, 7], LONG[:6]]
    window = WINDOW if layout == "ring" else CAPACITY
    with programs[layout].session(batch=4) as session:
        for chunk in (1, 3, 500):
            assert generate(session, prompts, 6, chunk=chunk) == [greedy(prompt, 6, window) for prompt in prompts]


def test_rings_have_no_end(programs):
    with programs["ring"].session(batch=2) as session:
        before = session.memory["states"]
        [made] = generate(session, [LONG], 400)
        assert made == greedy(LONG, 400, WINDOW)
        assert session.memory["states"] == 2 * 4 * (WINDOW + CHUNK) * 2 > before == 0
    assert generate(session_of(programs["ring"]), [LONG * 20], 3, chunk=500) == [greedy(LONG * 20, 3, WINDOW)]


def session_of(program, **options):
    return program.session(**options)


def test_samples_of_a_prompt(programs):
    for program in programs.values():
        with program.session(batch=4) as session:
            hot = {"temperature": 5.0}
            assert generate(session, [LONG, [1]], 5, n=2, **hot) == generate(session, [LONG, LONG, [1], [1]], 5, **hot)
            assert len({tuple(tokens) for tokens in generate(session, [LONG], 6, n=4, **hot)}) == 4


def test_samples_share_the_pages_of_their_prompt(paged):
    """11 tokens are 2 full pages and a part: 4 sequences hold these two, and a page each."""
    with Batch(paged) as batch:
        [one] = batch.add_samples(*request(LONG, 6, 1))
        batch.step()
        twins = [batch.fork(one, seed) for seed in (1, 2, 3)]
        assert paged.pages.count - paged.pages.available == 3
        batch.step()
        assert paged.pages.count - paged.pages.available == 2 + 4
        assert [batch.running[i].made[0] for i in (one, *twins)] == [batch.running[one].made[0]] * 4


def request(prompt, count, n):
    from tilewright.runtime.sampling import generators
    from tilewright.runtime.sequences import Options

    row = np.array(prompt, np.int64)
    return row, Options.of(count), generators([row] * n, 0)


def test_a_prompt_that_begins_alike_is_found(paged):
    assert generate(paged, [LONG], 3) == [greedy(LONG, 3)]
    before = paged.pages.reused
    other = [*LONG[:9], 0, 0, 0]
    assert generate(paged, [other], 3) == [greedy(other, 3)]
    assert paged.pages.reused - before == 8
    assert generate(paged, [LONG[:8]], 3) == [greedy(LONG[:8], 3)]  # the last token is computed for its logits
    assert paged.pages.reused - before == 8 + 4
    assert generate(paged, [LONG], 3, share=False) == [greedy(LONG, 3)]
    assert paged.pages.reused - before == 8 + 4
    paged.reset()
    assert generate(paged, [other], 3) == [greedy(other, 3)]
    assert paged.pages.reused == 0


def test_those_that_begin_alike_are_neighbours_in_a_call(paged, monkeypatch):
    """Whatever the order in which they came."""
    prompts = [[*(LONG[:8] if i % 2 else LONG[8::-1]), i] for i in range(4)]
    tables = []
    run_call = paged._run

    def spy(call):
        if call.entry == "decode":
            tables.append(call.inputs["table"].copy())
        run_call(call)

    monkeypatch.setattr(paged, "_run", spy)
    assert generate(paged, prompts, 4) == [greedy(prompt, 4) for prompt in prompts]
    first = tables[-1][:, 0].tolist()
    assert first == sorted(first)
    assert len(set(first)) == 2


@pytest.mark.parametrize("chunk", [1, 3, 500])
def test_prompts_that_come_together_share_too(programs, chunk):
    """The second waits until the first has written what both begin with."""
    prompts = [LONG, [*LONG[:10], 8], LONG[:9]]
    with programs["paged"].session(batch=3, pages=5) as session:
        assert generate(session, prompts, 2, chunk=chunk) == [greedy(prompt, 2) for prompt in prompts]
        assert session.pages.reused == 16
        with refused("within 5 pages of 4 tokens, got 3 sequences that may take 9 pages; make the session with pages=9"):
            generate(session, prompts, 2, share=False)


def test_generate_refuses_what_may_not_fit(programs):
    with programs["paged"].session(batch=4, pages=4) as session:
        assert generate(session, [LONG], 6) == [greedy(LONG, 6)]
        with refused("prompts[0]: expected prompt and new tokens within 4 pages of 4 tokens, got 11 prompt tokens + 7 new "
                     "ones, which takes 17; make the session with pages=5 or more"):  # fmt: skip
            generate(session, [LONG], 7)
        with refused("prompts and new tokens within 4 pages of 4 tokens, got 2 sequences that may take 6 pages"):
            generate(session, [LONG, [1]], 6)
        with refused("4 sequences that may take 6 pages"):
            generate(session, [LONG], 2, n=4)
        assert generate(session, [LONG], 2, n=2) == [greedy(LONG, 2)] * 2


def test_out_of_pages_ends_that_sequence_alone(programs):
    """Three pages for two sequences: the second finds none for its fifth token."""
    with programs["paged"].session(batch=2, pages=3) as session, Batch(session) as batch:
        first, second = batch.add(LONG[:6], 6), batch.add([1, 2, 3], 9)
        made = {first: [], second: []}
        events = {}
        while batch.running or batch.pending:
            for identity, event in batch.step().items():
                events[identity] = event
                made[identity] += [event.token] if event.token is not None else []
        assert (events[first].ended, made[first]) == ("length", greedy(LONG[:6], 6))
        assert events[second].ended == "failed"
        assert isinstance(events[second].error, OutOfPages)
        assert "needs 1 more pages of 4 tokens, and of 3 0 are free" in str(events[second].error)
        assert made[second] == greedy([1, 2, 3], 9)[:len(made[second])]
        assert session.pages.available == 3


def test_a_prompt_waits_for_pages_and_rows(programs):
    with programs["paged"].session(batch=2, pages=4) as session, Batch(session) as batch:
        first, second, third = batch.add(LONG, 2), batch.add(LONG[::-1], 3), batch.add([1], 1)
        events = batch.step()
        assert list(events) == [first]
        assert run(batch, {first: [events[first].token]}) == {
            first: greedy(LONG, 2), second: greedy(LONG[::-1], 3), third: greedy([1], 1)
        }  # fmt: skip


def test_a_sequence_with_bad_logits_fails_alone(paged, monkeypatch):
    with Batch(paged) as batch:
        good, bad = batch.add([1, 2], 4), batch.add([3, 4], 4)
        batch.step()
        monkeypatch.setattr(batch._running[bad].sampler, "choose", lambda logits, random: broken(paged, logits))
        events = batch.step()
        assert (events[good].ended, events[bad].ended) == ("", "failed")
        assert "NaN" in str(events[bad].error)
        assert list(batch.running) == [good]


def broken(session, logits):
    return session.sampler(Sampling()).choose(logits * np.nan, np.random.default_rng(0))


def test_what_each_way_to_end_says(paged):
    with Batch(paged) as batch:
        want = greedy(LONG, 3)
        stop, length = batch.add(LONG, 5, stop_tokens=[want[0]]), batch.add(LONG, 1)
        found = {}
        while batch.pending or batch.running:
            found |= batch.step()
        assert {key: (event.token, event.ended) for key, event in found.items()} == {
            stop: (want[0], "stop"), length: (want[0], "length")
        }  # fmt: skip
    assert paged.pages.reused == 8


def test_wrong_ids_and_closed_batches(paged):
    with Batch(paged) as batch:
        one = batch.add([1], 3)
        batch.step()
        with refused("id: expected one of the sequences [0], got 7"):
            batch.remove(7)
        batch.remove(one)
        with refused("one of the sequences [], got 0"):
            batch.fork(one)
        ids = [batch.add([1], 3) for _ in range(4)]
        batch.step()
        with refused("fork: expected at most 4 sequences, the session's batch, got one more"):
            batch.fork(ids[0])
        with refused("prompt: expected token ids from 0 to 23"):
            batch.add([99], 3)
        with refused("within the 20 positions"):
            batch.add([1], 21)
        with pytest.raises(SessionError, match="has not ended on this session"):
            generate(paged, [[1]], 2)
    assert paged.pages.available == paged.pages.count
    for call in (batch.step, lambda: batch.add([1], 2), lambda: batch.fork(0)):
        with pytest.raises(SessionError, match="the batch is closed"):
            call()
    batch.close()
    assert generate(paged, [[1]], 2) == [greedy([1], 2)]


def test_several_threads_add_to_one_batch(paged):
    ids = {}
    with Batch(paged) as batch:
        def add(index):
            ids[index] = batch.add([index, 1, 2, 3, 4, index], 6)

        threads = [threading.Thread(target=add, args=(index,)) for index in range(8)]
        made = {}
        for thread in threads:
            thread.start()
        while len(made) < 8 or batch.pending or batch.running:
            for identity, event in batch.step().items():
                made.setdefault(identity, []).append(event.token)
        for thread in threads:
            thread.join()
    assert {index: made[identity] for index, identity in ids.items()} == {
        index: greedy([index, 1, 2, 3, 4, index], 6) for index in range(8)
    }


@pytest.mark.parametrize("left", [False, True])
def test_padded_prompts(paged, left):
    prompts = [LONG, LONG[:3], [4]]
    ids, mask = np.full((3, 11), 23), np.zeros((3, 11), int)
    for row, prompt in enumerate(prompts):
        at = slice(11 - len(prompt), 11) if left else slice(0, len(prompt))
        ids[row, at], mask[row, at] = prompt, 1
    assert generate(paged, ids, 4, attention_mask=mask) == [greedy(prompt, 4) for prompt in prompts]
    mask[1] = [1] + [0] * 9 + [1]
    with refused("attention_mask[1]: expected tokens side by side"):
        generate(paged, ids, 4, attention_mask=mask)
    with refused("attention_mask: expected the shape of the prompts, [3, 11], got [3, 1]"):
        generate(paged, ids, 4, attention_mask=mask[:, :1])
    with refused("prompts[2]: expected a list of at least one token id"):
        generate(paged, ids, 4, attention_mask=mask * [[1] * 11, [0] * 10 + [1], [0] * 11])


SIZES = {"contiguous": (0, 160), "paged": (32, 0), "ring": (0, 72)}


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize(("tokens", "sequences"), [(1, 1), (4, 2), (5, 3), (20, 4)])
def test_bytes_by_arithmetic_are_those_held(programs, layout, tokens, sequences):
    program, (of_page, of_sequence) = programs[layout], SIZES[layout]
    pages = -(-tokens // PAGE) * sequences
    need = program.cache_bytes(tokens, sequences)
    assert need == (pages + 1) * of_page + sequences * of_sequence
    with program.session(batch=sequences, memory=need) as session:
        if session.pages is not None:
            assert session.pages.count == pages
        session.generate([[1] * tokens] * sequences, 1, share=False)
        assert session.memory["states"] == need


def test_wrong_sizes(programs):
    with refused("tokens: expected at most 20, the positions of the KV states, got 21"):
        programs["paged"].cache_bytes(21)
    with refused("sequences: expected an integer >= 1, got 0"):
        programs["paged"].cache_bytes(1, 0)
    with refused("memory: expected at least 64 bytes, what 2 sequences need at the least, got 63"):
        programs["paged"].session(batch=2, memory=63)
    with refused("memory: expected at least 320 bytes, what 2 sequences need at the least, got 319"):
        programs["contiguous"].session(batch=2, memory=319)
    with refused("pages: expected none, since the program's KV states have no pages, got 3"):
        programs["ring"].session(pages=3)
    with refused("either pages or memory"):
        programs["paged"].session(pages=3, memory=1000)
    with refused("pages: expected an integer >= 1, got 0"):
        programs["paged"].session(pages=0)


def test_tables_are_checked(programs):
    with programs["paged"].session(batch=1, pages=3) as session:
        call = {"ids": [[1]], "start": [4]}
        assert session("decode", **call, table=[[1, 3]])["logits"].shape == (1, 24)
        with refused("decode(table): expected pages in 0..3, those of the session, got pages in 1..4"):
            session("decode", **call, table=[[1, 4]])
        with refused("decode(table): expected tables for 5 tokens, 2 pages of 4, got 1 pages"):
            session("decode", **call, table=[[1]])


@pytest.mark.parametrize(("layout", "message"), [
    ({"page": 4}, "chunks from one token on, for KV states of this layout, got chunks of at least 5"),
    ({"ring": True}, "chunks of at most 4, what KV states take at once, got chunks of at least 5"),
])  # fmt: skip
def test_chunks_that_a_layout_cannot_take(folder, layout, message):
    program = load(save(folder / f"fixed-{'-'.join(layout)}", chunk=(5, 5), **layout))
    with program.session() as session, refused(message):
        generate(session, [[1]], 2)


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("first", [1, 4, 11])
def test_following_texts(programs, layout, first):
    """The logits after each token of given texts, from the first ones on."""
    texts = np.array([[*LONG, 6], [*LONG[::-1], 2]])
    window = WINDOW if layout == "ring" else CAPACITY
    with programs[layout].session(batch=2) as session:
        found = np.stack(list(follow(session, texts, first, chunk=3)))
        want = [[logits(row[:end].tolist(), window) for row in texts] for end in range(first, 12)]
        assert np.array_equal(found, want)
        assert session.pages is None or session.pages.available == session.pages.count
        assert generate(session, [LONG], 2) == [greedy(LONG, 2, window)]


def test_texts_that_cannot_be_followed(paged):
    with refused("ids: expected texts [B, S] of more than 3 tokens, got shape [1, 3]"):
        follow(paged, np.ones((1, 3), int), 3)
    with refused("ids[0]: expected prompt and new tokens within the 20 positions"):
        follow(paged, np.ones((1, 22), int), 3)
    with refused("prompts: expected at most 4, what the program was compiled for, got 5"):
        follow(paged, np.ones((5, 4), int), 3)
