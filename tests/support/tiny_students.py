"""Students of a few thousand weights, and the tokenizer and images they need."""

import numpy as np
from PIL import Image
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from regate_ds.recipe.students.internvl import build_internvl
from regate_ds.recipe.students.llava import build_llava
from regate_ds.recipe.students.qwen2_vl import build_qwen2_vl
from regate_ds.recipe.students.student import Student

SPECIAL = ["<s>", "</s>", "<pad>", "<image>"]
SENTENCE = "what is shown ? a red blue 3 7 digit at the top : USER ASSISTANT"
WORDS = SPECIAL + SENTENCE.split()
TEXT = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    # Large weights, so that a wrong position or a swapped layer changes the logits visibly.
    "initializer_range": 0.2,
}
CLIP = {
    "model_type": "clip_vision_model",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 24,
    "patch_size": 8,
}
QWEN_VISION = {
    "depth": 2,
    "embed_dim": 16,
    "num_heads": 2,
    "patch_size": 4,
    "spatial_merge_size": 2,
    "mlp_ratio": 2,
    "max_pixels": 24 * 24,
}
INTERN_VIT = {
    "model_type": "internvl_vision",
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "image_size": 32,
    "patch_size": 8,
}
MROPE = {"rope_type": "default", "rope_theta": 100.0, "mrope_section": [1, 1, 2]}


def make_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, "?"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token="<s>",
        eos_token="</s>",
        pad_token="<pad>",
        additional_special_tokens=SPECIAL[3:],
    )


def make_llava(text_type: str = "llama", **text) -> Student:
    return build_llava(
        make_tokenizer(), text={"model_type": text_type, **TEXT, **text}, vision=CLIP, seed=0
    )


def make_qwen2_vl(**text) -> Student:
    text = {**TEXT, "rope_parameters": MROPE, **text}
    return build_qwen2_vl(make_tokenizer(), text=text, vision=QWEN_VISION, seed=0)


def make_internvl(**text) -> Student:
    text = {"model_type": "qwen3", "head_dim": 8, **TEXT, **text}
    return build_internvl(make_tokenizer(), text=text, vision=INTERN_VIT, seed=0)


STUDENTS = {
    "internvl-qwen3": make_internvl,
    "llava-llama": make_llava,
    "llava-qwen2": lambda: make_llava("qwen2"),
    "llava-tied": lambda: make_llava(tie_word_embeddings=True),
    "qwen2-vl": make_qwen2_vl,
    "qwen2-vl-tied": lambda: make_qwen2_vl(tie_word_embeddings=True),
}


def make_image(width: int = 24, height: int = 24, seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(pixels)
