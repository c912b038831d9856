"""Classes of transformers that the zoo has no model of, each with the reason."""

from __future__ import annotations

_ALIAS = "the class of a text model that stands under its own name"
_PAIR = "an encoder and a decoder, or cross attention: a row is not one stream of tokens"
_TIMM = "its tower needs the package timm"
_CODES = "its images are codes of a picture's own vocabulary, whose table it wants"
_CONFIG = "its config is not made tiny by the names of its fields"
_HOST = "transformers 5.24 fails to make or run it"

LEFT_OUT: dict[str, str] = {
    **dict.fromkeys(("dots3_note", "llama4", "qwen3_5", "qwen3_5_moe", "qwen4_exp"), _ALIAS),
    **dict.fromkeys(("blip", "blip-2", "instructblip", "instructblipvideo"), _PAIR),
    **dict.fromkeys(("florence2", "idefics", "kosmos-2", "kosmos-2.5", "pix2struct"), _PAIR),
    **dict.fromkeys(("t5gemma2", "udop", "vision-encoder-decoder", "pp_formulanet"), _PAIR),
    **dict.fromkeys(("musicgen", "musicgen_melody"), _PAIR),
    **dict.fromkeys(("fast_vlm", "gemma3n", "perception_lm"), _TIMM),
    **dict.fromkeys(("apertus1p5", "chameleon", "emu3"), _CODES),
    **dict.fromkeys(("deepseek_ocr2", "glm5_next", "granite4_vision", "muse_spark"), _CONFIG),
    **dict.fromkeys(("nemotron_h_omni", "qwen4_exp_text"), _CONFIG),
    "blt": "its tokens are bytes, joined to patches by the model itself",
    "dbrx": _HOST,
    "diffusion_gemma": "a diffusion model: it has no next-token logits",
    "gemma4_assistant": "it drafts tokens of another model, and needs that model's keys",
    "gemma4_unified_assistant": "it drafts tokens of another model, and needs that model's keys",
    "inkling_mm_model": "its audio table has billions of weights at any size of its fields",
    "pi0": "it predicts a robot's motion",
    "reformer": "it hashes positions into buckets of fixed rows",
    "xmod": "it needs the language of each row",
}
"""By the names of the two mappings of transformers: causal models, and image-text-to-text."""
