import pytest
import torch
from PIL import Image
from transformers import GenerationConfig, Qwen2ForCausalLM

from tests.vlv_model import formulas as reference
from vlv_model.caption_tokens import GeneratedCaption, end_of_text_id
from vlv_model.captioner import VLVCaptioner
from vlv_model.errors import DataError, ModelError
from vlv_model.precision import cast
from vlv_model.preprocessing import encoder_pixels

CAPTIONS = [
    "a large red circle",
    "a small blue square left of a green star on a gray background",
    "über 3 stars",
    "",
]


def batch_of(captioner, captions=CAPTIONS, max_tokens=300):
    return captioner.tokenize(captions, max_tokens)


def test_loss_equals_the_reference(tiny, captioner, squares):
    language_model = Qwen2ForCausalLM.from_pretrained(tiny / "language_model").eval()
    projector = captioner.language_projector.state_dict()
    end_of_text = end_of_text_id(captioner.tokenizer)
    ids = [
        [*captioner.tokenizer(c, add_special_tokens=False).input_ids, end_of_text] for c in CAPTIONS
    ]
    with torch.no_grad():
        clip_embeddings = captioner.text_encoder(captioner.encoder(squares))
        hidden = torch.nn.functional.gelu(reference.linear(projector, "0", clip_embeddings))
        prefixes = reference.linear(projector, "2", hidden)
        expected = reference.stage2_loss(language_model, prefixes, ids)
        loss = captioner.loss(squares, **batch_of(captioner))
    assert captioner.prefix(squares).shape == (4, 16, 96)
    assert abs(loss - expected) < 1e-5


def test_padding_changes_nothing(captioner, squares):
    batch = batch_of(captioner)
    padded = {
        "input_ids": torch.nn.functional.pad(batch["input_ids"], (0, 7), value=3),
        "attention_mask": torch.nn.functional.pad(batch["attention_mask"], (0, 7)),
        "labels": torch.nn.functional.pad(batch["labels"], (0, 7), value=-100),
    }
    with torch.no_grad():
        loss = captioner.loss(squares, **batch)
        assert torch.allclose(captioner.loss(squares, **padded), loss, atol=1e-6)
        rows = [
            captioner.loss(
                squares[i : i + 1],
                **batch_of(captioner, [caption]),
                num_label_tokens=int((batch["labels"] != -100).sum()),
            )
            for i, caption in enumerate(CAPTIONS)
        ]
    assert torch.allclose(sum(rows), loss, atol=1e-5)  # the global count makes ranks add up


def test_the_end_of_text_is_learned_and_a_cut_caption_has_none(captioner, squares):
    whole, cut = (
        batch_of(captioner, ["a red circle"] * 4, 4),
        batch_of(captioner, ["a red circle"] * 4, 3),
    )
    end_of_text = end_of_text_id(captioner.tokenizer)
    assert (whole["labels"] == end_of_text).sum(1).tolist() == [1] * 4
    assert (cut["labels"] == end_of_text).sum() == 0
    captioner.zero_grad()
    captioner.loss(squares, **whole).backward()
    # the output row of the end-of-text is pulled up, though its id is also the padding's
    assert captioner.language_model.lm_head.weight.grad[end_of_text].abs().sum() > 0


def test_prepared_pixels_give_the_same_loss(captioner, squares):
    batch = batch_of(captioner)
    with torch.no_grad():
        loss = captioner(squares, **batch)
        prepared = captioner(squares, **batch, encoder_pixel_values=encoder_pixels(squares, 128))
    assert torch.allclose(loss, prepared, atol=1e-6)


@pytest.mark.parametrize(
    ("trainable", "parts"),
    [
        ("projector", {"language_projector"}),
        ("projector+llm", {"language_projector", "language_model"}),
        ("projector+llm+encoder", {"language_projector", "language_model", "encoder.florence"}),
    ],
)
def test_set_trainable_decides_gradients_and_train_mode(captioner, squares, trainable, parts):
    captioner.set_trainable(trainable)
    captioner.train()
    captioner.loss(squares, **batch_of(captioner)).backward()
    reached = [n for n, p in captioner.named_parameters() if p.grad is not None]
    expected = [n for n, p in captioner.named_parameters() if p.requires_grad]
    assert reached == expected
    assert {".".join(n.split(".")[: 1 + n.startswith("encoder")]) for n in reached} == parts
    assert all(n.startswith(VLVCaptioner.trained_parts) for n in reached)
    awake = {n for n, part in captioner.named_modules() if part.training}
    assert not [n for n in awake if n.startswith(("text_encoder", "encoder.caption_projector"))]
    assert ("language_model.model" in awake) == ("language_model" in parts)
    bart = "encoder.florence.language_model.encoder.layers.0"
    assert (bart in awake) == ("encoder.florence" in parts)


def test_set_trainable_can_change_and_rejects_unknown_values(captioner):
    captioner.set_trainable("projector")
    captioner.set_trainable("projector+llm+encoder")
    captioner.train()
    assert captioner.language_model.model.training
    with pytest.raises(ModelError, match="trainable is 'all', expected one of projector, "):
        captioner.set_trainable("all")


@pytest.fixture
def trained(captioner, squares):
    """A captioner that has memorised the captions of four images."""
    captions = [*CAPTIONS[:3], "a red circle"]
    trained = [p for p in captioner.parameters() if p.requires_grad]
    optimiser = torch.optim.Adam(trained, lr=2e-3)
    batch = batch_of(captioner, captions)
    captioner.train()
    torch.manual_seed(0)  # dropout
    for _ in range(400):
        loss = captioner.loss(squares, **batch)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if loss < 0.01:
            break
    return captioner.eval(), captions


def test_memorised_captions_are_generated_and_end(trained, squares):
    captioner, captions = trained
    counts = (captioner.tokenize(captions)["labels"] != -100).sum(1) - 1
    expected = [GeneratedCaption(c, int(n), "stop") for c, n in zip(captions, counts, strict=True)]
    assert captioner.generate(squares, max_new_tokens=40) == expected
    assert captioner.generate(squares, num_beams=3, max_new_tokens=40) == expected
    # each row as if it were alone, whatever the others' lengths
    assert [captioner.generate(s[None], max_new_tokens=40)[0] for s in squares] == expected
    # the limit counts the end-of-text: one token less, and the model could not end
    limit = int(counts[0]) + 1
    assert captioner.generate(squares[:1], max_new_tokens=limit)[0].finish_reason == "stop"
    cut = captioner.generate(squares[:1], max_new_tokens=limit - 1)[0]
    assert (cut.text, cut.finish_reason) == (captions[0], "length")


def test_sampling_defaults_of_the_language_model_are_not_inherited(captioner, squares):
    expected = captioner.generate(squares, max_new_tokens=5)
    language_model = captioner.language_model
    language_model.generation_config = GenerationConfig(
        do_sample=True, temperature=5.0, repetition_penalty=1.9, eos_token_id=list(range(500))
    )
    again = VLVCaptioner(
        captioner.encoder,
        captioner.text_encoder,
        captioner.language_projector,
        language_model,
        captioner.tokenizer,
    ).eval()
    assert again.generate(squares, max_new_tokens=5) == expected


def test_generate_leaves_train_mode_and_comes_back(captioner, squares):
    captioner.train()
    assert captioner.generate(squares, max_new_tokens=3) == captioner.generate(
        squares, max_new_tokens=3
    )
    assert captioner.encoder.florence.language_model.encoder.training


def test_bfloat16_weights_give_a_float32_loss(captioner, squares):
    batch = batch_of(captioner)
    with torch.no_grad():
        expected = captioner.loss(squares, **batch)
        cast(captioner, "bfloat16")
        loss = captioner.loss(squares, **batch)
    assert loss.dtype == torch.float32
    assert abs(loss - expected) < 0.05
    assert len(captioner.generate(squares, max_new_tokens=3)) == 4


def test_parameters_cast_without_buffers_train_as_in_float32(captioner, squares):
    """DeepSpeed's bfloat16: each parameter is cast, each buffer left in float32."""
    batch = batch_of(captioner)
    with torch.no_grad():
        expected = captioner.loss(squares, **batch)
    cast(captioner, "bfloat16")
    assert captioner.language_model.model.rotary_emb.inv_freq.dtype == torch.float32
    loss = captioner.loss(squares, **batch)
    loss.backward()
    assert abs(loss - expected) < 0.05
    trained = [p for p in captioner.parameters() if p.requires_grad]
    assert all(p.grad.dtype == torch.bfloat16 and p.grad.isfinite().all() for p in trained)
    assert len(captioner.generate(squares, max_new_tokens=3)) == 4


def test_neither_unet_nor_vae_is_loaded(captioner):
    kinds = {type(part).__name__ for part in captioner.modules()}
    assert not kinds & {"UNet2DConditionModel", "AutoencoderKL"}


def test_a_tokenizer_of_a_larger_model_is_rejected(captioner):
    captioner.language_model.resize_token_embeddings(500)
    words = len(captioner.tokenizer)
    with pytest.raises(ModelError, match=f"has {words} tokens, the language model 500"):
        VLVCaptioner(
            captioner.encoder,
            captioner.text_encoder,
            captioner.language_projector,
            captioner.language_model,
            captioner.tokenizer,
        )


def test_caption_takes_files_and_pictures_and_returns_text(captioner, squares, tmp_path):
    pictures = [Image.fromarray(square.permute(1, 2, 0).numpy()) for square in squares]
    file = tmp_path / "scene.png"
    pictures[0].save(file)
    texts = [made.text for made in captioner.generate(squares, num_beams=2, max_new_tokens=5)]
    how = {"num_beams": 2, "max_new_tokens": 5}
    assert captioner.caption(pictures, batch_size=3, **how) == texts
    assert captioner.caption(file, **how) == captioner.caption(str(file), **how) == texts[0]
    assert captioner.caption(pictures[1], **how) == texts[1]
    assert captioner.caption([], **how) == []
    (tmp_path / "broken.png").write_bytes(file.read_bytes()[:100])
    (tmp_path / "text.jpg").write_text("milk")
    (tmp_path / "page.eps").write_text("%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n")
    for name in ("broken.png", "text.jpg", "page.eps", "nowhere.jpg"):
        with pytest.raises(DataError, match=f"{name} cannot be read as an image: [^\n]+$"):
            captioner.caption([file, tmp_path / name], **how)


def test_squares_of_another_size_are_refused(captioner, squares):
    smaller = squares[:, :, :48, :48]
    with pytest.raises(ModelError, match=r"expected uint8 \[b 3 64 64\]"):
        captioner.generate(smaller, max_new_tokens=3)
