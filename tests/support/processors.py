"""Processors of transformers over tiny tokenizers, made from their classes."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from importlib.util import find_spec
from typing import Any

import transformers
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers.processors import TemplateProcessing
from tokenizers.trainers import BpeTrainer
from transformers import PreTrainedTokenizerFast
from transformers.utils import is_torchvision_available

from regate_ds.recipe.students.processor import images_alone
from tests.support.chat_templates import MARKED, unmarked

TEXTS = [
    "what is shown in the picture at the top? a red digit, the blue one: 3 7 5",
    "User: Assistant: system user assistant model You are a helpful assistant.",
    "Here is the original image and here are some crops to help you see better",
    "the answer is that there are two\n\nnew lines\n and  double  spaces. naïve café — größer",
    "数字是七。什么颜色? 🙂🙂 emoji",
] * 3


def tokenizer(special: list[str], kind: str = "bytes", **names: Any) -> PreTrainedTokenizerFast:
    """Train a tokenizer: "bytes" as Qwen's, "bos" as Llama 3's, "spaces" as Gemma's."""
    bpe = Tokenizer(models.BPE(byte_fallback=kind == "spaces", unk_token=None))
    alphabet: list[str] = []
    if kind == "spaces":
        bpe.normalizer = normalizers.Replace(" ", "▁")
        alphabet = [f"<0x{byte:02X}>" for byte in range(256)]
        bpe.decoder = decoders.Sequence(
            [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()]
        )
    else:
        bpe.normalizer = normalizers.NFC()
        bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        bpe.decoder = decoders.ByteLevel()
    trainer = BpeTrainer(
        vocab_size=700,
        special_tokens=[AddedToken(text, special=True) for text in [*special, *alphabet]],
        initial_alphabet=[] if kind == "spaces" else pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(TEXTS, trainer)
    bos = names.get("bos_token")
    if kind != "bytes":
        bpe.post_processor = TemplateProcessing(
            single=f"{bos} $A", special_tokens=[(bos, bpe.token_to_id(bos))]
        )
    return PreTrainedTokenizerFast(tokenizer_object=bpe, **names)


def _chatml(*more: str, **names: str) -> PreTrainedTokenizerFast:
    ends = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    return tokenizer(
        [*ends, *more, *names.values()],
        eos_token="<|im_end|>",
        pad_token="<|endoftext|>",
        extra_special_tokens=names,
    )


_QWEN_VIDEOS = {
    "size": {"shortest_edge": 64, "longest_edge": 1600},
    "patch_size": 4,
    "merge_size": 2,
    "cap_pixels_per_frame": False,
}
VIDEOS: dict[str, tuple[str, dict[str, Any]]] = {
    "InternVLProcessor": ("InternVLVideoProcessor", {"size": {"height": 32, "width": 32}}),
    "LlavaNextVideoProcessor": (
        "LlavaNextVideoVideoProcessor",
        {"size": {"shortest_edge": 16}, "crop_size": {"height": 16, "width": 16}},
    ),
    "LlavaOnevisionProcessor": (
        "LlavaOnevisionVideoProcessor",
        {"size": {"height": 16, "width": 16}},
    ),
    "Qwen2VLProcessor": ("Qwen2VLVideoProcessor", _QWEN_VIDEOS),
    "Qwen2_5_VLProcessor": ("Qwen2VLVideoProcessor", _QWEN_VIDEOS),
    "Qwen3VLProcessor": ("Qwen3VLVideoProcessor", {**_QWEN_VIDEOS, "fps": 3}),
    "SmolVLMProcessor": ("SmolVLMVideoProcessor", {}),
}
"""By class of processor: the class of its part for videos, and its settings."""


def _made(name: str, template: str, *parts: Any, **fields: Any) -> Any:
    made = images_alone(getattr(transformers, name))
    wanted = made.get_attributes()
    # Without torchvision there is none for videos.
    given = dict(zip(["image_processor", "tokenizer"], parts))
    if "video_processor" in wanted:
        kind, settings = VIDEOS[name]
        given["video_processor"] = getattr(transformers, kind)(**settings)
    return made(**given, chat_template=unmarked(MARKED[template]), **fields)


_QWEN_TOKENS = ("<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>")


def _qwen(name: str, template: str) -> Any:
    images = _images("Qwen2VLImageProcessor")(
        size={"shortest_edge": 64, "longest_edge": 1600}, patch_size=4, merge_size=2
    )
    return _made(name, template, images, _chatml(*_QWEN_TOKENS))


def _images(name: str) -> Any:
    return getattr(transformers, name if is_torchvision_available() else f"{name}Pil")


def _llava() -> Any:
    ends = ["<|begin_of_text|>", "<|eot_id|>", "<|start_header_id|>", "<|end_header_id|>"]
    tokens = tokenizer(
        [*ends, "<image>"], "bos", bos_token=ends[0], eos_token=ends[1], pad_token=ends[1]
    )
    images = _images("CLIPImageProcessor")(
        size={"shortest_edge": 16}, crop_size={"height": 16, "width": 16}
    )
    fields = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    return _made("LlavaProcessor", "llama", images, tokens, num_additional_image_tokens=1, **fields)


def _mistral(*more: str) -> PreTrainedTokenizerFast:
    ends = ["<s>", "</s>", "<pad>", "[INST]", "[/INST]", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"]
    return tokenizer([*ends, *more], "spaces", bos_token="<s>", eos_token="</s>", pad_token="<pad>")


PINPOINTS = [[16, 32], [32, 16], [32, 32], [16, 48]]
"""Sizes of the large pictures that are cut into tiles."""


def _llava_next(name: str = "LlavaNextProcessor", *more: str) -> Any:
    images = _images("LlavaNextImageProcessor")(
        size={"shortest_edge": 16},
        crop_size={"height": 16, "width": 16},
        image_grid_pinpoints=PINPOINTS,
    )
    fields = {"patch_size": 8, "vision_feature_select_strategy": "default"}
    tokens = _mistral("<image>", *more)
    return _made(name, "llava_next", images, tokens, num_additional_image_tokens=1, **fields)


def _onevision() -> Any:
    images = _images("LlavaOnevisionImageProcessor")(
        size={"height": 16, "width": 16}, image_grid_pinpoints=PINPOINTS
    )
    tokens = _chatml("<image>", "<video>")
    fields = {"num_image_tokens": 4, "vision_feature_select_strategy": "full"}
    return _made("LlavaOnevisionProcessor", "onevision", images, tokens, **fields)


def _internvl() -> Any:
    names = {
        "start_image_token": "<img>",
        "end_image_token": "</img>",
        "context_image_token": "<IMG_CONTEXT>",
        "video_token": "<video>",
    }
    images = _images("GotOcr2ImageProcessor")(
        size={"height": 32, "width": 32}, crop_to_patches=True, max_patches=4, min_patches=1
    )
    return _made("InternVLProcessor", "internvl", images, _chatml(**names), image_seq_length=4)


def _gemma3(**fields: Any) -> Any:
    names = {
        "boi_token": "<start_of_image>",
        "eoi_token": "<end_of_image>",
        "image_token": "<image_soft_token>",
    }
    ends = ["<pad>", "<eos>", "<bos>", "<start_of_turn>", "<end_of_turn>"]
    tokens = tokenizer(
        [*ends, *names.values()],
        "spaces",
        bos_token="<bos>",
        eos_token="<eos>",
        pad_token="<pad>",
        extra_special_tokens=names,
    )
    images = _images("Gemma3ImageProcessor")(size={"height": 16, "width": 16})
    made = _made("Gemma3Processor", "gemma", images, tokens, image_seq_length=4)
    # The class's own settings win over those of its image processor.
    made.images_kwargs = {**made.images_kwargs, **fields}
    return made


def _gemma3_with_crops() -> Any:
    return _gemma3(
        do_pan_and_scan=True,
        pan_and_scan_min_crop_size=8,
        pan_and_scan_min_ratio_to_activate=1.2,
    )


def _pixtral() -> Any:
    images = _images("PixtralImageProcessor")(
        size={"longest_edge": 64}, patch_size={"height": 8, "width": 8}
    )
    tokens = _mistral("[IMG]", "[IMG_BREAK]", "[IMG_END]")
    return _made("PixtralProcessor", "pixtral", images, tokens, patch_size=8, spatial_merge_size=2)


def _idefics(name: str) -> Any:
    rows = [f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7)]
    marks = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
    images = _images(f"{name}ImageProcessor")(
        size={"longest_edge": 96}, max_image_size={"longest_edge": 32}
    )
    return _made(f"{name}Processor", "idefics", images, _chatml(*marks, *rows), image_seq_len=4)


def _aya_vision() -> Any:
    marks = ["<|START_OF_TURN_TOKEN|>", "<|END_OF_TURN_TOKEN|>", "<|CHATBOT_TOKEN|>"]
    marks += ["<|USER_TOKEN|>", "<|SYSTEM_TOKEN|>", "<image>", "<|START_OF_IMG|>", "<|END_OF_IMG|>"]
    marks += ["<|IMG_LINE_BREAK|>", "TILE", "TILE_GLOBAL", "<|IMG_PATCH|>"]
    tokens = tokenizer(
        ["<BOS_TOKEN>", "<PAD>", *marks],
        "bos",
        bos_token="<BOS_TOKEN>",
        eos_token="<|END_OF_TURN_TOKEN|>",
        pad_token="<PAD>",
    )
    images = _images("GotOcr2ImageProcessor")(size={"height": 32, "width": 32}, max_patches=4)
    return _made(
        "AyaVisionProcessor",
        "cohere",
        images,
        tokens,
        patch_size=8,
        img_size=32,
        downsample_factor=2,
    )


MAKERS: dict[str, tuple[Callable[[], Any], str, str]] = {
    "qwen2_vl": (lambda: _qwen("Qwen2VLProcessor", "qwen"), "qwen", "<|image_pad|>"),
    "qwen2_5_vl": (lambda: _qwen("Qwen2_5_VLProcessor", "qwen"), "qwen", "<|image_pad|>"),
    "qwen3_vl": (lambda: _qwen("Qwen3VLProcessor", "qwen3"), "qwen3", "<|image_pad|>"),
    "llava": (_llava, "llama", "<image>"),
    "llava_next": (_llava_next, "llava_next", "<image>"),
    "llava_next_video": (
        lambda: _llava_next("LlavaNextVideoProcessor", "<video>"),
        "llava_next",
        "<image>",
    ),
    "llava_onevision": (_onevision, "onevision", "<image>"),
    "internvl": (_internvl, "internvl", "<IMG_CONTEXT>"),
    "gemma3": (_gemma3, "gemma", "<image_soft_token>"),
    "gemma3, crops": (_gemma3_with_crops, "gemma", "<image_soft_token>"),
    "mistral3": (_pixtral, "pixtral", "[IMG]"),
    "idefics3": (lambda: _idefics("Idefics3"), "idefics", "<image>"),
    "smolvlm": (lambda: _idefics("SmolVLM"), "idefics", "<image>"),
    "aya_vision": (_aya_vision, "cohere", "<|IMG_PATCH|>"),
}
"""By name: makes the processor; its template's name; the token of an image's patch."""


@cache
def processor(name: str) -> Any:
    return MAKERS[name][0]()


def can_make(name: str) -> bool:
    """Return whether the packages are there that a processor's class cannot be loaded without."""
    if name not in ("llava_next_video", "mistral3", "smolvlm"):
        return True
    return is_torchvision_available() and (name != "smolvlm" or find_spec("num2words") is not None)
