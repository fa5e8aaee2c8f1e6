"""What a model says along given texts: logits without choosing tokens."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np

from tilewright.runtime.batch import CHUNK
from tilewright.runtime.errors import InputError
from tilewright.runtime.feeding import Feeder
from tilewright.runtime.places import Places
from tilewright.runtime.session import Session

Array = np.ndarray[Any, Any]


def follow(session: Session, ids: Array, first: int, chunk: int = CHUNK) -> Iterator[Array]:
    """Logits [B, V] after the first ``first`` tokens of each text (ids, integers [B, S]), then after each further one.

    The beginning is fed in chunks, each further token alone, as when generating; the last token is not fed. Raises
    InputError and OutOfPages when the texts do not fit the session.
    """
    if ids.ndim != 2 or not 0 < first < ids.shape[1]:
        raise InputError("ids", f"texts [B, S] of more than {first} tokens", f"shape {list(ids.shape)}")
    feeder, places = Feeder(session, chunk), Places(session, share=False)
    feeder.check_count(len(ids))
    texts = [row.astype(np.int64) for row in ids[:, :-1]]
    for index, text in enumerate(texts):
        feeder.check_prompt(text, 1, f"ids[{index}]")
    return _follow(feeder, places, texts, first)


def _follow(feeder: Feeder, places: Places, texts: list[Array], first: int) -> Iterator[Array]:
    with feeder.session.lease():
        own = []
        try:
            for text in texts:
                own.append(places.open(text, places.take_row()))
            while (at := own[0].fed) < len(texts[0]):
                count = min(first - at, feeder.chunk) if at < first else 1
                logits = feeder.run("prefill" if at < first else "decode", own, [count] * len(own), places.rows)
                for place in own:
                    places.advance(place, count)
                if at + count >= first:
                    yield np.stack(logits)
        finally:
            for place in own:
                places.close(place)
