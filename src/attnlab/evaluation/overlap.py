"""The overlap of a text with the training part of a corpus."""

from __future__ import annotations

import numpy as np

from ..data.tokens import Tokens

PASSAGE = 64  # tokens of a passage that is looked for in the training part
PASSAGES = 16  # how many passages are looked for
CHUNK = 1 << 22  # tokens searched at once
SEARCHED = 1 << 26  # tokens of the largest training part that is searched


def seen_share(tokens: Tokens, training: Tokens) -> float | None:
    """Return the share of passages of 64 tokens, taken evenly from all of `tokens`, that occur in `training`.

    None where no document is that long, or where the training part is so large that searching it would take longer than
    evaluating.
    """
    room = np.maximum(np.diff(tokens.documents, append=len(tokens)) - PASSAGE + 1, 0)  # places where one can begin
    before = np.cumsum(room) - room
    if not room.sum() or len(training) > SEARCHED:
        return None
    picked = np.linspace(0, room.sum() - 1, PASSAGES).astype(np.int64)
    document = np.searchsorted(before + room, picked, "right")
    starts = tokens.documents[document] + picked - before[document]
    passages = {row.astype("<i4").tobytes() for row in tokens.gather(starts, PASSAGE).numpy()}
    found: set[bytes] = set()
    for at in range(0, len(training), CHUNK):
        chunk = training.read(at, min(at + CHUNK + PASSAGE, len(training))).numpy().astype("<i4").tobytes()
        found |= {passage for passage in passages - found if passage in chunk}
    return len(found) / len(passages)
