import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from vlv_model.caption_tokens import (
    IGNORED,
    count_tokens,
    decode_captions,
    end_of_text_id,
    tokenize_captions,
)
from vlv_model.checkpoints.loading import load_caption_tokenizer
from vlv_model.errors import ModelError

TEXTS = st.lists(st.text(max_size=40), min_size=1, max_size=5)


@pytest.fixture(scope="module")
def tokenizer(tiny):
    return load_caption_tokenizer(tiny)


@given(captions=TEXTS)
def test_any_text_comes_back_exactly(tokenizer, captions):
    batch = tokenize_captions(tokenizer, captions, max_tokens=1000)
    decoded = decode_captions(tokenizer, batch["input_ids"])
    assert [caption.text for caption in decoded] == captions
    assert {caption.finish_reason for caption in decoded} == {"stop"}
    assert [caption.num_tokens for caption in decoded] == count_tokens(tokenizer, captions)


@pytest.mark.parametrize("caption", ["<|endoftext|>", "e\u0301 é", " two  spaces .", "\n", "👩‍🚀"])
def test_awkward_text_comes_back_exactly(tokenizer, caption):
    ids = tokenize_captions(tokenizer, [caption])["input_ids"]
    assert (ids == end_of_text_id(tokenizer)).sum() == 1
    assert decode_captions(tokenizer, ids)[0].text == caption


@given(captions=TEXTS, max_tokens=st.integers(1, 30))
def test_lengths_labels_and_the_end_of_text(tokenizer, captions, max_tokens):
    batch = tokenize_captions(tokenizer, captions, max_tokens)
    end_of_text = end_of_text_id(tokenizer)
    counts = count_tokens(tokenizer, captions)
    assert batch["input_ids"].shape[1] == max(min(n + 1, max_tokens) for n in counts)
    for ids, mask, labels, count in zip(*batch.values(), counts, strict=True):
        length = int(mask.sum())
        assert length == min(count + 1, max_tokens)
        assert mask.tolist() == [1] * length + [0] * (len(ids) - length)
        assert torch.equal(labels[:length], ids[:length])
        assert (labels[length:] == IGNORED).all()
        # a whole caption ends in the end-of-text, a cut one has none
        assert (labels == end_of_text).sum() == (count < max_tokens)


def test_padding_is_the_end_of_text_and_its_label_stays(tokenizer):
    assert tokenizer.pad_token_id == end_of_text_id(tokenizer)
    batch = tokenize_captions(tokenizer, ["a red circle", "red"])
    assert batch["labels"][1].tolist() == [
        batch["input_ids"][1, 0],
        end_of_text_id(tokenizer),
        *[IGNORED] * 2,
    ]
    assert batch["attention_mask"][1].tolist() == [1, 1, 0, 0]


def test_scene_words_are_one_token_each(tokenizer):
    caption = "a large red circle left of a small blue square on a gray background"
    assert count_tokens(tokenizer, [caption]) == [len(caption.split())]


def test_no_captions_make_an_empty_batch(tokenizer):
    batch = tokenize_captions(tokenizer, [])
    assert all(tensor.shape == (0, 0) for tensor in batch.values())


def test_what_follows_the_end_of_text_is_ignored(tokenizer):
    ids = tokenize_captions(tokenizer, ["a red circle"])["input_ids"]
    longer = torch.cat([ids, ids], dim=1)
    assert decode_captions(tokenizer, longer)[0].text == "a red circle"
    cut = decode_captions(tokenizer, ids[:, :2])[0]
    assert (cut.text, cut.num_tokens, cut.finish_reason) == ("a red", 2, "length")


def test_a_tokenizer_without_eos_is_rejected(tiny):
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tiny / "language_model")
    tokenizer.eos_token = None
    with pytest.raises(ModelError, match="has no eos token"):
        end_of_text_id(tokenizer)


@pytest.fixture(scope="module")
def bart_tokenizer(tiny):
    return AutoTokenizer.from_pretrained(tiny / "florence")


@given(text=st.text(max_size=60))
def test_florences_tokenizer_survives_any_text(bart_tokenizer, text):
    ids = bart_tokenizer(text, add_special_tokens=False, split_special_tokens=True).input_ids
    assert bart_tokenizer.decode(ids, clean_up_tokenization_spaces=False) == text
