"""VQAScore by CLIP-FlanT5 and by any vision-language model, against explicit computations."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from helpers.tiny_models import random_images, save_clip_flan_t5, save_llava
from PIL import Image
from torch import Tensor
from torch.nn import functional as F

from miro.images.transforms import CLIP_MEAN
from miro.rewards.base import RewardOptions
from miro.rewards.clip_t5 import build_clip_t5, convert_name, load_clip_t5
from miro.rewards.image_batch import ImageBatch
from miro.rewards.registry import build_reward
from miro.rewards.vqa import question

CAPTIONS = ["a frog", 'a "red" frog {0} <image> left of a fish', "no"]


@pytest.fixture(scope="module")
def clip_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_clip_flan_t5(tmp_path_factory.mktemp("clip-flant5"))


@pytest.fixture(scope="module")
def llava(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_llava(tmp_path_factory.mktemp("llava"))


def scores(folder: Path, images: Sequence[Tensor], captions: Sequence[str], **options: Any):
    reward = build_reward(f"vqa={folder}", options=RewardOptions(**options))
    return reward.score(images, captions)


def as_published(folder: Path, image: Tensor, caption: str) -> float:
    """The score of one pair by PIL, transformers' processor and T5's loss, as in t2v_metrics."""
    from transformers import T5Tokenizer
    from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil

    network, tokenizer = load_clip_t5(folder)[0].eval(), T5Tokenizer.from_pretrained(folder)
    original = Image.fromarray(image.permute(1, 2, 0).numpy())
    side = max(original.size)
    square = Image.new("RGB", (side, side), tuple(int(255 * mean) for mean in CLIP_MEAN))
    square.paste(original, ((side - original.width) // 2, (side - original.height) // 2))
    processor = CLIPImageProcessorPil(
        size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28}
    )
    pixels = processor(square, return_tensors="pt")["pixel_values"]
    patches = network.vision(pixels, output_hidden_states=True).hidden_states[-2][:, 1:]
    before = tokenizer(
        "A chat between a curious user and an artificial intelligence assistant. The assistant "
        "gives helpful, detailed, and polite answers to the user's questions. USER: "
    )["input_ids"]
    after = f'\nDoes this figure show "{caption}"? Please answer yes or no. ASSISTANT: '
    words = [torch.tensor([ids]) for ids in (before, tokenizer(after)["input_ids"])]
    embedded = [network.t5.shared(ids) for ids in words]
    embedded.insert(1, network.projector(patches))
    labels = torch.tensor([tokenizer("Yes")["input_ids"]])
    assert labels.shape == (1, 2)  # "Yes" and the end token
    logits = network.t5(inputs_embeds=torch.cat(embedded, 1), labels=labels).logits
    # t2v_metrics resizes the embedding tables to the tokenizer's vocabulary.
    return F.cross_entropy(logits[0, :, : len(tokenizer)], labels[0]).neg().exp().item()


@torch.no_grad()
def test_clip_flant5_agrees_with_the_published_computation(clip_t5: Path) -> None:
    images = random_images(3)

    found = scores(clip_t5, images, CAPTIONS, batch_size=2)

    expected = [as_published(clip_t5, *pair) for pair in zip(images, CAPTIONS, strict=True)]
    assert max(expected) > 1.1 * min(expected)
    # Resized pixels differ from PIL's by at most one grey level.
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-2, atol=1e-4)


@torch.no_grad()
def test_clip_flant5_agrees_closely_without_resizing(clip_t5: Path) -> None:
    image = torch.randint(0, 256, (3, 28, 28), dtype=torch.uint8)

    found = scores(clip_t5, [image] * 3, CAPTIONS)

    expected = [as_published(clip_t5, image, caption) for caption in CAPTIONS]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-4, atol=0)


def test_each_image_is_encoded_once_for_all_its_captions(clip_t5: Path) -> None:
    reward: Any = build_reward(f"vqa={clip_t5}")
    sizes: list[int] = []
    reward.network.vision.register_forward_hook(
        lambda module, args, kwargs, output: sizes.append(len(output.hidden_states[0])),
        with_kwargs=True,
    )
    first, second = random_images(2)

    together = reward.score(ImageBatch([first, first, second, first]), [*CAPTIONS, "a fish"])

    assert sizes == [2]
    alone = [
        reward.score([image], [caption]).item()
        for image, caption in zip([first, first, second, first], [*CAPTIONS, "a fish"], strict=True)
    ]
    torch.testing.assert_close(together, torch.tensor(alone), rtol=1e-4, atol=0)


@pytest.mark.parametrize("kind", ["clip_t5", "llava"])
def test_a_score_does_not_depend_on_the_rest_of_the_batch(
    kind: str, request: pytest.FixtureRequest
) -> None:
    folder = request.getfixturevalue(kind)
    images = random_images(4)
    captions = [*CAPTIONS, "a long caption of a small frog on a wet stone " * 12]

    at_once = scores(folder, images, captions)

    one_by_one = scores(folder, images, captions, batch_size=1)
    assert (at_once > 0).all() and (at_once < 1).all() and len(set(at_once.tolist())) == 4
    torch.testing.assert_close(at_once, one_by_one, rtol=1e-4, atol=0)


@torch.no_grad()
def test_other_models_score_the_probability_of_yes_as_the_first_token(llava: Path) -> None:
    from transformers import LlavaForConditionalGeneration, LlavaProcessor

    processor: Any = LlavaProcessor.from_pretrained(llava)
    model = LlavaForConditionalGeneration.from_pretrained(llava).eval()
    images, captions = random_images(2), ["a frog", 'a "red" frog']

    found = scores(llava, images, captions)

    expected = []
    for image, caption in zip(images, captions, strict=True):
        text = (
            f'USER: <image>Does this figure show "{caption}"? Please answer yes or no. ASSISTANT:'
        )
        inputs = processor(images=image, text=text, return_tensors="pt")
        assert (inputs["input_ids"] == 3).sum() == 4  # a token for each patch
        after = model(**inputs).logits[0, -1].softmax(-1)
        words = processor.tokenizer.convert_tokens_to_ids(["Yes", "ĠYes"])
        expected.append(after[words].sum())
    torch.testing.assert_close(found, torch.stack(expected), rtol=1e-4, atol=0)


def test_special_tokens_in_a_caption_are_removed(llava: Path) -> None:
    image = random_images(1)[0]

    found = scores(llava, [image] * 2, ["a <image> of</s> a frog", "a   of  a frog"])

    assert found[0] == found[1]


@pytest.mark.parametrize("kind", ["clip_t5", "llava"])
def test_a_long_caption_is_truncated_with_a_warning(
    kind: str, request: pytest.FixtureRequest, caplog: pytest.LogCaptureFixture
) -> None:
    folder, image = request.getfixturevalue(kind), random_images(1)[0]
    caption = "bcdfghjklm" * 190  # 1,900 bytes: 1,900 tokens and, of a T5, its first space

    with caplog.at_level(logging.WARNING):
        found = scores(folder, [image] * 2, [caption + "klm" * 300, caption + "!" * 200])

    assert found[0] == found[1]
    assert caplog.text.count("truncated to 1900") == 2


def test_the_question_contains_the_caption_verbatim() -> None:
    text = question('a {0} "red" frog')

    assert text == 'Does this figure show "a {0} "red" frog"? Please answer yes or no.'


def published(width: int, inner: int, heads: int) -> dict[str, tuple[int, ...]]:
    """Names and shapes in the files of zhiqiulin/clip-flant5-xl and -xxl.

    T5 1.1 with 24 layers, CLIP ViT-L/14 at 336 pixels inside a module of the same name, and a
    projector; position_ids was saved by the transformers of 2023.
    """
    words, channels = (32128, width), heads * 64
    keys: dict[str, tuple[int, ...]] = dict.fromkeys(
        ("shared", "embed_tokens", "encoder.embed_tokens", "decoder.embed_tokens", "lm_head"), words
    )
    for half, parts in (("encoder", ("Self",)), ("decoder", ("Self", "EncDec"))):
        for block in range(24):
            for layer, kind in enumerate(parts):
                at = f"{half}.block.{block}.layer.{layer}"
                for name in "qkv":
                    keys[f"{at}.{kind}Attention.{name}"] = (channels, width)
                keys[f"{at}.{kind}Attention.o"] = (width, channels)
                keys[f"{at}.layer_norm"] = (width,)
                if block == layer == 0:
                    keys[f"{at}.SelfAttention.relative_attention_bias"] = (32, heads)
            at = f"{half}.block.{block}.layer.{len(parts)}"
            keys |= {f"{at}.DenseReluDense.wi_{i}": (inner, width) for i in (0, 1)}
            keys |= {f"{at}.DenseReluDense.wo": (width, inner), f"{at}.layer_norm": (width,)}
        keys[f"{half}.final_layer_norm"] = (width,)
    keys = {f"{name}.weight": shape for name, shape in keys.items()}
    for layer, inputs in ((0, 1024), (2, width)):
        keys |= {
            f"mm_projector.{layer}.weight": (width, inputs),
            f"mm_projector.{layer}.bias": (width,),
        }
    vision = "vision_tower.vision_tower.vision_model"
    linear: dict[str, tuple[int, ...]] = {f"self_attn.{n}_proj": (1024, 1024) for n in "qkv"}
    linear |= {"self_attn.out_proj": (1024, 1024), "mlp.fc1": (4096, 1024), "mlp.fc2": (1024, 4096)}
    linear |= {"layer_norm1": (1024,), "layer_norm2": (1024,)}
    for layer in range(24):
        for name, shape in linear.items():
            at = f"{vision}.encoder.layers.{layer}.{name}"
            keys |= {f"{at}.weight": shape, f"{at}.bias": shape[:1]}
    for name in ("pre_layrnorm", "post_layernorm"):
        keys |= {f"{vision}.{name}.weight": (1024,), f"{vision}.{name}.bias": (1024,)}
    return keys | {
        f"{vision}.embeddings.class_embedding": (1024,),
        f"{vision}.embeddings.position_ids": (1, 577),
        f"{vision}.embeddings.patch_embedding.weight": (1024, 3, 14, 14),
        f"{vision}.embeddings.position_embedding.weight": (577, 1024),
    }


@pytest.mark.parametrize(
    ("size", "width", "inner", "heads", "billions"),
    [("xl", 2048, 5120, 32, 3.16), ("xxl", 4096, 10240, 64, 11.46)],
)
def test_the_published_weights_fit(
    size: str, width: int, inner: int, heads: int, billions: float
) -> None:
    config = {
        "vocab_size": 32128, "d_model": width, "d_kv": 64, "d_ff": inner, "num_layers": 24,
        "num_decoder_layers": 24, "num_heads": heads, "feed_forward_proj": "gated-gelu",
        "tie_word_embeddings": False, "mm_projector_type": "mlp2x_gelu", "mm_hidden_size": 1024,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336", "mm_vision_select_layer": -2,
        "mm_vision_select_feature": "patch", "model_type": "t5",
    }  # fmt: skip
    tensors = {
        renamed: torch.empty(shape, device="meta", dtype=torch.bfloat16)
        for name, shape in published(width, inner, heads).items()
        if (renamed := convert_name(name)) is not None
    }

    network = build_clip_t5(config, tensors)

    assert network.image_size == 336
    assert network.t5.lm_head.weight is not network.t5.shared.weight
    assert network.t5.encoder.embed_tokens is network.t5.decoder.embed_tokens
    assert not network.t5.config.scale_decoder_outputs  # as T5 1.1 does not
    assert sum(p.numel() for p in network.parameters()) / 1e9 == pytest.approx(billions, abs=0.01)


def test_input_and_output_embeddings_stay_untied(clip_t5: Path) -> None:
    files = [torch.load(path, weights_only=True) for path in clip_t5.glob("*.bin")]
    saved = {name: tensor for file in files for name, tensor in file.items()}

    network = load_clip_t5(clip_t5)[0]

    for name, published in (("lm_head", "lm_head"), ("encoder.embed_tokens", "shared")):
        table = network.t5.get_submodule(name).weight
        assert torch.equal(table, saved[f"{published}.weight"])


def test_bf16_agrees_with_fp32(clip_t5: Path) -> None:
    images = random_images(3)
    plain = scores(clip_t5, images, CAPTIONS)

    half = scores(clip_t5, images, CAPTIONS, precision="bf16")

    torch.testing.assert_close(half, plain, rtol=0.3, atol=0)
    assert not torch.equal(half, plain)


@pytest.mark.long
def test_a_compiled_vision_encoder_gives_the_same_scores(clip_t5: Path) -> None:
    images = random_images(3)

    compiled = scores(clip_t5, images, CAPTIONS, compile=True)

    torch.testing.assert_close(compiled, scores(clip_t5, images, CAPTIONS), rtol=1e-4, atol=0)


def test_empty_batches_and_missing_captions(clip_t5: Path, llava: Path) -> None:
    assert scores(clip_t5, [], []).shape == scores(llava, [], []).shape == (0,)
    with pytest.raises(ValueError, match="1 images but 2 captions"):
        scores(clip_t5, random_images(1), ["a", "b"])


def test_missing_weights_are_an_error_with_a_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, clip_t5: Path
) -> None:
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    with pytest.raises(ValueError, match="zhiqiulin/clip-flant5-xxl.*hf download"):
        build_reward("vqa")
    with pytest.raises(ValueError, match="nor a hub id.*hf download"):
        build_reward("vqa=not a hub id at all")
    with pytest.raises(ValueError, match="config.json: no such file"):
        build_reward(f"vqa={tmp_path}")


def without(folder: Path, copy: Path, *names: str) -> Path:
    copy.mkdir()
    for path in folder.iterdir():
        if not path.name.startswith(names):
            (copy / path.name).write_bytes(path.read_bytes())
    return copy


def test_missing_and_foreign_files_are_named(tmp_path: Path, clip_t5: Path) -> None:
    with pytest.raises(ValueError, match="neither model.safetensors nor pytorch_model.bin"):
        build_reward(f"vqa={without(clip_t5, tmp_path / 'a', 'pytorch_model')}")
    with pytest.raises(ValueError, match="pytorch_model-00002.*download it again"):
        build_reward(f"vqa={without(clip_t5, tmp_path / 'b', 'pytorch_model-00002')}")
    with pytest.raises(ValueError, match="tokenizer"):
        build_reward(f"vqa={without(clip_t5, tmp_path / 'c', 'tokenizer')}")
    other = without(clip_t5, tmp_path / "d")
    config = json.loads((other / "config.json").read_text())
    (other / "config.json").write_text(json.dumps({**config, "mm_projector_type": "linear"}))
    with pytest.raises(ValueError, match="linear.*clip-flant5-xxl"):
        build_reward(f"vqa={other}")
    (other / "config.json").write_text(json.dumps({**config, "num_layers": 3}))
    with pytest.raises(ValueError, match="not those of a CLIP-FlanT5"):
        build_reward(f"vqa={other}")
