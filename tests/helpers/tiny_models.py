"""Vision-language models of a few thousand random weights, in the format of real ones."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

CHAT = (
    "{% for message in messages %}USER: {% for part in message['content'] %}"
    "{% if part['type'] == 'image' %}<image>{% else %}{{ part['text'] }}{% endif %}"
    "{% endfor %}{% endfor %}{% if add_generation_prompt %} ASSISTANT:{% endif %}"
)


def random_images(count: int) -> list[Tensor]:
    """uint8 (3, H, W) images of different sizes."""
    generator = torch.Generator().manual_seed(3)
    sizes = [(20 + 5 * i, 44 - 7 * i) for i in range(count)]
    return [
        torch.randint(0, 256, (3, *size), generator=generator, dtype=torch.uint8) for size in sizes
    ]


def save_llava(folder: Path) -> Path:
    """Write a LLaVA with a byte-level vocabulary plus "Yes" and " Yes"; images of 16 x 16."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import (
        CLIPVisionConfig,
        LlamaConfig,
        LlavaConfig,
        LlavaForConditionalGeneration,
        LlavaImageProcessor,
        LlavaProcessor,
        PreTrainedTokenizerFast,
    )

    special = ["<pad>", "<s>", "</s>", "<image>"]
    vocabulary = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet()), "Ye", "Yes", "ĠYes"]
    merges = [("Y", "e"), ("Ye", "s"), ("Ġ", "Yes")]
    rows = {word: row for row, word in enumerate(vocabulary)}
    tokenizer: Any = Tokenizer(models.BPE(vocab=rows, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    words = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        pad_token="<pad>",
        bos_token="<s>",
        eos_token="</s>",
        extra_special_tokens={"image_token": "<image>"},
    )
    vision = CLIPVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        image_size=16, patch_size=8,
    )  # fmt: skip
    text = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2,
        num_attention_heads=2, pad_token_id=0, bos_token_id=1, eos_token_id=2,
    )  # fmt: skip
    torch.manual_seed(0)
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=3)
    LlavaForConditionalGeneration(config).save_pretrained(folder)
    size = {"height": 16, "width": 16}
    LlavaProcessor(
        LlavaImageProcessor(size={"shortest_edge": 16}, crop_size=size),
        words,
        patch_size=8,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        chat_template=CHAT,
    ).save_pretrained(folder)
    return folder


def save_clip_flan_t5(folder: Path, parts: int = 2) -> Path:
    """Write a CLIP-FlanT5 with the published names, in `parts` shards of torch.save."""
    from transformers import CLIPVisionConfig, CLIPVisionModel, T5Config, T5ForConditionalGeneration

    save_t5_tokenizer(folder)
    config = {
        "model_type": "t5", "architectures": ["CLIPT5ForConditionalGeneration"],
        "vocab_size": 240, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4,
        "num_decoder_layers": 2, "feed_forward_proj": "gated-gelu", "tie_word_embeddings": False,
        "decoder_start_token_id": 0, "mm_hidden_size": 64, "mm_projector_type": "mlp2x_gelu",
        "mm_vision_select_feature": "patch", "mm_vision_select_layer": -2,
        "mm_vision_tower": "openai/clip-vit-large-patch14-336",
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config))
    torch.manual_seed(1)
    vision = CLIPVisionModel(
        CLIPVisionConfig(
            hidden_size=64,
            intermediate_size=96,
            num_hidden_layers=3,
            num_attention_heads=1,
            image_size=28,
            patch_size=14,
        )  # fmt: skip
    )
    t5 = T5ForConditionalGeneration(
        T5Config(**{k: v for k, v in config.items() if not k.startswith(("mm_", "arch", "model_"))})
    )
    state = {k: v.clone() for k, v in t5.state_dict().items()}
    # transformers ties lm_head, FLAN-T5 does not; large, so that answers differ in likelihood.
    state["lm_head.weight"] = torch.randn(240, 32) * 0.3
    state["embed_tokens.weight"] = state["shared.weight"]
    tower = "vision_tower.vision_tower.vision_model."
    state |= {tower + name: tensor for name, tensor in vision.state_dict().items()}
    state[tower + "embeddings.position_ids"] = torch.arange(5)[None]
    for layer, width in ((0, 64), (2, 32)):
        state[f"mm_projector.{layer}.weight"] = torch.randn(32, width) * 0.3
        state[f"mm_projector.{layer}.bias"] = torch.randn(32)
    names = [f"pytorch_model-{i + 1:05d}-of-{parts:05d}.bin" for i in range(parts)]
    weight_map = {key: names[i % parts] for i, key in enumerate(state)}
    for name in names:
        torch.save({key: state[key] for key in state if weight_map[key] == name}, folder / name)
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    return folder


def save_t5_tokenizer(folder: Path) -> None:
    """Write a T5 tokenizer of some 200 tokens: letters, pairs of them, punctuation and "Yes"."""
    from transformers import T5Tokenizer

    marks = [*"abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789.,?!:'\"{}<>-"]
    scores = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", -9.0), ("▁", -5.0), ("▁Yes", -2.0)]
    scores += [(mark, -6.0) for mark in marks]
    scores += [(vowel + letter, -8.0) for vowel in "aeiou" for letter in marks[:26]]
    T5Tokenizer(vocab=scores, extra_ids=0).save_pretrained(folder)


def save_autoencoder(folder: Path, **extra: Any) -> Any:
    """Save a diffusers AutoencoderKL with random weights and return it."""
    from diffusers.models.autoencoders.autoencoder_kl import AutoencoderKL

    torch.manual_seed(0)
    build: Any = AutoencoderKL
    model = build(
        block_out_channels=(8, 8, 8),
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        latent_channels=4,
        norm_num_groups=4,
        **extra,
    )
    model.save_pretrained(folder)
    return model.eval()
