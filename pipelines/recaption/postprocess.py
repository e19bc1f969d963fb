"""Captions of checkpoints that never learned to stop, made readable: `generate.postprocess=reference`.

Such a model goes on until it is cut: its last sentence is half a one, and the same sentences come
again. Two rules, in this order, as the published implementation of the method has them:

1. The caption is cut after its last full stop (one that white space, a closing quotation mark or
   bracket, or the end follows; not that of 3.5). Without a full stop it stays whole.
2. A sentence that was said before is dropped; it ends in a full stop, `!` or `?`. Sentences are
   compared by their words: case, punctuation and white space do not count.

What decoding did is told of the raw caption: `num_tokens`, `finish_reason`, `truncated`.
"""

from __future__ import annotations

import re

from pipelines.recaption.health import words

RULES = 2  # raised when they change, as captions then do

_STOP = r"[.!?][\"'”’)\]]*"
_LAST = re.compile(r"^.*(?:\.[\"'”’)\]]*(?=\s|$)|。[\"'”’)\]]*)", re.DOTALL)
_SENTENCE = re.compile(rf"\s*(.+?(?:{_STOP}(?=\s|$)|[。！？][\"'”’)\]]*|$))", re.DOTALL)


def reference(caption: str) -> str:
    """The caption by the two rules. Doing it twice changes nothing."""
    whole = cut.group() if (cut := _LAST.match(caption)) else caption
    seen: set[tuple[str, ...]] = set()
    kept = []
    for sentence in _SENTENCE.findall(whole.strip()):
        said = tuple(words(sentence))
        if said and said in seen:
            continue
        seen.add(said)
        kept.append(sentence)
    return " ".join(kept)
