"""What is compared of KV caches: rows in sections, each with a table of its own and what it is to show."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

from benchmarks.quality.caches import (
    CACHE_ROWS,
    FIFTH,
    FORMATS,
    KEPT,
    LATELY,
    MIXED,
    MODELS,
    POLICIES,
    PROMPTS,
    PRUNED,
    RECALL,
    SELECTED,
    SHORT,
    STREAMS,
    WINDOW,
    CacheRow,
    kept,
    last,
    named,
)
from benchmarks.quality.caching import EVERY, SAMPLE, STRETCH
from benchmarks.quality.goals import Goal, better, within
from benchmarks.quality.passkey import KEYS, LENGTH, OTHER, SAID, TAUGHT
from benchmarks.quality.prompts import CALL, EACH
from benchmarks.quality.rows import BASE

Rows = Mapping[str, Mapping[str, Any]]
ROWS = CACHE_ROWS


@dataclass(frozen=True)
class Section:
    """Rows that belong together. ``line`` gives the cells of a row after its name."""

    title: str
    about: str
    header: tuple[str, ...]
    rows: tuple[CacheRow, ...]
    line: Callable[[Mapping[str, Any], str, Rows], list[str]]
    goals: tuple[Goal, ...] = ()

    def table(self, rows: Rows) -> list[str]:
        """In Markdown; one for each model."""
        shown = []
        for name, model in MODELS.items():
            own = [r for r in self.rows if r.name in rows and r.model == name]
            head = [f"| {model.about} | {' | '.join(self.header)} |", "|---" * (1 + len(self.header)) + "|"]
            shown += [*head, *(self.row(r.name, model.prefix, rows) for r in own), ""] if own else []
        return shown

    def row(self, name: str, prefix: str, rows: Rows) -> str:
        found = rows[name]
        cells = [f"not run: {found['error']}"] if "error" in found else self.line(found, prefix, rows)
        return f"| {' | '.join([name.removeprefix(prefix), *cells, *[''] * (len(self.header) - len(cells))])} |"


def scored(row: Mapping[str, Any], prefix: str, rows: Rows) -> list[str]:
    """Cells of a row of text."""
    base = rows.get(f"{prefix}{BASE}{named(row.get('row', {}).get('window') or WINDOW)}", {}).get("perplexity")
    change = "" if base is None else f"{row['perplexity'] / base - 1:+.2%}"
    figures = [f"{row['perplexity']:.3f}", change, f"{row['kl_mean']:.5f}", f"{row['kl_p99']:.4f}", f"{row['top1']:.2%}"]
    return [f"{row['bytes']:,}", *figures]


SCORED = ("bytes", "perplexity", "change", "KL, mean", "KL, 99 %", "same top token")


def prompted(row: Mapping[str, Any], prefix: str, rows: Rows) -> list[str]:
    """Cells of a row of prompts."""
    base = rows.get(f"{prefix}all blocks", {}).get("perplexity")
    change = "" if base is None else f"{row['perplexity'] / base - 1:+.2%}"
    figures = [f"{row['perplexity']:.3f}", change, f"{row['kl_mean']:.5f}", f"{row['kl_p99']:.4f}", f"{row['top1']:.2%}"]
    heads = ", ".join(line.partition(": ")[2] for line in row["patterns"])
    return [f"{row['blocks']:.0%}", *figures, heads]


def streamed(row: Mapping[str, Any], prefix: str, rows: Rows) -> list[str]:
    """Cells of a row of one long text."""
    early, late = row.get("bytes", (None, None))
    held = "" if early is None else f"{early:,}" if early == late else f"{early:,} to {late:,}"
    halves = ["" if n is None else f"{n:.3f}" for n in row["sampled"]]
    return [held, *halves, " ".join(f"{n:.2f}" for n in row["thousands"])]


def far_better(text: str, new: str, old: str) -> Goal:
    """``new`` has at most half of the perplexity of ``old``."""

    def shows(rows: Rows) -> str:
        return "; ".join(f"{n}: NLL {rows[n]['nll']:.3f}" for n in (new, old))

    return Goal(text, (new, old), lambda r: r[new]["perplexity"] <= r[old]["perplexity"] / 2, shows)


def stable(text: str, name: str, against: str) -> Goal:
    """Bytes stay, and the distance to ``against`` is in the second half of the text at most 0.05 more than in the first."""

    def gaps(rows: Rows) -> list[float]:
        return [a - b for a, b in zip(rows[name]["sampled"], rows[against]["sampled"])]

    def holds(rows: Rows) -> bool:
        first, second = gaps(rows)
        return rows[name]["bytes"][0] == rows[name]["bytes"][1] and second <= first + 0.05

    def shows(rows: Rows) -> str:
        first, second = gaps(rows)
        held = rows[name]["bytes"][1]
        return f"{held:,} bytes; {first:+.3f} nats to recomputation in the first half, {second:+.3f} in the second"

    return Goal(text, (name, against), holds, shows)


def for_each(make: Callable[[str, str], Goal]) -> tuple[Goal, ...]:
    """A goal for each model: ``make(prefix, what to say)``."""
    return tuple(make(model.prefix, f"{model.about}: ") for model in MODELS.values())


def parks(text: str, name: str) -> Goal:
    """The first token gets at least a tenth of the attention."""

    def shows(rows: Rows) -> str:
        found = rows[name]
        return f"{found['first']:.2%} in the mean of heads, {found['most']:.2%} at most (all alike: {found['even']:.2%})"

    return Goal(text, (name,), lambda r: r[name]["first"] >= 0.1, shows)


def sinks_better(size: int, prefix: str, say: str) -> Goal:
    text = f"{say}sinks far better than a window of {size} alone"
    return far_better(text, f"{prefix}4 sinks + window {size - 4}", f"{prefix}window {size}")


def sinks_stable(size: int, prefix: str, say: str) -> Goal:
    text = f"{say}sinks and a window, {size} in all, stable over 20,000 tokens"
    return stable(text, f"{prefix}4 sinks + window {size - 4}", f"{prefix}window {size}, recomputed")


def policy_better(policy: str, options: str, size: int, prefix: str, say: str) -> Goal:
    how = ", ".join(filter(None, (policy, options)))
    text = f"{say}{how} better than a window of the same size{named(size)}"
    return better(text, prefix + kept(policy, options, size).name, prefix + last(size).name)


FORMAT_GOALS = (
    *for_each(lambda p, say: within(f"{say}i8 within 0.1 % of bf16", f"{p}i8", 0.001, p + BASE)),
    *for_each(lambda p, say: within(f"{say}i4 within 1 % of bf16", f"{p}i4", 0.01, p + BASE)),
    *for_each(lambda p, say: better(f"{say}2-bit KIVI better than 2 bits by token, as many recent tokens",
                                    f"{p}i2, keys by channel, recent 128", f"{p}i2, recent 128")),
    *for_each(lambda p, say: better(f"{say}2-bit KIVI better than 2 bits by token alone",
                                    f"{p}i2, keys by channel, recent 32", f"{p}i2")),
    *(goal for recent in (32, 128)
      for goal in for_each(lambda p, say, kivi=f"i2, keys by channel, recent {recent}": better(
          f"{say}2-bit GEAR better than KIVI, {kivi.split()[-1]} recent tokens", f"{p}{kivi}, rank=2", f"{p}{kivi}"))),
)  # fmt: skip
STREAM_GOALS = (
    *for_each(lambda p, say: parks(f"{say}has sinks, a tenth of attention or more goes to the first token",
                                   f"{p}attention on the first token")),
    *for_each(lambda p, say: parks(f"{say}has sinks in texts of 64", f"{p}attention on the first token, texts of 64")),
    *(goal for size in (256, 64) for goal in for_each(partial(sinks_better, size))),
    *(goal for size in (256, 64) for goal in for_each(partial(sinks_stable, size))),
)  # fmt: skip


def retrieved(row: Mapping[str, Any], prefix: str, rows: Rows) -> list[str]:
    """Cells of a row of keys."""
    exact = [f"{row[name]:.1%}" if name in row else "" for name in ("exact", "exact_other")]
    return [f"{row['said']:.1%}", f"{row['right']:.1%}", f"{row['gain']:.4f}", *exact]


def finds(text: str, name: str) -> Goal:
    """Four times as many keys as chance finds."""
    return Goal(text, (name,), lambda r: r[name]["right"] >= 4 / KEYS, lambda r: f"{r[name]['right']:.1%}")


KEPT_GOALS = tuple(
    goal
    for size in (WINDOW, SHORT)
    for policy, options in (*((p, "") for p in POLICIES[:2]), ("h2o", LATELY))
    for goal in for_each(partial(policy_better, policy, options, size))
)
SELECT_GOALS = (
    *for_each(lambda p, say: within(f"{say}a quarter of pages within 2 % of bf16", f"{p}a quarter of pages of 16", 0.02,
                                    p + BASE)),
    *for_each(lambda p, say: better(f"{say}a quarter of pages better than a window of as many tokens",
                                    f"{p}a quarter of pages of 16", f"{p}window 128")),
)  # fmt: skip


def remembers(policy: str, prefix: str, say: str) -> Goal:
    """A gain of at least twice that of the window."""
    new, old = f"{prefix}{FIFTH} by {policy}", f"{prefix}window {FIFTH}"

    def shows(rows: Rows) -> str:
        return "; ".join(f"{n}: {rows[n]['gain']:.4f}" for n in (new, old))

    text = f"{say}{policy} gains at least twice as much as a window of the same size"
    return Goal(text, (new, old), lambda r: r[new]["gain"] >= 2 * r[old]["gain"], shows)


def says(text: str, name: str) -> Goal:
    """Nine of ten keys are said."""
    return Goal(text, (name,), lambda r: r[name]["exact"] >= 0.9, lambda r: f"{r[name]['exact']:.1%}")


KEY_GOALS = (
    says("the recall model: answers nine of ten keys exactly", f"{MODELS[RECALL].prefix}{BASE}"),
    *for_each(lambda p, say: finds(f"{say}{BASE} finds four times as many as chance", p + BASE)),
    *(goal for policy in POLICIES[:2] for goal in for_each(partial(remembers, policy))),
)
SECTIONS: tuple[Section, ...] = (
    Section(
        "Formats",
        "KL, and the token that is expected most, against a model without a cache in f32. `recent` tokens are bf16.",
        SCORED, FORMATS, scored, FORMAT_GOALS,
    ),
    Section(
        "Past the trained length",
        f"One text of 20,000 tokens. Of {EVERY} stretches of {STRETCH} tokens the last is scored, each token of it fed "
        "alone. `recomputed` is the upper bound: the window alone, from its first token on as if the text began there. NLL "
        "in nats: in either half of the text that of the same tokens in every row (each "
        f"{SAMPLE}th of the scored ones after the trained length), and that of all scored tokens by thousand.",
        ("bytes", "NLL, first half", "second half", "NLL by thousand"), STREAMS, streamed, STREAM_GOALS,
    ),
    Section(
        "A budget of tokens",
        f"After each call {FIFTH} tokens stay ({SHORT // 5} of texts of {SHORT}), a fifth of the text, for each head those "
        "that a policy thinks most of; half of them are the last ones if nothing else is said. A call has at most 64 "
        "tokens.",
        SCORED, KEPT, scored, KEPT_GOALS,
    ),
    Section(
        "Some of the pages",
        "Decoding reads a quarter of a sequence's pages, those that promise most to its query. All are stored.",
        SCORED, SELECTED, scored, SELECT_GOALS,
    ),
    Section(
        "Heads that stream",
        "`split-heads`, by random tokens that come twice: some heads keep 4 sinks and a window, 128 tokens together, the "
        "others all.",
        SCORED, MIXED, scored,
        for_each(lambda p, say: better(f"{say}half of the heads with a window better than all",
                                       f"{p}half of the heads stream", f"{p}window 128")),
    ),
    Section(
        "Fewer channels of keys",
        "`prune-keys` (ThinK), with channels chosen once, on calibration text. Heads have 32 channels.",
        SCORED, PRUNED, scored,
    ),
    Section(
        "Sparse prefill",
        f"Texts are fed as prompts, in calls of {CALL} tokens. Scored is each {EACH}th token of the second half, by what "
        "is said before it when the rest of its call is there too. All layers but the last go through chosen blocks, for "
        "this token and all before it; the last has one query, which sees all. Blocks: the share of those up to a query's "
        "own that is walked, in the second half of a text. Lists of so many tokens hold as many blocks; `auto` is told by "
        "2,048 tokens of calibration text which head of keys has which pattern. Change is that against all blocks.",
        ("blocks", "perplexity", "change", "KL, mean", "KL, 99 %", "same top token", "heads of keys"), PROMPTS, prompted,
    ),
    Section(
        "Keys in a text",
        f"{KEYS} texts of {LENGTH} tokens differ in a name alone, and end with a question for it; in four forms, the name "
        "after 10 % to 70 % of the text. Two of the models hardly ever answer: seldom is the name the likeliest token "
        "(said). But it gains from being there. Found is the share of texts whose own name gains most over the mean of the "
        f"{KEYS} texts (chance: {1 / KEYS:.1%}), gain is how much more likely, in nats, it gets than the other names. "
        "Errors of codes hide gains; names that were forgotten may be found by traces, whose gain is next to none. Exact: "
        f"a key of eight random letters and digits, {SAID} tokens, stands in the first three quarters of a text; the "
        f"share of {KEYS * len(TAUGHT)} texts at whose end the whole key is answered, told and asked for in "
        f"{len(TAUGHT)} forms that the recall model was taught with other keys and texts, and in {len(OTHER)} other forms.",
        ("said", "found", "gain", "exact", "other forms"), tuple(r for r in ROWS if r.task == "text"), retrieved,
        KEY_GOALS,
    ),
)  # fmt: skip


def page(results: Mapping[str, Any]) -> str:
    """``kv.json`` for people."""
    how, rows = results["settings"], results["rows"]
    lines = [
        "# KV caches",
        "",
        f"The evaluation model (`eval_lm.json`: {results['parameters']:,} parameters; weights {how['weights']}), the",
        f"small one of the tests (weights {how['small']}) and the recall model (`recall_lm.json`; weights",
        f"{how['recall']}), compiled, in f32 arithmetic, on held-out text, whose first token is END for the last.",
        f"Where nothing else is said: {how['tokens']:,} tokens in windows of {how['window']}, the last {how['stride']}",
        "of each scored, fed alone after the ones before it, so that all that is known of them has been read from the",
        f"cache. Bytes are those of a sequence of {how['window']} tokens, change is that of perplexity against a cache of",
        f"{BASE}.",
    ]
    for section in SECTIONS:
        goals = [f"- {goal.text}: {goal.verdict(rows)}" for goal in section.goals]
        lines += ["", f"## {section.title}", "", section.about, "", *section.table(rows), *goals]
    return "\n".join(lines) + "\n"
