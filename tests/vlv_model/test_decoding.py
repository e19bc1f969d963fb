"""Continuous batching gives the captions of transformers' generate, whatever the batch."""

from collections import Counter
from itertools import takewhile

import pytest
import torch

from vlv_model.captioner import VLVCaptioner
from vlv_model.decoding import FinishedSequence, Sampling, SlotDecoder, decode
from vlv_model.errors import ModelError

LIMIT = 24


@pytest.fixture
def prefixes(captioner: VLVCaptioner) -> torch.Tensor:
    hidden = captioner.language_model.config.hidden_size
    return torch.randn(40, 16, hidden, generator=torch.Generator().manual_seed(3))


def by_transformers(captioner: VLVCaptioner, prefixes: torch.Tensor, end: int) -> list[list[int]]:
    found = captioner.language_model.generate(
        inputs_embeds=prefixes,
        attention_mask=prefixes.new_ones(prefixes.shape[:2], dtype=torch.int64),
        do_sample=False,
        max_new_tokens=LIMIT,
        eos_token_id=end,
        pad_token_id=end,
    ).tolist()
    return [ids[: ids.index(end)] if end in ids else ids for ids in found]


def an_end(captioner: VLVCaptioner, prefixes: torch.Tensor) -> int:
    """A token that is in many of the untrained model's captions: as end-of-text it ends them."""
    counts = Counter(t for ids in by_transformers(captioner, prefixes, -1) for t in {*ids[3:]})
    return counts.most_common(1)[0][0]


def gap(captioner: VLVCaptioner, prefix: torch.Tensor, ids: list[int]) -> float:
    """Difference of the two largest logits after a prefix and token ids."""
    embeddings = captioner.language_model.get_input_embeddings()(torch.tensor([ids]).long())
    logits = captioner.language_model(inputs_embeds=torch.cat([prefix[None], embeddings], 1)).logits
    best, second = logits[0, -1].topk(2).values
    return float(best - second)


@pytest.mark.parametrize("slots", [1, 7, 40])
def test_greedy_captions_are_those_of_transformers(captioner, prefixes, slots):
    with torch.no_grad():
        end = an_end(captioner, prefixes)
        expected = by_transformers(captioner, prefixes, end)
        decoder = SlotDecoder(captioner.language_model, end, slots=slots, max_new_tokens=LIMIT)
        found = decode(decoder, range(40), prefixes)
        assert len({len(ids) for ids in expected}) > 3  # they end at different times
        for prefix, ids, finished in zip(prefixes, expected, found, strict=True):
            assert finished.finish_reason == ("length" if len(ids) == LIMIT else "stop")
            if finished.ids != ids:  # only where rounding decides
                pairs = zip(ids, finished.ids, strict=False)
                same = len(list(takewhile(lambda pair: pair[0] == pair[1], pairs)))
                assert gap(captioner, prefix, ids[:same]) < 1e-4


def test_a_slot_is_reused_as_soon_as_its_sequence_ends(captioner, prefixes):
    end = an_end(captioner, prefixes)
    decoder = SlotDecoder(captioner.language_model, end, slots=8, max_new_tokens=LIMIT)
    decoder.admit(range(8), range(8), prefixes[:8])
    ended: list[FinishedSequence] = []
    while not ended:
        ended = decoder.step()
    assert decoder.free == len(ended)
    with pytest.raises(ValueError, match="free slots"):
        decoder.admit(range(8, 16), range(8), prefixes[8:16])
    decoder.admit([8], [8], prefixes[8:9])  # while longer sequences are running
    while decoder.busy:
        ended += decoder.step()
    alone = decode(
        SlotDecoder(captioner.language_model, end, slots=1, max_new_tokens=LIMIT),
        range(9),
        prefixes[:9],
    )
    assert sorted(ended, key=lambda f: f.request_id) == alone
    assert decoder.free == 8


def test_samples_depend_on_seed_and_key_and_not_on_the_batch(captioner, prefixes):
    def drawn(slots: int, rows: list[int], **sampling: float) -> dict[int, list[int]]:
        decoder = SlotDecoder(
            captioner.language_model,
            an_end(captioner, prefixes),
            slots=slots,
            max_new_tokens=LIMIT,
            sampling=Sampling(**{"temperature": 0.9, "top_p": 0.95, "seed": 1, **sampling}),
        )
        found = decode(decoder, [1000 + row for row in rows], prefixes[rows])
        return {row: finished.ids for row, finished in zip(rows, found, strict=True)}

    rows = list(range(12))
    together = drawn(5, rows)
    assert drawn(3, rows[::-1]) == together
    assert drawn(5, rows, seed=2) != together
    assert len({tuple(ids) for ids in together.values()}) == 12
    greedy = decode(
        SlotDecoder(
            captioner.language_model, an_end(captioner, prefixes), slots=12, max_new_tokens=LIMIT
        ),
        rows,
        prefixes[:12],
    )
    # A share that one token reaches leaves that token.
    assert list(drawn(5, rows, top_p=1e-6).values()) == [finished.ids for finished in greedy]


def test_tokens_are_drawn_as_often_as_they_are_probable():
    probabilities = torch.tensor([0.5, 0.3, 0.15, 0.05])
    rows = 4000
    logits = probabilities.log().expand(rows, 4)

    def shares(**sampling: float) -> list[float]:
        chosen = Sampling(**sampling).draw(logits, range(rows), [7] * rows)
        return [float(share) for share in chosen.bincount(minlength=4) / rows]

    assert shares() == pytest.approx(probabilities.tolist(), abs=0.03)
    assert shares(top_p=0.6) == pytest.approx([0.625, 0.375, 0, 0], abs=0.03)
    sharper = probabilities.square() / probabilities.square().sum()
    assert shares(temperature=0.5) == pytest.approx(sharper.tolist(), abs=0.03)


def test_a_language_model_with_sliding_windows_is_rejected(captioner):
    captioner.language_model.config.layer_types = ["full_attention", "sliding_attention"]
    with pytest.raises(ModelError, match="sliding windows"):
        captioner.decoder(slots=2, max_new_tokens=4)
