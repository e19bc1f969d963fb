"""Cleans captions of models that never learned to stop (`generate.postprocess=reference`).

Such captions are cut in the middle of a sentence and repeat sentences. The published implementation
applies two rules, in this order:

1. Cut the caption after its last full stop that is followed by white space, a closing quotation mark or
   bracket, or the end (so not in 3.5). A caption without a full stop stays whole.
2. Drop repeated sentences, which end in a full stop, `!` or `?`. Sentences are compared by their words,
   ignoring case, punctuation and white space.

`num_tokens`, `finish_reason` and `truncated` describe the caption before these rules.
"""

from __future__ import annotations

import re

from pipelines.recaption.health import words

RULES = 2  # version of the rules, part of a caption's fingerprint

_STOP = r"[.!?][\"'”’)\]]*"
_LAST = re.compile(r"^.*(?:\.[\"'”’)\]]*(?=\s|$)|。[\"'”’)\]]*)", re.DOTALL)
_SENTENCE = re.compile(rf"\s*(.+?(?:{_STOP}(?=\s|$)|[。！？][\"'”’)\]]*|$))", re.DOTALL)


def reference(caption: str) -> str:
    """Apply the two rules; idempotent."""
    whole = cut.group() if (cut := _LAST.match(caption)) else caption
    seen: set[tuple[str, ...]] = set()
    kept = []
    for sentence in _SENTENCE.findall(whole.strip()):
        key = tuple(words(sentence))
        if key and key in seen:
            continue
        seen.add(key)
        kept.append(sentence)
    return " ".join(kept)
