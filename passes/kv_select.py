"""``kv.attend(q, cache, start)`` of one query over pages with summaries -> the same over those of ``kv.select``.

    %1 = kv.select(%q, %cache, %start, %table) {share=0.25}
    %2 = kv.attend(%q, %cache, %start, ..., %table, none, %1)

Query-driven selection at decode: Quest (arXiv:2406.10774), LServe (arXiv:2502.14866), TokenSelect (arXiv:2411.02886).
"""

from __future__ import annotations

from tilewright.ir import Builder, Function, ops
from tilewright.passes.kv_options import KvOptions

LEAST = 4
"""Pages that are chosen at the least, if nothing else is asked for."""


def select_pages(decode: Function, options: KvOptions) -> None:
    """Have every query of ``decode`` look at the pages that are worth it alone, where caches have summaries."""
    if options.select is None:
        return
    for op in decode.walk(ops.Attend):
        assert isinstance(op, ops.Attend)
        if not op.cache.cache.has_summary:
            continue
        least = LEAST if options.least is None else options.least
        builder = Builder(decode, op, op.loc)
        pages = builder(ops.Select, op.q, op.cache, op.start, op.table, share=options.select, least=least)
        op.result.replace_all_uses(builder.insert(op.clone({}, pages=pages)).result)
        op.drop()
